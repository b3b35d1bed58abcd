"""What the diagnosis reads from a run's folder: metrics, options, and files that are neither."""

import dataclasses
import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY
from test_diagnose import ppo_rows, step_rows, write

from minirlhf import ppo, ppo_report, reward_model, sft
from minirlhf.diagnose import option_remarks
from minirlhf.diagnose.__main__ import DiagnoseConfig
from minirlhf.diagnose.option_remarks import COMMANDS, remarks_on
from minirlhf.diagnose.report import read_run, stage_of, write_report
from minirlhf.engine.state import write_state
from minirlhf.experiments import ill_runs

# ---- metrics -------------------------------------------------------------------------------------

def test_an_unfinished_run_is_read_up_to_its_last_whole_line(tmp_path):
    folder = write(tmp_path, ppo_rows(12), "metrics.csv.part")
    with open(tmp_path / "metrics.csv.part", "a", encoding="utf-8") as file:
        file.write("12,0.5")                             # a row that is being written
    path, columns, rows = read_run(folder)
    assert path.endswith(".part") and len(rows) == 12
    assert "12 iterations, not finished" in write_report(folder)[0]


def test_the_trainers_are_told_apart_by_their_columns():
    assert stage_of(ppo_report.METRICS, "x") == "PPO"
    steps = ["step", "loss", "held_out_loss", "grad_norm", "lr"]
    assert stage_of(steps, "x") == "SFT"
    assert stage_of([*steps, "held_out_accuracy"], "x") == "reward model"


@pytest.mark.parametrize("text, words", [
    ("", "expected a line of names"), ("iteration,score\n", "at least one row"),
    ("epoch,reward\n1,2\n", "expected the columns of ppo"),
    ("iteration,score,kl_ref,entropy\n0,1,2\n", "metrics.csv:2: expected 4 numbers"),
    ("iteration,score,kl_ref,entropy\n0,1,two,3\n", "metrics.csv:2: expected 4 numbers"),
    ("iteration,score,kl_ref,entropy\n0,1,2,3\n1,1,nan,3\n", "kl_ref is nan"),
    ("\0\0\n\0\n", "found")])
def test_a_file_that_holds_something_else_is_refused_with_its_name(tmp_path, text, words):
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        write_report(str(tmp_path))
    assert "metrics.csv" in str(error.value)


def test_mutated_files_end_in_a_report_or_a_value_error(tmp_path):
    rng = random.Random(0)
    whole = {name: Path(write(tmp_path, rows), "metrics.csv").read_bytes()
             for name, rows in (("ppo", ppo_rows()), ("steps", step_rows()))}
    reports = 0
    for number in range(400):
        content = bytearray(whole[rng.choice(["ppo", "steps"])])
        for _ in range(rng.randint(1, 4)):
            first = rng.randrange(len(content))
            content[first:first + rng.choice([0, 1, 1, 9, 200])] = rng.choice(
                [b"", b"0", b"-1", b",", b"\n", b"nan", b"1e308", b"\0", b'"', b"\xff", b"x"])
        (tmp_path / "metrics.csv").write_bytes(content)
        try:
            write_report(str(tmp_path))
            reports += 1
        except ValueError as error:
            assert "metrics.csv" in str(error), number
    assert 20 < reports < 380


def test_a_folder_without_metrics_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="--out"):
            write_report(str(folder))
    with pytest.raises(ValueError, match="expected the folder of a run"):
        DiagnoseConfig()


# ---- what the options say ------------------------------------------------------------------------

CONFIGS = {"PPO": ppo.PPOConfig, "SFT": sft.SFTConfig,
           "reward model": reward_model.RewardModelConfig}
STAGE_OF = {"ppo": "PPO", "sft": "SFT", "reward_model": "reward model"}


