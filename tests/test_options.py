"""options.py and fields.py: a dataclass becomes a command line, an expected error one sentence."""

import math
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from helpers import REPOSITORY

from minirlhf.engine.fields import (
    Amount,
    Count,
    Device,
    Mass,
    Natural,
    Positive,
    Precision,
    Rate,
    Share,
    check_fields,
)
from minirlhf.engine.options import (
    Stopped,
    check,
    check_choice,
    check_range,
    describe_error,
    field_comments,
    name_first_argument,
    one_sentence,
    parse_config,
)


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


@dataclass(frozen=True)
class TypedConfig:
    """One field of each type that says which values it may have, and one that says nothing."""
    count: Count = 1                    # how many
    natural: Natural = 0                # how many, or none
    amount: Amount = 0.0                # how much
    share: Share = 0.0                  # which part
    mass: Mass = 1.0                    # of a distribution
    rate: Rate = 0.0                    # how fast
    positive: Positive = 1.0            # never 0
    device: Device = "cpu"              # where
    dtype: Precision = "float32"        # how exact
    colour: Literal["red", "blue"] = "red"    # which one
    seed: int = 0                       # any integer

    def __post_init__(self):
        check_fields(self)


def lines_of(text: str) -> list[str]:
    return text.strip().split("\n")


def run_with(monkeypatch, main, *arguments: str) -> int:
    """Exit code of a command as a user starts it; 0 if it returns. Under coverage too."""
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    monkeypatch.setattr(sys, "gettrace", no_trace)
    try:
        with one_sentence():
            main(parse_config(ExampleConfig))
    except SystemExit as stop:
        return stop.code
    return 0


def no_trace():
    return None


# ---- command line --------------------------------------------------------------------------------

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


def test_comments_of_fields_are_found_after_any_default():
    assert field_comments(ExampleConfig)["folder"] == 'where to write, 50 % of "it" # and more'
    assert list(field_comments(ExampleConfig)) == [field.name for field in fields(ExampleConfig)]


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


@pytest.mark.parametrize("words, expected", [
    (["file.jsonl", "--count", "2"], ["--folder", "file.jsonl", "--count", "2"]),
    (["--count", "2"], ["--count", "2"]), ([], [])])
def test_a_first_word_without_dashes_stands_for_its_option(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["example", *words])
    name_first_argument("folder")
    assert sys.argv == ["example", *expected]


# ---- types of fields -----------------------------------------------------------------------------

@pytest.mark.parametrize("field, low, high", [
    ("count", 1, 10**9), ("natural", 0, 10**9), ("amount", 0.0, 1e6), ("share", 0.0, 1.0),
    ("mass", 1e-6, 1.0), ("rate", 0.0, 10.0), ("positive", 1e-6, 1e6)])
def test_a_type_with_a_range_allows_both_ends_and_nothing_beyond(field, low, high):
    for value in (low, high):
        assert getattr(TypedConfig(**{field: value}), field) == value
    just_outside = [low - 1, high + 1] if type(low) is int else [
        math.nextafter(low, -math.inf), math.nextafter(high, math.inf), math.nan, math.inf]
    for value in just_outside:
        with pytest.raises(ValueError, match=f"--{field} is .*, expected a value from "):
            TypedConfig(**{field: value})


@pytest.mark.parametrize("field, choices", [
    ("device", ["cpu", "cuda", "mps"]), ("dtype", ["float32", "bfloat16"]),
    ("colour", ["red", "blue"])])
def test_a_type_with_choices_allows_these_and_names_them(field, choices):
    for value in choices:
        assert getattr(TypedConfig(**{field: value}), field) == value
    for value in ("", "CPU", "float16", choices[0] + " "):
        with pytest.raises(ValueError, match=f"--{field} is '{value}', expected one of "
                                             f"{', '.join(choices)}$"):
            TypedConfig(**{field: value})


def test_a_field_of_a_plain_type_may_have_any_value():
    assert TypedConfig(seed=-10**30).seed == -10**30


def test_typed_fields_are_parsed_by_the_type_of_their_default_and_then_checked():
    words = ["--count", "7", "--share", "0.25", "--device", "mps", "--colour", "blue"]
    assert parse_config(TypedConfig, words) == TypedConfig(count=7, share=0.25, device="mps",
                                                           colour="blue")
    with pytest.raises(ValueError, match="--share is 1.5, expected a value from 0 to 1"):
        parse_config(TypedConfig, ["--share", "1.5"])
    assert field_comments(TypedConfig)["colour"] == "which one"


# ---- errors --------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("error, code, sentence", [
    (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    (Stopped("stopped by signal 2; go on", 2), 130, "stopped by signal 2; go on"),
    (Stopped("stopped by signal 15; go on", 15), 143, "stopped by signal 15; go on")])
def test_a_signal_exits_with_128_and_its_number_without_a_traceback(error, code, sentence,
                                                                    monkeypatch, capsys):
    assert run_with(monkeypatch, raise_error(error)) == code
    assert capsys.readouterr().err == f"{sentence}\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("x"),
                                   AssertionError("ours"), SystemError("y")])
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


def test_main_is_given_the_options(monkeypatch):
    seen = []
    assert run_with(monkeypatch, seen.append, "--count", "9") == 0
    assert seen == [ExampleConfig(count=9)]


def test_no_frame_of_ours_stands_between_the_command_and_main(monkeypatch):
    seen = []

    def main(cfg):
        seen.append(sys._getframe(1).f_code.co_name)

    assert run_with(monkeypatch, main) == 0
    assert seen == ["run_with"]


def test_a_console_that_cannot_show_a_character_does_not_stop_a_run():
    code = ("from minirlhf.engine.options import one_sentence\n"
            "with one_sentence():\n    print('\\u0120 \\u20ac')")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, b"? ?"), done.stderr.decode()


def test_an_error_without_a_file_keeps_its_message():
    assert describe_error(ValueError("one  two")) == "one two"


def test_pdb_keeps_the_locals_of_an_error_even_after_continue(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from minirlhf.engine.options import one_sentence\n"
                      "def main():\n    answer = 6 * 7\n    raise ValueError('stop here')\n"
                      "with one_sentence():\n    main()\n", encoding="utf-8")
    words = [sys.executable, "-m", "pdb", "-c", "continue", "-c", "p 'answer', answer", "-c", "q",
             str(script)]
    done = subprocess.run(words, capture_output=True, encoding="utf-8", input="q\n", timeout=100,
                          env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert "('answer', 42)" in done.stdout, done.stdout + done.stderr
