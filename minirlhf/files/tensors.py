"""Weights on the disk: safetensors files, read and written by hand, and pytorch_model.bin.

Nothing in a file is executed, every number in it is checked before it is used, and a damaged file
ends in a `ValueError` that names it.

Source: the format, https://github.com/huggingface/safetensors/blob/v0.4.5/README.md#format
"""

import json
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import torch

from minirlhf.files.disk import open_regular, parse_json, read_json, short, write_atomically
from minirlhf.files.foreign import HEAD, NANOGPT, contents, other_weights

# In the order of the safetensors package, which puts the last of them first in a file: widest
# elements first, so that every tensor starts at a multiple of its element's size.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
          "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
          "F64": torch.float64, "I64": torch.int64}
SURROGATE = re.compile("[\ud800-\udfff]")     # half of a pair, which UTF-8 has not
MAX_HEADER = 4 << 20        # bytes; GPT-2's largest has a header of about 70 thousand
MAX_DIMENSIONS = 8          # GPT-2 needs 4
MAX_TENSOR = 1 << 62        # bytes; beyond it strides would overflow
MAX_BOOLS = 1 << 28         # bytes; all masks of a GPT-2 have 50 million
MAX_UNALIGNED = 8 << 30     # bytes; such tensors are copied, the largest GPT-2 has 6.4 billion


# ---- safetensors --------------------------------------------------------------------------------

class Entry(NamedTuple):
    """One tensor of a header; entries sort in the order of their data."""
    begin: int              # bytes from the start of the data
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


def are_sizes(values, most: int) -> bool:
    """Whether `values` is a list of at most `most` integers >= 0; True and 2.0 are no integers."""
    return (isinstance(values, list) and len(values) <= most
            and all(type(value) is int and value >= 0 for value in values))


def check_entry(name: str, values, path: str) -> Entry:
    """Check one tensor of a header: dtype, shape, offsets, and that they agree."""
    where = f"{path}: tensor {short(name)}"
    if not isinstance(values, dict) or set(values) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected dtype, shape and data_offsets, found {short(values)}")
    kind, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{where}: expected a dtype of {', '.join(DTYPES)}, found {short(kind)}")
    if not are_sizes(shape, MAX_DIMENSIONS):
        raise ValueError(f"{where}: expected a shape of at most {MAX_DIMENSIONS} integers >= 0, "
                         f"found {short(shape)}")
    if not are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: expected data_offsets [begin, end], found {short(offsets)}")
    n_bytes = DTYPES[kind].itemsize
    for size in shape:
        n_bytes *= max(size, 1)                      # careful: a 0 must not hide an overflow
    if n_bytes > MAX_TENSOR:
        raise ValueError(f"{where}: the shape {short(shape)} is too large for any file")
    if 0 in shape:
        n_bytes = 0
    if offsets[1] - offsets[0] != n_bytes:
        raise ValueError(f"{where}: {kind} of shape {shape} takes {n_bytes} bytes, "
                         f"data_offsets {offsets} hold {offsets[1] - offsets[0]}")
    return Entry(offsets[0], offsets[1], name, DTYPES[kind], shape)


def check_header(header: dict, data_size: int, path: str) -> list[Entry]:
    """Check a whole header: the tensors must tile the data without overlap, gap or rest."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: expected __metadata__ of strings, found {short(metadata)}")
    for name in [*header, *metadata, *metadata.values()]:
        if SURROGATE.search(name):
            raise ValueError(f"{path}: expected names of Unicode text, found {short(name)} with "
                             "half of a surrogate pair")
    entries = [check_entry(name, values, path) for name, values in header.items()
               if name != "__metadata__"]
    position = 0
    for entry in sorted(entries):
        if entry.begin != position:
            what = "overlaps another" if entry.begin < position else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {short(entry.name)} {what}: it begins at "
                             f"{entry.begin}, expected {position}")
        position = entry.end
    if position != data_size:
        raise ValueError(f"{path}: the header describes {position} bytes of data, the file holds "
                         f"{data_size}; it is cut off or damaged, get it again")
    return entries


def check_cost(entries: list[Entry], data_start: int, path: str) -> None:
    """Refuse what would take long, or much memory, although it costs its maker nothing.

    A file may consist of holes that take no space on the disk. Its tensors are read when they are
    used, except for these: a BOOL is checked byte by byte, an unaligned tensor is copied.
    """
    bools, unaligned = 0, 0
    for entry in entries:
        size = entry.end - entry.begin
        bools += size if entry.dtype == torch.bool else 0
        unaligned += size if (data_start + entry.begin) % entry.dtype.itemsize else 0
    if bools > MAX_BOOLS:
        raise ValueError(f"{path}: expected at most {MAX_BOOLS} bytes of BOOL, found {bools}")
    if unaligned > MAX_UNALIGNED:
        raise ValueError(f"{path}: {unaligned} bytes of its tensors do not begin at a multiple of "
                         f"their element's size, expected at most {MAX_UNALIGNED}; load the file "
                         "with the safetensors package and save it again")


def map_tensor(mapping: mmap.mmap, entry: Entry, data_start: int, path: str) -> torch.Tensor:
    """The tensor of a checked entry: a view into the mapped file, read when it is used."""
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    offset = data_start + entry.begin
    raw = torch.frombuffer(mapping, dtype=torch.uint8, count=entry.end - entry.begin, offset=offset)
    if entry.dtype == torch.bool and int(raw.max()) > 1:
        raise ValueError(f"{path}: tensor {short(entry.name)}: a BOOL byte is neither 0 nor 1")
    if offset % entry.dtype.itemsize:                # careful: files of others may be unaligned
        raw = raw.clone()
    return raw.view(entry.dtype).reshape(entry.shape)


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, without its metadata; see `read_with_metadata`."""
    return read_with_metadata(path)[0]


