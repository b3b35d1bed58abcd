"""plots.py: what is drawn from metrics.csv, and how the picture is written."""

import os
import subprocess
import sys

import pytest
from helpers import environment

from minirlhf.engine.metrics import MetricsFile
from minirlhf.plots import (
    PlotsConfig,
    curve,
    main,
    pipeline_picture,
    ppo_panels,
    reward_panels,
    sft_panels,
    smooth,
    training_curves,
)
from minirlhf.ppo_report import METRICS


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
    (panel,) = sft_panels(sft_run(tmp_path))
    batches, _, held_out = panel.curves
    assert len(batches.x) == 30 and held_out.x == [5, 10, 15, 20, 25, 30]


def test_rows_without_a_step_are_no_points():
    rows = [{"step": 1.0, "loss": 2.0}, {"loss": 9.0}, {"step": 3.0}]
    line = curve(rows, "step", "loss", "", "black")
    assert (line.x, line.y) == ([1.0], [2.0])


def test_gold_is_drawn_beside_the_score_where_there_is_a_gold_judge(tmp_path):
    with_gold, without = ppo_run(tmp_path / "a"), ppo_run(tmp_path / "b", gold=False)
    assert [curve.label[:5] for curve in ppo_panels(with_gold)[0].curves] == ["score", "gold,"]
    assert [curve.label[:5] for curve in ppo_panels(without)[0].curves] == ["score"]


def test_every_reward_model_has_its_curve_and_its_look(tmp_path):
    folders = [reward_run(tmp_path / f"rm_{i}") for i in range(6)]
    accuracy, calibration = reward_panels(folders)
    assert [curve.label for curve in accuracy.curves] == [f"rm_{i}" for i in range(6)]
    assert len({(curve.colour, curve.style) for curve in calibration.curves}) == 6


def test_pictures_have_one_row_for_three_panels(tmp_path):
    sft, rm, ppo = tmp_path / "sft", tmp_path / "rm", tmp_path / "ppo"
    sft, rm, ppo = sft_run(sft), reward_run(rm), ppo_run(ppo)
    training_curves(ppo, str(tmp_path / "ppo.png"))
    assert size_of(tmp_path / "ppo.png") == (1200, 680)
    pipeline_picture(sft, [rm, rm], ppo, str(tmp_path / "new" / "all.png"))
    width, height = size_of(tmp_path / "new" / "all.png")
    assert width == 1200 and abs(height - 1020) <= 1     # some versions of matplotlib round down
    main(PlotsConfig(sft=sft, reward_models="", ppo="", out=str(tmp_path / "sft.png")))
    assert size_of(tmp_path / "sft.png") == (1200, 340)


def test_run_of_one_iteration_can_be_drawn(tmp_path):
    training_curves(ppo_run(tmp_path / "ppo", rows=1), str(tmp_path / "one.png"))
    assert size_of(tmp_path / "one.png") == (1200, 680)


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
    assert done.returncode == 0 and size_of(picture) == (1200, 680)
