"""Every number in the prose of the lectures has an origin, and is the number that it names."""

from pathlib import Path

import pytest

from lectures import origins

PAGES = {path.name: path.read_text(encoding="utf-8")
         for path in sorted((Path(__file__).resolve().parents[1] / "lectures").glob("*.md"))}
MARK = "<!-- museum.json effects/pad_mask/right/sampled_end_rate -->"


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_a_page_has_an_origin(name):
    assert origins.without_origin(PAGES[name]) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_figure_with_a_mark_is_that_of_the_stored_result(name):
    assert origins.wrong_figures(PAGES[name]) == []
    marks = origins.re.findall(r"<!-- [\w./]+\.json ", PAGES[name])
    assert len(marks) == len(origins.FIGURE.findall(PAGES[name])), "a mark without its figure"


@pytest.mark.parametrize("name", PAGES)
def test_every_equation_of_a_page_holds(name):
    assert origins.wrong_equations(PAGES[name]) == []


def test_a_figure_that_is_not_the_stored_one_is_noticed():
    assert origins.wrong_figures(f"in 99 %{MARK} and in 0.99{MARK}") == []
    assert len(origins.wrong_figures(f"in 98 %{MARK} and in 0.98{MARK}")) == 2


@pytest.mark.parametrize("text", [
    "It was 7.77.", "In 77 % of them.", "After 77 seconds.", "It takes 77 times as long.",
    "| a | 7.77 |", "- first\n- then 7.77", "<!-- numbers: chosen -->\nOne.\n\nIt was 7.77.",
    "- first, 1.11<!-- numbers: chosen -->\n- then 7.77", "```bash\n7.77\n```\nIt was 7.77.",
    "<!-- numbers: museum.json -->\nIt was 7.777777.",
    "<!-- numbers: tests/test_ppo.py::test_gae_hand_example -->\nIt was 7.77."])
def test_a_number_without_origin_is_noticed(text):
    assert len(origins.without_origin(text)) == 1


@pytest.mark.parametrize("text", [
    "Lambda is 0.95.", "See section 7.77 and `x = 7.77`, $7.77$ and [it](a7.77).", "In 77 rows.",
    f"In 99 %{MARK} of them.", "It was 7.77.<!-- numbers: arithmetic -->",
    "<!-- numbers: cited -->\n| 7.77 |\n| 7.78 |", "```python\nx = 7.77\n```\nNow x is 7.77.",
    "<!-- output -->\n```text\nscore 0.777\n```\nA share of 77.7 %, a score of -0.777.",
    "<!-- numbers: museum.json -->\nIn 99 % of the cases.",
    "<!-- numbers: tests/test_ppo.py::test_gae_hand_example -->\nIts advantage is 0.161."])
def test_a_number_with_an_origin_is_accepted(text):
    assert origins.without_origin(text) == []


def test_an_origin_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no test_nothing"):
        origins.without_origin("It was 7.77.<!-- numbers: tests/test_ppo.py::test_nothing -->")
    with pytest.raises(FileNotFoundError):
        origins.without_origin("It was 7.77.<!-- numbers: nothing.json -->")


def test_an_equation_that_does_not_hold_is_noticed():
    right = "0.2 * 0.986 = 0.197, exp(-2.249) = 11 %, (16 + 4) * 1e9 = 20 GB, 2^3 * 1,000 = 8,000"
    assert origins.wrong_equations(right) == []
    wrong = "0.2 * 0.986 = 0.297, exp(-2.249) = 13 %, (16 + 4) * 1e9 = 21 GB, 2^3 * 1,000 = 9,000"
    assert len(origins.wrong_equations(wrong)) == 4
