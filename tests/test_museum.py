"""The museum: each mistake is caught by the test on its label, and leaves nothing behind."""

import importlib
import inspect
import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ppo_config, quietly, sft_folder

from minirlhf import ppo
from minirlhf.files.disk import read_json
from minirlhf.museum import effect
from minirlhf.museum.__main__ import MuseumConfig, main
from minirlhf.museum.effect import differs
from minirlhf.museum.exhibits import EXHIBITS, GUARDED, find
from minirlhf.museum.short_runs import substituted

ROOT = Path(__file__).resolve().parents[1]
BY_NAME = {exhibit.name: exhibit for exhibit in EXHIBITS}


def test_function(label: str):
    """The module and function that a label like "test_ppo.py::test_gae" names."""
    file, name = label.split("::")
    module = importlib.import_module(file.removesuffix(".py"))
    return module, getattr(module, name)


test_function.__test__ = False


def cases_of(function) -> list[dict]:
    """The arguments that pytest would call a parametrised test with."""
    cases = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")] \
                if isinstance(mark.args[0], str) else list(mark.args[0])
            values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
            cases = [{**case, **dict(zip(names, row))} for case in cases for row in values]
    return cases


def fails(function, also: tuple = ()) -> bool:
    """Whether the test fails in one of its cases; it gets the fixtures that it asks for.

    A failed assertion counts, and the errors in `also`; any other error is a broken exhibit.
    """
    for case in cases_of(function):
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as path:
            fixtures = {"monkeypatch": monkeypatch, "tmp_path": Path(path)}
            wanted = set(inspect.signature(function).parameters) & set(fixtures)
            try:
                function(**case, **{name: fixtures[name] for name in wanted})
            except (AssertionError, pytest.fail.Exception, *also):
                return True
    return False


def test_a_run_keeps_its_invariants():
    with tempfile.TemporaryDirectory() as folder:
        quietly(ppo.main, ppo_config(out=os.path.join(folder, "run")))


@pytest.mark.parametrize("name", BY_NAME)
def test_a_mistake_is_caught_by_its_test_and_only_while_it_is_on(name):
    exhibit = BY_NAME[name]
    module, function = test_function(exhibit.test)
    rights = [getattr(owner, attribute) for owner, attribute in exhibit.places]
    assert not fails(function), "the test fails without the mistake"
    # the test file has imported some of the functions by name
    imported = [(module, attribute, exhibit.wrong) for attribute, value in vars(module).items()
                if inspect.isfunction(value) and value in rights]
    with substituted(exhibit.replacements() + imported):
        # a check of the trainer that stops the run is a ValueError
        noticed = fails(function, also=(ValueError,) if exhibit.stops else ())
        assert noticed, f"{exhibit.test} does not notice it"
    assert [getattr(owner, attribute) for owner, attribute in exhibit.places] == rights
    assert not fails(function), "the mistake is still there"


# ---- the labels ----------------------------------------------------------------------------------

def test_every_label_names_a_test_that_exists():
    for label in [exhibit.test for exhibit in EXHIBITS] + [test for _, _, test in GUARDED]:
        file, name = label.split("::")
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in text, label


def test_a_wrong_twin_takes_what_the_right_function_takes_and_marks_its_wrong_line():
    for exhibit in EXHIBITS:
        for owner, attribute in exhibit.places:
            wrong = list(inspect.signature(exhibit.wrong).parameters)
            right = list(inspect.signature(getattr(owner, attribute)).parameters)
            if "options" in wrong:                       # it hands the rest on to the right one
                wrong = [name for name in wrong if name not in ("arguments", "options")]
                right = [name for name in right if name in wrong]
            assert wrong == right, exhibit.name
        assert inspect.getsource(exhibit.wrong).count("# WRONG") == 1, exhibit.name


def test_every_mistake_is_one_sentence_on_one_line():
    for exhibit in EXHIBITS:
        assert re.fullmatch(r"[A-Zk].+\.", exhibit.wrong.__doc__), exhibit.name


def test_an_exhibit_that_does_not_exist_is_refused_with_the_names():
    with pytest.raises(ValueError, match="no exhibit 'nothing', expected one of temperature, "):
        MuseumConfig(show="nothing")
    with pytest.raises(ValueError, match="no exhibit 'nothing'"):
        MuseumConfig(run="late_score,nothing")


def test_a_substitution_ends_with_the_block_also_after_an_error():
    right = ppo.gae
    with pytest.raises(KeyError), substituted([(ppo, "gae", find("early_whitening").wrong)]):
        assert ppo.gae is not right
        raise KeyError
    assert ppo.gae is right


# ---- the command ---------------------------------------------------------------------------------

