"""From text to rows of ids: prompt template, responses, padding and masks, records of a file.

    python -m minirlhf.data comparisons.jsonl --tokenizer gpt2 --show 2

prints what a file holds: its shape, what was dropped and why, lengths in tokens, rows as the model
reads them, and token by token with a mark at those that the loss sees.

Rules, the same for all three stages (`files/formats.py` has the shapes):
1. Plain prompts get our template; HH-RLHF keeps its turns, TL;DR its headings.
2. A file with comparisons also serves as demonstrations (prompt and chosen) and as prompts.
3. A bad line is an error that names it. Published rows that are well-formed but of no use are
   dropped, counted and printed. What looks wrong is printed (`files/notes.py`).
4. Rows are token lists: the end token, prompt | space, response, end token, without white space
   around the texts but for a first line's indentation. Too long: dropped and counted (`fit_rows`),
   never cut. A prompt is never tokenized a second time.
5. Held-out rows of a file, which may be sorted, are drawn by seed (`mix`); a function's are not.
Shapes: B sequences, T tokens in the padded row.
Lecture: lectures/02-sft.md, "What the loss sees".
"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from minirlhf.engine.fields import Natural, check_fields
from minirlhf.engine.functions import ask_for_records
from minirlhf.engine.options import check, name_first_argument, one_sentence, parse_config
from minirlhf.engine.training import random_stream
from minirlhf.files.formats import trim
from minirlhf.files.notes import ANSWERS, Tally, describe_lengths, shorten
from minirlhf.files.records import Records, read_rows, use_rows
from minirlhf.tokenizer import Tokenizer

TEMPLATE = "Prompt: {prompt}\nResponse:"


# ---- templates and rows --------------------------------------------------------------------------

def format_prompt(prompt: str) -> str:
    """Our template: format_prompt(" Hi? ") == "Prompt: Hi?\\nResponse:"."""
    check(bool(prompt.strip()), "expected a prompt with text, found an empty one")
    return TEMPLATE.format(prompt=trim(prompt))


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a templated prompt. Every sequence starts with the end token, as documents do."""
    return [tokenizer.end_token] + tokenizer.encode(text)


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Ids of a response: one space (the templates end in a colon), the text, the end token."""
    return tokenizer.encode(" " + trim(response)) + [tokenizer.end_token]


def fit_rows(rows: list, max_tokens: int) -> tuple[list, int]:
    """Drop the rows longer than `max_tokens`; return the others and the number dropped.

    Example: fit_rows([[1, 2], [1, 2, 3]], 2) == ([[1, 2]], 1).
    """
    kept = [row for row in rows if len(row) <= max_tokens]
    return kept, len(rows) - len(kept)


def pad(rows: list[list[int]], fill: int,
        device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows of ids to one tensor: ids (B, T) and lengths (B,), both long.

    Example: pad([[5, 6], [7]], 0) gives ids [[5, 6], [7, 0]] and lengths [2, 1].
    """
    check(len(rows) > 0 and all(len(row) > 0 for row in rows), "expected rows of at least one "
          f"token, found lengths {[len(row) for row in rows][:8]}")
    lengths = torch.tensor([len(row) for row in rows])                                # (B,)
    width = int(lengths.max())
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])           # (B, T)
    return ids.to(device), lengths.to(device)


