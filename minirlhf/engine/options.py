"""Options and errors of every command: a dataclass becomes a command line, an error one sentence.

Imports nothing of ours.
"""

import argparse
import dataclasses
import inspect
import os
import re
import sys
import typing

# ---- values --------------------------------------------------------------------------------------

def check(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_range(config, name: str, low: float, high: float) -> None:
    """Check `low <= config.name <= high`, which NaN fails; the error names all four."""
    value = getattr(config, name)
    check(low <= value <= high, f"--{name} is {value}, expected a value from {low} to {high}")


def check_choice(config, name: str, choices: tuple) -> None:
    """Check that `config.name` is one of `choices`."""
    value = getattr(config, name)
    check(value in choices, f"--{name} is {value!r}, expected one of {', '.join(choices)}")


def split_folders(names: str) -> list[str]:
    """The folders that an option names, joined by commas; a folder's name may itself hold commas.

    Of the parts, the most that together are a folder are one name.
    Example: with folders "a,b" and "c", split_folders("a,b,c") == ["a,b", "c"].
    """
    folders, parts = [], names.split(",")
    while parts:
        ends = [end for end in range(len(parts), 1, -1) if os.path.isdir(",".join(parts[:end]))]
        end = ends[0] if ends else 1
        folders.append(",".join(parts[:end]))
        parts = parts[end:]
    return folders


# ---- command line --------------------------------------------------------------------------------

def field_comments(config_class) -> dict[str, str]:
    """The trailing comment of each field of a config dataclass: it is the option's help text.

    Example: the line `seed: int = 0    # of the sample` gives {"seed": "of the sample"}.
    """
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(config_class), re.M))


def parse_config(config_class, arguments: list[str] | None = None):
    """Build a frozen config from the command line: `--name value`, `--flag` and `--no-flag`.

    The options are the dataclass's fields and their help is the fields' comments, so that each
    fact about an option is written once. `__post_init__` of the config checks the values.
    """
    summary = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n")[0]
    parser = Parser(description=summary, allow_abbrev=False,
                    usage="%(prog)s [--option value ...]   (--help lists them)")
    comments, kinds = field_comments(config_class), typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = type(field.default)
        parsed = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        option = parser.add_argument(f"--{field.name}", default=field.default, **parsed)
        # set afterwards: some versions of argparse append the default of a flag, others do not
        words = ", ".join(map(repr, typing.get_args(kinds[field.name])))    # none: any value
        text = f"{comments.get(field.name, '')} ({words and f'one of {words}; '}default: " \
               f"{field.default!r})"
        option.help = text.replace("%", "%%")
    return config_class(**vars(parser.parse_args(arguments)))


def name_first_argument(option: str) -> None:
    """Let the first word of the command line stand for `--option word`: `data FILE`."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, f"--{option}")


def join_first_arguments(option: str) -> None:
    """Let the first words of the command line stand for `--option word,word`: `plots RUN RUN`."""
    count = next((i for i, word in enumerate(sys.argv[1:]) if word.startswith("-")),
                 len(sys.argv) - 1)
    if count > 0:
        sys.argv[1:1 + count] = [f"--{option}", ",".join(sys.argv[1:1 + count])]


# ---- errors --------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """Text of a file, a model or an option in which no character can drive the terminal.

    Example: printable("one\\x1b[2J two") == "one\\ufffd[2J two".
    """
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd",
                  text)


class Parser(argparse.ArgumentParser):
    """argparse, whose errors quote what was typed."""

    def error(self, message: str):
        """Say the error, without what could drive the terminal, and end the program."""
        super().error(printable(message))


def under_debugger() -> bool:
    """Whether somebody steps through this process."""
    monitoring = getattr(sys, "monitoring", None)        # Python 3.12 and later
    watched = monitoring is not None and monitoring.get_tool(monitoring.DEBUGGER_ID) is not None
    if watched or sys.gettrace() is not None:
        return True
    frame = sys._getframe()                              # `c` in pdb removes its trace function,
    while frame is not None:                             # but pdb still waits further up the stack
        if frame.f_globals.get("__name__") == "bdb":
            return True
        frame = frame.f_back
    return False


def out_of_memory(error: BaseException) -> bool:
    """Whether the error means "out of memory"; PyTorch says it by a RuntimeError."""
    return isinstance(error, MemoryError) or bool(re.search("(allocate|out of) memory", str(error)))


def describe_error(error: BaseException) -> str:
    """An expected error as one sentence, without Python's error numbers and brackets."""
    if out_of_memory(error):
        return "out of memory; make the batch, the context or the model smaller"
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename
                         else error.strerror)
    return " ".join(printable(str(error)).split())


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop, and its state was saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal

    def __reduce__(self):
        return Stopped, (self.args[0], self.signal)      # from one process to another


class one_sentence:
    """Within `with one_sentence():` an expected error ends the program with one sentence.

    Exit code 2 for bad input (one line on stderr, no traceback), 130 for Ctrl-C, 143 for SIGTERM,
    141 when the reader of our output has left.
    Under a debugger the exception is left alone, so that its locals can be looked at. This is a
    context and not a function that calls `main`, so that no frame of ours stands between the two.
    """

    def __enter__(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")     # a console without UTF-8 stops no run

    def __exit__(self, kind, error, trace) -> None:
        if error is None or under_debugger():
            return
        if isinstance(error, BrokenPipeError):           # the reader of a pipe has left: head, say
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(128 + 13) from None
        if isinstance(error, KeyboardInterrupt):
            print(str(error) or "stopped by Ctrl-C", file=sys.stderr)
            raise SystemExit(128 + getattr(error, "signal", 2)) from None
        expected = isinstance(error, (ValueError, OSError, FloatingPointError, MemoryError))
        if expected or (isinstance(error, RuntimeError) and out_of_memory(error)):
            print(f"error: {describe_error(error)}", file=sys.stderr)
            raise SystemExit(2) from None
