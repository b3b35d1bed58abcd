"""What the tests of all readers of files from strangers share: a tally of many mutated files.

    MINIRLHF_FUZZ=100000 python -m pytest -s \
        -k "mutated or damaged_pickle or right_checksum or damaged_folder"

runs the full numbers and prints, for each reader, how many files it met, how many were still
valid, the time and the memory that they took. Without the variable a few thousand have to do.
"""

import json
import math
import os
import random
import sys
import time

import torch

from minirlhf.files.tensors import DTYPES, tensor_bytes

FUZZ = int(os.environ.get("MINIRLHF_FUZZ", "6000"))      # mutated safetensors files; others: a part
MEBIBYTE = 1 << 20


# ---- a tally -------------------------------------------------------------------------------------

class Tally:
    """Counts what a reader does with mutated files; anything but a `ValueError` passes through.

    Memory is the peak of this process since the tally began: exact on Linux, elsewhere not known.
    The time of a file is the processor's, so that a busy machine fails no test.
    """

    def __init__(self, what: str):
        self.what, self.read, self.refused, self.slowest = what, 0, 0, 0.0
        self.began, self.memory = time.perf_counter(), reset_peak()

    def attempt(self, name: str, reader, *arguments):
        """The reader's result, or None when it refused the file in a short error that names it."""
        started, result = time.process_time(), None
        try:
            result = reader(*arguments)
            self.read += 1
        except ValueError as error:
            message = str(error)
            assert name in message and len(message) < 1000, (name, message[:2000])
            self.refused += 1
        self.slowest = max(self.slowest, time.process_time() - started)
        return result

    def finish(self, seconds: float = 2.0, mebibytes: int = 64) -> None:
        """Print the tally; fail if one file took `seconds`, or all of them `mebibytes` of memory.

        Both limits are far above what is measured, for slow machines.
        """
        grown = max(0, peak_memory() - self.memory) / MEBIBYTE
        print(f"\n{self.what}: {self.read + self.refused} files, {self.read} of them read, "
              f"{time.perf_counter() - self.began:.1f} s, slowest {1000 * self.slowest:.0f} ms, "
              f"memory +{grown:.0f} MiB")
        assert self.slowest < seconds, f"{self.what}: a file took {self.slowest:.1f} s"
        assert grown < mebibytes, f"{self.what}: memory grew by {grown:.0f} MiB"


