"""Time outside tensor operations in the stages of the embedded pipeline, whose network is tiny.

PyTorch's profiler notes when each tensor operation begins and ends. What is left of the time is
Python, autograd's bookkeeping, and the way into and out of PyTorch. The profiler itself costs
time, within operations and between them. So two shares are given: one that takes the time from a
run without the profiler (too low: the operations were measured with it), and one that takes it from
the profiled run (too high: it has the profiler's own work between operations in it).
"""

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from minirlhf import ppo, reward_model, sft
from minirlhf.benchmark import machine
from minirlhf.benchmark.setting import Iterations, Setting, even_tokens, random_model
from minirlhf.common import random_stream
from minirlhf.gpt2 import GPT2Config, ScalarModel


def is_operation(event) -> bool:
    """Whether an event of the profiler is a tensor operation, and not a note about a step."""
    return event.name.startswith(("aten::", "mkldnn::"))


def operation_seconds(events, phase: str) -> float:
    """Seconds within tensor operations under the mark `phase`.

    Operations that another one calls are part of that one.
    """
    total = 0.0
    for event in filter(is_operation, events):
        above, outermost = event.cpu_parent, True
        while above is not None and above.name != phase:
            outermost = outermost and not is_operation(above)
            above = above.cpu_parent
        if above is not None and outermost:
            total += event.time_range.elapsed_us() / 1e6
    return total


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
    plain = {}
    for name, (prepare, function) in phases.items():
        function(*prepare())                             # not counted
        seconds = [machine.seconds_of(function, *prepare()) for _ in range(runs)]
        plain[name] = machine.figure(seconds)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for name, (prepare, function) in phases.items():
            arguments = prepare()
            with record_function(name):
                function(*arguments)
    events, found = profiler.events(), {}
    for name, seconds in plain.items():
        within = operation_seconds(events, name)
        (mark,) = [event for event in events if event.name == name]
        shares = [1 - within / seconds["median"], 1 - within / (mark.time_range.elapsed_us() / 1e6)]
        found[name] = {"seconds": seconds, "outside_from": max(0.0, min(shares)),
                       "outside_to": max(0.0, *shares)}
    return found
