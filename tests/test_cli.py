"""The trainers from the command line, bad input, and what holds for the whole package's source."""

import ast
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

from minirlhf import common, gpt2, ppo, reward_model, sft
from minirlhf.common import field_comments

from helpers import (base_folder, ppo_config, quietly, reward_config, reward_folder, save_folder,
                     sft_config, sft_folder, toy_model)

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minirlhf"
TRAINERS = {"sft": (sft, sft.SFTConfig, sft_config),
            "reward_model": (reward_model, reward_model.RewardModelConfig, reward_config),
            "ppo": (ppo, ppo.PPOConfig, ppo_config)}


# ---- processes -----------------------------------------------------------------------------------

def python(*arguments, folder) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.mark.parametrize("name", TRAINERS)
def test_help_of_a_module_lists_every_option_with_its_comment(name):
    done = python("-m", f"minirlhf.{name}", "--help", folder=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    words = "".join(done.stdout.split())                 # wherever argparse broke the lines
    module, config, _ = TRAINERS[name]
    assert "".join(module.__doc__.split("\n")[0].split()) in words
    for field, comment in field_comments(config).items():
        assert f"--{field}" in done.stdout and "".join(comment.split()) in words, field


@pytest.mark.parametrize("name", ["reward_model", "ppo"])
def test_a_trainer_runs_as_a_file_from_any_folder(name, tmp_path):
    done = python(PACKAGE / f"{name}.py", "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and "--max_grad_norm" in done.stdout


def test_an_error_is_one_line_on_stderr_with_exit_code_2(tmp_path):
    done = python(PACKAGE / "sft.py", "--model", "nowhere", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "nowhere" in done.stderr and not list(tmp_path.iterdir())


# ---- bad input -----------------------------------------------------------------------------------

def error_of(monkeypatch, capsys, name: str, options: dict) -> str:
    """The one line that the command `name` leaves on stderr; it must exit with code 2."""
    module, config, _ = TRAINERS[name]
    arguments = []
    for option, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(common, "under_debugger", no_debugger)       # as when coverage is measured
    with pytest.raises(SystemExit) as stop:
        common.run(module.main, config)
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
    toy_model().save_pretrained(str(found["no_tokenizer"]))
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
    ("sft", "data", "no_object", "no_object.jsonl:1: expected a JSON object"),
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
    usual = dataclasses.asdict(TRAINERS[name][2]())
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
    ("ppo", "reward", "helpers:column_reward", "expected a tensor of shape (8,)"),
    ("ppo", "minibatch_size", 9, "--minibatch_size 9 is larger than --batch_size 8"),
    ("ppo", "critic", "none", "--critic is 'none', expected one of separate, shared"),
    ("ppo", "ensemble", "max", "--ensemble is 'max', expected one of mean, min"),
    ("ppo", "prompt_count", 3, "3 prompts, expected at least the --batch_size of 8"),
    ("reward_model", "held_out", 10_000, "lower --held_out"),
    ("sft", "held_out", 10_000, "lower --held_out")])
def test_bad_options_are_refused_in_one_sentence(monkeypatch, capsys, tmp_path, name, option, value,
                                                 words):
    usual = dataclasses.asdict(TRAINERS[name][2]())
    message = error_of(monkeypatch, capsys, name, {**usual, "out": tmp_path / "out", option: value})
    assert words in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


NUMBERS = [(name, field.name, type(field.default)) for name, (_, config, _) in TRAINERS.items()
           for field in dataclasses.fields(config)
           if type(field.default) in (int, float) and field.name != "seed"]


@pytest.mark.parametrize("name, field, kind", NUMBERS)
def test_every_number_has_a_range_and_the_error_names_it(name, field, kind):
    _, config, _ = TRAINERS[name]
    for text in ("-1", "1000000000000") + (("nan", "inf", "-inf") if kind is float else ()):
        value = kind(text)
        with pytest.raises(ValueError, match=f"--{field} is {value}, expected a value from"):
            config(**{field: value})


@pytest.mark.parametrize("name", TRAINERS)
def test_a_published_name_is_looked_up_in_the_checkpoints_folder(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpt2, "download_published", fetch_toy)
    module, _, config = TRAINERS[name]
    small = {"sft": {"examples": 4, "held_out": 1, "epochs": 1},
             "reward_model": {"comparisons": 20, "held_out": 2, "norm_samples": 2},
             "ppo": {"iterations": 1}}
    quietly(module.main, config(model="gpt2-medium", out="out", **small[name]))
    assert (tmp_path / "out" / "model.safetensors").exists()


def fetch_toy(name: str, folder: str) -> None:
    """Stands for the download."""
    save_folder(toy_model(), folder)


# ---- configs -------------------------------------------------------------------------------------

def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in MODULES]
every_module = pytest.mark.parametrize("path", MODULES, ids=NAMES)


def config_classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)
            and node.name.endswith("Config") and node.name != "GPT2Config"]


@every_module
def test_every_config_field_is_read_and_has_a_comment(path):
    tree, lines = parsed(path), path.read_text(encoding="utf-8").split("\n")
    for config in config_classes(tree):
        validation = {id(node) for method in config.body if isinstance(method, ast.FunctionDef)
                      for node in ast.walk(method)}
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load) and id(node) not in validation
                and isinstance(node.value, ast.Name) and node.value.id == "cfg"}
        if "RunFolder" in path.read_text(encoding="utf-8"):
            read |= {"resume", "save_every", "dtype"}    # read by checkpoint.py and parallel.py
        fields = [node for node in config.body if isinstance(node, ast.AnnAssign)]
        assert fields
        for field in fields:
            assert field.target.id in read, f"{config.name}.{field.target.id} is never read"
            assert "  # " in lines[field.lineno - 1], f"{config.name}.{field.target.id}: no comment"


