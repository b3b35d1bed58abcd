"""The diagnosis: every illness from numbers and from runs that really have it; healthy runs."""

import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
from helpers import ppo_config, quietly, reward_config, sft_config, toy_prompts

from minirlhf import ppo, ppo_report, reward_model, sft
from minirlhf.diagnose import findings, sft_illnesses
from minirlhf.diagnose.__main__ import DiagnoseConfig, main
from minirlhf.diagnose.ppo_illnesses import PPO, clip_width
from minirlhf.diagnose.report import examine, read_run, samples_of, write_report
from minirlhf.diagnose.sft_illnesses import REWARD_MODEL, SFT
from minirlhf.experiments import diagnose_rates, ill_runs
from minirlhf.files.disk import read_json
from minirlhf.museum.short_runs import substituted

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "lectures" / "results" / "diagnose.json"


# ---- rows made by hand ---------------------------------------------------------------------------

def ppo_rows(count: int = 20, **changes) -> list[dict]:
    """A healthy PPO run; a change is a function of the progress from 0 to 1, or a number."""
    rng, rows = random.Random(0), []
    for iteration in range(count):
        done = iteration / max(1, count - 1)
        row = {"iteration": iteration, "score": 1.2 * done, "gold": 1.5 + 1.4 * done,
               "kl_ref": 2.5 * done, "kl_old": 0.01 * (1.1 - done), "entropy": 0.6 - 0.3 * done,
               "clipfrac": 0.05 * (1.1 - done), "ratio_first": 1e-6,
               "explained_var": 0.8 * done, "advantage_std": 0.7 - 0.3 * done,
               "response_len": 10 + 3 * done, "end_rate": 0.98 + 0.02 * done}
        for name, change in changes.items():
            row[name] = change(done) if callable(change) else change
        for name in ("score", "gold"):
            row[name] += rng.uniform(-0.1, 0.1)
        rows.append(row)
    return rows


def step_rows(count: int = 60, **changes) -> list[dict]:
    """A healthy run of SFT or the reward model, with a held-out loss at every tenth step."""
    rng, rows = random.Random(0), []
    for step in range(1, count + 1):
        done = step / count
        row = {"step": step, "loss": 1.0 - 0.5 * done, "grad_norm": 1.0}
        if step % 10 == 0:
            row.update(held_out_loss=1.0 - 0.4 * done, held_out_accuracy=0.6 + 0.2 * done)
        for name, change in changes.items():
            if name in row:
                row[name] = change(done) if callable(change) else change
        row["loss"] *= rng.uniform(0.9, 1.1)
        rows.append(row)
    return rows


def names_of(stage: str, rows: list[dict]) -> list[str]:
    columns = sorted({name for row in rows for name in row})
    return [finding.illness for finding in examine(stage, columns, rows)[0]]


SICK_ROWS = [
    ("kl_ref is negative", "PPO", {"kl_ref": lambda t: -0.5 * t}),
    ("first ratio off 1", "PPO", {"ratio_first": lambda t: 0.3 * (t > 0.5)}),
    ("advantages vanish", "PPO", {"advantage_std": 1e-3}),
    ("nothing moves", "PPO", {"kl_old": 1e-11, "kl_ref": lambda t: 1e-6 * t}),
    ("updates too large", "PPO", {"kl_old": lambda t: 0.2 * (t < 0.3)}),
    ("updates too large", "PPO", {"clipfrac": lambda t: 0.3 * (t > 0.8)}),
    ("clip too tight", "PPO", {"clipfrac": 0.9}),
    ("responses do not end", "PPO", {"end_rate": lambda t: 1 - 0.6 * t}),
    ("responses do not end", "PPO", {"end_rate": lambda t: 0.3 + 0.7 * t}),
    ("KL runs away", "PPO", {"kl_ref": lambda t: 60 * t}),
    ("reward hacking", "PPO", {"gold": lambda t: 1.5 + 4 * t - 6 * t * t}),
    ("length drifts with the score", "PPO", {"response_len": lambda t: 10 + 15 * t}),
    ("length drifts with the score", "PPO", {"response_len": lambda t: 10 - 6 * t}),
    ("entropy collapse", "PPO", {"entropy": lambda t: 0.6 - 0.58 * t}),
    ("critic explains nothing", "PPO", {"explained_var": 0.0}),
    ("nothing moves", "SFT", {"held_out_loss": 1.0, "loss": 1.0}),
    ("rate too high", "SFT", {"loss": lambda t: 1 + 5 * (t > 0.2)}),
    ("learned by heart", "SFT", {"held_out_loss": lambda t: 1 - t + 1.3 * t * t}),
    ("learned by heart", "reward model", {"held_out_loss": lambda t: 1 - t + 1.3 * t * t}),
    ("reward model at chance", "reward model", {"held_out_accuracy": 0.51}),
    ("reward model at chance", "reward model", {"held_out_accuracy": lambda t: 0.62 - 0.01 * t,
                                                "held_out_loss": lambda t: 0.693 - 0.01 * t}),
]


