"""`collapse`: does an entropy bonus cure a policy that gives everybody the same answer?

Long runs with and without the KL penalty, without the bonus, with the 0.01 of the source and with
five times that. `distinct` is the share of different texts among the answers to all prompts; a
policy that answers everybody alike has few. That one prompt's answers differ is no good by itself
(3 plus 4 is 7), so gold stands beside it.
"""

from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import describe_answers, draw_answers
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task, reward_model_folder, series, train_policy

ABOUT = Experiment(
    name="collapse",
    claim="When PPO collapses onto one response, an entropy bonus is the cure.",
    source="the seed lecture (\"Entropy coefficient too low. Fix: Add entropy bonus\" of 0.01)",
    rule="Shown if, without KL penalty, fewer responses are distinct than with kl_coef 0.2, and a "
         "bonus of 0.05, five times that of the source, raises their share, and gold too, up to "
         "that of kl_coef 0.2 less 0.5 points: intervals of the differences over seeds on that "
         "side. Refuted if one is on the other side.",
    figures=("distinct", "gold", "entropy", "distinct_per_prompt", "kl_ref", "score"),
    units={"distinct_per_prompt": "share of a prompt's answers",
           "entropy": "nats per token, at the end"})

ITERATIONS = 45                     # nearly twice the pipeline's: a collapse takes time
KL, FREE, BONUS = "kl_coef 0.2", "kl_coef 0", "kl_coef 0, bonus 0.05"
ARMS = {FREE: {"kl_coef": 0.0}, "kl_coef 0, bonus 0.01": {"kl_coef": 0.0, "ent_coef": 0.01},
        BONUS: {"kl_coef": 0.0, "ent_coef": 0.05}, KL: {"kl_coef": 0.2},
        "kl_coef 0.2, bonus 0.01": {"kl_coef": 0.2, "ent_coef": 0.01}}


def distinct_per_prompt(texts: list[list[str]]) -> float:
    """Share of different texts among the answers to one prompt, as a mean over prompts.

    Example: the answers a a b c and a a a a give (3/4 + 1/4) / 2 = 0.5. With four answers to each
    prompt 0.25 is the least.
    """
    shares = [len(set(answers)) / len(answers) for answers in texts]
    return sum(shares) / len(shares)


def run(task: Task) -> dict:
    """A long PPO run against one reward model with the arm's two coefficients."""
    reward = reward_model_folder(task)
    iterations = task.sizes.iterations if task.quick else ITERATIONS
    folder = train_policy(task, reward=reward, iterations=iterations, **ARMS[task.arm])
    answers, gold = draw_answers(task, folder)
    curves = series(folder, "gold", "entropy")
    return {**describe_answers(task, folder, answers, gold, reward), **curves,
            "distinct_per_prompt": distinct_per_prompt(answers.texts),
            "entropy": curves["entropy_by_step"][-1]}


def findings(rows: Rows) -> list[Finding]:
    """There is a collapse; the bonus brings diversity back; the answers are good again."""
    return [compare(rows, "without penalty fewer answers are distinct than with kl_coef 0.2",
                    (FREE, "distinct"), "<", (KL, "distinct")),
            compare(rows, "without penalty a bonus of 0.05 makes more of them distinct",
                    (BONUS, "distinct"), ">", (FREE, "distinct")),
            compare(rows, "without penalty a bonus of 0.05 raises gold", (BONUS, "gold"), ">",
                    (FREE, "gold")),
            compare(rows, "with that bonus gold is that of kl_coef 0.2 less 0.5 at most",
                    (BONUS, "gold"), ">", (KL, "gold"), by=-0.5)]


def picture(rows: Rows, path: str) -> None:
    """Diversity and gold at the end, and the way there."""
    figure, axes = new_picture(6)
    show_intervals(axes[0], rows, "distinct", "different answers to all prompts")
    show_intervals(axes[1], rows, "distinct_per_prompt", "different answers to one prompt",
                   ABOUT.units["distinct_per_prompt"])
    show_intervals(axes[2], rows, "gold")
    show_series(axes[3], rows, "entropy_by_step", "entropy", "iteration", "nats per token")
    show_series(axes[4], rows, "gold_by_step", "gold on training prompts", "iteration",
                "gold, points per response")
    show_intervals(axes[5], rows, "kl_ref")
    save_picture(figure, path)
