"""The published GPT-2 models: their names, their files, and how these get onto the disk.

A download gets its name only after its hash was checked, and goes on where it broke off.
"""

import contextlib
import hashlib
import http.client
import os
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

from minirlhf.files.disk import short

PUBLISHED_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OWNER = "openai-community"           # on the Hub
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


def published_name(name: str) -> str:
    """The short name of a published model: "gpt2" for "openai-community/gpt2"; "" if it is none."""
    short_name = name.removeprefix(f"{OWNER}/")
    return short_name if short_name in PUBLISHED_NAMES else ""


def find_folder(name_or_folder: str) -> str:
    """A folder as it is; a published name becomes checkpoints/<name>, downloaded when absent."""
    name = published_name(name_or_folder)
    if not name or os.path.isdir(name_or_folder):
        return name_or_folder
    folder = os.path.join("checkpoints", name)
    download_published(name, folder)
    return folder


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
    pinned = [Published(file, f"{OWNER}/gpt2", GPT2_REVISION, size, sha256)
              for file, (size, sha256) in GPT2_FILES.items()]
    if name == "gpt2":
        return pinned
    own = Published("config.json", f"{OWNER}/{name}", "main", None, None)
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
    digest = hashlib.sha256()
    with open(part, "rb+") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        os.fsync(file.fileno())
    if expected is not None and digest.hexdigest() != expected:
        os.unlink(part)
        raise ValueError(f"{target}: expected sha256 {expected}, the download has "
                         f"{digest.hexdigest()}; it was deleted, run this again")
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
                              f"of https://huggingface.co/{OWNER}/{name} into {folder} "
                              f"by hand: {files}") from None
    except OSError as error:
        raise OSError(error.errno, f"{folder}: could not keep the download ({error.strerror}); "
                      "free some space or choose another folder, then run this again: it goes on "
                      "where it stopped") from None
