"""The whole pipeline in its smallest form, on the shipped base model, and the summary of seeds."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minirlhf import __main__ as pipeline
from minirlhf.engine import run_folder
from minirlhf.engine.options import Stopped
from minirlhf.experiments import seeds
from minirlhf.files.disk import write_json

SMALLEST = pipeline.Plan(demonstrations=300, comparisons=150, reward_models=2, iterations=2,
                         prompts=16, answers=2)
TINY = os.path.join(os.path.dirname(os.path.dirname(__file__)), "checkpoints", "tiny")


@pytest.fixture(scope="module")
def report_folder(tmp_path_factory):
    """The folder of one smallest run."""
    folder = str(tmp_path_factory.mktemp("pipeline"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "QUICK", SMALLEST)
        pipeline.main(pipeline.PipelineConfig(base=TINY, out=folder, quick=True, seed=3))
    return folder


def read_report(folder: str) -> dict:
    with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
        return json.load(file)


def test_the_report_holds_what_programs_are_promised(report_folder):
    report = read_report(report_folder)
    for name in ("win_rate", "control"):
        assert set(report[name]) == {"mean", "low", "high"}
        assert report[name]["low"] <= report[name]["mean"] <= report[name]["high"]
    for name in ("gold", "score", "answered", "fully_right", "kl_ref", "length"):
        assert set(report[name]) == {"base", "sft", "rlhf"}
    for policy, share in report["fully_right"].items():
        kinds = report["fully_right_by_kind"][policy]    # half of the prompts are of each kind
        assert (kinds["entity"] + kinds["combination"]) / 2 == pytest.approx(share)
    assert len(report["reward_model_accuracy"]) == 2 and report["seed"] == 3
    seconds = report["seconds"]
    total = seconds.pop("total")
    assert set(seconds) == {"sft", "comparisons", "reward_models", "ppo", "evaluation"}
    assert min(seconds.values()) > 0 and total == pytest.approx(sum(seconds.values()))


def stop_at(patch: pytest.MonkeyPatch, owner, name: str, call: int) -> None:
    """Let Ctrl-C arrive at this call of a function."""
    original, calls = getattr(owner, name), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    patch.setattr(owner, name, failing)


@pytest.mark.slow
def test_a_pipeline_that_was_stopped_twice_goes_on_to_the_same_report(report_folder, tmp_path,
                                                                      monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "QUICK", SMALLEST)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)      # no other processes: the same results
    cfg = pipeline.PipelineConfig(base=TINY, out=str(tmp_path), quick=True, seed=3)
    for name, command in (("sft", "SFT"), ("ppo", "PPO")):       # an earlier pipeline's results
        (tmp_path / name).mkdir()
        write_json(str(tmp_path / name / "run.json"), {"command": command, "finished": True,
                                                       "config": {}, "inputs": {}, "row": {}})
    for owner, name, call in ((pipeline.reward_model.RunFolder, "publish", 2),   # the first model's
                              (pipeline.ppo, "rollout", 2)):
        with monkeypatch.context() as patch:
            stop_at(patch, owner, name, call)
            with pytest.raises(KeyboardInterrupt):
                pipeline.main(cfg)
        with pytest.raises(ValueError, match="holds a pipeline that is not finished"):
            pipeline.main(dataclasses.replace(cfg, seed=4))
    capsys.readouterr()
    pipeline.main(cfg)
    assert "going on with the pipeline" in capsys.readouterr().out
    report, expected = read_report(str(tmp_path)), read_report(report_folder)
    assert report.pop("seconds").keys() == expected.pop("seconds").keys() and report == expected
    assert not os.path.exists(tmp_path / "pipeline.json")


def test_sft_teaches_the_base_to_answer(report_folder):
    report = read_report(report_folder)
    assert report["answered"]["sft"] > report["answered"]["base"]


def test_kl_ref_of_the_reference_itself_is_zero(report_folder):
    assert abs(read_report(report_folder)["kl_ref"]["sft"]) < 1e-4


def test_the_control_is_another_set_of_answers_of_sft_against_sft(report_folder):
    control = read_report(report_folder)["control"]
    # the same answers twice would give exactly 0.5 for every prompt, another policy far from it
    assert control["low"] < control["high"] and abs(control["mean"] - 0.5) < 0.3


def test_every_stage_leaves_its_folder_and_the_run_its_picture(report_folder):
    for name in ("sft", "reward_model", "reward_model_2", "ppo"):
        for file in ("model.safetensors", "config.json", "vocab.json", "merges.txt", "metrics.csv"):
            assert os.path.getsize(os.path.join(report_folder, name, file)) > 0, (name, file)
    assert os.path.getsize(os.path.join(report_folder, "comparisons.jsonl")) > 0
    with open(os.path.join(report_folder, "curves.png"), "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    page = Path(report_folder, "report.html").read_text(encoding="utf-8")
    assert len(page) < 2_000_000 and '"policies":["base","SFT","RLHF"]' in page


def test_the_summary_of_seeds_states_mean_and_lowest(report_folder):
    report = read_report(report_folder)
    other = {**report, "seed": 4, "win_rate": {"mean": 1.0, "low": 1.0, "high": 1.0}}
    text = seeds.summarise([report, other])
    mean = (report["win_rate"]["mean"] + 1) / 2
    assert f"mean {mean:.3f}, lowest {report['win_rate']['mean']:.3f}, highest 1.000" in text
    assert text.count("\n| 3 |") == 1 and text.count("\n| 4 |") == 1


def test_a_missing_base_is_one_sentence_that_names_the_command(tmp_path):
    words = [sys.executable, "-m", "minirlhf", "--base", str(tmp_path / "none"),
             "--out", str(tmp_path)]
    root = os.path.dirname(os.path.dirname(TINY))
    done = subprocess.run(words, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_base_that_a_stage_would_overwrite_is_refused_before_anything_is_written(report_folder,
                                                                                   tmp_path):
    before = {path: path.read_bytes() for path in (Path(report_folder) / "ppo").glob("*.*")}
    with pytest.raises(ValueError, match="is the folder that this stage starts from"):
        pipeline.main(pipeline.PipelineConfig(base=os.path.join(report_folder, "ppo"),
                                              out=report_folder, quick=True))
    assert {path: path.read_bytes() for path in (Path(report_folder) / "ppo").glob("*.*")} == before
    assert not os.path.exists(os.path.join(report_folder, "pipeline.json"))


@pytest.mark.parametrize("name", ["comparisons.jsonl", "report.json", "curves.png", "report.html"])
def test_files_of_somebody_else_are_not_overwritten(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} is there and no pipeline's"):
        pipeline.main(pipeline.PipelineConfig(base=TINY, out=str(tmp_path), quick=True))
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "{}"


def test_ctrl_c_while_a_stage_publishes_does_not_lose_the_stage(report_folder, tmp_path,
                                                                monkeypatch):
    monkeypatch.setattr(pipeline, "QUICK", SMALLEST)
    cfg = pipeline.PipelineConfig(base=TINY, out=str(tmp_path), quick=True, seed=3)
    publish, calls = run_folder.RunFolder.publish, []

    def interrupted(self, *arguments, **options):
        publish(self, *arguments, **options)
        calls.append(self.command)
        self.signal = signal.SIGINT                      # it came while the files were written
    monkeypatch.setattr(run_folder.RunFolder, "publish", interrupted)
    with pytest.raises(Stopped):
        pipeline.main(cfg)
    stamp = os.stat(tmp_path / "sft" / "model.safetensors").st_mtime_ns
    monkeypatch.setattr(run_folder.RunFolder, "publish", publish)
    pipeline.main(cfg)
    assert calls == ["SFT"] and os.stat(tmp_path / "sft" / "model.safetensors").st_mtime_ns == stamp
    assert read_report(tmp_path)["gold"] == read_report(report_folder)["gold"]