@pytest.mark.parametrize("name", TRAINERS)
def test_configs_are_frozen_and_validate_what_they_are_given(name):
    _, config, _ = TRAINERS[name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().seed = 1
    assert set(field_comments(config)) == {field.name for field in dataclasses.fields(config)}
    for field in dataclasses.fields(config):             # the command line takes the default's type
        assert field.type is type(field.default), field.name


# ---- source --------------------------------------------------------------------------------------

def imports_of(tree: ast.AST) -> set[str]:
    """Full names of the modules that a tree imports, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "minirlhf":
                found |= {f"minirlhf.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


IMPORTS = {                         # what a module on the reader's path may import of ours
    "weights": set(), "common": set(), "gpt2": {"common", "weights"}, "data": {"common", "weights"},
    "parallel": {"common"}, "checkpoint": {"common", "parallel", "weights"},
    "rewards": {"common", "data", "gpt2"},
    "sft": {"checkpoint", "common", "data", "gpt2", "parallel"},
    "reward_model": {"checkpoint", "common", "data", "gpt2", "parallel"},
    "ppo": {"checkpoint", "common", "data", "gpt2", "parallel", "rewards"}}


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_go_one_way(name):
    tree = parsed(PACKAGE / f"{name}.py")
    if name == "gpt2":              # its command line needs a tokenizer; the network does not
        main = next(node for node in tree.body if getattr(node, "name", "") == "main")
        assert {"minirlhf.data"} == {x for x in imports_of(main) if x.startswith("minirlhf")}
        tree.body.remove(main)
    ours = {module.split(".")[1] for module in imports_of(tree) if module.startswith("minirlhf")}
    assert ours <= IMPORTS[name]


def test_the_text_world_imports_no_trainer():
    for path in (PACKAGE / "world").glob("*.py"):
        ours = {x.split(".")[1] for x in imports_of(parsed(path)) if x.startswith("minirlhf.")}
        assert ours <= {"world", "common", "data", "gpt2", "weights"}, path


@every_module
def test_a_module_imports_the_five_packages_and_the_standard_library_only(path):
    known = {"torch", "tiktoken", "numpy", "matplotlib", "minirlhf"} | set(sys.stdlib_module_names)
    assert {name.split(".")[0] for name in imports_of(parsed(path))} <= known
    if not path.stem.startswith("__"):
        assert path.stem not in sys.stdlib_module_names, "a name of the standard library"


def length_without_docstring(function: ast.FunctionDef) -> int:
    first, length = function.body[0], function.end_lineno - function.lineno + 1
    documented = ast.get_docstring(function) is not None
    return length - (first.end_lineno - first.lineno + 1) * documented


@every_module
def test_lines_functions_and_docstrings_keep_the_house_style(path):
    text, tree = path.read_text(encoding="utf-8"), parsed(path)
    long_lines = [n for n, line in enumerate(text.split("\n"), start=1) if len(line) > 100]
    assert not long_lines, "lines of more than 100 columns"
    assert "\t" not in text and not any(line.endswith(" ") for line in text.split("\n"))
    assert ast.get_docstring(tree) or not tree.body, "a module without docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert length_without_docstring(node) <= 60, f"{node.name} is long"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and "Exception" not in ast.unparse(node.type).split()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def test_tests_keep_to_100_columns():
    for path in (ROOT / "tests").glob("*.py"):
        lines = path.read_text(encoding="utf-8").split("\n")
        assert not [n for n, line in enumerate(lines, start=1) if len(line) > 100], path.name


@every_module
def test_text_files_are_opened_as_utf_8(path):
    for node in ast.walk(parsed(path)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called in ("open", "os.fdopen", "gzip.open"):
            words = [x.value for mode in node.args[1:2] for x in ast.walk(mode)
                     if isinstance(x, ast.Constant)]
            binary = any("b" in word for word in words)
            assert binary or any(k.arg == "encoding" for k in node.keywords), ast.unparse(node)


@pytest.mark.parametrize("name", ["gpt2", "data", "rewards", *TRAINERS])
def test_what_a_reader_steps_through_has_no_lambdas_and_no_closures(name):
    for node in ast.walk(parsed(PACKAGE / f"{name}.py")):
        assert not isinstance(node, (ast.Lambda, ast.Global, ast.Nonlocal)), node.lineno
        if isinstance(node, ast.FunctionDef):
            inner = [x for x in ast.walk(node) if isinstance(x, ast.FunctionDef) and x is not node]
            assert not inner, f"{node.name} defines another function"


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_are_laid_out_alike(name):
    path = PACKAGE / f"{name}.py"
    text = path.read_text(encoding="utf-8")
    headings = [line for line in text.split("\n") if line.startswith("# ---- ")]
    order = [next((i for i, line in enumerate(headings) if word in line), None)
             for word in ("the mathematics", "collecting", "main")]
    assert None not in order and order == sorted(order), headings
    docstring = ast.get_docstring(parsed(path))
    for words in (f"python -m minirlhf.{name}", "In:", "Out:", "The algorithm", " 1. ", "Shapes:",
                  "Lecture: lectures/"):
        assert words in docstring, words
