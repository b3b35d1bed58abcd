"""Text in: tokenizer and its training, prompt templates, readers of data files, padding and masks.

    python -m minirlhf.data comparisons.jsonl --tokenizer gpt2 --show 2

prints what a file holds: counts, what was dropped and why, lengths in tokens, and examples token by
token with a mark at those that the loss sees.

Files hold one JSON object a line, plain or gzipped. The first line decides the format:
    ours            {"prompt"}, {"prompt", "response"} or {"prompt", "chosen", "rejected"}
    HH-RLHF         {"chosen", "rejected"}: dialogues that share all but the last answer
    TL;DR posts     {"subreddit", "title", "post", "summary"}
    TL;DR comparisons   {"info": a post, "summaries": two texts, "choice": 0 or 1}
Rules, the same for all three stages:
1. Our prompts are plain and get the lecture's template; HH-RLHF keeps its turns, TL;DR its
   headings.
2. A file with comparisons also serves as demonstrations (prompt and chosen) and as prompts.
3. A bad line is an error that names file and line. In the published formats alone, rows that are
   well-formed but unusable (`Records.dropped` has the reasons) are dropped, counted and printed.
4. Rows are token lists: the end token, prompt | space, response, end token. Too long: dropped and
   counted (`fit_rows`), never cut. A prompt is never tokenized a second time.
Shapes: B sequences, T tokens in the padded row.
Lecture: lectures/01-sft.md, "What the loss sees".
"""

import gzip
import heapq
import importlib
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import tiktoken
import tiktoken.load
import torch

from minirlhf.common import check, check_choice, check_range, run
from minirlhf.weights import (open_regular, parse_json, read_json, short, write_atomically,
                              write_json)

END_TEXT = "<|endoftext|>"          # GPT-2's only special token; always the last id
TEMPLATE = "Prompt: {prompt}\nResponse:"
TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"       # HH-RLHF's turns
MAX_MERGES_FILE = 1 << 20           # bytes; GPT-2's has half a million
MAX_LINE = 1 << 20                  # bytes of one row, unpacked
MAX_TEXT = 1 << 30                  # bytes of one file, unpacked
MAX_PACKED = 256 << 20              # bytes of one gzipped file
MAX_SPACE = 100_000                 # characters of white space in a row; tiktoken dies of a million
MAX_ROWS = 2_000_000

# GPT-2's order of the 256 bytes, printable ones first, and the character that stands for each byte
# in vocab.json and merges.txt. Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_NAME = {byte: chr(byte if rank < len(PRINTABLE) else 256 + rank - len(PRINTABLE))
             for rank, byte in enumerate(BYTE_ORDER)}
NAME_BYTE = {name: byte for byte, name in BYTE_NAME.items()}

# How GPT-2 cuts text before merging, in the form that tiktoken publishes for it.
GPT2_PATTERN = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++"
                r"|\s++$|\s+(?!\S)|\s")
# The same cut for Python's `re`, which has no \p{L}: used to count words in training only. Equal on
# ASCII; a few characters outside it (such as superscript digits) fall into another class, which
# changes which merges are learned, never how text is encoded. The `regex` package would be exact,
# but is not among the packages that we ask for.
SPACE = r"[^\S\x1c-\x1f]"        # Unicode's white space: Python's \s has four codes more
TRAINING_PATTERN = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|[_\x1c-\x1f])+"
    rf"|{SPACE}+(?!\S|[\x1c-\x1f])|{SPACE}")

GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


# ---- tokenizer -----------------------------------------------------------------------------------

