"""Data files as people have them: our format, published ones, and files of strangers."""

import gzip
import json
import random
import time
import zlib

import pytest
from fuzzing import (
    FUZZ,
    INSERTED,
    MEBIBYTE,
    Tally,
    damage,
    peak_memory,
    put,
    reset_peak,
    write_hole,
)
from helpers import quietly

from minirlhf.data import encode_prompt, encode_response, read_records
from minirlhf.files import lines
from minirlhf.files.lines import MAX_LINE
from minirlhf.files.records import FIELDS


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    content = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(content) + b"\n")
    return str(path)


PAIR = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"}
POST = {"id": "t3_1", "subreddit": "cats", "title": "Cat", "post": "It sat.",
        "summary": " Cat sat."}
TLDR_PAIR = {"info": {"id": "t3_1", "subreddit": "cats", "title": "Cat", "post": "It sat."},
             "summaries": [{"text": " Cat.", "policy": "ref", "note": None}, {"text": " Sat cat."}],
             "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {}}


# ---- our format ----------------------------------------------------------------------------------

def test_our_formats_come_back_templated(tmp_path):
    rows = [{"prompt": " Hi? ", "response": "Yes."}, {"prompt": "B", "response": "C"}]
    path = write(tmp_path, rows)
    assert read_records(path, "demonstrations") == [
        {"prompt": "Prompt: Hi?\nResponse:", "response": "Yes."},
        {"prompt": "Prompt: B\nResponse:", "response": "C"}]
    assert read_records(path, "prompts", count=1) == [{"prompt": "Prompt: Hi?\nResponse:"}]
    path = write(tmp_path, [PAIR])
    assert read_records(path, "comparisons") == [{**PAIR, "prompt": "Prompt: Hi?\nResponse:"}]
    assert read_records(path, "demonstrations")[0]["response"] == "Yes."


def test_a_gzipped_file_reads_like_a_plain_one_whatever_its_name(tmp_path):
    plain = write(tmp_path, [PAIR] * 3)
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert read_records(str(packed), "comparisons") == read_records(plain, "comparisons")


BAD_LINES = [
    (b"", "expected a JSON object, found a blank line"),
    (b"[1]", "expected a JSON object"),
    (b"{", "not valid JSON"),
    (b'{"prompt": "a\x00b"}', "not valid JSON"),
    (b'{"prompt": "a\xff"}', "not valid JSON"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "byte order mark"),
    (b'{"prompt": "a", "prompt": "b"}', "appears twice"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": 3}', "expected text as 'prompt', found 3"),
    (b'{"prompt": " "}', "found an empty one"),
    (b'{"response": "a"}', "expected 'prompt'"),
    (b'{"prompt": "a", "respnse": "b"}', "found also .*respnse"),
    (b'{"prompt": "a", "response": ""}', "expected text as 'response', found an empty one"),
    (b'{"prompt": "a", "chosen": "b"}', "expected 'rejected'"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "b "}', "two different responses"),
    (b'{"prompt": "a' + b" " * 1_000_000 + b'b"}', "at most 100000 characters of white space"),
    (b'{"prompt": "' + b"a" * MAX_LINE + b'"}', "lines of at most"),
    (b"[" * 100_000, "not valid JSON")]


@pytest.mark.parametrize("line, message", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, line, message):
    path = write(tmp_path, [{"prompt": "Hi?"}, line, {"prompt": "Hi?"}])
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path, "prompts")
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(str(caught.value)) < len(path) + 300


def test_a_file_of_the_wrong_kind_or_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=":1: expected response for demonstrations"):
        read_records(write(tmp_path, [{"prompt": "a"}]), "demonstrations")
    with pytest.raises(ValueError, match=":1: expected chosen and rejected for comparisons"):
        read_records(write(tmp_path, [{"prompt": "a", "response": "b"}]), "comparisons")
    with pytest.raises(ValueError, match=":1: expected an object with prompt; or chosen, rejected"):
        read_records(write(tmp_path, [{"text": "a"}]), "prompts")
    with pytest.raises(ValueError, match="kind is 'pairs'"):
        read_records(write(tmp_path, [PAIR]), "pairs")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty file"):
        read_records(str(tmp_path / "empty"), "prompts")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_records(str(tmp_path / "absent.jsonl"), "prompts")


