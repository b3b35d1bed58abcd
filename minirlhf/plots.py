"""Pictures of runs: curves, reliability and scores, from the files that a stage leaves.

    python -m minirlhf.plots
    python -m minirlhf.plots RUN_FOLDER... --out compared.png
    python -m minirlhf.plots --sft "" --reward_models "" --ppo seed0/ppo,seed1/ppo,seed2/ppo

In:  stage folders, finished or not; an empty name leaves a stage out. Runs of a stage share their
     panels. Three or more that differ only by their seed are one line, their mean, in a band from
     the lowest to the highest. Out: a PNG of 1200 pixels width, over no file of somebody else.

How to read the PPO panels: score is what PPO climbs, gold is what we want. While both rise, all is
well; where gold turns down and score does not, the policy fools its reward model. kl_ref says how
far it went for that, entropy how much variety is left, explained_var how much of the returns the
critic foresees, kl_old and clipfrac how far a single update moves.

How to read a reward model's: of the choices about which it is 80 % sure, 80 % should be right, so
its points should lie on the diagonal; and the scores of chosen responses should lie to the right of
those of rejected ones. Both are of held-out comparisons, at the end of the training, and before the
scores are normalised.

Lecture: lectures/06-what-goes-wrong.md, "Reading the curves".
"""

import io
import json
import math
import os
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minirlhf.engine.metrics import read_kept, read_metrics
from minirlhf.engine.options import (
    check,
    join_first_arguments,
    one_sentence,
    parse_config,
    printable,
    split_folders,
)
from minirlhf.engine.output import RUN_FILE, check_output_file
from minirlhf.files.disk import read_json, write_atomically

# Colours that stay apart for colour-blind readers: Okabe and Ito 2008, "Color Universal Design".
BLUE, ORANGE, GREEN, PURPLE, LIGHT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#BFD9EA"
COLOURS, STYLES = (BLUE, ORANGE, GREEN, PURPLE), ("-", "--", "-.", ":")
BAND = 3                            # runs that differ by their seed, from which on they are a band
BINS = 10                           # of the reliability diagram, as in `calibration_error`


@dataclass(frozen=True)
class PlotsConfig:
    """Options of `python -m minirlhf.plots`."""
    runs: str = ""                      # folders of any stages; also given without --runs
    sft: str = "checkpoints/sft"        # SFT folders joined by commas; "": left out
    reward_models: str = "checkpoints/reward_model"    # folders joined by commas; "": left out
    ppo: str = "checkpoints/ppo"        # PPO folders joined by commas; "": left out
    out: str = "checkpoints/curves.png"    # picture to write

    def __post_init__(self):
        check(bool(self.runs or self.sft or self.reward_models or self.ppo),
              "--sft, --reward_models and --ppo are all empty, expected a folder in at least one")
        check(self.out.lower().endswith(".png"), f"--out is {self.out!r}, expected a name in .png")


# ---- the panels ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Curve:
    """One line of a panel; of several seeds it is their mean, between `low` and `high`."""
    label: str
    x: list[float]
    y: list[float]
    colour: str
    style: str = "-"
    low: tuple = ()
    high: tuple = ()


@dataclass(frozen=True)
class Panel:
    """One panel: curves of one unit."""
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    y_limits: tuple = (None, None)      # None: as the curves need


@dataclass(frozen=True)
class Runs:
    """Runs that are drawn as one: a single one, or several that differ by their seed."""
    name: str
    rows: list[list[dict[str, float]]]


def read_columns(folder: str, needed: tuple) -> list[dict[str, float]]:
    """The rows of a run's metrics, of which at least one has each of the `needed` columns."""
    path = os.path.join(folder, "metrics.csv")
    if not os.path.exists(path) and not os.path.exists(path + ".part"):
        raise FileNotFoundError(f"{path}: expected the metrics of a stage, found no such file; run "
                                "the stage first, or give its option \"\" to leave it out")
    rows = read_metrics(folder)
    check(len(rows) > 0, f"{path}: expected at least one row of metrics, found none")
    missing = [name for name in needed if all(name not in row for row in rows)]
    check(not missing, f"{path}: expected numbers in a column {', '.join(missing)}, found only "
          f"{printable(', '.join(rows[0]))}; is it the folder of another stage?")
    return rows


