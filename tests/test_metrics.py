"""metrics.py: the text files that grow during a run, metrics.csv and samples.txt."""

import hashlib
import math
import os
from pathlib import Path

import pytest
from helpers import limited_file_size

from minirlhf.engine.metrics import MetricsFile, PartFile, read_metrics
from minirlhf.engine.options import describe_error

# ---- rows ----------------------------------------------------------------------------------------

def test_metrics_come_back_as_they_were_written(tmp_path):
    folder = str(tmp_path / "new" / "folder")
    metrics = MetricsFile(folder, ["step", "loss", "gold"])
    metrics.write({"step": 1, "loss": 0.123456789, "gold": ""})
    metrics.write({"step": 2, "loss": 1e-12, "gold": -3.5})
    metrics.finish()
    assert read_metrics(folder) == [{"step": 1, "loss": 0.1234568},
                                    {"step": 2, "loss": 1e-12, "gold": -3.5}]
    text = (tmp_path / "new" / "folder" / "metrics.csv").read_bytes()
    assert text == b"step,loss,gold\n1,0.1234568,\n2,1e-12,-3.5\n"


def test_every_row_is_on_disk_before_the_next(tmp_path):
    metrics = MetricsFile(str(tmp_path), ["step"])
    for step in range(3):
        metrics.write({"step": step})
        assert (tmp_path / "metrics.csv.part").read_bytes().count(b"\n") == step + 2


def test_a_run_that_does_not_finish_leaves_the_metrics_of_the_last_that_did(tmp_path):
    first = MetricsFile(str(tmp_path), ["step"])
    first.write({"step": 1})
    first.finish()
    MetricsFile(str(tmp_path), ["step", "loss"]).write({"step": 7, "loss": 2.0})
    assert read_metrics(str(tmp_path)) == [{"step": 1}]
    second = MetricsFile(str(tmp_path), ["step", "loss"])
    second.finish()
    assert read_metrics(str(tmp_path)) == [] and os.listdir(tmp_path) == ["metrics.csv"]


@pytest.mark.parametrize("row", [{"step": 1}, {"loss": 1.0, "step": 1}, {"step": 1, "los": 2.0}])
def test_a_row_that_is_not_of_the_header_is_a_mistake(row, tmp_path):
    metrics = MetricsFile(str(tmp_path), ["step", "loss"])
    with pytest.raises(AssertionError):
        metrics.write(row)


@pytest.mark.parametrize("text", ["step,loss\n1,high\n", "step,loss\n1,2,3\n"])
def test_metrics_that_are_no_numbers_are_refused_with_their_file(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.csv: expected a number in every cell"):
        read_metrics(str(tmp_path))


def test_infinite_metrics_are_written_as_such(tmp_path):
    metrics = MetricsFile(str(tmp_path), ["loss", "kl_ref"])
    metrics.write({"loss": math.nan, "kl_ref": -math.inf})
    metrics.finish()
    (row,) = read_metrics(str(tmp_path))
    assert math.isnan(row["loss"]) and row["kl_ref"] == -math.inf


# ---- going on with a file ------------------------------------------------------------------------

def write_three_rows(folder) -> tuple[str, tuple[int, str]]:
    """A growing file of three rows; returns its path, and size and hash after two of them."""
    metrics = MetricsFile(str(folder), ["step"])
    metrics.write({"step": 1})
    metrics.write({"step": 2})
    mark = metrics.sync()
    metrics.write({"step": 3})
    return metrics.path, mark


def test_what_came_after_the_last_checkpoint_is_cut_off_and_written_again(tmp_path):
    path, (size, digest) = write_three_rows(tmp_path)
    with open(path, "a", encoding="utf-8") as file:
        file.write("4,half a ro")                        # as a kill in the middle of a write
    metrics = MetricsFile(str(tmp_path), ["step"], (size, digest))
    assert metrics.sync() == (size, digest)
    metrics.write({"step": 30})
    assert metrics.sync() == (12, hashlib.sha256(b"step\n1\n2\n30\n").hexdigest())
    metrics.finish()
    assert read_metrics(str(tmp_path)) == [{"step": 1}, {"step": 2}, {"step": 30}]


@pytest.mark.parametrize("content", [b"step\n", b"", b"step\n1\n2", b"step\n1\n3\n",
                                     b"Step\n1\n2\n"])
def test_a_file_that_was_changed_is_refused_and_left_alone_even_at_the_same_size(tmp_path, content):
    path, mark = write_three_rows(tmp_path)
    Path(path).write_bytes(content)
    with pytest.raises(ValueError, match="metrics.csv.part is not what it was at the last check"):
        MetricsFile(str(tmp_path), ["step"], mark)
    assert Path(path).read_bytes() == content


def test_a_file_that_was_deleted_is_refused(tmp_path):
    path, mark = write_three_rows(tmp_path)
    os.unlink(path)
    with pytest.raises(ValueError, match="metrics.csv.part is not what it was at the last check"):
        MetricsFile(str(tmp_path), ["step"], mark)


def test_text_is_appended_as_utf_8_and_gets_its_name_at_the_end(tmp_path):
    samples = PartFile(str(tmp_path), "samples.txt")
    samples.append("caf\u00e9\n")
    assert samples.sync() == (6, hashlib.sha256(b"caf\xc3\xa9\n").hexdigest())
    assert os.listdir(tmp_path) == ["samples.txt.part"]
    samples.finish()
    assert os.listdir(tmp_path) == ["samples.txt"]
    assert (tmp_path / "samples.txt").read_bytes() == b"caf\xc3\xa9\n"


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_a_growing_file_that_is_a_link_a_pipe_or_a_folder_is_refused(tmp_path, kind):
    """A write through a link would change somebody else's file; a pipe would block for ever."""
    other, path = tmp_path / "other", tmp_path / "out" / "samples.txt.part"
    other.write_text("mine", encoding="utf-8")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(other), "hard link": lambda: os.link(other, path),
     "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(ValueError, match="samples.txt.part: expected a file of the run"):
        PartFile(str(tmp_path / "out"), "samples.txt")
    assert other.read_text(encoding="utf-8") == "mine"


# ---- disks ---------------------------------------------------------------------------------------

def test_metrics_on_a_full_disk_end_in_a_sentence_that_names_the_file(tmp_path):
    metrics = MetricsFile(str(tmp_path), ["step", "loss"])
    with limited_file_size(100):
        with pytest.raises(OSError) as caught:
            for step in range(100):
                metrics.write({"step": step, "loss": 0.5})
    sentence = describe_error(caught.value)
    assert "metrics.csv.part could not be written" in sentence and "free some space" in sentence
    assert "Errno" not in sentence


def test_metrics_in_a_folder_that_cannot_be_made_name_it(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError) as caught:
        MetricsFile(str(tmp_path / "file" / "out"), ["step"])
    assert str(tmp_path / "file") in describe_error(caught.value)
