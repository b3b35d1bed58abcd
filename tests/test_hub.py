"""The published models: a small Hub with faults, and what a download leaves on the disk."""

import functools
import hashlib
import http.server
import os
import socket
import threading

import pytest
from helpers import limited_file_size

from minirlhf.files import hub as files
from minirlhf.files.hub import download_published, find_folder

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
    monkeypatch.setattr(files, "GPT2_FILES", table)
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=functools.partial(server.serve_forever, 0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what arrives --------------------------------------------------------------------------------

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


def test_a_published_name_is_fetched_once_and_any_other_is_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch = functools.partial(download_published, base_url=hub.url)
    monkeypatch.setattr(files, "download_published", fetch)
    assert find_folder("gpt3") == "gpt3" and hub.requests == []
    assert find_folder("gpt2") == os.path.join("checkpoints", "gpt2")
    assert contents(tmp_path / "checkpoints" / "gpt2") == FILES and len(hub.requests) == 4
    assert find_folder("gpt2") == os.path.join("checkpoints", "gpt2") and len(hub.requests) == 4
    (tmp_path / "gpt2").mkdir()                      # a folder of the user's own
    assert find_folder("gpt2") == "gpt2"


# ---- who is asked --------------------------------------------------------------------------------

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


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of gpt2, gpt2-medium"):
        download_published("../gpt2", str(tmp_path))
    assert os.listdir(tmp_path) == []


# ---- what was there before -----------------------------------------------------------------------

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