def names_of(folders: list[str]) -> list[str]:
    """The folders' last names, with as much before them as tells them apart.

    Example: a/ppo and b/ppo keep their names, x/a/ppo and x/b become ppo and b.
    """
    parts = [os.path.normpath(os.path.abspath(folder)).split(os.sep) for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(map(tuple, parts))):
            return [printable(name) for name in names]
    return []


def options_but_seed(folder: str) -> str:
    """What a run's options say apart from its seed and from where its folders lie.

    A folder counts by its last name, so seed0/sft and seed1/sft are the same option.
    """
    path = os.path.join(folder, RUN_FILE)
    options = read_json(path).get("config") if os.path.exists(path) else None
    if not isinstance(options, dict):
        return os.path.abspath(folder)                   # not finished: alike only to itself
    kept = {name: [os.path.basename(part) for part in str(value).split(",")]
            for name, value in options.items() if name not in ("seed", "out", "resume")}
    return json.dumps(kept, sort_keys=True)


def gather(folders: list[str], needed: tuple) -> list[Runs]:
    """Runs of one stage, those together that are drawn as one."""
    alike: dict[str, list[int]] = {}
    rows = [read_columns(folder, needed) for folder in folders]
    for i, folder in enumerate(folders):
        alike.setdefault(options_but_seed(folder), []).append(i)
    names, drawn = names_of(folders), []
    for members in alike.values():
        if len(members) >= BAND:
            drawn.append(Runs(f"{names[members[0]]} and {len(members) - 1} other seeds",
                              [rows[i] for i in members]))
        else:
            drawn += [Runs(names[i], [rows[i]]) for i in members]
    return drawn


def curve(rows: list[dict], x: str, y: str, label: str, colour: str, style: str = "-") -> Curve:
    """Column `y` against column `x`, from the rows that have it."""
    kept = [row for row in rows if x in row and y in row]
    return Curve(label, [row[x] for row in kept], [row[y] for row in kept], colour, style)


def band(lines: list[Curve]) -> Curve:
    """The mean of some lines, with a band around it, where all of them have points.

    Example: lines through (0, 1), (1, 2) and through (0, 3) give (0, 2) in a band from 1 to 3.
    """
    if len(lines) == 1:
        return lines[0]
    points = [dict(zip(line.x, line.y)) for line in lines]
    x = [place for place in lines[0].x if all(place in one for one in points)]
    columns = [[one[place] for one in points] for place in x]
    first = lines[0]
    return Curve(first.label, x, [sum(column) / len(column) for column in columns], first.colour,
                 first.style, tuple(map(min, columns)), tuple(map(max, columns)))


