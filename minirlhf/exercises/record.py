"""Records the runs of "find the bug": short runs of PPO, each with one mistake of the museum.

    python -m minirlhf.exercises.record

In:  the finished stages of `python -m minirlhf`. Out: bugs.json beside this file: curves and the
     last token table of a healthy run and of one for each bug.
"""

import os
import tempfile
from dataclasses import dataclass

import torch

from minirlhf.engine.fields import Seed, check_fields
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.options import one_sentence, parse_config
from minirlhf.exercises.bugs import BUGS, CURVES, PATH
from minirlhf.files.disk import write_json
from minirlhf.museum.effect import OPTIONS
from minirlhf.museum.exhibits import find
from minirlhf.museum.short_runs import UNCHECKED, check_stages, short_run


@dataclass(frozen=True)
class RecordConfig:
    """Options of `python -m minirlhf.exercises.record`."""
    stages: str = "checkpoints"         # folder with sft and reward_model
    out: str = PATH                     # file to write
    seed: Seed = 1                      # of the runs

    def __post_init__(self):
        check_fields(self)


def record(cfg: RecordConfig, replacements: list[tuple]) -> dict:
    """Curves and the last token table of one run, with our checks taken away."""
    torch.manual_seed(cfg.seed)                          # dropout has no stream of its own
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "run")
        short_run("ppo", cfg.stages, out, {**OPTIONS["ppo"], "seed": cfg.seed},
                  [*replacements, *UNCHECKED])
        rows = read_metrics(out)
        with open(os.path.join(out, "samples.txt"), encoding="utf-8") as file:
            table = file.read().rstrip().rpartition("iteration ")[2].partition("\n")[2]
    return {"curves": {name: [round(row[name], 4) for row in rows] for name in CURVES},
            "table": table}


def main(cfg: RecordConfig) -> dict:
    """Run, save, and return what was saved."""
    check_stages(cfg.stages, "sft", "reward_model")
    runs = {"healthy": record(cfg, [])}
    for name, *_ in BUGS:
        print(name, flush=True)
        runs[name] = record(cfg, find(name).replacements())
    write_json(cfg.out, runs)
    print(f"wrote {cfg.out}")
    return runs


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(RecordConfig))