@pytest.mark.parametrize("illness, stage, changes", SICK_ROWS)
def test_an_illness_is_found_in_rows_that_show_it_and_nothing_else_is(illness, stage, changes):
    rows = ppo_rows(**changes) if stage == "PPO" else step_rows(**changes)
    assert names_of(stage, rows) == [illness]


def test_every_illness_has_rows_that_show_it():
    looked_for = {("PPO", x.illness) for x in PPO} | {("SFT", x.illness) for x in SFT}
    looked_for |= {("PPO", x.other) for x in PPO if x.other}
    looked_for.add(("reward model", "reward model at chance"))
    assert looked_for <= {(stage, illness) for illness, stage, _ in SICK_ROWS}


def test_healthy_rows_have_no_finding():
    for count in (1, 2, 3, 5, 12, 20, 100):
        assert names_of("PPO", ppo_rows(count)) == []
        assert names_of("reward model", step_rows(10 * count)) == []
        assert names_of("SFT", step_rows(10 * count)) == []


@pytest.mark.parametrize("change", [{"gold": lambda t: 1.5}, {"score": lambda t: -t},
                                    {"kl_ref": lambda t: -0.02}, {"response_len": lambda t: 200}])
def test_what_only_resembles_an_illness_is_no_finding(change):
    assert names_of("PPO", ppo_rows(**change)) == []


def test_a_gold_that_falls_with_the_score_is_no_hacking():
    falling = {"gold": lambda t: 1.5 + 4 * t - 6 * t * t, "score": lambda t: t - 2 * t * t}
    assert names_of("PPO", ppo_rows(**falling)) == []


def test_a_finding_has_the_figure_and_its_iteration():
    rows = ppo_rows(20, kl_ref=lambda t: 60.0)
    (finding,), _, _ = examine("PPO", list(rows[0]), rows)
    assert "60.0 nats per response" in finding.figure and "iterations 15 to 19" in finding.figure


def test_a_clip_range_that_is_too_narrow_is_not_called_an_update_that_is_too_large():
    rows = ppo_rows(clipfrac=0.5, kl_old=0.01)           # by the curves alone: a width of 0.1
    for cliprange, illness in ((0.001, "clip too tight"), (0.2, "updates too large")):
        (finding,), _, _ = examine("PPO", list(rows[0]), rows, {"cliprange": cliprange})
        assert finding.illness == illness
        assert ("lower lr" in finding.remedies) == (illness == "updates too large")
    (unknown,), _, _ = examine("PPO", list(rows[0]), rows)
    assert unknown.causes[-1].startswith("or cliprange is far below 0.2")
    rows = ppo_rows(clipfrac=0.9, kl_old=0.3)            # it did go far, whatever the range
    (finding,), _, _ = examine("PPO", list(rows[0]), rows, {"cliprange": 0.001})
    assert finding.illness == "updates too large"


def test_noisy_labels_come_before_a_loss_that_does_not_move():
    rows = step_rows(held_out_loss=0.68, held_out_accuracy=0.6)
    assert names_of("reward model", rows) == ["reward model at chance", "nothing moves"]
    finding = examine("reward model", ["held_out_loss", "held_out_accuracy", "loss"], rows)[0][0]
    assert finding.causes[0].startswith("the labels are noisy")
    right = step_rows(held_out_loss=lambda t: 0.693 - 0.08 * t, held_out_accuracy=0.64)
    assert names_of("reward model", right) == []         # as on real comparisons
    young = step_rows(10, held_out_loss=0.68, held_out_accuracy=0.6)
    assert names_of("reward model", young) == []         # the first evaluation says little


