"""The layout of the package, read from its source: imports run one way, files keep their size and
the house style, and every option is read.
"""

import ast
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from helpers import REPOSITORY, TRAINERS

from minirlhf.engine.options import field_comments

PACKAGE = REPOSITORY / "minirlhf"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).as_posix() for path in MODULES]
every_module = pytest.mark.parametrize("path", MODULES, ids=NAMES)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """minirlhf/engine/state.py -> minirlhf.engine.state; a package's __init__ is the package."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {module_name(path): path for path in MODULES}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, within functions too."""
    names = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(OURS)
            names |= submodules or {node.module}
    return names


def our_imports(path: Path) -> set[str]:
    """Of these our own, without their first word: {"engine.options", "gpt2"}."""
    return {name.removeprefix("minirlhf.") for name in imports_of(path) if name in OURS}


# ---- imports -------------------------------------------------------------------------------------

READERS_PATH = {                    # what these files may import of ours beside engine and files
    "gpt2": set(), "tokenizer": set(), "data": {"tokenizer"},
    "generate": {"data", "gpt2", "tokenizer"},
    "rewards": {"generate", "gpt2", "tokenizer"}, "ppo_report": {"tokenizer"},
    "ppo_tokens": {"gpt2", "ppo_report", "tokenizer"},
    "sft": {"data", "generate", "gpt2", "tokenizer"},
    "reward_model": {"data", "generate", "gpt2", "tokenizer"},
    "ppo": {"data", "generate", "gpt2", "ppo_report", "ppo_tokens", "rewards", "tokenizer"},
    "evaluate": {"data", "generate", "gpt2", "people.verdicts", "rewards", "tokenizer",
                 "world.judge"},
    "pretrain": {"generate", "gpt2", "tokenizer"}, "plots": set()}
# These import the rest.
AROUND = ("museum", "diagnose", "benchmark", "experiments", "execution", "explain", "label",
          "exercises", "page", "lab", "siblings")


def test_every_import_of_ours_is_of_a_module_that_is_there():
    for path in MODULES:
        names = {name for name in imports_of(path) if name.split(".")[0] == "minirlhf"}
        assert names <= set(OURS), path


@pytest.mark.parametrize("name", READERS_PATH)
def test_the_readers_path_imports_downwards_only(name):
    ours = our_imports(PACKAGE / f"{name}.py")
    assert {x for x in ours if x.split(".")[0] not in ("engine", "files")} <= READERS_PATH[name]


def test_the_network_knows_of_files_only_the_names_by_which_transformers_reads_them():
    assert our_imports(PACKAGE / "gpt2.py") == {"engine.fast", "engine.options",
                                                "files.pretrained"}
    source = (PACKAGE / "gpt2.py").read_text(encoding="utf-8")
    assert "from minirlhf.files.pretrained import Pretrained\n" in source
    assert not {"open(", "os.", "load_network", "save_network"} & set(source.split())


@every_module
def test_files_import_files_only_and_the_engine_nothing_above_it(path):
    folder = path.relative_to(PACKAGE).parts[0]
    if folder in ("files", "engine"):
        allowed = {"files"} | {folder}
        assert {name.split(".")[0] for name in our_imports(path)} <= allowed


@every_module
def test_what_stands_around_the_stages_is_imported_by_none_of_them(path):
    if path.relative_to(PACKAGE).parts[0] not in (*AROUND, "__main__.py"):     # the pipeline
        assert not {name for name in our_imports(path) if name.split(".")[0] in AROUND}


def test_trainers_do_not_import_one_another():
    for name in TRAINERS:
        assert not our_imports(PACKAGE / f"{name}.py") & set(TRAINERS), name


def test_the_text_world_imports_no_trainer():
    for path in (PACKAGE / "world").glob("*.py"):
        ours = {name.split(".")[0] for name in our_imports(path)}
        assert ours <= {"world", "data", "engine", "files", "generate", "gpt2", "tokenizer"}, path


def test_no_modules_import_one_another_in_a_circle():
    """Imports within a function count, too."""
    imports = {name: {"minirlhf." + other for other in our_imports(path)}
               for name, path in OURS.items()}
    finished, trail = set(), []

    def follow(name: str) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name in finished:
            return
        trail.append(name)
        for other in sorted(imports[name]):
            follow(other)
        finished.add(trail.pop())

    for name in imports:
        follow(name)
    assert finished == set(OURS)


@every_module
def test_a_module_imports_the_five_packages_and_the_standard_library_only(path):
    known = {"torch", "tiktoken", "numpy", "matplotlib", "minirlhf"} | set(sys.stdlib_module_names)
    if path.name == "beside_trl.py":                     # another interpreter runs it
        assert not any("benchmark.beside_trl" in our_imports(other) for other in MODULES)
        known |= {"trl", "transformers", "tokenizers", "datasets"}
    assert {name.split(".")[0] for name in imports_of(path)} <= known


@every_module
def test_no_module_has_a_name_of_the_standard_library(path):
    """`python minirlhf/ppo.py` puts the package's folder first on the path."""
    if not path.stem.startswith("__"):
        assert path.stem not in sys.stdlib_module_names
    for folder in path.relative_to(PACKAGE).parts[:-1]:
        assert folder not in sys.stdlib_module_names and folder not in ("utils", "core")


# ---- sizes and style -----------------------------------------------------------------------------

LIMITS = {"ppo.py": 380, "gpt2.py": 280, "sft.py": 220, "reward_model.py": 300, "generate.py": 300,
          "data.py": 220}


