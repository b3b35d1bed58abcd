"""Runs a trainer with a mistake switched on, beside the same run without, and compares figures."""

import contextlib
import io
import os
import tempfile

from minirlhf import ppo, reward_model, sft
from minirlhf.common import random_stream, read_metrics
from minirlhf.data import Tokenizer, encode_prompt, format_prompt
from minirlhf.gpt2 import GPT2, generate
from minirlhf.museum.exhibits import Exhibit
from minirlhf.museum.substitute import ignore, substituted
from minirlhf.world import prompts

TRAINERS = {"sft": (sft.main, sft.SFTConfig), "ppo": (ppo.main, ppo.PPOConfig),
            "reward_model": (reward_model.main, reward_model.RewardModelConfig)}

# small enough for a few seconds a run, large enough for the curves to have their shape
OPTIONS = {"sft": {"examples": 500, "held_out": 100, "eval_every": 10},
           "reward_model": {"comparisons": 900, "held_out": 300, "eval_every": 10},
           "ppo": {"iterations": 10, "batch_size": 24, "minibatch_size": 12}}

FIGURES = {"sft": ("loss", "held_out_loss", "grad_norm"),
           "reward_model": ("loss", "held_out_loss", "held_out_accuracy", "grad_norm"),
           "ppo": ("score", "gold", "kl_ref", "kl_old", "entropy", "clipfrac", "ratio_first",
                   "vf_loss", "explained_var", "response_len", "end_rate", "grad_norm")}

# what a program without our checks does not do
UNCHECKED = [(ppo, "check", ignore), (ppo, "check_invariants", ignore)]


def start(stage: str, stages: str) -> dict:
    """The checkpoints that a stage starts from."""
    if stage == "sft":
        return {"model": os.path.join(stages, "tiny")}
    found = {"model": os.path.join(stages, "sft")}
    return {**found, "reward": os.path.join(stages, "reward_model")} if stage == "ppo" else found


def run_once(exhibit: Exhibit, seed: int, stages: str, replacements: list[tuple]) -> list[dict]:
    """The rows of metrics of one run; the last row of an SFT run also has `sampled_end_rate`."""
    main, config = TRAINERS[exhibit.stage]
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "run")
        cfg = config(**{**start(exhibit.stage, stages), **OPTIONS[exhibit.stage],
                        **exhibit.options, "seed": seed, "out": out})
        with substituted(replacements), contextlib.redirect_stdout(io.StringIO()):
            main(cfg)
        rows = read_metrics(out)
        if exhibit.stage == "sft":
            rows[-1]["sampled_end_rate"] = sampled_end_rate(out, seed)
    return rows


def sampled_end_rate(folder: str, seed: int) -> float:
    """Share of 100 responses of an SFT model that end by themselves within 32 tokens."""
    policy, tokenizer = GPT2.from_pretrained(folder), Tokenizer.load(folder)
    rows = [encode_prompt(tokenizer, format_prompt(record["prompt"]))
            for record in prompts(100, seed)]
    made = generate(policy, rows, 32, end_token=tokenizer.end_token,
                    generator=random_stream(seed, 9))
    return made.ended.float().mean().item()


def figures(stage: str, rows: list[dict]) -> dict[str, float]:
    """Mean of the last quarter of the values of each figure."""
    found = {}
    for name in (*FIGURES[stage], "sampled_end_rate"):
        values = [row[name] for row in rows if name in row]
        if values:
            last = values[-max(1, len(values) // 4):]
            found[name] = sum(last) / len(last)
    return found


class Measurements:
    """Effects of exhibits over several seeds; the right runs are made once for all of them."""

    def __init__(self, stages: str, seeds: int):
        self.stages, self.seeds = stages, range(seeds)
        self.right: dict[tuple, list[dict]] = {}

    def right_rows(self, exhibit: Exhibit, seed: int) -> list[dict]:
        """The rows of the run without any mistake."""
        key = (exhibit.stage, str(exhibit.options), seed)
        if key not in self.right:
            self.right[key] = run_once(exhibit, seed, self.stages, [])
        return self.right[key]

    def measure(self, exhibit: Exhibit) -> tuple[dict, list[list[dict]]]:
        """The effect of one exhibit, and the rows of the right and the wrong run of seed 0.

        `stopped` is the message with which our checks end the run; the figures are then those of
        the run with the checks taken away too.
        """
        effect: dict = {"stage": exhibit.stage, "stopped": "", "right": {}, "wrong": {}}
        shown: list[list[dict]] = []
        for seed in self.seeds:
            replacements = exhibit.replacements()
            try:
                wrong = run_once(exhibit, seed, self.stages, replacements)
            except ValueError as error:
                effect["stopped"] = str(error)
                wrong = run_once(exhibit, seed, self.stages, [*replacements, *UNCHECKED])
            right = self.right_rows(exhibit, seed)
            shown = shown or [right, wrong]
            for side, rows in (("right", right), ("wrong", wrong)):
                for name, value in figures(exhibit.stage, rows).items():
                    effect[side].setdefault(name, []).append(value)
        return effect, shown


def differs(right: list[float], wrong: list[float]) -> bool:
    """Whether a figure shows the mistake: all wrong values lie beyond all right ones, and twice as
    far from them on average as the right ones lie from one another.

    Of figures that do not differ (three normal values on each side) it says so of one in 35.
    Example: right 1.0, 1.2 and wrong 1.5, 1.6 differ; wrong 1.1, 1.9 do not.
    """
    apart = min(wrong) > max(right) or max(wrong) < min(right)
    distance = abs(sum(wrong) / len(wrong) - sum(right) / len(right))
    return apart and distance > 2 * (max(right) - min(right))


def effect_table(effect: dict) -> str:
    """Right and wrong figures side by side, with a mark at those that show the mistake."""
    lines = []
    if effect["stopped"]:
        lines += ["Our checks stop this run:", f"  {effect['stopped']}",
                  "What follows is a run with the checks taken away too.", ""]
    seeds = len(next(iter(effect["right"].values())))
    lines.append(f"{'mean of the end of ' + str(seeds) + ' runs':32}{'right':>12}{'wrong':>12}")
    for name, right in effect["right"].items():
        wrong = effect["wrong"][name]
        mark = "   <-- by more than seeds do" if differs(right, wrong) else ""
        lines.append(f"{name:32}{sum(right) / len(right):12.4g}{sum(wrong) / len(wrong):12.4g}"
                     f"{mark}")
    if not any(differs(right, effect["wrong"][name]) for name, right in effect["right"].items()):
        lines += ["", "No figure differs by more than seeds do: only a test shows this mistake."]
    return "\n".join(lines)
