"""The reward as stage 3 sees it: a plain function of ids and lengths.

A reward is any function

    reward(ids (B, T), prompt_lengths (B,), lengths (B,), tokenizer) -> scores (B,)

where row b holds a prompt of prompt_lengths[b] tokens and a response up to lengths[b], its end
token included if the policy chose it. A reward model, several that vote, the gold judge of the text
world and a rule that you write yourself are all such functions, named by one option.

Lecture: lectures/03-ppo.md, "The reward is a function".
"""

import os

import torch

from minirlhf.common import check
from minirlhf.data import Tokenizer, load_function
from minirlhf.gpt2 import ScalarModel


def is_function(spec: str) -> bool:
    """Whether `spec` names a `module:function` and not checkpoint folders."""
    return ":" in spec and not os.path.isdir(spec.split(",")[0])


class ModelReward:
    """Scores by one reward model, or by several that vote."""

    def __init__(self, models: list[ScalarModel], how: str):
        self.models, self.how = models, how

    def __call__(self, ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                 tokenizer: Tokenizer) -> torch.Tensor:
        """ids (B, T), lengths (B,) -> scores (B,)."""
        votes = torch.stack([model.score(ids, lengths) for model in self.models])   # (models, B)
        return votes.mean(dim=0) if self.how == "mean" else votes.min(dim=0).values


def load_reward(spec: str, ensemble: str, tokenizer: Tokenizer, device: str = "cpu"):
    """The function ids (B, T), prompt_lengths (B,), lengths (B,), tokenizer -> scores (B,).

    `spec` is a reward-model folder, several joined by commas, or `module:function`. Reward models
    compute on `device`.
    """
    if is_function(spec):
        return load_function(spec)
    models = []
    for folder in spec.split(","):
        model = ScalarModel.from_pretrained(folder).to(device)
        model.requires_grad_(False)
        check(Tokenizer.load(folder).merges == tokenizer.merges, f"{folder}: the reward model's "
              "tokenizer is not the policy's; train it from this SFT model")
        models.append(model)
    return ModelReward(models, ensemble)