def test_small_statistics_of_the_docstrings():
    assert clip_width(0.02, 0.317) == pytest.approx(0.2, abs=1e-3)
    assert clip_width(-1.0, 0.5) == 0.0 and abs(clip_width(0.02, 1.0)) < 1e-9
    assert findings.mean([1, 2, 6]) == 3 and findings.smooth([0, 3, 6, 0]) == [1.5, 3, 3, 3]
    assert findings.place(ppo_rows(3)) == "iterations 0 to 2"
    assert len(findings.late(ppo_rows(25))) == 6 and len(findings.late(ppo_rows(4))) == 3
    assert sft_illnesses.window_means([1, 3, 5], 2) == [2, 4]
    assert diagnose_rates.totals({"a": [1, 2], "b": [3, 3]}) == [4, 5]


def test_a_few_iterations_are_too_few_to_say(tmp_path):
    text, findings = write_report(write(tmp_path, ppo_rows(3, explained_var=0.0, entropy=0.01)))
    assert findings == []
    assert "critic explains nothing: explained_var has 3 values so far, 10 are needed" in text
    assert "entropy collapse: entropy has 3 values so far" in text


def test_a_run_without_gold_is_examined_for_the_rest(tmp_path):
    rows = [{**row, "gold": ""} for row in ppo_rows(20, kl_ref=lambda t: 60.0)]
    text, findings = write_report(write(tmp_path, rows))
    assert [finding.illness for finding in findings] == ["KL runs away"]
    assert "reward hacking: gold is empty (--gold names a judge)" in text


def test_an_older_file_without_a_column_is_examined_for_the_rest(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "ratio_first"} for row in ppo_rows()]
    text, findings = write_report(write(tmp_path, rows))
    assert findings == [] and "first ratio off 1: there is no column ratio_first" in text


# ---- texts ---------------------------------------------------------------------------------------

def all_findings() -> list:
    found = []
    for _, stage, changes in SICK_ROWS:
        rows = ppo_rows(**changes) if stage == "PPO" else step_rows(**changes)
        found += examine(stage, sorted({name for row in rows for name in row}), rows)[0]
    return found


def test_the_sections_that_findings_name_exist():
    for finding in all_findings():
        file, title = re.fullmatch(r'(lectures/[\w-]+\.md), "(.+)"', finding.lecture).groups()
        text = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(f"^#+ {re.escape(title)}$", text, re.M), finding.lecture


def test_options_that_a_remedy_names_exist():
    fields = {field.name for config in (ppo.PPOConfig, sft.SFTConfig,
                                        reward_model.RewardModelConfig)
              for field in dataclasses.fields(config)} | set(ppo_report.METRICS)
    words = {"held_out_accuracy", "check_rollout", "old_logprobs", "ref_logprobs", "old_values",
             "ratio_first", "advantage_std"}
    for finding in all_findings():
        for text in (*finding.causes, *finding.remedies):
            for word in re.findall(r"[a-z]+_[a-z_]+", text.replace("reward_model does", "")):
                assert word in fields | words, word


def test_every_finding_has_causes_and_remedies_and_every_function_says_what_it_teaches():
    for finding in all_findings():
        assert finding.causes and finding.remedies and finding.figure
    for examination in PPO + REWARD_MODEL:
        assert examination.function.__doc__.startswith("You learn: "), examination.illness


# ---- commands ----------------------------------------------------------------------------------

