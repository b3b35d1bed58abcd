"""Draw the pictures of the lectures: from the package's own functions and the stored results.

    python -m lectures.pictures                 # all, into lectures/pictures
    python -m lectures.pictures clip gae        # these two
    python -m lectures.pictures --reliability checkpoints/rm_0,checkpoints/rm_1
                                                # stores how calibrated these reward models are,
                                                # in lectures/results/reliability.json

The pictures are SVG files on white, so they can be read in light and dark pages. A test draws them
again and compares.
"""

import argparse
import csv
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from minirlhf.engine.metrics import read_kept
from minirlhf.generate import KVCache
from minirlhf.gpt2 import GPT2Config
from minirlhf.plots import BLUE, GREEN, ORANGE, PURPLE, reliability
from minirlhf.ppo import gae, policy_loss

FOLDER = Path(__file__).resolve().parent / "pictures"
RESULTS = Path(__file__).resolve().parent / "results"
BLACK, PALE, GREY = "#222222", "#DCEBF5", "#E8E8E8"


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty picture in inches with panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=9)
    return figure, axes


def drawing(width: float, height: float) -> tuple[Figure, Axes]:
    """A picture without axes whose units are inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasSVG(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str,
        colour: str = PALE, edge: str = BLUE, size: float = 10, bold: bool = False) -> None:
    """A rounded box with its left lower corner at x, y."""
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.06",
                                  facecolor=colour, edgecolor=edge, linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size,
              color=BLACK, fontweight="bold" if bold else "normal")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float],
          colour: str = BLACK) -> None:
    """A straight arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, linewidth=1.3,
                                   color=colour, shrinkA=0, shrinkB=0))


def cells(axes: Axes, x: float, y: float, texts: list[str], colours: list[str], width: float = 1.0,
          height: float = 0.42, size: float = 10) -> None:
    """A row of cells with text."""
    for i, (text, colour) in enumerate(zip(texts, colours)):
        axes.add_patch(Rectangle((x + i * width, y), width, height, facecolor=colour,
                                 edgecolor="#777777", linewidth=0.8))
        axes.text(x + (i + 0.5) * width, y + height / 2, text, ha="center", va="center",
                  fontsize=size, color=BLACK)


# ---- drawings ------------------------------------------------------------------------------------

def alignment() -> Figure:
    """One row of ids, and the per-token tensors that stand half a column beside it."""
    figure, axes = drawing(9.2, 3.6)
    left, prompt, response = 2.3, GREY, PALE
    axes.text(left - 0.15, 3.01, "ids (B, T)", ha="right", va="center", fontsize=10)
    cells(axes, left, 2.8, ["p0", "p1", "r0", "r1", "e", "padding"],
          [prompt, prompt, response, response, response, "white"])
    for t in range(6):
        axes.text(left + t + 0.5, 3.34, str(t), ha="center", fontsize=9, color="#555555")
    lines = [("action ids[t+1]", ["p1", "r0", "r1", "e", "padding"]),
             ("response_mask", ["0", "1", "1", "1", "0"]),
             ("logprobs", ["0", "log p(r0)", "log p(r1)", "log p(e)", "0"]),
             ("rewards", ["0", "KL term", "KL term", "KL term\n+ score", "0"])]
    for number, (name, texts) in enumerate(lines):
        y = 1.85 - 0.52 * number
        axes.text(left - 0.15, y + 0.21, name, ha="right", va="center", fontsize=10)
        cells(axes, left + 0.5, y, texts, ["white", response, response, response, "white"], size=9)
    for t in range(5):                                   # state t -> column t -> action t + 1
        arrow(axes, (left + t + 0.5, 2.78), (left + t + 0.9, 2.3), BLUE)
        axes.text(left + t + 1, 0.1, str(t), ha="center", fontsize=9, color="#555555")
    axes.text(left - 0.15, 2.54, "state ids[0..t]", fontsize=9, color=BLUE, va="center",
              ha="right")
    for y, name in ((3.34, "position"), (0.1, "column t, of T-1")):
        axes.text(left - 0.15, y, name, ha="right", fontsize=9, color="#555555")
    return figure