class Tokenizer:
    """GPT-2's byte-level BPE over any list of merges, run by tiktoken.

    Ids: the 256 bytes in GPT-2's order, then the product of each merge, then `<|endoftext|>`. So a
    product's id is also its rank, and tiktoken, which joins the neighbours whose product has the
    lowest rank, does what GPT-2's list of merges says.

    Example: t = Tokenizer([(b"a", b"b"), (b" ", b"ab")]) has t.vocab_size == 259,
    t.encode("ab ab") == [256, 257], t.end_token == 258, t.decode([256, 257, 258]) == "ab ab".
    """

    def __init__(self, merges: list[tuple[bytes, bytes]], source: str = "merges"):
        ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
        for number, (left, right) in enumerate(merges, start=1):
            if left not in ranks or right not in ranks:    # a `check` would cost every merge
                raise ValueError(f"{source}: merge {number} joins {short(left)} and "
                                 f"{short(right)}, expected two earlier tokens")
            if left + right in ranks:
                raise ValueError(f"{source}: merge {number} makes {short(left + right)} a second "
                                 "time")
            ranks[left + right] = len(ranks)
        self.merges = list(merges)
        self.end_token = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.encoding = tiktoken.Encoding("minirlhf", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={END_TEXT: self.end_token})

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, end_token={self.end_token})"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never the end token, even if the text spells `<|endoftext|>`."""
        space = longest_space(text)
        check(space <= MAX_SPACE, f"expected a text with at most {MAX_SPACE} characters of white "
              f"space in a row, found {space}")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int], skip_end: bool = True) -> str:
        """Text of `ids`, without end tokens unless asked; half a character becomes U+FFFD."""
        bad = [token for token in ids if not 0 <= token < self.vocab_size]
        check(not bad, f"token id {bad[:1]} is outside the vocabulary of {self.vocab_size}")
        kept = [token for token in ids if not (skip_end and token == self.end_token)]
        return self.encoding.decode(kept)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id as vocab.json has it: each byte written as its GPT-2 character."""
        tokens = [bytes([byte]) for byte in BYTE_ORDER]
        tokens += [left + right for left, right in self.merges]
        ids = {spell(token): rank for rank, token in enumerate(tokens)}
        ids[END_TEXT] = self.end_token
        return ids

    def save(self, folder: str, n_positions: int = 1024) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as transformers reads them."""
        os.makedirs(folder, exist_ok=True)
        lines = ["#version: 0.2"] + [f"{spell(left)} {spell(right)}" for left, right in self.merges]
        write_json(os.path.join(folder, "vocab.json"), self.vocabulary())
        write_atomically(os.path.join(folder, "merges.txt"),
                         ("\n".join(lines) + "\n").encode("utf-8"))
        write_json(os.path.join(folder, "tokenizer_config.json"), {
            "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "add_bos_token": False,
            "bos_token": END_TEXT, "eos_token": END_TEXT, "unk_token": END_TEXT,
            "errors": "replace", "clean_up_tokenization_spaces": False,
            "model_max_length": n_positions})

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own 50,257 tokens, which tiktoken fetches once and keeps in its cache."""
        try:
            data = tiktoken.load.read_file_cached(GPT2_MERGES, GPT2_MERGES_SHA256)
        except OSError as error:
            raise FileNotFoundError(
                "GPT-2's merges are neither in tiktoken's cache nor to be had from the network. "
                "Put vocab.json and merges.txt of the model into the checkpoint folder, or set "
                "TIKTOKEN_CACHE_DIR to a folder filled on another machine by: python -c "
                f"\"import tiktoken; tiktoken.get_encoding('gpt2')\" ({type(error).__name__})"
            ) from error
        return cls(parse_merges(data, GPT2_MERGES))

    @classmethod
    def load(cls, folder: str) -> "Tokenizer":
        """The tokenizer of a checkpoint folder: merges.txt, with vocab.json checked against it.

        A folder that has neither file, but GPT-2's vocabulary size in config.json, gets GPT-2's.
        """
        vocab_path = os.path.join(folder, "vocab.json")
        merges_path = os.path.join(folder, "merges.txt")
        if not os.path.exists(vocab_path) and not os.path.exists(merges_path):
            config_path = os.path.join(folder, "config.json")
            if os.path.exists(config_path) and read_json(config_path).get("vocab_size") == 50257:
                return cls.gpt2()
        for path in (vocab_path, merges_path):
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path} does not exist; expected a tokenizer, "
                                        "vocab.json and merges.txt, as every stage writes it")
        with open_regular(merges_path) as file:
            data = file.read(MAX_MERGES_FILE + 1)
        check(len(data) <= MAX_MERGES_FILE,
              f"{merges_path}: expected at most {MAX_MERGES_FILE} bytes, found more")
        tokenizer = cls(parse_merges(data, merges_path), merges_path)
        check_vocabulary(read_json(vocab_path), tokenizer.vocabulary(), vocab_path)
        return tokenizer


def longest_space(text: str) -> int:
    """Length of the longest run of white space; 0 for texts too short to matter.

    careful: at a million, the pattern that cuts the text overflows tiktoken's stack, and the panic
    of its Rust code is no `Exception`.
    """
    if len(text) <= MAX_SPACE:
        return 0
    return max((len(run) for run in re.findall(r"\s+", text)), default=0)


def check_vocabulary(found: dict, expected: dict[str, int], path: str) -> None:
    """vocab.json must state the ids that follow from merges.txt; the error names a wrong one."""
    if found == expected:
        return
    for token in [*expected, *found]:
        one, other = found.get(token), expected.get(token)
        check(one == other, f"{path}: expected token {short(token)} with id {short(other)}, as "
              f"merges.txt has it, found {short(one)} (None: not there)")


def spell(token: bytes) -> str:
    """A token as vocab.json writes it: spell(b" the") == "\u0120the"."""
    return "".join(BYTE_NAME[byte] for byte in token)


def parse_merges(data: bytes, path: str) -> list[tuple[bytes, bytes]]:
    """The merges of a merges.txt: two tokens a line, after an optional `#version` line."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        parts = line.split(" ")
        ok = len(parts) == 2 and all(parts) and all(name in NAME_BYTE for name in "".join(parts))
        if not ok:
            raise ValueError(f"{path}:{number}: expected two tokens, found {short(line)}")
        left, right = (bytes(NAME_BYTE[name] for name in part) for part in parts)
        merges.append((left, right))
    return merges


