"""The whole pipeline in its smallest form, on the shipped base model, and the summary of seeds."""

import json
import os
import subprocess
import sys

import pytest

from minirlhf import __main__ as pipeline
from minirlhf.experiments import seeds
from minirlhf.weights import write_json

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
        assert 0 <= report[name]["low"] <= report[name]["mean"] <= report[name]["high"] <= 1
    for name in ("gold", "fully_right", "kl_ref", "length"):
        assert set(report[name]) == {"base", "sft", "rlhf"}
    assert len(report["reward_model_accuracy"]) == 2 and report["seed"] == 3
    assert report["seconds"]["total"] > 0
    assert {"sft", "comparisons", "reward_model", "ppo", "evaluation"} <= set(report["seconds"])


@pytest.mark.parametrize("module, function, calls", [
    ("reward_model", "publish", 2), ("ppo", "rollout", 2)])
def test_a_stopped_pipeline_goes_on_to_the_same_report(report_folder, tmp_path, monkeypatch, capsys,
                                                       module, function, calls):
    owner = pipeline.ppo if module == "ppo" else pipeline.reward_model.RunFolder
    original, count = getattr(owner, function), 0

    def failing(*arguments):
        nonlocal count
        count += 1
        if count == calls:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(pipeline, "QUICK", SMALLEST)
    cfg = pipeline.PipelineConfig(base=TINY, out=str(tmp_path), quick=True, seed=3)
    for name, command in (("sft", "SFT"), ("ppo", "PPO")):       # an earlier pipeline's results
        (tmp_path / name).mkdir()
        write_json(str(tmp_path / name / "run.json"), {"command": command, "finished": True,
                                                       "config": {}, "inputs": {}, "row": {}})
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, failing)
        with pytest.raises(KeyboardInterrupt):
            pipeline.main(cfg)
    with pytest.raises(ValueError, match="holds a pipeline that is not finished"):
        pipeline.main(pipeline.PipelineConfig(base=TINY, out=str(tmp_path), quick=True, seed=4))
    capsys.readouterr()
    pipeline.main(cfg)
    assert "going on with the pipeline" in capsys.readouterr().out
    found, expected = read_report(str(tmp_path)), read_report(report_folder)
    assert found.pop("seconds").keys() == expected.pop("seconds").keys() and found == expected
    assert not os.path.exists(tmp_path / "pipeline.json")


def test_sft_teaches_the_base_to_answer(report_folder):
    report = read_report(report_folder)
    assert report["answered"]["sft"] > report["answered"]["base"]


def test_kl_ref_of_the_reference_itself_is_zero(report_folder):
    assert abs(read_report(report_folder)["kl_ref"]["sft"]) < 1e-4


def test_the_control_is_another_set_of_answers_of_sft_against_sft(report_folder):
    control = read_report(report_folder)["control"]
    # the same answers twice would give exactly 0.5 for every prompt, another policy far from it
    assert control["low"] < control["high"] and abs(control["mean"] - 0.5) < 0.2


def test_every_stage_leaves_its_folder_and_the_run_its_picture(report_folder):
    for name in ("sft", "reward_model", "reward_model_2", "ppo"):
        for file in ("model.safetensors", "config.json", "vocab.json", "merges.txt", "metrics.csv"):
            assert os.path.getsize(os.path.join(report_folder, name, file)) > 0, (name, file)
    assert os.path.getsize(os.path.join(report_folder, "comparisons.jsonl")) > 0
    with open(os.path.join(report_folder, "curves.png"), "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


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
