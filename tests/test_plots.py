"""plots.py: what is drawn from metrics.csv, and how the picture is written."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import pytest
import torch
from helpers import environment, reward_folder
from matplotlib.figure import Figure

from minirlhf.engine.metrics import MetricsFile, read_kept, read_metrics
from minirlhf.engine.options import join_first_arguments
from minirlhf.files.disk import write_json
from minirlhf.plots import (
    BLUE,
    ORANGE,
    Curve,
    PlotsConfig,
    all_panels,
    band,
    by_stage,
    curve,
    draw,
    draw_panels,
    histogram,
    main,
    names_of,
    pipeline_picture,
    ppo_panels,
    reliability,
    reward_panels,
    score_panels,
    sft_panels,
    smooth,
    training_curves,
)
from minirlhf.ppo_report import METRICS
from minirlhf.reward_model import calibration_error


def write_metrics(folder, rows: list[dict]) -> str:
    metrics = MetricsFile(str(folder), list(rows[0]))
    for row in rows:
        metrics.write(row)
    metrics.finish()
    return str(folder)


def sft_run(folder) -> str:
    return write_metrics(folder, [{"step": s, "loss": 3.0 / s, "grad_norm": 1.0, "lr": 1e-3,
                                   "held_out_loss": "" if s % 5 else 1.0} for s in range(1, 31)])


def reward_run(folder) -> str:
    rows = [{"step": s, "held_out_accuracy": 0.7, "calibration_error": 0.1} if s % 5 == 0 else
            {"step": s, "held_out_accuracy": "", "calibration_error": ""} for s in range(1, 31)]
    return write_metrics(folder, rows)


def ppo_run(folder, gold: bool = True, rows: int = 8) -> str:
    return write_metrics(folder, [{**{name: 0.5 + i / 10 for name in METRICS}, "iteration": i,
                                   "gold": 1.0 if gold else ""} for i in range(rows)])


def size_of(path) -> tuple[int, int]:
    """Width and height from the PNG's header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_smooth_hand_example():
    assert smooth([1, 3, 5], 2) == [1, 2, 4]


def test_empty_fields_are_no_points(tmp_path):
    (panel,) = sft_panels([sft_run(tmp_path)])
    batches, _, held_out = panel.curves
    assert len(batches.x) == 30 and held_out.x == [5, 10, 15, 20, 25, 30]


def test_rows_without_a_step_are_no_points():
    rows = [{"step": 1.0, "loss": 2.0}, {"loss": 9.0}, {"step": 3.0}]
    line = curve(rows, "step", "loss", "", "black")
    assert (line.x, line.y) == ([1.0], [2.0])


def test_gold_is_drawn_beside_the_score_where_there_is_a_gold_judge(tmp_path):
    with_gold, without = ppo_run(tmp_path / "a"), ppo_run(tmp_path / "b", gold=False)
    assert [curve.label[:5] for curve in ppo_panels([with_gold])[0].curves] == ["score", "gold,"]
    assert [curve.label[:5] for curve in ppo_panels([without])[0].curves] == ["score"]


def test_every_reward_model_has_its_curve_and_its_look(tmp_path):
    folders = [reward_run(tmp_path / f"rm_{i}") for i in range(6)]
    accuracy, calibration = reward_panels(folders)       # these kept no scores
    assert [curve.label for curve in accuracy.curves] == [f"rm_{i}" for i in range(6)]
    assert len({(curve.colour, curve.style) for curve in calibration.curves}) == 6


