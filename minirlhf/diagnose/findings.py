"""What a diagnosis is made of: findings, the examinations that make them, and small statistics.

A row is a dictionary from the names of metrics.csv to numbers; empty cells are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One illness that a run has, as it is told to the reader."""
    illness: str
    figure: str                         # the numbers that show it, with their iteration or step
    causes: tuple[str, ...]             # the likeliest first
    remedies: tuple[str, ...]           # what to try, in this order
    lecture: str                        # file and section


@dataclass(frozen=True)
class Examination:
    """One illness that is looked for in one kind of run."""
    illness: str                        # the finding's name
    function: Callable                  # rows -> Finding or None; rows, options if `asks_options`
    columns: tuple[str, ...]            # that a verdict needs; the first one is shown
    rows: int                           # rows (or evaluations) that a verdict needs
    healthy: str                        # said if nothing was found
    other: str = ""                     # another name under which the finding may be told
    asks_options: bool = False          # whether the function also takes the run's options


# ---- small statistics ----------------------------------------------------------------------------

def mean(values: list[float]) -> float:
    """Example: mean([1, 2, 6]) == 3."""
    return sum(values) / len(values)


def values_of(rows: list[dict], name: str) -> list[float]:
    """A column without its empty cells."""
    return [row[name] for row in rows if name in row]


def late(rows: list[dict]) -> list[dict]:
    """The last quarter of the rows, at least three: single rows are noisy.

    Example: of 25 rows the last 6, of 4 rows the last 3.
    """
    return rows[-max(3, len(rows) // 4):]


def smooth(values: list[float]) -> list[float]:
    """Mean of each value and its two neighbours; the ends have one neighbour.

    Example: smooth([0, 3, 6, 0]) == [1.5, 3, 3, 3].
    """
    return [mean(values[max(0, i - 1):i + 2]) for i in range(len(values))]


def place(rows: list[dict]) -> str:
    """Where rows stand in the run: "iteration 24", or "iterations 18 to 24"."""
    unit = "iteration" if "iteration" in rows[0] else "step"
    first, last = int(rows[0][unit]), int(rows[-1][unit])
    return f"{unit} {first}" if first == last else f"{unit}s {first} to {last}"