def rows_of(stage: str) -> list[dict]:
    """The metrics of a healthy run."""
    if stage == "PPO":
        return ppo_rows()
    return [{name: value for name, value in row.items()
             if stage == "reward model" or name != "held_out_accuracy"} for row in step_rows(200)]


def finished_run(folder: Path, stage: str, rows: list[dict] | None = None, **changes) -> str:
    """A folder with healthy metrics and run.json, whose options are the defaults but for some."""
    rows = rows or rows_of(stage)
    config = {**dataclasses.asdict(CONFIGS[stage]()), **changes}
    run = {"command": COMMANDS[stage], "finished": True, "config": config}
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (folder / "config.json").write_text('{"n_embd": 96}', encoding="utf-8")
    return write(folder, rows)


def remarked(stage: str, rows: list[dict] | None = None, **changes) -> list[str]:
    """The options on which there is a remark, in a run of the defaults but for some."""
    rows = rows or rows_of(stage)
    options = {**dataclasses.asdict(CONFIGS[stage]()), "n_embd": 96, **changes}
    return [remark.option for remark in remarks_on(stage, options, rows, True)]


@pytest.mark.parametrize("stage, name, value", [
    ("PPO", "kl_coef", 0.0), ("PPO", "kl_coef", 5.0), ("PPO", "gamma", 0.0), ("PPO", "gamma", 0.9),
    ("PPO", "lam", 0.0), ("PPO", "cliprange", 0.001), ("PPO", "cliprange_value", 1e-3),
    ("PPO", "lr", 0.0), ("PPO", "lr", 5e-6), ("PPO", "lr", 5e-2), ("PPO", "critic_lr", 0.0),
    ("PPO", "critic_lr", 0.5), ("PPO", "temperature", 0.1), ("PPO", "temperature", 3.0),
    ("PPO", "vf_coef", 0.0), ("PPO", "ent_coef", 1.0), ("PPO", "epochs", 16),
    ("PPO", "warmup_iterations", 25), ("PPO", "missing_end_penalty", 0.0),
    ("PPO", "max_new_tokens", 3), ("PPO", "minibatch_size", 1), ("PPO", "kl_old_stop", 1e-6),
    ("PPO", "max_grad_norm", 1e-4), ("PPO", "kl_target", 0.01), ("PPO", "prompt_count", 1),
    ("SFT", "lr", 0.1), ("SFT", "lr", 1e-8), ("SFT", "epochs", 15), ("SFT", "warmup_steps", 500),
    ("SFT", "weight_decay", 5.0), ("SFT", "held_out", 2), ("reward model", "lr", 1e-8),
    ("reward model", "epochs", 8), ("reward model", "max_new_tokens", 2),
    ("reward model", "norm_samples", 2), ("reward model", "warmup_steps", 250)])
def test_an_option_far_from_its_usual_value_is_named_and_no_other(tmp_path, stage, name, value):
    text, found = write_report(finished_run(tmp_path, stage, **{name: value}))
    assert found == [], "the curves are healthy"
    said = re.findall(r"^  - (\w+) is (\S+);", text, re.M)
    assert said == [(name, f"{value:.7g}")], text
    assert f"The curves show nothing ill, but look at the options: {name}." in text


def test_a_healthy_run_with_usual_options_is_not_accused(tmp_path):
    cases = [ill_runs.Case(stage, stage) for stage in STAGE_OF] + ill_runs.HEALTHY
    cases += [ill_runs.Case("GPT-2", "ppo", options={"lr": 1e-5, "critic_lr": 1e-5, "n_embd": 768}),
              ill_runs.Case("GPT-2", "sft", options={"lr": 2e-5, "n_embd": 768}),
              ill_runs.Case("GPT-2", "reward_model", options={"lr": 1e-5, "n_embd": 768}),
              ill_runs.Case("as InstructGPT", "ppo", options={"kl_coef": 0.02, "epochs": 1,
                                                              "batch_size": 512}),
              ill_runs.Case("bfloat16", "ppo", options={"dtype": "bfloat16"})]
    for case in cases:
        stage = STAGE_OF[case.stage]
        assert remarked(stage, **case.options) == [], case.name
        options = {name: value for name, value in case.options.items() if name != "n_embd"}
        assert remarked(stage, n_embd=None, **options) == [], case.name
        if "n_embd" not in case.options:
            text, found = write_report(finished_run(tmp_path, stage, **options))
            assert found == [] and "no option is far from its usual value" in text, case.name
            assert "Nothing ill was found" in " ".join(text.split()), case.name