# ---- BPE training --------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE: again and again join the most frequent pair of neighbours.

    Words are cut as GPT-2 cuts them and counted once, so the work depends on the number of
    different words. Equal counts go to the pair of smallest ids: the result depends on the texts
    and nothing else. `vocab_size` counts the 256 bytes and the end token.

    Example: in "ab ab abc" the pair a,b occurs 3 times, then " ",ab 2 times, so
    train_bpe(["ab ab abc"], 259).merges == [(b"a", b"b"), (b" ", b"ab")].
    """
    check(not isinstance(texts, str), "train_bpe expects an iterable of texts, found one string")
    check(vocab_size >= 257, f"vocab_size is {vocab_size}, expected at least 257 (bytes and end)")
    word_counts = Counter()
    for text in texts:
        word_counts.update(TRAINING_PATTERN.findall(text))
    byte_rank = {byte: rank for rank, byte in enumerate(BYTE_ORDER)}
    words = [[byte_rank[byte] for byte in word.encode("utf-8", "replace")] for word in word_counts]
    counts = list(word_counts.values())
    pair_counts, places = Counter(), defaultdict(set)       # places: the words that have the pair
    for index, word in enumerate(words):
        add_pairs(word, counts[index], index, pair_counts, places)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([byte]) for byte in BYTE_ORDER]
    merges = []
    while len(tokens) < vocab_size - 1:
        pair = pop_most_frequent(heap, pair_counts)
        check(pair is not None, f"the text has so few words that vocab_size ends at "
              f"{len(tokens) + 1}, expected {vocab_size}; give more text or ask for less")
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        for index in places.pop(pair):
            add_pairs(words[index], -counts[index], index, pair_counts, places)
            words[index] = join_pair(words[index], pair, len(tokens))
            add_pairs(words[index], counts[index], index, pair_counts, places)
            for new_pair in zip(words[index], words[index][1:]):
                if len(tokens) in new_pair:
                    heapq.heappush(heap, (-pair_counts[new_pair], new_pair))
        tokens.append(merges[-1][0] + merges[-1][1])
    return Tokenizer(merges)


def add_pairs(word: list[int], count: int, index: int, pair_counts: Counter,
              places: dict[tuple, set]) -> None:
    """Add `count` (negative: take away) to each pair of neighbours of word number `index`."""
    for pair in zip(word, word[1:]):
        pair_counts[pair] += count
        places[pair].add(index)


def pop_most_frequent(heap: list[tuple], pair_counts: Counter) -> tuple[int, int] | None:
    """The pair of highest count. Entries that went out of date are put back with today's count."""
    while heap:
        count, pair = heapq.heappop(heap)
        if -count == pair_counts[pair]:
            if count < 0:
                return pair
        elif pair_counts[pair] > 0:
            heapq.heappush(heap, (-pair_counts[pair], pair))
    return None


