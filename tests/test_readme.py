"""The README's figures are those of the committed reports, and its links lead somewhere."""

import json
import os
import re

from minirlhf.benchmark import report
from minirlhf.experiments.seeds import summarise

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(*path: str) -> str:
    with open(os.path.join(ROOT, *path), encoding="utf-8") as file:
        return file.read()


def test_the_table_of_seeds_is_made_from_the_committed_reports():
    reports = json.loads(read("lectures", "results", "seeds.json"))["reports"]
    assert summarise(reports) in read("README.md")


def test_the_result_of_the_default_run_is_that_of_the_committed_report():
    found, text = json.loads(read("lectures", "results", "report.json")), read("README.md")
    for policy, line_start in (("base", "base"), ("sft", "SFT"), ("rlhf", "RLHF")):
        (line,) = re.findall(rf"^{line_start}  +-?[0-9].*$", text, re.M)
        for name in ("gold", "score", "answered", "fully_right", "kl_ref", "length"):
            assert f" {found[name][policy]:.2f} " in line, (policy, name)
    win = found["win_rate"]
    assert f"{win['mean']:.2f} [{win['low']:.2f}, {win['high']:.2f}] of comparisons" in text
    assert f"{100 * win['mean']:.0f} % of comparisons" in " ".join(text.split())


def test_the_tables_of_speed_are_those_of_the_committed_benchmark():
    result, text = json.loads(read("lectures", "results", "benchmark.json")), read("README.md")
    for table in (report.limits_table, report.comparison_table, report.shares_table,
                  report.speed_table, report.memory_table, report.overhead_table):
        assert table(result) in text, table.__name__
    for axis in result["growth"]:
        assert report.growth_table(result, axis) in text, axis


def test_the_rates_of_the_diagnosis_are_those_of_the_committed_check():
    found, text = json.loads(read("lectures", "results", "diagnose.json")), read("README.md")
    for name, words in (("recognised", "recognised"), ("accused", "healthy runs accused")):
        hits, runs = (sum(pair[i] for pair in found[name].values()) for i in (0, 1))
        assert f"{hits} of {runs} {words}" in text


def test_every_link_of_the_readme_leads_to_a_file():
    targets = re.findall(r"\]\(([^)#]+)", read("README.md"))
    local = [target for target in targets if not target.startswith("http")]
    assert len(local) > 10
    for target in local:
        assert os.path.exists(os.path.join(ROOT, target)), target


def test_every_command_of_the_readme_names_a_module_that_exists():
    modules = set(re.findall(r"python -m (minirlhf[.\w]*)", read("README.md")))
    assert len(modules) >= 8
    for module in modules:
        path = os.path.join(ROOT, *module.rstrip(".").split("."))
        assert os.path.exists(path + ".py") or os.path.isdir(path), module
