"""Checks an attempt at an exercise and says in words what is wrong.

A function is tried on the example of its docstring and on random cases, and compared with a slow
reference; of a loss the gradient is compared with finite differences of that reference. If the
results are wrong, they are compared with those of the known mistakes: a result that equals a
mistake's in every case gets the mistake's words.
"""

import contextlib
import functools
import inspect
import math
import os
import random
import re
import signal
import sys
import threading
import traceback
from _thread import interrupt_main
from dataclasses import dataclass

import torch

from minirlhf.engine.functions import call
from minirlhf.engine.options import check, printable, under_debugger
from minirlhf.exercises.exercise import Code, Question, folded

CASES = 12                          # random cases
SECONDS = 20.0                      # that an attempt may take for all of them
CLOSE = 1e-6                        # how far results may be apart, relative and absolute
STEP = 1e-6                         # of finite differences


@dataclass(frozen=True)
class Observation:
    """What a function gave for some arguments."""
    form: str                       # "number", "shape (2, 3)", ...
    numbers: list[float]
    gradient: list[float] | None = None     # of a loss, None: it has none

    def equals(self, other: "Observation") -> bool:
        """Whether forms and numbers are the same."""
        return (self.form == other.form and close(self.numbers, other.numbers)
                and (self.gradient is None) == (other.gradient is None)
                and close(self.gradient or [], other.gradient or [], 1e-4))


def close(ours: list[float], others: list[float], tolerance: float = CLOSE) -> bool:
    """Whether all numbers agree; NaN agrees with NaN."""
    return len(ours) == len(others) and all(
        (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=tolerance,
                                                          abs_tol=tolerance)
        for a, b in zip(ours, others))


# ---- the student's file --------------------------------------------------------------------------

@contextlib.contextmanager
def time_limit(path: str, seconds: float):
    """Stop what runs within the block after `seconds`, unless somebody steps through it."""
    main_thread, expired = threading.get_ident(), threading.Event()

    def stop() -> None:
        """Interrupt the main thread, unless a debugger stands somewhere in it."""
        frame = sys._current_frames().get(main_thread)
        while frame is not None and frame.f_globals.get("__name__") != "bdb":
            frame = frame.f_back
        if frame is None:
            expired.set()
            interrupt_main()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # it may be ignored
    if not under_debugger():
        timer.start()
    try:
        yield
    except KeyboardInterrupt as error:
        if not expired.is_set():
            raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                 if frame.filename == path]
        place = f" (it was at line {lines[-1]})" if lines else ""
        raise ValueError(f"{path} did not end within {seconds:.0f} seconds{place}: a loop that "
                         "does not end?") from None
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