# ---- published formats ---------------------------------------------------------------------------

def test_a_dialogue_is_cut_before_its_last_answer(tmp_path):
    assert read_records(write(tmp_path, [HH]), "comparisons") == [
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
         "chosen": " d", "rejected": " e"}]


def test_unusable_rows_of_published_files_are_dropped_counted_and_printed(tmp_path, capsys):
    start = "\n\nHuman: a\n\nAssistant:"
    rows = [HH, {"chosen": start + " b", "rejected": start + "b "},
            {"chosen": start, "rejected": start},
            {"chosen": start + " b", "rejected": "\n\nHuman: z\n\nAssistant: b"},
            {"chosen": start + " b\n\nHuman: c", "rejected": start + " d"},
            {"chosen": "b", "rejected": "c"}]
    records = read_records(write(tmp_path, rows), "comparisons")
    assert len(records) == 1 and records.dropped.total() == 5
    assert records.dropped == {"two equal responses": 1, "an empty response": 1,
                               "dialogues that part before the last answer": 1,
                               "a Human turn after the last answer": 1,
                               "no Human and Assistant turns": 1}
    assert "1 rows read, dropped 1 with two equal responses" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected usable rows, found none"):
        read_records(write(tmp_path, rows[1:]), "comparisons")
    with pytest.raises(ValueError, match=":2: expected text as 'chosen'"):
        read_records(write(tmp_path, [HH, {"chosen": 1, "rejected": "a"}]), "comparisons")


def test_the_real_hh_file_reads_with_nine_rows_dropped(shared_data, gpt2_tokenizer):
    path = str(shared_data / "hh-harmless-base-test.jsonl.gz")
    records = read_records(path, "comparisons")
    assert len(records) == 2303
    assert records.dropped == {"an empty response": 4,
                               "dialogues that part before the last answer": 5}
    for kind in ("demonstrations", "prompts"):
        assert len(read_records(path, kind)) == 2303
    originals = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            originals[row["chosen"]] = row["rejected"]
    for record in records:
        rejected = originals[record["prompt"] + record["chosen"]]
        assert rejected == record["prompt"] + record["rejected"]
    for record in records[:200]:
        ids = encode_prompt(gpt2_tokenizer, record["prompt"])
        ids += encode_response(gpt2_tokenizer, record["chosen"])
        whole = record["prompt"] + " " + record["chosen"].strip()
        assert gpt2_tokenizer.decode(ids) == whole
        assert ids[1:-1] == gpt2_tokenizer.encode(whole)


def test_tldr_posts_and_comparisons_read_as_published(tmp_path):
    prompt = "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: It sat.\n\nTL;DR:"
    path = write(tmp_path, [POST, {**POST, "summary": " "}])
    assert read_records(path, "demonstrations") == [{"prompt": prompt, "response": " Cat sat."}]
    assert read_records(path, "prompts").dropped == {"an empty response": 1}
    same = {**TLDR_PAIR, "summaries": [{"text": "a"}, {"text": " a"}]}
    path = write(tmp_path, [TLDR_PAIR, {**TLDR_PAIR, "choice": 0}, same], "batch3.json")
    records = read_records(path, "comparisons")
    assert records == [{"prompt": prompt, "chosen": " Sat cat.", "rejected": " Cat."},
                       {"prompt": prompt, "chosen": " Cat.", "rejected": " Sat cat."}]
    assert records.dropped == {"two equal responses": 1}


@pytest.mark.parametrize("change", [
    {"choice": 2}, {"choice": True}, {"info": 3}, {"info": {"title": "a"}},
    {"summaries": [{"text": "a"}]}, {"summaries": ["a", "b"]}, {"summaries": [{"text": 1}, {}]}])
