"""Files: safetensors weights, pytorch_model.bin, JSON, atomic writes, GPT-2 from the Hub.

Every file is read as if a stranger had made it: nothing in it is executed, every number in it is
checked before it is used, and a damaged file ends in a `ValueError` that names it. Every file
written appears whole or not at all. A download gets its name only after its hash was checked.
Imports nothing of ours.

Source: the format, https://github.com/huggingface/safetensors/blob/v0.4.5/README.md#format
"""

import contextlib
import hashlib
import http.client
import json
import math
import mmap
import os
import pickle
import re
import reprlib
import secrets
import stat
import struct
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from typing import IO, BinaryIO, NamedTuple

import torch

try:
    import fcntl            # locks that end with their process
except ImportError:         # Windows: there an open file cannot be deleted in the first place
    fcntl = None

# In the order of the safetensors package, which puts the last of them first in a file: widest
# elements first, so that every tensor starts at a multiple of its element's size.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
          "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "F32": torch.float32,
          "F64": torch.float64, "I64": torch.int64}
MAX_HEADER = 4 << 20        # bytes; GPT-2's largest has a header of about 70 thousand
MAX_JSON = 4 << 20          # bytes; GPT-2's vocab.json has 1 million
MAX_DIMENSIONS = 8          # GPT-2 needs 4
MAX_TENSOR = 1 << 62        # bytes; beyond it strides would overflow
MAX_BOOLS = 1 << 28         # bytes; all masks of a GPT-2 have 50 million
MAX_UNALIGNED = 8 << 30     # bytes; such tensors are copied, the largest GPT-2 has 6.4 billion
LEFTOVER_SECONDS = 60.0     # without a change, before an abandoned file may be deleted

PUBLISHED_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
GPT2_FILES = {              # of openai-community/gpt2 at that revision: bytes, sha256
    "config.json": (665, "0daed7749b4f02b8f76240d5444551d7b08712dab4d0adb8239c56ba823bb7b4"),
    "vocab.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    "merges.txt": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "model.safetensors": (548105171, "248dfc3911869ec493c76e65bf2fcf7f"
                                     "615828b0254c12b473182f0f81d3a707")}
MAX_DOWNLOAD = 8 << 30      # bytes; the largest GPT-2 has 6.4 billion
ATTEMPTS = 5                # connections for one file, as long as each brings something
RETRY_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0


# ---- reading ------------------------------------------------------------------------------------

def short(value) -> str:
    """`repr` of a value from a file, cut so that an error stays one readable line."""
    shortener = reprlib.Repr()
    shortener.maxstring, shortener.maxlevel = 80, 2
    text = shortener.repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def open_regular(path: str) -> BinaryIO:
    """Open a file for reading; a folder, pipe or device is refused, for it could block forever."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; expected a file there: check the name, or "
                                "first run the stage that writes that folder") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, found a folder or a device")
    return open(path, "rb")


def unique_keys(pairs: list) -> dict:
    """Object hook: two readers may choose differently between equal keys, so they are refused."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} appears twice")
        found[key] = value
    return found


def short_int(digits: str) -> int:
    """Integer hook: converting a number of a million digits would take minutes."""
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def finite_float(digits: str) -> float:
    """Float and constant hook: NaN, Infinity and 1e999 are refused."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {short(digits)} is not finite")
    return value


def parse_json(data: bytes, path: str) -> dict:
    """Parse a JSON object strictly; every failure is a `ValueError` that names `path`."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys,
                           parse_int=short_int, parse_float=finite_float,
                           parse_constant=finite_float)
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:                      # broken UTF-8 is one, too
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {short(value)}")
    return value


