"""The reward as stage 3 sees it: a plain function of ids and lengths.

A reward is any function

    reward(ids (B, T), prompt_lengths (B,), lengths (B,), tokenizer) -> scores (B,)

where row b holds a prompt of prompt_lengths[b] tokens and a response up to lengths[b], its end
token included if the policy chose it. A reward model, several that vote, the gold judge of the text
world and a rule that you write yourself are all such functions, named by one option. A function of
your own may also pay per token: (B, T-1), column t for the action ids[t+1].

Lecture: lectures/04-ppo-mathematics.md, "The reward is a function".
"""

import os
from typing import Literal

import torch

from minirlhf.engine.functions import ScoreFunction
from minirlhf.engine.options import check, split_folders
from minirlhf.engine.state import fingerprint
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import ScalarModel
from minirlhf.tokenizer import Tokenizer

Ensemble = Literal["mean", "min", "uwo"]    # how several reward models vote: `ModelReward`
VARIANCE_WEIGHT = 0.5               # of the vote "uwo"; scores have deviation 1


def reward_folders(spec: str) -> list[str]:
    """The folders that `spec` names, one or several with commas; none for `module:function`."""
    folders = split_folders(spec)
    return [] if ":" in spec and not os.path.isdir(folders[0]) else folders


def is_function(spec: str) -> bool:
    """Whether `spec` names a `module:function` and not checkpoint folders."""
    return not reward_folders(spec)


class ModelReward:
    """Scores by one reward model, or by several that vote: their mean, their minimum, or "uwo".

    uwo is the mean less VARIANCE_WEIGHT times the variance of the votes: where the models disagree,
    none of them is believed.
    Example: votes 1 and 3 give 2 by mean, 1 by min, 2 - 0.5 * 1 = 1.5 by uwo.
    Source: Coste et al. 2023 (arXiv 2310.02743): worst-case optimisation (min) and
    uncertainty-weighted optimisation (uwo); the weight is ours.
    """

    def __init__(self, models: list[ScalarModel], how: Ensemble):
        self.models, self.how = models, how
        self.source = fingerprint(*models)               # what a run that goes on must find again

    def __call__(self, ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                 tokenizer: Tokenizer) -> torch.Tensor:
        """ids (B, T), lengths (B,) -> scores (B,)."""
        votes = torch.stack([model.score(ids, lengths) for model in self.models])   # (models, B)
        if self.how == "min":
            return votes.min(dim=0).values                                          # (B,)
        scores = votes.mean(dim=0)                                                  # (B,)
        if self.how == "uwo":
            scores = scores - VARIANCE_WEIGHT * votes.var(dim=0, unbiased=False)
        return scores


def load_reward(spec: str, ensemble: str, tokenizer: Tokenizer, device: str = "cpu",
                dtype: str = "float32", option: str = "--reward"):
    """The function ids (B, T), prompt_lengths (B,), lengths (B,), tokenizer -> scores (B,).

    A function that PPO is to optimise (`option` is "--reward") may also give (B, T-1), per token.
    `spec` is a reward-model folder, several (`reward_folders`), or `module:function`. Reward models
    compute on `device`, their matrix products in `dtype`.
    """
    if is_function(spec):
        return ScoreFunction(option, spec, per_token=option == "--reward")
    models = []
    for folder in reward_folders(spec):
        model = load_network(ScalarModel, folder).to(device).requires_grad_(False)
        model.transformer.dtype = dtype
        check(Tokenizer.load(folder) == tokenizer, f"{folder}: the reward model's "
              "tokenizer is not the policy's; train it from this SFT model")
        models.append(model)
    return ModelReward(models, ensemble)


def load_gold(spec: str) -> ScoreFunction | None:
    """The gold judge, logged beside the score and never optimised; None for ""."""
    return ScoreFunction("--gold", spec) if spec else None


def try_once(prompt: list[int], tokenizer: Tokenizer, *functions, device: str = "cpu") -> None:
    """Call the users' functions among `functions` on one real prompt, before the work begins."""
    for function in functions:
        if isinstance(function, ScoreFunction):
            function.try_once(prompt, tokenizer, device)


def adapt_kl_coef(kl_coef: float, kl_ref: float, target: float, responses: int,
                  horizon: float) -> float:
    """The next weight of the KL penalty, so that kl_ref (nats per response) approaches `target`.

    Example: kl_coef 0.1, kl_ref 9, target 6, 64 responses, horizon 10000: the error 0.5 is cut to
    0.2 and 0.1 becomes 0.1 * (1 + 0.2 * 64 / 10000) = 0.100128.
    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py, AdaptiveKLController.
    """
    # a horizon of at least one rollout keeps the factor above 0
    error = max(-0.2, min(0.2, kl_ref / target - 1))
    return kl_coef * (1 + error * responses / horizon)