def test_a_wrong_tldr_comparison_is_refused_by_line(tmp_path, change):
    path = write(tmp_path, [TLDR_PAIR, {**TLDR_PAIR, **change}])
    with pytest.raises(ValueError, match="rows.jsonl:2: expected"):
        read_records(path, "comparisons")


# ---- bombs and holes -----------------------------------------------------------------------------

def test_a_gzip_bomb_ends_at_the_line_limit_and_a_torn_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (64 << 20)))
    with pytest.raises(ValueError, match=":1: expected lines of at most"):
        read_records(str(path), "prompts")
    whole = gzip.compress(b'{"prompt": "a"}\n' * 1000)
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="expected whole gzip data"):
        read_records(str(path), "prompts")


def measured(reader, *arguments):
    """Seconds and growth of memory in MiB that a reader took to refuse its file."""
    before, start = reset_peak(), time.process_time()
    with pytest.raises(ValueError, match="rows.jsonl") as caught:
        reader(*arguments)
    assert len(str(caught.value)) < 1000
    return time.process_time() - start, (peak_memory() - before) / MEBIBYTE


ROW = b'{"prompt": "Hi?"}\n'
GZIP_START = b"\x1f\x8b\x08\x08" + bytes(6)        # a file name follows, up to a NUL byte
DATA_BOMBS = {
    "gzip of blanks": gzip.compress(b" " * (64 << 20)),
    "gzip of one line": gzip.compress(b'{"prompt": "' + b"a" * (64 << 20) + b'"}'),
    "gzip in gzip": gzip.compress(gzip.compress(b" " * (64 << 20)) * 40),
    "gzip of NUL bytes": gzip.compress(ROW + bytes(64 << 20)),
    "rows, then a bomb": gzip.compress(ROW * 1000) + gzip.compress(b"a" * (64 << 20)),
    "empty parts of gzip": gzip.compress(b"") * 200_000,
    "a long gzip name": GZIP_START + b"n" * 5_000_000,
    "empty blocks of gzip": b"\x1f\x8b\x08\x00" + bytes(6) + b"\x00\x00\x00\xff\xff" * 10 ** 6,
    "a row of lists": b'{"prompt": "a", "margin": [' + b"[]," * 340_000 + b"[]]}\n",
    "a row of objects": b'{"prompt": "a", "kind": [' + b"{}," * 340_000 + b"{}]}\n",
    "a row of keys": b'{"prompt": "a"' + b"".join(b',"%x":0' % i for i in range(90_000)) + b"}\n",
    "an enormous number": b'{"prompt": ' + b"9" * 1_000_000 + b"}\n",
    "a deep row": b'{"prompt": ' + b"[" * 1_000_000,
    "NUL bytes": ROW + bytes(10 << 20),
    "one line without an end": b'{"prompt": "' + b"a" * (10 << 20),
    "blank lines": b"\n" * (10 << 20)}


@pytest.mark.parametrize("case", DATA_BOMBS)
def test_bombs_end_soon_in_bounded_memory(tmp_path, case):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(DATA_BOMBS[case])
    seconds, mebibytes = measured(read_records, str(path), "all")
    assert seconds < 10 and mebibytes < 64, (seconds, mebibytes)


def test_gzip_files_over_the_limit_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    """Their size bounds the time: empty parts and long names take time, but give no text."""
    path = tmp_path / "rows.jsonl"
    packed = gzip.compress(ROW * 100)
    path.write_bytes(packed)
    monkeypatch.setattr(lines, "MAX_PACKED", len(packed))
    assert len(read_records(str(path), "prompts")) == 100
    monkeypatch.setattr(lines, "MAX_PACKED", len(packed) - 1)
    with pytest.raises(ValueError, match="rows.jsonl: expected at most .* bytes of gzip"):
        read_records(str(path), "prompts")


def test_files_of_holes_are_refused_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    for head in (b"", ROW, b"\x1f\x8b\x08\x08"):
        if not write_hole(path, head, 10 ** 12):
            pytest.skip("no files with holes here")
        seconds, mebibytes = measured(read_records, str(path), "prompts")
        assert seconds < 2 and mebibytes < 16, (head, seconds, mebibytes)


