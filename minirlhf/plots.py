"""One picture of a run's curves, from the `metrics.csv` of its stages.

    python -m minirlhf.plots
    python -m minirlhf.plots --sft "" --reward_models "" --ppo checkpoints/ppo --out ppo.png

In:  stage folders; an empty name leaves a stage out. Out: a PNG of 1200 pixels width.

How to read the PPO panels: score is what PPO climbs, gold is what we want. While both rise, all is
well; where gold turns down and score does not, the policy fools its reward model. kl_ref says how
far it went for that, entropy how much variety is left, explained_var how much of the returns the
critic foresees, kl_old and clipfrac how far a single update moves.

Lecture: lectures/06-what-goes-wrong.md, "Reading the curves".
"""

import io
import os
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.options import check, one_sentence, parse_config, split_folders
from minirlhf.files.disk import write_atomically

# Colours that stay apart for colour-blind readers: Okabe and Ito 2008, "Color Universal Design".
BLUE, ORANGE, GREEN, PURPLE, LIGHT = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#BFD9EA"
COLOURS, STYLES = (BLUE, ORANGE, GREEN, PURPLE), ("-", "--", "-.", ":")


@dataclass(frozen=True)
class PlotsConfig:
    """Options of `python -m minirlhf.plots`."""
    sft: str = "checkpoints/sft"        # SFT folder; "": left out
    reward_models: str = "checkpoints/reward_model"    # folders joined by commas; "": left out
    ppo: str = "checkpoints/ppo"        # PPO folder; "": left out
    out: str = "checkpoints/curves.png"    # picture to write

    def __post_init__(self):
        check(bool(self.sft or self.reward_models or self.ppo),
              "--sft, --reward_models and --ppo are all empty, expected a folder in at least one")
        check(self.out.lower().endswith(".png"), f"--out is {self.out!r}, expected a name in .png")


