"""weights.py: files from strangers, files written whole or not at all, downloads."""

import functools
import hashlib
import http.server
import json
import math
import os
import pathlib
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import torch
from fuzzing import FUZZ, MEBIBYTE, Tally, damage, peak_memory, put, reset_peak, write_hole
from helpers import limited_file_size, save_folder, toy_model

from minirlhf import weights
from minirlhf.gpt2 import GPT2, read_config
from minirlhf.weights import (DTYPES, download_published, read_json, read_safetensors,
                              read_weights, write_atomically, write_json, write_safetensors)

KILLS = int(os.environ.get("MINIRLHF_KILLS", "25"))


# ---- hand-made files ----------------------------------------------------------------------------

def file_bytes(header, data: bytes) -> bytes:
    """A safetensors file from a header (a dict, or JSON text) and data, without any check."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def assert_refused(folder, content: bytes, words: str) -> None:
    path = os.path.join(folder, "bad.safetensors")
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_safetensors(path)
    assert path in str(caught.value) and len(str(caught.value)) < 1000


def example_tensors() -> dict:
    """One tensor of each dtype with extreme values, a scalar, an empty one, GPT-2's names."""
    tensors = {}
    for kind, dtype in DTYPES.items():
        if dtype.is_floating_point:
            limits = torch.finfo(dtype)
            values = [0.0, -1.5, limits.max, limits.tiny, float("inf"), float("nan")]
        elif dtype == torch.bool:
            values = [True, False, True, True, False, False]
        else:
            limits = torch.iinfo(dtype)
            values = [limits.min, 0, 1, limits.max, 2, 3]
        tensors["h.0.attn.bias_" + kind] = torch.tensor(values, dtype=dtype).reshape(3, 2)
    tensors["scalar"] = torch.tensor(2.5)
    tensors["empty"] = torch.empty(0, 3)
    tensors["wte.weight"] = torch.arange(6.0).reshape(2, 3)
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (nan equals nan, 0.0 differs from -0.0)."""
    return (a.dtype == b.dtype and a.shape == b.shape
            and bytes(weights.tensor_bytes(a)) == bytes(weights.tensor_bytes(b)))


def test_the_file_of_the_docstring_reads_as_stated(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'.ljust(64)
    content = (64).to_bytes(8, "little") + header + struct.pack("<2f", 1.0, 2.0)
    (tmp_path / "a").write_bytes(content)
    assert len(content) == 80
    assert read_safetensors(tmp_path / "a")["a"].tolist() == [1.0, 2.0]


def test_every_dtype_shape_and_name_survives_a_round_trip(tmp_path):
    path = str(tmp_path / "new" / "model.safetensors")
    tensors = example_tensors()
    write_safetensors(path, tensors)
    found = read_safetensors(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert same(found[name], tensor), name
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_strided_shared_and_gradient_tensors_are_written_by_value(tmp_path):
    path = str(tmp_path / "a.safetensors")
    base = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(base.clone())
    write_safetensors(path, {"t": base.T, "column": base[:, 1], "p": parameter, "tied": parameter})
    found = read_safetensors(path)
    assert found["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert found["column"].tolist() == [1, 4]
    assert torch.equal(found["p"], base) and torch.equal(found["tied"], base)


def test_equal_tensors_give_equal_files_whatever_their_order(tmp_path):
    tensors = example_tensors()
    write_safetensors(tmp_path / "a", tensors)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())))
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0 and content[8:8 + length].rstrip(b" ").endswith(b"}")
    for name, values in json.loads(content[8:8 + length]).items():
        if name != "__metadata__":          # every tensor begins at a multiple of its element size
            assert values["data_offsets"][0] % DTYPES[values["dtype"]].itemsize == 0


def test_published_names_and_mask_buffers_are_returned_as_stored(tmp_path):
    """GPT-2 on the Hub: no prefix, no lm_head.weight, a mask buffer; here in float16."""
    shapes = {"wte.weight": (3, 2), "h.0.attn.bias": (1, 1, 2, 2), "h.0.attn.c_attn.weight": (2, 6)}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, shape in shapes.items():
        numbers = torch.rand(shape).half()
        header[name] = entry("F16", shape, (len(data), len(data) + 2 * numbers.numel()))
        data += bytes(weights.tensor_bytes(numbers))
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)         # an odd length: unaligned data must still be right
    (tmp_path / "model.safetensors").write_bytes(file_bytes(text, data))
    found = read_weights(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert all(tensor.dtype == torch.float16 for tensor in found.values())
    assert b"".join(bytes(weights.tensor_bytes(tensor)) for tensor in found.values()) == data


def test_changing_a_tensor_that_was_read_leaves_the_file_alone(tmp_path):
    write_safetensors(tmp_path / "a", {"w": torch.zeros(3)})
    before = (tmp_path / "a").read_bytes()
    read_safetensors(tmp_path / "a")["w"].fill_(7.0)
    assert (tmp_path / "a").read_bytes() == before


def test_files_are_equal_to_those_of_the_safetensors_package(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="compares with the package")
    tensors = example_tensors()
    package.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    ours, theirs = read_safetensors(tmp_path / "theirs"), package.load_file(tmp_path / "ours")
    assert set(ours) == set(theirs) == set(tensors)
    assert all(same(ours[name], theirs[name]) for name in tensors)


# ---- files that are refused ---------------------------------------------------------------------

EIGHT = struct.pack("<2f", 1.0, 2.0)
BAD_ENTRIES = {
    "two readings of one key": (b'{"a":%s,"a":%s}', "appears twice"),
    "a key twice inside": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],'
                           b'"data_offsets":[0,8]}}', "appears twice"),
    "unknown dtype": ({"a": entry("F31")}, "expected a dtype"),
    "dtype no text": ({"a": entry(["F32"])}, "expected a dtype"),
    "negative shape": ({"a": entry(shape=(-2, -1))}, "expected a shape"),
    "true in a shape": ({"a": entry(shape=(True, 2))}, "expected a shape"),
    "float in a shape": ({"a": entry(shape=(2.0,))}, "expected a shape"),
    "nine dimensions": ({"a": entry(shape=(1,) * 8 + (2,))}, "expected a shape"),
    "product overflows": ({"a": entry(shape=(2 ** 33, 2 ** 33))}, "too large"),
    "product wraps to 8 bytes": ({"a": entry(shape=(2 ** 63, 2 ** 3 + 1))}, "too large"),
    "overflow hidden by a zero": ({"a": entry(shape=(0, 2 ** 62, 2 ** 62), offsets=(0, 0))},
                                  "too large"),
    "integer of 30 digits": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}'
                             % (b"9" * 30), "30 digits"),
    "shape too small for the data": ({"a": entry(shape=(1,))}, "takes 4 bytes"),
    "offsets reversed": ({"a": entry(offsets=(8, 0))}, "expected data_offsets"),
    "offsets negative": ({"a": entry(offsets=(-8, 0))}, "expected data_offsets"),
    "one offset": ({"a": entry(offsets=(8,))}, "expected data_offsets"),
    "beyond the end": ({"a": entry(offsets=(8, 16))}, "leaves a gap"),
    "rest behind": ({"a": entry(shape=(1,), offsets=(0, 4))}, "describes 4 bytes"),
    "more than there is": ({"a": entry(shape=(4,), offsets=(0, 16))}, "describes 16 bytes"),
    "gap": ({"a": entry("U8", (2,), (0, 2)), "b": entry("U8", (4,), (4, 8))}, "leaves a gap"),
    "overlap": ({"a": entry("U8", (6,), (0, 6)), "b": entry("U8", (4,), (4, 8))}, "overlaps"),
    "same place twice": ({"a": entry(), "b": entry()}, "overlaps"),
    "empty tensor in the middle": ({"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))},
                                   "overlaps"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, "expected dtype, shape"),
    "extra field": ({"a": {**entry(), "x": 1}}, "expected dtype, shape"),
    "entry no object": ({"a": [entry()]}, "expected dtype, shape"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, "__metadata__"),
    "metadata no object": ({"__metadata__": "pt", "a": entry()}, "__metadata__"),
    "header a list": (b"[]", "does not begin with"),
    "space before": (b" {}", "does not begin with"),
    "header empty": (b"", "does not begin with"),
    "broken UTF-8": (b'{"\xff":1}', "not valid JSON"),
    "NaN": (b'{"a":NaN}', "not finite"),
    "unfinished": (b'{"a":', "not valid JSON"),
    "NUL bytes": (b"{}\0\0", "not valid JSON"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_a_bad_header_is_refused_with_its_reason(tmp_path, case):
    header, words = BAD_ENTRIES[case]
    if case == "two readings of one key":
        header = header % ((json.dumps(entry()).encode(),) * 2)
    assert_refused(tmp_path, file_bytes(header, EIGHT), words)


@pytest.mark.parametrize("length", [0, 1, 2 ** 31, 2 ** 63, 2 ** 64 - 1])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    good = file_bytes({"a": entry()}, EIGHT)
    assert_refused(tmp_path, length.to_bytes(8, "little") + good[8:], "bad.safetensors")


def test_an_enormous_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "bad.safetensors"
    with open(path, "wb") as file:
        file.write((10 ** 11).to_bytes(8, "little"))
        file.truncate(10 ** 11 + 16)                 # a hole: the file takes no space
    start = time.process_time()
    with pytest.raises(ValueError, match="header at most"):
        read_safetensors(path)
    assert time.process_time() - start < 1


def nested(width: int, depth: int) -> list:
    value = []
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize("value", [
    nested(7, 7), "x" * 10 ** 6, {"k" * 500: "v" * 500, "l" * 500: ["w" * 500] * 9}, 10 ** 19,
    [["x" * 100] * 9] * 9, {str(key): key for key in range(10 ** 5)}])
def test_a_value_in_an_error_stays_one_short_line(value):
    assert 0 < len(weights.short(value)) <= 210 and "\n" not in weights.short(value)


NO_DATA = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
HEADER_BOMBS = {
    "a million lists": b'{"a":[' + b"[]," * 1_390_000 + b"[]]}",
    "a million objects": b'{"a":[' + b"{}," * 1_390_000 + b"{}]}",
    "a million keys": b'{"a":{' + b",".join(b'"%x":0' % i for i in range(400_000)) + b"}}",
    "a long name": b'{"' + b"a" * 4_000_000 + b'":0}',
    "a long dtype": b'{"a":{"dtype":"' + b"F" * 4_000_000 + b'","shape":[2],"data_offsets":[0,8]}}',
    "a long shape": b'{"a":{"dtype":"F32","shape":[' + b"1," * 2_000_000
                    + b'2],"data_offsets":[0,8]}}',
    "a long number": b'{"a":' + b"9" * 4_000_000 + b"}",
    "a long fraction": b'{"a":0.' + b"9" * 4_000_000 + b"}",
    "lists in lists": json.dumps({"a": nested(7, 7)}, separators=(",", ":")).encode(),
    "many tensors without numbers": ("{" + ",".join(NO_DATA % i for i in range(60_000))
                                     + "}").encode()}


@pytest.mark.parametrize("case", HEADER_BOMBS)
def test_the_largest_headers_end_soon_in_bounded_memory(tmp_path, case):
    """4 MiB of header are the most that is parsed; Python needs up to 30 times that for it."""
    header = HEADER_BOMBS[case]
    assert len(header) <= weights.MAX_HEADER
    (tmp_path / "warm").write_bytes(file_bytes({"a": entry()}, EIGHT))
    read_safetensors(tmp_path / "warm")
    before, start = reset_peak(), time.process_time()
    assert_refused(tmp_path, file_bytes(header, EIGHT), "bad.safetensors")
    assert time.process_time() - start < 10
    assert peak_memory() - before < 200 * MEBIBYTE


def hole_header(kind: str, count: int, end: str = "") -> bytes:
    """The beginning of a file with one tensor of `count` numbers, behind which a hole follows."""
    size = count * DTYPES[kind].itemsize
    text = json.dumps({"a": entry(kind, (count,), (0, size))}).encode()
    text += b" " * (-len(text) % 8) + end.encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("kind, count, end, words", [
    ("U8", 10 ** 13, "", "fits into memory"),        # could be mapped on a machine of 10 TB only
    ("BOOL", 10 ** 11, "", "bytes of BOOL"),         # would be read whole to check it: minutes
    ("F32", 10 ** 11, " ", "do not begin at")])      # would be copied whole
def test_a_file_of_holes_costs_its_reader_nothing(tmp_path, kind, count, end, words):
    path, head = tmp_path / "bad.safetensors", hole_header(kind, count, end)
    if not write_hole(path, head, len(head) + count * DTYPES[kind].itemsize):
        pytest.skip("no files with holes here")
    before, start = reset_peak(), time.process_time()
    with pytest.raises(ValueError, match=words) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert time.process_time() - start < 2 and peak_memory() - before < 20 * MEBIBYTE


def test_tensors_are_read_when_they_are_used(tmp_path):
    path, head = tmp_path / "a.safetensors", hole_header("F32", 10 ** 8)
    if not write_hole(path, head, len(head) + 4 * 10 ** 8):
        pytest.skip("no files with holes here")
    before = reset_peak()
    found = read_safetensors(path)["a"]
    assert found.shape == (10 ** 8,) and found[123_456_789 % 10 ** 8] == 0
    assert peak_memory() - before < 20 * MEBIBYTE


def test_a_bool_that_is_neither_0_nor_1_is_refused(tmp_path):
    header = {"a": entry("BOOL", (2,), (0, 2))}
    assert_refused(tmp_path, file_bytes(header, b"\1\2"), "neither 0 nor 1")


def test_a_small_file_cut_off_at_any_byte_is_refused(tmp_path):
    write_safetensors(tmp_path / "good", example_tensors())
    content = (tmp_path / "good").read_bytes()
    for length in range(len(content)):
        assert_refused(tmp_path, content[:length], "bad.safetensors")
    assert_refused(tmp_path, content + b"\0", "holds")


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected a file"):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="nothing.json does not exist"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or"):
        read_weights(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX")
def test_a_pipe_in_place_of_a_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected a file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("bad", [
    {"a": torch.zeros(2, dtype=torch.complex64)}, {"a": [1.0]}, {"a": torch.zeros((1,) * 9)},
    {"__metadata__": torch.zeros(1)}])
def test_what_could_not_be_read_again_is_not_written(tmp_path, bad):
    with pytest.raises(ValueError, match="a.safetensors"):
        write_safetensors(tmp_path / "a.safetensors", bad)
    assert os.listdir(tmp_path) == []


# ---- fuzz ---------------------------------------------------------------------------------------

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


def check_accepted(content: bytes, found: dict) -> None:
    """A file that was accepted must mean what an independent, plain reading says it means."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    header.pop("__metadata__", None)
    assert set(found) == set(header)
    covered = 0
    for name, values in header.items():
        begin, end = values["data_offsets"]
        assert found[name].dtype == DTYPES[values["dtype"]]
        assert list(found[name].shape) == values["shape"]
        assert bytes(weights.tensor_bytes(found[name])) == data[begin:end]
        assert found[name].data_ptr() % found[name].dtype.itemsize == 0     # some CPUs insist
        assert struct_values(data[begin:end], values["dtype"]) == number_values(found[name])
        covered += end - begin
    assert covered == len(data)