def networks() -> Figure:
    """The four networks in one iteration of PPO, and the tensors between them."""
    figure, axes = drawing(10.2, 5.3)
    box(axes, 0.2, 4.3, 1.5, 0.6, "prompts", "white", "#777777")
    box(axes, 2.5, 4.3, 2.0, 0.6, "policy", PALE, BLUE, bold=True)
    box(axes, 5.4, 4.3, 2.4, 0.6, "ids (B, T)\nlengths (B,)", "white", "#777777", 9)
    arrow(axes, (1.7, 4.6), (2.5, 4.6))
    arrow(axes, (4.5, 4.6), (5.4, 4.6))
    axes.text(4.95, 4.68, "sample", fontsize=9, ha="center", va="bottom")
    places = [(0.2, "policy\nlearns", PALE, BLUE, "old_logprobs\n(B, T-1)"),
              (2.75, "ref_policy\nfrozen", GREY, "#777777", "ref_logprobs\n(B, T-1)"),
              (5.3, "reward_model\nfrozen", GREY, "#777777", "scores\n(B,)"),
              (7.85, "critic\nlearns", PALE, BLUE, "old_values\n(B, T-1)")]
    for x, name, colour, edge, result in places:
        box(axes, x, 2.95, 2.1, 0.65, name, colour, edge, bold=True)
        arrow(axes, (6.6, 4.3), (x + 1.05, 3.6))
        box(axes, x + 0.25, 2.05, 1.6, 0.55, result, "white", "#777777", 9)
        arrow(axes, (x + 1.05, 2.95), (x + 1.05, 2.6))
    box(axes, 1.3, 1.1, 2.5, 0.55, "kl_ref (B, T-1)\nold_logprobs - ref_logprobs", "white",
        "#777777", 9)
    arrow(axes, (1.25, 2.05), (2.1, 1.65))
    arrow(axes, (3.8, 2.05), (3.0, 1.65))
    box(axes, 4.45, 1.1, 2.6, 0.55, "rewards (B, T-1)\nscore on the last action", "white",
        "#777777", 9)
    arrow(axes, (3.8, 1.375), (4.45, 1.375))
    arrow(axes, (6.35, 2.05), (5.9, 1.65))
    box(axes, 7.6, 1.1, 2.45, 0.55, "advantages, returns\n(B, T-1)", "white", "#777777", 9)
    arrow(axes, (7.05, 1.375), (7.6, 1.375))
    arrow(axes, (8.9, 2.05), (8.85, 1.65))
    axes.text(7.32, 1.45, "GAE", fontsize=9, ha="center", va="bottom")
    box(axes, 2.6, 0.15, 6.0, 0.5, "update: new logprobs and values of the same ids; policy loss "
        "and value loss", PALE, BLUE, 9.5)
    arrow(axes, (8.6, 1.1), (7.7, 0.65))
    axes.plot([0.8, 0.8], [2.05, 0.4], color=BLACK, linewidth=1.3)
    arrow(axes, (0.8, 0.4), (2.6, 0.4))
    return figure


def kv_cache() -> Figure:
    """The cache for prompts of 2 and 4 tokens and two new tokens each, as `KVCache` has it."""
    cache = KVCache(GPT2Config(10, 8, 4, 1, 1), torch.tensor([2, 4]), 6, torch.zeros(1))
    cache.begin(4)
    positions = [cache.begin(1)[:, 0].tolist() for _ in range(2)]       # of the new tokens
    visible = cache.visible[:, 0, 0].tolist()                           # (B, columns)
    figure, axes = drawing(9.6, 3.1)
    prompts = [["p0", "p1", "padding", "padding"], ["p0", "p1", "p2", "p3"]]
    left, width = 1.0, 1.12
    for row, texts in enumerate(prompts):
        y = 1.75 - 1.1 * row
        seen = visible[row]
        colours = [GREY if seen[c] else "white" for c in range(4)] + [PALE, PALE]
        cells(axes, left, y, [*texts, "r0", "r1"], colours, width)
        places = [str(c) if seen[c] else "hidden" for c in range(4)]
        places += [str(positions[step][row]) for step in range(2)]
        for c, place in enumerate(places):
            axes.text(left + (c + 0.5) * width, y - 0.17, place, ha="center", va="center",
                      fontsize=9, color=ORANGE if place == "hidden" else "#555555")
        axes.text(left - 0.1, y + 0.21, f"row {row}", ha="right", va="center", fontsize=10)
        axes.text(left - 0.1, y - 0.17, "position", ha="right", va="center", fontsize=9,
                  color="#555555")
    for first, last, text in ((0, 4, "first pass: whole prompts"), (4, 5, "second pass"),
                              (5, 6, "third pass")):
        x0, x1 = left + first * width + 0.05, left + last * width - 0.05
        axes.plot([x0, x0, x1, x1], [2.55, 2.65, 2.65, 2.55], color="#777777", linewidth=1)
        axes.text((x0 + x1) / 2, 2.73, text, ha="center", va="bottom", fontsize=9)
    for c, name in enumerate(["column", *map(str, range(6))]):
        axes.text(left - 0.1 if c == 0 else left + (c - 0.5) * width, 2.28, name, va="center",
                  ha="center" if c else "right", fontsize=9, color="#555555")
    axes.text(left + 6 * width + 0.12, 1.42, "Each pass stores\nkeys and values\nof its columns.\n"
              "A new token\nlooks at all that\nis not hidden.", fontsize=9, va="center")
    return figure


