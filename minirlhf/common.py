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
    """Check `low <= config.name <= high`; the error names field, value and range."""
    value = getattr(config, name)
    ok = not math.isnan(value) and low <= value <= high
    check(ok, f"--{name} is {value}, expected a value from {low} to {high}")


def check_choice(config, name: str, choices: tuple) -> None:
    """Check that `config.name` is one of `choices`."""
    value = getattr(config, name)
    check(value in choices, f"--{name} is {value!r}, expected one of {', '.join(choices)}")


def field_comments(config_class) -> dict[str, str]:
    """The trailing comment of each field of a config dataclass: it is the option's help text."""
    found = re.findall(r"^    (\w+): [^#\n]*#[ ]*(.*)$", inspect.getsource(config_class), re.M)
    return dict(found)


def parse_config(config_class, arguments: list[str] | None = None):
    """Build a frozen config from the command line: `--name value`, `--flag` and `--no-flag`.

    The options are the dataclass's fields and their help is the fields' comments, so that each
    fact about an option is written once. `__post_init__` of the config checks the values.
    """
    summary = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    comments = field_comments(config_class)
    for field in dataclasses.fields(config_class):
        text = comments.get(field.name, "").replace("%", "%%") + f" (default: {field.default!r})"
        if isinstance(field.default, bool):
            action = argparse.BooleanOptionalAction
            parser.add_argument(f"--{field.name}", action=action, default=field.default, help=text)
        else:
            kind = type(field.default)
            parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    return config_class(**vars(parser.parse_args(arguments)))


def run(main, config_class) -> None:
    """Entry of every command: parse, run `main(config)`, turn expected errors into one sentence.

    Exit code 2 for bad input (one line on stderr, no traceback), 130 for Ctrl-C. Under a debugger
    the exception is left alone, so that its locals can be looked at.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")         # a console without UTF-8 must not stop a run
    try:
        main(parse_config(config_class))
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.gettrace() is not None:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        raise SystemExit(130) from None


# ---- randomness --------------------------------------------------------------------------------

def random_stream(seed: int, *counters: int) -> torch.Generator:
    """A generator that depends on `seed` and `counters` (epoch, iteration, ...) and nothing else.

    Every random choice of a trainer comes from a stream named by its place in the run. So a run
    can be taken up at any iteration without a saved random state.
    """
    mixed = seed % (1 << 62)
    for counter in counters:
        mixed = (mixed * 6364136223846793005 + counter + 1442695040888963407) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def shuffled_batches(lengths: list[int], batch_size: int,
                     generator: torch.Generator) -> list[list[int]]:
    """Row indices in random batches of rows of similar length, so that little of them is padding.

    Rows are shuffled, sorted by length within groups of eight batches, cut into batches, and the
    batches are shuffled. Every index occurs exactly once; only the last batch may be smaller.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    group, batches = 8 * batch_size, []
    for first in range(0, len(order), group):
        rows = sorted(order[first:first + group], key=lengths.__getitem__)
        batches += [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


# ---- masked statistics --------------------------------------------------------------------------

def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `x` where `mask` is 1: a 0-dimensional tensor.

    Example: masked_mean([1., 3., 9.], [1, 1, 0]) == 2.
    """
    mask = mask.to(x.dtype)
    # careful: a product alone would let inf or nan at masked entries through
    kept = torch.where(mask > 0, x, torch.zeros_like(x))
    return kept.sum() / mask.sum()


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

    Example: total 10, warm-up 2, linear: steps 0, 1, 2, 6 give 0.5, 1.0, 1.0, 0.5 times the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)        # 0 .. 1
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Stop with `FloatingPointError` at the first non-finite value, naming tensor, place and row."""
    if torch.isfinite(tensor).all():
        return
    bad = (~torch.isfinite(tensor)).nonzero()[0].tolist()
    raise FloatingPointError(f"{name} is not finite at {where}, index {bad}; lower the learning "
                             "rate and start again from the stage's input checkpoint")


# ---- metrics ------------------------------------------------------------------------------------

class MetricsFile:
    """`metrics.csv` of a run: one row a step, written and flushed as it happens."""

    def __init__(self, folder: str, fields: list[str]):
        os.makedirs(folder, exist_ok=True)
        self.path = os.path.join(folder, "metrics.csv")
        self.fields = fields
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(fields)

    def write(self, row: dict) -> None:
        """Append one row; the keys must be exactly the fields."""
        assert list(row) == self.fields, (list(row), self.fields)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([format_number(value) for value in row.values()])


def format_number(value) -> str:
    """Seven significant digits for a float, everything else as it is."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def read_metrics(folder: str) -> list[dict[str, float]]:
    """The rows of a run's `metrics.csv` as numbers; empty fields are left out."""
    with open(os.path.join(folder, "metrics.csv"), newline="", encoding="utf-8") as file:
        return [{key: float(text) for key, text in row.items() if text}
                for row in csv.DictReader(file)]
