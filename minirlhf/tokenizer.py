"""GPT-2's byte-level BPE: text to token ids and back, and how such a vocabulary is learned.

tiktoken does the merging; the vocabulary is ours, GPT-2's, or the one that a folder's files state.
Shapes: none, lists of ids.
Lecture: lectures/02-sft.md, "What the loss sees".
"""

import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import tiktoken
import tiktoken.load

from minirlhf.engine.options import check
from minirlhf.files.disk import read_json, short, write_atomically, write_json
from minirlhf.files.formats import MAX_SPACE, longest_space
from minirlhf.files.merges import BYTE_ORDER, parse_merges, spell
from minirlhf.files.tokenizer_json import AddedToken
from minirlhf.files.vocabulary import Vocabulary, number_tokens, read_vocabulary

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

# What Unicode calls white space; Python's `strip` takes four codes more.
WHITE = "".join(chr(code) for code in (
    *range(9, 14), 32, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029, 0x202f, 0x205f,
    0x3000))
WHITE_RUN = re.compile(f"[{WHITE}]*")

GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


# ---- tokenizer -----------------------------------------------------------------------------------

class Tokenizer:
    """GPT-2's byte-level BPE over any list of merges, run by tiktoken.

    tiktoken joins the neighbours whose product has the lowest rank: the 256 bytes in GPT-2's order,
    then the product of each merge. GPT-2's ids are these ranks, then `<|endoftext|>`; another
    vocabulary may number its tokens otherwise, and add tokens that stand for whole strings.

    Example: t = Tokenizer([(b"a", b"b"), (b" ", b"ab")]) has t.vocab_size == 259,
    t.encode("ab ab") == [256, 257], t.end_token == 258, t.decode([256, 257, 258]) == "ab ab".
    """

    def __init__(self, merges: list[tuple[bytes, bytes]], source: str = "merges",
                 vocabulary: Vocabulary | None = None):
        self.stated = vocabulary or number_tokens(merges, source)        # as its files have it
        ranks, ids = self.stated.ranks, self.vocabulary()
        self.merges, self.end_token, self.vocab_size = list(merges), ids[self.stated.end], len(ids)
        self.id_of_rank = [ids[spell(token)] for token in ranks]
        self.text_of_id = [b""] * len(ids)               # bytes of each token
        for text, number in ids.items():
            self.text_of_id[number] = text.encode("utf-8")
        for left, right in merges:                       # also those that never happen
            self.text_of_id[ids[spell(left + right)]] = left + right
        for token, number in zip(ranks, self.id_of_rank):
            self.text_of_id[number] = token
        self.encoding = tiktoken.Encoding("minirlhf", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                                          special_tokens={})
        self.whole = {text: token for text, token in self.stated.added.items()
                      if text != self.stated.end}         # strings that are encoded whole
        longest_first = sorted(self.whole, key=len, reverse=True)
        self.strings = [re.compile("|".join(re.escape(text) for text in longest_first
                                            if self.whole[text].normalized == normalized))
                        for normalized in (False, True)]

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, end_token={self.end_token})"

    def __eq__(self, other) -> bool:
        """Whether every text and every list of ids means the same to both."""
        return (isinstance(other, Tokenizer) and self.merges == other.merges
                and self.vocabulary() == other.vocabulary() and self.whole == other.whole
                and self.end_token == other.end_token
                and self.stated.prefix_space == other.stated.prefix_space)

    @property
    def pad_token(self) -> int:
        """The id of the byte 0xff, which is part of no UTF-8 text: `encode` never makes it."""
        return self.vocabulary()[spell(b"\xff")]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never the end token, even if the text spells it."""
        space = longest_space(text)
        check(space <= MAX_SPACE, f"expected a text with at most {MAX_SPACE} characters of white "
              f"space in a row, found {space}")
        ids = []
        for part, token in self.pieces(text):
            if self.stated.prefix_space and part and not part.startswith(" "):
                part = " " + part
            ids += [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(part)]
            if token is not None:
                ids.append(token.id)
        return ids

    def pieces(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """Pieces of text, each with the added token that comes after it; the last has none."""
        for part, token in self.cut(text, normalized=False):
            inner = list(self.cut(part, normalized=True))
            yield from inner[:-1]
            yield inner[-1][0], token

    def cut(self, text: str, normalized: bool) -> Iterator[tuple[str, AddedToken | None]]:
        """Cut text at added tokens of one kind, of several at a place at the longest."""
        start = 0
        strings = self.strings[normalized]
        for match in strings.finditer(text) if strings.pattern else ():
            token, first, last = self.whole[match[0]], match.start(), match.end()
            neighbours = text[first - 1:first] + " " + text[last:last + 1]
            if first < start or (token.single_word and re.search(r"\w", neighbours)):
                continue
            part = text[start:first]
            yield part.rstrip(WHITE) if token.lstrip else part, token
            start = WHITE_RUN.match(text, last).end() if token.rstrip else last
        yield text[start:], None

    def decode(self, ids: list[int], skip_end: bool = True) -> str:
        """Text of `ids`, without end tokens unless asked; half a character becomes U+FFFD."""
        bad = [token for token in ids if not 0 <= token < self.vocab_size]
        check(not bad, f"token id {bad[:1]} is outside the vocabulary of {self.vocab_size}")
        kept = [token for token in ids if not (skip_end and token == self.end_token)]
        return b"".join(self.text_of_id[token] for token in kept).decode("utf-8", "replace")

    def vocabulary(self) -> dict[str, int]:
        """Token -> id as vocab.json has it: each byte written as its GPT-2 character."""
        return self.stated.all_ids()

    def save(self, folder: str, n_positions: int = 1024) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as transformers reads them."""
        os.makedirs(folder, exist_ok=True)
        lines = ["#version: 0.2"] + [f"{spell(left)} {spell(right)}" for left, right in self.merges]
        write_json(os.path.join(folder, "vocab.json"), self.vocabulary())
        write_atomically(os.path.join(folder, "merges.txt"),
                         ("\n".join(lines) + "\n").encode("utf-8"))
        end, extra = self.stated.end, {}
        if self.whole:
            tokens = {end: AddedToken(self.end_token, special=True), **self.stated.added}
            extra = {"added_tokens_decoder": {
                str(token.id): {"content": text, "lstrip": token.lstrip,
                                "normalized": token.normalized, "rstrip": token.rstrip,
                                "single_word": token.single_word, "special": token.special}
                for text, token in tokens.items()}}
        write_json(os.path.join(folder, "tokenizer_config.json"), {
            "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": self.stated.prefix_space,
            "add_bos_token": False, "bos_token": end, "eos_token": end, "unk_token": end,
            "errors": "replace", "clean_up_tokenization_spaces": False,
            "model_max_length": n_positions, **extra})

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
        """The tokenizer of a checkpoint folder, from its files (files/vocabulary.py).

        A folder that has none at all, but GPT-2's vocabulary size in config.json, gets GPT-2's.
        """
        found = read_vocabulary(folder)
        if found is not None:
            return cls(found.merges, vocabulary=found)
        config_path = os.path.join(folder, "config.json")
        if os.path.exists(config_path) and read_json(config_path).get("vocab_size") == 50257:
            return cls.gpt2()
        raise FileNotFoundError(f"{os.path.join(folder, 'vocab.json')} does not exist; expected a "
                                "tokenizer, vocab.json and merges.txt, as every stage writes it, "
                                "or tokenizer.json")


def load_tokenizer(folder: str, network) -> Tokenizer:
    """The tokenizer of a checkpoint folder, whose vocabulary must be the network's.

    Raises: FileNotFoundError where there is none; ValueError naming a damaged or foreign file.
    """
    tokenizer, expected = Tokenizer.load(folder), network.config.vocab_size
    homeless = [text for text, token in tokenizer.whole.items() if token.id >= expected]
    cause = "the folder mixes files of two models"
    if homeless and len(homeless) == tokenizer.vocab_size - expected:
        cause = (f"the embedding has no rows for the added tokens {short(homeless)}: resize it, or "
                 "remove them from the tokenizer's files")
    check(tokenizer.vocab_size == expected, f"{folder}: the tokenizer has {tokenizer.vocab_size} "
          f"tokens, config.json says {expected}; {cause}")
    spare = getattr(getattr(network, "transformer", network), "spare_rows", ())
    if len(spare):
        print(f"{folder}: the embedding has {len(spare)} rows more than the tokenizer's {expected} "
              "tokens; they stay unused")
    return tokenizer


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
        matches = tuple(word[at:at + 2]) == pair
        joined.append(new if matches else word[at])
        at += 2 if matches else 1
    return joined
