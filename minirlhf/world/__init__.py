"""A small English world with known answers: everything that the three stages need, made by program.

Plain functions, named by the trainers' options as "minirlhf.world:demonstrations" and so on. Nothing here needs
torch until `comparisons` or `gold_reward` is called.
"""
from minirlhf.world.corpus import corpus

__all__ = ["corpus"]