def read_with_metadata(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file; tensors keep the dtype and the names they have in the file.

    The file is mapped copy-on-write: data are read when they are used, and changing a tensor does
    not change the file. Copy the tensors into parameters and let go of them: on Windows a file
    that is still mapped cannot be replaced.

    Example: the 80 bytes of `(64).to_bytes(8, "little")`, of the header
    `{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}` filled with spaces to 64 bytes, and
    of 1.0 and 2.0 as little-endian float32, read as `{"a": tensor([1., 2.])}` and `{}`.
    Raises: `ValueError` naming the file for anything that is not exactly such a file.
    Source: https://github.com/huggingface/safetensors/blob/v0.4.5/README.md#format
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEAD)
        length = int.from_bytes(head[:8], "little")
        if head[8:9] != b"{" and contents(head):
            raise ValueError(f"{path}: not a safetensors file: found {contents(head)}")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: not a safetensors file: it announces a header of {length} "
                             f"bytes, the file has {size} and a header at most {MAX_HEADER}")
        file.seek(8)
        data = file.read(length)
        if data[:1] != b"{":
            raise ValueError(f"{path}: not a safetensors file: its header does not begin with {{")
        header = parse_json(data, path)
        entries = check_header(header, size - 8 - length, path)
        check_cost(entries, 8 + length, path)
        try:
            mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: expected a file that fits into memory, found {size} bytes "
                             f"({error})") from None
    tensors = {entry.name: map_tensor(mapping, entry, 8 + length, path) for entry in entries}
    return tensors, header.get("__metadata__", {})


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row by row, as the file holds them (little-endian)."""
    flat = tensor.detach().cpu().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_safetensors(path: str, tensors: dict[str, torch.Tensor],
                      metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically, byte for byte as the safetensors package writes them.

    Equal tensors give equal files. `metadata` defaults to `{"format": "pt"}`, which transformers
    asks for. Tensors that share memory are each written.

    Raises: `ValueError` for a tensor that the reader would refuse, or that is sparse or on the meta
    device, without numbers; `OSError` naming the file when it cannot be written, and then the old
    file is still there.
    """
    kinds = {dtype: (-rank, kind) for rank, (kind, dtype) in enumerate(DTYPES.items())}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in kinds:
            raise ValueError(f"{path}: {short(name)}: expected a tensor of one of "
                             f"{', '.join(DTYPES)}, found {short(tensor)}")
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            raise ValueError(f"{path}: {short(name)}: expected a dense tensor with numbers, found "
                             f"layout {tensor.layout} on device {tensor.device}; use to_dense(), "
                             "or load its numbers first")
    header = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    names = sorted((kinds[tensor.dtype][0], name) for name, tensor in tensors.items())
    position = 0
    for _, name in names:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": kinds[tensor.dtype][1], "shape": list(tensor.shape),
                        "data_offsets": [position, end]}
        position = end
    check_header(header, position, path)
    # careful: the package writes other alphabets as they are, not as \\u escapes
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    data += b" " * (-len(data) % 8)                  # so that the tensors start aligned
    if len(data) > MAX_HEADER:
        raise ValueError(f"{path}: {len(tensors)} tensors need a header over {MAX_HEADER} bytes")
    chunks = [tensor_bytes(tensors[name]) for _, name in names]      # views, not copies
    write_atomically(path, len(data).to_bytes(8, "little"), data, *chunks)


# ---- the weights of a folder ---------------------------------------------------------------------

# What torch.load raises for damaged files, found by mutating one 100,000 times.
BROKEN_BIN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
              AttributeError, ArithmeticError, AssertionError, ImportError, OSError, MemoryError,
              struct.error, zipfile.BadZipFile)


