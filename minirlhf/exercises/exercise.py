"""What an exercise is: a function to write, or a question to answer.

The solution of a function is real code, most often the project's own. The stub that a student gets
is made from it by dropping the body, so that nothing is written twice.
"""

import ast
import inspect
import random
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from minirlhf.data import response_mask


@dataclass(frozen=True)
class Code:
    """A function to write."""
    solution: Callable                  # its docstring is the task, its name the exercise's
    lecture: int
    minutes: int
    difficulty: str                     # easy, medium, hard
    task: str                           # one line
    example: tuple                      # the arguments of the docstring's example
    result: object                      # what they give: a number, a tensor, a tuple of them
    case: Callable                      # random.Random -> arguments
    slow: Callable                      # the same function in plain loops, to compare with
    mistakes: tuple                     # (wrong function, what is wrong in it, in words) each
    hint: str
    why: str                            # the reasoning for the solution
    gradient_of: tuple = ()             # positions of the arguments that a loss is a function of

    @property
    def name(self) -> str:
        """The name of the exercise and of the function to write."""
        return self.solution.__name__


@dataclass(frozen=True)
class Question:
    """A question with a number as its answer, or with one of the words in `choices`."""
    name: str
    lecture: int
    minutes: int
    difficulty: str
    task: str                           # one line
    text: str | Callable                # the question, or () -> the question
    answer: Callable                    # () -> the right number or word, computed where it can be
    hint: str
    why: str
    tolerance: float = 0.0              # how far a number may be off, a share of the right one
    choices: tuple = ()                 # words, for a question that is answered with a word
    slips: tuple = ()                   # (wrong number, what is wrong in it, in words) each


# ---- source --------------------------------------------------------------------------------------

def source_parts(function: Callable) -> tuple[str, str]:
    """The source of a function in two parts: signature with docstring, and body."""
    lines = textwrap.dedent(inspect.getsource(function)).rstrip().split("\n")
    (definition,) = ast.parse("\n".join(lines)).body
    docstring = definition.body[0].end_lineno
    return "\n".join(lines[:docstring]), "\n".join(lines[docstring:])


def names_in(text: str) -> set[str]:
    """The names that a piece of code reads."""
    return {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}


def imports_for(function: Callable) -> str:
    """The import lines that the function's signature and body need, sorted as ruff sorts them."""
    plain, ours = [], []
    for name in names_in("\n".join(source_parts(function))):
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType):
            same = value.__name__ == name
            line = f"import {name}" if same else f"import {value.__name__} as {name}"
            if value.__name__.startswith("minirlhf."):
                line = f"from {value.__name__.rpartition('.')[0]} import {name}"
            (ours if "minirlhf" in line else plain).append(line)
        elif value is not None:
            ours.append(f"from {value.__module__} import {name}")
    standard = sorted(line for line in plain if line.split()[1] in ("json", "math", "struct"))
    others = sorted(set(plain) - set(standard))
    return "\n\n".join("\n".join(part) for part in (standard, others, sorted(ours)) if part)


def stub(exercise: Code) -> str:
    """The file that a student gets: all of the solution but its body."""
    name = exercise.name
    command = "    python -m minirlhf.exercises"
    head = (f'"""Exercise {name}: {exercise.task}\n\n'
            f"Lecture {exercise.lecture}, {exercise.minutes} minutes, {exercise.difficulty}. "
            f"Write the body of the function, then run\n\n{command} --check {name}\n\n"
            f"A hint, and at the end a solution with the reasoning:\n\n{command} --hint {name}\n"
            f'{command} --solution {name}\n"""\n\n')
    return (f"{head}{imports_for(exercise.solution)}\n\n\n{source_parts(exercise.solution)[0]}\n"
            "    raise NotImplementedError       # put your lines here\n")


def folded(text: str) -> str:
    """Text in lines of at most 100 columns."""
    return textwrap.fill(text, 100, break_on_hyphens=False)


def solution_text(exercise: Code) -> str:
    """The solution with the place where it stands, and the reasoning."""
    function = exercise.solution
    place = f"{function.__module__.replace('.', '/')}.py"
    head = source_parts(function)[0].split('"""')[0].rstrip()
    return f"{place}\n\n{head}\n{source_parts(function)[1]}\n\n{folded(exercise.why)}"


# ---- arguments of random cases -------------------------------------------------------------------

def draw(rng: random.Random, *shape: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers of that shape, float64."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return scale * torch.randn(*shape, dtype=torch.float64, generator=generator)


def draw_lengths(rng: random.Random, B: int = 3, T: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of prompts and of whole rows, (B,) each; responses have at least two tokens."""
    prompts = [rng.randint(1, T - 3) for _ in range(B)]
    lengths = [rng.randint(prompt + 2, T - 1) for prompt in prompts]
    return torch.tensor(prompts), torch.tensor(lengths)


def draw_mask(rng: random.Random, B: int = 3, T: int = 7) -> torch.Tensor:
    """A response mask (B, T-1) with prompt before and padding after each response."""
    prompts, lengths = draw_lengths(rng, B, T)
    return response_mask(prompts, lengths, T)


def tensor(*values) -> torch.Tensor:
    """float64, for examples: tensor(1, 2) is (2,), tensor([1, 2]) is (1, 2)."""
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape: int) -> torch.Tensor:
    """A mask in which everything counts."""
    return torch.ones(*shape, dtype=torch.bool)