def test_a_rate_is_judged_by_the_size_of_the_model():
    assert remarked("PPO", lr=5e-6) == ["lr"] and remarked("PPO", lr=5e-6, n_embd=768) == []
    assert remarked("PPO", lr=5e-4, critic_lr=1e-5, n_embd=768) == ["lr"]


def test_gamma_is_judged_by_the_length_of_the_responses():
    assert remarked("PPO", gamma=0.99) == []             # 12 tokens
    assert remarked("PPO", ppo_rows(response_len=200), gamma=0.99) == ["gamma"]


def test_bfloat16_is_named_as_the_cause_of_a_first_ratio_a_little_off(tmp_path):
    rows = ppo_rows(ratio_first=0.04)
    text, found = write_report(finished_run(tmp_path, "PPO", rows, dtype="bfloat16"))
    assert found == [] and "off 1 by up to 0.04" in " ".join(text.split())
    assert "dtype is bfloat16" in text and "look at the options" not in text
    text, found = write_report(finished_run(tmp_path, "PPO", rows))
    assert [x.illness for x in found] == ["first ratio off 1"] and "--dtype bfloat16" not in text
    rows = ppo_rows(ratio_first=0.5)
    text, found = write_report(finished_run(tmp_path, "PPO", rows, dtype="bfloat16"))
    assert [x.illness for x in found] == ["first ratio off 1"] and "dtype is bfloat16" not in text


def test_findings_follow_from_options_that_are_far_off(tmp_path):
    rows = ppo_rows(clipfrac=0.95)
    text, found = write_report(finished_run(tmp_path, "PPO", rows, cliprange=0.001))
    assert [x.illness for x in found] == ["clip too tight"] and "lower lr" not in text
    assert "1 finding. Begin with the options (cliprange)" in text


def training_state(folder: Path, config: dict) -> None:
    state = {"command": "PPO", "config": config, "step": 5, "row": {}, "inputs": {}, "threads": 1,
             "files": {"metrics.csv": [1, "x"], "samples.txt": [1, "x"]}, "torch": "2",
             "processes": 1, "products": "x"}
    write_state(str(folder / "training_state.safetensors"), state,
                {"networks.policy.wte.weight": torch.zeros(4, 96)})


def test_the_options_of_an_unfinished_run_are_read_from_its_state(tmp_path):
    finished_run(tmp_path, "PPO")                        # an earlier run, whose options are usual
    (tmp_path / "metrics.csv.part").write_bytes((tmp_path / "metrics.csv").read_bytes())
    text, _ = write_report(str(tmp_path))
    assert "there is no training_state.safetensors, no checkpoint" in text
    training_state(tmp_path, {**dataclasses.asdict(ppo.PPOConfig()), "gamma": 0.0, "lr": 5e-6})
    text, _ = write_report(str(tmp_path))
    assert re.findall(r"^  - (\w+) is", text, re.M) == ["lr", "gamma"], text
    assert "A finished run lies beside it" in text
    os.unlink(tmp_path / "metrics.csv.part")
    text, _ = write_report(str(tmp_path))
    assert "no option is far from" in text and "lies beside it" not in text