def check_zip(items: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse archives that are none of PyTorch's plain ones."""
    names = [item.filename for item in items]
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise ValueError("the file holds code (TorchScript), not only tensors; do not load it: ask "
                         "its maker for model.safetensors")
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError("a zip archive, but none of PyTorch's: unpack it")
    if any(item.compress_type for item in items):
        raise ValueError("it is compressed, which PyTorch's own files are not")
    if sum(item.file_size for item in items) > size:
        raise ValueError("its parts overlap, which those of PyTorch's own files do not")


def explain(error: Exception) -> str:
    """Why PyTorch refused a file, in a line.

    careful: its own words advise to set `weights_only` to False, which would run what the file
    says.
    """
    reason = " ".join(str(error).split())
    code = re.search(r"GLOBAL ([\w.]+)|[Uu]nrecognized function (\S+)|"
                     r"but got <class '(\w+\.[\w.]+)", reason)
    if code:
        return (f"the file holds code ({code[code.lastindex][:80]}), not only tensors; do not load "
                "it: ask its maker for model.safetensors")
    if "Unsupported operand" in reason:                  # a pickle of another protocol
        return ("the file holds code or is damaged; do not load it: ask its maker for "
                "model.safetensors")
    if re.search("weights.only|torch.load|safe_globals", reason, re.IGNORECASE):
        return "it is damaged; get the file again"
    return reason[:200]


def read_pytorch_bin(path: str) -> dict[str, torch.Tensor]:
    """Read a pytorch_model.bin without executing anything from it.

    Raises: `ValueError` naming the file for damage, for anything but a dict of plain tensors, and
    for files that would need more memory than they have bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        found = contents(file.read(HEAD))
        try:
            if found and "PyTorch" not in found and "pickle" not in found:
                raise ValueError(f"found {found}")
            if zipfile.is_zipfile(file):             # careful: PyTorch would inflate a zip bomb
                check_zip(zipfile.ZipFile(file).infolist(), size)
            file.seek(0)
            with warnings.catch_warnings():          # they ask to report to PyTorch
                warnings.simplefilter("ignore")
                tensors = torch.load(file, map_location="cpu", weights_only=True)
        except BROKEN_BIN as error:
            raise ValueError(f"{path}: not a readable file of PyTorch weights: "
                             f"{explain(error)}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {short(type(tensors))}")
    if "model" in tensors and "model_args" in tensors:
        raise ValueError(f"{path} is {NANOGPT}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):                # careful: printing an int may take minutes
            raise ValueError(f"{path}: expected tensors under names, found {type(name)}")
        if not isinstance(tensor, torch.Tensor):
            inner = " (if these are the weights: torch.save this dict)" * isinstance(tensor, dict)
            raise ValueError(f"{path}: {short(name)}: expected a tensor, found "
                             f"{type(tensor)}{inner}")
        if (tensor.layout != torch.strided or tensor.device.type != "cpu"
                or tensor.dtype not in DTYPES.values()):
            raise ValueError(f"{path}: {short(name)}: expected plain numbers, found "
                             f"{tensor.layout} {tensor.dtype} on {tensor.device}")
        # careful: strides of 0 make a tensor of any size from one number
        if tensor.numel() * tensor.dtype.itemsize > size:
            raise ValueError(f"{path}: {short(name)}: a shape of {tuple(tensor.shape)} needs more "
                             "than the file holds")
    return dict(tensors)


def read_parts(index: str, read: Callable[[str], dict]) -> dict[str, torch.Tensor]:
    """Read weights in several files, which `index` names: tensor -> file beside it.

    Raises: `ValueError` for an index that leads elsewhere or does not fit its files,
    `FileNotFoundError` for one that is not there.
    """
    folder, ending = os.path.dirname(index), os.path.splitext(index.removesuffix(".index.json"))[1]
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{index}: expected weight_map, tensor -> file, found {short(parts)}")
    for part in parts.values():
        # careful: a name may not lead out of the folder
        if not (isinstance(part, str) and re.fullmatch(r"\w[\w.-]*", part, re.ASCII)
                and part.endswith(ending)):
            raise ValueError(f"{index}: expected the name of a {ending} file in this folder, found "
                             f"{short(part)}")
    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(set(parts.values())):
        path = os.path.join(folder, part)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist; {index} names it as a part of the "
                                    "weights: get it from where the other parts are from")
        found, named = read(path), {name for name in parts if parts[name] == part}
        if set(found) != named:
            name = min(set(found) ^ named)
            what = "is missing" if name in named else "is not expected"
            raise ValueError(f"{path}: tensor {short(name)} {what}, by what {index} says; the "
                             "folder mixes parts of two models")
        tensors.update(found)
    return tensors


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    """Read model.safetensors of a folder, whole or in parts, or else its pytorch_model.bin.

    Raises: `FileNotFoundError` saying what to put where; `ValueError` naming a damaged file.
    """
    for name, read in (("model.safetensors", read_safetensors),
                       ("pytorch_model.bin", read_pytorch_bin)):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return read(path)
        if os.path.exists(path + ".index.json"):
            return read_parts(path + ".index.json", read)
    other = other_weights(os.listdir(folder) if os.path.isdir(folder) else [])
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors or "
                            "pytorch_model.bin there, whole or in parts with their index; "
                            + (other or "put one there, or first run the stage that writes this "
                                        "folder"))
