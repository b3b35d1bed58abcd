"""Several whole pipelines with new seeds, and what varies between them.

    python -m minirlhf.experiments.seeds --seeds 5 --jobs 2

Each seed gives new demonstrations, comparisons, reward models and PPO runs; only the base model is
the same. Writes `seeds.json` and prints a table. A seed whose report is already there is not run
again, if it is of the same base (by its weights and its tokenizer) and the same plan; a report of
another one is refused. `--jobs 2` runs two pipelines at a time with one thread each, which is
faster on two cores than one after the other with two threads; the seconds it reports are then of
such runs.
Lecture: lectures/07-does-it-work.md, "Did it get better?".
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from minirlhf.__main__ import Plan
from minirlhf.engine.fields import Count, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.state import fingerprint
from minirlhf.evaluate import load_policy
from minirlhf.files.disk import open_own, read_json, write_json

BASE_FILE = "base.json"             # in a seed's folder: the fingerprint of its base model


@dataclass(frozen=True)
class SeedsConfig:
    """Options of `python -m minirlhf.experiments.seeds`."""
    seeds: Count = 5                    # pipelines, with seeds 0, 1, 2, ...
    jobs: Count = 1                     # pipelines at a time; each gets its share of the threads
    base: str = "checkpoints/tiny"      # base model of all of them
    out: str = "checkpoints/seeds"      # one folder per seed, and seeds.json

    def __post_init__(self):
        check_fields(self)


def fingerprint_base(folder: str) -> str:
    """What tells one base model from another: its weights and its vocabulary, not its name."""
    network, tokenizer = load_policy(folder)
    return fingerprint(network, sorted(tokenizer.vocabulary().items()), tokenizer.merges)


def read_report(cfg: SeedsConfig, seed: int, base: str) -> dict | None:
    """The report of a seed that is there already, None without one. `base` is a fingerprint.

    Raises: ValueError naming the file that is of another base, plan or seed, or no report.
    """
    folder = os.path.join(cfg.out, str(seed))
    path, beside = os.path.join(folder, "report.json"), os.path.join(folder, BASE_FILE)
    away, there = f"name another folder by --out, or move {folder} away", os.path.lexists(path)
    if there or os.path.lexists(beside):
        of_base = read_json(beside).get("base") if os.path.lexists(beside) else None
        check(of_base == base, f"{folder} holds a pipeline of another base model than {cfg.base}, "
              f"or no {BASE_FILE} that says of which; {away}")
    if not there:
        return None
    report = read_json(path)
    for name, expected in (("plan", asdict(Plan())), ("seed", seed), ("quick", False)):
        check(report.get(name) == expected, f"{path}: {name} is {str(report.get(name))[:200]}, "
              f"expected {expected}; {away}")
    try:
        summarise([report])
        format(report["seconds"]["total"], ".0f")
        for name in ("reward_model_accuracy", "reward_model_calibration_error"):
            check(len(report[name]) == Plan.reward_models, name)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: expected the report of a pipeline, found other values; "
                         f"{away}") from None
    return report


def run_pipeline(cfg: SeedsConfig, seed: int, base: str) -> dict:
    """The report of one seed, whose pipeline is run if need be; its output goes to log.txt."""
    folder = os.path.join(cfg.out, str(seed))
    log, report = os.path.join(folder, "log.txt"), read_report(cfg, seed, base)
    if report is None:
        write_json(os.path.join(folder, BASE_FILE), {"base": base})
        print(f"seed {seed}: started", flush=True)
        threads = str(max(1, (os.cpu_count() or 1) // cfg.jobs))
        words = [sys.executable, "-m", "minirlhf", "--seed", str(seed), "--base", cfg.base,
                 "--out", folder]
        with open_own(log, "wb") as file:
            done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT,
                                  env={**os.environ, "OMP_NUM_THREADS": threads})
        check(done.returncode == 0, f"the pipeline of seed {seed} failed; see {log}")
        report = read_report(cfg, seed, base)
        check(report is not None, f"{folder}: the pipeline wrote no report; see {log}")
    print(f"seed {seed}: win rate {report['win_rate']['mean']:.3f}, "
          f"{report['seconds']['total']:.0f} s", flush=True)
    return report


def summarise(reports: list[dict]) -> str:
    """A Markdown table with a line for each seed, and the means."""
    head = ["seed", "win rate [95 %]", "control", "gold base / SFT / RLHF",
            "fully right base / SFT / RLHF", "of held-out entities SFT / RLHF", "kl_ref",
            "reward models: accuracy, calibration error"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for report in reports:
        win, gold, right = report["win_rate"], report["gold"], report["fully_right"]
        kinds = report["fully_right_by_kind"]
        models = zip(report["reward_model_accuracy"], report["reward_model_calibration_error"])
        cells = [str(report["seed"]), f"{win['mean']:.3f} [{win['low']:.3f}, {win['high']:.3f}]",
                 f"{report['control']['mean']:.3f}",
                 " / ".join(f"{gold[name]:.2f}" for name in ("base", "sft", "rlhf")),
                 " / ".join(f"{right[name]:.3f}" for name in ("base", "sft", "rlhf")),
                 " / ".join(f"{kinds[name]['entity']:.3f}" for name in ("sft", "rlhf")),
                 f"{report['kl_ref']['rlhf']:.2f}",
                 ", ".join(f"{accuracy:.3f} {error:.3f}" for accuracy, error in models)]
        lines.append("| " + " | ".join(cells) + " |")
    wins = [report["win_rate"]["mean"] for report in reports]
    gains = [report["fully_right"]["rlhf"] - report["fully_right"]["sft"] for report in reports]
    lines.append(f"\nWin rate over {len(reports)} pipelines: mean {sum(wins) / len(wins):.3f}, "
                 f"lowest {min(wins):.3f}, highest {max(wins):.3f}; fully right: RLHF "
                 f"{min(gains):+.3f} to {max(gains):+.3f} over SFT.")
    return "\n".join(lines)


def main(cfg: SeedsConfig) -> list[dict]:
    """Run, save and summarise; returns the reports."""
    base = fingerprint_base(cfg.base)
    for seed in range(cfg.seeds):
        read_report(cfg, seed, base)                     # refuse now, not after hours
    with ThreadPoolExecutor(cfg.jobs) as pool:           # a thread only waits for its pipeline
        reports = list(pool.map(run_pipeline, [cfg] * cfg.seeds, range(cfg.seeds),
                                [base] * cfg.seeds))
    write_json(os.path.join(cfg.out, "seeds.json"), {"reports": reports})
    print(summarise(reports))
    return reports


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(SeedsConfig))
