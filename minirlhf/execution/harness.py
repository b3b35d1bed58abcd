"""What runs in the child process: one answer on some inputs, under limits. Imports nothing of ours.

    python -I -S -W ignore harness.py    # the runner starts it; the job comes on stdin

The job is the ascii() of (mark, source, inputs, limits, seconds). An answer is an expression in x,
or statements that define a function f. What it should give is not in the job: the parent compares,
so an answer finds nothing here that it could copy. Lines that begin with the mark, a new secret for
each run, go to stdout:

    <mark> ready                   the harness works: whatever comes next is the answer's doing
    <mark> value 7                 one line per input: the value as Python writes it,
    <mark> raised ValueError       or the name of the exception,
    <mark> gave object             or the type of what is no plain value
    <mark> refused open            the answer tried what it may not do, and was ended
    <mark> end                     all inputs were tried; without this line nothing is paid
"""
import os
import resource
import signal
import sys

PLAIN = (int, float, bool, str, type(None))


def set_limits(limits: dict[str, tuple[int, int]]) -> None:
    """Ask the system for limits, soft and hard, of this process: {"RLIMIT_CPU": (1, 2), ...}."""
    for name, soft_and_hard in limits.items():
        resource.setrlimit(getattr(resource, name), soft_and_hard)


def say(mark: str, text: str) -> None:
    """Write one marked line, past sys.stdout, which the answer may have changed."""
    data = f"\n{mark} {text}\n".encode("utf-8", "backslashreplace")
    while data:
        data = data[os.write(1, data):]


class Guard:
    """An audit hook: Python calls it before it opens, imports, starts, connects or removes.

    A small function of numbers does none of that. So from `arm` on any such event ends the process,
    but for the execution of the answer's own code. An exception would not do: the answer could
    catch it. careful: it stops accidents and plain tries; it is no sandbox.

    Source: Python's documentation of sys.addaudithook, which says so; PEP 578.
    """

    def __init__(self, mark: str):
        self.mark, self.code, self.armed = mark, None, False

    def arm(self, code) -> None:
        """From now on only `code`, the compiled answer, may be executed."""
        self.code, self.armed = code, True

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.armed and not (event == "exec" and arguments[0] is self.code):
            say(self.mark, f"refused {event}")
            os._exit(0)


def is_plain(value) -> bool:
    """Whether a value is a number, a text, None, or a list or tuple of such, of exactly that type.

    A subclass could have an == or a repr of its own.
    """
    if type(value) in (list, tuple):
        return all(is_plain(item) for item in value)
    return type(value) in PLAIN


def compile_answer(source: str):
    """(code, whether it is an expression). Raises SyntaxError and the like if it does not parse."""
    try:
        return compile(source, "answer", "eval"), True
    except SyntaxError:
        return compile(source, "answer", "exec"), False


def try_input(code, is_expression: bool, names: dict, x) -> str:
    """What the answer gives for one input, as a line without its mark."""
    try:
        value = eval(code, {"x": x}) if is_expression else names["f"](x)
        return f"value {value!r}" if is_plain(value) else f"gave {type(value).__name__}"
    except BaseException as error:                       # SystemExit, too: exit(0) is no success
        return f"raised {type(error).__name__}"


def main() -> None:
    """Read the job, limit ourselves, run the answer, and leave without any cleaning up."""
    mark, source, inputs, limits, seconds = eval(sys.stdin.read())
    signal.alarm(seconds)                                # ends us if nobody is left to kill us
    guard, names = Guard(mark), {}
    sys.addaudithook(guard)
    set_limits(limits)
    say(mark, "ready")
    try:
        code, is_expression = compile_answer(source)
        guard.arm(code)
        if not is_expression:
            exec(code, names)
    except BaseException as error:
        lines = [f"raised {type(error).__name__}"] * len(inputs)
    else:
        lines = [try_input(code, is_expression, names, x) for x in inputs]
    for line in [*lines, "end"]:
        say(mark, line)
    os._exit(0)


if __name__ == "__main__":
    main()