LETTERS = {"BOOL": "?", "U8": "B", "I8": "b", "I16": "h", "F16": "e", "I32": "i", "F32": "f",
           "F64": "d", "I64": "q"}


def struct_values(block: bytes, kind: str) -> list[str]:
    """The numbers of a block of data, by Python's struct alone; BF16 is half a float32."""
    if kind == "BF16":
        halves = [block[at:at + 2] for at in range(0, len(block), 2)]
        block, kind = b"".join(b"\0\0" + half for half in halves), "F32"
    count = len(block) // DTYPES[kind].itemsize
    return [repr(value) for value in struct.unpack(f"<{count}{LETTERS[kind]}", block)]


def number_values(tensor: torch.Tensor) -> list[str]:
    return [repr(value) for value in tensor.reshape(-1).tolist()]


def package_reader():
    """How the safetensors package reads the bytes of a file, or None where it is not there."""
    try:
        from safetensors.torch import load
    except ImportError:
        return None
    return load


def test_no_mutated_file_crashes_hangs_or_reads_wrongly(tmp_path):
    """With the package, it must read the same from every file that is accepted here."""
    load_package = package_reader()
    write_safetensors(tmp_path / "all", example_tensors())
    write_safetensors(tmp_path / "one", {"w": torch.arange(4.0)}, {})
    write_safetensors(tmp_path / "none", {})
    originals = [(tmp_path / name).read_bytes() for name in ("all", "one", "one", "none")]
    path, rng, tally = str(tmp_path / "mutated"), random.Random(0), Tally("safetensors")
    for _ in range(FUZZ):
        original = rng.choice(originals)
        valid = rng.random() < 0.1                   # a file that must be accepted
        content = rewrite(rng, original) if valid else mutate(rng, original)
        put(path, content)
        found = tally.attempt(path, read_safetensors, path)
        assert found is not None or not valid
        if found is not None:
            check_accepted(content, found)
            if load_package is not None:
                theirs = load_package(content)
                assert all(same(found[name], theirs[name]) for name in {**found, **theirs})
            found = None                             # or Windows keeps the mapped file
    tally.finish()
    assert FUZZ * 0.1 < tally.read < FUZZ / 2


