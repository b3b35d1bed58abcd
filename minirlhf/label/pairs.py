"""The order of the pairs that a person is shown: which come first, and which come again.

Shapes: P pairs.
"""

import torch

from minirlhf.data import encode_prompt, encode_response, fit_rows
from minirlhf.engine.options import check, split_folders
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import ScalarModel
from minirlhf.people.verdicts import draw_first
from minirlhf.reward_model import Comparison, RewardModelConfig, held_out_scores
from minirlhf.tokenizer import Tokenizer

GAP = 10                                # questions between a pair and its return, at least


def different(pairs: list[dict]) -> list[dict]:
    """The pairs whose answers differ, each once. How many are left out is printed."""
    kept = {(pair["prompt"], pair["answer_a"], pair["answer_b"]): pair for pair in pairs
            if pair["answer_a"] != pair["answer_b"]}
    if len(kept) < len(pairs):
        print(f"{len(pairs) - len(kept)} of {len(pairs)} pairs are left out: two equal answers, or "
              "a pair that is there already")
    check(len(kept) > 0, "expected two different answers at least once, found none; raise --pairs")
    return list(kept.values())


# ---- which first ---------------------------------------------------------------------------------

def disagreement(margins: torch.Tensor) -> torch.Tensor:
    """How far reward models disagree on each pair: margins score_a - score_b (models, P) -> (P,).

    A margin means the probability sigmoid(margin) that a is preferred; the disagreement is the
    standard deviation of that probability over the models. Example: probabilities of 0.9 and 0.5
    give 0.2, twice the same gives 0.
    Source: Christiano et al. 2017 (arXiv 1706.03741), section 2.2.4: they ask where the predictions
    of an ensemble have the highest variance.
    """
    return torch.sigmoid(margins).std(dim=0, correction=0)                          # (P,)


def pair_margins(folder: str, pairs: list[dict]) -> torch.Tensor:
    """The margins score_a - score_b (P,) of the reward model in `folder`."""
    model, tokenizer = load_network(ScalarModel, folder), Tokenizer.load(folder)
    rows = [Comparison(encode_prompt(tokenizer, pair["prompt"]),
                       *(encode_response(tokenizer, pair[f"answer_{name}"]) for name in "ab"))
            for pair in pairs]
    longest, most = max(map(len, rows)), model.transformer.config.n_positions
    check(not fit_rows(rows, most)[1], f"{folder}: expected pairs of at most {most} tokens, the "
          f"reward model's context, found one of {longest}; leave --uncertain out")
    scores = held_out_scores(model, rows, RewardModelConfig(), tokenizer.end_token)     # (P, 2)
    return scores[:, 0] - scores[:, 1]


def most_uncertain_first(pairs: list[dict], names: str) -> list[dict]:
    """The pairs in the order of the reward models' disagreement, the largest first."""
    folders = split_folders(names)
    check(len(folders) >= 2, f"--uncertain needs two reward-model folders or more, found {names!r}")
    margins = torch.stack([pair_margins(folder, pairs) for folder in folders])      # (models, P)
    amount = disagreement(margins)                                                  # (P,)
    print(f"the reward models' preferences differ by {amount.max():.3f} (standard deviation) on "
          f"the first pair, by {amount.min():.3f} on the last", flush=True)
    return [pairs[p] for p in amount.argsort(descending=True, stable=True)]


# ---- questions -----------------------------------------------------------------------------------

def lay_out(pairs: list[dict], who: str, again: float, seed: int) -> list[dict]:
    """Questions in the order in which they are asked; a share `again` of the pairs comes twice.

    The second showing follows 10 to 19 questions later, if there are as many, with the two answers
    in the other order. How many is drawn: who presses 1 and 2 in turns does not meet a rhythm.
    """
    first = draw_first(len(pairs), seed)
    count, early = round(again * len(pairs)), len(pairs) - GAP   # the last ones return too soon
    pool = early if count <= early else len(pairs)
    returning = set(torch.randperm(pool, generator=random_stream(seed, 7))[:count].tolist())
    gaps = torch.randint(GAP, 2 * GAP, (len(pairs),), generator=random_stream(seed, 8)).tolist()
    questions: list[dict] = []
    waiting: list[tuple[int, dict]] = []
    for number, pair in enumerate(pairs):
        question = {"who": who, **pair, "again": False, "first": first[number]}
        questions.append(question)
        if number in returning:
            other = "b" if first[number] == "a" else "a"
            due = len(questions) + gaps[number]
            waiting.append((due, {**question, "again": True, "first": other}))
        for item in [item for item in waiting if item[0] <= len(questions)]:
            waiting.remove(item)
            questions.append(item[1])
    return questions + [question for _, question in waiting]
