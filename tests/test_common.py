import importlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch

from minirlhf.common import (MetricsFile, check, check_choice, check_finite, check_output,
                             check_range, describe, field_comments, learning_rate, masked_mean,
                             parse_config, random_stream, read_metrics, run, whiten)

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ExampleConfig:
    """Options of the tests below."""
    folder: str = "a#b"         # where to write, 50 % of "it" # and more
    count: int = 3              # how many
    rate: float = 0.5           # how fast; 1e-3 is slow
    shout: bool = False         # print in capitals
    trim: bool = True           # cut spaces off

    def __post_init__(self):
        check_range(self, "count", 1, 10)
        check_range(self, "rate", 0, 1)
        check_choice(self, "folder", ("a#b", "c"))


def lines_of(text: str) -> list[str]:
    return text.strip().split("\n")


def run_with(monkeypatch, main, *arguments: str) -> int:
    """Exit code of `run` as a user starts it; 0 if it returns. Tests under coverage are watched."""
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    monkeypatch.setattr(sys, "gettrace", no_trace)
    try:
        run(main, ExampleConfig)
    except SystemExit as stop:
        return stop.code
    return 0


def no_trace():
    return None


# ---- configuration and command line -------------------------------------------------------------

def test_the_command_line_sets_every_kind_of_field():
    cfg = parse_config(ExampleConfig, ["--folder", "c", "--count", "7", "--rate", "1e-3", "--shout",
                                       "--no-trim"])
    assert cfg == ExampleConfig(folder="c", count=7, rate=1e-3, shout=True, trim=False)
    assert parse_config(ExampleConfig, []) == ExampleConfig()
    assert not parse_config(ExampleConfig, ["--no-shout"]).shout


def test_negative_numbers_are_values_not_options():
    with pytest.raises(ValueError, match="--count is -4, expected a value from 1 to 10"):
        parse_config(ExampleConfig, ["--count", "-4"])
    with pytest.raises(ValueError, match="--rate is -0.5, expected a value from 0 to 1"):
        parse_config(ExampleConfig, ["--rate", "-0.5"])


@pytest.mark.parametrize("arguments", [["--count", "2.5"], ["--count", "many"], ["--rate", "fast"],
                                       ["--count"], ["--cou", "2"], ["--unknown", "1"], ["extra"],
                                       ["--shout", "yes"]])
def test_a_wrong_type_or_option_exits_with_2_and_two_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(ExampleConfig, arguments)
    assert stop.value.code == 2
    assert len(lines_of(capsys.readouterr().err)) == 2


def test_help_shows_comment_and_default_of_every_field_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse_config(ExampleConfig, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name, comment in field_comments(ExampleConfig).items():
        assert f"--{name}" in text and comment in text
        assert text.count(f"(default: {getattr(ExampleConfig, name)!r})") == 1


def test_comments_of_fields_are_found_behind_any_default():
    assert field_comments(ExampleConfig)["folder"] == 'where to write, 50 % of "it" # and more'
    assert list(field_comments(ExampleConfig)) == [field.name for field in fields(ExampleConfig)]


@pytest.mark.parametrize("module, name", [
    ("gpt2", "SampleConfig"), ("pretrain", "PretrainConfig"), ("sft", "SFTConfig"),
    ("reward_model", "RewardModelConfig"), ("ppo", "PPOConfig")])
def test_every_option_of_every_command_has_a_help_text(module, name):
    config_class = getattr(importlib.import_module(f"minirlhf.{module}"), name)
    comments = field_comments(config_class)
    for field in fields(config_class):
        assert len(comments.get(field.name, "")) > 3, f"{name}.{field.name} has no comment"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -1])
def test_check_range_refuses_what_is_no_number_of_the_range(value):
    with pytest.raises(ValueError, match="--rate is .*, expected a value from 0 to 1"):
        ExampleConfig(rate=value)


def test_check_range_allows_both_ends():
    assert ExampleConfig(count=1).count == 1 and ExampleConfig(count=10).count == 10


