"""lab/siblings.py: verdicts, the process of its own, what is counted, arms in their quick form."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPOSITORY, environment, ppo_config, quietly
from sibling_runs import SIBLINGS, groups_config, rejection_config

from minirlhf import ppo
from minirlhf.engine.metrics import read_metrics
from minirlhf.lab import siblings
from minirlhf.lab.experiment import REFUTED, SHOWN, UNDECIDED, Rows
from minirlhf.lab.shared import Task
from minirlhf.lab.siblings import ARMS, TRAINERS, options_of, sampled_tokens, train_alone


def rows_of(**gold: float) -> Rows:
    """Gold of each arm, 2 where it is not named, with other noise in each."""
    arms = {"RLOO": 0.0, "PPO": 0.01, "DPO": 0.02, "rejection": 0.03, "random_ones": 0.04}
    return {name.replace("_", " "): [{"gold": gold.get(name, 2.0) + off + 0.02 * (seed % 2) * off}
                                     for seed in range(5)] for name, off in arms.items()}


def words_of(rows: Rows) -> list[str]:
    return [finding.word for finding in siblings.findings(rows)]


def test_the_parts_of_the_claim_can_be_shown_and_refuted():
    assert words_of(rows_of(DPO=1.0, random_ones=1.0)) == [SHOWN] * 3
    assert words_of(rows_of(RLOO=1.0, DPO=3.0, random_ones=3.0)) == [REFUTED] * 3
    few = {arm: rows[:3] for arm, rows in rows_of(DPO=1.0).items()}
    assert words_of(few) == [UNDECIDED] * 3


def test_all_arms_that_sample_draw_as_many_responses():
    task = Task("siblings", "PPO", 0, "nowhere")
    for arm, (trainer, options) in ARMS.items():
        if trainer in ("ppo", "groups"):
            cfg = TRAINERS[trainer][1](**options)
            assert cfg.batch_size * task.sizes.iterations == 1600, arm
        elif trainer == "rejection":
            cfg = TRAINERS[trainer][1](**options)
            assert cfg.rounds * cfg.prompts_per_round * cfg.k == 1600, arm


@pytest.mark.parametrize("trainer", ["ppo", "groups", "rejection"])
def test_sampled_tokens_are_those_of_all_responses(tmp_path, trainer, monkeypatch):
    if trainer == "ppo":
        monkeypatch.setattr(ppo.PPOConfig, "batch_size", 8)
        quietly(ppo.main, ppo_config(out=str(tmp_path)))
    else:
        module, config = SIBLINGS[trainer]
        quietly(module.main, config(out=str(tmp_path)))
    rows = read_metrics(str(tmp_path))
    responses = 48 if trainer == "rejection" else 8
    expected = sum(responses * row["response_len"] for row in rows)
    assert sampled_tokens(trainer, str(tmp_path)) == pytest.approx(expected)
    assert sampled_tokens("dpo", str(tmp_path)) == 0


# ---- a process of its own ------------------------------------------------------------------------

def options_for(cfg, *names: str) -> dict:
    """Some options of a config as `train_alone` is given them."""
    return {name: getattr(cfg, name) for name in names}


def test_a_trainer_alone_says_its_seconds_and_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    cfg = rejection_config(out=str(tmp_path / "out"), rounds=1)
    names = ("model", "reward", "prompts", "prompt_count", "gold", "rounds", "prompts_per_round",
             "max_new_tokens", "out")
    cost = quietly(train_alone, "rejection", options_for(cfg, *names))
    assert 0 < cost["seconds"] < 300 and os.path.exists(tmp_path / "out" / "model.safetensors")
    if sys.platform == "linux":
        assert 50 < cost["megabytes"] < 4000


def test_a_trainer_alone_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    with pytest.raises(ValueError, match="groups ended with code 2: error: --k is 1, expected at "):
        quietly(train_alone, "groups", {"k": 1})


def test_a_trainer_alone_leaves_with_the_one_that_started_it(tmp_path):
    cfg = groups_config(out=str(tmp_path), iterations=100_000)
    words = options_for(cfg, "model", "reward", "prompts", "prompt_count", "gold", "iterations",
                        "batch_size", "minibatch_size", "max_new_tokens", "out")
    code = f"from minirlhf.lab.siblings import train_alone; train_alone('groups', {words!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=tmp_path,
                              stdout=subprocess.DEVNULL)
    grown = tmp_path / "metrics.csv.part"
    deadline = time.time() + 120
    while not grown.exists() and time.time() < deadline:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    time.sleep(1.0)                                      # it may be at the end of a step
    size = grown.stat().st_size
    time.sleep(1.5)
    assert grown.stat().st_size == size


# ---- arms in their quick form --------------------------------------------------------------------

@pytest.fixture(scope="module")
def quick_out(tmp_path_factory) -> str:
    """A folder whose shared stages the tests below use together."""
    return str(tmp_path_factory.mktemp("lab"))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["SFT", "Dr. GRPO", "random ones", "best of 4", "KTO"])
def test_an_arm_of_every_kind_runs_in_its_quick_form(quick_out, arm):
    task = Task("siblings", arm, 0, quick_out, str(REPOSITORY / "checkpoints" / "tiny"), quick=True)
    os.makedirs(task.folder)
    figures = quietly(siblings.run, task)
    assert {"gold", "win_rate", "fully_right", "kl_ref", "answer_tokens"} <= set(figures)
    assert all(np.isfinite(value) for value in figures.values()), figures
    assert ("seconds" in figures) == ("kilotokens" in figures) == (arm not in ("SFT", "best of 4"))
    if arm == "best of 4":
        assert figures["answer_tokens"] > 3 * figures["length"] and 0 < figures["kl_ref"] < 0.64
    if arm == "KTO":
        options = options_of(task, "dpo", "out", ARMS[arm][1])
        assert options["comparisons"] == 400 and options["loss"] == "kto"