@every_module
def test_no_file_is_longer_than_a_sitting(path):
    name = path.relative_to(PACKAGE).as_posix()
    if name != "world/facts.py":                         # tables
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= LIMITS.get(name, 400), f"{name} has {lines} lines"


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
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


BARE = ast.Name("BaseException")     # what `except:` without a name means


@every_module
def test_no_error_of_an_unknown_kind_is_swallowed(path):
    """A handler that catches all of them ends by raising again.

    One place catches `Exception`: the call of a user's function, which may raise anything. The
    process that runs a model's answer reports whatever it raises, even SystemExit.
    """
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ExceptHandler):
            kinds = {x.id for x in ast.walk(node.type or BARE) if isinstance(x, ast.Name)}
            if "Exception" in kinds:
                assert path.relative_to(PACKAGE).as_posix() == "engine/functions.py"
            reports = path.relative_to(PACKAGE).as_posix() == "execution/harness.py"
            if kinds & {"Exception", "BaseException"} and not reports:
                assert isinstance(node.body[-1], ast.Raise), ast.unparse(node)


def test_tests_keep_to_100_columns():
    for path in (REPOSITORY / "tests").glob("*.py"):
        lines = path.read_text(encoding="utf-8").split("\n")
        assert not [n for n, line in enumerate(lines, start=1) if len(line) > 100], path.name


def passed_on(mode: ast.expr | None, path: Path) -> bool:
    """Whether it is the mode that `open_own` was called with."""
    return isinstance(mode, ast.Name) and path.relative_to(PACKAGE).as_posix() == "files/disk.py"


@every_module
def test_text_files_are_opened_as_utf_8(path):
    for node in ast.walk(parsed(path)):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        mode = node.args[1] if called and len(node.args) > 1 else None
        if called in ("open", "open_own", "os.fdopen", "gzip.open") and not passed_on(mode, path):
            words = [x.value for x in ast.walk(mode or node.func) if isinstance(x, ast.Constant)]
            binary = any("b" in word for word in words)
            assert binary or any(k.arg == "encoding" for k in node.keywords), ast.unparse(node)


@pytest.mark.parametrize("name", ["gpt2", "generate", "data", "rewards", "engine/training",
                                  *TRAINERS])
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


# ---- options -------------------------------------------------------------------------------------

def config_classes(tree: ast.Module) -> list[ast.ClassDef]:
    return [node for node in tree.body if isinstance(node, ast.ClassDef)
            and node.name.endswith("Config") and node.name != "GPT2Config"]


CONFIGS = [(module_name(path), node.name) for path in MODULES
           for node in config_classes(parsed(path))]
every_config = pytest.mark.parametrize("module, name", CONFIGS)


def fields_read(tree: ast.AST, owners: tuple[str, ...], outside: ast.AST | None = None) -> set[str]:
    """Names of the attributes of these variables that are read, but for those in `outside`."""
    skipped = {id(node) for node in ast.walk(outside)} if outside else set()
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Load) and id(node) not in skipped
            and ast.unparse(node.value) in owners}


def test_all_commands_have_a_config():
    assert len(CONFIGS) >= 12
    assert {module for module, _ in CONFIGS} >= {f"minirlhf.{name}" for name in (
        "__main__", "data", "evaluate", "generate", "plots", "pretrain", *TRAINERS)}


@every_config
def test_every_config_field_is_read_and_has_a_comment(module, name):
    path, tree = OURS[module], parsed(OURS[module])
    config = next(node for node in tree.body if getattr(node, "name", "") == name)
    read = fields_read(tree, ("cfg",), config)
    if "minirlhf.engine.run_folder" in imports_of(path):
        read |= fields_read(parsed(PACKAGE / "engine" / "run_folder.py"), ("cfg", "self.cfg"))
    if "minirlhf.ppo_tokens" in imports_of(path):
        read |= fields_read(parsed(PACKAGE / "ppo_tokens.py"), ("cfg",))
    if path.parent.name == "siblings":       # hand cfg on to trainers' functions
        for trainer in our_imports(path) & set(TRAINERS):
            read |= fields_read(parsed(PACKAGE / f"{trainer}.py"), ("cfg",))
    comments = field_comments(getattr(importlib.import_module(module), name))
    fields = [node.target.id for node in config.body if isinstance(node, ast.AnnAssign)]
    assert fields and list(comments) == fields           # the comments are the help text
    for field in fields:
        assert field in read, f"{name}.{field} is never read"
        assert len(comments[field]) > 3, f"{name}.{field}: no comment"


@every_config
def test_configs_are_frozen_and_their_defaults_are_of_the_types_they_state(module, name):
    """The command line converts a value to the type of the default."""
    config = getattr(importlib.import_module(module), name)
    fields = dataclasses.fields(config)
    assert config.__dataclass_params__.frozen
    for field in fields:
        if get_origin(field.type) is Literal:
            assert field.default in get_args(field.type), field.name
        else:
            plain = getattr(field.type, "__origin__", field.type)        # of an Annotated type
            assert plain is type(field.default) and plain in (str, int, float, bool), field.name


NUMBERS = [(module, name, field.name, type(field.default)) for module, name in CONFIGS
           for field in dataclasses.fields(getattr(importlib.import_module(module), name))
           if type(field.default) in (int, float) and field.name != "seed"]


@pytest.mark.parametrize("module, name, field, kind", NUMBERS)
def test_every_number_has_a_range_and_the_error_names_it(module, name, field, kind):
    config = getattr(importlib.import_module(module), name)
    for text in ("-1", "1000000000000") + (("nan", "inf", "-inf") if kind is float else ()):
        value = kind(text)
        with pytest.raises(ValueError, match=f"--{field} is {value}, expected a value from"):
            config(**{field: value})
