"""Measure minirlhf on this machine: beside a naive baseline, and against the machine's limits.

    python -m minirlhf.benchmark            # about ten minutes, 8 GB of memory
    python -m minirlhf.benchmark --quick    # tiny networks: to see that it runs
    python -m minirlhf.benchmark --device cuda
    python -m minirlhf.benchmark --trl ~/trl/bin/python    # an interpreter that has TRL 1.x

Out: tables on the terminal and as Markdown beside the JSON file with all figures: the rates of
matrix products and of memory, a PPO iteration of the 124M shape with random weights beside the
naive baseline, other critics, precisions and sizes, with share of the limits and peak memory, and,
on a CPU where you have it, TRL's own PPO trainer.
"""

import json
import subprocess
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from minirlhf.benchmark.iterations import PROMPT_TOKENS, decoding, limits, measure
from minirlhf.benchmark.machine import describe_machine, figure, measure_limits
from minirlhf.benchmark.report import markdown
from minirlhf.engine import parallel
from minirlhf.engine.fields import Count, Device, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.files.disk import write_atomically, write_json
from minirlhf.gpt2 import GPT2Config
from minirlhf.ppo import PPOConfig

FULL, QUARTER = GPT2Config(), GPT2Config(n_embd=384, n_layer=6, n_head=6)
TINY = GPT2Config(vocab_size=2048, n_positions=64, n_embd=96, n_layer=4, n_head=3)  # as shipped
VARIANTS = {"124M parameters, shared critic": (FULL, {}),
            "separate critic": (FULL, {"critic": "separate"}),
            "bfloat16": (FULL, {"dtype": "bfloat16"}),
            "1 prompt": (FULL, {"batch_size": 1}), "32 prompts": (FULL, {"batch_size": 32}),
            "8 new tokens": (FULL, {"max_new_tokens": 8}),
            "128 new tokens": (FULL, {"max_new_tokens": 128}),
            "30M parameters": (QUARTER, {}), "0.6M parameters": (TINY, {})}
QUICK = {"0.6M parameters, shared critic": (TINY, {"batch_size": 2, "max_new_tokens": 4}),
         "separate critic, bfloat16": (TINY, {"critic": "separate", "dtype": "bfloat16"})}
DECODING = [(1, "float32"), (8, "float32"), (32, "float32"), (8, "bfloat16")]    # rows, products


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of `python -m minirlhf.benchmark`."""
    runs: Count = 3                     # iterations of each kind; tables show medians
    naive_runs: Count = 2               # iterations of the naive baseline, minutes each
    device: Device = "cpu"              # where to compute
    trl: str = ""                       # interpreter that has TRL 1.x: its trainer beside ours
    quick: bool = False                 # tiny networks: for a smoke test
    out: str = "checkpoints/benchmark.json"    # file for all figures; the tables go beside it

    def __post_init__(self):
        check_fields(self)
        parallel.check_hardware(self)
        check(not self.trl or self.device == "cpu", "--trl is measured on the CPU only")
        check(self.out.endswith(".json"), f"--out is {self.out!r}, expected a name in .json")


def ppo_config(**changes) -> PPOConfig:
    """The options of the iteration that is measured, with changes; a rollout is one minibatch."""
    options = {"critic": "shared", "batch_size": 8, "max_new_tokens": 32, "epochs": 4, **changes}
    return PPOConfig(model="", reward="even_tokens", gold="", lr=1e-6,
                     minibatch_size=options["batch_size"], **options)


def in_new_process(function, *arguments):
    """What the call returns in a process that inherits no memory."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure_trl(cfg: BenchmarkConfig, config: GPT2Config, options: PPOConfig) -> dict:
    """Figures of TRL's trainer with networks and a rollout of this size, by its interpreter."""
    sizes = {**asdict(config), "batch_size": options.batch_size, "epochs": options.epochs,
             "max_new_tokens": options.max_new_tokens, "prompt_tokens": PROMPT_TOKENS,
             "runs": cfg.runs, "threads": torch.get_num_threads()}
    script = Path(__file__).with_name("beside_trl.py")
    done = subprocess.run([cfg.trl, str(script), json.dumps(sizes)], text=True,
                          capture_output=True)
    last = done.stderr.strip().split("\n")[-1]
    check(done.returncode == 0, f"--trl {cfg.trl}: TRL's trainer failed: {last}")
    trl = json.loads(done.stdout.strip().split("\n")[-1])
    return {**trl, "iteration": figure(trl["iteration"]), "sample": figure(trl["sample"])}


def main(cfg: BenchmarkConfig) -> dict:
    """Measure everything, write and print the tables; returns what the JSON file holds."""
    variants, started = QUICK if cfg.quick else VARIANTS, time.perf_counter()
    if cfg.quick:
        print("--quick: tiny networks. Everything runs, but the figures say nothing")
    first = next(iter(variants))        # measured beside the baseline
    base = ppo_config(**variants[first][1])
    result = {"machine": describe_machine(cfg.device),
              "limits": measure_limits(cfg.runs, cfg.quick, cfg.device),
              "iteration": f"{first}, {base.batch_size} prompts of {PROMPT_TOKENS} tokens, "
              f"{base.max_new_tokens} new tokens, {base.epochs} PPO epochs", "variants": {}}
    for name, (config, changes) in variants.items():
        print(f"[{time.perf_counter() - started:5.0f} s] {name}", flush=True)
        options = ppo_config(**changes, device=cfg.device)
        naive_runs = cfg.naive_runs if name == first else 0
        variant = in_new_process(measure, config, options, cfg.runs, naive_runs)
        result["variants"][name] = {**variant, "limits": limits(config, options, result["limits"])}
    if cfg.device == "cpu":
        config, result["decoding"] = variants[first][0], {}
        for rows, dtype in DECODING:
            print(f"[{time.perf_counter() - started:5.0f} s] decoding, {rows} rows, {dtype}",
                  flush=True)
            result["decoding"][f"{rows} rows, {dtype}"] = in_new_process(decoding, config, rows,
                                                                        dtype, cfg.runs)
    if cfg.trl:
        print(f"[{time.perf_counter() - started:5.0f} s] TRL's trainer", flush=True)
        name = next(name for name, (_, changes) in variants.items() if "critic" in changes)
        config, changes = variants[name]
        result["trl"] = {**measure_trl(cfg, config, ppo_config(**changes)), "beside": name}
    result["seconds"] = time.perf_counter() - started
    text, beside = markdown(result), cfg.out.removesuffix(".json") + ".md"
    write_json(cfg.out, result)
    write_atomically(beside, text.encode("utf-8"))
    print(f"\n{text}\n{result['seconds']:.0f} s in all. Wrote {cfg.out} and {beside}")
    return result


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(BenchmarkConfig))
