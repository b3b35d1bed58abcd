"""Pictures of experiments: figures of arms with their intervals, and curves with bands over seeds.

One axis per unit. A picture is 1200 pixels wide with three panels in a row, on white.
"""

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minirlhf import plots
from minirlhf.files.disk import write_atomically
from minirlhf.lab.experiment import Rows, mean_and_interval, values_of
from minirlhf.lab.measure import UNITS

COLOURS = (*plots.COLOURS, "#000000", "#56B4E9", "#E69F00")    # of the same scheme
MARKS, STYLES = "osD^vPX", ("-", "--", "-.", ":", "-", "--", "-.")


def new_picture(panels: int) -> tuple[Figure, list[Axes]]:
    """An empty picture with so many panels, three to a row."""
    lines = -(-panels // 3)
    figure = Figure(figsize=(12, 3.6 * lines), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)                              # draws without a screen
    axes = [figure.add_subplot(lines, min(3, panels), i + 1) for i in range(panels)]
    for one in axes:
        one.grid(color="#E2E2E2", linewidth=0.7)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def name_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Title and labels; where lines or points have names, a legend below: it must hide none."""
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = 1 if max(map(len, names)) > 21 else 2
        axes.legend(fontsize=8, frameon=False, ncols=columns, borderaxespad=0,
                    loc="upper center", bbox_to_anchor=(0.5, -0.24))


def interval_of(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the 95 % interval's distance below and above it; of one seed none, so 0."""
    mean, low, high = mean_and_interval(values)
    return (mean, mean - low, high - mean) if len(values) > 1 else (mean, 0.0, 0.0)


def show_intervals(axes: Axes, rows: Rows, figure: str, title: str = "", unit: str = "",
                   arms: list[str] | None = None) -> None:
    """One figure of every arm: a point for each seed, a bar from low to high, a mark at the mean.

    The unit of a figure of `measure` is known.
    """
    arms = list(rows) if arms is None else arms
    for height, arm in enumerate(arms):
        values = values_of(rows, arm, figure)
        mean, below, above = interval_of(values)
        axes.plot(values, [height] * len(values), ".", color="#222222", markersize=4, zorder=3)
        axes.errorbar([mean], [height], xerr=[[below], [above]], fmt="o", color=COLOURS[0],
                      capsize=3, markersize=5)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(len(arms) - 0.5, -0.5)                 # the first arm on top
    name_axes(axes, title or figure, f"{figure}, {unit or UNITS[figure]}", "")


def show_series(axes: Axes, rows: Rows, name: str, title: str, x_label: str, y_label: str,
                arms: list[str] | None = None) -> None:
    """A series of some arms: the mean over seeds as a line, its 95 % interval as a band."""
    for number, arm in enumerate(list(rows) if arms is None else arms):
        points = list(zip(*(row[name] for row in rows[arm])))        # per step, one for each seed
        found = [interval_of(list(values)) for values in points]
        means = [mean for mean, _, _ in found]
        steps, style = range(len(points)), number % len(COLOURS)
        axes.plot(steps, means, STYLES[style], color=COLOURS[style], label=arm, linewidth=1.8)
        axes.fill_between(steps, [mean - below for mean, below, _ in found],
                          [mean + above for mean, _, above in found], color=COLOURS[style],
                          alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    name_axes(axes, title, x_label, y_label)


def show_points(axes: Axes, rows: Rows, x: str, y: str, title: str, x_label: str, y_label: str,
                arms: list[str] | None = None) -> None:
    """One figure against another: the mean of every arm with the intervals of both.

    From the eighth arm on the marks are hollow, because the colours begin again.
    """
    for number, arm in enumerate(list(rows) if arms is None else arms):
        across, left, right = interval_of(values_of(rows, arm, x))
        up, below, above = interval_of(values_of(rows, arm, y))
        axes.errorbar([across], [up], xerr=[[left], [right]], yerr=[[below], [above]], label=arm,
                      fmt=MARKS[number % len(MARKS)], color=COLOURS[number % len(COLOURS)],
                      capsize=2, markersize=5,
                      markerfacecolor="white" if number >= len(COLOURS) else None)
    name_axes(axes, title, x_label, y_label)


def mean_series(rows: Rows, arm: str, name: str) -> list[float]:
    """A series of one arm, averaged over seeds step by step."""
    return [sum(values) / len(values) for values in zip(*(row[name] for row in rows[arm]))]


def save_picture(figure: Figure, path: str) -> None:
    """Write it as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_atomically(path, buffer.getvalue())
