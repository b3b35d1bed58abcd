"""Weights on the disk: safetensors as published, and the files of strangers that are refused."""

import json
import os
import pathlib
import pickle
import random
import struct
import time
import zipfile

import pytest
import torch
from fuzzing import (
    FUZZ,
    MEBIBYTE,
    Malicious,
    Tally,
    entry,
    file_bytes,
    mutate,
    nested,
    peak_memory,
    put,
    reset_peak,
    rewrite,
    same,
    write_hole,
)

from minirlhf.files.tensors import (
    DTYPES,
    MAX_HEADER,
    read_safetensors,
    read_weights,
    tensor_bytes,
    write_safetensors,
)

# ---- files as they are published -----------------------------------------------------------------

def assert_refused(folder, content: bytes, words: str) -> None:
    path = os.path.join(folder, "bad.safetensors")
    put(path, content)
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
    loaded = read_safetensors(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


def test_strided_shared_and_gradient_tensors_are_written_by_value(tmp_path):
    path = str(tmp_path / "a.safetensors")
    base = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(base.clone())
    write_safetensors(path, {"t": base.T, "column": base[:, 1], "p": parameter, "tied": parameter})
    loaded = read_safetensors(path)
    assert loaded["t"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert loaded["column"].tolist() == [1, 4]
    assert torch.equal(loaded["p"], base) and torch.equal(loaded["tied"], base)


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
        data += bytes(tensor_bytes(numbers))
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2 == 0)         # an odd length: unaligned data must still be right
    (tmp_path / "model.safetensors").write_bytes(file_bytes(text, data))
    loaded = read_weights(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == shapes
    assert all(tensor.dtype == torch.float16 for tensor in loaded.values())
    assert b"".join(bytes(tensor_bytes(tensor)) for tensor in loaded.values()) == data


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


# ---- files that are refused ----------------------------------------------------------------------

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
    "rest after it": ({"a": entry(shape=(1,), offsets=(0, 4))}, "describes 4 bytes"),
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
    assert len(header) <= MAX_HEADER
    (tmp_path / "warm").write_bytes(file_bytes({"a": entry()}, EIGHT))
    read_safetensors(tmp_path / "warm")
    before, start = reset_peak(), time.process_time()
    assert_refused(tmp_path, file_bytes(header, EIGHT), "bad.safetensors")
    assert time.process_time() - start < 10
    assert peak_memory() - before < 200 * MEBIBYTE


def hole_header(kind: str, count: int, end: str = "") -> bytes:
    """The beginning of a file with one tensor of `count` numbers, after which a hole follows."""
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
    tensor = read_safetensors(path)["a"]
    assert tensor.shape == (10 ** 8,) and tensor[123_456_789 % 10 ** 8] == 0
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


# ---- files by the thousand -----------------------------------------------------------------------

def check_accepted(content: bytes, loaded: dict) -> None:
    """A file that was accepted must mean what an independent, plain reading says it means."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:8 + length]), content[8 + length:]
    header.pop("__metadata__", None)
    assert set(loaded) == set(header)
    covered = 0
    for name, values in header.items():
        begin, end = values["data_offsets"]
        assert loaded[name].dtype == DTYPES[values["dtype"]]
        assert list(loaded[name].shape) == values["shape"]
        assert bytes(tensor_bytes(loaded[name])) == data[begin:end]
        assert loaded[name].data_ptr() % loaded[name].dtype.itemsize == 0     # some CPUs insist
        assert struct_values(data[begin:end], values["dtype"]) == number_values(loaded[name])
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
        loaded = tally.attempt(path, read_safetensors, path)
        assert loaded is not None or not valid
        if loaded is not None:
            check_accepted(content, loaded)
            if load_package is not None:
                theirs = load_package(content)
                assert all(same(loaded[name], theirs[name]) for name in {**loaded, **theirs})
            loaded = None                            # or Windows keeps the mapped file
    tally.finish()
    assert FUZZ * 0.1 < tally.read < FUZZ / 2


# ---- pytorch_model.bin ---------------------------------------------------------------------------

def save_bin(folder, content, **options) -> str:
    path = os.path.join(folder, "pytorch_model.bin")
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_both_generations_of_pytorch_files_are_read(tmp_path, zipped):
    tensors = {"transformer.wte.weight": torch.rand(3, 2), "h.0.attn.bias": torch.ones(2).bool()}
    save_bin(tmp_path, tensors, _use_new_zipfile_serialization=zipped)
    loaded = read_weights(tmp_path)
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], tensors[name]) for name in tensors)


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
        at = content.rindex(name) - 4                # after the name's own place in the table
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
