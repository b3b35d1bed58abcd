"""The trainers from the command line: help, errors in one sentence, bad input of every kind."""

import dataclasses
import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    REPOSITORY,
    TRAINERS,
    base_folder,
    quietly,
    reward_folder,
    save_folder,
    sft_folder,
    toy_model,
)

from minirlhf.engine import options as engine_options
from minirlhf.engine.options import field_comments, one_sentence, parse_config
from minirlhf.files import hub
from minirlhf.files.pretrained import save_network

PACKAGE = REPOSITORY / "minirlhf"


# ---- processes -----------------------------------------------------------------------------------

def python(*arguments, folder) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("name", TRAINERS)
def test_help_of_a_module_lists_every_option_with_its_comment(name):
    done = python("-m", f"minirlhf.{name}", "--help", folder=REPOSITORY)
    assert done.returncode == 0 and done.stderr == ""
    words = "".join(done.stdout.split())                 # wherever argparse broke the lines
    module, config = TRAINERS[name]
    assert "".join(module.__doc__.split("\n")[0].split()) in words
    for field, comment in field_comments(type(config())).items():
        assert f"--{field}" in done.stdout and "".join(comment.split()) in words, field
    assert "(oneof'float32','bfloat16';default:'float32')" in words


@pytest.mark.parametrize("name", ["reward_model", "ppo"])
def test_a_trainer_runs_as_a_file_from_any_folder(name, tmp_path):
    done = python(PACKAGE / f"{name}.py", "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "--max_grad_norm" in done.stdout


def test_an_error_is_one_line_on_stderr_with_exit_code_2(tmp_path):
    done = python(PACKAGE / "sft.py", "--model", "nowhere", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "nowhere" in done.stderr and not list(tmp_path.iterdir())


def test_a_command_that_has_moved_is_answered_with_its_new_place():
    done = python("-m", "minirlhf.gpt2", "--prompt", "Hi", folder=REPOSITORY)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "python -m minirlhf.generate --prompt" in done.stderr


# ---- bad input -----------------------------------------------------------------------------------

def error_of(monkeypatch, capsys, name: str, options: dict) -> str:
    """The one line that the command `name` leaves on stderr; it must exit with code 2."""
    module, config = TRAINERS[name]
    arguments = []
    for option, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(engine_options, "under_debugger", no_debugger)   # coverage looks like one
    with pytest.raises(SystemExit) as stop:
        with one_sentence():
            module.main(parse_config(type(config())))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    return message


def no_debugger() -> bool:
    return False


@pytest.fixture
def bad(tmp_path_factory) -> dict:
    """Paths of things that are not what a trainer needs."""
    folder = tmp_path_factory.mktemp("bad")
    found = {"none": folder / "none", "folder": folder}
    lines = [json.dumps({"prompt": f"Colours for {i}?", "response": "red"}) for i in range(5)]
    texts = {"broken": lines[:3] + ['{"prompt": "Hi", "response": '] + lines[3:],
             "no_response": lines[:2] + ['{"prompt": "Hi"}'],
             "empty_response": lines[:2] + ['{"prompt": "Hi", "response": " "}'],
             "equal_pair": ['{"prompt": "Hi", "chosen": "red", "rejected": "red"}'],
             "demonstrations": lines, "no_lines": [],
             "no_object": ["[1, 2]"], "number": ['{"prompt": 3, "response": "red"}']}
    for name, rows in texts.items():
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("\n".join(rows) + "\n" * bool(rows), encoding="utf-8")
    found["cut_gzip"] = folder / "cut.jsonl.gz"
    found["cut_gzip"].write_bytes(gzip.compress("\n".join(lines).encode())[:-9])
    found["wrong_vocabulary"] = save_folder(toy_model(vocab_size=300), str(folder / "vocabulary"))
    found["no_tokenizer"] = folder / "no_tokenizer"
    save_network(toy_model(), str(found["no_tokenizer"]))
    found["cut_weights"] = save_folder(toy_model(), str(folder / "cut"))
    weights = Path(found["cut_weights"]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    model = toy_model()
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[0, 0] = math.nan
    found["nan_weights"] = save_folder(model, str(folder / "nan"))
    found.update(sft=sft_folder(), reward_model=reward_folder(), base=base_folder())
    return found


BAD_INPUT = [
    # trainer, option, bad thing, words of the message
    ("sft", "model", "none", "does not exist"),
    ("sft", "model", "reward_model", "holds a reward model"),
    ("sft", "model", "wrong_vocabulary", "config.json says 300"),
    ("sft", "model", "no_tokenizer", "vocab.json does not exist"),
    ("sft", "model", "cut_weights", "model.safetensors"),
    ("sft", "model", "nan_weights", "holds nan or inf"),
    ("sft", "data", "none", "does not exist"),
    ("sft", "data", "folder", "found a folder"),
    ("sft", "data", "broken", "broken.jsonl:4: not valid JSON"),
    ("sft", "data", "no_response", "no_response.jsonl:3: expected"),
    ("sft", "data", "empty_response", "empty_response.jsonl:3: expected"),
    ("sft", "data", "no_lines", "an empty file"),
    ("sft", "data", "no_object", "no_object.jsonl:1: expected one JSON object per line, found an"),
    ("sft", "data", "number", "number.jsonl:1: expected text"),
    ("sft", "data", "cut_gzip", "cut.jsonl.gz:"),
    ("reward_model", "model", "none", "does not exist"),
    ("reward_model", "model", "reward_model", "holds a reward model"),
    ("reward_model", "model", "wrong_vocabulary", "config.json says 300"),
    ("reward_model", "data", "none", "does not exist"),
    ("reward_model", "data", "demonstrations", "demonstrations.jsonl:1: expected"),
    ("reward_model", "data", "equal_pair", "equal_pair.jsonl:1: expected two different responses"),
    ("ppo", "model", "none", "does not exist"),
    ("ppo", "model", "reward_model", "holds a reward model"),
    ("ppo", "model", "wrong_vocabulary", "config.json says 300"),
    ("ppo", "reward", "none", "does not exist"),
    ("ppo", "reward", "sft", "expected a reward model"),
    ("ppo", "reward", "wrong_vocabulary", "expected a reward model"),
    ("ppo", "prompts", "none", "does not exist"),
    ("ppo", "prompts", "broken", "broken.jsonl:4: not valid JSON")]


@pytest.mark.parametrize("name, option, thing, words", BAD_INPUT)
def test_bad_input_is_refused_in_one_sentence(monkeypatch, capsys, tmp_path, bad, name, option,
                                              thing, words):
    usual = dataclasses.asdict(TRAINERS[name][1]())
    out = tmp_path / "out"
    options = {**usual, "out": out, "held_out": 1, option: bad[thing]}
    if name == "ppo":
        options.pop("held_out")
    message = error_of(monkeypatch, capsys, name, options)
    assert words in message and str(bad[thing]) in message, message
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize("name, option, value, words", [
    ("sft", "data", "helpers:nothing", "module helpers has no function nothing"),
    ("sft", "data", "no_such_module:f", "found none named 'no_such_module'"),
    ("ppo", "reward", "helpers:nothing", "module helpers has no function nothing"),
    ("ppo", "gold", "no_such_module:f", "found none named 'no_such_module'"),
    ("ppo", "reward", "helpers:nan_reward", "scores is not finite at iteration 0, index [7]"),
    ("ppo", "reward", "helpers:column_reward", "returned (1, 1), expected a tensor of shape (1,)"),
    ("ppo", "critic_warmup", 9, "--critic_warmup 9 is longer than the run of --iterations"),
    ("ppo", "minibatch_size", 9, "--minibatch_size 9 is larger than --batch_size 8"),
    ("ppo", "critic", "none", "--critic is 'none', expected one of separate, shared"),
    ("ppo", "ensemble", "max", "--ensemble is 'max', expected one of mean, min"),
    ("ppo", "prompt_count", 3, "3 prompts that leave room for a response, expected at least 8"),
    ("reward_model", "held_out", 10_000, "lower --held_out"),
    ("sft", "held_out", 10_000, "lower --held_out")])
def test_bad_options_are_refused_in_one_sentence(monkeypatch, capsys, tmp_path, name, option, value,
                                                 words):
    usual = dataclasses.asdict(TRAINERS[name][1]())
    message = error_of(monkeypatch, capsys, name, {**usual, "out": tmp_path / "out", option: value})
    assert words in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_published_name_is_looked_up_in_the_checkpoints_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "download_published", fetch_toy)
    module, config = TRAINERS[name]
    small = {"sft": {"examples": 4, "held_out": 1, "epochs": 1},
             "reward_model": {"comparisons": 20, "held_out": 2, "norm_samples": 2},
             "ppo": {"iterations": 1}}
    quietly(module.main, config(model="gpt2-medium", out="out", **small[name]))
    assert (tmp_path / "out" / "model.safetensors").exists()


def fetch_toy(name: str, folder: str) -> None:
    """Stands for the download."""
    save_folder(toy_model(), folder)