def run_attempt(path: str, function, *arguments):
    """Call a student's code; an error in it becomes one sentence with the line in their file.

    Raises: NotImplementedError as it is, the mark of a stub.
    """
    try:
        # a partial has no code of its own, so that `call` does not take it for ours
        return call(path, functools.partial(function, *arguments))
    except SystemExit:
        raise ValueError(f"{path} ends the program; leave out exit() and sys.exit()") from None
    except ValueError as error:
        cause = error.__cause__
        if isinstance(cause, NotImplementedError) or cause is None:
            raise (cause or error) from None
        frames = traceback.extract_tb(cause.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        place = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{place}: {type(cause).__name__}: {cause}") from None


def load_attempt(path: str, name: str):
    """Run the student's file; returns the function of that name."""
    try:
        with open(path, encoding="utf-8-sig") as file:   # some editors put a mark before the text
            code = compile(file.read(), path, "exec")
    except SyntaxError as error:
        place = f"{path}, line {error.lineno}" if error.lineno else path
        raise ValueError(f"{place}: not Python: {error.msg}") from None
    except ValueError as error:                          # of another encoding, or null bytes
        raise ValueError(f"{path}: not Python in UTF-8: {error}") from None
    names = {"__name__": "attempt", "__file__": path}
    run_attempt(path, exec, code, names)
    attempt = names.get(name)
    check(callable(attempt), f"{path} has no function {name}; write one, or get the stub again "
          f"into another folder: python -m minirlhf.exercises {name} --folder another")
    return attempt


# ---- results -------------------------------------------------------------------------------------

def numbers_of(result) -> tuple[str, list[float]]:
    """The form of a result and all of its numbers.

    Example: a tensor of shape (1, 2) gives "shape (1, 2)" and two numbers, 0.5 gives "number".
    """
    if hasattr(result, "__array__") and not torch.is_tensor(result):     # NumPy's
        result = torch.tensor(result)
    if torch.is_tensor(result):
        form = f"shape {tuple(result.shape)}" if result.dim() > 0 else "number"
        return form, result.detach().double().flatten().tolist()
    if isinstance(result, (bool, int, float)):
        return "number", [float(result)]
    if isinstance(result, dict):
        result, names = list(result.values()), [printable(str(name)) for name in result]
        forms, numbers = numbers_of(tuple(result))
        return f"names {', '.join(names)} with {forms}", numbers
    if isinstance(result, (list, tuple)):
        parts = [numbers_of(part) for part in result]
        forms, numbers = [form for form, _ in parts], [x for _, part in parts for x in part]
        if parts and set(forms) == {"number"}:
            return f"shape ({len(forms)},)", numbers
        if isinstance(result, list) and len(set(forms)) == 1 and forms[0].startswith("shape ("):
            inner = forms[0].removeprefix("shape (").removesuffix(")").removesuffix(",")
            return f"shape ({len(forms)}, {inner})", numbers
        return f"({', '.join(forms)})", numbers
    return type(result).__name__, []


def copies(arguments: tuple) -> list:
    """The arguments, tensors copied: an attempt may change its own."""
    return [x.clone() if torch.is_tensor(x) else x for x in arguments]


def observe(function, arguments: tuple, gradient_of: tuple = ()) -> Observation:
    """What the function gives, and for a loss its gradient by the arguments at `gradient_of`."""
    arguments = copies(arguments)
    for position in gradient_of:
        arguments[position].requires_grad_()
    result = function(*arguments)
    form, numbers = numbers_of(result)
    loss = result[0] if isinstance(result, tuple) and gradient_of else result
    if not gradient_of or not torch.is_tensor(loss) or not loss.requires_grad or loss.dim() > 0:
        return Observation(form, numbers)
    loss.backward()
    gradients = [arguments[i].grad for i in gradient_of]
    return Observation(form, numbers, [x for i, gradient in zip(gradient_of, gradients)
                                       for x in (torch.zeros_like(arguments[i]) if gradient is None
                                                 else gradient).flatten().tolist()])


def expected(exercise: Code, arguments: tuple) -> Observation:
    """What the slow reference gives, with a gradient by finite differences."""
    form, numbers = numbers_of(exercise.slow(*copies(arguments)))
    if not exercise.gradient_of:
        return Observation(form, numbers)
    slopes = []
    for position in exercise.gradient_of:
        for index in range(arguments[position].numel()):
            losses = []
            for step in (STEP, -STEP):
                moved = copies(arguments)
                moved[position].view(-1)[index] += step
                losses.append(numbers_of(exercise.slow(*moved))[1][0])
            slopes.append((losses[0] - losses[1]) / (2 * STEP))
    return Observation(form, numbers, slopes)


# ---- the verdict ---------------------------------------------------------------------------------

def shown(x) -> str:
    """A value in few characters: numbers rounded, masks as 0 and 1."""
    if torch.is_tensor(x):
        x = x.int() if x.dtype == torch.bool else x
        return str(torch.round(x.double() * 1e4).div(1e4).tolist() if x.is_floating_point()
                   else x.tolist())
    return f"{x:.4g}" if isinstance(x, float) else repr(x)


def in_form(form: str, numbers: list[float]) -> str:
    """Numbers, rounded, in the shape that they came in; those of several results in one list."""
    rounded = [round(x, 4) + 0.0 for x in numbers]       # + 0.0: never -0.0
    if form.startswith("shape ("):
        shape = [int(size) for size in re.findall(r"\d+", form)]
        return str(torch.tensor(rounded, dtype=torch.float64).view(shape).tolist())
    return str(rounded[0] if form == "number" else rounded)


def difference(exercise: Code, arguments: tuple, right: Observation, found: Observation) -> str:
    """The arguments, what was expected, and what was found."""
    names = inspect.signature(exercise.solution).parameters
    lines = [f"  {name} = {shown(x)}" for name, x in zip(names, arguments)]
    if right.form != found.form:
        lines += [f"expected  {right.form}", f"found     {found.form}"]
    elif not close(right.numbers, found.numbers):
        lines += [f"expected  {in_form(right.form, right.numbers)}",
                  f"found     {in_form(found.form, found.numbers)}"]
    elif found.gradient is None:
        lines += ["The number is right, but it carries no gradient: nothing would be trained. Look "
                  "for .item(), .detach(), float() or torch.tensor() on the way."]
    else:
        lines += ["The number is right, its gradient is not.",
                  f"expected  {[round(x, 4) for x in right.gradient]}  (finite differences)",
                  f"found     {[round(x, 4) for x in found.gradient]}"]
    return "\n".join(lines)


def recognise(exercise: Code, trials: list[tuple], found: list[Observation]) -> str:
    """The words of the mistake that gives the same results in all cases; "" if none does."""
    for wrong, words in exercise.mistakes:
        if all(observe(wrong, arguments, exercise.gradient_of).equals(seen)
               for arguments, seen in zip(trials, found)):
            return words
    return ""


def hint_for(name: str) -> str:
    """Where the hint is."""
    return f"A hint: python -m minirlhf.exercises --hint {name}"


def check_file(exercise: Code, path: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Whether the function in the student's file is right, and what is to be said about it."""
    check(os.path.isfile(path), f"{path} is not there; write the stub first: python -m "
          f"minirlhf.exercises {exercise.name}")
    trials = [exercise.example] + [exercise.case(random.Random(seed)) for seed in range(CASES)]
    with time_limit(path, seconds):
        attempt, found = load_attempt(path, exercise.name), []
        for arguments in trials:
            try:
                found.append(run_attempt(path, observe, attempt, arguments,
                                         exercise.gradient_of))
            except NotImplementedError:
                return False, f"{path}: not written yet. {hint_for(exercise.name)}"
    return judge(exercise, trials, found)


def judge(exercise: Code, trials: list[tuple], found: list[Observation]) -> tuple[bool, str]:
    """The verdict on what an attempt gave for the arguments in `trials`."""
    rights = [expected(exercise, arguments) for arguments in trials]
    bad = [i for i, right in enumerate(rights) if not right.equals(found[i])]
    if not bad:
        return True, (f"{exercise.name}: right, on the example and in {CASES} random cases"
                      f"{', with its gradient' if exercise.gradient_of else ''}. Compare: "
                      f"python -m minirlhf.exercises --solution {exercise.name}")
    words = recognise(exercise, trials, found)
    place = "the example" if bad[0] == 0 else "a random case"
    text = difference(exercise, trials[bad[0]], rights[bad[0]], found[bad[0]])
    verdict = folded(f"{exercise.name}: not right yet. {words}")
    return False, f"{verdict}\n\nIn {place}:\n{text}"


def check_answer(question: Question, answer: str) -> tuple[bool, str]:
    """Whether the answer is right, and the explanation if it is."""
    check(bool(answer), f"{question.name} is answered on the command line: --check {question.name} "
          f"--answer {'WORD' if question.choices else 'NUMBER'}")
    right = question.answer()
    if question.choices:
        check(answer in question.choices, f"--answer is {answer!r}, expected one of "
              f"{', '.join(question.choices)}")
        good = answer == right
        return good, (folded(f"{answer}: yes. {question.why}") if good else
                      f"{answer}: no. {hint_for(question.name)}")
    try:
        number = float(answer)
    except ValueError:
        raise ValueError(f"--answer is {answer!r}, expected a number such as 0.25") from None
    if math.isclose(number, right, rel_tol=question.tolerance, abs_tol=1e-9):
        return True, folded(f"{answer}: right. {question.why}")
    for wrong, words in question.slips:
        if math.isclose(number, wrong, rel_tol=question.tolerance, abs_tol=1e-9):
            return False, folded(f"{answer}: not right. {words}")
    return False, f"{answer}: not right. {hint_for(question.name)}"
