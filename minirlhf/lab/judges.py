"""`judges`: can a reward model judge the policy that PPO trained on it? And one of another seed?

A long run without KL penalty finds what its reward model takes for merits. The two policies are
compared with SFT by three judges: gold, the reward model that PPO optimised, and one that learned
from the same comparisons with another seed.
"""

from minirlhf.evaluate import Answers, win_rate
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import describe_answers, draw_answers, scores_by, sft_answers
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals
from minirlhf.lab.shared import Task, reward_model_folder, train_policy

ABOUT = Experiment(
    name="judges",
    claim="A reward model that PPO did not optimise ranks two policies as the gold judge does.",
    source="practice: a held-out reward model as the judge of a policy",
    rule="Shown if, of two policies trained on one reward model, the one without penalty wins less "
         "often over SFT than the other, by gold and by a second reward model: intervals of the "
         "differences over seeds below 0. Refuted if one is above 0. What the optimised reward "
         "model says stands beside it.",
    figures=("win_rate", "by_optimised", "by_other", "gold", "fully_right", "distinct", "kl_ref"),
    units={"by_optimised": "share of pairs", "by_other": "share of pairs"})

ITERATIONS = 45                     # nearly twice the pipeline's
KL, FREE = "kl_coef 0.2", "kl_coef 0"
ARMS = {KL: {"kl_coef": 0.2}, FREE: {"kl_coef": 0.0}}


def win_rate_by(reward: str, before: Answers, after: Answers) -> float:
    """Win rate of the answers `after` over those of SFT, judged by a reward model's folder."""
    return float(win_rate(scores_by(reward, before), scores_by(reward, after)).mean())


def run(task: Task) -> dict:
    """PPO against the first reward model, and its win rate over SFT by three judges."""
    optimised, other = reward_model_folder(task), reward_model_folder(task, 2)
    iterations = task.sizes.iterations if task.quick else ITERATIONS
    folder = train_policy(task, reward=optimised, iterations=iterations, **ARMS[task.arm])
    (before, _), (after, gold) = sft_answers(task), draw_answers(task, folder)
    return {**describe_answers(task, folder, after, gold, optimised),
            "by_optimised": win_rate_by(optimised, before, after),
            "by_other": win_rate_by(other, before, after)}


def findings(rows: Rows) -> list[Finding]:
    """Gold's ranking of the two policies, and the other judge's."""
    return [compare(rows, "by gold the policy without penalty wins less often", (FREE, "win_rate"),
                    "<", (KL, "win_rate")),
            compare(rows, "by a reward model of another seed it wins less often, too",
                    (FREE, "by_other"), "<", (KL, "by_other"))]


def picture(rows: Rows, path: str) -> None:
    """The win rates by the three judges."""
    figure, axes = new_picture(3)
    show_intervals(axes[0], rows, "win_rate", "win rate over SFT, by gold")
    show_intervals(axes[1], rows, "by_optimised", "by the optimised reward model",
                   ABOUT.units["by_optimised"])
    show_intervals(axes[2], rows, "by_other", "by one of another seed", ABOUT.units["by_other"])
    for one in axes:
        one.set_xlim(-0.1, 1.1)
    save_picture(figure, path)