def write(folder: Path, rows: list[dict], name: str = "metrics.csv") -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(columns)] + [",".join(str(row.get(x, "")) for x in columns) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def test_the_command_takes_the_folder_alone(tmp_path):
    folder = write(tmp_path, ppo_rows())
    done = subprocess.run([sys.executable, "-m", "minirlhf.diagnose", folder], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "Nothing ill was found" in done.stdout, done.stderr


def test_the_old_command_of_the_rates_names_the_new_one():
    done = subprocess.run([sys.executable, "-m", "minirlhf.diagnose.check"], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode != 0 and done.stderr.count("\n") == 1
    assert "python -m minirlhf.experiments.diagnose_rates" in done.stderr


# ---- runs in which an illness was really produced ------------------------------------------------

def contradictions(count: int, seed: int, model: str = "") -> list[dict]:
    """Comparisons whose label is a coin."""
    rng, rows = random.Random(seed), []
    for row in toy_prompts(count, seed):
        one, other = rng.sample(["red " + helpers.colour_words(rng, helpers.COLOURS),
                                 "blue " + helpers.colour_words(rng, helpers.COLOURS)], 2)
        rows.append({**row, "chosen": one, "rejected": other})
    return rows


def diagnose_run(trainer, cfg, mistake: str = "") -> list[str]:
    """The illnesses that are found in the folder of a toy run."""
    with substituted(ill_runs.replacements(mistake)):
        quietly(trainer.main, cfg)
    return [finding.illness for finding in quietly(main, DiagnoseConfig(run=cfg.out))]


LONGER = {"iterations": 12, "batch_size": 16, "minibatch_size": 8}


@pytest.mark.parametrize("illness, options, mistake", [
    ("kl_ref is negative", {"lr": 2e-2}, "stale sampler"),
    ("first ratio off 1", {}, "dropout in the update"),
    ("advantages vanish", {"reward": "minirlhf.experiments.ill_runs:constant",
                           "max_new_tokens": 8}, ""),
    ("nothing moves", {"lr": 1e-9}, ""),
    ("updates too large", {"lr": 0.1}, ""),
    ("clip too tight", {"cliprange": 1e-4}, ""),
    ("responses do not end", {"max_new_tokens": 1}, ""),
    ("KL runs away", {"kl_coef": 0.0, "lr": 2e-2, "max_new_tokens": 12}, ""),
    ("length drifts with the score", {"reward": "minirlhf.experiments.ill_runs:brevity",
                                      "lr": 1e-2, "max_new_tokens": 8}, ""),
    ("entropy collapse", {"reward": "minirlhf.experiments.ill_runs:brevity", "kl_coef": 0.0,
                          "lr": 1e-2}, ""),
    ("critic explains nothing", {"critic_lr": 0.0}, ""),
])
def test_an_illness_is_recognised_in_a_ppo_run_that_has_it(tmp_path, illness, options, mistake):
    (examination,) = [x for x in PPO if illness in (x.illness, x.other)]
    if not set(examination.columns) <= set(ppo_report.METRICS):
        pytest.skip(f"metrics.csv has no column {examination.columns}")
    cfg = ppo_config(**{**LONGER, **options, "out": str(tmp_path / "run")})
    assert illness in diagnose_run(ppo, cfg, mistake)


def test_a_reward_model_of_contradictory_labels_is_recognised(tmp_path):
    cfg = reward_config(data="test_diagnose:contradictions", out=str(tmp_path / "run"), epochs=1)
    assert "reward model at chance" in diagnose_run(reward_model, cfg)


def test_sft_runs_with_a_wrong_rate_are_recognised(tmp_path):
    short = {"examples": 400, "eval_every": 5}
    still = sft_config(lr=1e-9, out=str(tmp_path / "still"), **short)
    assert diagnose_run(sft, still) == ["nothing moves"]
    wild = sft_config(lr=2.0, warmup_steps=0, out=str(tmp_path / "wild"), **short)
    assert "rate too high" in diagnose_run(sft, wild)


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.2}, {"lam": 1.0, "seed": 3}])
def test_healthy_toy_runs_are_not_accused(tmp_path, options):
    healthy = {"batch_size": 32, "minibatch_size": 16, "iterations": 16, "max_new_tokens": 8,
               "lr": 2e-3, "kl_coef": 0.05}
    cfg = ppo_config(**{**healthy, **options, "out": str(tmp_path / "run")})
    assert diagnose_run(ppo, cfg) == []


def test_healthy_sft_and_reward_model_are_not_accused():
    for folder in (helpers.sft_folder(), helpers.reward_folder()):
        assert quietly(main, DiagnoseConfig(run=folder)) == []


