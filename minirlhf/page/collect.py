"""What the folders of runs hold, as plain values for the page.

    {"runs": names of the PPO runs, in the order of every list of runs below,
     "results": [{"name", "policies", "rows": [{"name", "cells", "meaning"}]}]   of pipelines,
     "panels": [{"title", "x", "y", "limits", "whole", "curves": [...]}]        as `plots` has them,
     "series": [{"name", "runs": [records of each PPO run]}]    responses by prompt: `ppo_tokens`,
     "samples": [{"name", "text"}]       of runs that kept no tokens: the end of their samples.txt,
     "answers", "notes"                  see answers.py}

Every value of a file is checked here, so that the page's script may rely on it.
"""

import math
import os

from minirlhf.engine.metrics import read_kept, whole_or_part
from minirlhf.engine.options import check
from minirlhf.evaluate import cell
from minirlhf.files.disk import open_regular, read_json
from minirlhf.plots import Panel, all_panels, by_stage, names_of
from minirlhf.ppo_tokens import COLUMNS, SUMMED

POINTS = 300                        # of a curve
CHARACTERS = 6000                   # of samples.txt

# the figures of report.json, and what a row of the table means
MEANINGS = {
    "gold": "mean score by the gold judge, a program that knows the right answers; nothing is "
            "trained on it",
    "score": "mean score by the reward models, which PPO climbs; SFT's is near 0 because scores "
             "are normalised there",
    "win_rate": "share of pairs of answers in which the gold judge prefers this policy's to "
                "SFT's, ties half, with its 95 % interval over prompts; in SFT's column against "
                "itself: 0.5 but for sampling noise",
    "answered": "share of answers that name any possible answer to the question",
    "fully_right": "share of answers that are right and complete",
    "kl_ref": "how far the policy went from SFT: nats per answer",
    "length": "tokens per answer",
    "distinct": "share of different texts among all answers: near 0 if all are the same",
    "end_rate": "share of answers that end by themselves and are not cut off",
}
POLICIES = {"base": "base", "sft": "SFT", "rlhf": "RLHF"}


# ---- which folders -------------------------------------------------------------------------------

def is_run(folder: str) -> bool:
    """Whether a folder holds the metrics of a stage."""
    return os.path.exists(whole_or_part(folder, "metrics.csv"))


def report_of(folder: str) -> dict:
    """What a pipeline's report.json holds; {} where there is none."""
    path = os.path.join(folder, "report.json")
    return read_json(path) if os.path.exists(path) and not is_run(folder) else {}


def stages_of(folder: str) -> list[str]:
    """The folder itself if it is a run's, or else the stages' folders in a pipeline's.

    Raises: FileNotFoundError if it is neither.
    """
    if is_run(folder):
        return [folder]
    plan = report_of(folder).get("plan")
    count = plan.get("reward_models") if isinstance(plan, dict) else None
    models = ["reward_model", *(f"reward_model_{number}" for number in range(2, 10))]
    models = models[:count] if type(count) is int else models       # others are of earlier runs
    folders = [os.path.join(folder, name) for name in ("sft", *models, "ppo")]
    found = [one for one in folders if is_run(one)]
    if not found:
        raise FileNotFoundError(f"{folder}: expected the folder of a run, with its metrics.csv, or "
                                "of a pipeline, with sft, reward_model, ppo in it; found neither")
    return found


# ---- the parts -----------------------------------------------------------------------------------

def is_number(value) -> bool:
    """Whether a value of a file is a finite number that a page can show."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e15


def result_of(folder: str) -> dict | None:
    """The result table of a pipeline's report.json; None where there is none."""
    path, report, rows = os.path.join(folder, "report.json"), report_of(folder), []
    if not report:
        return None
    for name, meaning in MEANINGS.items():
        values = report.get(name, {})
        if name == "win_rate":
            values = {"sft": report.get("control"), "rlhf": values}
        check(isinstance(values, dict), f"{path}: expected the policies' figures under {name}")
        cells = []
        for policy in POLICIES:
            value = values.get(policy)
            parts = [value.get(part) for part in ("mean", "low", "high")] if isinstance(
                value, dict) else [] if value is None else [value]
            check(all(map(is_number, parts)), f"{path}: expected numbers under {name}")
            cells.append(cell(value))
        if any(cells):
            rows.append({"name": name, "cells": cells, "meaning": meaning})
    return {"name": folder, "policies": list(POLICIES.values()), "rows": rows}