def read_json(path: str) -> dict:
    """Read a JSON object of at most 4 MiB.

    Raises: `ValueError` naming the file for anything else: another top-level value, equal keys,
    NaN, broken UTF-8, deep nesting. `FileNotFoundError` where there is no file.
    """
    with open_regular(path) as file:
        data = file.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ValueError(f"{path}: expected JSON of at most {MAX_JSON} bytes, found more")
    return parse_json(data, path)


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
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{path}: not a safetensors file: it announces a header of {length} "
                             f"bytes, the file has {size} and a header at most {MAX_HEADER}")
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
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def write_safetensors(path: str, tensors: dict[str, torch.Tensor],
                      metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically, byte for byte as the safetensors package writes them.

    Equal tensors give equal files. `metadata` defaults to `{"format": "pt"}`, which transformers
    asks for. Tensors that share memory are each written.

    Raises: `ValueError` for a tensor that the reader would refuse; `OSError` naming the file when
    it cannot be written, and then the old file is still there.
    """
    kinds = {dtype: (-rank, kind) for rank, (kind, dtype) in enumerate(DTYPES.items())}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in kinds:
            raise ValueError(f"{path}: {short(name)}: expected a tensor of one of "
                             f"{', '.join(DTYPES)}, found {short(tensor)}")
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
    data = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    data += b" " * (-len(data) % 8)                  # so that the tensors start aligned
    if len(data) > MAX_HEADER:
        raise ValueError(f"{path}: {len(tensors)} tensors need a header over {MAX_HEADER} bytes")
    chunks = [tensor_bytes(tensors[name]) for _, name in names]      # views, not copies
    write_atomically(path, len(data).to_bytes(8, "little"), data, *chunks)


# ---- writing ------------------------------------------------------------------------------------

def lock(file: IO) -> None:
    """Lock an open file until it is closed, by a kill too; `OSError` if somebody else has."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(folder: str, name: str) -> None:
    """Delete what killed writers of this file left beside it, lest the disk fill up with it.

    Dead is a writer that holds no lock and has not written for a minute: a process number would
    say nothing about another machine, or about a container that was started again.
    """
    leftover = re.compile(re.escape(f".{name}.") + r"\d+-[0-9a-f]{8}\.tmp")
    for other in os.listdir(folder):
        if leftover.fullmatch(other):
            other = os.path.join(folder, other)
            with contextlib.suppress(OSError):       # a living writer's, or somebody was faster
                state = os.lstat(other)
                old = time.time() - state.st_mtime > LEFTOVER_SECONDS
                if old and stat.S_ISREG(state.st_mode):
                    with open(other, "rb+") as file:
                        lock(file)
                    os.unlink(other)


def write_atomically(path: str, *chunks: bytes) -> None:
    """Write a file whole or not at all: beside it first, then renamed over it.

    Whoever reads `path` at any moment, also after a kill, finds the old file or the new one.
    Missing folders are made; what a killed writer left is removed. Raises `OSError` naming the
    file; the old one is then untouched.
    """
    folder, name = os.path.split(os.path.abspath(path))
    beside = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(OSError):           # a folder may refuse to be listed
            remove_leftovers(folder, name)
        with open(beside, "xb") as file:
            with contextlib.suppress(OSError):       # not every file system has locks
                lock(file)
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())                  # or a power cut leaves the new name empty
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} was not written ({error.strerror}); what was there "
                      "before is unchanged: free some space or choose another folder") from None
    finally:
        with contextlib.suppress(OSError):           # after the rename there is nothing to remove
            os.unlink(beside)


def write_json(path: str, values: dict) -> None:
    """Write a JSON object atomically, so that `read_json` gives it back.

    Raises: `ValueError` naming the file for NaN, infinity or text that is not Unicode.
    """
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        data = text.encode("utf-8")
    except ValueError as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from None
    write_atomically(path, data)


# ---- the weights of a folder ---------------------------------------------------------------------

# What torch.load raises for damaged files, found by mutating one 100,000 times.
BROKEN_BIN = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError,
              AttributeError, ArithmeticError, AssertionError, ImportError, OSError, MemoryError,
              struct.error, zipfile.BadZipFile)


