"""`cures`: what the lecture recommends against reward hacking, each beside the hacked run.

The reward model is a weak one, of 2,000 comparisons, so that there is something to cure.
"""

import os
from collections.abc import Callable

import torch

from minirlhf import ppo
from minirlhf.engine import training
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import measure
from minirlhf.lab.overoptimisation import smooth
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import (
    Task,
    comparisons_file,
    read_comparisons,
    reward_model_folder,
    series,
    train_policy,
    train_reward_model,
    write_comparisons,
)
from minirlhf.museum.short_runs import substituted
from minirlhf.rewards import ModelReward, load_reward
from minirlhf.world.collect import comparisons as sample_comparisons

ABOUT = Experiment(
    name="cures",
    claim="Against reward hacking help: a KL penalty, several reward models (minimum, mean, mean "
          "minus variance), a score without length, new comparisons on the current policy, an "
          "early stop.",
    source="the seed lecture (four cures); Coste et al. 2023 (arXiv 2310.02743) for ensembles, "
           "Bai et al. 2022 (arXiv 2204.05862) for new comparisons, Gao et al. 2022 for the rest",
    rule="Shown if each cure, alone and at kl_coef 0, ends with more gold than one reward model at "
         "kl_coef 0, by the intervals over seeds; refuted if one ends with less. New comparisons "
         "are held against as many comparisons of the SFT model; an early stop is the run of one "
         "reward model as it is after 7 of its 25 iterations.",
    figures=("gold", "gold_best", "gold_fall", "score", "kl_ref", "length", "fully_right"),
    units={"gold_best": "points per response", "gold_fall": "points per response"})

ONE, NEW, MORE = "one reward model", "new comparisons, two rounds", "one, as many comparisons"
STOP = "early stop"
CURES = (ONE, MORE, "mean of 3", "minimum of 3", "mean - variance of 3", "score without length",
         NEW, STOP)
VOTES = {"mean of 3": "mean", "minimum of 3": "min", "mean - variance of 3": "uwo"}
ARMS = {f"{cure}, kl_coef {kl_coef}": (cure, kl_coef) for kl_coef in (0.0, 0.05) for cure in CURES
        if (cure, kl_coef) != (MORE, 0.05)}
COMPARISONS, NEW_COMPARISONS = 2000, 500        # at first, and in each round


# ---- the cures -----------------------------------------------------------------------------------

class ScoreWithoutLength(ModelReward):
    """Scores less what the length alone foretells of them within the batch.

    In a batch the score is regressed on the length of the response; the slope times the difference
    to the mean length is taken off. With one row, or equal lengths, nothing is.
    """

    def __call__(self, ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                 tokenizer) -> torch.Tensor:
        """ids (B, T), prompt_lengths (B,), lengths (B,) -> scores (B,)."""
        scores = super().__call__(ids, prompt_lengths, lengths, tokenizer)          # (B,)
        longer = (lengths - prompt_lengths).float()                                 # (B,)
        longer = longer - longer.mean()
        slope = (longer * scores).sum() / longer.square().sum().clamp(min=1e-6)
        return scores - slope * longer


def load_without_length(*arguments) -> ModelReward:
    """In the place of `load_reward`: the same models, without length."""
    return ScoreWithoutLength(load_reward(*arguments).models, "mean")


set_learning_rate = training.set_learning_rate


def rates_of_a_run_of(iterations: int) -> Callable:
    """In the place of `training.set_learning_rate`: the rates of a run of so many iterations.

    Nothing else of an iteration depends on how many there are. So a shorter run is, iteration by
    iteration, the longer one stopped.
    """
    def rates(optimizer, step: int, total_steps: int, *others) -> None:
        """`training.set_learning_rate` with its own arguments."""
        set_learning_rate(optimizer, step, iterations, *others)
    return rates


