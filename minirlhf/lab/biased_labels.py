"""`biased_labels`: what the policy makes of a labeller's taste, and of his errors.

The same pairs of responses are chosen by other labellers: one adds points for length, one for
closers ("Enjoy!"), two err in some pairs. The reward model learns from their choices, PPO climbs
it. The control are the gold judge's own choices.
"""

import os

import numpy as np

from minirlhf.evaluate import Answers, win_rate
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import describe_answers, draw_answers, gold_accuracy, sft_answers
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals
from minirlhf.lab.shared import (
    Task,
    comparisons_file,
    read_comparisons,
    series,
    train_policy,
    train_reward_model,
    write_comparisons,
)
from minirlhf.world.labellers import loves_closers, loves_length, relabel

ABOUT = Experiment(
    name="biased_labels",
    claim="The policy exaggerates its labellers' taste, which then counts as a gain in their own "
          "comparisons; errors in the labels cost gold.",
    source="Singhal et al. 2023 (arXiv 2310.03716) and Dubois et al. 2024 (arXiv 2404.04475) for "
           "length, Dubois et al. 2023 (AlpacaFarm, arXiv 2305.14387) for 25 % of labels flipped",
    rule="Shown if, by the intervals over seeds, against the control a taste for length gives "
         "longer responses, a taste for closers more closers, both less gold, 25 % of flips less "
         "gold, and if the labeller who loves length prefers the policy less once the length is "
         "controlled for. Refuted if the opposite of one holds.",
    figures=("gold", "length", "closers", "win_rate", "labeller_win_rate", "controlled_win_rate",
             "accuracy", "kl_ref", "fully_right"),
    units={"closers": "closers per response", "labeller_win_rate": "share of pairs",
           "controlled_win_rate": "share of pairs", "accuracy": "share of comparisons"})

CONTROL, LENGTH, CLOSERS = "gold labels", "loves length", "loves closers"
ARMS = {CONTROL: {}, LENGTH: {"taste": loves_length}, CLOSERS: {"taste": loves_closers},
        "10 % flipped": {"flips": 0.10}, "25 % flipped": {"flips": 0.25}}
COMPARISONS, KL_COEF = 3000, 0.1


def length_controlled_win_rate(points_a: np.ndarray, points_b: np.ndarray, lengths_a: np.ndarray,
                               lengths_b: np.ndarray) -> float:
    """The win rate of b over a as it would be if both were equally long; all inputs (P, K).

    Every pair of answers to a prompt is won, lost or tied by points. Logistic regression of that on
    tanh(difference in length / its deviation) gives the log-odds at difference 0: those are
    returned as a share. A small penalty on the slope keeps it finite.

    Example: if b wins just the pairs in which it is longer, and loses as many, the rate is 0.5.
    Source: Dubois et al. 2024 (arXiv 2404.04475), without its term for the prompt's difficulty.
    """
    margins = (points_b[:, None, :] - points_a[:, :, None]).ravel()                 # (pairs,)
    won = (margins > 0) + 0.5 * (margins == 0)                                      # (pairs,)
    longer = (lengths_b[:, None, :] - lengths_a[:, :, None]).ravel().astype(float)  # (pairs,)
    longer = np.tanh(longer / max(1e-9, longer.std()))
    inputs = np.stack([np.ones_like(longer), longer], axis=1)                       # (pairs, 2)
    weights, penalty = np.zeros(2), np.array([1e-3, 1e-2])
    for _ in range(50):                                  # Newton's method on a convex loss
        share = 1 / (1 + np.exp(-inputs @ weights))                                 # (pairs,)
        gradient = inputs.T @ (share - won) / len(won) + penalty * weights          # (2,)
        curvature = (inputs.T * (share * (1 - share))) @ inputs / len(won) + np.diag(penalty)
        weights = weights - np.linalg.solve(curvature, gradient)
    return float(1 / (1 + np.exp(-weights[0])))


def points_of(answers: Answers, gold: np.ndarray, taste) -> np.ndarray:
    """What the arm's labeller thinks of the answers: (P, K)."""
    if taste is None:
        return gold
    return gold + np.array([[taste(text) for text in drawn] for drawn in answers.texts])


def run(task: Task) -> dict:
    """A reward model of the arm's labels, PPO against it, and what gold and labeller think."""
    arm = ARMS[task.arm]
    records = read_comparisons(comparisons_file(task))[:task.scaled(COMPARISONS)]
    records = relabel(records, **arm, seed=task.seed)
    data = write_comparisons(os.path.join(task.folder, "comparisons.jsonl"), records)
    reward = train_reward_model(task, "reward_model", data, len(records))
    folder = train_policy(task, reward=reward, kl_coef=KL_COEF)
    (before, gold_before), (after, gold_after) = sft_answers(task), draw_answers(task, folder)
    taste = arm.get("taste")
    points_before = points_of(before, gold_before["gold"], taste)                   # (P, K)
    points_after = points_of(after, gold_after["gold"], taste)                      # (P, K)
    closers = [loves_closers(text) for drawn in after.texts for text in drawn]
    return {**describe_answers(task, folder, after, gold_after, reward),
            "closers": float(np.mean(closers)), "accuracy": gold_accuracy(task, reward),
            "labeller_win_rate": float(win_rate(points_before, points_after).mean()),
            "controlled_win_rate": length_controlled_win_rate(
                points_before, points_after, before.lengths, after.lengths),
            **series(folder, "gold", "response_len")}


def findings(rows: Rows) -> list[Finding]:
    """The parts of the claim."""
    return [compare(rows, "a taste for length gives longer responses", (LENGTH, "length"), ">",
                    (CONTROL, "length")),
            compare(rows, "a taste for length costs gold", (LENGTH, "gold"), "<",
                    (CONTROL, "gold")),
            compare(rows, "a taste for closers gives more closers", (CLOSERS, "closers"), ">",
                    (CONTROL, "closers")),
            compare(rows, "a taste for closers costs gold", (CLOSERS, "gold"), "<",
                    (CONTROL, "gold")),
            compare(rows, "25 % of flipped labels cost gold", ("25 % flipped", "gold"), "<",
                    (CONTROL, "gold")),
            compare(rows, "control for length lowers the win rate by the labeller who loves it",
                    (LENGTH, "controlled_win_rate"), "<", (LENGTH, "labeller_win_rate"))]


def picture(rows: Rows, path: str) -> None:
    """What each labeller's policy is like."""
    figure, axes = new_picture(6)
    show_intervals(axes[0], rows, "gold")
    show_intervals(axes[1], rows, "length")
    show_intervals(axes[2], rows, "closers", unit="per response")
    show_intervals(axes[3], rows, "win_rate", "win rate by gold")
    show_intervals(axes[4], rows, "labeller_win_rate", "win rate by the labeller himself",
                   "share of pairs")
    show_intervals(axes[5], rows, "controlled_win_rate", "the same, controlled for length",
                   "share of pairs")
    save_picture(figure, path)