def read_pytorch_bin(path: str) -> dict[str, torch.Tensor]:
    """Read a pytorch_model.bin without executing anything from it.

    Raises: `ValueError` naming the file for damage, for anything but a dict of plain tensors, and
    for files that would need more memory than they have bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            if zipfile.is_zipfile(file):             # careful: PyTorch would inflate a zip bomb
                items = zipfile.ZipFile(file).infolist()
                if any(item.compress_type for item in items):
                    raise ValueError("it is compressed, which PyTorch's own files are not")
                if sum(item.file_size for item in items) > size:
                    raise ValueError("its parts overlap, which those of PyTorch's own files do not")
            file.seek(0)
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        except BROKEN_BIN as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise ValueError(f"{path}: not a readable file of PyTorch weights: {reason}") from None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {short(type(tensors))}")
    for name, tensor in tensors.items():
        if not isinstance(name, str):                # careful: printing an int may take minutes
            raise ValueError(f"{path}: expected tensors under names, found {type(name)}")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {short(name)}: expected a tensor, found {type(tensor)}")
        if (tensor.layout != torch.strided or tensor.device.type != "cpu"
                or tensor.dtype not in DTYPES.values()):
            raise ValueError(f"{path}: {short(name)}: expected plain numbers, found "
                             f"{tensor.layout} {tensor.dtype} on {tensor.device}")
        # careful: strides of 0 make a tensor of any size from one number
        if tensor.numel() * tensor.dtype.itemsize > size:
            raise ValueError(f"{path}: {short(name)}: a shape of {tuple(tensor.shape)} needs more "
                             "than the file holds")
    return dict(tensors)


def read_weights(folder: str) -> dict[str, torch.Tensor]:
    """Read model.safetensors of a folder, or else its pytorch_model.bin.

    Raises: `FileNotFoundError` saying what to put where; `ValueError` naming a damaged file.
    """
    path = os.path.join(folder, "model.safetensors")
    if os.path.exists(path):
        return read_safetensors(path)
    other = os.path.join(folder, "pytorch_model.bin")
    if os.path.exists(other):
        return read_pytorch_bin(other)
    raise FileNotFoundError(f"{folder} holds no weights: expected model.safetensors or "
                            "pytorch_model.bin there, whole and not in several parts; put one "
                            "there, or first run the stage that writes this folder")


# ---- GPT-2 from the Hub --------------------------------------------------------------------------

class Published(NamedTuple):
    """One file to fetch; size and sha256 are None where only the server can tell them."""
    name: str
    repository: str
    revision: str
    size: int | None
    sha256: str | None


def published_files(name: str) -> list[Published]:
    """The four files of a published model, the weights last.

    `gpt2` is pinned: a fixed revision, every size and hash known. Of the other three models the
    vocabulary is the same, so it comes from there, too; for their config.json and weights no
    hash is known here, so the size and sha256 that the server announces for revision `main`
    are checked: they find damage on the way, not a change on the Hub.
    """
    pinned = [Published(file, "openai-community/gpt2", GPT2_REVISION, size, sha256)
              for file, (size, sha256) in GPT2_FILES.items()]
    if name == "gpt2":
        return pinned
    own = Published("config.json", f"openai-community/{name}", "main", None, None)
    shared = [item for item in pinned if item.name in ("vocab.json", "merges.txt")]
    return [own, *shared, own._replace(name="model.safetensors")]


def is_local(url: str) -> bool:
    """Whether `url` is plain http to this very machine, as in the tests."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only, and keeps the hash that the Hub announces beside them."""

    def __init__(self, local: bool):
        self.local = local                           # http to this machine is allowed, too
        self.etag = ""

    def check(self, url: str) -> None:
        if urllib.parse.urlsplit(url).scheme != "https" and not (self.local and is_local(url)):
            raise ValueError(f"refused to load from {url}: expected an https address")

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.check(newurl)
        # Source: huggingface_hub 0.23, constants.py, HUGGINGFACE_HEADER_X_LINKED_ETAG
        self.etag = self.etag or headers.get("X-Linked-Etag", "")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, start: int, local: bool) -> tuple[http.client.HTTPResponse, str | None]:
    """Ask for `url` from byte `start` on; return the response and the announced sha256 or None.

    Raises: `ConnectionError` for no answer or an error; `ValueError` for a refused address.
    """
    redirects = Redirects(local)
    redirects.check(url)
    request = urllib.request.Request(url, headers={"User-Agent": "minirlhf"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        opener = urllib.request.build_opener(redirects)
        response = opener.open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == 416:              # there is nothing after `start`
            return open_url(url, 0, local)
        if error.code < 400:
            raise ValueError(f"{url}: refused a redirect: {error.reason}") from None
        raise ConnectionError(f"{url}: the server answered {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url}: {getattr(error, 'reason', error)}") from None
    etag = (redirects.etag or response.headers.get("X-Linked-Etag", "")).strip('W/"').lower()
    is_sha256 = len(etag) == 64 and set(etag) <= set("0123456789abcdef")
    return response, etag if is_sha256 else None


def copy_response(response, part: str, start: int, total: int) -> int:
    """Append a response to `part`, showing progress; return how many bytes are there at the end."""
    position, shown = start, 0.0
    label = os.path.basename(part)[:-len(".part")]
    with response, open(part, "ab" if start else "wb") as file:
        while position < total:
            try:
                chunk = response.read1(1 << 16)[:total - position]
            except (OSError, http.client.HTTPException):
                break                                # the caller finds that bytes are missing
            if not chunk:
                break
            file.write(chunk)
            position += len(chunk)
            if time.monotonic() - shown > 0.5 or position == total:
                shown = time.monotonic()
                print(f"\r{label}: {100 * position // total:3d}% of {total / 1e6:.1f} MB",
                      end="\n" if position == total else "", file=sys.stderr, flush=True)
    return position


def fetch_part(item: Published, part: str, base_url: str) -> str | None:
    """Bring `part` to its full size, going on where it broke off; return the sha256 to check."""
    url = f"{base_url}/{item.repository}/resolve/{item.revision}/{item.name}"
    local = is_local(base_url)
    for _ in range(ATTEMPTS):
        start = os.path.getsize(part) if os.path.exists(part) else 0
        if start == item.size:
            return item.sha256
        response, announced = open_url(url, start, local)
        sha256 = item.sha256 or announced
        continued = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status == 206 and not (continued and sha256):
            response.close()                         # careful: unchecked halves could differ
            response, _ = open_url(url, 0, local)
        if response.status != 206:
            start = 0                                # the server sends the whole file again
        total = item.size if response.length is None else start + response.length
        if total is None or not 0 < total <= MAX_DOWNLOAD or item.size not in (None, total):
            response.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
            raise ValueError(f"{url}: expected {item.size or 'some'} bytes, the server announces "
                             f"{total}; nothing was kept")
        position = copy_response(response, part, start, total)
        if position == total:
            return sha256
        if position == start:
            break
        time.sleep(RETRY_SECONDS)
    raise ConnectionError(f"{url}: the connection broke off after {position} of {total} bytes; "
                          "the next run goes on from there")


def fetch(item: Published, folder: str, base_url: str) -> None:
    """Fetch one file into `folder`; it gets its name when its hash was found right."""
    target = os.path.join(folder, item.name)
    part = target + ".part"
    if os.path.lexists(part):
        state = os.lstat(part)                       # careful: a link could lead out of the folder
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            os.unlink(part)                          # and a pipe could block forever
    expected = fetch_part(item, part, base_url)
    found = hashlib.sha256()
    with open(part, "rb+") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
        os.fsync(file.fileno())
    if expected is not None and found.hexdigest() != expected:
        os.unlink(part)
        raise ValueError(f"{target}: expected sha256 {expected}, the download has "
                         f"{found.hexdigest()}; it was deleted, run this again")
    os.replace(part, target)


def download_published(name: str, folder: str, base_url: str = "https://huggingface.co") -> None:
    """Fetch config.json, vocab.json, merges.txt and model.safetensors of a GPT-2 into `folder`.

    A file that is there already is kept. A broken download goes on where it stopped.

    Raises: `ConnectionError` when the server cannot be reached, saying which files to put where;
    `ValueError` for a wrong size, hash or redirect; `OSError` when the folder cannot be written.
    """
    if name not in PUBLISHED_NAMES:
        raise ValueError(f"expected one of {', '.join(PUBLISHED_NAMES)}, found {short(name)}")
    items = published_files(name)
    try:
        os.makedirs(folder, exist_ok=True)
        for item in items:
            if not os.path.exists(os.path.join(folder, item.name)):
                fetch(item, folder, base_url.rstrip("/"))
    except ConnectionError as error:
        files = ", ".join(item.name for item in items)
        raise ConnectionError(f"could not fetch {name}: {error}. Without a network put these files "
                              f"of https://huggingface.co/openai-community/{name} into {folder} "
                              f"by hand: {files}") from None
    except OSError as error:
        raise OSError(error.errno, f"{folder}: could not keep the download ({error.strerror}); "
                      "free some space or choose another folder, then run this again: it goes on "
                      "where it stopped") from None
