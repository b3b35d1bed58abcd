"""Measure minirlhf on this machine: beside a naive baseline, and against the machine's limits.

    python -m minirlhf.benchmark            # about a quarter of an hour, 8 GB of memory
    python -m minirlhf.benchmark --quick    # tiny networks: to see that it runs

Out: tables on the terminal and as Markdown beside the JSON file with all figures.

What is measured, all in one run; ratios are between figures of this run:
 1. The limits: the rate of large matrix products and the memory bandwidth (machine.py).
 2. Peak memory of a PPO iteration, in a new process.
 3. A PPO iteration of the 124M shape with random weights, beside the naive baseline (naive.py) and,
    where it is installed, transformers' `generate`. They take turns, so that a machine that becomes
    slower does so for all.
 4. Each phase's share of its limit, by the arithmetic of arithmetic.py.
 5. Generation: tokens a second of prompts (prefill) and of new tokens (decode).
 6. How the time of an iteration grows with batch, response length and model.
 7. The embedded pipeline: how much of its time is spent outside tensor operations (overhead.py).
The limits are measured at the beginning and at the end; the fastest counts.
"""

import os
import time
from dataclasses import dataclass

import torch

from minirlhf.benchmark import machine, overhead, speed
from minirlhf.benchmark.report import markdown
from minirlhf.benchmark.setting import FULL, QUARTER, TINY, TOY, Setting
from minirlhf.common import check, check_range, run
from minirlhf.gpt2 import GPT2
from minirlhf.weights import write_atomically, write_json


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of `python -m minirlhf.benchmark`."""
    runs: int = 3                       # measurements of everything of ours; tables show medians
    naive_runs: int = 2                 # iterations of the naive baseline, minutes each; 0: none
    growth: bool = True                 # measure how time grows, too: about half of the time
    threads: int = 0                    # threads of PyTorch; 0: as many as it takes by itself
    quick: bool = False                 # tiny networks and counts: for a smoke test
    out: str = "checkpoints/benchmark.json"    # file for all figures; the tables go beside it
    seed: int = 0                       # of weights, prompts and samples

    def __post_init__(self):
        check_range(self, "runs", 1, 1000)
        check_range(self, "naive_runs", 0, 1000)
        check_range(self, "threads", 0, 4096)
        check_range(self, "seed", 0, 10**9)
        check(self.out.endswith(".json"), f"--out is {self.out!r}, expected a name that ends in "
              ".json")


@dataclass(frozen=True)
class Plan:
    """What is measured at which sizes."""
    setting: Setting = Setting()
    critics: tuple = ("shared", "separate")    # of the iterations whose memory is measured
    batches: tuple = (1, 8, 32)         # of generation
    growth_batches: tuple = (1, 2, 4, 8, 16, 32)
    growth_responses: tuple = (8, 32, 128)
    growth_models: tuple = (("tiny, 0.6M", TINY), ("a quarter, 30M", QUARTER), ("124M", FULL))
    pipeline: tuple = (TINY, 64, 32)    # network, prompts and new tokens of the embedded pipeline


QUICK = Plan(setting=Setting(TOY, prompts=2, prompt_tokens=4, new_tokens=4, epochs=2),
             critics=("shared",), batches=(1, 2), growth_batches=(1, 2),
             growth_responses=(2, 4), growth_models=(("toy", TOY),), pipeline=(TOY, 4, 4))


def progress(started: float, text: str) -> None:
    """Say what is measured next."""
    print(f"[{time.perf_counter() - started:5.0f} s] {text}", flush=True)


def measure_limits(runs: int, quick: bool) -> dict:
    """Rates of matrix products and of memory."""
    return {"products": machine.measure_products(runs, quick),
            "product": machine.measure_our_product(runs, quick),
            "memory": machine.measure_bandwidth(runs, quick)}


def fastest_limits(first: dict, last: dict) -> dict:
    """The two measurements in one: of each figure the faster, and the fastest of each kind."""
    found = {kind: {name: max(first[kind][name], last[kind][name], key=machine.median)
                    for name in first[kind]} for kind in first}
    return {**found, "gemm": machine.fastest(found["products"])["median"],
            "bandwidth": machine.fastest(found["memory"])["median"]}


def axes(plan: Plan) -> dict[str, list]:
    """The sizes along which time is measured: name of the field, values with their names."""
    return {"prompts": [(str(value), value) for value in plan.growth_batches],
            "new_tokens": [(str(value), value) for value in plan.growth_responses],
            "config": list(plan.growth_models)}


def describe_setting(setting: Setting) -> dict:
    """The sizes that the tables name."""
    with torch.device("meta"):                           # shapes without numbers
        parameters = sum(p.numel() for p in GPT2(setting.config).parameters())
    return {"parameters": parameters, "prompts": setting.prompts, "epochs": setting.epochs,
            "prompt_tokens": setting.prompt_tokens, "new_tokens": setting.new_tokens}


def main(cfg: BenchmarkConfig) -> dict:
    """Measure everything, write and print the tables; returns what the JSON file holds."""
    plan, started = QUICK if cfg.quick else Plan(), time.perf_counter()
    if cfg.threads > 0:
        torch.set_num_threads(cfg.threads)
    if cfg.quick:
        print("--quick: tiny networks. Everything runs, but the figures say nothing")
    result = {"machine": machine.describe_machine(), "setting": describe_setting(plan.setting)}
    progress(started, "peak memory, in processes of their own")
    result["memory"] = speed.memory(plan.setting, plan.critics)
    progress(started, "the machine's limits")
    first = measure_limits(cfg.runs, cfg.quick)
    progress(started, f"PPO iterations: ours {cfg.runs + 1}, naive baseline {cfg.naive_runs}")
    result["comparison"] = speed.compare(plan.setting, cfg.runs, cfg.naive_runs, cfg.seed)
    progress(started, "generation")
    generation = speed.generation_speed(plan.setting, plan.batches, cfg.runs, cfg.seed)
    result["growth"] = {}
    if cfg.growth:
        progress(started, "how time grows")
        result["growth"] = speed.growth(plan.setting, axes(plan), cfg.runs, cfg.seed)
    progress(started, "the embedded pipeline")
    result["overhead"] = overhead.measure_overhead(cfg.runs, *plan.pipeline)
    progress(started, "the machine's limits again")
    limits = fastest_limits(first, measure_limits(cfg.runs, cfg.quick))
    result["limits"] = limits
    result["speed"] = speed.add_shares(generation, limits["bandwidth"])
    result["shares"] = speed.shares(plan.setting, result["comparison"]["ours"], limits["gemm"],
                                    limits["bandwidth"])
    result["seconds"] = time.perf_counter() - started
    text = markdown(result)
    os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
    write_json(cfg.out, result)
    beside = cfg.out.removesuffix(".json") + ".md"
    write_atomically(beside, text.encode("utf-8"))
    print("\n" + text)
    print(f"{result['seconds']:.0f} s in all. Wrote {cfg.out} and {beside}")
    return result


if __name__ == "__main__":
    run(main, BenchmarkConfig)
