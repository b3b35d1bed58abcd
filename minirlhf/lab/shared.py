"""One task of the laboratory, and the stages that the tasks of a seed share.

SFT model, comparisons and reward models are made by the trainers themselves, once per seed, under a
lock, and then used by all experiments. The settings are those of `python -m minirlhf`.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from minirlhf import ppo, reward_model, sft
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.output import RUN_FILE
from minirlhf.files.disk import lock, open_own, read_json, write_atomically
from minirlhf.world.collect import comparisons as sample_comparisons


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""
    demonstrations: int = 3000
    comparisons: int = 8000             # the most that a reward model learns from
    iterations: int = 25                # of PPO
    prompts: int = 240                  # held-out prompts of an evaluation
    answers: int = 2                    # answers to each


QUICK = Sizes(demonstrations=400, comparisons=400, iterations=3, prompts=32, answers=2)


@dataclass(frozen=True)
class Task:
    """One arm of one experiment at one seed."""
    experiment: str
    arm: str
    seed: int
    out: str                            # folder of the laboratory
    base: str = "checkpoints/tiny"
    quick: bool = False

    @property
    def sizes(self) -> Sizes:
        """How much of everything."""
        return QUICK if self.quick else Sizes()

    def scaled(self, count: int) -> int:
        """A number of comparisons or demonstrations of the full experiment, less for --quick.

        Example: of 8000 comparisons a quick task takes 400, of 2000 it takes 100.
        """
        return max(40, count * QUICK.comparisons // Sizes.comparisons) if self.quick else count

    @property
    def folder(self) -> str:
        """The task's own folder; what `run` leaves there is deleted when its figures are kept."""
        return os.path.join(self.out, self.experiment, "work", self.file_name)

    @property
    def file_name(self) -> str:
        """The task as part of a file's name: "kl_coef_0.1__seed_2"."""
        arm = "".join(c if c.isalnum() or c in ".-+" else "_" for c in self.arm)
        return f"{arm}__seed_{self.seed}"

    @property
    def shared(self) -> str:
        """The folder of the stages of this seed."""
        return os.path.join(self.out, "shared", f"seed_{self.seed}")

    def __str__(self) -> str:
        return f"{self.experiment}: {self.arm}, seed {self.seed}"


@contextlib.contextmanager
def alone(path: str) -> Iterator[None]:
    """Within it no other process is in a block of the same path; waits for its turn."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open_own(path, "ab") as file:
        while True:
            try:
                lock(file)
                break
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:
                break                                    # a file system without locks
        yield


def stage(task: Task, name: str, trainer, config, **options) -> str:
    """The folder of a shared stage: made by the trainer's `main`, unless it is finished already.

    Example: stage(task, "rm_noisy", reward_model, reward_model.RewardModelConfig, model=..., ...)
    """
    folder = os.path.join(task.shared, name)
    with alone(folder + ".lock"):
        run_file = os.path.join(folder, RUN_FILE)
        if not (os.path.exists(run_file) and read_json(run_file).get("finished") is True):
            trainer.main(config(**options, out=folder, resume=True))
    return folder


def sft_options(task: Task) -> dict:
    """Options of the seed's SFT, as `python -m minirlhf` sets them; fewer rows for --quick."""
    count = task.sizes.demonstrations
    return {"model": task.base, "seed": task.seed, "examples": count,
            "held_out": min(200, count // 4)}


def sft_folder(task: Task) -> str:
    """The SFT model of the seed, as `python -m minirlhf` makes it."""
    return stage(task, "sft", sft, sft.SFTConfig, **sft_options(task))


def write_comparisons(path: str, records: list[dict]) -> str:
    """Write comparisons as the trainers read them, with their margins; returns the path."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_atomically(path, "".join(lines).encode("utf-8"))
    return path


def read_comparisons(path: str) -> list[dict]:
    """What `write_comparisons` wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def comparisons_file(task: Task) -> str:
    """The file of the seed's comparisons: the SFT model answers, the gold judge chooses.

    The first 2,000 of it are what a world with 2,000 comparisons would have had.
    """
    path, folder = os.path.join(task.shared, "comparisons.jsonl"), sft_folder(task)
    with alone(path + ".lock"):
        if not os.path.exists(path):
            write_comparisons(path, sample_comparisons(task.sizes.comparisons, task.seed, folder))
    return path


def reward_model_options(task: Task, number: int, count: int, data: str) -> dict:
    """Options of a reward model of the seed, as `python -m minirlhf` sets them."""
    return {"model": sft_folder(task), "data": data or comparisons_file(task), "in_order": True,
            "comparisons": count, "held_out": count // 10, "seed": 100 * task.seed + number}


def reward_model_folder(task: Task, number: int = 1, comparisons: int = 8000, name: str = "",
                        **options) -> str:
    """A reward model of the seed; `number` 1, 2, ... are the members of an ensemble.

    It learns from the first so many `comparisons` of the seed's file. With further `options` of
    `minirlhf.reward_model` give it a `name` that says how it differs.
    """
    count = task.scaled(comparisons)
    settings = {**reward_model_options(task, number, count, ""), **options}
    return stage(task, name or f"reward_model_{number}_of_{count}", reward_model,
                 reward_model.RewardModelConfig, **settings)


def train_reward_model(task: Task, name: str, data: str, count: int, **options) -> str:
    """A reward model of the task alone, of `count` comparisons of the file `data`."""
    folder = os.path.join(task.folder, name)
    settings = {**reward_model_options(task, 1, count, data), **options}
    reward_model.main(reward_model.RewardModelConfig(**settings, out=folder))
    return folder


def both_reward_models(task: Task) -> str:
    """The two reward models of the pipeline, as `--reward` names them; they vote by "min"."""
    return ",".join(reward_model_folder(task, number) for number in (1, 2))


def train_policy(task: Task, name: str = "ppo", **options) -> str:
    """PPO with the settings of the pipeline but for `options`; returns the run's folder.

    Without `reward` among the options: the minimum of the pipeline's two reward models.
    """
    settings = {"model": sft_folder(task), "ensemble": "min", "iterations": task.sizes.iterations,
                "seed": task.seed, "save_every": 1000, "sample_every": 1000, **options}
    settings.setdefault("reward", "")
    settings["reward"] = settings["reward"] or both_reward_models(task)
    folder = os.path.join(task.folder, name)
    ppo.main(ppo.PPOConfig(**settings, out=folder))
    return folder


def control_policy(task: Task) -> str:
    """PPO with the settings of the pipeline against one reward model: shared, since it is the
    control arm of several experiments.
    """
    return stage(task, "ppo", ppo, ppo.PPOConfig, model=sft_folder(task), seed=task.seed,
                 reward=reward_model_folder(task), iterations=task.sizes.iterations,
                 save_every=1000)


def series(folder: str, *names: str) -> dict[str, list[float]]:
    """Columns of a run's metrics.csv as the result keeps them: rounded, one number per row.

    A series is called as its column with "_by_step" added, so that no figure has its name.
    """
    rows = read_metrics(folder)
    return {f"{name}_by_step": [round(row[name], 4) for row in rows if name in row]
            for name in names}
