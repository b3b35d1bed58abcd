"""Ways to make a run ill on purpose: rewards, data and wrong functions for `diagnose.check`.

None of this is for use. Each function is a cause; which illness it produces is in the list of runs
of `minirlhf/diagnose/check.py`.
"""

import random

import torch
import torch.nn.functional as F

from minirlhf.data import Tokenizer, encode_response
from minirlhf.gpt2 import GPT2, MLP, Generation, generate
from minirlhf.world import comparisons


# ---- rewards -------------------------------------------------------------------------------------

def constant(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
             tokenizer: Tokenizer) -> torch.Tensor:
    """A reward that has no preference: advantages carry nothing but noise."""
    return torch.zeros(len(ids))


def length(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
           tokenizer: Tokenizer) -> torch.Tensor:
    """A reward that pays for length: a tenth of a point a token."""
    return 0.1 * (lengths - prompt_lengths).float()


def length_in_points(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                     tokenizer: Tokenizer) -> torch.Tensor:
    """Minus ten points a token: a scale that a critic with a clipped loss does not reach."""
    return -10.0 * (lengths - prompt_lengths).float()


def brevity(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
            tokenizer: Tokenizer) -> torch.Tensor:
    """A reward that pays for saying nothing: the best response is the end token alone."""
    return -0.1 * (lengths - prompt_lengths).float()


# ---- data ----------------------------------------------------------------------------------------

def coin_comparisons(count: int, seed: int, model: str = "checkpoints/sft") -> list[dict]:
    """Comparisons whose label is a coin: no reward model can do better than one half."""
    rng, rows = random.Random(seed), []
    for row in comparisons(count, seed, model):
        one, other = rng.sample([row["chosen"], row["rejected"]], 2)
        rows.append({"prompt": row["prompt"], "chosen": one, "rejected": other})
    return rows


# ---- wrong functions -----------------------------------------------------------------------------

class StaleSampler:
    """Samples from the weights of the first call for ever, as a server that is not updated does."""

    def __init__(self):
        self.stale: GPT2 | None = None

    def __call__(self, model: GPT2, prompts: list[list[int]], limit: int, **options) -> Generation:
        if self.stale is None:
            self.stale = GPT2(model.config)
            self.stale.load_state_dict(model.state_dict())
        return generate(self.stale, prompts, limit, **options)


def mlp_with_dropout(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """`MLP.forward` with dropout where gradients are on: in the update and not in the rollout."""
    y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
    return F.dropout(y, 0.1, training=torch.is_grad_enabled())


def response_without_end(tokenizer: Tokenizer, response: str) -> list[int]:
    """`encode_response` that forgets the end token, which is then never learned."""
    return encode_response(tokenizer, response)[:-1]
