"""What all trainers share: command line, errors, seeds, masked statistics, learning rate, metrics.

Imports nothing of ours. The parts that belong to one stage (its loop, its optimiser line, its
evaluation) are repeated in that stage on purpose; only what must not drift apart lives here.
"""

import argparse
import csv
import dataclasses
import inspect
import math
import os
import re
import sys

import torch


# ---- configuration and command line ----------------------------------------------------------

def check(condition: bool, message: str) -> None:
    """Raise `ValueError(message)` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def check_range(config, name: str, low: float, high: float) -> None:
    """Check `low <= config.name <= high`, which nan fails; the error names all four."""
    value = getattr(config, name)
    check(low <= value <= high, f"--{name} is {value}, expected a value from {low} to {high}")


def check_output(out: str, *inputs: str) -> None:
    """Refuse an output folder that a stage also reads: a stopped run would have spoiled it."""
    check(bool(out.strip()), "--out is empty, expected the name of a folder")
    for folder in inputs:
        same = os.path.realpath(out) == os.path.realpath(folder)
        check(not same, f"--out {out} is the folder that this stage starts from; name another one")


def check_choice(config, name: str, choices: tuple) -> None:
    """Check that `config.name` is one of `choices`."""
    value = getattr(config, name)
    check(value in choices, f"--{name} is {value!r}, expected one of {', '.join(choices)}")


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
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False,
                                     usage="%(prog)s [--option value ...]   (--help lists them)")
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        kind = type(field.default)
        parsed = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        option = parser.add_argument(f"--{field.name}", default=field.default, **parsed)
        # set afterwards: some versions of argparse append the default of a flag, others do not
        text = f"{comments.get(field.name, '')} (default: {field.default!r})"
        option.help = text.replace("%", "%%")
    return config_class(**vars(parser.parse_args(arguments)))


def under_debugger() -> bool:
    """Whether somebody steps through this process; new debuggers leave no trace function."""
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
    """Whether memory is what is missing; PyTorch says so by a RuntimeError."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def describe(error: BaseException) -> str:
    """An expected error as one sentence, without Python's error numbers and brackets."""
    if out_of_memory(error):
        return "out of memory; make the batch, the context or the model smaller"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop, and its state was saved; `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


def run(main, config_class) -> None:
    """Entry of every command: parse, run `main(config)`, turn expected errors into one sentence.

    Exit code 2 for bad input (one line on stderr, no traceback), 130 for Ctrl-C, 143 for SIGTERM.
    Under a debugger the exception is left alone, so that its locals can be looked at.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")     # a console without UTF-8 must not stop a run
    try:
        main(parse_config(config_class))
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        unexpected = isinstance(error, RuntimeError) and not out_of_memory(error)
        if unexpected or under_debugger():
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        if under_debugger():
            raise
        print(str(error) or "stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(128 + getattr(error, "signal", 2)) from None


# ---- randomness --------------------------------------------------------------------------------

def random_stream(seed: int, *counters: int) -> torch.Generator:
    """A generator that depends on `seed` and `counters` (epoch, iteration, ...) and nothing else.

    Every random choice of a trainer comes from a stream named by its place in the run. So a run
    can be taken up at any iteration without a saved random state. Seeds that differ by a multiple
    of 2**32 give the same streams: PyTorch's CPU generator uses no more bits.

    Example: torch.rand(1, generator=random_stream(0, 1, 2)) is the same number in every run.
    """
    mixed = seed % (1 << 62)
    for counter in counters:
        mixed = (mixed * 6364136223846793005 + counter + 1442695040888963407) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def batch_order(total: int, batch_size: int, seed: int, step: int) -> torch.Tensor:
    """Row numbers (B,) of the batch at `step`: every row once in each epoch, in shuffled order.

    The last batch of an epoch is smaller when `batch_size` does not divide `total`.
    Example: 10 rows in batches of 4: steps 0, 1, 2 have 4, 4 and 2 rows; step 3 begins epoch 1.
    """
    epoch, position = divmod(step, math.ceil(total / batch_size))
    order = torch.randperm(total, generator=random_stream(seed, 0, epoch))          # (total,)
    return order[position * batch_size:(position + 1) * batch_size]


# ---- masked statistics --------------------------------------------------------------------------

def masked_mean(x: torch.Tensor, mask: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Mean of `x` where `mask` is 1, over the whole tensor: a 0-dimensional tensor.

    With `count` the sum is divided by that: when `x` is a part of a step (of several that are
    computed one after another, or by several processes) and `count` the number of entries in the
    whole step, the parts' means add up to the mean of the step. An empty mask gives nan, which
    `check_finite` stops.

    Example: masked_mean([1., 3., 9.], [1, 1, 0]) == 2, with count 4 it is 1.
    """
    # careful: a product with the mask would let inf or nan at masked entries through
    kept = torch.where(mask > 0, x, torch.zeros_like(x))
    return kept.sum() / ((mask > 0).sum() if count is None else count)


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale `x` to mean 0 and standard deviation 1 over `mask`; 0 elsewhere.

    The variance is the biased one, as in Ziegler et al. 2019. A single entry, or entries that are
    all equal, become 0 (the 1e-8 keeps the division finite).

    Example: whiten([1., 3., 9.], [1, 1, 0]) == [-1., 1., 0.].
    Source: openai/lm-human-preferences, lm_human_preferences/utils/core.py, whiten.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask > 0, (x - mean) * torch.rsqrt(variance + 1e-8), torch.zeros_like(x))


# ---- optimisation -------------------------------------------------------------------------------

def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int,
                  schedule: str) -> float:
    """Learning rate at `step` (from 0): linear warm-up to `peak`, then `schedule` down to 0.

    `schedule` is constant, linear or cosine. The rate would be 0 at step `total_steps`, the first
    that is not made.

    Example: total 10, warm-up 2, linear: steps 0, 1, 2, 6 give 0.5, 1.0, 1.0, 0.5 times the peak.
    """
    check(schedule in ("constant", "linear", "cosine"), f"the learning-rate schedule is "
          f"{schedule!r}, expected constant, linear or cosine")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))     # 0 .. 1
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def check_finite(name: str, tensor: torch.Tensor, where: str,
                 rows: torch.Tensor | None = None) -> None:
    """Stop with `FloatingPointError` at the first value that is nan or inf, naming what and where.

    `rows` are the numbers in the batch of the tensor's rows, when it holds a part of them.
    Example: check_finite("scores", tensor([0., nan]), "iteration 3") says "scores is not finite
    at iteration 3, index [1]: nan; ...".
    """
    if torch.isfinite(tensor).all():
        return
    index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
    value = tensor[tuple(index)].item()
    if rows is not None:
        index[0] = int(rows[index[0]])
    place = f", index {index}" if index else ""
    raise FloatingPointError(f"{name} is not finite at {where}{place}: {value}; look at the "
                             "data and the reward, or lower the learning rate, and start again")


def clip_gradients(networks: torch.nn.Module, max_norm: float, where: str) -> float:
    """Scale the gradients of all parameters so that their joint norm is at most `max_norm`.

    Returns the norm before. Raises: `FloatingPointError` naming the first gradient that is not
    finite.
    """
    try:
        norm = torch.nn.utils.clip_grad_norm_(networks.parameters(), max_norm,
                                              error_if_nonfinite=True)
    except RuntimeError:
        for name, parameter in networks.named_parameters():
            if parameter.grad is not None:
                check_finite(f"gradient of {name}", parameter.grad, where)
        raise FloatingPointError(f"gradient norm overflows at {where}; lower the learning "
                                 "rate") from None
    return norm.item()


# ---- metrics ------------------------------------------------------------------------------------

class PartFile:
    """A text file that grows during a run, called <name>.part until the run is finished.

    So a run that was stopped does not leave its metrics beside the weights of an earlier one.
    `keep` is how many bytes of an interrupted run's file are gone on with; what came after them
    was written after the run's last checkpoint, and is written again.
    """

    def __init__(self, folder: str, name: str, keep: int = 0):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, name + ".part")
        if keep == 0:
            open(self.path, "wb").close()
            return
        found = os.path.getsize(self.path) if os.path.exists(self.path) else 0
        check(found >= keep, f"{self.path} has {found} bytes, at the last checkpoint it had "
              f"{keep}: it was changed since; put it back, or start over in another folder")
        with open(self.path, "rb+") as file:
            file.truncate(keep)

    def append(self, text: str) -> None:
        """Append `text`; it is in the file when this returns."""
        try:
            with open(self.path, "ab") as file:
                file.write(text.encode("utf-8"))
        except OSError as error:
            raise self.not_written(error) from None

    def sync(self) -> int:
        """Wait until the disk has all of it; returns the file's size in bytes."""
        try:
            with open(self.path, "rb+") as file:
                os.fsync(file.fileno())
                return os.fstat(file.fileno()).st_size
        except OSError as error:
            raise self.not_written(error) from None

    def not_written(self, error: OSError) -> OSError:
        """The error as a sentence that names the file."""
        return OSError(error.errno, f"{self.path} could not be written ({error.strerror}): free "
                       "some space, then go on from the last checkpoint")

    def finish(self) -> None:
        """Give the file its name; nothing is written after it."""
        os.replace(self.path, self.path.removesuffix(".part"))


class MetricsFile(PartFile):
    """`metrics.csv` of a run: one row a step, on disk as soon as it is written.

    Example: file = MetricsFile(folder, ["step", "loss"]); file.write({"step": 1, "loss": 0.5}).
    """

    def __init__(self, folder: str, fields: list[str], keep: int = 0):
        super().__init__(folder, "metrics.csv", keep)
        self.fields = fields
        if keep == 0:
            self.append(",".join(fields) + "\n")

    def write(self, row: dict) -> None:
        """Append one row; the keys must be exactly the fields, a value "" is an empty cell."""
        assert list(row) == self.fields, (list(row), self.fields)
        self.append(",".join(format_number(value) for value in row.values()) + "\n")


def format_number(value) -> str:
    """Seven significant digits for a float, everything else as it is."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def read_metrics(folder: str) -> list[dict[str, float]]:
    """The rows of a run's `metrics.csv` as numbers; empty cells are left out."""
    with open(os.path.join(folder, "metrics.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{key: float(text) for key, text in row.items() if text} for row in rows]
    except (TypeError, ValueError):
        raise ValueError(f"{os.path.join(folder, 'metrics.csv')}: expected a number in every cell, "
                         "under the names of the first line") from None