def curves(runs: list[Runs], x: str, columns: dict[str, str]) -> list[Curve]:
    """A line for every column (name -> words) of every run.

    Of one run every column has its colour; of several, every run has its colour and every column
    its dashes.
    """
    lines = []
    for i, one in enumerate(runs):
        for j, (column, words) in enumerate(columns.items()):
            colour, style, label = COLOURS[j % 4], STYLES[j % 4], words
            if len(runs) > 1:
                colour, style = COLOURS[i % 4], STYLES[(i // 4 + j) % 4]
                label = f"{one.name}: {words}" if len(columns) > 1 else one.name
            lines.append(band([curve(rows, x, column, label, colour, style) for rows in one.rows
                               if any(column in row for row in rows)] or [Curve("", [], [], "")]))
    return [line for line in lines if line.x]


def smooth(values: list[float], width: int) -> list[float]:
    """Mean over up to `width` values so far: smooth([1, 3, 5], 2) == [1, 2, 4]."""
    windows = [values[max(0, i + 1 - width):i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def sft_panels(folders: list[str]) -> list[Panel]:
    """Loss of the batches and on held-out demonstrations."""
    runs = gather(folders, ("step", "loss", "held_out_loss"))
    title, x, y = "SFT: loss of the demonstrations", "step", "nats per token"
    if len(folders) > 1:
        return [Panel(title + ", held out", x, y, curves(runs, x, {"held_out_loss": "held out"}))]
    (rows,) = runs[0].rows
    batches = curve(rows, x, "loss", "batches", LIGHT)
    trend = Curve("batches, mean of 20", batches.x, smooth(batches.y, 20), BLUE)
    held_out = curve(rows, x, "held_out_loss", "held out", ORANGE, "--")
    return [Panel(title, x, y, [batches, trend, held_out])]


def reliability(scores: list[list[float]]) -> tuple[list[float], list[float]]:
    """Stated preferences and shares of right choices, one point per interval that has any.

    scores: [chosen, rejected] of every comparison. The model states sigmoid(|difference|), from 0.5
    to 1, for the response that it prefers; a tie counts half.
    Example: differences of 1, 1, 1 and -1: it states 0.731 and 0.75 are right.
    Source: Guo et al. 2017 (arXiv 1706.04599), figure 1.
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for chosen, rejected in scores:
        stated = 1 / (1 + math.exp(-abs(chosen - rejected)))
        right = 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
        bins[min(BINS - 1, int((stated - 0.5) * 2 * BINS))].append((stated, right))
    points = [[sum(column) / len(part) for column in zip(*part)] for part in bins if part]
    return [point[0] for point in points], [point[1] for point in points]


def histogram(values: list[float], low: float, high: float, count: int = 24):
    """Steps that go around the bars of a histogram: x, y; y is the share of the values in a bar.

    Example: histogram([.1, .2, .3, .9], 0, 1, 2) gives
    ([0, 0, .5, .5, 1, 1], [0, .75, .75, .25, .25, 0])
    """
    width = (high - low) / count
    shares = [0.0] * count
    for value in values:
        shares[max(0, min(count - 1, int((value - low) / width)))] += 1 / len(values)
    x = [low + width * i for i in range(count + 1) for _ in range(2)]
    return x, [0.0, *(share for share in shares for _ in range(2)), 0.0]


def score_panels(folders: list[str]) -> list[Panel]:
    """Reliability of all reward models in one panel, and the scores of each where kept."""
    diagonal = Curve("as often right as stated", [0.5, 1.0], [0.5, 1.0], "#888888", ":")
    reliable, panels = [], []
    for i, (folder, name) in enumerate(zip(folders, names_of(folders))):
        kept = [record["held_out_scores"] for record in read_kept(folder)
                if "held_out_scores" in record]
        if not kept:
            continue                                     # of an older version, or not finished
        scores = kept[-1]
        path = os.path.join(folder, "kept.jsonl")
        check(isinstance(scores, list) and len(scores) > 0 and all(
            isinstance(pair, list) and len(pair) == 2
            and all(type(one) in (int, float) and abs(one) < 1e6 for one in pair)
            for pair in scores), f"{path}: expected pairs of scores under held_out_scores")
        reliable.append(Curve(name, *reliability(scores), COLOURS[i % 4], STYLES[i // 4 % 4]))
        numbers = [one for pair in scores for one in pair]
        low, high = min(numbers), max(numbers)
        high = high if high > low else low + 1.0
        bars = [Curve(words, *histogram([pair[k] for pair in scores], low, high), colour, style)
                for k, words, colour, style in ((0, "chosen", BLUE, "-"),
                                                (1, "rejected", ORANGE, "--"))]
        panels.append(Panel(f"Scores of {name}", "score, before it is normalised",
                            "share of responses", bars, (0, None)))
    if reliable:
        panels.insert(0, Panel("Reward model: reliability", "stated preference, probability",
                               "share of choices right", [diagonal, *reliable]))
    return panels


def reward_panels(folders: list[str]) -> list[Panel]:
    """Held-out accuracy and calibration error, reliability and scores of every reward model."""
    needed = ("step", "held_out_accuracy", "calibration_error")
    runs = gather(folders, needed)
    alone = len(runs) == 1                               # then its name says more than the column's
    name = names_of(folders)[0] if alone else ""
    return [Panel("Reward model: held-out pairs right", "step", "share of pairs",
                  curves(runs, "step", {needed[1]: name})),
            Panel("Reward model: calibration error", "step", "share of pairs",
                  curves(runs, "step", {needed[2]: name}), (0, None)),
            *score_panels(folders)]


def ppo_panels(folders: list[str]) -> list[Panel]:
    """Eight panels: what is climbed, its price, and the health of policy, critic and updates."""
    x = "iteration"
    names = ("kl_ref", "entropy", "explained_var", "response_len", "end_rate", "kl_old", "clipfrac")
    runs = gather(folders, (x, "score", *names))
    lines = {name: curves(runs, x, {name: name}) for name in names}
    points = curves(runs, x, {"score": "score, what PPO climbs", "gold": "gold, what we want"})
    lowest = min([0.0, *(y for line in lines["explained_var"] for y in (*line.y, *line.low))])
    return [
        Panel("PPO: score and gold", x, "points per response", points),
        Panel("KL from the reference: kl_ref", x, "nats per response", lines["kl_ref"]),
        Panel("Variety: entropy of the policy", x, "nats per token", lines["entropy"], (0, None)),
        Panel("Critic: explained_var, 1 is perfect", x, "share of variance",
              lines["explained_var"], (max(-1.0, lowest - 0.05 * (lowest < 0)), 1.05)),
        Panel("Length: response_len", x, "tokens per response", lines["response_len"], (0, None)),
        Panel("Responses that end: end_rate", x, "share of responses", lines["end_rate"],
              (0, 1.05)),
        Panel("Size of an update: kl_old", x, "nats per token", lines["kl_old"], (0, None)),
        Panel("Tokens outside the clip range: clipfrac", x, "share of tokens", lines["clipfrac"],
              (0, None))]


# ---- drawing -------------------------------------------------------------------------------------

def add_line(axes: Axes, curve: Curve) -> None:
    """One curve with its band; a short one also shows its points."""
    marker = "o" if len(curve.x) <= 40 else ""
    axes.plot(curve.x, curve.y, curve.style, color=curve.colour, label=curve.label, marker=marker,
              markersize=3.5, linewidth=1.8)
    if curve.low:
        axes.fill_between(curve.x, curve.low, curve.high, color=curve.colour, alpha=0.18,
                          linewidth=0)


def draw(axes: Axes, panel: Panel) -> None:
    """Fill one panel; one that begins at 0 gets some air above its highest curve."""
    for curve in panel.curves:
        add_line(axes, curve)
    axes.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    bottom, top = panel.y_limits
    axes.set_ylim(bottom, 1.1 * axes.get_ylim()[1] if bottom == 0 and top is None else top)
    whole = panel.x_label in ("step", "iteration")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axes.grid(color="#E2E2E2", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.curves) > 1:
        axes.legend(fontsize=8, framealpha=0.7, edgecolor="none", handlelength=3.2)


def write_picture(rows: list[list[Panel]], path: str) -> None:
    """Draw rows of up to three panels, 1200 pixels wide, 340 per row, and write them as a PNG."""
    figure = Figure(figsize=(12, 3.4 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)                              # draws without a screen
    for i, panels in enumerate(rows):
        for j, panel in enumerate(panels):
            draw(figure.add_subplot(len(rows), 3, 3 * i + j + 1), panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, buffer.getvalue())


def all_panels(sft: list[str], reward_models: list[str], ppo: list[str]) -> list[Panel]:
    """The panels of all three stages; an empty list leaves a stage out."""
    panels = sft_panels(sft) if sft else []
    panels += reward_panels(reward_models) if reward_models else []
    return panels + (ppo_panels(ppo) if ppo else [])


def draw_panels(panels: list[Panel], path: str) -> None:
    """Three panels in a row."""
    write_picture([panels[i:i + 3] for i in range(0, len(panels), 3)], path)


def training_curves(ppo_folder: str, path: str) -> None:
    """The PPO panels of a run, as one PNG."""
    draw_panels(ppo_panels([ppo_folder]), path)


def pipeline_picture(sft_folder: str, reward_folders: list[str], ppo_folder: str,
                     path: str) -> None:
    """The panels of all stages of a pipeline; an empty name or list leaves a stage out."""
    draw_panels(all_panels([sft_folder] if sft_folder else [], reward_folders,
                           [ppo_folder] if ppo_folder else []), path)


def by_stage(folders: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Folders of SFT, reward model and PPO, told apart by the columns of their metrics."""
    stages: tuple[list[str], list[str], list[str]] = ([], [], [])
    for folder in folders:
        rows = read_columns(folder, ())
        names = set().union(*rows)
        stages[2 if "kl_ref" in names else 1 if "held_out_accuracy" in names else 0].append(folder)
    return stages


def main(cfg: PlotsConfig) -> str:
    """Write the picture; returns its path."""
    check_output_file(cfg.out, b"tEXtSoftware\0Matplotlib", "picture")
    folders = [[*filter(None, split_folders(x))] for x in (cfg.sft, cfg.reward_models, cfg.ppo)]
    if cfg.runs:
        folders = by_stage(split_folders(cfg.runs))
    draw_panels(all_panels(*folders), cfg.out)
    print(f"wrote {printable(cfg.out)}")
    return cfg.out


if __name__ == "__main__":
    join_first_arguments("runs")
    with one_sentence():
        main(parse_config(PlotsConfig))
