"""Rollouts of the toy policy, for the tests of ppo.py, ppo_report.py and rewards.py."""

import torch
from helpers import toy_tokenizer

from minirlhf import ppo
from minirlhf.data import encode_prompt
from minirlhf.gpt2 import GPT2, PolicyWithValue, ScalarModel
from minirlhf.rewards import load_reward

CRITICS = ("separate", "shared")


def ragged_prompts(count: int) -> list[list[int]]:
    """Prompts of four lengths."""
    tokenizer = toy_tokenizer()
    return [encode_prompt(tokenizer, f"Prompt: Colours{' for' * (i % 4)} bana?\nResponse:")
            for i in range(count)]


def fresh_rollout(cfg, iteration: int = 0, kl_coef: float = 0.02):
    """Networks, reference and their first rollout."""
    networks, ref_policy = ppo.make_networks(cfg)
    reward = load_reward(cfg.reward, cfg.ensemble, toy_tokenizer())
    batch = ppo.rollout(networks, ref_policy, reward, toy_tokenizer(),
                        ragged_prompts(cfg.batch_size), cfg, kl_coef, iteration)
    return networks, ref_policy, batch


def with_shared_critic(policy: GPT2) -> PolicyWithValue:
    """The policy with a value head on its own trunk."""
    return PolicyWithValue(policy, ScalarModel(policy.config, trunk=policy))


class Dropout(torch.nn.Module):
    """A layer norm followed by dropout, as a network with dropout would have it."""

    def __init__(self, norm: torch.nn.Module):
        super().__init__()
        self.norm, self.on = norm, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(self.norm(x), 0.5, training=self.on)
