"""An experiment that trains nothing, for the tests of the laboratory; workers import it by name.

The variables TINY_FAILS, TINY_DIES and TINY_WAITS name an arm that does so.
"""

import os
import time

from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task

ABOUT = Experiment(name="tiny_experiment", claim="Two is more than one.", source="everybody",
                   rule="Shown if it is.", figures=("gold", "missing"))
ARMS = {"one": 1.0, "two / two": 2.0}


def run(task: Task) -> dict:
    print("work of", task)
    with open(os.path.join(task.out, "calls.txt"), "a", encoding="utf-8") as file:
        file.write(f"{task}\n")
    if os.environ.get("TINY_FAILS") == task.arm:
        raise ValueError("the data were\neaten")
    if os.environ.get("TINY_DIES") == task.arm:
        os._exit(9)
    if os.environ.get("TINY_WAITS") == task.arm:
        time.sleep(100)
    gold = ARMS[task.arm] + 0.01 * task.seed ** 2
    return {"gold": gold, "gold_by_step": [0.0, gold / 2, gold]}


def findings(rows: Rows) -> list[Finding]:
    return [compare(rows, "two is more", ("two / two", "gold"), ">", ("one", "gold"), by=0.5)]


def picture(rows: Rows, path: str) -> None:
    figure, axes = new_picture(2)
    show_intervals(axes[0], rows, "gold")
    show_series(axes[1], rows, "gold_by_step", "gold", "step", "points")
    save_picture(figure, path)
