"""Time outside tensor operations in the stages of the embedded pipeline, whose network is tiny.

PyTorch's profiler notes when each tensor operation begins and ends. What is left of the time is
Python, autograd's bookkeeping, and the way into and out of PyTorch. The profiler itself costs
time, within operations and between them. So two shares are given: one that takes the time from a
run without the profiler (too low: the operations were measured with it), and one that takes it from
the profiled run (too high: it has the profiler's own work between operations in it).
"""

import time

import torch
from torch.profiler import ProfilerActivity, profile

from minirlhf import ppo, reward_model, sft
from minirlhf.benchmark import machine
from minirlhf.benchmark.setting import Iterations, Setting, even_tokens, random_model
from minirlhf.common import random_stream
from minirlhf.gpt2 import GPT2Config, ScalarModel


def is_operation(event) -> bool:
    """Whether an event of the profiler is a tensor operation, and not a note about a step."""
    return event.name.startswith(("aten::", "mkldnn::"))


def operation_seconds(events) -> float:
    """Seconds within tensor operations; those that another one calls are part of that one."""
    total = 0.0
    for event in filter(is_operation, events):
        parent = event.cpu_parent
        while parent is not None and not is_operation(parent):
            parent = parent.cpu_parent
        if parent is None:
            total += event.time_range.elapsed_us() / 1e6
    return total


def outside_operations(runs: int, prepare, function) -> dict:
    """Milliseconds of `function(*prepare())`, and the share of it outside tensor operations."""
    function(*prepare())
    plain, low, high = [], [], []
    for _ in range(runs):
        arguments = prepare()
        plain.append(machine.seconds_of(function, *arguments))
        arguments = prepare()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            function(*arguments)
            profiled = time.perf_counter() - started
        within = operation_seconds(profiler.events())
        low.append(max(0.0, 1 - within / plain[-1]))
        high.append(1 - within / profiled)
    return {"seconds": machine.figure(plain), "outside_at_least": machine.figure(low),
            "outside_at_most": machine.figure(high)}


class Stages:
    """One step of every stage with the pipeline's defaults, on random weights and tokens."""

    def __init__(self, config: GPT2Config, batch_size: int, new_tokens: int):
        self.config, self.end_token = config, config.vocab_size - 1
        self.sft_cfg, self.rm_cfg = sft.SFTConfig(), reward_model.RewardModelConfig()
        self.policy, self.reward_model = random_model(config, 0), ScalarModel(config)
        self.sft_optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, fused=True)
        self.rm_optimizer = torch.optim.AdamW(self.reward_model.parameters(), lr=1e-5, fused=True)
        self.ppo = Iterations(Setting(config, prompts=batch_size, prompt_tokens=12, epochs=2,
                                      new_tokens=new_tokens, critic="separate"))
        generator = random_stream(0)
        rows = torch.randint(0, config.vocab_size - 1, (32, 3, 12), generator=generator).tolist()
        self.demonstrations = [sft.Demonstration(a, b + [self.end_token]) for a, b, _ in rows]
        self.comparisons = [reward_model.Comparison(a, b + [self.end_token], c + [self.end_token])
                            for a, b, c in rows]

    def nothing(self) -> tuple:
        """For a step that needs nothing prepared."""
        return ()

    def sft_step(self) -> None:
        """One optimiser step of SFT."""
        sft.train_step(self.policy, self.sft_optimizer, self.demonstrations, self.sft_cfg,
                       self.end_token, "benchmark")

    def reward_model_step(self) -> None:
        """One optimiser step of the reward model."""
        reward_model.train_step(self.reward_model, self.rm_optimizer, self.comparisons, self.rm_cfg,
                                self.end_token, "benchmark")

    def sample(self) -> None:
        """The responses of one PPO iteration."""
        ppo.generate(self.ppo.networks.policy, self.ppo.prompts, self.ppo.cfg.max_new_tokens,
                     end_token=self.end_token, generator=random_stream(0))

    def rollout(self) -> tuple:
        """Sampling and scoring of one PPO iteration."""
        cfg, self.ppo.done = self.ppo.cfg, self.ppo.done + 1
        batch = ppo.rollout(self.ppo.networks, self.ppo.ref_policy, even_tokens, self.ppo.tokenizer,
                            self.ppo.prompts, cfg, cfg.kl_coef, self.ppo.done)
        return (batch,)

    def update(self, batch) -> None:
        """The update of one PPO iteration."""
        ppo.update(self.ppo.networks, self.ppo.optimizer, batch, self.ppo.cfg, self.ppo.done)


def measure_overhead(runs: int, config: GPT2Config, batch_size: int, new_tokens: int) -> dict:
    """Every phase of the pipeline's training."""
    stages = Stages(config, batch_size, new_tokens)
    phases = {"SFT, one step": (stages.nothing, stages.sft_step),
              "reward model, one step": (stages.nothing, stages.reward_model_step),
              "PPO, sampling": (stages.nothing, stages.sample),
              "PPO, sampling and scoring": (stages.nothing, stages.rollout),
              "PPO, update": (stages.rollout, stages.update)}
    return {name: outside_operations(runs, *steps) for name, steps in phases.items()}
