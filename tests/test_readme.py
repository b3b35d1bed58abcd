"""The figures of the README and of the pages that it links are those of the stored results.

Their links lead somewhere, and the commands that they name exist.
"""

import json
import re
from pathlib import Path

import pytest

from minirlhf.benchmark.machine import ratio
from minirlhf.benchmark.report import markdown
from minirlhf.experiments.seeds import summarise

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "lectures" / "results"
PAGES = ["README.md", *sorted(f"lectures/{path.name}" for path in (ROOT / "lectures").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def stored(name: str):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# ---- figures -------------------------------------------------------------------------------------

def test_the_table_of_seeds_is_made_from_the_stored_reports():
    assert summarise(stored("seeds.json")["reports"]) in read("lectures/reliability.md")


def test_the_small_table_of_the_readme_is_the_mean_and_the_range_over_the_seeds():
    reports = stored("seeds.json")["reports"]

    def cell(figures: list[float]) -> str:
        return (f"{sum(figures) / len(figures):.2f} "
                f"({min(figures):.2f} to {max(figures):.2f})")

    for title, name in (("the gold judge's score, at most 3.5", "gold"),
                        ("answers that are fully right", "fully_right")):
        cells = [cell([row[name][policy] for row in reports]) for policy in ("base", "sft", "rlhf")]
        assert f"| {title} | {' | '.join(cells)} |" in read("README.md")
    cells = [cell([row[name]["mean"] for row in reports]) for name in ("control", "win_rate")]
    assert f"| beats SFT, share of comparisons | | {' | '.join(cells)} |" in read("README.md")


def test_the_result_of_the_default_run_is_that_of_the_stored_report():
    result, text = stored("report.json"), read("README.md")
    for policy, line_start in (("base", "base"), ("sft", "SFT"), ("rlhf", "RLHF")):
        (line,) = re.findall(rf"^{line_start}  +-?[0-9].*$", text, re.M)
        for name in ("gold", "score", "answered", "fully_right", "kl_ref", "length"):
            assert f" {result[name][policy]:.2f} " in line, (policy, name)
    win = result["win_rate"]
    assert f"{win['mean']:.2f} [{win['low']:.2f}, {win['high']:.2f}] of comparisons" in text
    assert f"{100 * win['mean']:.0f} % of comparisons" in " ".join(text.split())
    assert f"\n{result['seconds']['total']:.0f} s in all." in text


def test_the_seconds_of_the_stages_are_those_of_the_stored_report():
    seconds = stored("report.json")["seconds"]
    cells = [f"{seconds[name]:.0f}" for name in ("sft", "comparisons", "reward_models", "ppo",
                                                 "evaluation", "total")]
    assert f"| seconds | {' | '.join(cells)} |" in read("lectures/speed.md")


def test_the_tables_of_speed_are_those_of_the_stored_benchmarks():
    text = read("lectures/speed.md")
    for name in ("benchmark.json", "benchmark_gpu.json"):
        rows = [line for line in markdown(stored(name)).split("\n") if line.startswith("|")]
        assert len(rows) > 20 and all(f"{row}\n" in text for row in rows)
    first = next(iter(stored("benchmark.json")["variants"].values()))
    faster = ratio(first["naive"]["iteration"], first["seconds"]["iteration"])["median"]
    assert f"{faster:.1f} times as fast as a naive one" in " ".join(read("README.md").split())


def test_the_rates_of_the_diagnosis_are_those_of_the_stored_check():
    result, text = stored("diagnose.json"), read("lectures/reliability.md")
    for name, words in (("recognised", "recognised"), ("accused", "healthy runs accused")):
        hits, runs = (sum(pair[i] for pair in result[name].values()) for i in (0, 1))
        assert f"{hits} of {runs} {words}" in text


def test_figures_that_the_readme_repeats_are_those_of_its_pages():
    short = " ".join(read("README.md").split())
    for figure, page in (("90 kill", "reliability"), ("322,200 ", "reliability"),
                         ("10,605 ", "real-input")):
        assert figure in short and figure in read(f"lectures/{page}.md"), figure
    long_tests = (RESULTS / "long_tests.txt").read_text(encoding="utf-8")
    for what, count in (("kills", 90), ("files", 322_200), ("random cases", 148_100)):
        assert sum(map(int, re.findall(rf": (\d+) {what}", long_tests))) == count, what
    sft, rlhf = (stored("reviews.json")["reports"][0]["policies"][name]["score of B"]["mean"]
                 for name in ("sft", "ppo"))
    assert f"rises too, from {sft:.2f} to {rlhf:.2f}." in short
    assert f"| {sft:.2f} [" in read("lectures/real-input.md")
    assert f"| **{rlhf:.2f} [" in read("lectures/real-input.md")


# ---- links and commands --------------------------------------------------------------------------

def test_the_readme_can_be_read_in_one_sitting():
    assert len(read("README.md").splitlines()) <= 200


def test_every_link_of_the_readme_leads_to_a_file_or_a_section():
    targets = re.findall(r"\]\(([^)]+)\)", read("README.md"))
    local = [target for target in targets if not target.startswith("http")]
    assert len(local) > 10
    for target in local:
        path, _, section = target.partition("#")
        assert (ROOT / path).exists(), target
        titles = re.findall(r"^#+ (.+)$", read(path), re.M) if section else []
        assert not section or section in [title.lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_names_a_module_that_exists(page):
    modules = set(re.findall(r"python -m\s(minirlhf[.\w]*)", read(page)))
    assert modules
    for module in modules:
        path = ROOT.joinpath(*module.rstrip(".").split("."))
        assert path.with_suffix(".py").exists() or path.is_dir(), module


def test_every_folder_of_the_package_is_in_the_readme():
    for folder in (ROOT / "minirlhf").iterdir():
        if (folder / "__init__.py").exists():
            assert f"](minirlhf/{folder.name})" in read("README.md"), folder.name


def test_every_file_of_the_readers_path_is_in_the_readme():
    helpers = {"__init__", "__main__", "minirlhf"}       # no reading matter
    for file in (ROOT / "minirlhf").glob("*.py"):
        assert file.stem in helpers or f"](minirlhf/{file.name})" in read("README.md"), file.name


def test_the_table_of_settings_is_the_stored_one():
    stored = json.loads((RESULTS / "settings.json").read_text(encoding="utf-8"))["settings"]
    page = (ROOT / "lectures" / "reliability.md").read_text(encoding="utf-8")
    for name, figures in stored.items():
        rate, right = figures["win_rate"], figures["fully_right"]
        accuracies = ", ".join(f"{value:.3f}" for value in figures["reward_model_accuracy"])
        row = (f"| {name} | {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}] | "
               f"{right['sft']:.3f} / {right['rlhf']:.3f} | {accuracies} |")
        assert row in page
        assert rate["mean"] >= 0.80 and abs(figures["control"] - 0.5) <= 0.02     # as promised