# ---- files by the thousand -----------------------------------------------------------------------

ORIGINALS = [[PAIR, PAIR], [{"prompt": "a", "response": "b"}] * 3,
             [{"prompt": "\u00e9\U0001f642"}] * 2, [HH, HH], [POST, POST],
             [TLDR_PAIR, {**TLDR_PAIR, "choice": 0}]]


def plain_gzip(content: bytes) -> tuple[bytes, bytes]:
    """The text of the first part of a gzip file, and what follows it. Source: RFC 1952."""
    flags, at = content[3], 10
    if flags & 4:
        at += 2 + int.from_bytes(content[at:at + 2], "little")
    for flag in (8, 16):                             # a file name, a comment
        if flags & flag:
            at = content.index(b"\0", at) + 1
    at += 2 if flags & 2 else 0
    part = zlib.decompressobj(-15)
    text = part.decompress(content[at:])
    assert part.eof and zlib.crc32(text) == int.from_bytes(part.unused_data[:4], "little")
    return text, part.unused_data[8:].lstrip(b"\0")


def plain_reading(content: bytes) -> list[dict]:
    """What a file holds, by the standard library alone and without any check."""
    text = b""
    while content[:2] == b"\x1f\x8b":                # a gzip file may have several parts
        unpacked, content = plain_gzip(content)
        text += unpacked
    lines = (text + content).decode("utf-8-sig").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def odd_row(rng: random.Random, row: dict) -> dict:
    """The row with one of its texts changed: other letters in it, or something else entirely."""
    row = json.loads(json.dumps(row))
    owner = rng.choice([row, row, row.get("info", row), *row.get("summaries", [])])
    keys = [key for key, value in owner.items() if isinstance(value, str)]
    if keys and rng.random() < 0.5:
        odd = rng.choice(["\0", "\u2028", "\x85", "\r", "\U0010ffff", " ", "{}", "\n\nHuman:",
                          "\n\nAssistant:", "", "\ufeff"])
        key = rng.choice(keys)
        at = rng.randint(0, len(owner[key]))
        owner[key] = rng.choice([owner[key][:at] + odd + owner[key][at:], odd, owner[key][at:]])
    return row


def texts_in(value) -> list[str]:
    """All texts inside a value from JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def check_records(records, content: bytes, kind: str) -> None:
    """Every row became one record or was dropped, and no text is there that the row has not."""
    rows = plain_reading(content)
    assert len(records) + records.dropped.total() == len(rows)
    if not records.dropped:
        for record, row in zip(records, rows):
            assert set(record) == set(FIELDS[kind])
            texts = texts_in(row)
            for text in [text for key, text in record.items() if key != "prompt"]:
                assert any(text and text in whole for whole in texts), (text, row)
            if "info" not in row and "post" not in row:
                core = record["prompt"].removeprefix("Prompt: ").removesuffix("\nResponse:")
                assert any(core.strip() in whole for whole in texts), (core, row)


def test_mutated_data_files_end_in_the_rows_they_hold_or_a_value_error(tmp_path):
    rng, path, tally = random.Random(3), tmp_path / "rows.jsonl", Tally("JSONL, plain and gzipped")
    for case in range(max(1500, FUZZ)):
        rows = [odd_row(rng, row) for row in rng.choice(ORIGINALS)]
        ascii_only = rng.random() < 0.5
        content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
        if case % 4 == 0:                            # damage inside sound gzip
            content = gzip.compress(damage(rng, content, INSERTED), compresslevel=1)
        if case % 4 == 1:                            # damage to the gzip
            content = damage(rng, gzip.compress(content, rng.choice([0, 6])), INSERTED)
        if case % 4 == 2:
            content = damage(rng, content, INSERTED)
        put(path, content)
        kind = rng.choice(["prompts", "prompts", "demonstrations", "comparisons"])
        records = quietly(tally.attempt, str(path), read_records, str(path), kind)
        if records is not None:
            check_records(records, content, kind)
    tally.finish()
    assert min(tally.read, tally.refused) > 0.1 * (tally.read + tally.refused)
