"""A world of small programs: prompts that ask for an expression in x, with tests and labellers.

    Write f(x): plus 3, then times 2. f(4) is 14.            (x + 3) * 2

A task is one or two steps that are done to a number. The prompt says them in words and gives one
example, which is the *visible test*. All else that a test needs follows from the prompt's text:
`task_of` reads the steps back. Its own arithmetic, and not an answer's, says what is right.

A quarter of the pairs of steps are held out: no demonstration, comparison or prompt of training has
them. Labellers differ as in the text world: over half of them write the right expression, others
swap the steps, mistake one, forget a bracket, print, or write down what the example shows.
"""

import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from minirlhf.engine.options import check

# words of a step, its expression, what it does; {k} is a number from 2 to 9
OPERATIONS: tuple[tuple[str, str, Callable], ...] = (
    ("plus {k}", "{a} + {k}", operator.add),
    ("minus {k}", "{a} - {k}", operator.sub),
    ("times {k}", "{a} * {k}", operator.mul),
    ("modulo {k}", "{a} % {k}", operator.mod),
    ("at least {k}", "max({a}, {k})", max),
    ("at most {k}", "min({a}, {k})", min),
)
NUMBERS = range(2, 10)
ORDERS = ("{a}, then {b}", "first {a}, then {b}", "{b}, but first {a}")
EXAMPLES = range(2, 10)             # the x of the visible test
MORE_INPUTS = (-20, -5, -1, 0, 1, 12, 33)               # of the many tests, beside the visible one
HIDDEN_INPUTS = (-31, -12, -8, -2, 11, 17, 40, 99)      # never in a reward that is optimised
ALL_INPUTS = (*EXAMPLES, *MORE_INPUTS, *HIDDEN_INPUTS)
PROMPT = re.compile(r"Write f\(x\): (.+)\. f\((\d+)\) is (-?\d+)\.")


@dataclass(frozen=True)
class Step:
    """One step, such as "plus 3"."""
    words: str
    expression: str                 # with {a} for what it is done to: "{a} + 3"
    function: Callable
    number: int

    def value(self, x: int) -> int:
        """The step done to a number."""
        return self.function(x, self.number)


def all_steps() -> tuple[Step, ...]:
    """Every operation with every number."""
    return tuple(Step(words.format(k=k), expression.format(a="{a}", k=k), function, k)
                 for words, expression, function in OPERATIONS for k in NUMBERS)


STEPS = all_steps()


@dataclass(frozen=True)
class Task:
    """What a prompt asks for."""
    steps: tuple[Step, ...]         # one or two, in the order in which they are done

    def value(self, x: int) -> int:
        """The right value of f(x)."""
        for step in self.steps:
            x = step.value(x)
        return x

    def expression(self) -> str:
        """A right answer, such as "(x + 3) * 2"."""
        return nest(self.steps)


def nest(steps: tuple[Step, ...]) -> str:
    """Steps as one expression: nest((plus 3, times 2)) == "(x + 3) * 2"."""
    text = "x"
    for step in steps:
        loose = text != "x" and not text.endswith(")")          # "x + 3", not "max(x, 3)"
        bracket = loose and step.expression.startswith("{a}")
        text = step.expression.format(a=f"({text})" if bracket else text)
    return text


# ---- prompts -------------------------------------------------------------------------------------

def is_held_out(first: int, second: int) -> bool:
    """Whether the pair of these steps, by their numbers in STEPS, is kept from training."""
    return (3 * first + second) % 4 == 0


PAIRS = {held_out: [Task((STEPS[i], STEPS[j])) for i in range(len(STEPS)) for j in range(len(STEPS))
                    if is_held_out(i, j) == held_out] for held_out in (False, True)}
SINGLES = [Task((step,)) for step in STEPS]


def wording(task: Task, order: int) -> str:
    """What is asked, in words: "plus 3, then times 2"; `order` is one of ORDERS, of two steps."""
    words = [step.words for step in task.steps]
    return words[0] if len(words) == 1 else ORDERS[order].format(a=words[0], b=words[1])


TASK_OF = {wording(task, order): task for task in [*SINGLES, *PAIRS[False], *PAIRS[True]]
           for order in range(len(ORDERS))}


def prompt_of(task: Task, order: int, x: int) -> str:
    """The prompt's text, with the example f(x)."""
    return f"Write f(x): {wording(task, order)}. f({x}) is {task.value(x)}."


