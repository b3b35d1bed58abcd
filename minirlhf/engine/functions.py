"""Functions of users: named `module:function` on a command line, checked and called in one place.

A score function (`--reward`, `--gold`, `--judge`) is called as

    scores = function(ids, prompt_lengths, lengths, tokenizer)    # (B, T), (B,), (B,) -> (B,)

(PPO's reward may also pay per token: column t of (B, T-1) is for the action ids[t+1]), and
a record function (`--data`, `--prompts`) as `function(count=..., seed=..., model=...)`. What goes
wrong in it is told in one sentence with the user's own file and line.
"""

import hashlib
import importlib
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator

import torch

from minirlhf.engine.options import check, out_of_memory, under_debugger
from minirlhf.files.disk import short
from minirlhf.files.formats import read_ours


def load_function(spec: str) -> Callable:
    """The function that "module:function" names, such as "minirlhf.world:demonstrations".

    Raises: ValueError saying what is not there, or how such a name is written.
    """
    module_name, _, function_name = spec.partition(":")
    hint = ""
    if re.fullmatch(r"[\w/\\]+(\.py)?", module_name) and not module_name.isidentifier():
        dotted = re.sub(r"[/\\]", ".", module_name.removesuffix(".py"))
        hint = f"; write {dotted}:{function_name or 'function'}, the name of the module"
    named = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", spec) and not hint
    check(bool(named), f"expected a file that exists or module:function, found {spec!r}{hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not (module_name + ".").startswith(f"{error.name}."):
            raise                       # the module is there; something that it imports is not
        raise ValueError(f"{spec}: expected a module that Python finds, found none named "
                         f"{error.name!r}; start in its folder, by python -m") from None
    function = getattr(module, function_name, None)
    check(callable(function), f"{spec}: module {module_name} has no function {function_name}")
    return function


def check_signature(name: str, function: Callable, *arguments: str, **keywords: str) -> None:
    """Refuse a function that cannot be called with these arguments, before anything is computed."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return                                           # some built-in functions have none
    try:
        signature.bind(*arguments, **keywords)
    except TypeError as error:
        raise ValueError(f"{name}: expected a function of ({', '.join([*arguments, *keywords])}), "
                         f"found {signature}: {error}") from None


def call(name: str, function: Callable, *arguments, **keywords):
    """Call a user's function; an error in it becomes one sentence with the user's file and line.

    Our own functions raise sentences already, and so does whoever is short of memory.
    """
    try:
        return function(*arguments, **keywords)
    except Exception as error:           # a boundary: here a user's code may raise anything
        ours = (getattr(function, "__module__", None) or "").startswith("minirlhf.")
        if ours or under_debugger() or out_of_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        own_file = getattr(getattr(function, "__code__", None), "co_filename", frames[-1].filename)
        place = [frame for frame in frames if frame.filename == own_file] or frames
        raise ValueError(f"{name} failed: {type(error).__name__}: {error} "
                         f"({place[-1].filename}, line {place[-1].lineno})") from error


def source_of(function: Callable) -> str:
    """SHA-256 of the file in which a function is defined: a run that goes on needs the same one."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        path = None                                      # a built-in, or an object that is callable
    if path is None or not os.path.isfile(path):
        return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


class ScoreFunction:
    """A user's function of ids, prompt_lengths, lengths and tokenizer that returns scores (B,).

    It is given copies, so that what it changes is its own, and must return a tensor with one number
    for each row, or, if `per_token` allows it, for each action, (B, T-1), of which those outside
    the response do not count. That becomes float32 on the device of `ids`.
    """

    def __init__(self, option: str, spec: str, per_token: bool = False):
        self.name, self.function = f"{option} {spec}", load_function(spec)
        self.per_token = per_token
        check_signature(self.name, self.function, "ids", "prompt_lengths", "lengths", "tokenizer")
        self.source = source_of(self.function)

    def __call__(self, ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                 tokenizer) -> torch.Tensor:
        """ids (B, T), prompt_lengths (B,), lengths (B,) -> scores (B,), or (B, T-1)."""
        scores = call(self.name, self.function, ids.clone(), prompt_lengths.clone(),
                      lengths.clone(), tokenizer)
        shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
        each = f", or {tuple(ids[:, 1:].shape)}: one per token" if self.per_token else ""
        # careful: scores of shape (B, 1) would broadcast to (B, B) later
        fits = shape == (len(ids),) or (self.per_token and shape == ids[:, 1:].shape)
        check(fits and not scores.is_complex(), f"{self.name} returned {shape}, expected a tensor "
              f"of shape {(len(ids),)}: one score per response{each}")
        return scores.detach().float().to(ids.device)    # (B,) or (B, T-1)

    def try_once(self, prompt: list[int], tokenizer, device: str = "cpu") -> None:
        """Call the function on a prompt with an empty response, before anything is computed."""
        ids = torch.tensor([prompt + [tokenizer.end_token]], device=device)         # (1, T)
        length = torch.tensor([ids.shape[1]], device=device)                        # (1,)
        self(ids, length - 1, length, tokenizer)


def ask_for_records(source: str, count: int, seed: int, model: str,
                    format_prompt: Callable[[str], str]) -> Iterator[tuple[str, dict]]:
    """Yield (place, record) for the records that the function "module:function" returns.

    It is called with count, seed and model and returns a list of records of our format; their plain
    prompts are put into `format_prompt`.
    """
    check(count > 0, f"{source}: a function is asked for a number of records; 0, which means "
          "all, is for files only")
    function = load_function(source)
    check_signature(source, function, count="", seed="", model="")
    rows = call(source, function, count=count, seed=seed, model=model)
    check(isinstance(rows, list), f"{source}: expected a list of records, found {short(rows)}")
    for number, row in enumerate(rows, start=1):
        place = f"{source}: record {number}"
        check(isinstance(row, dict), f"{place}: expected a dict, found {short(row)}")
        record = read_ours(row, place)
        yield place, {**record, "prompt": format_prompt(record["prompt"])}
