"""JSON and text on the disk: strictly read, written whole or not at all."""

import os
import random
import signal
import sys
import time

import pytest
from fuzzing import nested
from helpers import limited_file_size

from minirlhf.files.disk import lock, read_json, short, write_atomically, write_json

KILLS = int(os.environ.get("MINIRLHF_KILLS", "25"))


# ---- JSON ----------------------------------------------------------------------------------------

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


def test_names_with_bytes_that_are_not_utf_8_come_back_as_they_were(tmp_path):
    name = os.fsdecode(b"donn\xe9es.jsonl")              # as Python names such a file
    write_json(tmp_path / "a.json", {"data": name})
    assert read_json(tmp_path / "a.json") == {"data": name}
    assert b"\\udce9" in (tmp_path / "a.json").read_bytes()


@pytest.mark.parametrize("values", [{"a": float("nan")}, {"a": [float("inf")]}])
def test_json_that_could_not_be_read_again_is_not_written(tmp_path, values):
    with pytest.raises(ValueError, match="a.json"):
        write_json(tmp_path / "a.json", values)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", [
    nested(7, 7), "x" * 10 ** 6, {"k" * 500: "v" * 500, "l" * 500: ["w" * 500] * 9}, 10 ** 19,
    [["x" * 100] * 9] * 9, {str(key): key for key in range(10 ** 5)}])
def test_a_value_in_an_error_stays_one_short_line(value):
    assert 0 < len(short(value)) <= 210 and "\n" not in short(value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.json does not exist"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="expected a file"):
        read_json(tmp_path)


# ---- whole or not at all -------------------------------------------------------------------------

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
    write_atomically(path, b"old")
    with limited_file_size(1 << 20):
        with pytest.raises(OSError, match="model.safetensors was not written"):
            write_atomically(path, b"header", bytes(4 << 20))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.safetensors"]


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


# ---- what a killed writer leaves -----------------------------------------------------------------

LEFT = ".model.safetensors.{}-0123abcd.tmp"          # what a killed writer leaves


def make_leftover(folder, name: str, age: float) -> None:
    (folder / name).write_bytes(b"half")
    os.utime(folder / name, (time.time() - age,) * 2)


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    """The writer's number may be anybody's now, this very process's too: only its lock counts."""
    for process in (1, os.getpid(), 999_999_999):
        make_leftover(tmp_path, LEFT.format(process), 3600)
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
        lock(file)
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

    def try_lock(descriptor: int) -> None:
        (name,) = os.listdir(tmp_path)
        with open(tmp_path / name, "rb+") as file:
            try:
                lock(file)
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
    versions = [[b"header %d" % i, bytes([i]) * 200_000] for i in range(2)]      # two chunks each
    write_atomically(path, *versions[0])
    rng, leftovers = random.Random(0), 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            while True:                              # until killed
                for version in versions:
                    write_atomically(path, *version)
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(path, "rb") as file:
            assert file.read() in [b"".join(version) for version in versions]
        for name in os.listdir(tmp_path):
            if name.endswith(".tmp"):
                leftovers += 1
                os.utime(tmp_path / name, (0, 0))    # as if the kill were long ago
    write_atomically(path, *versions[0])
    assert os.listdir(tmp_path) == ["model.safetensors"]
    print(f"{KILLS} kills, {leftovers} of them in the middle of a write")
