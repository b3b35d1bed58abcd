"""The pictures of the lectures are what `lectures/pictures.py` draws today."""

import re
from pathlib import Path

import numpy as np
import pytest

from lectures import pictures

LECTURES = Path(__file__).resolve().parents[1] / "lectures"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def skeleton_and_numbers(svg: str) -> tuple[str, np.ndarray]:
    """An SVG's text without its numbers, and the numbers: their last digits depend on the CPU."""
    return NUMBER.sub("#", svg), np.array([float(number) for number in NUMBER.findall(svg)])


def same_picture(drawn: str, stored: str) -> bool:
    """Whether two SVGs differ by less than a hundredth of a point everywhere."""
    (shape, numbers), (stored_shape, stored_numbers) = map(skeleton_and_numbers, (drawn, stored))
    return shape == stored_shape and bool(np.allclose(numbers, stored_numbers, rtol=0, atol=0.01))


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_stored_picture_is_the_one_that_the_script_draws(name, tmp_path):
    pictures.save(pictures.PICTURES[name](), tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_text(encoding="utf-8")
    stored = (pictures.FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert same_picture(drawn, stored), f"draw it again: python -m lectures.pictures {name}"


def test_another_picture_is_noticed(tmp_path, monkeypatch):
    stored = (pictures.FOLDER / "beta.svg").read_text(encoding="utf-8")
    monkeypatch.setattr(pictures, "GREEN", "#00FF00")
    pictures.save(pictures.beta(), tmp_path / "green.svg")
    assert not same_picture((tmp_path / "green.svg").read_text(encoding="utf-8"), stored)


def test_every_picture_is_small_on_white_and_used_with_a_description():
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(LECTURES.glob("*.md")))
    assert sorted(path.stem for path in pictures.FOLDER.iterdir()) == sorted(pictures.PICTURES)
    for name in pictures.PICTURES:
        svg = (pictures.FOLDER / f"{name}.svg").read_bytes()
        assert len(svg) < 100_000 and b"fill: #ffffff" in svg, name
        assert re.search(rf"!\[[^\]]{{10,}}\]\(pictures/{name}\.svg\)", text), name


def test_the_reliability_of_a_reward_model_is_stored_as_it_was_kept(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "kept.jsonl").write_text('{"held_out_scores": [[2, 1], [2, 1], [2, 1], [1, 2]]}\n')
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    pictures.store_reliability([str(run)])
    assert pictures.stored("reliability.json") == {
        "reward model 1": {"stated": [0.7311], "right": [0.75], "comparisons": 4}}