# ---- pytorch_model.bin --------------------------------------------------------------------------

class Malicious:
    """Pickled, it asks the reader to create a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def save_bin(folder, content, **options) -> str:
    path = os.path.join(folder, "pytorch_model.bin")
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_both_generations_of_pytorch_files_are_read(tmp_path, zipped):
    tensors = {"transformer.wte.weight": torch.rand(3, 2), "h.0.attn.bias": torch.ones(2).bool()}
    save_bin(tmp_path, tensors, _use_new_zipfile_serialization=zipped)
    found = read_weights(tmp_path)
    assert set(found) == set(tensors)
    assert all(same(found[name], tensors[name]) for name in tensors)


def test_safetensors_are_preferred_to_a_pickle(tmp_path):
    save_bin(tmp_path, {"w": torch.zeros(1)})
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.ones(1)})
    assert read_weights(tmp_path)["w"].item() == 1


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_loading_a_pickle_executes_nothing(tmp_path, zipped):
    trap = tmp_path / "executed"
    save_bin(tmp_path, {"w": Malicious(str(trap))}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        read_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(str(trap))))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        read_weights(tmp_path)
    assert not trap.exists()


@pytest.mark.parametrize("content", [
    [torch.zeros(1)], torch.zeros(1), {"model": {"w": torch.zeros(1)}}, {1: torch.zeros(1)},
    {"w": torch.zeros(1).expand(10 ** 9)}, {"w": torch.zeros(2, dtype=torch.complex64)},
    {"w": torch.eye(3).to_sparse()}, {"w": torch.empty(5, device="meta")}, {"w": 10 ** 600},
    {10 ** 600: torch.zeros(1)}, {"w": nested(7, 7)}, {"x" * 10 ** 6: 1}])
def test_a_pickle_of_anything_but_plain_tensors_is_refused(tmp_path, content):
    save_bin(tmp_path, content)
    with pytest.raises(ValueError, match="pytorch_model.bin") as caught:
        read_weights(tmp_path)
    assert len(str(caught.value)) < 1000


def test_a_zip_whose_parts_overlap_is_refused(tmp_path):
    """One part under many names would take that many times its size in memory."""
    path = save_bin(tmp_path, {f"w{i}": torch.full((10_000,), float(i)) for i in range(20)})
    content = pathlib.Path(path).read_bytes()
    with zipfile.ZipFile(path) as plain:
        items = [item for item in plain.infolist() if "/data/" in item.filename]
    for item in items[1:]:                           # every entry of the table leads to the first
        name = item.filename.encode()
        at = content.rindex(name) - 4                # behind the name's own place in the table
        assert content[at - 42:at - 38] == b"PK\1\2"
        content = content[:at] + items[0].header_offset.to_bytes(4, "little") + content[at + 4:]
    shortest = content[:items[1].header_offset] + content[content.index(b"PK\1\2"):]
    end = shortest.rindex(b"PK\5\6")
    table = shortest.index(b"PK\1\2").to_bytes(4, "little")
    with open(path, "wb") as file:
        file.write(shortest[:end + 16] + table + shortest[end + 20:])
    with pytest.raises(ValueError, match="parts overlap"):
        read_weights(tmp_path)


def test_a_zip_bomb_is_refused_before_it_is_inflated(tmp_path):
    path = save_bin(tmp_path, {"w": torch.zeros(1_000_000)})
    with zipfile.ZipFile(path) as plain:
        items = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in items.items():
            packed.writestr(name, content)
    with pytest.raises(ValueError, match="compressed"):
        read_weights(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("zipped", [True, False])
def test_no_damaged_pickle_raises_anything_but_a_value_error(tmp_path, zipped):
    path = save_bin(tmp_path, {"a": torch.rand(3), "b": torch.ones(2, 2).half()},
                    _use_new_zipfile_serialization=zipped)
    with open(path, "rb") as file:
        content = file.read()
    rng, tally = random.Random(1), Tally(f"pytorch_model.bin, {'zip' if zipped else 'old'}")
    for _ in range(max(200, FUZZ // 20)):
        changed = bytearray(content[:rng.choice([len(content), rng.randrange(len(content))])])
        for _ in range(rng.randint(0, 4)):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        put(path, changed)
        tally.attempt(path, read_weights, tmp_path)
    tally.finish()


# ---- a whole checkpoint folder -------------------------------------------------------------------

NASTY_SIZES = [-1, 0, 1, 2, 3, 31, 33, 1000, 10 ** 6, 10 ** 7, 2 ** 31, 2 ** 63, 10 ** 25, 2.0, "2",
               True, None, [], {}]


def mutate_config(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return damage(rng, content, [b"0", b"-", b"9" * 30, b"e9", b"\0", b"\xff", b"{", b"null"])
    values = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        values[rng.choice(list(values))] = rng.choice(NASTY_SIZES)
    return json.dumps(values).encode()


def test_mutated_configs_end_in_the_sizes_they_state_or_a_value_error(tmp_path):
    save_folder(toy_model(), str(tmp_path))
    path = tmp_path / "config.json"
    original, rng, tally = path.read_bytes(), random.Random(2), Tally("config.json")
    for _ in range(max(500, FUZZ // 4)):
        content = mutate_config(rng, original)
        put(path, content)
        found = tally.attempt(str(path), read_config, str(tmp_path))
        if found is not None:
            stated = json.loads(content)
            for name, value in vars(found).items():
                assert type(value) is int and value == stated[name] and value is not True
    tally.finish()


def test_mutated_weights_end_in_a_model_of_these_weights_or_a_value_error(tmp_path):
    """Through the trainers' own entry: config and weights must fit each other, too."""
    save_folder(toy_model(n_positions=8), str(tmp_path))
    path, rng, tally = tmp_path / "model.safetensors", random.Random(3), Tally("checkpoint folder")
    original = path.read_bytes()
    for _ in range(max(100, FUZZ // 50)):
        content = rewrite(rng, original) if rng.random() < 0.1 else mutate(rng, original)
        put(path, content)
        model = tally.attempt(str(tmp_path), GPT2.from_pretrained, str(tmp_path))
        if model is not None:
            stated = read_safetensors(path)
            for name, tensor in model.state_dict().items():
                source = stated["transformer." + name]
                assert torch.equal(tensor, source.float()) and tensor.shape == source.shape
            del stated, source                       # or Windows keeps the mapped file
    tally.finish()


HUGE_CONFIG = """
import resource, sys
from minirlhf.gpt2 import GPT2
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    GPT2.from_pretrained(sys.argv[1])
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory")
def test_a_config_that_states_far_more_than_the_file_holds_costs_no_memory(tmp_path):
    """100 kB on the disk, 300 GB stated: only a few tensors are there, in the right sizes."""
    C, layers = 4096, 1000
    sizes = {"vocab_size": 2, "n_positions": 2, "n_embd": C, "n_layer": layers, "n_head": 1}
    write_json(tmp_path / "config.json", {"model_type": "gpt2", **sizes})
    write_safetensors(tmp_path / "model.safetensors", {
        "wte.weight": torch.zeros(2, C), "wpe.weight": torch.zeros(2, C),
        f"h.{layers - 1}.ln_1.weight": torch.zeros(C)})
    done = subprocess.run([sys.executable, "-c", HUGE_CONFIG, str(tmp_path)], capture_output=True,
                          text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.startswith("refused:") and str(tmp_path) in done.stdout, done.stderr[-500:]


# ---- JSON ---------------------------------------------------------------------------------------

def test_json_survives_a_round_trip(tmp_path):
    values = {"n": 3, "x": 0.1, "text": "\u0120the \u00e9 \U0001f600", "list": [1, None, True]}
    write_json(tmp_path / "a.json", values)
    assert read_json(tmp_path / "a.json") == values
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("content", [
    b"", b"[]", b"3", b"{", b'{"a":1,"a":2}', b'{"a":{"b":1,"b":1}}', b'{"a":NaN}',
    b'{"a":-Infinity}', b'{"a":1e999}', b'{"a":"\xff"}', b'{"a":1}\0', b"\0", b'{"a":\x01}',
    b"\xef\xbb\xbf{}", b'{"a":' + b"1" * 100_000 + b"}", b"{}{}", b'{"a":' + b"[" * 200_000])
def test_bad_json_is_refused_by_name(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json") as caught:
        read_json(path)
    assert len(str(caught.value)) < 1000


def test_enormous_json_is_refused_without_being_parsed(tmp_path):
    with open(tmp_path / "vocab.json", "wb") as file:
        file.truncate(10 ** 11)
    with pytest.raises(ValueError, match="at most"):
        read_json(tmp_path / "vocab.json")


@pytest.mark.parametrize("values", [{"a": float("nan")}, {"a": "\ud800"}])
def test_json_that_could_not_be_read_again_is_not_written(tmp_path, values):
    with pytest.raises(ValueError, match="a.json"):
        write_json(tmp_path / "a.json", values)
    assert os.listdir(tmp_path) == []


# ---- whole or not at all ------------------------------------------------------------------------

def test_a_failed_rename_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(source, target):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PermissionError, match="a.json was not written"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1} and os.listdir(tmp_path) == ["a.json"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="was not written"):
        write_atomically(tmp_path / "file" / "a.json", b"{}")


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, b"new", "not bytes")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"w": torch.zeros(10)})
    before = path.read_bytes()
    with limited_file_size(1 << 20):
        with pytest.raises(OSError, match="model.safetensors was not written"):
            write_safetensors(path, {"w": torch.zeros(1 << 20)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.safetensors"]


def test_a_folder_without_permission_is_named_and_left_alone(tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "a.json").write_bytes(b"old")
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("permissions do not bind this user")
        with pytest.raises(PermissionError, match="a.json was not written"):
            write_json(folder / "a.json", {"new": 1})
        assert (folder / "a.json").read_bytes() == b"old" and os.listdir(folder) == ["a.json"]
    finally:
        folder.chmod(0o700)


LEFT = ".model.safetensors.{}-0123abcd.tmp"          # what a killed writer leaves


def make_leftover(folder, name: str, age: float) -> None:
    (folder / name).write_bytes(b"half")
    os.utime(folder / name, (time.time() - age,) * 2)


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    """The writer's number may be anybody's now, this very process's too: only its lock counts."""
    for number in (1, os.getpid(), 999_999_999):
        make_leftover(tmp_path, LEFT.format(number), 3600)
    kept = ["model.safetensors.1-0123abcd.tmp", ".model.safetensors.tmp", "notes.tmp",
            ".config.json.1-0123abcd.tmp", ".model.safetensors.1-0123abcd.tmp.bak",
            ".xmodel.safetensors.1-0123abcd.tmp", ".modelXsafetensors.1-0123abcd.tmp"]
    for name in kept:
        make_leftover(tmp_path, name, 3600)
    make_leftover(tmp_path, LEFT.format(2), 1)       # fresh: its writer may be at work
    (tmp_path / LEFT.format(3)).mkdir()
    write_atomically(tmp_path / "model.safetensors", b"new")
    expected = [*kept, LEFT.format(2), LEFT.format(3), "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == sorted(expected)


def test_a_leftover_that_is_a_link_leads_nowhere(tmp_path):
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "in").mkdir()
    try:
        os.symlink(tmp_path / "outside", tmp_path / "in" / LEFT.format(1))
    except OSError:
        pytest.skip("this system grants no links")
    write_atomically(tmp_path / "in" / "model.safetensors", b"new")
    assert (tmp_path / "outside").read_bytes() == b"mine"


def test_a_slow_writer_that_lives_keeps_its_file(tmp_path):
    """However long it has not written: its lock, or on Windows the open file itself, protects it"""
    path = tmp_path / LEFT.format(os.getpid())
    with open(path, "xb") as file:
        weights.lock(file)
        file.write(b"half")
        file.flush()
        os.utime(path, (0, 0))
        write_atomically(tmp_path / "model.safetensors", b"new")
        assert path.exists()
    os.utime(path, (0, 0))
    write_atomically(tmp_path / "model.safetensors", b"new")
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_the_file_being_written_is_locked(tmp_path, monkeypatch):
    """Otherwise the test above would test nothing that happens."""
    pytest.importorskip("fcntl", reason="POSIX locks")
    tried = []

    def try_lock(number: int) -> None:
        (name,) = os.listdir(tmp_path)
        with open(tmp_path / name, "rb+") as file:
            try:
                weights.lock(file)
                tried.append("free")
            except OSError:
                tried.append("locked")
    monkeypatch.setattr(os, "fsync", try_lock)
    write_atomically(tmp_path / "a", b"new")
    assert tried == ["locked"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a safe os.fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_kill_at_any_moment_of_a_write_leaves_a_whole_file(tmp_path):
    """A child writes two versions in turn and is killed with SIGKILL; one of the two is there."""
    path = str(tmp_path / "model.safetensors")
    versions = [{"w": torch.full((50_000,), float(i))} for i in range(2)]
    write_safetensors(path, versions[0])
    rng, leftovers = random.Random(0), 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            while True:                              # until killed
                for version in versions:
                    write_safetensors(path, version)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = read_safetensors(path)["w"]
        assert any(torch.equal(found, version["w"]) for version in versions)
        for name in os.listdir(tmp_path):
            if name.endswith(".tmp"):
                leftovers += 1
                os.utime(tmp_path / name, (0, 0))    # as if the kill were long ago
    write_safetensors(path, versions[0])
    assert os.listdir(tmp_path) == ["model.safetensors"]
    print(f"{KILLS} kills, {leftovers} of them in the middle of a write")


# ---- downloads ----------------------------------------------------------------------------------

FILES = {"config.json": b'{"n_layer": 12}', "vocab.json": b'{"a": 0}', "merges.txt": b"#version\n",
         "model.safetensors": bytes(range(256)) * 4000}


class Hub(http.server.BaseHTTPRequestHandler):
    """The Hub in small, with faults: behaviour is a plain attribute of the server."""

    def do_GET(self):
        server, name = self.server, self.path.split("/")[-1]
        server.requests.append((name, self.headers.get("Range"), self.headers.get("User-Agent")))
        if name == "model.safetensors" and server.redirect and "/cdn/" not in self.path:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            if server.etag:
                self.send_header("X-Linked-Etag", f'"{server.etag}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if name not in server.files:
            self.send_error(404)
            return
        content, start = server.files[name], 0
        if self.headers.get("Range") and server.ranges:
            start = int(self.headers["Range"].split("=")[1].rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start:]
        if name == "model.safetensors" and server.breaks:
            server.breaks -= 1
            content = content[:server.broken_length]
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A running Hub; `GPT2_FILES` states its sizes and hashes."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.requests, server.redirect, server.etag = dict(FILES), [], "", ""
    server.ranges, server.breaks, server.broken_length = True, 0, 300_000
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    table = {name: (len(content), hashlib.sha256(content).hexdigest())
             for name, content in FILES.items()}
    monkeypatch.setattr(weights, "GPT2_FILES", table)
    monkeypatch.setattr(weights, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_download_brings_exactly_the_four_files(hub, tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "gpt2"
    download_published("gpt2", str(folder), hub.url)
    assert contents(folder) == FILES
    assert os.listdir(tmp_path) == ["checkpoints"]
    assert all(agent == "minirlhf" for _, _, agent in hub.requests)
    assert "model.safetensors: 100% of 1.0 MB\n" in capsys.readouterr().err
    hub.requests.clear()
    download_published("gpt2", str(folder), "http://127.0.0.1:9")        # nothing left to ask for
    assert hub.requests == []


def test_a_connection_that_breaks_goes_on_where_it_stopped(hub, tmp_path):
    hub.breaks = 3
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES
    asked = [where for name, where, _ in hub.requests if name == "model.safetensors"]
    assert asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_run_resumes_what_an_earlier_one_left(hub, tmp_path):
    hub.breaks, hub.broken_length = 1, 0
    (tmp_path / "model.safetensors.part").write_bytes(FILES["model.safetensors"][:1000])
    with pytest.raises(ConnectionError, match="broke off after 1000 of 1024000 bytes"):
        download_published("gpt2", str(tmp_path), hub.url)
    assert not (tmp_path / "model.safetensors").exists()
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES
    assert hub.requests[-1][1] == "bytes=1000-"


def test_a_server_without_ranges_starts_over(hub, tmp_path):
    hub.breaks, hub.ranges = 1, False
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("extra", [0, 10])
def test_a_full_or_overlong_part_is_checked_or_replaced(hub, tmp_path, extra):
    (tmp_path / "model.safetensors.part").write_bytes(FILES["model.safetensors"] + b"x" * extra)
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES


def test_a_wrong_hash_never_gets_the_name(hub, tmp_path):
    hub.files["model.safetensors"] = FILES["model.safetensors"][:-1] + b"?"
    with pytest.raises(ValueError, match="expected sha256"):
        download_published("gpt2", str(tmp_path), hub.url)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "merges.txt", "vocab.json"]


def test_a_damaged_part_is_found_by_the_hash_and_the_next_run_is_whole(hub, tmp_path):
    (tmp_path / "model.safetensors.part").write_bytes(b"?" * 1000)
    with pytest.raises(ValueError, match="run this again"):
        download_published("gpt2", str(tmp_path), hub.url)
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES


def test_a_wrong_size_is_refused_before_it_is_loaded(hub, tmp_path):
    hub.files["model.safetensors"] += b"more"
    with pytest.raises(ValueError, match="expected 1024000 bytes, the server announces 1024004"):
        download_published("gpt2", str(tmp_path), hub.url)
    assert not [name for name in os.listdir(tmp_path) if "model" in name]


@pytest.mark.parametrize("target", [
    "ftp://127.0.0.1/x", "file:///etc/hostname", "data:text/plain,x", "http://example.invalid/x",
    "//example.invalid/x", "http://127.0.0.1.example.invalid/x",
    "http://127.0.0.1@example.invalid/"])
def test_a_redirect_to_anything_but_https_is_refused(hub, tmp_path, target):
    hub.redirect = target
    with pytest.raises(ValueError, match="refused"):
        download_published("gpt2", str(tmp_path), hub.url)
    assert not [name for name in os.listdir(tmp_path) if "model" in name]


def test_endless_redirects_end(hub, tmp_path):
    hub.redirect = hub.url + "/again/model.safetensors"
    with pytest.raises(ValueError, match="refused a redirect"):
        download_published("gpt2", str(tmp_path), hub.url)


def test_only_this_machine_may_be_asked_without_https(tmp_path):
    for url in ("http://example.invalid", "ftp://127.0.0.1", "file:///etc"):
        with pytest.raises(ValueError, match="expected an https address"):
            download_published("gpt2", str(tmp_path), url)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("right", [True, False])
def test_the_announced_hash_is_checked_where_none_is_known(hub, tmp_path, right):
    """gpt2-medium: config and weights from `main`, the vocabulary from the pinned gpt2."""
    hub.redirect = hub.url + "/cdn/model.safetensors"
    hub.etag = hashlib.sha256(FILES["model.safetensors"] if right else b"").hexdigest()
    hub.breaks = 1
    if right:
        download_published("gpt2-medium", str(tmp_path), hub.url)
        assert contents(tmp_path) == FILES
        assert hub.requests[-1][1] == "bytes=300000-"
    else:
        with pytest.raises(ValueError, match="expected sha256"):
            download_published("gpt2-medium", str(tmp_path), hub.url)
        assert not [name for name in os.listdir(tmp_path) if "model" in name]


def test_halves_that_no_hash_would_check_are_not_joined(hub, tmp_path):
    (tmp_path / "model.safetensors.part").write_bytes(b"?" * 1000)
    download_published("gpt2-xl", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES


def test_a_missing_file_on_the_server_is_named(hub, tmp_path):
    del hub.files["merges.txt"]
    with pytest.raises(ConnectionError, match="merges.txt: the server answered 404"):
        download_published("gpt2", str(tmp_path), hub.url)


def test_without_a_network_the_error_says_what_to_put_where(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ConnectionError) as caught:
            download_published("gpt2-large", str(tmp_path / "here"), url)
    message = str(caught.value)
    for part in ("gpt2-large", "config.json, vocab.json, merges.txt, model.safetensors",
                 str(tmp_path / "here"), "https://huggingface.co/openai-community/gpt2-large"):
        assert part in message


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["link", "second name"])
def test_a_part_that_leads_to_another_file_is_not_written_to(hub, tmp_path, link):
    (tmp_path / "outside").write_bytes(b"mine")
    (tmp_path / "in").mkdir()
    try:
        link(tmp_path / "outside", tmp_path / "in" / "config.json.part")
    except OSError:
        pytest.skip("this system grants no links")
    download_published("gpt2", str(tmp_path / "in"), hub.url)
    assert (tmp_path / "outside").read_bytes() == b"mine"
    assert contents(tmp_path / "in") == FILES


def test_a_name_that_is_a_link_to_nothing_is_replaced_not_followed(hub, tmp_path):
    (tmp_path / "in").mkdir()
    try:
        os.symlink(tmp_path / "outside", tmp_path / "in" / "config.json")
    except OSError:
        pytest.skip("this system grants no links")
    download_published("gpt2", str(tmp_path / "in"), hub.url)
    assert not (tmp_path / "outside").exists()
    assert contents(tmp_path / "in") == FILES and not (tmp_path / "in/config.json").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with a name are POSIX")
def test_a_part_that_is_a_pipe_does_not_block(hub, tmp_path):
    os.mkfifo(tmp_path / "config.json.part")
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES


def test_a_part_that_is_a_folder_is_one_clear_error(hub, tmp_path):
    (tmp_path / "config.json.part").mkdir()
    with pytest.raises(OSError, match="could not keep the download"):
        download_published("gpt2", str(tmp_path), hub.url)


def test_a_full_disk_stops_the_download_and_a_later_run_resumes(hub, tmp_path):
    with limited_file_size(200_000):
        with pytest.raises(OSError, match="could not keep the download"):
            download_published("gpt2", str(tmp_path), hub.url)
    assert not (tmp_path / "model.safetensors").exists()
    download_published("gpt2", str(tmp_path), hub.url)
    assert contents(tmp_path) == FILES


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of gpt2, gpt2-medium"):
        download_published("../gpt2", str(tmp_path))
    assert os.listdir(tmp_path) == []
