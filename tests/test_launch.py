""".vscode/launch.json: every entry names a module that is there, and options that it takes."""

import dataclasses
import importlib
import json
import re

import pytest
from helpers import REPOSITORY, TRAINERS

from minirlhf.engine.options import parse_config

LAUNCH = json.loads((REPOSITORY / ".vscode" / "launch.json").read_text(encoding="utf-8"))
ENTRIES = LAUNCH["configurations"]
COMMANDS = {entry["name"]: (entry["module"], entry["args"]) for entry in ENTRIES}
LECTURES = sorted((REPOSITORY / "lectures").glob("[0-9][0-9]-*.md"))
FIRST_TOUR = re.compile(r"```pdb\n\$ python -m pdb -m (.+)\n((?:.*\n)*?)```")


def config_of(module: str):
    """The class whose fields are the options of `python -m module`."""
    path = REPOSITORY / module.replace(".", "/")
    module = f"{module}.__main__" if path.is_dir() else module
    found = [value for value in vars(importlib.import_module(module)).values()
             if isinstance(value, type) and value.__module__ == module
             and value.__name__.endswith("Config")]
    assert len(found) == 1, module
    return found[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_entry_names_a_module_and_options_that_its_config_takes(name):
    module, arguments = COMMANDS[name]
    if module == "pytest":
        assert arguments == ["${file}", "-k", "${selectedText}"]
        return
    if module == "pdb":                                  # -c command ... -m module options
        place = arguments.index("-m")
        assert arguments[:place:2] == ["-c"] * (place // 2)
        module, arguments = arguments[place + 1], arguments[place + 2:]
    assert module == "minirlhf" or module.startswith("minirlhf.")
    cfg = parse_config(config_of(module), arguments)
    for option, value in zip(arguments, [*arguments[1:], ""]):
        if option.startswith("--") and not value.startswith("--") and value:
            assert str(getattr(cfg, option[2:])) == value


def test_entries_have_what_the_editor_needs_and_different_names():
    assert LAUNCH["version"] == "0.2.0" and len(COMMANDS) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry["type"] == "debugpy" and entry["request"] == "launch"
        assert entry["cwd"] == "${workspaceFolder}" and entry["console"] == "integratedTerminal"
        # pdb asks in the terminal itself: the editor's debugger must not watch it, too
        assert entry.get("noDebug", False) == (entry["module"] == "pdb")


def test_each_trainer_is_there_quick_and_writes_beside_the_readers_runs():
    quick = {module: arguments for name, (module, arguments) in COMMANDS.items() if "quick" in name}
    assert set(quick) >= {f"minirlhf.{name}" for name in TRAINERS}
    for module, arguments in quick.items():
        if "out" in {field.name for field in dataclasses.fields(config_of(module))} \
                and module != "minirlhf.evaluate":
            assert arguments[-2] == "--out" and arguments[-1].startswith("checkpoints/quick/")


@pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.stem)
def test_each_lectures_first_stop_is_there_as_the_lecture_has_it(path):
    tour = FIRST_TOUR.search(path.read_text(encoding="utf-8"))
    if tour is None:
        pytest.skip("a lecture without a stop in a program")
    typed = [line.removeprefix("(Pdb) ") for line in tour.group(2).split("\n")
             if line.startswith("(Pdb) ")]
    commands = typed[:typed.index("c") + 1]
    expected = [word for command in commands for word in ("-c", command)]
    expected += ["-m", *tour.group(1).split()]
    name = f"Lecture {int(path.name[:2])}: its first stop"
    assert COMMANDS.get(name) == ("pdb", expected), f"{name}: {json.dumps(expected)}"