def response_mask(prompt_lengths: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Which columns (state ids[0..t] -> action ids[t+1]) have a response token as action: (B, T-1).

    `lengths` counts prompt and response, the end token that was chosen included: that token is an
    action, so it stays in the mask. Built from lengths, never from ids.

    Example, a prompt p p and the response r r end, then padding (width 6): columns 1, 2, 3 choose
    r, r, end, so response_mask([2], [5], 6) == [[0, 1, 1, 1, 0]].
    """
    ok = bool(((1 <= prompt_lengths) & (prompt_lengths <= lengths) & (lengths <= width)).all())
    check(ok, f"expected 1 <= prompt length <= length <= {width}, found prompt lengths "
          f"{prompt_lengths.tolist()[:8]} and lengths {lengths.tolist()[:8]}")
    column = torch.arange(width - 1, device=lengths.device)                           # (T-1,)
    first_action = prompt_lengths[:, None] - 1                                        # (B, 1)
    last_action = lengths[:, None] - 2                                                # (B, 1)
    return (first_action <= column) & (column <= last_action)                         # (B, T-1)


# ---- records -------------------------------------------------------------------------------------

def is_function(source: str) -> bool:
    """Whether `source` names a "module:function" and not a file."""
    return ":" in source and not os.path.exists(source)


def records(source: str, kind: str, tally: Tally | None = None, *, count: int = 0, seed: int = 0,
            model: str = "") -> Iterator[dict]:
    """Yield records with templated prompts from a file (the first `count`; 0: all) or a function.

    kind "demonstrations" gives {"prompt", "response"}, "comparisons" {"prompt", "chosen",
    "rejected"}, "prompts" {"prompt"}, "all" whatever there is. A function "module:function" is
    called with count, seed and model and returns records of our format. What is worth a word goes
    into `tally` and is printed at the end. Raises: ValueError "file:line: expected ..., found ...".
    """
    tally, asked = tally or Tally(), is_function(source)
    rows = ask_for_records(source, count, seed, model, str) if asked else read_rows(source, tally)
    return use_rows(rows, source, kind, format_prompt, tally, 0 if asked else count)


def read_records(source: str, kind: str, **options) -> Records:
    """The records of `records` as a list, with its tally."""
    tally = Tally()
    return Records(records(source, kind, tally, **options), tally)


def mix(rows: list, source: str, seed: int, in_order: bool) -> list:
    """The rows of a file in an order drawn by seed; `in_order`, or of a function: as they are."""
    order = torch.randperm(len(rows), generator=random_stream(seed, 6))             # (rows,)
    return rows if in_order or is_function(source) else [rows[i] for i in order]


@dataclass(frozen=True)
class Prompt:
    """One prompt that a policy is to answer."""
    text: str                           # templated
    kind: str                           # the world's: entity, combination; "" elsewhere
    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


def read_prompts(source: str, tokenizer: Tokenizer, context: int, max_new_tokens: int, *,
                 count: int, seed: int, model: str = "",
                 fewest: int = 1) -> tuple[list[Prompt], int]:
    """Prompts that leave room for a response in the context, and how many longer ones are left out.

    Raises: ValueError when less than `fewest` are left, the batch size, say.
    """
    rows = []
    for record in records(source, "all", count=count, seed=seed, model=model):
        text = record["prompt"]
        rows.append(Prompt(text, str(record.get("kind", "")), encode_prompt(tokenizer, text)))
    kept, too_long = fit_rows(rows, context - max_new_tokens)
    print(f"{len(kept)} prompts ({too_long} that leave no room for {max_new_tokens} new tokens in "
          f"the context of {context} dropped)", flush=True)
    check(len(kept) >= fewest, f"{source}: {len(kept)} prompts that leave room for a response, "
          f"expected at least {fewest}; bring more, or lower --max_new_tokens or --batch_size")
    return kept, too_long


# ---- what a file holds ---------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    """Options of `python -m minirlhf.data`; a first argument without -- is the file."""
    data: str = "minirlhf.world:demonstrations"    # .jsonl or .jsonl.gz file, or module:function
    kind: Literal["all", "demonstrations", "comparisons", "prompts"] = "all"    # which fields
    tokenizer: str = "checkpoints/tiny"    # checkpoint folder whose tokenizer is used, or gpt2
    show: Natural = 1                   # examples to print token by token

    def __post_init__(self):
        check_fields(self)


def label_table(tokenizer: Tokenizer, prompt: list[int], response: list[int]) -> str:
    """One line per token, of a prompt the last 12, with a mark at the actions in the response mask.

    Column t of the mask belongs to the action ids[t+1]: token number t+1 carries its mark.
    """
    ids, lengths = pad([prompt + response], tokenizer.end_token)                  # (1, T), (1,)
    mask = response_mask(torch.tensor([len(prompt)]), lengths, ids.shape[1])      # (1, T-1)
    lines = ["position     id  in the mask  token"]
    for position in range(max(0, len(prompt) - 12), ids.shape[1]):
        token = int(ids[0, position])
        mark = "yes" if position > 0 and mask[0, position - 1] else "-"
        text = tokenizer.decode([token], skip_end=False)
        lines.append(f"{position:8d} {token:6d}  {mark:11s}  {text!r}")
    return "\n".join(lines)


def main(cfg: DataConfig) -> list[dict]:
    """Print shape, counts, drops, lengths and examples; return the records that are shown."""
    tokenizer = Tokenizer.gpt2() if cfg.tokenizer == "gpt2" else Tokenizer.load(cfg.tokenizer)
    count = 1000 if is_function(cfg.data) else 0             # a function makes as many as asked
    tally, lengths, shown = Tally(), defaultdict(Counter), []
    for record in records(cfg.data, cfg.kind, tally, count=count, model="checkpoints/sft"):
        rows = {field: encode_response(tokenizer, record[field])
                for field in ANSWERS if field in record}
        rows = {"prompt": encode_prompt(tokenizer, record["prompt"]), **rows}
        for field, ids in rows.items():
            lengths[field][len(ids)] += 1
        if tally.used <= max(1, cfg.show):
            shown.append((record, rows))
    print(f"{cfg.data}: {tally.used} rows, {tally.describe_shape()}",
          *map(describe_lengths, lengths, lengths.values()), sep="\n")
    for number, (_, rows) in enumerate(shown):
        for field in [field for field in ANSWERS if field in rows] or [""]:
            text = tokenizer.decode(rows["prompt"] + rows.get(field, []), skip_end=False)
            print(f"\nrow {number + 1}, as the model reads it: {shorten(text)}")
            if field and number < cfg.show:
                print(f"{field}:\n{label_table(tokenizer, rows['prompt'], rows[field])}")
    return [record for record, _ in shown]


if __name__ == "__main__":
    name_first_argument("data")
    with one_sentence():
        main(parse_config(DataConfig))