def join_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each `pair` in `word`: join_pair([1, 2, 3, 1, 2], (1, 2), 9) == [9, 3, 9]."""
    joined, at = [], 0
    while at < len(word):
        found = tuple(word[at:at + 2]) == pair
        joined.append(new if found else word[at])
        at += 2 if found else 1
    return joined


# ---- templates and rows --------------------------------------------------------------------------

def format_prompt(prompt: str) -> str:
    """The lecture's template: format_prompt(" Hi? ") == "Prompt: Hi?\\nResponse:"."""
    check(bool(prompt.strip()), "expected a prompt with text, found an empty one")
    return TEMPLATE.format(prompt=prompt.strip())


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a templated prompt. Every sequence starts with the end token, as documents do."""
    return [tokenizer.end_token] + tokenizer.encode(text)


def encode_response(tokenizer: Tokenizer, response: str) -> list[int]:
    """Ids of a response: one space (the templates end in a colon), the text, the end token."""
    return tokenizer.encode(" " + response.strip()) + [tokenizer.end_token]


def fit_rows(rows: list, max_tokens: int) -> tuple[list, int]:
    """Drop the rows longer than `max_tokens`; return the others and the number dropped.

    Example: fit_rows([[1, 2], [1, 2, 3]], 2) == ([[1, 2]], 1).
    """
    kept = [row for row in rows if len(row) <= max_tokens]
    return kept, len(rows) - len(kept)


def pad(rows: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows of ids to one tensor: ids (B, T) and lengths (B,), both long.

    Example: pad([[5, 6], [7]], 0) gives ids [[5, 6], [7, 0]] and lengths [2, 1].
    """
    check(len(rows) > 0 and all(len(row) > 0 for row in rows), "expected rows of at least one "
          f"token, found lengths {[len(row) for row in rows][:8]}")
    lengths = torch.tensor([len(row) for row in rows])                                # (B,)
    width = int(lengths.max())
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])           # (B, T)
    return ids, lengths


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


# ---- readers -------------------------------------------------------------------------------------

class Records(list):
    """Records, and how many rows of the file were left out for which reason: `dropped`."""

    def __init__(self):
        super().__init__()
        self.dropped = Counter()


