"""output.py: a run writes into a new folder or into its own, and into none that it reads."""

import os

import pytest
from helpers import quietly, sft_config

from minirlhf import sft
from minirlhf.engine.output import (
    LOCK_FILE,
    PART_FILES,
    RUN_FILE,
    check_output,
    command_of,
    lock_folder,
)
from minirlhf.engine.state import STATE_FILE
from minirlhf.files import disk
from minirlhf.files.disk import write_json
from minirlhf.ppo import PPOConfig


def make_folder(folder, *names: str) -> str:
    """A folder with empty files of these names."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return str(folder)


def test_a_command_is_named_as_its_config():
    assert command_of(PPOConfig(model="m", reward="r")) == "PPO"


# ---- inputs --------------------------------------------------------------------------------------

def test_a_stage_does_not_write_into_the_folder_that_it_reads(tmp_path):
    check_output(str(tmp_path / "out"), "SFT", str(tmp_path / "in"))
    make_folder(tmp_path / "in")
    for spelling in ("in", "in/", "a/../in", "./in"):
        with pytest.raises(ValueError, match="is the folder that this stage starts from"):
            check_output(f"{tmp_path}/{spelling}", "SFT", str(tmp_path / "b"), str(tmp_path / "in"))


def test_a_stage_does_not_write_above_or_below_a_folder_that_it_reads(tmp_path):
    model = make_folder(tmp_path / "models" / "base")
    for out in (tmp_path / "models", tmp_path, tmp_path / "models" / "base" / "new"):
        with pytest.raises(ValueError, match="lies above or below .*base, which this stage reads"):
            check_output(str(out), "SFT", model)
    check_output(str(tmp_path / "models" / "base2"), "SFT", model)       # beside it is allowed


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_a_link_to_the_folder_that_is_read_is_that_folder(tmp_path):
    model = make_folder(tmp_path / "in")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="is the folder that this stage starts from"):
        check_output(str(tmp_path / "link"), "SFT", model)


# ---- what the folder holds -----------------------------------------------------------------------

@pytest.mark.parametrize("out", ["", " ", "\t"])
def test_an_empty_name_is_refused(out):
    with pytest.raises(ValueError, match="--out is empty, expected the name of a folder"):
        check_output(out, "SFT")


def test_an_out_that_is_a_file_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="run is a file, expected the name of a folder"):
        check_output(str(tmp_path / "run"), "SFT")
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


def test_a_new_folder_an_empty_one_and_the_rest_of_a_killed_run_may_be_written_into(tmp_path):
    check_output(str(tmp_path / "new"), "SFT")
    check_output(make_folder(tmp_path / "empty"), "SFT")
    check_output(make_folder(tmp_path / "killed", LOCK_FILE, *PART_FILES,
                             ".model.safetensors.12-0123abcd.tmp"), "SFT")
    check_output(make_folder(tmp_path / "stopped", STATE_FILE, PART_FILES[0]), "SFT")


@pytest.mark.parametrize("command", ["SFT", "PPO"])
def test_a_finished_run_may_be_replaced_by_one_of_the_same_command_only(tmp_path, command):
    folder = make_folder(tmp_path / "run", "model.safetensors", "metrics.csv")
    write_json(os.path.join(folder, RUN_FILE), {"command": "SFT", "finished": True})
    if command == "SFT":
        check_output(folder, command)
    else:
        with pytest.raises(ValueError, match="holds a run of SFT, expected a new or an empty fold"):
            check_output(folder, command)


@pytest.mark.parametrize("name", ["thesis.tex", "model.safetensors", ".bashrc", "metrics.csv"])
def test_a_folder_with_other_files_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"holds {name} and no run of minirlhf"):
        check_output(make_folder(tmp_path / "mine", name), "SFT")


# ---- the lock ------------------------------------------------------------------------------------

def test_a_folder_is_locked_until_the_file_is_closed(tmp_path):
    pytest.importorskip("fcntl")
    first = lock_folder(str(tmp_path))
    with pytest.raises(ValueError, match="another run is writing into this folder"):
        lock_folder(str(tmp_path))
    first.close()
    lock_folder(str(tmp_path)).close()


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_a_link_a_pipe_or_a_folder_is_refused(tmp_path, kind):
    path = tmp_path / LOCK_FILE
    {"link": lambda: path.symlink_to(tmp_path / "other"), "pipe": lambda: os.mkfifo(path),
     "folder": path.mkdir}[kind]()
    with pytest.raises(ValueError, match="lock: expected a file of the run that writes here"):
        lock_folder(str(tmp_path))
    assert not (tmp_path / "other").exists()


def test_a_system_without_posix_locks_trains_and_locks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None)             # as on Windows
    out = str(tmp_path / "run")
    quietly(sft.main, sft_config(out=out, examples=80, held_out=8, epochs=1))
    assert quietly(sft.main, sft_config(out=out, examples=80, held_out=8, epochs=1, resume=True))
    with lock_folder(out), lock_folder(out):
        pass
