"""The machine: what it is, how fast it multiplies and moves numbers, how much memory is used."""

import os
import platform
import re
import statistics
import sys
import time
from functools import partial

import torch

# (a, b, c): a product of (a, b) and (b, c). GPT-2 124M's MLP at the rows of a PPO minibatch, its
# unembedding, and a square product
SHAPES = [(384, 768, 3072), (256, 768, 50257), (2048, 2048, 2048)]


def figure(values: list[float]) -> dict:
    """Example: figure([3, 1, 2]) == {"median": 2, "low": 1, "high": 3, "runs": 3}."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values),
            "runs": len(values)}


def ratio(above: dict, below: dict) -> dict:
    """One figure over another, as wide as theirs allow: 8 (6..9) over 2 (2..3) is 4 (2..4.5)."""
    return {"median": above["median"] / below["median"], "low": above["low"] / below["high"],
            "high": above["high"] / below["low"], "runs": min(above["runs"], below["runs"])}


def timed(function, *arguments) -> tuple:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - started


def describe_machine() -> dict:
    """Names and counts that a reader needs to judge the figures."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):                  # Linux, where the other is just x86_64
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = dict(re.findall(r"(.+?)\s*: (.+)", file.read())).get("model name", cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__}


def speed(runs: int, amount: float, function) -> dict:
    """`amount` per second of a call, `runs` times, after one that is not counted."""
    return figure([amount / timed(function)[1] for _ in range(runs + 1)][1:])


def measure_limits(runs: int, quick: bool) -> dict:
    """Operations per second of large float32 products, bytes per second of two loops over memory.

    The loops go over tensors that no cache holds (256 MB each). Counted is what the program names:
    a copy reads and writes each number, a triad reads two and writes one. `gemm` and `bandwidth`
    are the fastest of each kind.
    """
    products, count = {}, 1 << (18 if quick else 26)
    for shape in SHAPES:
        a, b, c = [size // 16 for size in shape] if quick else shape
        product = partial(torch.mm, torch.randn(a, b), torch.randn(b, c))
        products[f"({a}, {b}) x ({b}, {c})"] = speed(10 * runs, 2 * a * b * c, product)
    # ones, not empty: memory that was never written is one page of zeros, which caches hold
    one, other, target = torch.ones(count), torch.ones(count), torch.ones(count)
    copy, triad = partial(target.copy_, one), partial(torch.add, one, other, alpha=3, out=target)
    memory = {"copy": speed(2 * runs, 8 * count, copy), "triad": speed(2 * runs, 12 * count, triad)}
    return {"products": products, "memory": memory,
            "gemm": max(product["median"] for product in products.values()),
            "bandwidth": max(loop["median"] for loop in memory.values())}


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, bytes; None where no way is known."""
    if sys.platform == "darwin":
        import resource  # Windows has no such module
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not os.path.exists("/proc/self/status"):
        return None
    # careful: ru_maxrss of a new process starts on Linux with the memory of its parent
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) * 1024
