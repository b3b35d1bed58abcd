"""`memory`: what saves memory in a PPO iteration of the 124M shape, and what it costs in time.

Each arm runs in a process of its own with two threads, or in two that torchrun starts with one
each: random weights, 48 prompts of 16 tokens with 16 new ones, one minibatch. Nothing is learned
here: a "seed" is one more measurement. Two processes take about 11 GB, one takes half of it.
"""

import json
import os
import sys
from typing import Any

import torch

from minirlhf import ppo
from minirlhf.benchmark.iterations import ITERATION, Iterations
from minirlhf.benchmark.machine import peak_memory, timed
from minirlhf.engine import parallel
from minirlhf.engine.options import check
from minirlhf.gpt2 import GPT2Config
from minirlhf.lab.apart import leave_with_the_parent, run_apart
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_points
from minirlhf.lab.shared import Task, alone

ABOUT = Experiment(
    name="memory",
    claim="Checkpointing, accumulation, a shared critic and bfloat16 each save memory; what "
          "checkpointing saves it pays for in time.",
    source="the seed lecture (\"Gotcha 1: out of memory\": checkpointing, accumulation, smaller "
           "batches; \"share most layers\")",
    rule="Shown if peak memory is below the control's with each of the four, and the seconds of an "
         "iteration above it with checkpointing: intervals of the differences over repetitions on "
         "that side of 0. Refuted if one is on the other side.",
    figures=("memory", "seconds", "rollout", "update"),
    units={"memory": "GB, sum over processes", "seconds": "s per iteration",
           "rollout": "s per iteration", "update": "s per iteration"})

CONTROL, TWO = "separate critic", "two processes"
ARMS = {CONTROL: {}, "accumulation 4": {"accumulation": 4},
        "checkpointing": {"checkpointing": True},
        "shared critic": {"critic": "shared"}, "bfloat16": {"dtype": "bfloat16"}, TWO: {}}
TINY = GPT2Config(vocab_size=2048, n_positions=64, n_embd=96, n_layer=4, n_head=3)    # for --quick


# ---- in the process that is measured -------------------------------------------------------------

def measure_here(quick: bool, options: dict[str, Any]) -> dict[str, float]:
    """One PPO iteration; memory is the largest of this process, or the sum of the processes'."""
    rows = 4 if quick else 48
    cfg = ppo.PPOConfig(model="", reward="even_tokens", gold="", lr=1e-6, batch_size=rows,
                        minibatch_size=rows, max_new_tokens=16, epochs=1, **options)
    parallel.start(cfg.device)
    made = Iterations(TINY if quick else GPT2Config(), cfg)
    networks = made.networks
    networks.policy.checkpointing = networks.critic.transformer.checkpointing = cfg.checkpointing
    for parameter in networks.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step()                                # makes Adam's moments, changes nothing
    made.optimizer.zero_grad()
    batch, rollout = timed(ppo.rollout, *made.inputs, cfg, cfg.kl_coef, ITERATION)
    _, update = timed(ppo.update, networks, made.optimizer, batch, cfg, ITERATION)
    memory = peak_memory()
    check(memory is not None, "no way is known to read a process's peak memory on this system")
    memory, = parallel.sums([memory / 1e9], batch.ids.device)
    parallel.finish()
    return {"memory": memory, "seconds": rollout + update, "rollout": rollout, "update": update}


# ---- the experiment ------------------------------------------------------------------------------

def measure_apart(arm: str, quick: bool) -> dict[str, float]:
    """The figures of an arm from a new process, which has the memory of nobody else."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*(torchrun if arm == TWO else []), "-m", "minirlhf.lab.memory",
             json.dumps({"quick": quick, "options": ARMS[arm]})]
    return run_apart(arm, words, threads=1 if arm == TWO else 2)


def run(task: Task) -> dict:
    """One measurement, while no other task of this experiment runs: it needs both cores."""
    with alone(os.path.join(task.out, task.experiment, "measuring.lock")):
        return measure_apart(task.arm, task.quick)


def findings(rows: Rows) -> list[Finding]:
    """What saves, and what that costs."""
    saving = ("accumulation 4", "checkpointing", "shared critic", "bfloat16")
    return [*(compare(rows, f"{arm}: memory below that of {CONTROL}", (arm, "memory"), "<",
                      (CONTROL, "memory")) for arm in saving),
            compare(rows, "checkpointing: seconds above", ("checkpointing", "seconds"), ">",
                    (CONTROL, "seconds"))]


def picture(rows: Rows, path: str) -> None:
    """Memory, time, and one against the other."""
    figure, axes = new_picture(3)
    for panel, name in zip(axes, ("memory", "seconds")):
        show_intervals(panel, rows, name, unit=ABOUT.units[name])
    show_points(axes[2], rows, "seconds", "memory", "the price", "s per iteration",
                "peak memory, GB")
    save_picture(figure, path)


if __name__ == "__main__":
    leave_with_the_parent()
    print(json.dumps(measure_here(**json.loads(sys.argv[1]))), flush=True)
