"""What an experiment is, and when its claim counts as shown.

An experiment is a module with these names (`beta.py` is a short one):

    ABOUT      an `Experiment`: the claim, who makes it, and the rule, all stated beforehand
    ARMS       {name of an arm: what differs in it}, the control arm among them
    run(task)      one arm at one seed: a flat dict of figures; a list of numbers is a series
    findings(rows) the parts of the claim, each a `Finding` by `compare` or `unchanged`
    picture(rows, path)    draws what there is to see, by `pictures`

An arm's differences from another are taken seed by seed: both had the same SFT model, comparisons
and prompts, so that what a seed does to both cancels.
"""

import importlib
import math
from dataclasses import dataclass, field

from minirlhf.engine.options import check
from minirlhf.lab import EXPERIMENTS

SHOWN, REFUTED, UNDECIDED = "shown", "refuted", "not to be told apart"
FEWEST_SEEDS = 4                    # with fewer every finding is UNDECIDED

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom: 95 % lie between minus and plus
# it. Source: NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
               2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064,
               2.060, 2.056, 2.052, 2.048, 2.045, 2.042)

Rows = dict[str, list[dict]]        # arm -> what `run` returned, for each seed in order


@dataclass(frozen=True)
class Experiment:
    """What is stated before anything is measured."""
    name: str                           # as on the command line
    claim: str                          # one sentence
    source: str                         # who makes it
    rule: str                           # what must come out for "shown", and for "refuted"
    figures: tuple[str, ...]            # columns of the table, the most important first
    units: dict[str, str] = field(default_factory=dict)    # of figures of its own: name -> unit


@dataclass(frozen=True)
class Finding:
    """One part of a claim, and what the seeds say to it."""
    claim: str
    word: str                           # SHOWN, REFUTED or UNDECIDED
    mean: float                         # of the difference that the claim is about
    low: float                          # its 95 % interval over seeds
    high: float

    def __str__(self) -> str:
        interval = f"[{self.low:+.2f}, {self.high:+.2f}]" if math.isfinite(self.low) else "one seed"
        return f"{self.word}: {self.claim} (difference {self.mean:+.2f}, {interval})"


def load_experiment(name: str):
    """The module of an experiment: one of ours, or a module of yours that has the five names."""
    check(all(part.isidentifier() for part in name.split(".")), f"expected the name of an "
          f"experiment, found {name!r}; there are {', '.join(EXPERIMENTS)}")
    try:
        module = importlib.import_module(f"minirlhf.lab.{name}" if name in EXPERIMENTS else name)
    except ModuleNotFoundError as error:
        if error.name != name.split(".")[0]:
            raise                       # the module is there; something that it imports is not
        raise ValueError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}") from None
    missing = [needed for needed in ("ABOUT", "ARMS", "run", "findings", "picture")
               if not hasattr(module, needed)]
    check(not missing, f"{name} is no experiment: it has no {', '.join(missing)}")
    return module


# ---- statistics ----------------------------------------------------------------------------------

def mean_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean of one value per seed, and its 95 % interval by Student's t: (mean, low, high).

    One value has no interval: it is from minus to plus infinity.

    Example: 1, 2, 3, 4 have mean 2.5, deviation 1.291 and the interval 2.5 - 2.054 to 2.5 + 2.054.
    """
    count = len(values)
    check(count > 0, "expected the value of at least one seed, found none")
    mean = sum(values) / count
    if count == 1:
        return mean, -math.inf, math.inf
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = T_QUANTILES[min(count - 1, len(T_QUANTILES)) - 1]
    half = quantile * math.sqrt(variance / count)
    return mean, mean - half, mean + half


def values_of(rows: Rows, arm: str, figure: str) -> list[float]:
    """One figure of one arm at all seeds."""
    check(arm in rows, f"no arm {arm!r}; there are {', '.join(rows)}")
    missing = [seed for seed, row in enumerate(rows[arm]) if figure not in row]
    check(not missing, f"arm {arm!r} has no figure {figure!r}")
    return [row[figure] for row in rows[arm]]


def differences(rows: Rows, one: tuple[str, str], other: tuple[str, str] | float) -> list[float]:
    """Seed by seed, a figure of an arm minus another one: (arm, figure) each, or a number."""
    values = values_of(rows, *one)
    if isinstance(other, (int, float)):
        return [value - other for value in values]
    return [value - less for value, less in zip(values, values_of(rows, *other))]


def compare(rows: Rows, claim: str, one: tuple[str, str], sign: str,
            other: tuple[str, str] | float, by: float = 0.0) -> Finding:
    """Whether `one` is greater (sign ">") or less ("<") than `other`, by more than `by`.

    Shown if the whole 95 % interval of the paired differences over seeds is on the claimed side of
    `by`, refuted if all of it is on the other side, else not to be told apart; so, too, with fewer
    than 4 seeds.

    Example: gold .1 .2 .3 .2 of arm "a" and .6 .9 .7 .8 of "b": "a" < "b" is shown, because the
    differences -.5 -.7 -.4 -.6 have the interval -0.55 -+ 0.21.
    """
    check(sign in ("<", ">"), f"expected the sign < or >, found {sign!r}")
    found = differences(rows, one, other)
    mean, low, high = mean_and_interval(found)
    below, above = (high < -by, low > -by) if sign == "<" else (high < by, low > by)
    right, wrong = (below, above) if sign == "<" else (above, below)
    return Finding(claim, decide(len(found), right, wrong), mean, low, high)


def unchanged(rows: Rows, claim: str, one: tuple[str, str], other: tuple[str, str] | float,
              margin: float) -> Finding:
    """Whether `one` and `other` differ by less than `margin`, a size that would matter.

    Shown if the interval lies within -margin to +margin, refuted if it lies beyond 0 and its mean
    beyond the margin, else not to be told apart.
    """
    found = differences(rows, one, other)
    mean, low, high = mean_and_interval(found)
    right = -margin < low and high < margin
    wrong = (low > 0 or high < 0) and abs(mean) > margin
    return Finding(claim, decide(len(found), right, wrong), mean, low, high)


def decide(seeds: int, right: bool, wrong: bool) -> str:
    """The word for a part of a claim."""
    if seeds < FEWEST_SEEDS or right == wrong:
        return UNDECIDED
    return SHOWN if right else REFUTED


def verdict(found: list[Finding]) -> str:
    """The word for the whole claim: shown if all parts are, refuted if one is."""
    words = {finding.word for finding in found}
    if REFUTED in words:
        return REFUTED
    return SHOWN if words == {SHOWN} else UNDECIDED