def test_pictures_have_one_row_for_three_panels(tmp_path):
    sft, rm, ppo = tmp_path / "sft", tmp_path / "rm", tmp_path / "ppo"
    sft, rm, ppo = sft_run(sft), reward_run(rm), ppo_run(ppo)
    training_curves(ppo, str(tmp_path / "ppo.png"))
    assert size_of(tmp_path / "ppo.png") == (1200, 1020)
    pipeline_picture(sft, [rm, rm], ppo, str(tmp_path / "new" / "all.png"))
    width, height = size_of(tmp_path / "new" / "all.png")
    assert width == 1200 and abs(height - 1360) <= 1     # some versions of matplotlib round down
    main(PlotsConfig(sft=sft, reward_models="", ppo="", out=str(tmp_path / "sft.png")))
    assert size_of(tmp_path / "sft.png") == (1200, 340)
    main(PlotsConfig(sft=sft, reward_models="", ppo="", out=str(tmp_path / "sft.png")))     # again
    for name, data in (("mine.png", b"my drawing"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} is there and no picture of minirlhf"):
            main(PlotsConfig(sft=sft, reward_models="", ppo="", out=str(tmp_path / name)))
        assert (tmp_path / name).read_bytes() == data


# ---- several runs --------------------------------------------------------------------------------

def options(folder: str, **values) -> str:
    """Write the run.json of a finished run with these options."""
    write_json(os.path.join(folder, "run.json"), {"config": values, "finished": True})
    return folder


def test_a_band_goes_from_the_lowest_to_the_highest_hand_example():
    made = band([Curve("a", [0, 1], [1, 2], BLUE), Curve("b", [0], [3], ORANGE)])
    assert made == Curve("a", [0], [2.0], BLUE, "-", (1,), (3,))


def test_runs_that_differ_only_by_their_seed_are_one_line_in_a_band(tmp_path):
    folders = []
    for seed in range(3):
        rows = [{**{name: 0.5 for name in METRICS}, "iteration": i, "score": seed + i}
                for i in range(4)]
        folder = write_metrics(tmp_path / f"s{seed}" / "ppo", rows)
        folders.append(options(folder, seed=seed, out=folder, kl_coef=0.2,
                               model=str(tmp_path / f"s{seed}" / "sft")))
    other = options(ppo_run(tmp_path / "t" / "ppo"), seed=0, out="o", kl_coef=0.1, model="a/sft")
    (panel, *_) = ppo_panels([*folders, other])
    score, *others = [one for one in panel.curves if "score" in one.label]
    assert score.label.startswith("s0/ppo and 2 other seeds: ") and len(others) == 1
    assert score.y == [1, 2, 3, 4] and score.low == (0, 1, 2, 3) and score.high == (2, 3, 4, 5)
    assert others[0].label.startswith("t/ppo: ") and others[0].low == ()
    assert others[0].colour != score.colour
    two = ppo_panels(folders[:2])[1].curves              # two seeds stay two lines
    assert [one.label for one in two] == ["s0/ppo", "s1/ppo"]


def test_runs_without_a_run_file_are_never_taken_for_one(tmp_path):
    folders = [ppo_run(tmp_path / name) for name in "abc"]
    assert [one.label for one in ppo_panels(folders)[1].curves] == ["a", "b", "c"]


def test_names_are_as_long_as_they_must_be():
    assert names_of(["x/ppo", "y/ppo/"]) == ["x/ppo", "y/ppo"]
    assert names_of(["x/a", "x/b", "x/a"]) == ["a", "b", "a"] and names_of([]) == []


def test_folders_are_told_apart_by_their_metrics(tmp_path, monkeypatch):
    sft, rm, ppo = sft_run(tmp_path / "1"), reward_run(tmp_path / "2"), ppo_run(tmp_path / "3")
    assert by_stage([ppo, rm, sft, ppo]) == ([sft], [rm], [ppo, ppo])
    main(PlotsConfig(runs=f"{rm},{sft}", out=str(tmp_path / "two.png")))
    assert size_of(tmp_path / "two.png") == (1200, 340)
    monkeypatch.setattr(sys, "argv", ["plots", "a", "b", "--out", "c.png"])
    join_first_arguments("runs")
    assert sys.argv == ["plots", "--runs", "a,b", "--out", "c.png"]


def test_a_run_that_is_not_finished_can_be_drawn(tmp_path):
    folder = ppo_run(tmp_path / "ppo")
    os.rename(os.path.join(folder, "metrics.csv"), os.path.join(folder, "metrics.csv.part"))
    assert len(ppo_panels([folder])[0].curves) == 2


def test_every_panel_has_one_axis_of_one_unit_with_names_on_both(tmp_path):
    """No second y-axis: what has another unit has another panel."""
    folder = reward_run(tmp_path / "rm")
    keep(folder, [[1.0, 0.0], [0.5, 1.0]])
    panels = all_panels([sft_run(tmp_path / "sft")], [folder], [ppo_run(tmp_path / "ppo")])
    assert len(panels) == 13
    for panel in panels:
        axes = Figure().add_subplot()
        draw(axes, panel)
        assert axes.get_xlabel() and axes.get_ylabel() and len(axes.figure.axes) == 1


# ---- reward models -------------------------------------------------------------------------------

def keep(folder: str, scores) -> str:
    with open(os.path.join(folder, "kept.jsonl"), "w", encoding="utf-8") as file:
        file.write(json.dumps({"held_out_scores": scores}) + "\n")
    return folder


def test_reliability_hand_example():
    stated, right = reliability([[1, 0], [2, 1], [0, -1], [0, 1]])
    assert stated == pytest.approx([0.7311], abs=1e-4) and right == [0.75]
    assert reliability([[3.0, 3.0]]) == ([0.5], [0.5])


def test_the_reliability_diagram_gives_the_calibration_error():
    """The points, weighted by how many choices each stands for, against an independent sum."""
    rng = random.Random(0)
    scores = [[rng.gauss(1, 2), rng.gauss(0, 2)] for _ in range(500)]
    margins = torch.tensor([chosen - rejected for chosen, rejected in scores])
    counts = Counter(min(9, int((p - 0.5) * 20)) for p in torch.sigmoid(
        margins.double().abs()).tolist())
    stated, right = reliability(scores)
    weights = [counts[place] for place in sorted(counts)]
    error = sum(n * abs(s - r) for n, s, r in zip(weights, stated, right)) / len(scores)
    assert error == pytest.approx(calibration_error(margins), abs=1e-6)


def test_histogram_hand_example():
    x, y = histogram([0.1, 0.2, 0.3, 0.9], 0, 1, 2)
    assert (x, y) == ([0, 0, 0.5, 0.5, 1, 1], [0, 0.75, 0.75, 0.25, 0.25, 0])


def test_a_trained_reward_model_leaves_what_its_diagrams_need():
    """Its points lie above one half, and chosen responses have the higher scores."""
    reliable, scores = score_panels([reward_folder()])
    (diagonal, line) = reliable.curves
    assert diagonal.x == diagonal.y == [0.5, 1.0]
    assert line.x[-1] > 0.95 and line.y[-1] > 0.95       # sure, and right
    chosen, rejected = scores.curves
    means = [sum(x * share for x, share in zip(one.x, one.y)) / sum(one.y)
             for one in (chosen, rejected)]
    assert means[0] > means[1] + 1
    (record,) = read_kept(reward_folder())
    assert len(record["held_out_scores"]) >= 100
    right = sum(one > other for one, other in record["held_out_scores"])
    assert right / len(record["held_out_scores"]) == pytest.approx(
        read_metrics(reward_folder())[-1]["held_out_accuracy"], abs=0.02)


@pytest.mark.parametrize("scores", [[], [[1.0]], [[1.0, "2"]], 3, [[1.0, 1e300]], [[True, False]]])
def test_damaged_scores_are_refused(tmp_path, scores):
    folder = keep(reward_run(tmp_path / "rm"), scores)
    with pytest.raises(ValueError, match="kept.jsonl: expected pairs of scores"):
        reward_panels([folder])


def test_equal_scores_can_be_drawn(tmp_path):
    folder = keep(reward_run(tmp_path / "rm"), [[1.0, 1.0]] * 3)
    draw_panels(reward_panels([folder]), str(tmp_path / "rm.png"))
    assert size_of(tmp_path / "rm.png")[0] == 1200


# ---- bad input -----------------------------------------------------------------------------------

def test_run_of_one_iteration_can_be_drawn(tmp_path):
    training_curves(ppo_run(tmp_path / "ppo", rows=1), str(tmp_path / "one.png"))
    assert size_of(tmp_path / "one.png") == (1200, 1020)


def test_bad_folders_are_refused_and_the_old_picture_stays(tmp_path):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match="run the stage first"):
        training_curves(str(tmp_path / "nothing"), str(path))
    with pytest.raises(ValueError, match="another stage"):
        training_curves(sft_run(tmp_path / "sft"), str(path))
    MetricsFile(str(tmp_path / "empty"), METRICS).finish()
    with pytest.raises(ValueError, match="at least one row"):
        training_curves(str(tmp_path / "empty"), str(path))
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "empty", "sft"]


@pytest.mark.parametrize("options", [{"sft": "", "reward_models": "", "ppo": ""}, {"out": "a.pdf"}])
def test_options_that_give_no_picture_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        PlotsConfig(**options)


def test_drawing_needs_no_screen(tmp_path):
    """pyplot would look for a window system, and would keep every figure in memory."""
    code = ("import sys\nfrom minirlhf.plots import training_curves\n"
            "training_curves(*sys.argv[1:])\nsys.exit('matplotlib.pyplot' in sys.modules)")
    picture = tmp_path / "curves.png"
    done = subprocess.run([sys.executable, "-c", code, ppo_run(tmp_path / "ppo"), str(picture)],
                          env={**environment(), "MPLBACKEND": "TkAgg", "DISPLAY": ""})
    assert done.returncode == 0 and size_of(picture) == (1200, 1020)
