"""One prompt and its response through all tensors of one iteration of PPO, with the real numbers.

`follow` makes the iteration with the functions of `ppo`, `tell` writes what it gave as text.
"""
