"""Makes the runs of `cases`: one folder each, of which only metrics and samples are kept."""

import contextlib
import io
import os
import shutil
import tempfile

from minirlhf import ppo, reward_model, sft
from minirlhf.common import check
from minirlhf.diagnose.cases import Case, replacements
from minirlhf.museum.substitute import substituted

TRAINERS = {"sft": (sft.main, sft.SFTConfig), "ppo": (ppo.main, ppo.PPOConfig),
            "reward_model": (reward_model.main, reward_model.RewardModelConfig)}
KEPT = ("metrics.csv", "metrics.csv.part", "samples.txt", "samples.txt.part")


def folder_name(case: Case, seed: int) -> str:
    """Example: the case "kl_coef 0.1" with seed 2 is kept in "kl_coef_0.1-2"."""
    return "".join(c if c.isalnum() or c in "._" else "_" for c in case.name) + f"-{seed}"


def complete(case: Case, seed: int, stages: str, out: str) -> dict:
    """The case's options with the seed, the output folder and the stages it starts from."""
    if case.stage == "sft":
        start = {"model": os.path.join(stages, "tiny")}
    else:
        start = {"model": os.path.join(stages, "sft")}
    if case.stage == "ppo":
        start["reward"] = os.path.join(stages, "reward_model")
    options = {**start, **case.options, "seed": seed, "out": out}
    if "reward_model" in str(case.options.get("reward")):
        names = case.options["reward"].split(",")
        options["reward"] = ",".join(os.path.join(stages, name) for name in names)
    return options


def make_run(case: Case, seed: int, stages: str, out: str) -> str:
    """Run a case, unless its metrics are there already; returns the folder with its metrics.

    A run that stops itself (numbers that are not finite) leaves the metrics it had written.
    """
    folder = os.path.join(out, folder_name(case, seed))
    if os.path.isdir(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        options = complete(case, seed, stages, os.path.join(scratch, "run"))
        if case.options.get("model") == "sft_without_end":
            options["model"] = os.path.join(scratch, "sft_without_end")
            train("sft", {"model": os.path.join(stages, "tiny"), "examples": 800, "held_out": 50,
                          "seed": seed, "out": options["model"]}, "end token forgotten")
        stopped = train(case.stage, options, case.mistake)
        kept = os.path.join(scratch, "kept")
        os.makedirs(kept)
        for name in KEPT:
            if os.path.exists(os.path.join(options["out"], name)):
                shutil.copy(os.path.join(options["out"], name), kept)
        check(len(os.listdir(kept)) > 0, f"{case.name}, seed {seed}: {stopped}")
        os.makedirs(out, exist_ok=True)
        shutil.copytree(kept, folder)
    return folder


def train(stage: str, options: dict, mistake: str) -> str:
    """Run a trainer silently; returns what stopped it, "" if nothing did."""
    main, config = TRAINERS[stage]
    with substituted(replacements(mistake)), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(config(**options))
        except FloatingPointError as error:
            return str(error)
    return ""
