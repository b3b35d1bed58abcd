"""How good a policy is: the same figures for every arm, on prompts that no stage trained on."""

import json
import os

import numpy as np

from minirlhf.data import Prompt, encode_prompt, encode_response, format_prompt
from minirlhf.evaluate import (
    Answers,
    describe,
    gold_figures,
    judge_answers,
    kl_to_reference,
    load_policy,
    read_prompts,
    sample_answers,
)
from minirlhf.files.disk import read_json, write_atomically
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import ScalarModel
from minirlhf.lab.shared import Task, alone, comparisons_file, read_comparisons, sft_folder
from minirlhf.reward_model import Comparison, RewardModelConfig, accuracy, held_out_scores
from minirlhf.rewards import load_reward
from minirlhf.tokenizer import Tokenizer, load_tokenizer

UNITS = {"gold": "points per response", "score": "points per response",
         "win_rate": "share of pairs", "kl_ref": "nats per response", "length": "tokens",
         "distinct": "share of responses", "fully_right": "share of responses",
         "answered": "share of responses", "end_rate": "share of responses"}


def held_out(task: Task, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """The held-out prompts of the seed."""
    prompts, _ = read_prompts("minirlhf.world:held_out_prompts", tokenizer, context, 32,
                              count=task.sizes.prompts, seed=task.seed)
    return prompts


def draw_answers(task: Task, folder: str, stream: int = 1) -> tuple[Answers, dict]:
    """Answers of the policy in `folder` to the held-out prompts of the seed, and what gold says.

    Another `stream` gives other answers; `sft_answers` has stream 0.
    """
    policy, tokenizer = load_policy(folder)
    prompts = held_out(task, tokenizer, policy.config.n_positions)
    answers = sample_answers(policy, tokenizer, prompts, task.sizes.answers, seed=task.seed,
                             stream=stream)
    return answers, gold_figures(answers)


def keep_sft_answers(task: Task, name: str, prompts: list[Prompt], count: int) -> Answers:
    """`count` answers of the SFT model to each prompt, drawn once per seed and kept as `name`."""
    policy, tokenizer = load_policy(sft_folder(task))
    path = os.path.join(task.shared, f"{name}.json")
    with alone(path + ".lock"):
        if not os.path.exists(path):
            drawn = sample_answers(policy, tokenizer, prompts, count, seed=task.seed, stream=0)
            text = json.dumps({"responses": drawn.responses, "ended": drawn.ended.tolist()})
            write_atomically(path, text.encode("utf-8"))
    kept = read_json(path)
    texts = [[tokenizer.decode(ids).strip() for ids in drawn] for drawn in kept["responses"]]
    lengths = np.array([[len(ids) for ids in drawn] for drawn in kept["responses"]])    # (P, K)
    return Answers(prompts, kept["responses"], texts, lengths, np.array(kept["ended"]))


def sft_answers(task: Task) -> tuple[Answers, dict]:
    """Answers of the SFT model to the held-out prompts, and what gold says."""
    policy, tokenizer = load_policy(sft_folder(task))
    prompts = held_out(task, tokenizer, policy.config.n_positions)
    answers = keep_sft_answers(task, "sft_answers", prompts, task.sizes.answers)
    return answers, gold_figures(answers)


def scores_by(reward: str, answers: Answers) -> np.ndarray:
    """Scores (P, K) of answers by the reward model in the folder `reward`."""
    tokenizer = Tokenizer.load(reward)
    return judge_answers(answers, load_reward(reward, "min", tokenizer), tokenizer)


def describe_answers(task: Task, folder: str, answers: Answers, gold: dict, reward: str = "",
                     ensemble: str = "min", ref: str = "") -> dict[str, float]:
    """`measure` for answers of the policy in `folder` that are drawn already."""
    policy, tokenizer = load_policy(folder)
    figures = dict(gold)
    if reward:
        figures["score"] = judge_answers(answers, load_reward(reward, ensemble, tokenizer),
                                         tokenizer)
    figures["kl_ref"] = kl_to_reference(policy, load_policy(ref or sft_folder(task))[0], answers)
    report = describe(answers, figures, against=sft_answers(task)[1])
    means = {name: report[name] for name in UNITS if name in report}
    means["win_rate"] = report["win_rate"]["mean"]
    for kind, part in report["by_kind"].items():
        means[f"fully_right_{kind}"] = part["fully_right"]
    return means


def measure(task: Task, folder: str, reward: str = "", ensemble: str = "min",
            ref: str = "") -> dict[str, float]:
    """The figures of the policy in `folder`, the names of `UNITS`, as means over its answers.

    win_rate is over the SFT model by the gold judge, kl_ref from `ref` (the SFT model). `reward`
    names what PPO climbed; with it the figure `score` is that reward on the held-out prompts.
    fully_right_entity and fully_right_combination are of one kind of held-out prompts each.
    """
    answers, gold = draw_answers(task, folder)
    return describe_answers(task, folder, answers, gold, reward, ensemble, ref)


def gold_accuracy(task: Task, folder: str) -> float:
    """Share of comparisons that a reward model orders as the gold judge does.

    They are the last tenth of the seed's, of which no shared reward model has learned.
    """
    model = load_network(ScalarModel, folder)
    tokenizer = load_tokenizer(folder, model.transformer)
    records = read_comparisons(comparisons_file(task))[-(task.sizes.comparisons // 10):]
    rows = [Comparison(encode_prompt(tokenizer, format_prompt(record["prompt"])),
                       encode_response(tokenizer, record["chosen"]),
                       encode_response(tokenizer, record["rejected"])) for record in records]
    scores = held_out_scores(model, rows, RewardModelConfig(), tokenizer.end_token)     # (N, 2)
    return accuracy(scores[:, 0] - scores[:, 1])
