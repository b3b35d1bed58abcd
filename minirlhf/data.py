"""Text in: tokenizer, BPE trainer, prompt templates, padding and masks.

Shapes: B sequences, T tokens in the padded row.
"""

import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

import tiktoken
import tiktoken.load
import torch

from minirlhf.common import check
from minirlhf.weights import read_json, write_atomically, write_json

END_TEXT = "<|endoftext|>"          # GPT-2's only special token; always the last id
TEMPLATE = "Prompt: {prompt}\nResponse:"
MAX_TOKENIZER_FILE = 32 << 20       # bytes; GPT-2's vocab.json has 1 MB

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
SPACE = r"[^\S\x1c-\x1f]"            # Unicode's white space; Python's \s has four more control codes
TRAINING_PATTERN = re.compile(
    r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\w\s]|[_\x1c-\x1f])+"
    rf"|{SPACE}+(?!\S|[\x1c-\x1f])|{SPACE}")

GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


# ---- tokenizer ------------------------------------------------------------------------------------

class Tokenizer:
    """GPT-2's byte-level BPE over any list of merges, run by tiktoken.

    Ids: the 256 bytes in GPT-2's order, then the product of each merge, then `<|endoftext|>`.

    Example: t = Tokenizer([(b"a", b"b"), (b" ", b"ab")]) has t.vocab_size == 259,
    t.encode("ab ab") == [256, 257], t.end_token == 258, t.decode([256, 257, 258]) == "ab ab".
    """

    def __init__(self, merges: list[tuple[bytes, bytes]]):
        ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_ORDER)}
        for number, (left, right) in enumerate(merges, start=1):
            known = left in ranks and right in ranks
            check(known, f"merge {number} joins {left!r} and {right!r}, expected two earlier tokens")
            check(left + right not in ranks, f"merge {number} makes {left + right!r} a second time")
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
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: list[int], skip_end: bool = True) -> str:
        """Text of `ids`, without end tokens unless asked; half a character becomes U+FFFD."""
        bad = [token for token in ids if not 0 <= token < self.vocab_size]
        check(not bad, f"token id {bad[:1]} is outside the vocabulary of {self.vocab_size}")
        kept = [token for token in ids if not (skip_end and token == self.end_token)]
        return self.encoding.decode(kept)

    def vocabulary(self) -> dict[str, int]:
        """Token -> id as vocab.json has it: each byte written as its GPT-2 character."""
        tokens = [bytes([byte]) for byte in BYTE_ORDER] + [left + right for left, right in self.merges]
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
                raise FileNotFoundError(f"{path}: missing; expected the tokenizer of the checkpoint "
                                        "(vocab.json and merges.txt, written by every stage)")
            size = os.path.getsize(path)
            check(size <= MAX_TOKENIZER_FILE, f"{path}: {size:,} bytes, expected at most "
                  f"{MAX_TOKENIZER_FILE:,} for a tokenizer file")
        with open(merges_path, "rb") as file:
            merges = parse_merges(file.read(), merges_path)
        try:
            tokenizer = cls(merges)
        except ValueError as error:
            raise ValueError(f"{merges_path}: {error}") from None
        found, expected = read_json(vocab_path), tokenizer.vocabulary()
        for token in [*expected, *found]:
            check(type(found.get(token)) is int and found[token] == expected.get(token),
                  f"{vocab_path}: token {token!r} has id {found.get(token)!r}, expected "
                  f"{expected.get(token)!r} from {merges_path}")
        return tokenizer


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
        check(ok, f"{path}:{number}: expected two tokens, found {line[:40]!r}")
        left, right = (bytes(NAME_BYTE[name] for name in part) for part in parts)
        merges.append((left, right))
    return merges


# ---- BPE training -----------------------------------------------------------------------------------

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
        check(pair is not None, f"the text has too few different words: it supports a vocab_size of "
              f"{len(tokens) + 1}, not {vocab_size}; give more text or a smaller vocab_size")
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
    """Ids of a response after a template that ends in a colon: one space, the text, the end token."""
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
    check(len(rows) > 0 and all(len(row) > 0 for row in rows), "expected rows with at least one token "
          f"each, found lengths {[len(row) for row in rows][:8]}")
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
