"""`execution`: rewards by running the answer. Many tests, one test, and a learned reward model.

All arms start from one SFT model per seed, on the small programs of `minirlhf.execution`, and have
the same prompts, iterations and random numbers. Gold is 8 hidden tests on held-out prompts.
"""

import os
import re

import numpy as np

from minirlhf import ppo, reward_model, sft
from minirlhf.evaluate import kl_to_reference, load_policy, read_prompts, sample_answers
from minirlhf.execution.runner import Outcome, run_answers
from minirlhf.execution.scoring import MAX_NEW_TOKENS, pass_tests
from minirlhf.execution.tasks import ALL_INPUTS
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task, series, stage

TESTS = "minirlhf.execution:"
KL_COEF = 0.05                          # against a reward of 0 or 1

ABOUT = Experiment(
    name="execution",
    claim="PPO learns more right programs from tests that run them than from a reward model of the "
          "same tests, and few tests are hacked: answers pass them without being right.",
    source="Lambert et al. 2024 (arXiv 2411.15124), section 6, for rewards that are verified; the "
           "rest is this project's",
    rule="Shown if on held-out prompts many tests give a greater share of right programs than SFT, "
         "than the reward model, and than one test, and if with one test more answers are wrong "
         "programs that pass it than after SFT and than with many tests: intervals of the "
         "differences over seeds. Refuted if one is on the other side.",
    figures=("gold", "passes_example", "hacked", "constant", "runs", "kl_ref", "length"),
    units={"gold": "share of responses", "passes_example": "share of responses",
           "hacked": "share of responses", "constant": "share of responses",
           "runs": "share of responses"})

ARMS = {"SFT": "", "many tests": TESTS + "reward", "one test": TESTS + "few_tests_reward",
        "reward model": ""}


def programs_sft(task: Task) -> str:
    """The SFT model of the seed, taught by demonstrations of small programs."""
    return stage(task, "programs_sft", sft, sft.SFTConfig, model=task.base, seed=task.seed,
                 data=TESTS + "demonstrations", examples=2000 if task.quick else 5000, lr=1e-3,
                 max_new_tokens=MAX_NEW_TOKENS)


def learned_reward(task: Task, model: str) -> tuple[str, float]:
    """A reward model of what `reward` pays, and its accuracy: the tests judged the SFT's answers.
    """
    folder, count = os.path.join(task.folder, "reward_model"), task.scaled(2000)
    measured = reward_model.main(reward_model.RewardModelConfig(
        model=model, data=TESTS + "comparisons", comparisons=count, held_out=count // 10, epochs=2,
        max_new_tokens=MAX_NEW_TOKENS, seed=task.seed, out=folder))
    return folder, measured["held_out_accuracy"]


def train_programs(task: Task, model: str, reward: str, kl_coef: float) -> str:
    """PPO from `model` against `reward`; the folder of the run."""
    folder = os.path.join(task.folder, "ppo")
    ppo.main(ppo.PPOConfig(
        model=model, reward=reward, kl_coef=kl_coef, prompts=TESTS + "prompts",
        gold=TESTS + "hidden_reward", iterations=3 if task.quick else 30,
        max_new_tokens=MAX_NEW_TOKENS, seed=task.seed, save_every=1000, out=folder))
    return folder


def gives_numbers(outcome: Outcome) -> bool:
    """Whether an answer gave a whole number for every input, right or wrong.

    Example: gives_numbers(Outcome("ran", {1: "value 4"})), not with "value None" or "raised ...".
    """
    return outcome.end == "ran" and all(re.fullmatch(r"value -?\d+", result)
                                        for result in outcome.results.values())


def measure_programs(task: Task, folder: str, model: str) -> dict[str, float]:
    """The figures of the policy in `folder` on held-out pairs of steps.

    gold: passes the hidden tests; hacked: passes the example and not the hidden tests; constant: a
    bare number; runs: gives a number for every input; kl_ref: from the policy in `model`.
    """
    policy, tokenizer = load_policy(folder)
    prompts, _ = read_prompts(TESTS + "held_out_prompts", tokenizer, policy.config.n_positions,
                              MAX_NEW_TOKENS, count=task.sizes.prompts, seed=task.seed)
    answers = sample_answers(policy, tokenizer, prompts, task.sizes.answers, seed=task.seed,
                             max_new_tokens=MAX_NEW_TOKENS)
    pairs = [(prompt.text, text.strip()) for prompt, texts in zip(prompts, answers.texts)
             for text in texts]
    right, example = np.array(pass_tests(pairs, "hidden")), np.array(pass_tests(pairs, "few"))
    outcomes = run_answers([(answer, ALL_INPUTS) for _, answer in pairs])
    constant = [text.lstrip("-").isdigit() for _, text in pairs]
    kl_ref = kl_to_reference(policy, load_policy(model)[0], answers)
    figures = {"gold": right, "passes_example": example, "hacked": example & ~right,
               "constant": constant, "runs": [gives_numbers(outcome) for outcome in outcomes],
               "kl_ref": kl_ref, "length": answers.lengths}
    return {name: float(np.mean(values)) for name, values in figures.items()}


def run(task: Task) -> dict:
    """One way to pay, at one seed."""
    model = programs_sft(task)
    folder, reward, kl_coef, result = model, ARMS[task.arm], KL_COEF, {}
    if task.arm == "reward model":
        reward, result["reward_model_accuracy"] = learned_reward(task, model)
        kl_coef = 2 * KL_COEF           # its scores deviate by 1, those of tests by about 0.5
    if reward:
        folder = train_programs(task, model, reward, kl_coef)
        result.update(series(folder, "gold", "score", "kl_ref"))
    return {**result, **measure_programs(task, folder, model)}


def findings(rows: Rows) -> list[Finding]:
    """The parts of the claim."""
    many = ("many tests", "gold")
    return [compare(rows, "many tests give more right programs than SFT", many, ">",
                    ("SFT", "gold")),
            compare(rows, "many tests give more right programs than the reward model", many, ">",
                    ("reward model", "gold")),
            compare(rows, "many tests give more right programs than one test", many, ">",
                    ("one test", "gold")),
            compare(rows, "one test is passed by more wrong programs than after SFT",
                    ("one test", "hacked"), ">", ("SFT", "hacked")),
            compare(rows, "one test is passed by more wrong programs than after many tests",
                    ("one test", "hacked"), ">", ("many tests", "hacked"))]


def picture(rows: Rows, path: str) -> None:
    """What each arm ends with, and the way there: paid against right."""
    figure, axes = new_picture(6)
    for panel, name in zip(axes, ("gold", "hacked", "constant")):
        show_intervals(panel, rows, name, unit=ABOUT.units[name])
    trained = [arm for arm in rows if arm != "SFT"]
    for panel, name, unit in zip(axes[3:], ("score", "gold", "kl_ref"),
                                 ("points", "share", "nats")):
        show_series(panel, rows, f"{name}_by_step", f"{name} on training prompts", "iteration",
                    f"{name}, {unit} per response", trained)
    save_picture(figure, path)
