"""`epochs_of_the_reward_model`: does a second pass over the comparisons harm a reward model?

All arms' scores are normalised by the trainer's own function, on the same responses; the number of
epochs is the only difference. The raw reward models are kept, because of the scores' deviation.
"""

import os

from minirlhf import reward_model
from minirlhf.data import fit_rows
from minirlhf.engine.metrics import read_metrics
from minirlhf.files.pretrained import load_network, save_folder
from minirlhf.gpt2 import GPT2, ScalarModel
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import measure
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals
from minirlhf.lab.shared import (
    Task,
    reward_model_folder,
    reward_model_options,
    sft_folder,
    train_policy,
)
from minirlhf.museum.short_runs import ignore, substituted
from minirlhf.tokenizer import load_tokenizer

ABOUT = Experiment(
    name="epochs_of_the_reward_model",
    claim="A reward model is trained for one epoch: with more it overfits.",
    source="Ouyang et al. 2022, appendix C.2; our own lecture on the reward model",
    rule="Shown if with 2 and with 4 epochs held-out loss and calibration error are higher, "
         "held-out accuracy and gold after PPO lower than with 1, where PPO sees the scores of all "
         "three normalised alike: intervals of the differences over seeds on that side of 0. "
         "Refuted if one is on the other side.",
    figures=("held_out_accuracy", "held_out_loss", "calibration_error", "spread",
             "train_accuracy", "gold", "kl_ref"),
    units={"held_out_accuracy": "share of comparisons", "train_accuracy": "share of comparisons",
           "held_out_loss": "nats per comparison", "calibration_error": "share of comparisons",
           "spread": "deviation of scores, log-odds"})

ARMS = {"1 epoch": 1, "2 epochs": 2, "4 epochs": 4}
CONTROL = "1 epoch"


def raw_reward_model(task: Task, epochs: int = 1) -> str:
    """The seed's reward model with its scores as Bradley-Terry left them; shared."""
    with substituted([(reward_model, "normalise", ignore)]):
        return reward_model_folder(task, name=f"reward_model_raw_{epochs}_epochs", epochs=epochs)


def normalised(task: Task, raw: str) -> tuple[str, float]:
    """A copy of a raw reward model as the trainer normalises it, and the deviation before."""
    model, policy = load_network(ScalarModel, raw), load_network(GPT2, sft_folder(task))
    tokenizer, limit = load_tokenizer(raw, model), policy.config.n_positions
    cfg = reward_model.RewardModelConfig(**reward_model_options(task, 1, task.scaled(8000), ""))
    rows = reward_model.collect(cfg, raw, tokenizer, limit)
    prompts, _ = fit_rows([row.prompt for row in rows], limit - cfg.max_new_tokens)
    before = model.score_head.weight.norm().item()
    reward_model.normalise(model, policy, prompts, cfg, tokenizer.end_token)
    folder = os.path.join(task.folder, "reward_model")
    save_folder(model, tokenizer, folder)
    return folder, before / model.score_head.weight.norm().item()    # it was divided by it


def run(task: Task) -> dict:
    """A reward model with the arm's epochs, its held-out figures, and PPO against it."""
    raw = raw_reward_model(task, ARMS[task.arm])
    reward, spread = normalised(task, raw)
    rows = read_metrics(raw)
    accuracies = [row["accuracy"] for row in rows[-20:]]
    folder = train_policy(task, reward=reward)
    return {**measure(task, folder, reward), "spread": spread,
            **{name: rows[-1][name] for name in ("held_out_accuracy", "held_out_loss",
                                                 "calibration_error")},
            "train_accuracy": sum(accuracies) / len(accuracies)}


def findings(rows: Rows) -> list[Finding]:
    """Four signs of overfitting, for two and for four epochs."""
    signs = (("held_out_loss", ">"), ("held_out_accuracy", "<"), ("calibration_error", ">"),
             ("gold", "<"))
    return [compare(rows, f"{arm}: {figure} {sign} that of 1 epoch", (arm, figure), sign,
                    (CONTROL, figure))
            for arm in ("2 epochs", "4 epochs") for figure, sign in signs]


def picture(rows: Rows, path: str) -> None:
    """The reward model's figures, and gold after PPO."""
    figure, axes = new_picture(6)
    names = ("held_out_accuracy", "held_out_loss", "calibration_error", "spread",
             "train_accuracy", "gold")
    for panel, name in zip(axes, names):
        show_intervals(panel, rows, name, unit=ABOUT.units.get(name, ""))
    save_picture(figure, path)