def thinned(values: list | tuple, most: int) -> list:
    """At most `most` of the values, evenly spread; first and last are among them.

    Example: thinned([0, 1, 2, 3, 4], 3) == [0, 2, 4].
    """
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def panel_values(panel: Panel) -> dict:
    """A panel as plain values, its curves thinned."""
    curves = [{"label": one.label, "colour": one.colour, "style": one.style,
               "marks": panel.y_label != "share of responses" or "score" not in panel.x_label,
               **{name: [float(f"{x:.5g}") for x in thinned(getattr(one, name), POINTS)]
                  for name in ("x", "y", "low", "high")}}
              for one in panel.curves if one.x]
    numbers = [x for one in curves for name in ("x", "y", "low", "high") for x in one[name]]
    check(all(map(is_number, numbers)), f"{panel.title}: expected finite numbers in metrics.csv")
    return {"title": panel.title, "x": panel.x_label, "y": panel.y_label,
            "limits": list(panel.y_limits), "whole": panel.x_label in ("step", "iteration"),
            "curves": curves}


def check_record(record: dict, place: str) -> None:
    """Check a response of kept.jsonl; the page's script relies on what is checked here.

    Raises: ValueError naming the file and what is wrong.
    """
    kinds = {"iteration": int, "asked_again": bool, "prompt": str, "ended": bool, "length": int,
             "tokens": list, "sums": dict}
    for name, kind in kinds.items():
        check(type(record.get(name)) is kind, f"{place}: expected {name} to be a {kind.__name__}")
    count = len(record["tokens"])
    words = [*record["tokens"]]
    numbers = [record.get("score"), record.get("kl_coef"), record["iteration"], record["length"],
               *(record["sums"].get(name) for name in SUMMED)]
    numbers += [] if record.get("gold") is None else [record["gold"]]
    for name in (*COLUMNS, "ratio"):
        column = record.get(name, [0.0] * count if name == "ratio" else None)
        check(isinstance(column, list) and len(column) == count,
              f"{place}: expected {count} numbers under {name}")
        numbers += column
    for name in ("policy", "ref_policy"):
        places = record.get(name)
        fits = isinstance(places, list) and len(places) == count and all(
            isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2
                                            for pair in pairs) for pairs in places)
        check(fits, f"{place}: expected {count} lists of [token, probability] under {name}")
        words += [pair[0] for pairs in places for pair in pairs]
        numbers += [pair[1] for pairs in places for pair in pairs]
    check(all(type(word) is str for word in words), f"{place}: expected tokens to be text")
    check(all(map(is_number, numbers)), f"{place}: expected numbers")


def responses_of(folder: str) -> list[dict]:
    """The responses that a PPO run kept; of other stages and versions none."""
    path = whole_or_part(folder, "kept.jsonl")
    records = [record for record in read_kept(folder) if "asked_again" in record]
    for i, record in enumerate(records, start=1):
        check_record(record, f"{path}, response {i}")
    return records


def make_series(runs: list[list[dict]], stops: int) -> list[dict]:
    """Responses by prompt, for the page's slider: of every run at most `stops` iterations."""
    kept = []
    for records in runs:
        iterations = sorted({record["iteration"] for record in records})
        few = set(thinned(iterations, stops))
        kept.append([record for record in records if record["iteration"] in few])
    prompts = [record["prompt"] for records in kept for record in records if record["asked_again"]]
    series = [{"name": prompt[:200],
               "runs": [[record for record in records if record["asked_again"]
                         and record["prompt"] == prompt] for records in kept]}
              for prompt in dict.fromkeys(prompts)]
    rollouts = [[record for record in records if not record["asked_again"]] for records in kept]
    if any(rollouts):
        series.append({"name": "first response of the rollout: another prompt each time",
                       "runs": rollouts})
    return series


def samples_of(folder: str) -> str:
    """The end of a run's samples.txt, from the beginning of a line."""
    path = whole_or_part(folder, "samples.txt")
    if not os.path.exists(path):
        return ""
    with open_regular(path) as file:
        file.seek(max(0, os.path.getsize(path) - 4 * CHARACTERS))
        text = file.read().decode("utf-8", "replace")
    return text if len(text) <= CHARACTERS else text[-CHARACTERS:].split("\n", 1)[-1]


# ---- all of it -----------------------------------------------------------------------------------

def collect(folders: list[str]) -> dict:
    """All that the page shows but for the answers; `responses` are those that PPO runs kept."""
    found = [stage for folder in folders for stage in stages_of(folder)]
    found = list({os.path.realpath(folder): folder for folder in found}.values())
    sft, reward_models, ppo = by_stage(found)
    responses = [responses_of(folder) for folder in ppo]
    quiet = [*sft, *(folder for folder, kept in zip(ppo, responses) if not kept)]
    samples = [{"name": f"{folder}/samples.txt", "text": samples_of(folder)} for folder in quiet]
    return {"runs": names_of(ppo), "ppo": ppo, "sft": sft, "responses": responses,
            "results": [result for result in map(result_of, folders) if result],
            "panels": [panel_values(panel) for panel in all_panels(sft, reward_models, ppo)],
            "samples": [sample for sample in samples if sample["text"]]}
