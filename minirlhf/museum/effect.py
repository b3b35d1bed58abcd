"""Runs a trainer with a mistake switched on, beside the same run without, and compares figures."""

import os
import tempfile

from minirlhf.data import encode_prompt, format_prompt
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.options import check
from minirlhf.engine.training import random_stream
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2
from minirlhf.museum.exhibits import Exhibit
from minirlhf.museum.short_runs import UNCHECKED, short_run
from minirlhf.tokenizer import Tokenizer
from minirlhf.world import prompts

# small enough for a few seconds per run, large enough for the curves to have their shape
OPTIONS = {"sft": {"examples": 500, "held_out": 100, "eval_every": 10},
           "reward_model": {"comparisons": 900, "held_out": 300, "eval_every": 10},
           "ppo": {"iterations": 10, "batch_size": 24, "minibatch_size": 12},
           "groups": {"iterations": 10, "batch_size": 24, "minibatch_size": 12}}

FIGURES = {"sft": ("loss", "held_out_loss", "grad_norm"),
           "reward_model": ("loss", "held_out_loss", "held_out_accuracy", "grad_norm"),
           "ppo": ("score", "gold", "kl_ref", "kl_old", "entropy", "clipfrac", "ratio_first",
                   "vf_loss", "explained_var", "response_len", "end_rate", "grad_norm"),
           "groups": ("score", "gold", "kl_ref", "kl_old", "entropy", "clipfrac", "equal_groups",
                      "advantage_std", "response_len", "end_rate", "grad_norm")}


def run_once(exhibit: Exhibit, seed: int, stages: str, replacements: list[tuple]) -> list[dict]:
    """The rows of metrics of one run; the last row of an SFT run also has `sampled_end_rate`."""
    options = {**OPTIONS[exhibit.stage], **exhibit.options, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "run")
        short_run(exhibit.stage, stages, out, options, replacements)
        rows = read_metrics(out)
        if exhibit.stage == "sft":
            rows[-1]["sampled_end_rate"] = sampled_end_rate(out, seed)
    return rows


def sampled_end_rate(folder: str, seed: int) -> float:
    """Share of 100 responses of an SFT model that end by themselves within 32 tokens."""
    policy, tokenizer = load_network(GPT2, folder), Tokenizer.load(folder)
    rows = [encode_prompt(tokenizer, format_prompt(record["prompt"]))
            for record in prompts(100, seed)]
    made = generate(policy, rows, 32, end_token=tokenizer.end_token,
                    generator=random_stream(seed, 9))
    return made.ended.float().mean().item()


def figures(stage: str, rows: list[dict]) -> dict[str, float]:
    """Mean of the last quarter of the values of each figure."""
    means = {}
    for name in (*FIGURES[stage], "sampled_end_rate"):
        values = [row[name] for row in rows if name in row]
        if values:
            last = values[-max(1, len(values) // 4):]
            means[name] = sum(last) / len(last)
    return means


def measure(exhibit: Exhibit, seeds: int, stages: str,
            right_runs: dict) -> tuple[dict, list[list[dict]]]:
    """The effect of one exhibit, and the rows of the right and the wrong run of seed 0.

    `stopped` is the message with which our checks end the run; the figures are then those of the
    run with the checks taken away too. `right_runs` keeps the runs without a mistake: several
    exhibits are compared with the same ones.
    """
    effect: dict = {"stage": exhibit.stage, "stopped": "", "right": {}, "wrong": {}}
    shown: list[list[dict]] = []
    for seed in range(seeds):
        try:
            wrong = run_once(exhibit, seed, stages, exhibit.replacements())
        except ValueError as error:
            effect["stopped"] = str(error)
            wrong = run_once(exhibit, seed, stages, [*exhibit.replacements(), *UNCHECKED])
        key = (exhibit.stage, str(exhibit.options), seed)
        if key not in right_runs:
            right_runs[key] = run_once(exhibit, seed, stages, [])
        shown = shown or [right_runs[key], wrong]
        for side, rows in (("right", right_runs[key]), ("wrong", wrong)):
            for name, value in figures(exhibit.stage, rows).items():
                effect[side].setdefault(name, []).append(value)
    return effect, shown


def read_effects(path: str) -> dict[str, dict]:
    """The effects in a file that `measure` filled: name of the exhibit -> effect.

    Raises: ValueError naming the file, and the exhibit, for anything else.
    """
    effects = read_json(path).get("effects")
    check(isinstance(effects, dict), f"{path}: expected effects, as python -m minirlhf.museum "
          "--run writes them into museum.json; found none")
    for name, effect in effects.items():
        check(is_effect(effect), f"{path}: the effect of {name[:60]!r} is not one that python -m "
              "minirlhf.museum --run writes: expected stopped, and under right and wrong the same "
              "figures with as many numbers each")
    return effects


def is_effect(effect) -> bool:
    """Whether a value from a file has the form of an effect."""
    if not isinstance(effect, dict) or not isinstance(effect.get("stopped"), str):
        return False
    right, wrong = effect.get("right"), effect.get("wrong")
    if not isinstance(right, dict) or not isinstance(wrong, dict) or not right:
        return False
    figures = [*right.values(), *wrong.values()]
    lists = all(isinstance(values, list) and values for values in figures)
    return (set(right) == set(wrong) and lists
            and len({len(values) for values in figures}) == 1
            and all(type(value) in (int, float) for values in figures for value in values))


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
    seeds, mark = len(next(iter(effect["right"].values()))), "   <-- by more than seeds do"
    lines.append(f"{'mean of the end of ' + str(seeds) + ' runs':32}{'right':>12}{'wrong':>12}")
    for name, right in effect["right"].items():
        wrong = effect["wrong"][name]
        lines.append(f"{name:32}{sum(right) / seeds:12.4g}{sum(wrong) / seeds:12.4g}"
                     f"{mark if differs(right, wrong) else ''}")
    if not any(line.endswith(mark) for line in lines):
        lines += ["", "No figure differs by more than seeds do: only a test shows this mistake."]
    return "\n".join(lines)
