"""What `reviews.py` measures: accuracies on pairs of real sentences, and what PPO changed.

Choices:
 1. The baseline knows only words: a word's rating is the mean over the sentences that it occurs in,
    pulled towards 0 where they are few; a sentence scores the mean over its words.
 2. Intervals are 95 % bootstraps: of accuracies over sentences (pairs that share a sentence are not
    independent), of mean scores over prompts.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from minirlhf.data import encode_prompt, encode_response, format_prompt, pad, read_prompts
from minirlhf.evaluate import (
    cell,
    interval,
    judge_answers,
    kl_to_reference,
    load_policy,
    sample_answers,
)
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import ScalarModel
from minirlhf.rewards import load_reward
from minirlhf.tokenizer import Tokenizer

FREE = "..."                    # the prompt of a sentence whose beginning few others share


@dataclass(frozen=True)
class Sentence:
    """A rated sentence. `opening` and `rest` are the prompt and the response that it serves as."""
    text: str
    rating: float                       # mean of people's ratings, -4 to 4
    opening: str = ""
    rest: str = ""


@dataclass(frozen=True)
class Pair:
    """Two sentences with one opening; people rated `better` clearly above `worse`."""
    better: Sentence
    worse: Sentence


# ---- the baseline --------------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    """Lower-case words: words_of("It's a joy!") == ["it's", "a", "joy"]."""
    return re.findall(r"[\w']+", text.lower())


def word_ratings(sentences: list[Sentence], pull: float = 5.0) -> dict[str, float]:
    """Every word's sum of ratings of the sentences that it is in, over their number plus `pull`.

    Example: "good fun" rated 3 and "good grief" rated -1, pull 0: good 1, fun 3, grief -1; with
    pull 2, good is 2 / 4 = 0.5.
    """
    sums, counts = Counter(), Counter()
    for sentence in sentences:
        for word in set(words_of(sentence.text)):
            sums[word] += sentence.rating
            counts[word] += 1
    return {word: sums[word] / (counts[word] + pull) for word in counts}


def word_score(table: dict[str, float], text: str) -> float:
    """Mean of the words' ratings; unknown ones count as 0.

    Example: good 1 and fun 3 give "Good, good fun" (1 + 1 + 3) / 3.
    """
    words = words_of(text)
    return sum(table.get(word, 0.0) for word in words) / max(1, len(words))


# ---- accuracies ----------------------------------------------------------------------------------

def outcomes(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1 where the better sentence scores higher, 0 where lower, 0.5 for a tie. (N,) each."""
    return (better > worse) + 0.5 * (better == worse)


