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
# unembedding, and a square product, large enough for the device to show what it can do
SHAPES = [(384, 768, 3072), (256, 768, 50257)]
SQUARE = {"cpu": (2048, 2048, 2048), "mps": (4096, 4096, 4096), "cuda": (8192, 8192, 8192)}


def figure(values: list[float]) -> dict:
    """Example: figure([3, 1, 2]) == {"median": 2, "low": 1, "high": 3, "runs": 3}."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values),
            "runs": len(values)}


def ratio(above: dict, below: dict) -> dict:
    """One figure over another, as wide as theirs allow: 8 (6..9) over 2 (2..3) is 4 (2..4.5)."""
    return {"median": above["median"] / below["median"], "low": above["low"] / below["high"],
            "high": above["high"] / below["low"], "runs": min(above["runs"], below["runs"])}


def timed(function, *arguments) -> tuple:
    """What a call returns, and its seconds, up to the end of what it started on a GPU."""
    finish_on_the_device()
    started = time.perf_counter()
    result = function(*arguments)
    finish_on_the_device()
    return result, time.perf_counter() - started


def finish_on_the_device() -> None:
    """Wait for a GPU that this process uses."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def describe_machine(device: str) -> dict:
    """Names and counts that a reader needs to judge the figures."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):                  # Linux, where the other is just x86_64
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            cpu = dict(re.findall(r"(.+?)\s*: (.+)", file.read())).get("model name", cpu)
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {**gpu, "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "system": platform.system(), "python": platform.python_version(),
            "torch": torch.__version__}


def speed(runs: int, amount: float, function) -> dict:
    """`amount` per second of a call, `runs` times, after one that is not counted."""
    return figure([amount / timed(function)[1] for _ in range(runs + 1)][1:])


def measure_limits(runs: int, quick: bool, device: str) -> dict:
    """Operations per second of large products, bytes per second of two loops over memory.

    The loops go over tensors that no cache holds (256 MB each). Counted is what the program names:
    a copy reads and writes each number, a triad reads two and writes one. `gemm`, by type, and
    `bandwidth` are the fastest of each kind.
    """
    products, gemm, count = {}, {}, 1 << (18 if quick else 26)
    for dtype in ("float32", "bfloat16"):
        for shape in [*SHAPES, SQUARE[device]]:
            a, b, c = [size // 16 for size in shape] if quick else shape
            matrices = [torch.randn(sizes).to(device, getattr(torch, dtype))
                        for sizes in ((a, b), (b, c))]
            rate = speed(10 * runs, 2 * a * b * c, partial(torch.mm, *matrices))
            products[f"{dtype}, ({a}, {b}) x ({b}, {c})"] = rate
            gemm[dtype] = max(gemm.get(dtype, 0), rate["median"])
    # ones, not empty: memory that was never written is one page of zeros, which caches hold
    one, other, target = [torch.ones(count, device=device) for _ in range(3)]
    copy, triad = partial(target.copy_, one), partial(torch.add, one, other, alpha=3, out=target)
    memory = {"copy": speed(2 * runs, 8 * count, copy), "triad": speed(2 * runs, 12 * count, triad)}
    return {"products": products, "memory": memory, "gemm": gemm,
            "bandwidth": max(loop["median"] for loop in memory.values())}


def peak_memory() -> int | None:
    """Largest memory of this process so far, bytes; None where no way is known.

    On a GPU that of the tensors on it, else all that is resident.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "darwin":
        import resource  # Windows has no such module
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not os.path.exists("/proc/self/status"):
        return None
    # careful: ru_maxrss of a new process starts on Linux with the memory of its parent
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(r"VmHWM:\s+(\d+) kB", file.read())[1]) * 1024
