"""Rewards from execution: prompts that ask for a small program, and tests that run the answer.

Plain functions, named by the trainers' options as "minirlhf.execution:demonstrations" and so on.
What runs an answer is `runner.run_answers`, and it says why this is no sandbox. Only rewards and
comparisons need torch; they are loaded when they are called.
"""
from minirlhf.execution.tasks import demonstrations, held_out_prompts, prompts

__all__ = ["comparisons", "demonstrations", "few_tests_reward", "held_out_prompts", "hidden_reward",
           "prompts", "reward"]


def reward(ids, prompt_lengths, lengths, tokenizer):
    """Many tests: 1 if an answer passes the prompt's example and 7 more inputs, else 0; (B,)."""
    from minirlhf.execution import scoring
    return scoring.score_by_tests(ids, prompt_lengths, lengths, tokenizer, "many")


def few_tests_reward(ids, prompt_lengths, lengths, tokenizer):
    """One test, the prompt's example, which a constant passes, too: scores 1 or 0, (B,)."""
    from minirlhf.execution import scoring
    return scoring.score_by_tests(ids, prompt_lengths, lengths, tokenizer, "few")


def hidden_reward(ids, prompt_lengths, lengths, tokenizer):
    """The gold judge: 8 inputs that neither reward has, scores 1 or 0, (B,)."""
    from minirlhf.execution import scoring
    return scoring.score_by_tests(ids, prompt_lengths, lengths, tokenizer, "hidden")


def comparisons(count: int, seed: int, model: str) -> list[dict]:
    """Right against wrong answers of the policy in `model`, by the tests; see `scoring`."""
    from minirlhf.execution import scoring
    return scoring.comparisons(count, seed, model)
