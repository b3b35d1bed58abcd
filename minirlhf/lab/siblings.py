"""`siblings`: PPO and what came after it, on one axis: as many sampled responses for each.

Every arm starts from the seed's SFT model. Those that sample draw 1600 responses: PPO and the group
methods in 25 iterations of 64, rejection sampling in 4 rounds of 400. PPO and REINFORCE++ draw one
for each of 1600 prompts, the others four for each of 400. DPO, IPO and KTO sample none; they learn
from the 8000 comparisons that the reward models learned from. Each arm trains in a process of its
own, so that its seconds and its peak memory are its own. Learning rates and beta were chosen by a
few runs on seed 11, which is none of the experiment's.
"""

import json
import os
import sys
import time

import numpy as np

from minirlhf import ppo
from minirlhf.benchmark.machine import peak_memory
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.options import one_sentence
from minirlhf.evaluate import gold_figures, judge_answers, load_policy, sample_answers
from minirlhf.lab.apart import leave_with_the_parent, run_apart
from minirlhf.lab.best_of_n import best_of_n, best_of_n_kl
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare, unchanged
from minirlhf.lab.measure import held_out, measure, sft_answers
from minirlhf.lab.overoptimisation import one_score_per_response
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_points
from minirlhf.lab.shared import Task, both_reward_models, comparisons_file, sft_folder
from minirlhf.rewards import load_reward
from minirlhf.siblings import dpo, groups, rejection

ABOUT = Experiment(
    name="siblings",
    claim="With as many sampled tokens RLOO reaches what PPO reaches, without a critic; DPO, which "
          "samples nothing, gains less than PPO; SFT on the best of four gains by the choice.",
    source="Ahmadian et al. 2024 (RLOO against PPO); Xu et al. 2024, arXiv 2404.10719 (DPO against "
           "PPO); the control of rejection sampling is ours",
    rule="Shown if the interval over seeds of RLOO's gold less PPO's lies within 0.25 points of 0, "
         "and DPO has less gold than PPO, and the best of four more than random ones. Refuted if "
         "RLOO's mean is more than 0.25 away and its interval not around 0, or if one of the "
         "others comes out the other way round.",
    figures=("gold", "win_rate", "fully_right", "kl_ref", "kilotokens", "seconds", "megabytes",
             "answer_tokens", "chosen_logratio"),
    units={"kilotokens": "thousand sampled tokens", "seconds": "processor seconds",
           "megabytes": "MB, largest", "answer_tokens": "tokens sampled for one answer",
           "chosen_logratio": "nats per held-out response"})

TRAINERS = {"ppo": (ppo, ppo.PPOConfig), "groups": (groups, groups.GroupsConfig),
            "dpo": (dpo, dpo.DPOConfig), "rejection": (rejection, rejection.RejectionConfig)}
N = 4                                   # of best-of-n, and the k of rejection sampling
ARMS = {"SFT": ("", {}),
        "PPO": ("ppo", {}),
        "RLOO": ("groups", {"method": "rloo"}),
        "GRPO": ("groups", {"method": "grpo"}),
        "Dr. GRPO": ("groups", {"method": "dr_grpo"}),
        "REINFORCE++": ("groups", {"method": "reinforce_pp", "k": 1}),
        "rejection": ("rejection", {"k": N}),
        "random ones": ("rejection", {"k": N, "keep": "random"}),
        "best of 4": ("", {}),
        "DPO": ("dpo", {"loss": "dpo", "beta": 0.3}),
        "IPO": ("dpo", {"loss": "ipo", "beta": 0.1}),
        "IPO, means": ("dpo", {"loss": "ipo_mean", "beta": 1.0}),
        "KTO": ("dpo", {"loss": "kto", "beta": 0.3})}


# ---- training in a process of its own ------------------------------------------------------------

