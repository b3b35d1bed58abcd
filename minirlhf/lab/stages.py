"""`stages`: is every stage needed? PPO without SFT, SFT without PPO, PPO without its reference.

The upper bound is PPO on gold itself. It differs from the control by the score alone: gold has the
scale of a reward model, and its critic starts from the same one.
"""

from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.gold import scaled_gold, train_on_gold
from minirlhf.lab.measure import measure
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_points
from minirlhf.lab.shared import Task, control_policy, reward_model_folder, sft_folder, train_policy

ABOUT = Experiment(
    name="stages",
    claim="Each part is needed: SFT before PPO, PPO after SFT, and the reference in PPO; what is "
          "missing to the best is the fault of the reward model.",
    source="the seed lecture (SFT, then a reward model, then PPO with a KL penalty); Ouyang et al. "
           "2022, figure 2",
    rule="Shown if gold of SFT then PPO is above that of PPO without SFT, SFT without PPO and PPO "
         "without reference, and below that of PPO on gold itself, scaled as a reward model is: "
         "intervals of the differences over seeds on that side of 0. Refuted if one is on the "
         "other side.",
    figures=("gold", "win_rate", "kl_ref", "fully_right", "length", "end_rate", "score"))

BASE, SFT, CONTROL = "base model", "SFT without PPO", "SFT, then PPO"
NO_SFT, NO_REFERENCE, GOLD = "PPO without SFT", "PPO without reference", "PPO on gold itself"
ARMS = {BASE: {}, SFT: {}, CONTROL: {}, NO_SFT: {}, NO_REFERENCE: {"kl_coef": 0.0}, GOLD: {}}


def policy_of(task: Task) -> str:
    """The folder of the arm's policy. Without SFT the base model is both start and reference."""
    if task.arm == BASE:
        return task.base
    if task.arm == SFT:
        return sft_folder(task)
    if task.arm == CONTROL:
        return control_policy(task)
    start = task.base if task.arm == NO_SFT else sft_folder(task)
    options = {"model": start, "reward": reward_model_folder(task), **ARMS[task.arm]}
    if task.arm == GOLD:
        return train_on_gold(task, scaled_gold(task), **options)
    return train_policy(task, **options)


def run(task: Task) -> dict:
    """The figures of the arm's policy; kl_ref is from the SFT model in all of them."""
    return measure(task, policy_of(task), reward_model_folder(task))


def findings(rows: Rows) -> list[Finding]:
    """The four parts of the claim."""
    return [compare(rows, f"gold of \"{other}\" is {word} that of \"{CONTROL}\"", (other, "gold"),
                    sign, (CONTROL, "gold"))
            for other, word, sign in ((NO_SFT, "below", "<"), (SFT, "below", "<"),
                                      (NO_REFERENCE, "below", "<"), (GOLD, "above", ">"))]


def picture(rows: Rows, path: str) -> None:
    """What each arm ends with, and how far it went for it."""
    figure, axes = new_picture(3)
    show_intervals(axes[0], rows, "gold")
    show_intervals(axes[1], rows, "win_rate")
    show_points(axes[2], rows, "kl_ref", "gold", "gold and distance", "kl_ref, nats per response",
                "gold, points per response")
    save_picture(figure, path)
