"""A small English world with known answers: all that the three stages need, made by program.

Plain functions, named by the trainers' options as "minirlhf.world:demonstrations" and so on.
Only `comparisons` and the gold rewards need torch; they are loaded when they are called.
"""
from minirlhf.world.corpus import corpus
from minirlhf.world.judge import Judgement, judge
from minirlhf.world.labellers import demonstrations, held_out_prompts, prompts

__all__ = ["Judgement", "comparisons", "corpus", "demonstrations", "gold_reward",
           "gold_reward_per_token", "held_out_prompts", "judge", "prompts"]


def comparisons(count: int, seed: int, model: str) -> list[dict]:
    """Comparisons of responses that the policy in `model` samples; see `collect.comparisons`."""
    from minirlhf.world import collect
    return collect.comparisons(count, seed, model)


def gold_reward(ids, prompt_lengths, lengths, tokenizer):
    """The gold judge's scores (B,) of the responses in ids (B, T); see `collect.gold_reward`."""
    from minirlhf.world import collect
    return collect.gold_reward(ids, prompt_lengths, lengths, tokenizer)


def gold_reward_per_token(ids, prompt_lengths, lengths, tokenizer):
    """The same paid where the facts are stated, (B, T-1); see `collect.gold_reward_per_token`."""
    from minirlhf.world import collect
    return collect.gold_reward_per_token(ids, prompt_lengths, lengths, tokenizer)