def train_with_new_comparisons(task: Task, **options) -> tuple[str, str]:
    """Two rounds: PPO, comparisons of the policy that it made, a new reward model; then PPO again.

    Each reward model starts from the SFT model and learns from all comparisons so far, each PPO run
    starts from the SFT model. The rounds' own runs have 2/5 of the iterations. Returns policy and
    reward.
    """
    records = read_comparisons(comparisons_file(task))[:task.scaled(COMPARISONS)]
    reward = reward_model_folder(task, comparisons=COMPARISONS)
    count = task.scaled(NEW_COMPARISONS)
    for number in (1, 2):
        folder = train_policy(task, f"round_{number}", reward=reward, **{
            **options, "iterations": max(1, options["iterations"] * 2 // 5)})
        # whole prompts go to the held-out side from the end: keep those of the start there
        records = sample_comparisons(count, 1000 * number + task.seed, folder) + records
        data = write_comparisons(os.path.join(task.folder, f"round_{number}.jsonl"), records)
        reward = train_reward_model(task, f"reward_model_{number}", data, len(records))
    return train_policy(task, reward=reward, **options), reward


def stop_after(iterations: int) -> int:
    """Where a run is stopped early, whatever its gold: after 7 of 25 iterations."""
    return max(1, iterations * 3 // 10)


def run(task: Task) -> dict:
    """PPO with one cure at one kl_coef."""
    cure, kl_coef = ARMS[task.arm]
    options = {"kl_coef": kl_coef, "ensemble": VOTES.get(cure, "mean"),
               "iterations": task.sizes.iterations}
    reward = reward_model_folder(task, comparisons=COMPARISONS)
    if cure == NEW:
        folder, reward = train_with_new_comparisons(task, **options)
    elif cure == "score without length":
        with substituted([(ppo, "load_reward", load_without_length)]):
            folder = train_policy(task, reward=reward, **options)
    elif cure == STOP:
        rates = rates_of_a_run_of(options["iterations"])
        options["iterations"] = stop_after(options["iterations"])
        with substituted([(training, "set_learning_rate", rates)]):
            folder = train_policy(task, reward=reward, **options)
    else:
        if cure == MORE:
            reward = reward_model_folder(task, comparisons=COMPARISONS + 2 * NEW_COMPARISONS)
        if cure in VOTES:
            reward = ",".join(reward_model_folder(task, number, COMPARISONS)
                              for number in (1, 2, 3))
        folder = train_policy(task, reward=reward, **options)
    path = series(folder, "gold", "score", "kl_ref")
    gold = smooth(path["gold_by_step"])
    return {**measure(task, folder, reward, options["ensemble"]), "gold_best": float(gold.max()),
            "gold_fall": float(gold.max() - gold[-1]), "gold_by_step": path["gold_by_step"]}


def findings(rows: Rows) -> list[Finding]:
    """One part for each cure."""
    hacked = f"{ONE}, kl_coef 0.0"
    found = [compare(rows, "a penalty of 0.05 leaves more gold", (f"{ONE}, kl_coef 0.05", "gold"),
                     ">", (hacked, "gold"))]
    for cure in CURES[2:]:
        against = f"{MORE}, kl_coef 0.0" if cure == NEW else hacked
        found.append(compare(rows, f"{cure}: more gold than {against}",
                             (f"{cure}, kl_coef 0.0", "gold"), ">", (against, "gold")))
    return found


def picture(rows: Rows, path: str) -> None:
    """What each cure ends with, without and with penalty, and some ways there."""
    figure, axes = new_picture(3)
    for panel, kl_coef in zip(axes, (0.0, 0.05)):
        arms = [arm for arm in rows if ARMS[arm][1] == kl_coef]
        show_intervals(panel, {ARMS[arm][0]: rows[arm] for arm in arms}, "gold",
                       f"kl_coef {kl_coef}")
    some = {cure: rows[f"{cure}, kl_coef 0.0"]
            for cure in (ONE, "minimum of 3", "score without length", NEW)}
    show_series(axes[2], some, "gold_by_step", "kl_coef 0: training prompts", "iteration",
                "gold, points per response")
    save_picture(figure, path)
