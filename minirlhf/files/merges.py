"""Byte-level BPE as files spell it: the names of bytes, lists of merges, and which take effect.

    ranks = rank_tokens([(b"a", b"b"), (b" ", b"ab")], "merges")
    ranks[b"ab"] == 256, ranks[b" ab"] == 257
"""

import re

from minirlhf.files.disk import short

# GPT-2's order of the 256 bytes, printable ones first, and the character that stands for each byte
# in vocab.json and merges.txt. Source: openai/gpt-2, src/encoder.py, bytes_to_unicode.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_NAME = {byte: chr(byte if rank < len(PRINTABLE) else 256 + rank - len(PRINTABLE))
             for rank, byte in enumerate(BYTE_ORDER)}
NAME_BYTE = {name: byte for byte, name in BYTE_NAME.items()}
NAMES = re.compile(f"[{re.escape(''.join(NAME_BYTE))}]+")
TO_LATIN = str.maketrans({name: chr(byte) for name, byte in NAME_BYTE.items()})

MAX_MERGES_FILE = 3 << 20           # bytes; GPT-2's has half a million, Russian ones 1.3 million


# ---- spelling ------------------------------------------------------------------------------------

def spell(token: bytes) -> str:
    """A token as vocab.json writes it: spell(b" the") == "\u0120the"."""
    return token.decode("latin-1").translate(BYTE_NAME)


def parse_pair(parts: list, place: str) -> tuple[bytes, bytes]:
    """One merge, spelled as two tokens."""
    if not (len(parts) == 2 and all(isinstance(part, str) and NAMES.fullmatch(part)
                                    for part in parts)):
        found = " ".join(parts) if all(isinstance(part, str) for part in parts) else parts
        raise ValueError(f"{place}: expected two tokens, found {short(found)}")
    left, right = parts
    return left.translate(TO_LATIN).encode("latin-1"), right.translate(TO_LATIN).encode("latin-1")


def parse_merges(data: bytes, path: str) -> list[tuple[bytes, bytes]]:
    """The merges of a merges.txt: two tokens per line, after an optional `#version` line."""
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if (number == 1 and line.startswith("#version")) or (number == len(lines) and not line):
            continue
        merges.append(parse_pair(line.split(" "), f"{path}:{number}"))
    return merges


# ---- which merges take effect --------------------------------------------------------------------

def rank_tokens(merges: list[tuple[bytes, bytes]], source: str) -> dict[bytes, int]:
    """The rank of each token that text can become: the bytes', then the products' of the merges.

    tiktoken joins the neighbours whose product has the lowest rank, whichever two they are. A list
    of merges says which two: the same, if each product's own text comes to just these two parts.
    A merge of other parts never happens (an earlier one takes a piece away), and has no rank here.

    Raises: ValueError for a merge that joins what no earlier one made, or makes a token again.
    Source: the walk over the parts, https://github.com/github/rust-gems, bpe, is_valid_token_pair.
    """
    numbers = {bytes([byte]): number for number, byte in enumerate(BYTE_ORDER)}     # dead ones too
    parts: list[tuple[int, int]] = [(-1, -1)] * 256
    pairs: dict[tuple[int, int], int] = {}               # parts -> product, of those that happen
    dead = set()
    for count, (left, right) in enumerate(merges, start=1):
        if left not in numbers or right not in numbers:
            raise ValueError(f"{source}: merge {count} joins {short(left)} and {short(right)}, "
                             "expected two earlier tokens")
        product = left + right
        if product in numbers:
            raise ValueError(f"{source}: merge {count} makes {short(product)} a second time")
        pair = numbers[left], numbers[right]
        number = numbers[product] = len(parts)
        parts.append(pair)
        if dead.isdisjoint(pair) and stay_apart(*pair, parts, pairs):
            pairs[pair] = number
        else:
            dead.add(number)
    if not dead:
        return numbers
    alive = [token for token, number in numbers.items() if number not in dead]
    return {token: rank for rank, token in enumerate(alive)}


def stay_apart(left: int, right: int, parts: list[tuple[int, int]],
               pairs: dict[tuple[int, int], int]) -> bool:
    """Whether two tokens side by side are still these two after all merges so far.

    Walks back in time from the two: at each moment the pieces on both sides of the border are one
    pair, which must not be one that is merged before a piece is used up within its own token.
    """
    left_until = right_until = len(parts)                # when the pieces are used up
    while True:
        joined = pairs.get((left, right), left_until)
        # of equal pairs the one more to the left is merged first
        if joined < left_until and joined <= right_until:
            return False
        if max(left, right) < 256:
            return True
        if left > right:
            left_until, left = left, parts[left][1]
        else:
            right_until, right = right, parts[right][0]