def test_check_choice_names_the_choices():
    with pytest.raises(ValueError, match="--folder is 'd', expected one of a#b, c"):
        ExampleConfig(folder="d")


def test_check_raises_its_message():
    check(True, "never")
    with pytest.raises(ValueError, match="^the message$"):
        check(False, "the message")


# ---- run ----------------------------------------------------------------------------------------

def raise_error(error: BaseException):
    def main(cfg):
        raise error
    return main


@pytest.mark.parametrize("error, sentence", [
    (ValueError("a.json: expected\n  two, found three"), "a.json: expected two, found three"),
    (FileNotFoundError("no weights in x"), "no weights in x"),
    (FileNotFoundError(2, "No such file", "x.csv"), "x.csv: No such file"),
    (OSError(28, "x was not written (disk full)"), "x was not written (disk full)"),
    (FloatingPointError("loss is nan"), "loss is nan"),
    (MemoryError(), "out of memory; make the batch, the context or the model smaller"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
     "out of memory; make the batch, the context or the model smaller")])
def test_expected_errors_are_one_line_on_stderr_and_exit_2(error, sentence, monkeypatch, capsys):
    assert run_with(monkeypatch, raise_error(error)) == 2
    assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_value_out_of_range_on_the_command_line_is_one_line_and_exit_2(monkeypatch, capsys):
    assert run_with(monkeypatch, raise_error(AssertionError()), "--rate", "nan") == 2
    assert capsys.readouterr().err == "error: --rate is nan, expected a value from 0 to 1\n"


def test_ctrl_c_exits_130_without_a_traceback(monkeypatch, capsys):
    assert run_with(monkeypatch, raise_error(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("x"),
                                   AssertionError("ours")])
def test_mistakes_in_the_code_keep_their_traceback(error, monkeypatch):
    with pytest.raises(type(error)):
        run_with(monkeypatch, raise_error(error))


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_under_a_debugger_the_exception_is_left_alone(error, monkeypatch):
    def main(cfg):
        monkeypatch.setattr(sys, "gettrace", lambda: main)
        raise error
    with pytest.raises(type(error)):
        run_with(monkeypatch, main)


def test_run_passes_the_options_to_main(monkeypatch):
    seen = []
    assert run_with(monkeypatch, seen.append, "--count", "9") == 0
    assert seen == [ExampleConfig(count=9)]


def test_a_console_that_cannot_show_a_character_does_not_stop_a_run():
    code = ("from minirlhf.common import run\nfrom minirlhf.gpt2 import SampleConfig\n"
            "def main(cfg):\n    print('\\u0120 \\u20ac')\nrun(main, SampleConfig)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, b"? ?"), done.stderr.decode()


def test_describe_keeps_the_message_of_an_error_without_a_file():
    assert describe(ValueError("one  two")) == "one two"


# ---- randomness ---------------------------------------------------------------------------------

def test_random_streams_have_the_values_that_they_always_had():
    draws = [torch.randint(10**6, (1,), generator=random_stream(*name)).item()
             for name in [(0,), (0, 1), (1, 0), (5, 2, 7)]]
    assert draws == [136044, 198065, 808614, 583163]


def test_a_stream_depends_on_seed_and_counters_only():
    torch.manual_seed(1)
    first = torch.rand(5, generator=random_stream(3, 4))
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, torch.rand(5, generator=random_stream(3, 4)))


def test_no_two_streams_of_a_run_are_the_same():
    names = [(seed, stage, iteration, *epoch) for seed in (0, 1, 7) for stage in range(3)
             for iteration in range(150) for epoch in ((), (0,), (1,), (2,), (3,))]
    names += [(seed, step) for seed in (0, 1, 7) for step in range(3000)]
    used_bits = [random_stream(*name).initial_seed() % 2**32 for name in names]
    assert len(set(used_bits)) == len(names)


@pytest.mark.parametrize("seed", [-1, -10**30, 10**30, 2**63])
def test_any_integer_is_a_seed(seed):
    assert 0 <= torch.rand(1, generator=random_stream(seed, 1)).item() < 1


# ---- masked statistics --------------------------------------------------------------------------

