"""Several pipelines with new seeds: which reports that are already there count."""

import json
import os
import shutil
import sys

import pytest
from helpers import REPOSITORY, base_folder, sft_folder

from minirlhf.engine.options import describe_error
from minirlhf.experiments import seeds
from minirlhf.experiments.seeds import SeedsConfig, fingerprint_base
from minirlhf.files.disk import read_json, write_json

STORED = read_json(str(REPOSITORY / "lectures" / "results" / "seeds.json"))["reports"]


def finished(out, base: str, count: int = 2) -> SeedsConfig:
    """Folders of finished pipelines of a base, and the config that asks for them."""
    for seed in range(count):
        write_json(str(out / str(seed) / "report.json"), STORED[seed])
        write_json(str(out / str(seed) / "base.json"), {"base": fingerprint_base(base)})
    return SeedsConfig(seeds=count, base=base, out=str(out))


def test_a_report_of_the_same_base_and_plan_is_not_made_again(tmp_path, monkeypatch):
    cfg = finished(tmp_path / "seeds", base_folder())
    monkeypatch.delattr(seeds.subprocess, "run")         # a second run would miss it
    assert seeds.main(cfg) == STORED[:2]
    moved = shutil.copytree(base_folder(), tmp_path / "elsewhere")
    same = SeedsConfig(seeds=2, base=str(moved), out=cfg.out)
    assert seeds.main(same) == STORED[:2], "a base is told by its content and not by its name"


def test_a_report_of_another_base_is_refused_before_any_pipeline_runs(tmp_path, monkeypatch):
    finished(tmp_path / "seeds", base_folder())
    monkeypatch.delattr(seeds.subprocess, "run")
    other = SeedsConfig(seeds=2, base=sft_folder(), out=str(tmp_path / "seeds"))
    with pytest.raises(ValueError, match="holds a pipeline of another base model") as error:
        seeds.main(other)
    assert "--out" in str(error.value)
    for seed in ("0", "1"):                              # begun with another base, not finished
        os.unlink(tmp_path / "seeds" / seed / "report.json")
    with pytest.raises(ValueError, match="holds a pipeline of another base model"):
        seeds.main(other)


def test_a_report_that_does_not_say_its_base_is_refused(tmp_path):
    cfg = finished(tmp_path, base_folder())
    os.unlink(tmp_path / "1" / "base.json")
    with pytest.raises(ValueError, match="no base.json that says of which"):
        seeds.main(cfg)


@pytest.mark.parametrize("name, value", [("plan", {**STORED[0]["plan"], "iterations": 6}),
                                         ("plan", None), ("seed", 7), ("quick", True)])
def test_a_report_of_another_plan_or_seed_is_refused(tmp_path, name, value):
    cfg = finished(tmp_path, base_folder(), 1)
    write_json(str(tmp_path / "0" / "report.json"), {**STORED[0], name: value})
    with pytest.raises(ValueError, match=f"report.json: {name} is "):
        seeds.main(cfg)


def changed(report: dict):
    """The report with each of its parts that the summary reads missing, or of another type."""
    for name in report.keys() - {"samples", "plan", "seed", "quick", "score", "answered", "length",
                                 "distinct", "end_rate"}:
        yield {key: value for key, value in report.items() if key != name}
        for value in (None, [], {}, "x", ["x"], 3, {"mean": "x", "total": "x"}):
            yield {**report, name: value}


def test_foreign_reports_end_in_a_sentence_that_names_the_file(tmp_path):
    cfg = finished(tmp_path, base_folder(), 1)
    path = tmp_path / "0" / "report.json"
    base = fingerprint_base(cfg.base)
    contents = [json.dumps(report).encode() for report in changed(STORED[0])]
    for content in [*contents, b"", b"[]", b"{}", b"\xff", b'{"win_rate": NaN}', b"[" * 9999]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="report.json") as error:
            seeds.read_report(cfg, 0, base)
        assert "\n" not in describe_error(error.value), content[:80]


def test_the_base_is_noted_before_the_pipeline_starts(tmp_path, monkeypatch):
    cfg = SeedsConfig(seeds=1, base=base_folder(), out=str(tmp_path))
    monkeypatch.setattr(sys, "executable", shutil.which("false") or "false")
    with pytest.raises(ValueError, match="the pipeline of seed 0 failed"):
        seeds.main(cfg)
    assert read_json(str(tmp_path / "0" / "base.json")) == {"base": fingerprint_base(cfg.base)}
    os.unlink(tmp_path / "0" / "log.txt")
    os.symlink(tmp_path / "other", tmp_path / "0" / "log.txt")
    with pytest.raises(ValueError, match="log.txt: expected a file of the run"):
        seeds.main(cfg)
    assert not (tmp_path / "other").exists()
