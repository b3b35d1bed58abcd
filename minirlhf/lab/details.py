"""`details`: the small decisions of an implementation, each switched by itself, all else equal.

Some are options. The others are made by putting another function in a trainer's place, as the
museum does: no whitening, k3 in the reward, dropout, another temperature. Some of these break what
the checks of every run demand, and stop it; then it is made again without the checks.
"""

import torch

from minirlhf import ppo
from minirlhf.lab.epochs_of_the_reward_model import raw_reward_model
from minirlhf.lab.experiment import Experiment, Finding, Rows, unchanged
from minirlhf.lab.kl_estimators import estimates
from minirlhf.lab.measure import measure
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals
from minirlhf.lab.shared import Task, reward_model_folder, train_policy
from minirlhf.museum.exhibits import find
from minirlhf.museum.short_runs import UNCHECKED, substituted
from minirlhf.ppo import shaped_rewards

MARGIN = 0.5                        # of gold: about a third of what PPO gains over SFT (1.4)
ABOUT = Experiment(
    name="details",
    claim="Where answers are short and the KL penalty holds, no single one of these details of PPO "
          "decides: gold stays within 0.5 points.",
    source="against Engstrom et al. 2020 (arXiv 2005.12729): details of the code, and not the "
           "clipped objective, make most of PPO's gain in control tasks",
    rule="Shown if for each detail the interval of the difference in gold over seeds lies within "
         "-0.5 to +0.5. Refuted if for one it lies beyond 0, with a mean beyond 0.5.",
    figures=("gold", "kl_ref", "win_rate", "stopped", "length"),
    units={"stopped": "share of seeds"})


def keep_advantages(advantages: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """In the place of `whiten`: the advantages as they are, 0 outside the mask."""
    return torch.where(mask, advantages, 0.0)


def rewards_with_k3(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                    kl_coef: float) -> torch.Tensor:
    """`ppo.shaped_rewards` with k3 = exp(-kl_ref) - 1 + kl_ref in the place of k1 = kl_ref.

    Both have KL(policy || reference) as their mean; k3 is never negative.
    Example: kl_ref 0.5 costs 0.1065 times kl_coef, and -0.5 costs 0.1487 times.
    """
    return shaped_rewards(scores, estimates(kl_ref)["k3"], mask, kl_coef)


ITERATIONS = 15                     # shorter than the pipeline's: there are many arms
CONTROL, RAW = "as shipped", "scores not normalised"
ARMS = {                            # name: options, functions in the place of others
    CONTROL: ({}, []),
    "value clip off": ({"cliprange_value": 1e6}, []),
    "ratio clip off": ({"cliprange": 1e6}, []),
    "whitening off": ({}, [(ppo, "whiten", keep_advantages)]),
    RAW: ({}, []),
    "shared critic": ({"critic": "shared"}, []),
    "1 PPO epoch": ({"epochs": 1}, []),
    "4 PPO epochs": ({"epochs": 4}, []),
    "no missing-end penalty": ({"missing_end_penalty": 0.0}, []),
    "k3 in the reward": ({}, [(ppo, "shaped_rewards", rewards_with_k3)]),
    "dropout in the update": ({}, find("dropout").replacements()),
    "sampled at 0.7, scored at 1": ({}, find("temperature").replacements())}


def train(task: Task) -> tuple[str, float]:
    """The folder of the arm's run, and 1 if what must hold in every run has stopped it.

    After that it is made again without these checks, to see what the detail does.
    """
    options, replacements = ARMS[task.arm]
    options = {"reward": raw_reward_model(task) if task.arm == RAW else reward_model_folder(task),
               "iterations": min(ITERATIONS, task.sizes.iterations), **options}
    try:
        with substituted(replacements):
            return train_policy(task, **options), 0.0
    except ValueError as error:
        print(f"stopped: {error}")
    with substituted([*replacements, *UNCHECKED]):
        return train_policy(task, name="unchecked", **options), 1.0


def run(task: Task) -> dict:
    """The figures of the arm's policy; its score is by the same reward model in all arms."""
    folder, stopped = train(task)
    return {**measure(task, folder, reward_model_folder(task)), "stopped": stopped}


def findings(rows: Rows) -> list[Finding]:
    """One finding per detail."""
    return [unchanged(rows, f"{arm}: gold is that of the control", (arm, "gold"),
                      (CONTROL, "gold"), MARGIN) for arm in rows if arm != CONTROL]


def picture(rows: Rows, path: str) -> None:
    """Gold and distance for each detail."""
    figure, axes = new_picture(2)
    for panel, name in zip(axes, ("gold", "kl_ref")):
        show_intervals(panel, rows, name)
    save_picture(figure, path)