def task_of(prompt: str) -> tuple[Task, int]:
    """The task of a prompt, and the x of its example; the template around it may be there.

    Example: task_of("Write f(x): plus 3. f(4) is 7.") has the task of the one step "plus 3", and 4.
    Raises: ValueError for a prompt that is none of this world's.
    """
    text = prompt.strip().removeprefix("Prompt:").removesuffix("Response:").strip()
    found = PROMPT.fullmatch(text)
    task = TASK_OF.get(found[1]) if found else None
    check(task is not None and task.value(int(found[2])) == int(found[3]), "rewards from execution "
          f"know only prompts such as \"Write f(x): plus 3. f(4) is 7.\", found {prompt!r}")
    return task, int(found[2])


def draw(rng: random.Random) -> tuple[Task, int, str]:
    """A task of the training split, the x of its example and the prompt; one in four has one step.
    """
    task = rng.choice(SINGLES if rng.random() < 0.25 else PAIRS[False])
    x = rng.choice(EXAMPLES)
    return task, x, prompt_of(task, rng.randrange(len(ORDERS)), x)


def inputs_of(example: int, tests: str) -> tuple[int, ...]:
    """The inputs of the "few", "many" or "hidden" tests of a prompt whose example is f(example)."""
    return {"few": (example,), "many": (example, *MORE_INPUTS), "hidden": HIDDEN_INPUTS}[tests]


# ---- labellers -----------------------------------------------------------------------------------

def right(task: Task, x: int, rng: random.Random) -> str:
    """The expression."""
    return task.expression()


def swapped(task: Task, x: int, rng: random.Random) -> str:
    """The steps in the wrong order; of one step, with another number."""
    if len(task.steps) == 1:
        return mistaken(task, x, rng)
    return nest(task.steps[::-1])


def mistaken(task: Task, x: int, rng: random.Random) -> str:
    """Another step in place of one of the steps."""
    steps = list(task.steps)
    place = rng.randrange(len(steps))
    steps[place] = rng.choice([step for step in STEPS if step != steps[place]])
    return nest(tuple(steps))


def constant(task: Task, x: int, rng: random.Random) -> str:
    """What the example shows, for every x."""
    return str(task.value(x))


def unfinished(task: Task, x: int, rng: random.Random) -> str:
    """Does not parse."""
    text = task.expression()
    return text.replace(")", "", 1) if ")" in text else text[:-1].strip()


def raising(task: Task, x: int, rng: random.Random) -> str:
    """Has a name that is nothing."""
    return task.expression().replace("x", "y", 1) if rng.random() < 0.5 else "f(x)"


def printing(task: Task, x: int, rng: random.Random) -> str:
    """Prints what it should give."""
    return f"print({task.value(x) if rng.random() < 0.5 else task.expression()})"


def leaving(task: Task, x: int, rng: random.Random) -> str:
    """Ends the program."""
    return "exit(0)"


# (share of the demonstrations, how they are written)
LABELLERS = ((0.52, right), (0.08, swapped), (0.10, mistaken), (0.14, constant),
             (0.05, unfinished), (0.04, raising), (0.05, printing), (0.02, leaving))
_SHARES = tuple(accumulate(share for share, _ in LABELLERS))
_WRITERS = tuple(writer for _, writer in LABELLERS)


def demonstrations(count: int, seed: int, model: str = "") -> list[dict]:
    """`count` demonstrations {"prompt", "response"} of the training split, fixed by the seed.

    model is not used: functions that make data are all called alike.
    """
    rng = random.Random(f"program demonstrations {seed}")
    records = []
    for _ in range(count):
        task, x, prompt = draw(rng)
        writer = rng.choices(_WRITERS, cum_weights=_SHARES)[0]
        records.append({"prompt": prompt, "response": writer(task, x, rng)})
    return records


def prompts(count: int, seed: int, model: str = "") -> list[dict]:
    """`count` prompts {"prompt"} of the training split."""
    rng = random.Random(f"program prompts {seed}")
    return [{"prompt": draw(rng)[2]} for _ in range(count)]


def held_out_prompts(count: int, seed: int, model: str = "") -> list[dict]:
    """`count` prompts {"prompt"} of pairs of steps that no stage has trained on."""
    rng = random.Random(f"program held-out prompts {seed}")
    return [{"prompt": prompt_of(rng.choice(PAIRS[True]), rng.randrange(len(ORDERS)),
                                 rng.choice(EXAMPLES))} for _ in range(count)]