# ---- formulas ------------------------------------------------------------------------------------

def beta() -> Figure:
    """The best policy for four betas: the reference, reweighted by exp(score / beta)."""
    reference = torch.tensor([0.70, 0.25, 0.05], dtype=torch.float64)
    score = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    figure, (axes,) = new_figure(7.2, 3.0)
    bars = [("reference", reference)]
    for value in (5.0, 0.5, 0.1):
        weights = reference * torch.exp(score / value)
        bars.append((f"beta {value:g}", weights / weights.sum()))
    for i, (name, policy) in enumerate(bars):
        places = [k + 0.2 * (i - 1.5) for k in range(3)]
        axes.bar(places, policy.tolist(), 0.18, color=("#999999", BLUE, GREEN, ORANGE)[i],
                 label=name)
        for place, height in zip(places, policy.tolist()):
            axes.text(place, height + 0.015, f"{height:.2f}", ha="center", fontsize=8)
    axes.set_xticks(range(3), [f"response {'abc'[k]}\nscore {score[k]:g}" for k in range(3)])
    axes.set_ylabel("probability")
    axes.set_ylim(0, 1.1)
    axes.legend(fontsize=9, frameon=False, loc="upper center")
    return figure


def surprise() -> Figure:
    """One surprise at the last of 12 tokens, and the advantages that GAE makes of it."""
    rewards, values = torch.zeros(1, 12), torch.zeros(1, 12)
    rewards[0, 11] = 1.0                                 # the critic foresaw nothing
    mask = torch.ones(1, 12, dtype=torch.bool)
    figure, panels = new_figure(9.0, 2.7, 3)
    for axes, lam, colour in zip(panels, (0.0, 0.95, 1.0), (ORANGE, BLUE, GREEN)):
        advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=lam)
        axes.bar(range(12), advantages[0].tolist(), color=colour)
        axes.set_title(f"lambda {lam:g}", fontsize=11, loc="left")
        axes.set_xlabel("token", fontsize=9)
        axes.set_xticks([0, 4, 8, 11])
        axes.set_ylim(0, 1.08)
    panels[0].set_ylabel("advantage")
    panels[0].text(5.0, 0.75, "score 1 at the end,\nall values 0", fontsize=9, ha="center")
    return figure


def clip() -> Figure:
    """The loss of one token over its ratio, for both signs of the advantage."""
    ratio = torch.linspace(0.3, 1.7, 141, dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.bool)
    figure, panels = new_figure(9.0, 3.2, 2)
    for axes, advantage in zip(panels, (1.0, -1.0)):
        losses, slopes = [], []
        for value in ratio:
            logprobs = value.log().reshape(1, 1).requires_grad_()
            loss, _ = policy_loss(logprobs, torch.zeros(1, 1, dtype=torch.float64),
                                  torch.full((1, 1), advantage, dtype=torch.float64), one, 0.2)
            loss.backward()
            losses.append(loss.item())
            slopes.append(logprobs.grad.item())
        axes.axvspan(0.8, 1.2, color=GREY)
        axes.plot(ratio, -ratio * advantage, color="#999999", linestyle=":", label="without clip")
        axes.plot(ratio, losses, color=BLUE, linewidth=2.2, label="loss")
        flat = [loss if abs(slope) < 1e-9 else math.nan for loss, slope in zip(losses, slopes)]
        axes.plot(ratio, flat, color=ORANGE, linewidth=4, label="no gradient: enough")
        axes.set_title(f"advantage {advantage:+g}", fontsize=11, loc="left")
        axes.set_xlabel("ratio")
        axes.set_ylabel("loss")
        axes.legend(fontsize=9, frameon=False)
    for axes, place, words in ((panels[0], (0.3, -1.15), "good, but less\nlikely: bring\nit back"),
                               (panels[1], (1.24, 0.75), "bad, but likelier:\nbring it down")):
        axes.text(*place, words, fontsize=9)
    return figure


