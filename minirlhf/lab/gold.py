"""PPO on the gold judge itself, as a control: it differs from PPO on a reward model by the score
alone. Gold has the scale of a reward model, and the critic starts from the same one.
"""

from minirlhf import ppo
from minirlhf.engine.functions import ScoreFunction
from minirlhf.evaluate import gold_figures, load_policy, read_prompts, sample_answers
from minirlhf.lab.shared import Task, sft_folder, train_policy
from minirlhf.museum.short_runs import substituted
from minirlhf.reward_model import RewardModelConfig


class ScaledGold(ScoreFunction):
    """Gold as a reward of PPO, less `mean` and divided by `deviation`."""

    def __init__(self, mean: float, deviation: float):
        super().__init__("--reward", "minirlhf.world:gold_reward")
        self.mean, self.deviation = mean, deviation

    def scaled(self, gold):
        """Gold, a number or a tensor, on this scale."""
        return (gold - self.mean) / self.deviation

    def __call__(self, *arguments):
        """ids (B, T), prompt_lengths (B,), lengths (B,), tokenizer -> scores (B,)."""
        return self.scaled(super().__call__(*arguments))


def scaled_gold(task: Task) -> ScaledGold:
    """Gold with mean 0 and deviation 1 on answers of the SFT model to training prompts.

    They are as many as those by which a reward model is scaled.
    """
    policy, tokenizer = load_policy(sft_folder(task))
    prompts, _ = read_prompts("minirlhf.world:prompts", tokenizer, policy.config.n_positions, 32,
                              count=RewardModelConfig().norm_samples, seed=task.seed)
    answers = sample_answers(policy, tokenizer, prompts, 1, seed=task.seed)
    gold = gold_figures(answers)["gold"]                                            # (P, 1)
    return ScaledGold(float(gold.mean()), float(gold.std(ddof=1)))


def train_on_gold(task: Task, gold: ScaledGold, **options) -> str:
    """`train_policy` with gold's scores; from the reward model `reward` only the critic starts."""
    with substituted([(ppo, "load_reward", lambda *arguments: gold)]):
        return train_policy(task, **options)