# ---- the panels ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Curve:
    """One line of a panel."""
    label: str
    x: list[float]
    y: list[float]
    colour: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One panel: curves on the left axis, and perhaps one on an axis of its own at the right."""
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    right: Curve | None = None
    right_label: str = ""
    y_limits: tuple = (None, None)      # None: as the curves need
    right_limits: tuple = (0, None)


def read_columns(folder: str, needed: tuple) -> list[dict[str, float]]:
    """The rows of `metrics.csv`, of which at least one has each of the `needed` columns."""
    path = os.path.join(folder, "metrics.csv")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: expected the metrics of a stage, found no such file; run "
                                "the stage first, or give its option \"\" to leave it out")
    rows = read_metrics(folder)
    check(len(rows) > 0, f"{path}: expected at least one row of metrics, found none")
    missing = [name for name in needed if all(name not in row for row in rows)]
    check(not missing, f"{path}: expected numbers in a column {', '.join(missing)}, found only "
          f"{', '.join(rows[0])}; is it the folder of another stage?")
    return rows


def curve(rows: list[dict], x: str, y: str, label: str, colour: str, style: str = "-") -> Curve:
    """Column `y` against column `x`, from the rows that have it."""
    kept = [row for row in rows if x in row and y in row]
    return Curve(label, [row[x] for row in kept], [row[y] for row in kept], colour, style)


def smooth(values: list[float], width: int) -> list[float]:
    """Mean over up to `width` values so far: smooth([1, 3, 5], 2) == [1, 2, 4]."""
    windows = [values[max(0, i + 1 - width):i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def sft_panels(folder: str) -> list[Panel]:
    """Loss of the batches and on held-out demonstrations."""
    rows = read_columns(folder, ("step", "loss", "held_out_loss"))
    batches = curve(rows, "step", "loss", "batches", LIGHT)
    trend = Curve("batches, mean of 20", batches.x, smooth(batches.y, 20), BLUE)
    held_out = curve(rows, "step", "held_out_loss", "held out", ORANGE)
    return [Panel("SFT: loss of the demonstrations", "step", "nats per token",
                  [batches, trend, held_out])]


def reward_panels(folders: list[str]) -> list[Panel]:
    """Held-out accuracy and calibration error of every reward model."""
    needed = ("step", "held_out_accuracy", "calibration_error")
    models = [read_columns(folder, needed) for folder in folders]
    names = [os.path.basename(os.path.normpath(folder)) for folder in folders]
    accuracies, errors = [], []
    for i, rows in enumerate(models):
        colour, style = COLOURS[i % 4], STYLES[i // 4 % 4]
        accuracies.append(curve(rows, "step", needed[1], names[i], colour, style))
        errors.append(curve(rows, "step", needed[2], names[i], colour, style))
    return [Panel("Reward model: held-out pairs right", "step", "share of pairs", accuracies),
            Panel("Reward model: calibration error", "step", "share of pairs", errors,
                  y_limits=(0, None))]


def ppo_panels(folder: str) -> list[Panel]:
    """Six panels: what is climbed, its price, and the health of policy, critic and updates."""
    x = "iteration"
    rows = read_columns(folder, (x, "score", "kl_ref", "kl_old", "entropy", "clipfrac",
                                 "explained_var", "response_len", "end_rate"))
    points = [curve(rows, x, "score", "score, what PPO climbs", BLUE)]
    if any("gold" in row for row in rows):
        points.append(curve(rows, x, "gold", "gold, what we want", ORANGE))
    lowest = min(row.get("explained_var", 0.0) for row in rows)
    return [
        Panel("Score and gold", x, "points per response", points),
        Panel("KL from the reference (kl_ref)", x, "nats per response",
              [curve(rows, x, "kl_ref", "kl_ref", BLUE)]),
        Panel("Variety: entropy of the policy", x, "nats per token",
              [curve(rows, x, "entropy", "entropy", BLUE)], y_limits=(0, None)),
        Panel("Critic: explained_var (1 is perfect)", x, "share of variance",
              [curve(rows, x, "explained_var", "explained_var", BLUE)],
              y_limits=(max(-1.0, min(0.0, lowest - 0.05)), 1.05)),
        Panel("Length, and share that ends", x, "response_len, tokens",
              [curve(rows, x, "response_len", "response_len", BLUE)],
              curve(rows, x, "end_rate", "end_rate", ORANGE, "--"), "end_rate, share of responses",
              y_limits=(0, None), right_limits=(0, 1.05)),
        Panel("Size of one update", x, "kl_old, nats per token",
              [curve(rows, x, "kl_old", "kl_old", BLUE)],
              curve(rows, x, "clipfrac", "clipfrac", ORANGE, "--"), "clipfrac, share of tokens",
              y_limits=(0, None))]


# ---- drawing -------------------------------------------------------------------------------------

def add_line(axes: Axes, curve: Curve) -> None:
    """One curve; a short one also shows its points."""
    marker = "o" if len(curve.x) <= 40 else ""
    axes.plot(curve.x, curve.y, curve.style, color=curve.colour, label=curve.label, marker=marker,
              markersize=3.5, linewidth=1.8)


def set_limits(axes: Axes, limits: tuple) -> None:
    """Set bottom and top; a panel that begins at 0 gets some air above its highest curve."""
    bottom, top = limits
    if bottom == 0 and top is None:
        top = 1.1 * axes.get_ylim()[1]
    axes.set_ylim(bottom, top)


def draw(axes: Axes, panel: Panel) -> None:
    """Fill one panel."""
    for curve in panel.curves:
        add_line(axes, curve)
    axes.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    set_limits(axes, panel.y_limits)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color="#E2E2E2", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.right is not None:
        other = axes.twinx()
        add_line(other, panel.right)
        set_limits(other, panel.right_limits)
        other.set_ylabel(panel.right_label, color=panel.right.colour)
        other.tick_params(axis="y", colors=panel.right.colour)
        other.spines[["top", "left"]].set_visible(False)
        axes.set_ylabel(panel.y_label, color=panel.curves[0].colour)
        axes.tick_params(axis="y", colors=panel.curves[0].colour)
    if len(panel.curves) > 1:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


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


def training_curves(ppo_folder: str, path: str) -> None:
    """The six PPO panels of a run, as one PNG."""
    pipeline_picture("", [], ppo_folder, path)


def pipeline_picture(sft_folder: str, reward_folders: list[str], ppo_folder: str,
                     path: str) -> None:
    """SFT and reward models in a first row, PPO below; an empty name or list leaves a stage out."""
    panels = sft_panels(sft_folder) if sft_folder else []
    panels += reward_panels(reward_folders) if reward_folders else []
    panels, ppo = [panels] if panels else [], ppo_panels(ppo_folder) if ppo_folder else []
    write_picture(panels + [ppo[i:i + 3] for i in range(0, len(ppo), 3)], path)


def main(cfg: PlotsConfig) -> str:
    """Write the picture; returns its path."""
    reward_folders = [name for name in split_folders(cfg.reward_models) if name]
    pipeline_picture(cfg.sft, reward_folders, cfg.ppo, cfg.out)
    print(f"wrote {cfg.out}")
    return cfg.out


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(PlotsConfig))