def options_of(task: Task, trainer: str, out: str, options: dict) -> dict:
    """All options of an arm's trainer that differ from its defaults."""
    common = {"model": sft_folder(task), "out": out, "seed": task.seed, "save_every": 1000}
    if trainer == "dpo":
        count = task.sizes.comparisons
        return {**common, "data": comparisons_file(task), "comparisons": count,
                "held_out": count // 10, "in_order": True, "eval_every": 1000, **options}
    common = {**common, "reward": both_reward_models(task), "ensemble": "min"}
    if trainer == "rejection":
        return {**common, "rounds": 1 if task.quick else 4, **options}
    return {**common, "iterations": task.sizes.iterations, "sample_every": 1000, **options}


def train_alone(trainer: str, options: dict) -> dict:
    """Run a trainer in a fresh process; returns what it took: {"seconds", "megabytes"}."""
    return run_apart(trainer, ["-m", "minirlhf.lab.siblings", trainer, json.dumps(options)])


def train_here(trainer: str, options: dict) -> None:
    """What the fresh process does; its last line of output has the figures."""
    leave_with_the_parent()
    module, config = TRAINERS[trainer]
    started = time.process_time()                        # of its one thread, whatever else runs
    module.main(config(**options))
    figures = {"seconds": time.process_time() - started}
    if peak_memory() is not None:
        figures["megabytes"] = peak_memory() / 1e6
    print(json.dumps(figures))


# ---- figures -------------------------------------------------------------------------------------

def sampled_tokens(trainer: str, folder: str) -> float:
    """Response tokens that were sampled in a training run."""
    if trainer == "dpo":
        return 0.0
    rows = read_metrics(folder)
    if trainer == "ppo":
        return sum(row["response_len"] for row in rows) * ppo.PPOConfig.batch_size
    return rows[-1]["sampled_tokens"]


def best_of_sft(task: Task, reward: str) -> dict[str, float]:
    """Figures of the best of N answers of the SFT model: expected ones, from 4 N drawn answers."""
    policy, tokenizer = load_policy(sft_folder(task))
    prompts = held_out(task, tokenizer, policy.config.n_positions)
    answers = sample_answers(policy, tokenizer, prompts, 4 * N, seed=task.seed, stream=1)
    values = {**gold_figures(answers), "length": answers.lengths}        # (P, 4N) each
    scores = judge_answers(answers, load_reward(reward, "min", tokenizer), tokenizer)
    values["score"] = scores = one_score_per_response(answers, scores)              # (P, 4N)
    others = sft_answers(task)[1]["gold"][:, None, :]                               # (P, 1, K)
    margins = values["gold"][:, :, None] - others                                   # (P, 4N, K)
    values["win_rate"] = ((margins > 0) + 0.5 * (margins == 0)).mean(axis=2)        # (P, 4N)
    means = {name: float(np.mean([best_of_n(s, v, N) for s, v in zip(scores, of_name)]))
             for name, of_name in values.items()}
    means["kl_ref"] = float(np.mean([best_of_n_kl([tuple(ids) for ids in drawn], s, N)
                                     for drawn, s in zip(answers.responses, scores)]))
    return {**means, "answer_tokens": N * float(answers.lengths.mean())}


def run(task: Task) -> dict:
    """Train the arm, if there is anything to train, and measure it."""
    trainer, options = ARMS[task.arm]
    reward, folder = both_reward_models(task), sft_folder(task)
    if task.arm == "best of 4":
        return best_of_sft(task, reward)
    cost = {}
    if trainer:
        folder = os.path.join(task.folder, trainer)
        cost = train_alone(trainer, options_of(task, trainer, folder, options))
        cost["kilotokens"] = sampled_tokens(trainer, folder) / 1000
    if trainer == "dpo" and options["loss"] != "ipo_mean":       # whose log-ratios are per token
        cost["chosen_logratio"] = read_metrics(folder)[-1]["held_out_chosen_logratio"]
    figures = measure(task, folder, reward)
    return {**figures, **cost, "answer_tokens": figures["length"]}


def findings(rows: Rows) -> list[Finding]:
    """The three parts of the claim, and what a reader asks next."""
    return [unchanged(rows, "RLOO's gold is PPO's to within 0.25 points", ("RLOO", "gold"),
                      ("PPO", "gold"), 0.25),
            compare(rows, "DPO has less gold than PPO", ("DPO", "gold"), "<", ("PPO", "gold")),
            compare(rows, "SFT on the best of four has more gold than on random ones",
                    ("rejection", "gold"), ">", ("random ones", "gold"))]


def picture(rows: Rows, path: str) -> None:
    """Gold, win rate and facts of every arm; gold against KL, time and memory of the trainers."""
    figure, axes = new_picture(6)
    trained = [arm for arm, (trainer, _) in ARMS.items() if trainer]
    for panel, name in zip(axes, ("gold", "win_rate", "fully_right")):
        show_intervals(panel, rows, name)
    show_points(axes[3], rows, "kl_ref", "gold", "gold against KL", "KL, nats per response",
                "gold, points per response")
    for panel, name in zip(axes[4:], ("seconds", "megabytes")):
        show_intervals(panel, rows, name, unit=ABOUT.units[name], arms=trained)
    save_picture(figure, path)


if __name__ == "__main__":
    with one_sentence():
        train_here(sys.argv[1], json.loads(sys.argv[2]))
