"""`beta`: how much should the KL penalty weigh? `kl_coef` from 0 to 1, all else equal."""

from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import measure
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task, reward_model_folder, series, train_policy

ABOUT = Experiment(
    name="beta",
    claim="There is a sweet spot: without KL penalty PPO fools its reward model; with kl_coef 1 it "
          "gains less than with 0.2.",
    source="the seed lecture (\"beta 0.1 is the sweet spot\"); Ziegler et al. 2019, section 2",
    rule="Shown if kl_coef 0 scores more and has less gold than 0.2, and kl_coef 1 has less gold "
         "than 0.2: intervals of the differences over seeds on that side of 0. Refuted if one is "
         "on the other side.",
    figures=("gold", "score", "win_rate", "kl_ref", "fully_right", "length", "distinct"))

ARMS = {f"kl_coef {value}": {"kl_coef": value} for value in (0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)}
CONTROL = "kl_coef 0.2"


def run(task: Task) -> dict:
    """PPO against one reward model with the arm's kl_coef."""
    reward = reward_model_folder(task)
    folder = train_policy(task, reward=reward, **ARMS[task.arm])
    return {**measure(task, folder, reward), **series(folder, "gold", "score", "kl_ref")}


def findings(rows: Rows) -> list[Finding]:
    """The three parts of the claim."""
    hacked, strict = "kl_coef 0.0", "kl_coef 1.0"
    return [compare(rows, "without penalty the score is higher than at 0.2", (hacked, "score"), ">",
                    (CONTROL, "score")),
            compare(rows, "without penalty gold is lower than at 0.2", (hacked, "gold"), "<",
                    (CONTROL, "gold")),
            compare(rows, "at 1 gold is lower than at 0.2", (strict, "gold"), "<",
                    (CONTROL, "gold"))]


def picture(rows: Rows, path: str) -> None:
    """What each kl_coef ends with, and the way there."""
    figure, axes = new_picture(6)
    for panel, name in zip(axes, ("gold", "score", "kl_ref")):
        show_intervals(panel, rows, name)
    some = ["kl_coef 0.0", "kl_coef 0.05", "kl_coef 0.2", "kl_coef 1.0"]
    for panel, name, unit in zip(axes[3:], ("gold", "score", "kl_ref"),
                                 ("points", "points", "nats")):
        show_series(panel, rows, f"{name}_by_step", f"{name} on training prompts", "iteration",
                    f"{name}, {unit} per response", some)
    save_picture(figure, path)
