"""The museum: each mistake is caught by the test on its label, and leaves nothing behind."""

import importlib
import inspect
import os
import tempfile
from pathlib import Path

import pytest

from minirlhf import ppo
from minirlhf.museum.exhibits import EXHIBITS, GUARDED, find
from minirlhf.museum.substitute import substituted

from helpers import ppo_config, quietly

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


def fails(function) -> bool:
    """Whether the test fails in one of its cases; it gets the fixtures that it asks for."""
    for case in cases_of(function):
        with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as path:
            fixtures = {"monkeypatch": monkeypatch, "tmp_path": Path(path)}
            wanted = set(inspect.signature(function).parameters) & set(fixtures)
            try:
                function(**case, **{name: fixtures[name] for name in wanted})
            except (AssertionError, ValueError, RuntimeError):
                return True
            except pytest.fail.Exception:                # a pytest.raises that saw nothing
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
        assert fails(function), f"{exhibit.test} does not notice it"
    assert [getattr(owner, attribute) for owner, attribute in exhibit.places] == rights
    assert not fails(function), "the mistake is still there"
