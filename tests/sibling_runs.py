"""Short runs of the trainers in minirlhf/siblings, for their tests."""

import os
from pathlib import Path

import pytest
from helpers import quietly, reward_folder, sft_folder

from minirlhf.engine.output import RUN_FILE
from minirlhf.siblings import dpo, groups, rejection


def groups_config(**options) -> groups.GroupsConfig:
    return groups.GroupsConfig(**{
        "model": sft_folder(), "reward": "helpers:share_of_red", "prompts": "helpers:toy_prompts",
        "prompt_count": 100, "gold": "", "iterations": 3, "k": 4, "batch_size": 8,
        "minibatch_size": 4, "max_new_tokens": 5, "lr": 5e-3, "kl_coef": 0.02, "sample_every": 100,
        **options})


def dpo_config(**options) -> dpo.DPOConfig:
    return dpo.DPOConfig(**{
        "model": sft_folder(), "data": "helpers:comparisons", "comparisons": 120, "held_out": 24,
        "batch_size": 12, "lr": 5e-3, "warmup_steps": 2, "eval_every": 4, **options})


def rejection_config(**options) -> rejection.RejectionConfig:
    return rejection.RejectionConfig(**{
        "model": sft_folder(), "reward": "helpers:share_of_red", "prompts": "helpers:toy_prompts",
        "prompt_count": 100, "gold": "", "rounds": 3, "prompts_per_round": 12, "k": 4,
        "max_new_tokens": 6, "batch_size": 4, "lr": 5e-3, **options})


SIBLINGS = {"groups": (groups, groups_config), "dpo": (dpo, dpo_config),
            "rejection": (rejection, rejection_config)}


def run(name: str, out, **options) -> dict:
    """Train quietly into `out`; the last row of metrics."""
    module, config = SIBLINGS[name]
    return quietly(module.main, config(out=str(out), **options))


def with_reward_model() -> dict:
    """Options by which a reward model takes the place of the rule."""
    return {"reward": reward_folder(), "ensemble": "min"}


class Interruption(Exception):
    """Stands for whatever may end a process at some point of it."""


def stop(name: str, out, owner, function: str, calls: int, **options) -> None:
    """Train until the `calls`-th call of a function of `owner` fails."""
    original, count = getattr(owner, function), 0

    def failing(*arguments, **keywords):
        nonlocal count
        count += 1
        if count == calls:
            raise Interruption
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, failing)
        with pytest.raises(Interruption):
            run(name, out, **options)


def files_of(folder) -> dict[str, bytes]:
    """All files of a finished run but run.json, whose options may differ, and the lock."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {os.path.relpath(path, folder): path.read_bytes() for path in paths
            if path.name not in (".lock", RUN_FILE)}
