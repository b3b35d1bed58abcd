"""JSON and text on the disk: read as if a stranger had written it, written whole or not at all.

Every number in a file is checked before it is used, and a damaged file ends in a `ValueError` that
names it.
"""

import contextlib
import errno
import json
import math
import os
import re
import reprlib
import secrets
import stat
import time
from typing import IO, BinaryIO

from minirlhf.files.foreign import HEAD, contents, stand_in

try:
    import fcntl  # locks that end with their process
except ImportError:         # Windows: there an open file cannot be deleted in the first place
    fcntl = None

MAX_JSON = 4 << 20          # bytes; GPT-2's vocab.json has 1 million
LEFTOVER = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")    # a file of ours that is being written
LEFTOVER_SECONDS = 60.0     # without a change, before an abandoned file may be deleted


# ---- reading ------------------------------------------------------------------------------------

def short(value) -> str:
    """`repr` of a value from a file, cut so that an error stays one readable line."""
    shortener = reprlib.Repr()
    shortener.maxstring, shortener.maxlevel = 80, 2
    text = shortener.repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def open_regular(path: str) -> BinaryIO:
    """Open a file for reading; a folder, pipe or device is refused, for it could block forever.

    So is what never is the file that was meant: a Git LFS pointer, a web page.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; expected a file there: check the name, or "
                                "first run the stage that writes that folder") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, found a folder or a device")
    file = open(path, "rb")
    found = stand_in(file.read(HEAD))
    if found:
        file.close()
        raise ValueError(f"{path}: expected the file itself, found {found}")
    file.seek(0)
    return file


def unique_keys(pairs: list) -> dict:
    """Object hook: two readers may choose differently between equal keys, so they are refused."""
    values = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {short(key)} appears twice")
        values[key] = value
    return values


def short_int(digits: str) -> int | float:
    """Integer hook: converting a number of a million digits would take minutes.

    In JSON -0 is a floating-point number, which is no size.
    """
    if len(digits) > 20:
        raise ValueError(f"a number of {len(digits)} digits")
    return -0.0 if digits == "-0" else int(digits)


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
        found = contents(data[:HEAD])
        reason = f"found {found}" if found else str(error)
        raise ValueError(f"{path}: not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {short(value)}")
    return value


def read_json(path: str, most: int = MAX_JSON) -> dict:
    """Read a JSON object of at most `most` bytes.

    Raises: `ValueError` naming the file for anything else: another top-level value, equal keys,
    NaN, broken UTF-8, deep nesting. `FileNotFoundError` where there is no file.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: expected JSON of at most {most} bytes, found more")
    return parse_json(data, path)


# ---- writing ------------------------------------------------------------------------------------

def advice(error: OSError) -> str:
    """What to do about a file that could not be written."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "you may not write there: change the permissions or choose another folder"
    return "free some space or choose another folder"


def open_own(path: str, mode: str) -> IO:
    """Open a file that a run grows or locks in its own folder.

    Raises: ValueError for a link, which would lead a write out of the folder, and for a pipe or a
    device, which could block for ever.
    """
    if os.path.lexists(path):
        state = os.lstat(path)
        if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
            raise ValueError(f"{path}: expected a file of the run that writes here, found a link, "
                             "a folder or a device; remove it, or name another folder")
    return open(path, mode)


def lock(file: IO) -> None:
    """Lock an open file until it is closed, by a kill too; `OSError` if somebody else has."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leftovers(folder: str, name: str = "", seconds: float = LEFTOVER_SECONDS) -> None:
    """Delete what killed writers of a file, or of all files, left in its folder.

    Dead is a writer that holds no lock and has not written for some seconds: a process number would
    say nothing about another machine, or about a container that was started again.
    """
    for other in os.listdir(folder):
        if LEFTOVER.fullmatch(other) and other.startswith(f".{name}." if name else "."):
            other = os.path.join(folder, other)
            with contextlib.suppress(OSError):       # a living writer's, or somebody was faster
                state = os.lstat(other)
                old = time.time() - state.st_mtime > seconds
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
                      f"before is unchanged: {advice(error)}") from None
    finally:
        with contextlib.suppress(OSError):           # after the rename there is nothing to remove
            os.unlink(beside)


def write_json(path: str, values: dict) -> None:
    """Write a JSON object atomically, so that `read_json` gives it back.

    A file name with bytes that are not UTF-8 is half a surrogate pair in Python; it is written in
    JSON's own way, as \\udce9, say.
    Raises: `ValueError` naming the file for NaN and infinity.
    """
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if re.search("[\ud800-\udfff]", text):
            text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"{path}: cannot be written as JSON: {error}") from None
    write_atomically(path, text.encode("utf-8"))
