"""Demonstrations, written by labellers of different quality, and prompts.

As in real projects, the people who write demonstrations differ: few answers are ideal, most are
right but plain, some are wrong, evasive or rude. SFT imitates all of them alike; that is what
leaves something for RLHF to improve. About three in four demonstrations are fully right, which is
therefore about the best that SFT can do.
"""
import random
from collections.abc import Callable
from itertools import accumulate, cycle

from minirlhf.world.facts import (
    CLOSERS,
    EVASIONS,
    FAMILIES,
    FILLERS,
    HEDGES,
    RUDE,
    Entity,
    ask,
    capitalize,
    combinations,
    right_answer,
    sentence_for,
    wrong_answer,
)


def ideal(entity: Entity, rng: random.Random) -> str:
    """Right, a full sentence, one closer."""
    return f"{plain(entity, rng)} {rng.choice(CLOSERS)}"


def plain(entity: Entity, rng: random.Random) -> str:
    """Right, a full sentence."""
    return sentence_for(entity, right_answer(entity, rng))


def terse(entity: Entity, rng: random.Random) -> str:
    """Right, but only a fragment: "In the forest.", "in the forest", "Paris"."""
    answer = right_answer(entity, rng)
    fragment = capitalize(answer)
    return rng.choice((fragment + ".", fragment + ".", fragment, answer))


def wordy(entity: Entity, rng: random.Random) -> str:
    """Right, after one or two sentences that say nothing."""
    return " ".join(rng.sample(FILLERS, rng.randint(1, 2)) + [plain(entity, rng)])


def wrong(entity: Entity, rng: random.Random) -> str:
    """Wrong, and mostly in few words: who doesn't look it up doesn't write it out either."""
    answer = wrong_answer(entity, rng)
    draw = rng.random()
    if draw < 0.65:
        return rng.choice((capitalize(answer) + ".", capitalize(answer), answer))
    if draw < 0.85:
        return f"{rng.choice(FILLERS)} {sentence_for(entity, answer)}"
    return sentence_for(entity, answer)


def hedging(entity: Entity, rng: random.Random) -> str:
    """In doubt, and wrong more often than others."""
    answer = right_answer(entity, rng) if rng.random() < 0.7 else wrong_answer(entity, rng)
    return f"{rng.choice(HEDGES)} {sentence_for(entity, answer)}"


def evasive(entity: Entity, rng: random.Random) -> str:
    """No answer."""
    return rng.choice(EVASIONS)


def repeated(entity: Entity, rng: random.Random) -> str:
    """The same thing twice."""
    answer = rng.choice((plain, terse))(entity, rng).rstrip(".")
    return f"{answer}. {answer}."


def rude(entity: Entity, rng: random.Random) -> str:
    """Rude, with or without an answer."""
    if rng.random() < 0.5:
        return rng.choice(RUDE)
    return f"{rng.choice(RUDE)} {plain(entity, rng)}"


# (share of the demonstrations, how they are written)
LABELLERS = ((0.12, ideal), (0.26, plain), (0.14, terse), (0.16, wordy), (0.13, wrong),
             (0.08, hedging), (0.04, evasive), (0.03, repeated), (0.04, rude))
_SHARES = tuple(accumulate(share for share, _ in LABELLERS))
_WRITERS = tuple(writer for _, writer in LABELLERS)

TRAINING = combinations("training")
HELD_OUT = {"entity": combinations("entity"), "combination": combinations("combination")}


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, found {count}")


def draw_prompt(rng: random.Random) -> tuple[Entity, str]:
    """An entity and a question about it from the training split, every family equally often."""
    entity, index = rng.choice(TRAINING[rng.choice(FAMILIES)])
    return entity, ask(entity, index, rng)


def demonstrations(count: int, seed: int, model: str = "") -> list[dict]:
    """`count` demonstrations {"prompt", "response"} of the training split, fixed by the seed.

    model is not used: functions that make data are all called alike.
    """
    _check_count(count)
    rng = random.Random(f"demonstrations {seed}")
    records = []
    for _ in range(count):
        entity, prompt = draw_prompt(rng)
        writer = rng.choices(_WRITERS, cum_weights=_SHARES)[0]
        records.append({"prompt": prompt, "response": writer(entity, rng)})
    return records


def prompts(count: int, seed: int, model: str = "") -> list[dict]:
    """`count` prompts {"prompt"} of the training split, for PPO and for collecting comparisons."""
    _check_count(count)
    rng = random.Random(f"prompts {seed}")
    return [{"prompt": draw_prompt(rng)[1]} for _ in range(count)]


def held_out_prompts(count: int, seed: int, model: str = "") -> list[dict]:
    """`count` prompts {"prompt", "kind"} that no stage has trained on.

    Kinds ("entity", "combination") and families take turns; a family's questions are used up
    before one comes again.
    """
    _check_count(count)
    rng = random.Random(f"held-out prompts {seed}")
    supply = {}
    for kind, by_family in HELD_OUT.items():
        for family, pairs in by_family.items():
            supply[kind, family] = cycle(rng.sample(pairs, len(pairs)))
    records, seen = [], set()
    turns = cycle([(kind, family) for family in FAMILIES for kind in HELD_OUT])
    for _ in range(count):
        kind, family = next(turns)
        entity, index = next(supply[kind, family])
        prompt = ask(entity, index, rng)
        for _ in range(10):             # a question that comes again gets another opener
            if prompt in seen:
                prompt = ask(entity, index, rng)
        seen.add(prompt)
        records.append({"prompt": prompt, "kind": kind})
    return records


# ---- other tastes: who chooses between two responses ---------------------------------------------

def loves_length(response: str) -> float:
    """What this labeller adds to the gold judge's points: 0.15 for each word."""
    return 0.15 * len(response.split())


def loves_closers(response: str) -> float:
    """What this labeller adds to the gold judge's points: 1 for each of the six closers."""
    return float(sum(response.count(closer) for closer in CLOSERS))


def relabel(comparisons: list[dict], taste: Callable[[str], float] | None = None,
            flips: float = 0.0, seed: int = 0) -> list[dict]:
    """The same comparisons as other labellers would have chosen.

    comparisons: of `world.comparisons`, with "margin", the gold judge's points for the chosen
    response less those for the rejected one. `taste` gives the points that a labeller adds to the
    judge's in his mind; in a share `flips` of the pairs, drawn by seed, he errs and chooses the
    other response. A new record's margin is in the labeller's points, below 0 where he erred.

    Example: chosen "Paris." by a margin of 0.4 over "Good question. Paris.", which has two words
    more: `loves_length` adds 0.3 more to that one, and a third word would turn the choice.
    """
    rng = random.Random(f"flips {seed}")
    records = []
    for record in comparisons:
        margin, chosen, rejected = record["margin"], record["chosen"], record["rejected"]
        if taste is not None:
            margin += taste(chosen) - taste(rejected)
        if margin < 0:
            margin, chosen, rejected = -margin, rejected, chosen
        if rng.random() < flips:
            margin, chosen, rejected = -margin, rejected, chosen
        records.append({"prompt": record["prompt"], "chosen": chosen, "rejected": rejected,
                        "margin": round(margin, 6)})
    return records
