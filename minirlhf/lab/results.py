"""The result of an experiment: a table for the terminal and a small file that lectures quote."""

import json
import math
import os
import re
from dataclasses import asdict

from minirlhf.benchmark.machine import describe_machine
from minirlhf.files.disk import read_json, write_atomically
from minirlhf.lab import EXPERIMENTS
from minirlhf.lab.experiment import (
    Finding,
    Rows,
    load_experiment,
    mean_and_interval,
    values_of,
    verdict,
)
from minirlhf.lab.measure import UNITS

STORED = "lectures/results/lab"     # results and pictures that the lectures show


def rounded(value: float) -> float | None:
    """Five significant digits; None for what is not finite, which JSON does not have."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def summary(values: list[float]) -> dict:
    """One figure over seeds: {"mean", "low", "high"}, rounded."""
    return dict(zip(("mean", "low", "high"), map(rounded, mean_and_interval(values))))


def summarise_series(seeds: list[list[float]]) -> dict:
    """A series over seeds: its means, and the ends of the intervals, step by step."""
    steps = [summary(list(values)) for values in zip(*seeds)]
    return {end: [step[end] for step in steps] for end in ("mean", "low", "high")}


def summarise_arm(rows: list[dict]) -> dict:
    """What the seeds of one arm say: each figure with its interval and values, each series."""
    arm = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if isinstance(first, list):
            arm[name] = summarise_series(values)
        else:
            arm[name] = {**summary(values), "values": [rounded(value) for value in values]}
    return arm


def make_result(name: str, rows: Rows, core_seconds: float, quick: bool) -> dict:
    """What NAME.json holds."""
    module = load_experiment(name)
    about, findings = module.ABOUT, module.findings(rows)
    machine = describe_machine("cpu")
    seeds = len(next(iter(rows.values())))
    return {"experiment": about.name, "claim": about.claim, "source": about.source,
            "rule": about.rule, "verdict": verdict(findings),
            "findings": [finding_as_json(finding) for finding in findings],
            "figures": list(about.figures), "units": {**UNITS, **about.units},
            "arms": {arm: summarise_arm(of_arm) for arm, of_arm in rows.items()},
            "seeds": seeds, "quick": quick, "core_seconds": round(core_seconds),
            "cpu": machine["cpu"], "torch": machine["torch"],
            "command": f"python -m minirlhf.lab {name} --seeds {seeds}" + " --quick" * quick}


def finding_as_json(finding: Finding) -> dict:
    """A finding with numbers that JSON has."""
    values = asdict(finding)
    return {key: rounded(value) if isinstance(value, float) else value
            for key, value in values.items()}


def write_result(path: str, result: dict) -> None:
    """Write a result as JSON with lists of numbers on one line each."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # a new line within a JSON text is written \n, so this touches lists only
    text = re.sub(r"\[\n\s+([^\[\]{}\"]*?)\n\s+\]",
                  lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text)
    write_atomically(path, text.encode("utf-8"))


# ---- text ----------------------------------------------------------------------------------------

def cell(values: list[float]) -> str:
    """A figure in the table: mean and interval over seeds; of one seed the value."""
    mean, low, high = mean_and_interval(values)
    if len(values) == 1:
        return f"{mean + 0.0:.2f}"
    return f"{mean + 0.0:.2f} [{low + 0.0:.2f}, {high + 0.0:.2f}]"


def table(rows: Rows, figures: tuple[str, ...]) -> str:
    """A line for each arm, a column for each figure that it has."""
    lines = [["", *figures]]
    for arm, of_arm in rows.items():
        lines.append([arm, *(cell(values_of(rows, arm, figure)) if figure in of_arm[0] else ""
                             for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]),
                                *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))
                                ]).rstrip() for line in lines)


def describe_result(name: str, rows: Rows) -> str:
    """Claim, table, findings and verdict, for the terminal."""
    module = load_experiment(name)
    about, findings = module.ABOUT, module.findings(rows)
    seeds = len(next(iter(rows.values())))
    return "\n".join([
        f"=== {about.name}: {about.claim}", f"    said by: {about.source}",
        f"    rule, stated beforehand: {about.rule}", "", table(rows, about.figures), "",
        *(f"  {finding}" for finding in findings),
        f"  verdict over {seeds} seed{'s' * (seeds > 1)}: {verdict(findings).upper()}"])


def list_experiments() -> str:
    """All experiments: the claim, who makes it, minutes on two cores and the stored verdict."""
    lines = ["Experiments: python -m minirlhf.lab NAME... or all", ""]
    for name in EXPERIMENTS:
        about, path = load_experiment(name).ABOUT, os.path.join(STORED, f"{name}.json")
        note = "not measured yet"
        if os.path.exists(path):
            stored = read_json(path)
            note = (f"{stored['core_seconds'] / 120:.0f} min on two cores; here: "
                    f"{stored['verdict']} ({stored['seeds']} seeds)")
        lines += [f"  {name}", f"      {about.claim}", f"      said by: {about.source}",
                  f"      {note}"]
    return "\n".join(lines)