def test_what_the_policy_wrote_stands_in_the_report(tmp_path):
    cfg = ppo_config(out=str(tmp_path / "run"))
    quietly(ppo.main, cfg)
    first, last = samples_of(cfg.out)
    assert first.startswith("iteration 0: 'Prompt: Colours for ") and last.startswith("iteration 1")
    (tokens,) = re.findall(r"\n    response: (.+)", first)
    words = set(re.sub(r"<\|endoftext\|>", "", tokens).split())
    assert words and words <= set(helpers.COLOURS), tokens
    (sft_first, sft_last) = samples_of(helpers.sft_folder())
    assert sft_first.startswith("step ") and "Response:" in sft_last


def toy_case(name: str, **options) -> ill_runs.Case:
    """A case of the rates that needs no stage of the pipeline."""
    values = dataclasses.asdict(ppo_config(**options))
    return ill_runs.Case(name, "ppo", (), {name: value for name, value in values.items()
                                           if name not in ("out", "seed")})


def test_a_run_of_the_rates_keeps_its_metrics_and_is_not_made_twice(tmp_path, monkeypatch):
    where = "no stages", str(tmp_path / "runs")
    folder = diagnose_rates.make_run(toy_case("rate 0, a toy", lr=0.0), 3, *where)
    assert folder == str(tmp_path / "runs" / "rate_0__a_toy-3")
    assert sorted(path.name for path in Path(folder).iterdir()) == ["metrics.csv", "samples.txt"]
    assert len(read_run(folder)[2]) == 2
    monkeypatch.delattr(diagnose_rates, "short_run")     # a second run would miss it
    assert diagnose_rates.make_run(toy_case("rate 0, a toy"), 3, *where) == folder


def test_a_run_of_the_rates_that_breaks_down_keeps_what_it_had_written(tmp_path):
    case = toy_case("a reward of nan", reward="helpers:nan_reward")
    folder = diagnose_rates.make_run(case, 0, "no stages", str(tmp_path / "runs"))
    text = Path(folder, "metrics.csv.part").read_text(encoding="utf-8")
    assert text == ",".join(ppo_report.METRICS) + "\n"


# ---- the committed result ------------------------------------------------------------------------

def test_every_illness_is_produced_by_a_case_and_every_case_names_an_illness():
    known = {examination.illness for examination in PPO + REWARD_MODEL}
    produced = {illness for case in ill_runs.SICK for illness in case.illnesses}
    assert produced == known
    names = [case.name for case in ill_runs.SICK + ill_runs.HEALTHY]
    assert len(names) == len(set(names)) and all(not case.illnesses for case in ill_runs.HEALTHY)


def test_rates_are_counted_from_the_findings_of_each_run():
    results = {case.name: [list(case.illnesses), []] for case in ill_runs.SICK}
    results.update({case.name: [[], []] for case in ill_runs.HEALTHY})
    results["default"] = [["entropy collapse"], []]
    results["critic_lr 0"][1] = ["advantages vanish"]
    report = diagnose_rates.count(results)
    assert report["recognised"]["kl_ref is negative"] == [1, 2]
    assert report["recognised"]["updates too large"] == [2, 4]
    assert report["accused"]["default"] == [1, 2] and report["accused_in_all"][0] == 1
    assert report["others"] == {"critic_lr 0": {"advantages vanish": 1}}
    assert "| default | 1 of 2 |" in diagnose_rates.table(report)


def test_missing_stages_are_refused_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="make the stages with: python -m minirlhf"):
        diagnose_rates.main(diagnose_rates.RatesConfig(stages=str(tmp_path)))


def test_the_committed_rates_are_counted_from_runs_of_all_cases():
    report = read_json(str(RESULT))
    assert set(report["findings"]) == {case.name for case in ill_runs.SICK + ill_runs.HEALTHY}
    assert all(len(runs) == len(report["seeds"]) for runs in report["findings"].values())
    counted = diagnose_rates.count(report["findings"])
    assert {name: report[name] for name in counted} == counted
    assert not {100, 101} & set(report["seeds"]), "the seeds that thresholds were chosen on"