def test_foreign_options_end_in_a_report(tmp_path):
    rng = random.Random(0)
    values = [None, True, "x", [], {}, -1, 0, 1e308, -1e308, 10**19, 1e-320]
    for stage, config in CONFIGS.items():
        for _ in range(150):
            names = [field.name for field in dataclasses.fields(config)]
            changes = {name: rng.choice(values) for name in rng.sample(names, 8)}
            write_report(finished_run(tmp_path, stage, **changes))
    for content in (b"", b"[]", b"{}", b'{"config": 3}', b"\xff", b'{"config": {}}',
                    b'{"config": {}, "command": "PPO"}', b"{" * 9999):
        (tmp_path / "run.json").write_bytes(content)
        text, _ = write_report(str(tmp_path))
        assert "not known: " in text
    os.unlink(tmp_path / "run.json")
    assert "not known: there is no run.json" in write_report(str(tmp_path))[0]


def test_limits_name_options_and_sections_that_exist_and_hold_the_defaults():
    remarks = []
    for stage, limits in option_remarks.LIMITS.items():
        names = {field.name for field in dataclasses.fields(CONFIGS[stage])}
        for limit in limits:
            assert limit.option in names and limit.low < limit.high and limit.usual
            assert bool(limit.too_low) or limit.low in (0, 1), limit.option
            assert bool(limit.too_high) == (limit.high < 1e9), limit.option
            remarks.append(limit.lecture)
        wrong = {**dict.fromkeys(names, 1e6), "gamma": 0.0, "lr": 0.0, "critic_lr": 0.0,
                 "minibatch_size": 1, "dtype": "bfloat16"}
        rows = ppo_rows(ratio_first=0.01) if stage == "PPO" else rows_of(stage)
        remarks += [remark.lecture for remark in remarks_on(stage, wrong, rows, True)]
    for lecture in remarks:
        file, title = re.fullmatch(r'(lectures/[\w-]+\.md), "(.+)"', lecture).groups()
        text = (REPOSITORY / file).read_text(encoding="utf-8")
        assert re.search(f"^#+ {re.escape(title)}$", text, re.M), lecture


def test_the_report_says_what_no_curve_can_show(tmp_path):
    text, _ = write_report(write(tmp_path, ppo_rows()))
    assert "what no curve can show" in text
    assert "python -m minirlhf.museum has such mistakes" in " ".join(text.split())


# ---- files that are none -------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["metrics.csv", "metrics.csv.part", "samples.txt"])
def test_pipes_and_devices_in_place_of_files_are_refused_with_their_name(tmp_path, name):
    write(tmp_path, ppo_rows())
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        place = tmp_path / name
        if place.exists():
            place.unlink()
        make(place)
        with pytest.raises(ValueError, match=f"{re.escape(name)}: expected a file"):
            write_report(str(tmp_path))
        (place.rmdir if place.is_dir() else place.unlink)()
        write(tmp_path, ppo_rows())


@pytest.mark.parametrize("cell", ["", "9" * 5000, "x" * 200_000, "1e999", '"', "\x1b[2J"])
def test_strange_cells_end_in_a_report_or_a_value_error(tmp_path, cell):
    for row, column in ((1, 0), (5, 1), (5, 3)):
        lines = Path(write(tmp_path, ppo_rows()), "metrics.csv").read_text().split("\n")
        cells = lines[row].split(",")
        cells[column] = cell
        lines[row] = ",".join(cells)
        (tmp_path / "metrics.csv").write_text("\n".join(lines), encoding="utf-8")
        try:
            text = write_report(str(tmp_path))[0]
        except ValueError as error:
            text = str(error)
        assert "metrics.csv" in text and len(text) < 9000 and "\x1b" not in text


def test_nothing_from_a_run_drives_the_terminal(tmp_path):
    finished_run(tmp_path, "PPO")
    (tmp_path / "samples.txt").write_bytes(b"step 1\n\x1b[2J\xff one\r\nstep 2\n\x9b2J two\n")
    text, _ = write_report(str(tmp_path))
    assert "one" in text and "two" in text
    assert all(c.isprintable() or c == "\n" for c in text)