# ---- stored results ------------------------------------------------------------------------------

def read_curves(name: str) -> dict[str, list[float]]:
    """The columns of a stored metrics.csv."""
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


def stored(name: str) -> dict:
    """A stored JSON file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def calibration() -> Figure:
    """How often the reward models are right, by how sure they say to be."""
    figure, (axes,) = new_figure(5.6, 4.0)
    axes.plot([0.5, 1], [0.5, 1], color="#999999", linestyle=":", label="perfect calibration")
    for (name, model), colour, mark in zip(stored("reliability.json").items(),
                                           (BLUE, ORANGE, GREEN, PURPLE), "os^D"):
        axes.plot(model["stated"], model["right"], color=colour, marker=mark, markersize=4,
                  linewidth=1, label=name)
    axes.set_xlabel("stated preference (it says)")
    axes.set_ylabel("share of choices right (it is)")
    axes.legend(fontsize=9, frameon=False)
    return figure


def hacked() -> Figure:
    """Score, gold and KL of a run with the penalty and one without."""
    figure, panels = new_figure(10.5, 3.1, 3)
    runs = (("healthy.csv", "kl_coef 0.2", BLUE, "-"), ("hacked.csv", "kl_coef 0", ORANGE, "--"))
    for axes, column, title in zip(panels, ("score", "gold", "kl_ref"), (
            "score, what PPO climbs", "gold, what we want", "kl_ref, the distance")):
        for file, name, colour, style in runs:
            curves = read_curves(file)
            axes.plot(curves["iteration"], curves[column], color=colour, linestyle=style,
                      label=name)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("iteration", fontsize=9)
        axes.set_ylabel("nats per response" if column == "kl_ref" else "points per response",
                        fontsize=9)
    panels[0].legend(fontsize=9, frameon=False)
    return figure


GALLERY = {"healthy": "healthy.csv", "hacked": "hacked.csv", "collapsed": "collapsed.csv",
           "nothing moves": "still.csv", "too large steps": "leap.csv"}


def gallery() -> Figure:
    """Five runs below one another's names: score and gold, KL, entropy and clipped share."""
    figure = Figure(figsize=(11, 5.6), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    rows = [(("score", BLUE, "-"), ("gold", ORANGE, "--")), (("kl_ref", BLACK, "-"),),
            (("entropy", GREEN, "-"), ("clipfrac", PURPLE, "--"))]
    panels = figure.subplots(len(rows), len(GALLERY), sharey="row", sharex="col")
    for column, (name, file) in enumerate(GALLERY.items()):
        curves = read_curves(file)
        for row, lines in enumerate(rows):
            axes = panels[row, column]
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=8)
            for figure_name, colour, style in lines:
                axes.plot(curves["iteration"], curves[figure_name], color=colour,
                          linestyle=style, label=figure_name)
            if column == 0:
                axes.legend(fontsize=8, frameon=False)
                axes.set_ylabel(("points per response", "nats per response",
                                 "nats per token;\nshare of tokens")[row], fontsize=8)
        panels[1, column].set_yscale("symlog", linthresh=10)
        panels[0, column].set_title(name, fontsize=11, loc="left")
        panels[-1, column].set_xlabel("iteration", fontsize=9)
    return figure


def explained_tables(text: str) -> list[dict[str, list[str]]]:
    """The tables that `python -m minirlhf.explain` prints: column name -> its cells, as text.

    The lines of sums are left out.
    """
    tables = []
    for block in re.findall(r"^    token .*\n(?:    \S+(?:  +\S+)+\n)+", text, re.M):
        header, *rows = [line.split() for line in block.splitlines()]
        rows = [row for row in rows if row[0] != "sum" and len(row) == len(header)]
        tables.append({name: list(cells) for name, cells in zip(header, zip(*rows))})
    return tables


