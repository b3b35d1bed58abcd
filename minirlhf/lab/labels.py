"""`labels`: how many labels of one person move the policy? 20 to 600 pairs, and random labels.

The person is a program with a taste that the gold judge does not have: short answers, and no
closing phrase. It sits at `python -m minirlhf.label`, blinded as a person is, and in one pair of
five it does not look and chooses at random.
"""

import os
import random

import numpy as np

from minirlhf import reward_model
from minirlhf.evaluate import Answers, win_rate
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.measure import draw_answers, scores_by, sft_answers
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task, series, sft_folder, train_policy
from minirlhf.label.__main__ import FILE, LabelConfig, few_labels
from minirlhf.label.__main__ import main as label
from minirlhf.people.verdicts import identity
from minirlhf.world.judge import CLOSER_TEXTS, SENTENCE, words_of

COUNTS = (20, 60, 200, 600)
CARELESS = 0.2                          # share of the verdicts that are a coin's

ABOUT = Experiment(
    name="labels",
    claim="Sixty labels of one person are enough to move the policy visibly towards that person's "
          "taste.",
    source="Christiano et al. 2017, abstract: about an hour of a person's time; Ziegler et al. "
           "2019, abstract: 5,000 comparisons for a style",
    rule="Shown if after 60 labels the policy's answers beat the SFT model's by the person's taste "
         "in more than 60 % of the pairs, and more often than after 60 random labels; and if the "
         "same holds of 600. Refuted if one interval is on the other side.",
    figures=("taste_win_rate", "words", "closers", "empty", "gold", "taste_accuracy",
             "self_agreement", "gold_agreement", "choices"),
    units={"taste_win_rate": "share of pairs", "words": "words per response",
           "closers": "share of responses", "empty": "share of responses"})

ARMS = {"SFT, no labels": (0, False),
        **{f"{count} labels": (count, False) for count in COUNTS},
        **{f"{count} random labels": (count, True) for count in COUNTS}}


# ---- the person ----------------------------------------------------------------------------------

def has_closer(text: str) -> bool:
    """Whether a sentence of the text is one of the world's closing phrases.

    Example: has_closer("Paris. Happy to help!") and not has_closer("Paris.").
    """
    return any(" ".join(words_of(sentence)) in CLOSER_TEXTS for sentence in SENTENCE.findall(text))


def taste(text: str) -> float:
    """How the person likes an answer: the shorter the better, closers cost, nothing is worst.

    Example: taste("Paris.") == -1, taste("It is Paris. Happy to help!") == -16, taste("") == -100.
    """
    words = words_of(text)
    return -len(words) - 10.0 * has_closer(text) if words else -100.0


def make_person(seed: int, at_random: bool):
    """The person as `label` asks: a function of the question that says a, b or tie."""
    def person(question: dict, done: int, total: int) -> str:
        """In the place of `verdicts.ask`."""
        draw = random.Random(f"{seed} {identity(question)}")
        a, b = taste(question["answer_a"]), taste(question["answer_b"])
        if at_random or draw.random() < CARELESS:
            return draw.choice("ab")
        return "tie" if a == b else "a" if a > b else "b"
    return person


# ---- figures -------------------------------------------------------------------------------------

def tastes(answers: Answers) -> np.ndarray:
    """The person's opinion of each answer, (P, K)."""
    return np.array([[taste(text) for text in texts] for texts in answers.texts])


def style(answers: Answers) -> dict[str, float]:
    """Mean number of words, and the shares of answers with a closer and without any word."""
    texts = [text for row in answers.texts for text in row]
    words = np.array([len(words_of(text)) for text in texts])                       # (P*K,)
    return {"words": float(words.mean()), "empty": float((words == 0).mean()),
            "closers": float(np.mean([has_closer(text) for text in texts]))}


def taste_accuracy(reward: str, answers: Answers) -> float:
    """How often a reward model orders two answers to one prompt as the person's taste does."""
    scores = scores_by(reward, answers)                                             # (P, K)
    likes = tastes(answers)                                                         # (P, K)
    right = np.sign(scores[:, :, None] - scores[:, None, :]) \
        == np.sign(likes[:, :, None] - likes[:, None, :])                           # (P, K, K)
    return float(right[likes[:, :, None] != likes[:, None, :]].mean())


# ---- one arm -------------------------------------------------------------------------------------

def learn_taste(task: Task, count: int, at_random: bool) -> tuple[str, dict]:
    """Label `count` pairs of the SFT model's answers and train on them: folder, and figures."""
    folder, sft = os.path.join(task.folder, "labels"), sft_folder(task)
    report = label(LabelConfig(answers="sampled", a=sft, b=sft, pairs=count, out=folder,
                               seed=task.seed), make_person(task.seed, at_random))
    out = os.path.join(task.folder, "reward_model")
    reward_model.main(reward_model.RewardModelConfig(
        model=sft, data=os.path.join(folder, FILE), comparisons=0, seed=task.seed, out=out,
        **few_labels(report["choices"])))
    return out, {"choices": report["choices"], "self_agreement": report["self"]["mean"],
                 "gold_agreement": report["gold"]["mean"]}


def run(task: Task) -> dict:
    """Label, train a reward model and a policy, and ask how the person likes its answers."""
    count, at_random = ARMS[task.arm]
    before, _ = sft_answers(task)
    folder, result = sft_folder(task), {}
    if count:
        count = min(count, 40) if task.quick else count
        reward, result = learn_taste(task, count, at_random)
        folder = train_policy(task, reward=reward, iterations=min(15, task.sizes.iterations))
        result.update(series(folder, "response_len"), taste_accuracy=taste_accuracy(reward, before))
    after, figures = draw_answers(task, folder)
    return {**result, **style(after), "gold": float(figures["gold"].mean()),
            "taste_win_rate": float(win_rate(tastes(before), tastes(after)).mean())}


# ---- what they say -------------------------------------------------------------------------------

def findings(rows: Rows) -> list[Finding]:
    """The parts of the claim."""
    found = []
    for count in (60, 600):
        arm, name = f"{count} labels", "taste_win_rate"
        found += [compare(rows, f"after {count} labels the person prefers the policy to the SFT "
                          "model in more than 60 % of the pairs", (arm, name), ">", 0.6),
                  compare(rows, f"and more often than after {count} random labels", (arm, name),
                          ">", (f"{count} random labels", name))]
    return found


def picture(rows: Rows, path: str) -> None:
    """Win rate by taste, words and gold of every arm, and length over the iterations."""
    figure, axes = new_picture(6)
    for panel, name in zip(axes, ("taste_win_rate", "words", "empty", "gold")):
        show_intervals(panel, rows, name, unit=ABOUT.units.get(name, ""))
    for panel, kind in zip(axes[4:], ("labels", "random labels")):
        show_series(panel, rows, "response_len_by_step", f"length with {kind}", "iteration",
                    "on training prompts, tokens", [f"{count} {kind}" for count in COUNTS])
    save_picture(figure, path)