def test_the_museum_lists_and_shows_its_exhibits(capsys):
    main(MuseumConfig())
    text = capsys.readouterr().out
    assert all(exhibit.name in text for exhibit in EXHIBITS)
    main(MuseumConfig(show="late_score", results=str(ROOT / MuseumConfig().results)))
    text = capsys.readouterr().out
    assert "right: minirlhf.ppo.shaped_rewards" in text
    assert ".values + 1               # WRONG" in text


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b"\xff", b'{"effects": []}', b'{"effects": ["late_score"]}',
    b'{"effects": {"late_score": 3}}', b'{"effects": {"late_score": {}}}',
    b'{"effects": {"late_score": {"stopped": "", "right": {}, "wrong": {}}}}',
    b'{"effects": {"late_score": {"stopped": 1, "right": {"a": [1]}, "wrong": {"a": [1]}}}}',
    b'{"effects": {"late_score": {"stopped": "", "right": {"a": [1]}, "wrong": {"b": [1]}}}}',
    b'{"effects": {"late_score": {"stopped": "", "right": {"a": []}, "wrong": {"a": []}}}}',
    b'{"effects": {"late_score": {"stopped": "", "right": {"a": [1]}, "wrong": {"a": [1, 2]}}}}',
    b'{"effects": {"late_score": {"stopped": "", "right": {"a": ["x"]}, "wrong": {"a": [1]}}}}'])
def test_results_that_are_none_are_refused_with_the_name_of_the_file(tmp_path, content):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match="results.json"):
        main(MuseumConfig(show="late_score", results=str(tmp_path / "results.json")))


def test_results_that_are_named_must_be_there(tmp_path, monkeypatch, capsys):
    with pytest.raises(FileNotFoundError, match="none.json"):
        main(MuseumConfig(show="late_score", results=str(tmp_path / "none.json")))
    monkeypatch.chdir(tmp_path)                          # the museum's own are not everywhere
    main(MuseumConfig(show="late_score"))
    assert "Its effect: python -m minirlhf.museum --run late_score" in capsys.readouterr().out


def test_results_of_others_do_not_drive_the_terminal(tmp_path, capsys):
    effect = {"stopped": "\x1b[2J", "right": {"\x1b[3J": [1]}, "wrong": {"\x1b[3J": [2]}}
    (tmp_path / "results.json").write_text(json.dumps({"effects": {"late_score": effect}}))
    main(MuseumConfig(show="late_score", results=str(tmp_path / "results.json")))
    text = capsys.readouterr().out
    assert "\ufffd[2J" in text and "\x1b" not in text


def test_a_figure_differs_only_if_all_runs_say_so():
    assert differs([1.0, 1.2], [1.5, 1.6]) and not differs([1.0, 1.2], [1.1, 1.9])
    assert not differs([1.0, 1.2], [1.21, 1.3]) and not differs([0.0], [0.0])


def test_a_mistake_is_measured_beside_the_run_without_it(monkeypatch, tmp_path, capsys):
    toy = {"model": sft_folder(), "reward": "helpers:share_of_red", "critic_lr": 5e-3,
           "prompts": "helpers:toy_prompts", "prompt_count": 100, "gold": "", "iterations": 4,
           "batch_size": 8, "minibatch_size": 4, "max_new_tokens": 5, "lr": 5e-3}
    monkeypatch.setitem(effect.OPTIONS, "ppo", toy)
    for name in ("tiny", "sft", "reward_model"):
        (tmp_path / "stages" / name).mkdir(parents=True)
        (tmp_path / "stages" / name / "model.safetensors").touch()
    cfg = MuseumConfig(run="temperature", seeds=2, stages=str(tmp_path / "stages"),
                       out=str(tmp_path / "out"))
    found = main(cfg)["temperature"]
    assert len(found["right"]["score"]) == len(found["wrong"]["score"]) == 2
    assert found["right"] != found["wrong"] and "sampled from another" in found["stopped"]
    assert "Our checks stop this run" in capsys.readouterr().out
    assert (tmp_path / "out" / "temperature.png").stat().st_size > 10_000
    loud = main(replace(cfg, run="old_minus_new,inverted_k3", seeds=1))["inverted_k3"]
    assert loud["stopped"] == "" and loud["wrong"]["kl_old"] != loud["right"]["kl_old"]
    stored = read_json(str(tmp_path / "out" / "museum.json"))["effects"]
    assert list(stored) == ["temperature", "inverted_k3", "old_minus_new"]      # in their order
    assert stored["temperature"] == found


def test_missing_stages_are_refused_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="make the stages with: python -m minirlhf"):
        main(MuseumConfig(run="all", stages=str(tmp_path)))


def test_the_committed_effects_are_those_of_all_exhibits_and_the_labels_say_what_stops_a_run():
    effects = read_json(str(ROOT / MuseumConfig().results))["effects"]
    assert list(effects) == [exhibit.name for exhibit in EXHIBITS]
    for exhibit in EXHIBITS:
        assert bool(effects[exhibit.name]["stopped"]) == bool(exhibit.stops), exhibit.name