def reset_peak() -> int:
    """Let the peak of memory begin anew, where the system can; the memory in use now, bytes."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return peak_memory()


def peak_memory() -> int:
    """The most memory that this process held since `reset_peak`, bytes; 0 where nobody knows."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/status") as file:
        lines = [line for line in file if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024


# ---- any file ------------------------------------------------------------------------------------

INSERTED = [b"\n", b"\x00", b"\xff", b'"', b"{", b"[", b"null", b"1e999", b"\\ud800", b"\r",
            b"\\u0000", b"\xef\xbb\xbf", b',"prompt": "b"', b"\xc0\x80", b"\xed\xa0\x80",
            b"\x1f\x8b\x08"]


def damage(rng: random.Random, content: bytes, inserted: list[bytes]) -> bytes:
    """Insert, overwrite, repeat, cut out or cut off at a random place, once or several times."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not content:
            break
        at = rng.randrange(len(content))
        end = at + rng.choice([1, 2, 20, len(content)])
        content = rng.choice([content[:at] + rng.choice(inserted) + content[at:],
                              content[:at] + bytes([rng.randrange(256)]) + content[at + 1:],
                              content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)])
                              + content[at + 1:],
                              content[:end] + content[at:],
                              content[:at] + content[end:],
                              content[:at]])
    return content


def write_hole(path, head: bytes, size: int) -> bool:
    """A file of `size` bytes that is all hole after `head`; False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False                                 # others might fill the disk with it
    with open(path, "wb") as file:
        file.write(head)
        try:
            file.truncate(size)
        except OSError:
            return False
    return True


def put(path, content: bytes) -> None:
    """Write a file anew; many file systems wait for the disk when one is emptied and refilled."""
    if os.path.exists(path):
        os.unlink(path)
    with open(path, "xb") as file:
        file.write(content)


# ---- safetensors files ---------------------------------------------------------------------------

def file_bytes(header, data: bytes) -> bytes:
    """A safetensors file from a header (a dict, or JSON text) and data, without any check."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (nan equals nan, 0.0 differs from -0.0)."""
    return (a.dtype == b.dtype and a.shape == b.shape
            and bytes(tensor_bytes(a)) == bytes(tensor_bytes(b)))


NASTY = [-1, 0, 1, 2, 3, 7, 8, 16, 2 ** 31, 2 ** 32, 2 ** 62, 2 ** 63 - 1, 2 ** 63, 2 ** 64,
         10 ** 25, True, None, 1.5, "", "F32", "BOOL", "I64", [], [0], [0, 0], [[1]], {},
         [2 ** 63, 2], [0, 2 ** 62, 2 ** 62], [1] * 70, "x" * 300, [-1, 8], [8, 0]]


def mutate_values(rng: random.Random, header: dict) -> bytes:
    """Change one thing in a header: a value, a field, a tensor, a repeated key, nesting."""
    name = rng.choice(list(header))
    fields = header[name]
    kind = rng.randrange(8)
    if kind == 0:
        header[name] = rng.choice(NASTY)
    elif kind == 1:
        fields[rng.choice([*fields, "new"])] = rng.choice(NASTY)
    elif kind == 2 and "shape" in fields:
        which = fields[rng.choice(["shape", "data_offsets"])]
        which.insert(rng.randint(0, len(which)), rng.choice(NASTY))
    elif kind == 3 and fields.get("shape"):
        which = fields[rng.choice(["shape", "data_offsets"])]
        which[rng.randrange(len(which))] = rng.choice(NASTY)
    elif kind == 4:
        header["__metadata__"] = rng.choice(NASTY)
    elif kind == 5:
        other = rng.choice(list(header))
        header[name], header[other] = header[other], fields
    elif kind == 6:
        del header[name]
    text = json.dumps(header)
    if kind == 7:
        depth = rng.choice([3, 900, 5000])
        repeated = f'"{name}":' + rng.choice([json.dumps(fields), "[" * depth + "]" * depth])
        text = "{" + repeated + "," + text[1:]
    return text.encode()


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One mutated file: bytes, length, header, or a piece of itself in another place."""
    kind = rng.randrange(6)
    if kind == 0:                                    # anywhere
        changed = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 1:
        return content[:rng.randrange(len(content))]
    length = int.from_bytes(content[:8], "little")
    if kind == 2:
        other = rng.choice([rng.randrange(2 * len(content)), length + rng.randint(-9, 9),
                            rng.getrandbits(64), 2 ** 63 + rng.randrange(9)])
        return max(other, 0).to_bytes(8, "little") + content[8:]
    if kind == 3:
        begin, end = sorted(rng.randrange(len(content)) for _ in range(2))
        place = rng.randrange(len(content))
        return content[:place] + content[begin:end] + content[place:]
    if kind == 4:                                    # digits and signs of the header
        changed = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            changed[8 + rng.randrange(length)] = rng.choice(b'0123456789-{}[]",:.eN\\ ')
        return bytes(changed)
    text = mutate_values(rng, json.loads(content[8:8 + length]))
    return file_bytes(text, content[8 + length:])


def rewrite(rng: random.Random, content: bytes) -> bytes:
    """The same data under another valid header: order, place, shape, dtype, name, alignment."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    metadata = header.pop("__metadata__", None)
    names, blocks = rng.sample(list(header), len(header)), {}
    for name, values in header.items():
        begin, end = values["data_offsets"]
        blocks[name] = data[begin:end]
    changed, parts, position = {}, [], 0
    for name in names:                               # the data in another order, too
        values, block = header[name], blocks[name]
        kind = values["dtype"]
        if rng.random() < 0.3 and kind != "BOOL":    # other numbers of the same size
            same_size = [other for other, dtype in DTYPES.items() if other != "BOOL"
                         and dtype.itemsize == DTYPES[kind].itemsize]
            kind = rng.choice(same_size)
        shape = list(values["shape"])
        if rng.random() < 0.3:
            shape = [math.prod(shape)]
        for _ in range(rng.choice([0, 0, 1, 4])):
            shape.insert(rng.randint(0, len(shape)), 1)
        new_name = rng.choice([name, name + "\u00e9\n", "x" * 500 + name])
        changed[new_name] = entry(kind, shape, (position, position + len(block)))
        parts.append(block)
        position += len(block)
    if metadata is not None:
        changed["__metadata__"] = {**metadata, "a": "\0", "": "\u4f60"}
    order = rng.sample(list(changed), len(changed))
    text = json.dumps({name: changed[name] for name in order}, ensure_ascii=rng.random() < 0.5,
                      indent=rng.choice([None, 1])).encode()
    return file_bytes(text + b" " * rng.randrange(9), b"".join(parts))


# ---- values and pickles --------------------------------------------------------------------------

def nested(width: int, depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


class Malicious:
    """Pickled, it asks the reader to create a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