def test_masked_mean_of_the_docstring():
    mean = masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    assert mean.shape == () and mean.item() == 2


def test_masked_mean_is_over_the_tensor_not_over_rows():
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    assert masked_mean(x, torch.tensor([[1, 1, 1], [1, 0, 0]])).item() == 4


def test_whiten_of_the_docstring():
    white = whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    assert white.tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


def test_whitened_entries_have_mean_0_and_biased_deviation_1():
    x = torch.randn(4, 9, generator=random_stream(0), dtype=torch.double) * 7 + 3
    mask = torch.rand(4, 9, generator=random_stream(1)) < 0.6
    white = whiten(x, mask)
    assert white[mask].mean().abs() < 1e-12
    assert white[mask].var(unbiased=False).item() == pytest.approx(1, abs=1e-8)
    assert not white[~mask].any()


@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf, -math.inf])
def test_what_is_outside_the_mask_changes_nothing(junk):
    x = torch.randn(3, 6, generator=random_stream(0))
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6, [0, 1, 1, 1, 1, 0]]).bool()
    changed = torch.where(mask, x, torch.tensor(junk))
    assert masked_mean(changed, mask) == masked_mean(x, mask)
    assert torch.equal(whiten(changed, mask), whiten(x, mask))


@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf])
def test_what_is_outside_the_mask_has_no_gradient(junk):
    mask = torch.tensor([True, True, False])
    x = torch.tensor([1.0, 3.0, junk], requires_grad=True)
    masked_mean(x, mask).backward()
    assert x.grad.tolist() == [0.5, 0.5, 0]


def test_a_single_entry_and_equal_entries_whiten_to_0():
    assert whiten(torch.tensor([[5.0, 7.0]]), torch.tensor([[1, 0]])).tolist() == [[0, 0]]
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).tolist() == [[0] * 3] * 2


def test_an_empty_mask_gives_nan_which_check_finite_stops():
    mean = masked_mean(torch.ones(2, 2), torch.zeros(2, 2).bool())
    with pytest.raises(FloatingPointError, match="pg_loss is not finite at step 3: nan;"):
        check_finite("pg_loss", mean, "step 3")


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_type_mean_the_same(kind):
    x, mask = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]).to(kind)
    assert masked_mean(x, mask) == 2
    assert whiten(x, mask).tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


# ---- optimisation -------------------------------------------------------------------------------

def test_learning_rate_of_the_docstring():
    rates = [learning_rate(step, 10, 1.0, 2, "linear") for step in (0, 1, 2, 6)]
    assert rates == [0.5, 1, 1, 0.5]