def load_function(spec: str):
    """The function that "module:function" names, such as "minirlhf.world:demonstrations"."""
    named = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec)
    check(bool(named), f"expected a file that exists or module:function, found {spec!r}")
    module_name, function_name = spec.split(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not (module_name + ".").startswith(f"{error.name}."):
            raise                       # the module is there; something that it imports is not
        raise ValueError(f"{spec}: expected a module that Python finds, found none named "
                         f"{error.name!r}; start in its folder, by python -m") from None
    function = getattr(module, function_name, None)
    check(callable(function), f"{spec}: module {module_name} has no function {function_name}")
    return function


def read_records(source: str, kind: str, *, count: int = 0, seed: int = 0,
                 model: str = "") -> Records:
    """Records with templated prompts from a file (its first `count` rows; 0: all) or a function.

    kind "demonstrations" gives {"prompt", "response"}, "comparisons" {"prompt", "chosen",
    "rejected"}, "prompts" {"prompt"}, "all" whatever there is. A function "module:function" is
    called with count, seed and model and returns records of our format.

    Raises: ValueError "file:line: expected ..., found ...".
    """
    check(kind in FIELDS, f"kind is {kind!r}, expected one of {', '.join(FIELDS)}")
    records = Records()
    if ":" in source and not os.path.exists(source):
        check(count > 0, f"{source}: a function is asked for a number of records; 0, which means "
              "all, is for files only")
        rows = load_function(source)(count=count, seed=seed, model=model)
        check(isinstance(rows, list), f"{source}: expected a list of records, found {short(rows)}")
        for number, row in enumerate(rows, start=1):
            place = f"{source}: record {number}"
            check(isinstance(row, dict), f"{place}: expected a dict, found {short(row)}")
            records.append(choose_fields(read_ours(row, place), kind, place))
        check(len(records) > 0, f"{source}: expected records, found none")
        return records
    reader = None
    for place, row in read_lines(source):
        reader = reader or find_reader(row, place)
        record = reader(row, place)
        if isinstance(record, str):
            records.dropped[record] += 1
        else:
            records.append(choose_fields(record, kind, place))
        if count and len(records) == count:
            break
    reasons = ", ".join(f"{number} with {reason}" for reason, number in records.dropped.items())
    check(len(records) > 0, f"{source}: expected usable rows, found none; dropped {reasons}")
    if reasons:
        print(f"{source}: {len(records)} rows read, dropped {reasons}")
    return records


def read_lines(path: str) -> Iterator[tuple[str, dict]]:
    """Yield ("file:line", row) for each line of a JSONL file, plain or gzipped.

    Holds one line of at most `MAX_LINE` at a time, so a gzip bomb ends in an error.
    """
    size = 0
    with open_regular(path) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        packed_size = os.fstat(file.fileno()).st_size if packed else 0
        check(packed_size <= MAX_PACKED, f"{path}: expected at most {MAX_PACKED} bytes of gzip "
              f"data, found {packed_size}; split the file")
        stream = gzip.GzipFile(fileobj=file) if packed else file
        for number in range(1, MAX_ROWS + 2):
            place = f"{path}:{number}"
            try:
                line = stream.readline(MAX_LINE + 1)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{place}: expected whole gzip data, found: {error}") from None
            if not line:
                check(number > 1, f"{path}: expected one JSON object a line, found an empty file")
                return
            size += len(line)
            check(len(line) <= MAX_LINE, f"{place}: expected lines of at most {MAX_LINE} bytes, "
                  "found a longer one")
            check(size <= MAX_TEXT and number <= MAX_ROWS, f"{place}: expected at most {MAX_ROWS} "
                  f"lines and {MAX_TEXT} bytes, found more; split the file")
            check(not line.isspace(), f"{place}: expected a JSON object, found a blank line")
            check(not line.startswith(b"\xef\xbb\xbf"), f"{place}: expected UTF-8 without byte "
                  "order mark, found one; save the file without it")
            yield place, parse_json(line, place)


def find_reader(row: dict, place: str):
    """The function that reads rows like this first one of a file."""
    for keys, reader in READERS:
        if keys <= set(row):
            return reader
    expected = "; or ".join(", ".join(sorted(keys)) for keys, _ in READERS)
    raise ValueError(f"{place}: expected an object with {expected}; found {short(sorted(row))}")


def text_of(row: dict, key: str, place: str) -> str:
    """The text under `key` of a row, or an error that names the place."""
    if key not in row:                      # no `check` here: its message would cost every row
        raise ValueError(f"{place}: expected {key!r}, found only {short(sorted(row))}")
    text = row[key]
    if not isinstance(text, str):
        raise ValueError(f"{place}: expected text as {key!r}, found {short(text)}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"{place}: expected Unicode text as {key!r}, found half of a surrogate "
                         "pair")
    if longest_space(text) > MAX_SPACE:
        raise ValueError(f"{place}: expected at most {MAX_SPACE} characters of white space in a "
                         f"row in {key!r}, found {longest_space(text)}")
    return text


def read_ours(row: dict, place: str) -> dict:
    """Our own format: an empty text, an equal pair or a key that we do not know is an error."""
    keys = ["prompt"] + ["response"] * ("response" in row)
    keys += ["chosen", "rejected"] * ("chosen" in row or "rejected" in row)
    extra = set(row) - {*keys, "kind", "margin"}
    if extra:
        raise ValueError(f"{place}: expected {', '.join(keys)}; found also {short(sorted(extra))}")
    for key in keys:
        if not text_of(row, key, place).strip():
            raise ValueError(f"{place}: expected text as {key!r}, found an empty one")
    kind, margin = row.get("kind", ""), row.get("margin", 0.0)
    if not isinstance(kind, str) or not isinstance(margin, (int, float)):
        raise ValueError(f"{place}: expected text as 'kind' and a number as 'margin', found "
                         f"{short(kind)}, {short(margin)}")
    if "chosen" in row and row["chosen"].strip() == row["rejected"].strip():
        raise ValueError(f"{place}: expected two different responses, found "
                         f"{short(row['chosen'])} twice")
    return {**row, "prompt": format_prompt(row["prompt"])}


def read_hh(row: dict, place: str) -> dict | str:
    """Anthropic HH-RLHF: a comparison, or the reason to drop the row.

    The prompt ends with the last "\n\nAssistant:", so that only the last answer is a response.
    """
    prompt, found, chosen = text_of(row, "chosen", place).rpartition(ASSISTANT)
    other_prompt, _, rejected = text_of(row, "rejected", place).rpartition(ASSISTANT)
    if not found or not prompt.startswith(HUMAN):
        return "no Human and Assistant turns"
    if prompt != other_prompt:
        return "dialogues that part before the last answer"
    if HUMAN in chosen or HUMAN in rejected:
        return "a Human turn after the last answer"
    return pair_or_reason(prompt + ASSISTANT, chosen, rejected)


def pair_or_reason(prompt: str, chosen: str, rejected: str) -> dict | str:
    """A comparison, or why a published row is none."""
    if not chosen.strip() or not rejected.strip():
        return "an empty response"
    if chosen.strip() == rejected.strip():
        return "two equal responses"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def format_post(post: dict, place: str) -> str:
    """A Reddit post as the prompt of Stiennon et al. 2020.

    Source: openai/summarize-from-feedback at 065ea4e, `query.format_str` of its experiments.
    """
    fields = {key: text_of(post, key, place).strip() for key in ("subreddit", "title", "post")}
    return TLDR_TEMPLATE.format(**fields)


def read_tldr_post(row: dict, place: str) -> dict | str:
    """OpenAI TL;DR, `tldr_3_filtered`: the author's own summary is the demonstration."""
    prompt, summary = format_post(row, place), text_of(row, "summary", place)
    return {"prompt": prompt, "response": summary} if summary.strip() else "an empty response"


def read_tldr_comparison(row: dict, place: str) -> dict | str:
    """OpenAI TL;DR, `comparisons`: two summaries of a post; `choice` is the index of the better.

    Source: openai/summarize-from-feedback at 065ea4e, README.md, "Comparisons".
    """
    info, summaries, choice = row.get("info"), row.get("summaries"), row.get("choice")
    ok = (isinstance(info, dict) and type(choice) is int and choice in (0, 1)
          and isinstance(summaries, list) and len(summaries) == 2
          and all(isinstance(summary, dict) for summary in summaries))
    check(ok, f"{place}: expected info (an object), summaries (two objects) and choice (0 or 1), "
          f"found {short(info)}, {short(summaries)}, {short(choice)}")
    texts = [text_of(summary, "text", place) for summary in summaries]
    return pair_or_reason(format_post(info, place), texts[choice], texts[1 - choice])


READERS = [({"prompt"}, read_ours), ({"chosen", "rejected"}, read_hh),
           ({"subreddit", "title", "post", "summary"}, read_tldr_post),
           ({"info", "summaries", "choice"}, read_tldr_comparison)]
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


# ---- what a file holds ---------------------------------------------------------------------------

@dataclass(frozen=True)
class DataConfig:
    """Options of `python -m minirlhf.data`; a first argument without -- is the file."""
    data: str = "minirlhf.world:demonstrations"    # .jsonl or .jsonl.gz file, or module:function
    kind: str = "all"                   # demonstrations, comparisons, prompts, or all there is
    tokenizer: str = "checkpoints/tiny"    # checkpoint folder whose tokenizer is used, or gpt2
    show: int = 1                       # examples to print token by token

    def __post_init__(self):
        check_choice(self, "kind", tuple(FIELDS))
        check_range(self, "show", 0, 10**9)


def label_table(tokenizer: Tokenizer, prompt: list[int], response: list[int]) -> str:
    """One line a token, with a mark at the tokens that are actions in the response mask.

    Column t of the mask belongs to the action ids[t+1]: token number t+1 carries its mark. Of a
    long prompt the last 12 tokens are shown.
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


def describe_lengths(name: str, rows: list[list[int]]) -> str:
    """One line with quantiles of the rows' lengths in tokens."""
    lengths = sorted(len(row) for row in rows)
    shares = {"shortest": 0, "median": 0.5, "90%": 0.9, "99%": 0.99, "longest": 1}
    parts = [f"{label} {lengths[int(share * (len(rows) - 1))]}" for label, share in shares.items()]
    return f"tokens in {name}: {', '.join(parts)}"


def main(cfg: DataConfig) -> Records:
    """Print counts, drops, lengths and examples; return the records."""
    tokenizer = Tokenizer.gpt2() if cfg.tokenizer == "gpt2" else Tokenizer.load(cfg.tokenizer)
    count = 0 if os.path.exists(cfg.data) else 1000          # a function makes as many as asked
    records = read_records(cfg.data, cfg.kind, count=count, model="checkpoints/sft")
    print(f"{cfg.data}: {len(records)} rows")
    prompts = [encode_prompt(tokenizer, record["prompt"]) for record in records]
    print(describe_lengths("prompt", prompts))
    for field in ("response", "chosen", "rejected"):
        rows = [(prompt, encode_response(tokenizer, record[field]))
                for prompt, record in zip(prompts, records) if field in record]
        if rows:
            print(describe_lengths(field, [response for _, response in rows]))
        for prompt, response in rows[:cfg.show]:
            print(f"\n{field}:\n{label_table(tokenizer, prompt, response)}\n")
    return records


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    run(main, DataConfig)
