"""What the figures of an experiment depend on beside its options: our files, torch, the processor.

A run that goes on after one of them changed would mix two kinds of figures. Only files that a task
can come to run count, so a change in the page or in another experiment costs nobody a result.
"""

import ast
import hashlib
import os

import torch

from minirlhf.benchmark.machine import describe_machine

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Verdict, table and picture are made anew from the tasks' figures whenever an experiment ends.
CONCLUDING = ("minirlhf.lab", "minirlhf.lab.experiment", "minirlhf.lab.pictures")


def file_of(name: str) -> str | None:
    """The file of a module of ours, None if there is no such module.

    Example: file_of("minirlhf.ppo") ends with minirlhf/ppo.py; file_of("minirlhf.ppo.gae") is None.
    """
    base = os.path.join(ROOT, *name.split("."))
    paths = (base + ".py", os.path.join(base, "__init__.py"))
    return next((path for path in paths if os.path.isfile(path)), None)


def names_in(source: bytes, package: str) -> list[str]:
    """Our modules that a file imports, in its functions too, or names by a string.

    Strings are like "minirlhf.world:prompts", or "harness.py" for a file of the same package.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value.partition(":")[0]
            names.append(f"{package}.{word[:-3]}" if word.endswith(".py") else word)
    return [name for name in names if name.split(".")[0] == "minirlhf"]


def sources_of(path: str) -> dict[str, str]:
    """{file: SHA-256} of the module in `path`, and of all of ours that it comes to import.

    Example: of lab/beta.py it has "minirlhf/ppo.py" and "minirlhf/gpt2.py", nothing of page/.
    """
    found, waiting = {}, [os.path.abspath(path)]
    while waiting:
        path = waiting.pop()
        ours = path.startswith(os.path.join(ROOT, ""))
        shown = os.path.relpath(path, ROOT).replace(os.sep, "/") if ours else os.path.basename(path)
        if shown in found:
            continue
        with open(path, "rb") as file:
            source = file.read()
        found[shown] = hashlib.sha256(source).hexdigest()
        for name in names_in(source, os.path.dirname(shown).replace("/", ".")):
            parts = name.split(".")
            modules = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
            waiting += filter(None, map(file_of, modules.difference(CONCLUDING)))
    return dict(sorted(found.items()))


def made_by(path: str) -> dict[str, str]:
    """`sources_of`, and the versions of what computes."""
    machine = describe_machine("cpu")
    return {**sources_of(path), "torch": torch.__version__, "cpu": machine["cpu"]}


def changed(saved, now: dict[str, str]) -> str:
    """What differs, in words; "" if nothing does. `saved` is what a file holds.

    Example: changed({"torch": "2.10"}, {"torch": "2.11"}) == "torch".
    """
    saved = saved if isinstance(saved, dict) else {}
    names = [name for name in sorted({**saved, **now}) if saved.get(name) != now.get(name)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
