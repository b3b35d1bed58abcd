"""Follows one response through an iteration of PPO: every tensor, cut down to the response's row.

The iteration itself is made by `ppo.rollout` and `ppo.update`. What these compute on their way and
do not keep is computed once more, by the same functions of `ppo` on the same inputs.
Lecture: lectures/05-ppo-the-run.md, "One response through all tensors".
"""

import torch

from minirlhf import ppo
from minirlhf.gpt2 import GPT2, PolicyWithValue
from minirlhf.tokenizer import Tokenizer


def each_loss(logprobs: torch.Tensor, row: ppo.Rollout, cfg: ppo.PPOConfig):
    """Policy loss of every token by itself, and its slope over the token's log-probability.

    logprobs (1, T-1), row a `Rollout` of one row -> losses (T-1,), slopes (T-1,), 0 outside the
    mask. `policy_loss` gives a mean; with a mask of one token it gives the loss of that token.
    """
    logprobs = logprobs.detach().requires_grad_()
    losses = torch.zeros(logprobs.shape[1])                                         # (T-1,)
    for t in row.response_mask[0].nonzero().flatten().tolist():
        mask = torch.zeros_like(row.response_mask)                                  # (1, T-1)
        mask[0, t] = True
        losses[t], _ = ppo.policy_loss(logprobs, row.old_logprobs, row.advantages, mask,
                                       cfg.cliprange, 1)
    slopes, = torch.autograd.grad(losses.sum(), logprobs)                           # (1, T-1)
    return losses.detach(), slopes[0]


def each_value_loss(values: torch.Tensor, row: ppo.Rollout, cfg: ppo.PPOConfig) -> torch.Tensor:
    """Value loss of every token by itself: values (1, T-1) -> (T-1,), 0 outside the mask."""
    losses = torch.zeros(values.shape[1])                                           # (T-1,)
    for t in row.response_mask[0].nonzero().flatten().tolist():
        mask = torch.zeros_like(row.response_mask)                                  # (1, T-1)
        mask[0, t] = True
        losses[t] = ppo.value_loss(values, row.old_values, row.returns, mask, cfg.cliprange_value,
                                   1)
    return losses


def look(networks: PolicyWithValue, row: ppo.Rollout, cfg: ppo.PPOConfig) -> dict:
    """What the update sees of one row with the networks as they are now: (T-1,) each."""
    with torch.no_grad():
        logprobs, values, _ = networks.evaluate_actions(row.ids, row.response_mask,
                                                        cfg.temperature)            # (1, T-1)
        _, ratio = ppo.policy_loss(logprobs, row.old_logprobs, row.advantages, row.response_mask,
                                   cfg.cliprange)                                   # (1, T-1)
    losses, slopes = each_loss(logprobs, row, cfg)
    return {"logprobs": logprobs[0], "values": values[0], "ratio": ratio[0], "loss": losses,
            "slope": slopes, "value_loss": each_value_loss(values, row, cfg)}


def first_step(networks: PolicyWithValue, part: ppo.Rollout, cfg: ppo.PPOConfig) -> dict:
    """The losses of the first minibatch, as `update` is about to compute them."""
    count = int(part.response_mask.sum())
    with torch.no_grad():
        logprobs, values, _ = networks.evaluate_actions(part.ids, part.response_mask,
                                                        cfg.temperature)            # (b, T-1)
        pg_loss, _ = ppo.policy_loss(logprobs, part.old_logprobs, part.advantages,
                                     part.response_mask, cfg.cliprange, count)
        vf_loss = ppo.value_loss(values, part.old_values, part.returns, part.response_mask,
                                 cfg.cliprange_value, count)
    return {"tokens": count, "pg_loss": pg_loss.item(), "vf_loss": vf_loss.item(),
            "loss": (pg_loss + cfg.vf_coef * vf_loss).item()}


def follow(networks: PolicyWithValue, ref_policy: GPT2, reward_function, tokenizer: Tokenizer,
           prompts: list[list[int]], cfg: ppo.PPOConfig, iteration: int, response: int) -> dict:
    """One iteration, from the prompts to the weights after the update.

    `response` counts within the first minibatch. Returns `batch` (a `Rollout` of all rows), `row`
    (one of that response alone), `number` (which row it is), and what the rollout does not keep.
    """
    batch = ppo.rollout(networks, ref_policy, reward_function, tokenizer, prompts, cfg,
                        cfg.kl_coef, iteration)
    rows = ppo.minibatches(cfg, iteration)[0]                                       # (b,)
    number = int(rows[response])
    row = batch.rows(torch.tensor([number]))
    with torch.no_grad():
        given = reward_function(row.ids, row.prompt_lengths, row.lengths, tokenizer)
    inputs = (batch.rewards, batch.old_values, batch.response_mask, cfg.gamma)
    delta, _ = ppo.gae(*inputs, 0.0)                     # with lambda 0 an advantage is its delta
    advantages, _ = ppo.gae(*inputs, cfg.lam)                                       # (B, T-1)
    kept = advantages[batch.response_mask]                                          # (N,)
    seen = {"batch": batch, "row": row, "number": number, "minibatch": rows,
            "given": float(ppo.report.totals(given, row.response_mask)), "delta": delta[number],
            "raw_advantages": advantages[number], "mean": kept.mean().item(),
            "deviation": kept.std(unbiased=False).item(), "before": look(networks, row, cfg),
            "first_step": first_step(networks, batch.rows(rows), cfg)}
    optimizer = ppo.make_optimizer(networks, cfg)
    seen["metrics"] = ppo.update(networks, optimizer, batch, cfg, iteration)
    seen["after"] = look(networks, row, cfg)
    return seen
