"""Several whole pipelines with new seeds, and what varies between them.

    python -m minirlhf.experiments.seeds --seeds 5 --jobs 2

Each seed gives new demonstrations, comparisons, reward models and PPO runs; only the base model is
the same. Writes `seeds.json` and prints the README's table. A seed whose report is already there is
not run again. `--jobs 2` runs two pipelines at a time with one thread each, which is faster on two
cores than one after the other with two threads; the seconds it reports are then of such runs.

Lecture: lectures/03-ppo.md, "Did it get better?".
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from minirlhf.common import check, check_range, run
from minirlhf.weights import read_json, write_json


@dataclass(frozen=True)
class SeedsConfig:
    """Options of `python -m minirlhf.experiments.seeds`."""
    seeds: int = 5                      # pipelines, with seeds 0, 1, 2, ...
    jobs: int = 1                       # pipelines at a time; each gets its share of the threads
    base: str = "checkpoints/tiny"      # base model of all of them
    out: str = "checkpoints/seeds"      # one folder a seed, and seeds.json

    def __post_init__(self):
        check_range(self, "seeds", 1, 1000)
        check_range(self, "jobs", 1, 64)


def start(cfg: SeedsConfig, seed: int) -> subprocess.Popen:
    """Start the pipeline of one seed; its output goes to log.txt in its folder."""
    folder = os.path.join(cfg.out, str(seed))
    os.makedirs(folder, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // cfg.jobs))
    words = [sys.executable, "-m", "minirlhf", "--seed", str(seed), "--base", cfg.base,
             "--out", folder]
    with open(os.path.join(folder, "log.txt"), "w", encoding="utf-8") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": threads})


def run_all(cfg: SeedsConfig) -> list[dict]:
    """Run the pipelines that have no report yet, `jobs` at a time; the reports by seed."""
    paths = [os.path.join(cfg.out, str(seed), "report.json") for seed in range(cfg.seeds)]
    waiting = [seed for seed in range(cfg.seeds) if not os.path.exists(paths[seed])]
    running: dict[int, subprocess.Popen] = {}
    while waiting or running:
        while waiting and len(running) < cfg.jobs:
            seed = waiting.pop(0)
            running[seed] = start(cfg, seed)
            print(f"seed {seed}: started", flush=True)
        time.sleep(1)
        for seed, process in list(running.items()):
            if process.poll() is not None:
                log = os.path.join(cfg.out, str(seed), "log.txt")
                check(process.returncode == 0, f"the pipeline of seed {seed} failed; see {log}")
                report = read_json(paths[seed])
                print(f"seed {seed}: win rate {report['win_rate']['mean']:.3f}, "
                      f"{report['seconds']['total']:.0f} s", flush=True)
                running.pop(seed)
    return [read_json(path) for path in paths]


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
    reports = run_all(cfg)
    write_json(os.path.join(cfg.out, "seeds.json"), {"reports": reports})
    print(summarise(reports))
    return reports


if __name__ == "__main__":
    run(main, SeedsConfig)
