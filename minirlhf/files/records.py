"""From the rows of a data file to records: prompt and answers, as many as are wanted.

A record is {"prompt"} with `response`, or `chosen` and `rejected`, or nothing else. Whatever is
left out, or deserves a word, goes into a `notes.Tally`.
"""

from collections.abc import Callable, Iterable, Iterator

from minirlhf.files.disk import short
from minirlhf.files.formats import CUT_HH, OURS, find_shape, repeats_dialogue, trim
from minirlhf.files.lines import parse_row, read_lines
from minirlhf.files.notes import ANSWERS, END_TEXT, Tally


def read_rows(path: str, tally: Tally) -> Iterator[tuple[str, dict | str]]:
    """Yield ("file:line", record) for each row; in place of a record, why the row is dropped.

    Plain prompts are still plain. When `tally` is full, the other rows are only counted.
    """
    lines, shape = read_lines(path), None
    for place, line in lines:
        row = parse_row(line, place)
        if shape is None:
            shape = find_shape(row, place)
            tally.shape, tally.plain = shape.name, shape.plain
            tally.unused = sorted(set(row) - shape.keys - shape.others)
        record = shape.read(row, place)
        if shape is CUT_HH and isinstance(record, dict) and repeats_dialogue(row):
            tally.note("cut")
        if isinstance(record, dict) and "margin" in row:
            record["margin"] = row["margin"]
        tally.read += 1
        yield place, record
        if tally.full:
            break
    tally.total = tally.read
    try:
        for _ in lines:
            tally.total += 1
    except ValueError:                                   # a fault in rows that nobody reads
        tally.more = True


def use_rows(rows: Iterator[tuple[str, dict | str]], source: str, kind: str,
             format_prompt: Callable[[str], str], tally: Tally, count: int = 0) -> Iterator[dict]:
    """Yield the fields of the first `count` usable rows (0: all), with templated prompts.

    `format_prompt` makes a templated prompt of a plain one. What was dropped, and what deserves a
    word, goes into `tally` and is printed at the end. For `kind` see `FIELDS`.
    """
    if kind not in FIELDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(FIELDS)}")
    for place, record in rows:
        reason = record if isinstance(record, str) else settle(record, tally)
        if reason and tally.shape == OURS.name:
            raise ValueError(f"{place}: expected two different responses, found {reason} but for "
                             f"{END_TEXT!r}")
        if reason:
            tally.dropped[reason] += 1
            continue
        if tally.plain:
            record["prompt"] = format_prompt(record["prompt"])
        tally.used += 1
        tally.full = tally.used == count
        yield choose_fields(record, kind, place)
    if not tally.used:
        raise ValueError(f"{source}: expected usable rows, found none; dropped "
                         f"{tally.list_dropped()}")
    for line in tally.report(source, kind):
        print(line, flush=True)


def settle(record: dict, tally: Tally) -> str:
    """Take end texts off the ends of a record's answers; returns why it is unusable, or ""."""
    ended = False
    for key in [key for key in ANSWERS if key in record]:
        bare = take_off_end(record[key])
        ended = ended or bare != record[key]
        record[key] = bare
    reason = find_fault(record)
    if not reason:
        tally.look(record)
        if ended:
            tally.note("ended")
    return reason


def take_off_end(text: str) -> str:
    """A text without the end texts that are spelled out at its end, unless there is nothing else.

    Example: take_off_end("Yes.<|endoftext|>") == "Yes.".
    """
    end = len(text.rstrip())
    if not text.endswith(END_TEXT, 0, end):
        return text
    while text.endswith(END_TEXT, 0, end):
        end -= len(END_TEXT)
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end] or text


def find_fault(record: dict) -> str:
    """Why a record teaches nothing; "" if it can be used."""
    if not all(record[key].strip() for key in ANSWERS if key in record):
        return "an empty response"
    if not record["prompt"].strip():
        return "an empty prompt"
    pair = [trim(record[key]) for key in ("chosen", "rejected") if key in record]
    return "two equal responses" if len(pair) > len(set(pair)) else ""


class Records(list):
    """Records, and what their reader did with the other rows."""

    def __init__(self, records: Iterable[dict], tally: Tally):
        super().__init__(records)
        self.tally, self.dropped = tally, tally.dropped


FIELDS = {"demonstrations": ["prompt", "response"], "comparisons": ["prompt", "chosen", "rejected"],
          "prompts": ["prompt"], "all": []}


def choose_fields(record: dict, kind: str, place: str) -> dict:
    """The fields that `kind` needs; the chosen response serves as a demonstration."""
    if kind == "demonstrations" and "chosen" in record:
        return {"prompt": record["prompt"], "response": record["chosen"]}
    missing = [field for field in FIELDS[kind] if field not in record]
    if missing:
        raise ValueError(f"{place}: expected {' and '.join(missing)} for {kind}, found only "
                         f"{short(sorted(record))}")
    return {field: record[field] for field in FIELDS[kind] or record}
