"""How often does the diagnosis recognise an illness, and how often does it accuse a healthy run?

    python -m minirlhf.experiments.diagnose_rates --seeds 5

In:  the finished stages of `python -m minirlhf`, for the runs to start from. Out: one folder per
     run with its metrics, and `diagnose.json` with both rates.

Every illness is produced by its cause in the runs of `ill_runs.py`, once per seed, and the healthy
runs differ in their settings. A run whose folder is there already is not made again. The thresholds
of the illnesses were chosen on the seeds 100 and 101. Seed 0 then led to changes too (three causes
work longer or alone, entropy and kl_old have other limits), so it flatters a little.
Lecture: lectures/06-what-goes-wrong.md, "Reading the curves".
"""

import os
import shutil
import tempfile
from dataclasses import dataclass

from minirlhf.diagnose.report import write_report
from minirlhf.engine.fields import Count, Natural, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.experiments.ill_runs import HEALTHY, SFT_WITHOUT_END, SICK, Case, replacements
from minirlhf.files.disk import write_json
from minirlhf.museum.short_runs import check_stages, short_run

KEPT = ("metrics.csv", "metrics.csv.part", "samples.txt", "samples.txt.part")


@dataclass(frozen=True)
class RatesConfig:
    """Options of `python -m minirlhf.experiments.diagnose_rates`."""
    seeds: Count = 3                    # runs of every case
    first_seed: Natural = 0             # of the first run; thresholds were chosen on 100 and 101
    stages: str = "checkpoints"         # folder with tiny, sft, reward_model, reward_model_2
    out: str = "checkpoints/diagnose"   # folder of the runs and of diagnose.json

    def __post_init__(self):
        check_fields(self)


def make_run(case: Case, seed: int, stages: str, out: str) -> str:
    """Run a case, unless its metrics are there already; returns the folder with its metrics.

    Only metrics and samples are kept: the case "kl_coef 0.1" with seed 2 in "kl_coef_0.1-2". A run
    that stops itself (numbers that are not finite) leaves the metrics that it had written.
    """
    name = "".join(c if c.isalnum() or c in "._" else "_" for c in case.name)
    folder, stopped = os.path.join(out, f"{name}-{seed}"), ""
    if os.path.isdir(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        options, run = {**case.options, "seed": seed}, os.path.join(scratch, "run")
        if options.get("model") == SFT_WITHOUT_END:
            options["model"] = os.path.join(scratch, SFT_WITHOUT_END)
            short_run("sft", stages, options["model"],
                      {"examples": 800, "held_out": 50, "seed": seed},
                      replacements("end token forgotten"))
        try:
            short_run(case.stage, stages, run, options, replacements(case.mistake))
        except FloatingPointError as error:
            stopped = str(error)
        kept = [name for name in KEPT if os.path.exists(os.path.join(run, name))]
        check(len(kept) > 0, f"{case.name}, seed {seed}: {stopped}")
        os.makedirs(folder)
        for name in kept:
            shutil.copy(os.path.join(run, name), folder)
    return folder


def count(results: dict[str, list[list[str]]]) -> dict:
    """Both rates, from the illnesses that were found in each run of each case.

    `recognised` has [recognised, runs] for each illness; `others` what else was found in runs of a
    case; `accused` [runs with any finding, runs] for each healthy case.
    """
    recognised: dict[str, list[int]] = {}
    others: dict[str, dict[str, int]] = {}
    for case in SICK:
        for names in results[case.name]:
            for illness in case.illnesses:
                counts = recognised.setdefault(illness, [0, 0])
                counts[0] += illness in names
                counts[1] += 1
            for illness in set(names) - set(case.illnesses):
                more = others.setdefault(case.name, {})
                more[illness] = more.get(illness, 0) + 1
    accused = {case.name: [sum(1 for names in results[case.name] if names),
                           len(results[case.name])] for case in HEALTHY}
    return {"recognised": recognised, "accused": accused, "others": others,
            "recognised_in_all": totals(recognised), "accused_in_all": totals(accused)}


def totals(counts: dict[str, list[int]]) -> list[int]:
    """Example: totals({"a": [1, 2], "b": [3, 3]}) == [4, 5]."""
    return [sum(pair[i] for pair in counts.values()) for i in (0, 1)]


def table(report: dict) -> str:
    """The report as Markdown tables."""
    lines = []
    for kind, key in (("illness", "recognised"), ("healthy run", "accused")):
        rows = [f"| {name} | {hits} of {runs} |" for name, (hits, runs) in report[key].items()]
        lines += [f"| {kind} | {key} |", "|---|---|", *rows, ""]
    (hits, sick), (wrong, healthy) = report["recognised_in_all"], report["accused_in_all"]
    lines += [f"{hits} of {sick} illnesses recognised, {wrong} of {healthy} healthy runs accused.",
              "", "What else was found in runs that were made ill:"]
    for name, more in report["others"].items():
        lines.append(f"- {name}: " + ", ".join(f"{illness} ({n})" for illness, n in more.items()))
    return "\n".join(lines)


def main(cfg: RatesConfig) -> dict:
    """Make the runs, examine them, save and print both rates; returns what diagnose.json holds."""
    check_stages(cfg.stages, "tiny", "sft", "reward_model", "reward_model_2")
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    results: dict[str, list[list[str]]] = {case.name: [] for case in SICK + HEALTHY}
    for seed in seeds:
        for case in SICK + HEALTHY:
            _, findings = write_report(make_run(case, seed, cfg.stages, cfg.out))
            names = [finding.illness for finding in findings]
            print(f"seed {seed}  {case.name}: {', '.join(names) or 'healthy'}", flush=True)
            results[case.name].append(names)
    report = {"seeds": list(seeds), **count(results), "findings": results}
    path = os.path.join(cfg.out, "diagnose.json")
    write_json(path, report)
    print(table(report) + f"\n\nwrote {path}")
    return report


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(RatesConfig))
