"""The machine: what it is, how fast it multiplies and moves numbers, how much memory is used."""

import concurrent.futures
import multiprocessing
import os
import platform
import statistics
import sys
import time

import torch

from minirlhf.gpt2 import product


# ---- figures -------------------------------------------------------------------------------------

def figure(values: list[float]) -> dict:
    """Repeated measurements as median with spread.

    Example: 3, 1, 2 give {"median": 2, "low": 1, "high": 3, "runs": 3}.
    """
    return {"median": statistics.median(values), "low": min(values), "high": max(values),
            "runs": len(values)}


def ratio(above: dict, below: dict) -> dict:
    """One figure over another of the same run; the spread is the widest that theirs allow.

    Example: 8 (6..9) over 2 (2..3) is 4 (2..4.5).
    """
    return {"median": above["median"] / below["median"], "low": above["low"] / below["high"],
            "high": above["high"] / below["low"], "runs": min(above["runs"], below["runs"])}


def scaled(found: dict, factor: float) -> dict:
    """A figure in another unit."""
    numbers = {name: found[name] * factor for name in ("median", "low", "high")}
    return {**numbers, "runs": found["runs"]}


def rate(amount: float, seconds: dict) -> dict:
    """`amount` a second, from a figure of seconds: the longest time is the lowest rate."""
    return {"median": amount / seconds["median"], "low": amount / seconds["high"],
            "high": amount / seconds["low"], "runs": seconds["runs"]}


def seconds_of(function, *arguments) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


def repeat(runs: int, function, *arguments) -> list[float]:
    """Seconds of `runs` calls, after one that is not counted."""
    function(*arguments)
    return [seconds_of(function, *arguments) for _ in range(runs)]


# ---- what the machine is -------------------------------------------------------------------------

def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    except OSError:                                      # not Linux
        pass
    return platform.processor() or platform.machine()


def describe_machine() -> dict:
    """Names and counts that a reader needs to judge the figures."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__}


# ---- the two limits ------------------------------------------------------------------------------

# (a, b, c): a product of (a, b) and (b, c). Forward and backward of GPT-2 124M's MLP at the rows
# of a PPO minibatch, the same with more rows, its unembedding, and a square product
SHAPES = [(384, 768, 3072), (768, 384, 3072), (1024, 768, 3072), (256, 768, 50257),
          (2048, 2048, 2048)]


def multiply(left: torch.Tensor, right: torch.Tensor, times: int) -> None:
    """The same product several times."""
    for _ in range(times):
        torch.mm(left, right)


def measure_products(runs: int, quick: bool) -> dict:
    """Operations a second of torch.mm on large float32 matrices, for each of SHAPES."""
    found = {}
    for a, b, c in SHAPES:
        if quick:
            a, b, c = a // 16, b // 16, c // 16
        operations = 2 * a * b * c
        times = max(1, int((1e7 if quick else 2e10) / operations))
        seconds = figure(repeat(runs, multiply, torch.randn(a, b), torch.randn(b, c), times))
        found[f"({a}, {b}) x ({b}, {c})"] = rate(operations * times, seconds)
    return found


def multiply_by_ours(left: torch.Tensor, right: torch.Tensor, times: int) -> None:
    """The same product several times, by the function that our networks use without gradients."""
    with torch.no_grad():
        for _ in range(times):
            product(left, right.T, None)


def measure_our_product(runs: int, quick: bool) -> dict:
    """Operations a second of a large product by `gpt2.product`, for comparison with torch.mm."""
    a, b, c, times = (64, 48, 192, 1) if quick else (1024, 768, 3072, 4)
    seconds = figure(repeat(runs, multiply_by_ours, torch.randn(a, b), torch.randn(b, c), times))
    return {f"({a}, {b}) x ({b}, {c})": rate(2 * a * b * c * times, seconds)}


def copy(source: torch.Tensor, _: torch.Tensor, target: torch.Tensor) -> None:
    """target = source."""
    target.copy_(source)


def triad(source: torch.Tensor, other: torch.Tensor, target: torch.Tensor) -> None:
    """target = source + 3 * other."""
    torch.add(source, other, alpha=3, out=target)


def measure_bandwidth(runs: int, quick: bool) -> dict:
    """Bytes a second of two loops over tensors that no cache holds (256 MB each).

    Counted is what the program names: a copy reads and writes each number, a triad reads two and
    writes one. That a processor may read a line before it is overwritten is not counted.
    """
    count = 1 << (18 if quick else 26)
    # ones, not empty: memory that was never written is one page of zeros, which caches hold
    source, other, target = torch.ones(count), torch.ones(count), torch.ones(count)
    found = {}
    for name, loop, tensors in (("copy", copy, 2), ("triad", triad, 3)):
        seconds = figure(repeat(2 * runs, loop, source, other, target))
        found[name] = rate(4 * count * tensors, seconds)
    return found


def fastest(figures: dict) -> dict:
    """The figure with the highest median."""
    return max(figures.values(), key=median)


def median(found: dict) -> float:
    """The middle of a figure."""
    return found["median"]


# ---- memory --------------------------------------------------------------------------------------

def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where no way is known."""
    try:
        # careful: ru_maxrss of a new process starts on Linux with the memory of its parent
        with open("/proc/self/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "darwin":
        import resource                                  # Windows has no such module
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def in_new_process(function, *arguments):
    """What `function` returns in a process of its own, which inherits nothing of this one's."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()
