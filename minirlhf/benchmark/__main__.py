"""Measure minirlhf on this machine: beside a naive baseline, and against the machine's limits.

    python -m minirlhf.benchmark            # about a quarter of an hour, 8 GB of memory
    python -m minirlhf.benchmark --quick    # tiny networks: to see that it runs

Out: tables on the terminal and as Markdown beside the JSON file with all figures: the rates of
matrix products and of memory, a PPO iteration of the 124M shape with random weights beside the
naive baseline, and other critics, precisions and sizes, with share of the limits and peak memory.
"""

import time
from dataclasses import dataclass
from multiprocessing import get_context

from minirlhf.benchmark.iterations import PROMPT_TOKENS, limits, measure
from minirlhf.benchmark.machine import describe_machine, measure_limits
from minirlhf.benchmark.report import markdown
from minirlhf.engine.fields import Count, check_fields
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


@dataclass(frozen=True)
class BenchmarkConfig:
    """Options of `python -m minirlhf.benchmark`."""
    runs: Count = 3                     # iterations of each kind; tables show medians
    naive_runs: Count = 2               # iterations of the naive baseline, minutes each
    quick: bool = False                 # tiny networks: for a smoke test
    out: str = "checkpoints/benchmark.json"    # file for all figures; the tables go beside it

    def __post_init__(self):
        check_fields(self)
        check(self.out.endswith(".json"), f"--out is {self.out!r}, expected a name in .json")


def ppo_config(**changes) -> PPOConfig:
    """The options of the iteration that is measured, with changes; a rollout is one minibatch."""
    options = {"critic": "shared", "batch_size": 8, "max_new_tokens": 32, "epochs": 4, **changes}
    return PPOConfig(model="", reward="even_tokens", gold="", lr=1e-6,
                     minibatch_size=options["batch_size"], **options)


def main(cfg: BenchmarkConfig) -> dict:
    """Measure everything, write and print the tables; returns what the JSON file holds."""
    variants, started = QUICK if cfg.quick else VARIANTS, time.perf_counter()
    if cfg.quick:
        print("--quick: tiny networks. Everything runs, but the figures say nothing")
    first = next(iter(variants))        # measured beside the baseline
    base = ppo_config(**variants[first][1])
    result = {"machine": describe_machine(), "limits": measure_limits(cfg.runs, cfg.quick),
              "iteration": f"{first}, {base.batch_size} prompts of {PROMPT_TOKENS} tokens, "
              f"{base.max_new_tokens} new tokens, {base.epochs} PPO epochs", "variants": {}}
    for name, (config, changes) in variants.items():
        print(f"[{time.perf_counter() - started:5.0f} s] {name}", flush=True)
        options, naive_runs = ppo_config(**changes), cfg.naive_runs if name == first else 0
        with get_context("spawn").Pool(1) as pool:       # a process that inherits no memory
            variant = pool.apply(measure, (config, options, cfg.runs, naive_runs))
        result["variants"][name] = {**variant, "limits": limits(config, options, result["limits"])}
    result["seconds"] = time.perf_counter() - started
    text, beside = markdown(result), cfg.out.removesuffix(".json") + ".md"
    write_json(cfg.out, result)
    write_atomically(beside, text.encode("utf-8"))
    print(f"\n{text}\n{result['seconds']:.0f} s in all. Wrote {cfg.out} and {beside}")
    return result


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(BenchmarkConfig))
