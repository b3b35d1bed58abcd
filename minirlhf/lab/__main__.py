"""The laboratory: claims about RLHF, each measured with seeds and a control in the text world.

    python -m minirlhf.lab                         # the experiments: claim, who makes it, minutes
    python -m minirlhf.lab beta --seeds 4          # run one, or several, or all
    python -m minirlhf.lab all --resume            # after a stop: what is finished is not run again

In:  the base model. Out: a table with intervals over seeds, a verdict by the rule that was stated
     beforehand, and per experiment in --out a folder with `result.json` and `picture.png`; with
     --store also lectures/results/lab/NAME.json and .png.

SFT models, comparisons and reward models are made once per seed and used by all experiments. Each
arm at each seed is a task of its own; with two workers two of them run at a time, with one thread
each. A name that is none of ours is taken as a Python module with an experiment of yours.
Lecture: lectures/06-what-goes-wrong.md, "What goes wrong".
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from minirlhf.engine.fields import Count, check_fields
from minirlhf.engine.options import (
    Stopped,
    check,
    join_first_arguments,
    one_sentence,
    parse_config,
)
from minirlhf.engine.output import RUN_FILE, check_output, result_folder
from minirlhf.engine.state import fingerprint
from minirlhf.evaluate import load_policy
from minirlhf.files.disk import read_json, write_json
from minirlhf.lab import EXPERIMENTS, shared
from minirlhf.lab.experiment import FEWEST_SEEDS, Rows, load_experiment
from minirlhf.lab.results import (
    STORED,
    describe_result,
    list_experiments,
    make_result,
    write_result,
)
from minirlhf.lab.shared import QUICK, Sizes, Task
from minirlhf.lab.sources import changed, made_by
from minirlhf.lab.workers import read_result, run_tasks


@dataclass(frozen=True)
class LabConfig:
    """Options of `python -m minirlhf.lab`; the words before the first -- are the names."""
    names: str = ""                     # experiments joined by commas, or all; "": list them
    seeds: Count = 4                    # seeds 0, 1, 2, ...; with fewer than 4 no verdict
    workers: Count = 2                  # tasks at a time, at most one per core
    quick: bool = False                 # one seed, tiny sizes: to see that everything runs
    resume: bool = False                # go on: tasks that are finished are not run again
    store: bool = False                 # also write results and pictures for the lectures
    base: str = "checkpoints/tiny"      # base model of all stages
    out: str = "checkpoints/lab"        # folder to write

    def __post_init__(self):
        check_fields(self)
        check(not self.store or (self.seeds >= FEWEST_SEEDS and not self.quick),
              f"--store needs at least {FEWEST_SEEDS} seeds, and not --quick")


# ---- the folder ----------------------------------------------------------------------------------

def check_lab_folder(cfg: LabConfig) -> None:
    """Refuse an --out of somebody else, or one whose shared stages would now be others."""
    check_output(cfg.out, "Lab", cfg.base)
    network, tokenizer = load_policy(cfg.base)
    options = {"base": fingerprint(network, sorted(tokenizer.vocabulary().items())),
               "quick": cfg.quick, "sizes": asdict(QUICK if cfg.quick else Sizes())}
    path, makers = os.path.join(cfg.out, RUN_FILE), made_by(shared.__file__)
    if os.path.exists(path):
        saved = read_json(path)
        check(saved.get("options") == options, f"{cfg.out} holds stages of another base model, or "
              "of another size (--quick); name another folder by --out")
        names = changed(saved.get("made_by"), makers)
        check(not names, f"{cfg.out} holds stages that all experiments start from, and since they "
              f"were made {names} changed; put it back, or name another folder by --out")
    write_json(path, {"command": "Lab", "options": options, "made_by": makers})


def begin_experiment(cfg: LabConfig, name: str) -> None:
    """Refuse what --resume asks for, or what would be lost without it; note that it has begun."""
    folder = os.path.join(cfg.out, name)
    path, makers = os.path.join(folder, RUN_FILE), made_by(load_experiment(name).__file__)
    saved = {"made_by": makers, "finished": True}
    if os.path.lexists(folder):
        check(os.path.exists(path), f"{folder} is no experiment's; move it away")
        saved = read_json(path)
    if cfg.resume:
        names = changed(saved.get("made_by"), makers)
        check(not names, f"--resume: since {folder} was begun {names} changed, and figures from "
              f"before and after must not be mixed; put it back, or delete {folder}")
    else:
        check(saved.get("finished") is True, f"{folder} holds an experiment that is not finished; "
              f"go on with it by --resume, or delete {folder}")
        shutil.rmtree(folder, ignore_errors=True)
    write_json(path, {"made_by": makers, "finished": False})


# ---- running -------------------------------------------------------------------------------------

def make_tasks(cfg: LabConfig, name: str) -> list[Task]:
    """All tasks of an experiment: seeds take turns, so that two workers are rarely at one stage."""
    seeds = 1 if cfg.quick else cfg.seeds
    tasks = [Task(name, arm, seed, cfg.out, cfg.base, cfg.quick)
             for arm in load_experiment(name).ARMS for seed in range(seeds)]
    check(len({task.file_name for task in tasks}) == len(tasks), f"{name}: two arms whose names "
          "differ in signs only would share their files")
    return tasks


def collect(tasks: list[Task]) -> tuple[Rows, float]:
    """The figures of finished tasks, arm by arm in the order of seeds, and their seconds."""
    rows, seconds = {}, 0.0
    for task in tasks:
        result = read_result(task)
        rows.setdefault(task.arm, []).append(result["figures"])
        seconds += result["seconds"]
    return rows, seconds


def conclude(cfg: LabConfig, name: str, tasks: list[Task]) -> dict:
    """Print, draw and keep what a finished experiment says; returns the result."""
    rows, seconds = collect(tasks)
    print(f"\n{describe_result(name, rows)}", flush=True)
    result, folder = make_result(name, rows, seconds, cfg.quick), os.path.join(cfg.out, name)
    places = [(os.path.join(folder, "result.json"), os.path.join(folder, "picture.png"))]
    if cfg.store:
        places.append((os.path.join(STORED, f"{name}.json"), os.path.join(STORED, f"{name}.png")))
    for result_path, picture_path in places:
        write_result(result_path, result)
        load_experiment(name).picture(rows, picture_path)
        print(f"  wrote {result_path} and {picture_path}")
    write_json(os.path.join(folder, RUN_FILE),
               {**read_json(os.path.join(folder, RUN_FILE)), "finished": True})
    return result


class Progress:
    """Prints a line for each finished task, and the result of an experiment after its last one."""

    def __init__(self, cfg: LabConfig, tasks: dict[str, list[Task]], total: int):
        self.cfg, self.tasks, self.total, self.results = cfg, tasks, total, {}

    def __call__(self, task: Task, result: dict, done: int, seconds: float) -> None:
        names = [name for name in load_experiment(task.experiment).ABOUT.figures
                 if name in result["figures"]][:3]
        figures = ", ".join(f"{name} {result['figures'][name]:.2f}" for name in names)
        left = seconds / done * (self.total - done) / 60
        print(f"  {done} of {self.total}: {task}: {figures} ({result['seconds']:.0f} s); "
              f"about {left:.0f} min left", flush=True)
        self.conclude_finished()

    def conclude_finished(self) -> None:
        """Conclude each experiment all of whose tasks are finished, once."""
        for name, tasks in self.tasks.items():
            if name not in self.results and all(read_result(task) for task in tasks):
                self.results[name] = conclude(self.cfg, name, tasks)


def run_experiments(cfg: LabConfig, names: Iterable[str]) -> dict[str, dict]:
    """Run experiments; returns their results by name."""
    check_lab_folder(cfg)
    for name in names:
        begin_experiment(cfg, name)
    tasks = {name: make_tasks(cfg, name) for name in names}
    left = [task for name in names for task in tasks[name] if read_result(task) is None]
    workers = min(cfg.workers, os.cpu_count() or 1, max(1, len(left)))
    print(f"{len(left)} tasks, {workers} at a time, in {cfg.out}", flush=True)
    if cfg.quick:
        print("--quick: one seed and tiny sizes. Everything runs, but nothing is shown by it")
    progress = Progress(cfg, tasks, len(left))
    progress.conclude_finished()
    try:
        failed = run_tasks(left, workers, progress)
    except KeyboardInterrupt as stop:
        raise Stopped("stopped; what is finished is kept: go on with the same command and "
                      "--resume", getattr(stop, "signal", 2)) from None
    for task, sentence in failed.items():
        raise ValueError(f"{task}: {sentence}")
    return progress.results


def main(cfg: LabConfig) -> dict[str, dict]:
    """List the experiments, or run some; returns the results of those that were run."""
    if not cfg.names:
        print(list_experiments())
        return {}
    names = EXPERIMENTS if cfg.names == "all" else list(dict.fromkeys(cfg.names.split(",")))
    for name in names:
        load_experiment(name)
    with result_folder(cfg.out):
        return run_experiments(cfg, names)


if __name__ == "__main__":
    join_first_arguments("names")
    with one_sentence():
        main(parse_config(LabConfig))
