"""The runs of `diagnose_rates`: healthy ones of many settings, and one or more for every illness.

Every case is a short run of a trainer from the finished stages of the pipeline, with some options
changed and perhaps a wrong function in place of a right one. None of the rewards, data and
functions here is for use: each is the cause of an illness.
"""

import copy
import random
from dataclasses import dataclass, field

import torch

from minirlhf import ppo, sft
from minirlhf.data import encode_response
from minirlhf.generate import Generation, generate
from minirlhf.gpt2 import GPT2, MLP
from minirlhf.museum.mistakes import mlp_forward
from minirlhf.museum.short_runs import STAGES, UNCHECKED
from minirlhf.tokenizer import Tokenizer
from minirlhf.world import comparisons

# ---- rewards and data ----------------------------------------------------------------------------

def constant(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward that has no preference: advantages carry nothing but noise."""
    return torch.zeros(len(ids))


def length(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward that pays for length: a tenth of a point per token."""
    return 0.1 * (lengths - prompt_lengths).float()


def length_in_points(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """Minus ten points per token: a scale that a critic with a clipped loss does not reach."""
    return -10.0 * (lengths - prompt_lengths).float()


def brevity(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward that pays for saying nothing: the best response is the end token alone."""
    return -0.1 * (lengths - prompt_lengths).float()


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

    stale: GPT2 | None = None

    def __call__(self, model: GPT2, *arguments, **options) -> Generation:
        self.stale = self.stale or copy.deepcopy(model)
        return generate(self.stale, *arguments, **options)


def response_without_end(tokenizer: Tokenizer, response: str) -> list[int]:
    """`encode_response` that forgets the end token, which is then never learned."""
    return encode_response(tokenizer, response)[:-1]


def replacements(mistake: str) -> list[tuple]:
    """What a mistake puts where, for `substituted`: (owner, name, wrong function) each."""
    if mistake == "stale sampler":
        return [(ppo, "generate", StaleSampler()), *UNCHECKED]
    if mistake == "dropout in the update":
        return [(MLP, "forward", mlp_forward), *UNCHECKED]
    if mistake == "end token forgotten":
        return [(sft, "encode_response", response_without_end)]
    return []


# ---- the cases -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """One kind of run; `illnesses` are what its cause must produce, none for a healthy run."""
    name: str
    stage: str                          # sft, reward_model, ppo
    illnesses: tuple[str, ...] = ()
    options: dict = field(default_factory=dict)
    mistake: str = ""                   # a key of `replacements`


CAUSES = "minirlhf.experiments.ill_runs:"
SFT_WITHOUT_END = "sft_without_end"     # a model that is made for the run
SHORT, LONG = {"iterations": 12}, {"iterations": 20}

HEALTHY = [
    Case("default", "ppo"),
    Case("shared critic", "ppo", options={"critic": "shared", **LONG}),
    Case("kl_coef 0.1", "ppo", options={"kl_coef": 0.1, **LONG}),
    Case("kl_coef 0.5", "ppo", options={"kl_coef": 0.5, **LONG}),
    Case("two reward models", "ppo", options={
        "reward": f"{STAGES}reward_model,{STAGES}reward_model_2", "ensemble": "min", **LONG}),
    Case("gold as reward", "ppo",
         options={"reward": "minirlhf.world:gold_reward", "gold": "", **LONG}),
    Case("no gold, adaptive KL", "ppo", options={"gold": "", "kl_target": 3.0,
                                                 "kl_horizon": 1000.0, **LONG}),
    Case("lam 1, one epoch", "ppo", options={"lam": 1.0, "epochs": 1, **LONG}),
    Case("four epochs, half the rate", "ppo", options={"epochs": 4, "lr": 2.5e-4, **LONG}),
    Case("sft", "sft", options={"examples": 1600, "eval_every": 25}),
    Case("sft, fewer steps", "sft", options={"examples": 1000, "epochs": 3, "lr": 2e-4,
                                             "eval_every": 25}),
    Case("reward model", "reward_model", options={"comparisons": 2000, "held_out": 400,
                                                  "eval_every": 20}),
    Case("reward model, half the rate", "reward_model",
         options={"comparisons": 1500, "held_out": 300, "lr": 5e-4, "eval_every": 20}),
]

SICK = [
    Case("sampler with stale weights", "ppo", ("kl_ref is negative",), SHORT, "stale sampler"),
    Case("dropout in the update", "ppo", ("first ratio off 1",), SHORT, "dropout in the update"),
    Case("no KL penalty", "ppo", ("KL runs away", "reward hacking"),
         {"kl_coef": 0.0, "iterations": 50}),
    Case("paid for length", "ppo", ("length drifts with the score",),
         {"reward": CAUSES + "length", "gold": "", "kl_coef": 0.02, "iterations": 20}),
    Case("rate 20 times too large", "ppo", ("updates too large",), {"lr": 1e-2, **SHORT}),
    Case("16 epochs", "ppo", ("updates too large",), {"epochs": 16, "iterations": 5}),
    Case("paid for brevity", "ppo", ("entropy collapse",),
         {"reward": CAUSES + "brevity", "gold": "", "kl_coef": 0.0, "iterations": 35}),
    Case("critic_lr 0", "ppo", ("critic explains nothing",), {"critic_lr": 0.0, **SHORT}),
    Case("scores too large for the critic", "ppo", ("critic explains nothing",),
         {"reward": CAUSES + "length_in_points", "gold": "", **SHORT}),
    Case("max_new_tokens 4", "ppo", ("responses do not end",), {"max_new_tokens": 4, **SHORT}),
    Case("SFT without the end token", "ppo", ("responses do not end",),
         {"model": SFT_WITHOUT_END, **SHORT}),
    Case("constant reward", "ppo", ("advantages vanish",),
         {"reward": CAUSES + "constant", "missing_end_penalty": 0.0, "gold": "", **SHORT}),
    Case("rate 100 times too small", "ppo", ("nothing moves",), {"lr": 5e-6, **SHORT}),
    Case("sft: rate 1e-8", "sft", ("nothing moves",),
         {"examples": 1000, "lr": 1e-8, "eval_every": 20}),
    Case("reward model: rate 1e-8", "reward_model", ("nothing moves",),
         {"comparisons": 1000, "held_out": 200, "lr": 1e-8, "eval_every": 10}),
    Case("labels by a coin", "reward_model", ("reward model at chance",),
         {"data": CAUSES + "coin_comparisons", "comparisons": 2000, "held_out": 400,
          "eval_every": 20}),
    Case("reward model: 8 epochs", "reward_model", ("learned by heart",),
         {"comparisons": 1000, "held_out": 300, "epochs": 8, "eval_every": 25}),
    Case("sft: 15 epochs of 300 examples", "sft", ("learned by heart",),
         {"examples": 400, "held_out": 100, "epochs": 15, "lr": 1e-3, "eval_every": 15}),
    Case("sft: rate 0.1", "sft", ("rate too high",), {"examples": 1000, "lr": 0.1}),
    Case("reward model: rate 0.1", "reward_model", ("reward model at chance",),
         {"comparisons": 1500, "held_out": 300, "lr": 0.1}),
]