@pytest.mark.parametrize("schedule, middle", [("linear", 0.5), ("cosine", 0.5), ("constant", 1)])
def test_every_schedule_starts_at_the_peak_and_ends_where_it_should(schedule, middle):
    assert learning_rate(0, 100, 2.0, 0, schedule) == 2
    assert learning_rate(50, 100, 2.0, 0, schedule) == pytest.approx(2 * middle)
    end = 2.0 if schedule == "constant" else 0.0
    for step in (100, 150):                          # and it does not come up again
        assert learning_rate(step, 100, 2.0, 0, schedule) == pytest.approx(end)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_rises_then_falls_and_is_never_0_on_a_step_that_is_made(schedule):
    rates = [learning_rate(step, 30, 1.0, 5, schedule) for step in range(30)]
    assert rates[:6] == [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert all(later < earlier for earlier, later in zip(rates[5:], rates[6:]))
    assert rates[-1] > 0


def test_a_run_shorter_than_its_warm_up_never_divides_by_0():
    assert learning_rate(0, 1, 1.0, 1, "cosine") == 1
    assert learning_rate(2, 3, 1.0, 10, "linear") == pytest.approx(0.3)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'square', expected constant, linear or cosine"):
        learning_rate(0, 10, 1.0, 2, "square")


def test_check_finite_names_tensor_value_place_and_index():
    check_finite("loss", torch.tensor([1.0, 2.0]), "step 3")
    with pytest.raises(FloatingPointError, match=r"scores is not .* 3, index \[1\]: nan;"):
        check_finite("scores", torch.tensor([0.0, math.nan]), "iteration 3")
    with pytest.raises(FloatingPointError, match=r"at step 9, index \[1, 0\]: -inf;"):
        check_finite("values", torch.tensor([[0.0, 1.0], [-math.inf, math.nan]]), "step 9")


# ---- metrics ------------------------------------------------------------------------------------

def test_metrics_come_back_as_they_were_written(tmp_path):
    folder = str(tmp_path / "new" / "folder")
    metrics = MetricsFile(folder, ["step", "loss", "gold"])
    metrics.write({"step": 1, "loss": 0.123456789, "gold": ""})
    metrics.write({"step": 2, "loss": 1e-12, "gold": -3.5})
    metrics.finish()
    assert read_metrics(folder) == [{"step": 1, "loss": 0.1234568},
                                    {"step": 2, "loss": 1e-12, "gold": -3.5}]
    text = (tmp_path / "new" / "folder" / "metrics.csv").read_bytes()
    assert text == b"step,loss,gold\n1,0.1234568,\n2,1e-12,-3.5\n"


def test_every_row_is_on_disk_before_the_next(tmp_path):
    metrics = MetricsFile(str(tmp_path), ["step"])
    for step in range(3):
        metrics.write({"step": step})
        assert (tmp_path / "metrics.csv.part").read_bytes().count(b"\n") == step + 2


def test_a_run_that_does_not_finish_leaves_the_metrics_of_the_last_that_did(tmp_path):
    first = MetricsFile(str(tmp_path), ["step"])
    first.write({"step": 1})
    first.finish()
    MetricsFile(str(tmp_path), ["step", "loss"]).write({"step": 7, "loss": 2.0})
    assert read_metrics(str(tmp_path)) == [{"step": 1}]
    second = MetricsFile(str(tmp_path), ["step", "loss"])
    second.finish()
    assert read_metrics(str(tmp_path)) == [] and os.listdir(tmp_path) == ["metrics.csv"]


def test_a_stage_does_not_write_into_the_folder_that_it_reads(tmp_path):
    check_output(str(tmp_path / "out"), str(tmp_path / "in"))
    with pytest.raises(ValueError, match="the folder that this stage starts from"):
        check_output(str(tmp_path / "a" / ".." / "in"), str(tmp_path), str(tmp_path / "in"))


@pytest.mark.parametrize("row", [{"step": 1}, {"loss": 1.0, "step": 1}, {"step": 1, "los": 2.0}])
def test_a_row_that_is_not_of_the_header_is_a_mistake(row, tmp_path):
    metrics = MetricsFile(str(tmp_path), ["step", "loss"])
    with pytest.raises(AssertionError):
        metrics.write(row)


@pytest.mark.parametrize("text", ["step,loss\n1,high\n", "step,loss\n1,2,3\n"])
def test_metrics_that_are_no_numbers_are_refused_with_their_file(text, tmp_path):
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="metrics.csv: expected a number in every cell"):
        read_metrics(str(tmp_path))


def test_infinite_metrics_are_written_as_such(tmp_path):
    metrics = MetricsFile(str(tmp_path), ["loss", "kl_ref"])
    metrics.write({"loss": math.nan, "kl_ref": -math.inf})
    metrics.finish()
    (row,) = read_metrics(str(tmp_path))
    assert math.isnan(row["loss"]) and row["kl_ref"] == -math.inf


def test_pdb_keeps_the_locals_of_an_error_even_after_continue(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from dataclasses import dataclass\nfrom minirlhf.common import run\n"
                      "@dataclass(frozen=True)\nclass Config:\n    seed: int = 0  # a seed\n"
                      "def main(cfg):\n    answer = 6 * 7\n    raise ValueError('stop here')\n"
                      "run(main, Config)\n", encoding="utf-8")
    words = [sys.executable, "-m", "pdb", "-c", "continue", "-c", "p 'answer', answer", "-c", "q",
             str(script)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", input="q\n", timeout=100,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "('answer', 42)" in done.stdout, done.stdout + done.stderr