def one_response() -> Figure:
    """The stored response of lecture 5: probabilities, what the critic says, advantages."""
    sampled, _, credited, _, _ = explained_tables(
        (RESULTS / "explain.txt").read_text(encoding="utf-8"))
    tokens = [token.replace("_", " ").replace("<|endoftext|>", "end") for token in sampled["token"]]
    places = list(range(len(tokens)))
    figure, panels = new_figure(10.5, 3.1, 3)
    for shift, name, colour, words in ((-0.2, "old_logprobs", BLUE, "policy"),
                                       (0.2, "ref_logprobs", "#999999", "reference")):
        panels[0].bar([x + shift for x in places],
                      [math.exp(float(number)) for number in sampled[name]], 0.38, color=colour,
                      label=words)
    panels[0].set_ylim(0, 1.3)
    panels[0].set_title("probability of the token", fontsize=11, loc="left")
    for name, colour, mark in (("old_values", GREEN, "o"), ("returns", ORANGE, "s")):
        panels[1].plot(places, [float(number) for number in credited[name]], color=colour,
                       marker=mark, markersize=5, label=name)
    panels[1].set_ylim(0, 1.3)
    panels[1].set_title("what the critic says, and should", fontsize=11, loc="left")
    for shift, name, colour in ((-0.2, "delta", PURPLE), (0.2, "unwhitened", BLUE)):
        panels[2].bar([x + shift for x in places], [float(number) for number in credited[name]],
                      0.38, color=colour, label={"unwhitened": "advantage"}.get(name, name))
    panels[2].axhline(0, color="#777777", linewidth=0.8)
    panels[2].set_title("surprise, and what GAE makes of it", fontsize=11, loc="left")
    panels[2].margins(y=0.22)                            # room for the names
    for axes, columns, place, unit in zip(
            panels, (2, 1, 2), ("upper left", "lower left", "upper left"),
            ("probability", "points of score", "points of score")):
        axes.set_xticks(places, tokens, fontsize=9)
        axes.set_xlabel("token", fontsize=9)
        axes.set_ylabel(unit, fontsize=9)
        axes.legend(fontsize=9, frameon=False, loc=place, ncols=columns)
    return figure


def gold_over_kl() -> Figure:
    """Score and gold over the square root of the KL, of the run without a penalty."""
    curves = read_curves("hacked.csv")
    distance = [math.sqrt(max(0.0, kl)) for kl in curves["kl_ref"]]
    figure, (axes,) = new_figure(6.2, 3.4)
    for column, words, colour, mark in (("score", "score, what PPO climbs", BLUE, "o"),
                                        ("gold", "gold, what we want", ORANGE, "s")):
        axes.plot(distance, curves[column], mark, color=colour, markersize=3.5, label=words)
    axes.set_xlabel("square root of kl_ref (nats per response)")
    axes.set_ylabel("points per response")
    axes.legend(fontsize=9, frameon=False)
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "alignment": alignment, "networks": networks, "kv_cache": kv_cache, "beta": beta,
    "gae": surprise, "clip": clip, "calibration": calibration, "hacked": hacked,
    "gallery": gallery, "one_response": one_response,
    "gold_over_kl": gold_over_kl}


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same each time: no date, no random names."""
    with matplotlib.rc_context({"svg.hashsalt": "minirlhf", "svg.fonttype": "path"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def store_reliability(folders: list[str]) -> None:
    """Write lectures/results/reliability.json from the held-out scores that runs have kept."""
    models = {}
    for number, folder in enumerate(folders, start=1):
        scores = [record for record in read_kept(folder) if "held_out_scores" in record][-1]
        stated, right = reliability(scores["held_out_scores"])
        models[f"reward model {number}"] = {"stated": [round(x, 4) for x in stated],
                                            "right": [round(x, 4) for x in right],
                                            "comparisons": len(scores["held_out_scores"])}
    (RESULTS / "reliability.json").write_text(json.dumps(models, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Draw the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the lectures.")
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], help="all, if none is named")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    parser.add_argument("--reliability", default="", help="folders of reward models, with commas")
    options = parser.parse_args()
    if options.reliability:
        store_reliability(options.reliability.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names or PICTURES:
        save(PICTURES[name](), options.out / f"{name}.svg")
        print(options.out / f"{name}.svg")


if __name__ == "__main__":
    main()