def pair_figures(right: np.ndarray, pairs: list[Pair], seed: int) -> dict[str, float]:
    """Accuracy over pairs with its interval over sentences: {"mean", "low", "high"}.

    right (N,): 1, 0 or 0.5 for a tie. A resample draws sentences with replacement; a pair counts as
    often as its two sentences were drawn together: the product of their numbers.
    """
    number = {}
    for pair in pairs:
        for sentence in (pair.better, pair.worse):
            number.setdefault(sentence, len(number))
    better = np.array([number[pair.better] for pair in pairs])                      # (N,)
    worse = np.array([number[pair.worse] for pair in pairs])                        # (N,)
    stream, means = np.random.default_rng(seed), []
    for _ in range(1000):
        drawn = np.bincount(stream.integers(len(number), size=len(number)), minlength=len(number))
        weights = drawn[better] * drawn[worse]                                      # (N,)
        if weights.sum() > 0:
            means.append((weights * right).sum() / weights.sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": float(right.mean()), "low": float(low), "high": float(high)}


def sentence_scores(model: ScalarModel, tokenizer: Tokenizer,
                    sentences: list[Sentence]) -> dict[Sentence, float]:
    """A reward model's score of real sentences; those longer than its context are left out."""
    rows = {sentence: encode_prompt(tokenizer, format_prompt(sentence.opening))
            + encode_response(tokenizer, sentence.rest) for sentence in sentences}
    kept = [s for s in rows if len(rows[s]) <= model.config.n_positions]
    scores = {}
    with torch.no_grad():
        for first in range(0, len(kept), 64):
            batch = kept[first:first + 64]
            ids, lengths = pad([rows[sentence] for sentence in batch], tokenizer.end_token)
            scores.update(zip(batch, model.score(ids, lengths).tolist()))
    return scores


def measure_pairs(parts: dict[str, list[Sentence]], pairs: list[Pair], folder: str,
                  seed: int) -> tuple[dict, dict]:
    """Accuracies on the test pairs; what A and B give to badly and well rated test sentences."""
    scorers = {"longer is better": {s: float(len(s.text)) for s in parts["test"]}}
    for name in ("a", "b"):
        table = word_ratings(parts[name])
        scorers[f"words {name.upper()}"] = {s: word_score(table, s.text) for s in parts["test"]}
    scale = {}
    for name in ("a", "b"):
        stage = os.path.join(folder, f"reward_model_{name}")
        scores = sentence_scores(load_network(ScalarModel, stage), Tokenizer.load(stage),
                                 parts["test"])
        scorers[f"reward model {name.upper()}"] = scores
        scale[name.upper()] = {
            "rated below -1": float(np.mean([scores[s] for s in scores if s.rating < -1])),
            "rated above 1": float(np.mean([scores[s] for s in scores if s.rating > 1]))}
    fits = [pair for pair in pairs if pair.better in scores and pair.worse in scores]
    accuracies = {"pairs": len(fits), "left out as too long": len(pairs) - len(fits)}
    for name, scores in scorers.items():
        right = outcomes(np.array([scores[pair.better] for pair in fits]),
                         np.array([scores[pair.worse] for pair in fits]))           # (N,)
        accuracies[name] = pair_figures(right, fits, seed)
    return accuracies, scale


# ---- policies ------------------------------------------------------------------------------------

def whole(opening: str, response: str) -> str:
    """The sentence that prompt and response make."""
    return response if opening == FREE else f"{opening} {response}"


def measure_policies(parts: dict[str, list[Sentence]], folder: str, seed: int, count: int,
                     max_new_tokens: int) -> dict:
    """Fresh responses of the SFT model and of PPO's policy to `count` held-out openings."""
    table = word_ratings(parts["b"])
    ref_policy, tokenizer = load_policy(os.path.join(folder, "sft"))
    prompts, _ = read_prompts(os.path.join(folder, "held_out_prompts.jsonl"), tokenizer,
                              ref_policy.config.n_positions, max_new_tokens, count=0, seed=seed)
    openings = [sentence.opening for sentence in parts["test"][:count]]
    policies, figures = {}, {}
    for stream, name in enumerate(("sft", "ppo")):
        policy, _ = load_policy(os.path.join(folder, name), tokenizer)
        answers = sample_answers(policy, tokenizer, prompts, 1, max_new_tokens=max_new_tokens,
                                 seed=seed, stream=stream)
        texts = [whole(opening, row[0]) for opening, row in zip(openings, answers.texts)]
        values = {"words B": np.array([word_score(table, text) for text in texts])}     # (P,) each
        for judge in ("a", "b"):
            reward = load_reward(os.path.join(folder, f"reward_model_{judge}"), "mean", tokenizer)
            scores = judge_answers(answers, reward, tokenizer)                      # (P, 1)
            values[f"score of {judge.upper()}"] = scores[:, 0]
        values["kl_ref"] = kl_to_reference(policy, ref_policy, answers)[:, 0]
        values["length"] = answers.lengths[:, 0].astype(float)
        values["end_rate"] = answers.ended[:, 0].astype(float)
        words = [word for text in texts for word in words_of(text)]
        policies[name] = {key: interval(value, seed) for key, value in values.items()}
        policies[name]["different words"] = len(set(words)) / len(words)
        policies[name]["texts"], figures[name] = texts, values
    policies["change"] = {key: interval(figures["ppo"][key] - figures["sft"][key], seed)
                          for key in figures["sft"]}
    return policies


# ---- the report ----------------------------------------------------------------------------------

def print_report(report: dict, samples: int = 6) -> None:
    """The accuracies, the scores before and after PPO, and sentences side by side."""
    accuracies, policies = report["accuracy"], report["policies"]
    before, after, change = policies["sft"], policies["ppo"], policies["change"]
    print(f"\naccuracy on {accuracies['pairs']} pairs of held-out sentences (chance 0.50)")
    for name, figure in accuracies.items():
        if isinstance(figure, dict):
            print(f"  {name:18} {cell(figure)}")
    print(f"\n{len(before['texts'])} fresh sentences of each policy, to held-out openings\n"
          f"  {'':18} {'SFT':23} {'after PPO':23} change")
    for name in change:
        print(f"  {name:18} {cell(before[name]):23} {cell(after[name]):23} {cell(change[name])}")
    print(f"  {'different words':18} {before['different words']:<23.2f} "
          f"{after['different words']:.2f}")
    print("\nfor scale, what real held-out sentences score")
    for name, scores in report["scale"].items():
        cells = ", ".join(f"{rated} {score:.2f}" for rated, score in scores.items())
        print(f"  by {name}: {cells}")
    print("\nSFT | after PPO")
    for left, right in list(zip(before["texts"], after["texts"]))[:samples]:
        print(f"  {left}\n      | {right}")
