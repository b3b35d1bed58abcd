"""What PPO says about itself: the metrics, the checks of every run, and the token table.

Functions of a `ppo.Rollout` and of the ratios of an update; nothing here is trained through.
Lecture: lectures/05-ppo-the-run.md, "What the metrics mean".
"""

from dataclasses import fields

import torch

from minirlhf.engine import parallel
from minirlhf.engine.options import check
from minirlhf.engine.training import check_finite, masked_mean
from minirlhf.tokenizer import Tokenizer

METRICS = ["iteration",      # rollouts before this one
           "score",          # mean of the reward function, missing-end penalty included
           "gold",           # mean of the gold judge, which nothing optimises; empty without one
           "rewards",        # mean over responses of the sum of a response's rewards
           "kl_ref",         # mean over responses of the sum of kl_ref: nats per response
           "kl_old",         # how far the policy moved from its rollout: nats per token
           "entropy",        # of the sampling distribution: nats per token
           "clipfrac",       # share of tokens with the ratio outside the clip range
           "ratio_first",    # largest |ratio - 1| in the first minibatch: 0 up to rounding
           "ratio_max",      # largest ratio of any token
           "pg_loss",        # policy loss
           "vf_loss",        # value loss, before vf_coef
           "explained_var",  # 1 - Var(returns - old_values) / Var(returns): 1 perfect, 0 useless
           "advantage_std",  # standard deviation of the advantages before whitening
           "response_len",   # mean response length in tokens, end token included
           "end_rate",       # share of responses that chose the end token
           "grad_norm",      # before clipping, mean over steps
           "lr",             # the policy's
           "kl_coef"]        # weight of kl_ref that this iteration used

# How far apart, in nats, two log-probabilities of the same token may be: their sums are added in
# another order. The largest found in 25 default iterations: 7e-6 with float32, 0.12 with bfloat16.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}


# ---- what must hold ------------------------------------------------------------------------------

def check_rollout(batch, kl_coef: float, iteration: int, dtype: str = "float32") -> None:
    """What must hold in every rollout, or the program is wrong."""
    check_finite(f"iteration {iteration}", old_logprobs=batch.old_logprobs,
                 ref_logprobs=batch.ref_logprobs, old_values=batch.old_values, scores=batch.scores)
    mask = batch.response_mask
    apart = ((batch.sampled_logprobs - batch.old_logprobs) * mask).abs().max().item()
    check(apart < TOLERANCE[dtype], f"iteration {iteration}: tokens were sampled from another "
          f"distribution than they are scored under (log-probabilities differ by {apart:.3g})")
    if iteration == 0:
        largest = batch.kl_ref.abs().max().item()
        check(largest < 1e-3, f"kl_ref is {largest:.3g} in iteration 0, expected 0: policy and "
              "reference must start from the same weights")
    expected = batch.scores - kl_coef * (batch.kl_ref * mask).sum(dim=1)            # (B,)
    apart = (batch.rewards.sum(dim=1) - expected).abs().max().item()
    check(apart < 1e-3 * (1 + expected.abs().max().item()), f"iteration {iteration}: the rewards "
          f"of a response do not add up to score - kl_coef * kl_ref (off by {apart:.3g})")


def check_first_ratio(step: dict, where: str, dtype: str) -> None:
    """Before the first step of an update nothing has changed, so every ratio is 1."""
    check(step["ratio_off"] < TOLERANCE[dtype], f"{where}: the first ratio is off 1 by "
          f"{step['ratio_off']:.3g}: policy and rollout disagree before any step was taken")


# ---- metrics -------------------------------------------------------------------------------------

def totals(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each response's score (B,), from scores (B,) or, per token, (B, T-1)."""
    return scores if scores.dim() == 1 else torch.where(mask, scores, 0.0).sum(dim=1)


def measure(batch, gold_function, tokenizer: Tokenizer) -> dict:
    """The metrics that a rollout gives, before its update."""
    gold = None
    if gold_function is not None:
        gold = gold_function(batch.ids, batch.prompt_lengths, batch.lengths, tokenizer)     # (B,)
    mask = batch.response_mask
    # what the critic did not foresee: the error of its values, and the advantages before whitening
    errors = (batch.returns - batch.old_values)[mask]                               # (N,)
    variance = batch.returns[mask].var(unbiased=False).item()
    return {"score": batch.scores.mean().item(),
            "gold": gold.float().mean().item() if gold is not None else "",
            "rewards": batch.rewards.sum(dim=1).mean().item(),
            "kl_ref": (batch.kl_ref * mask).sum(dim=1).mean().item(),
            "entropy": masked_mean(batch.entropy, mask).item(),
            "explained_var": 1 - errors.var(unbiased=False).item() / max(variance, 1e-8),
            "advantage_std": errors.std(unbiased=False).item(),
            "response_len": (batch.lengths - batch.prompt_lengths).float().mean().item(),
            "end_rate": batch.ended.float().mean().item()}


def measure_step(measured: list[tuple], mask: torch.Tensor, cliprange: float) -> dict:
    """The metrics of one optimiser step, over the response tokens of its minibatch.

    `measured` has ratio (b, T-1), policy loss and value loss of each part that this process
    computed; mask (B, T-1) is that of the whole minibatch. A process may have computed none, and a
    ratio may round to 0.
    """
    ratios = [mask[:0].float(), *[ratio.float() for ratio, _, _ in measured]]
    ratio = parallel.gather_rows(torch.cat(ratios), len(mask))[mask]                # (N,)
    losses = torch.zeros(2, device=mask.device)
    for _, pg_loss, vf_loss in measured:
        losses = losses + torch.stack([pg_loss, vf_loss])                           # (2,)
    losses = parallel.sum_tensor(losses)
    off = (ratio - 1).abs()                                                         # (N,)
    k3 = ratio - 1 - ratio.clamp(min=1e-30).log()        # (N,) estimates KL(old || new), never < 0
    figures = [k3.mean(), (off > cliprange).float().mean(), off.max(), ratio.max(), *losses]
    names = ("kl_old", "clipfrac", "ratio_off", "ratio_max", "pg_loss", "vf_loss")
    return {"tokens": len(ratio), **dict(zip(names, torch.stack(figures).tolist()))}


def summarise(steps: list[dict]) -> dict:
    """The metrics of an update: means over its tokens, and over its steps for `grad_norm`."""
    tokens = sum(step["tokens"] for step in steps)
    means = {name: sum(step[name] * step["tokens"] for step in steps) / tokens
             for name in ("kl_old", "clipfrac", "pg_loss", "vf_loss")}
    return {**means, "ratio_first": steps[0]["ratio_off"],
            "ratio_max": max(step["ratio_max"] for step in steps),
            "grad_norm": sum(step["grad_norm"] for step in steps) / len(steps)}


# ---- text ----------------------------------------------------------------------------------------

def describe_rollout(batch) -> str:
    """One line for each field of a rollout: shape, mean, min, max."""
    lines = []
    for field in fields(batch):
        x = getattr(batch, field.name)
        numbers = (x[batch.response_mask] if x.shape == batch.response_mask.shape else x).float()
        lines.append(f"{field.name:16} {str(tuple(x.shape)):12} mean {numbers.mean():9.3f}  "
                     f"min {numbers.min():9.3f}  max {numbers.max():9.3f}")
    return "Rollout (per-action figures: over response tokens)\n  " + "\n  ".join(lines)


def progress(row: dict, seconds: float) -> str:
    """One line about an iteration."""
    gold = f"gold {row['gold']:6.2f}  " if row["gold"] != "" else ""
    return (f"  iteration {row['iteration']:3d}  score {row['score']:6.2f}  {gold}kl_ref "
            f"{row['kl_ref']:5.2f}  entropy {row['entropy']:.2f}  clipfrac {row['clipfrac']:.2f}  "
            f"explained_var {row['explained_var']:5.2f}  length {row['response_len']:4.1f}  "
            f"{seconds:.1f} s")


def token_table(batch, row: int, tokenizer: Tokenizer) -> str:
    """One response, token by token, with all that PPO knows about it; totals below."""
    prompt = batch.ids[row, :batch.prompt_lengths[row]].tolist()
    columns = batch.response_mask[row].nonzero().squeeze(1).tolist()
    names = ("old_logprobs", "ref_logprobs", "kl_ref", "rewards", "old_values", "advantages",
             "returns")
    lines = [f"prompt: {tokenizer.decode(prompt)!r}   score {batch.scores[row]:.3f}",
             f"{'token':16}" + "".join(f"{name:>13}" for name in names)]
    for t in columns:
        text = repr(tokenizer.decode([int(batch.ids[row, t + 1])], skip_end=False))[1:-1]
        numbers = [f"{getattr(batch, name)[row, t]:13.3f}" for name in names]
        lines.append(f"{text:16}" + "".join(numbers))
    totals = [f"{getattr(batch, name)[row, columns].sum():13.3f}" for name in names[:4]]
    lines.append(f"{'sum':16}" + "".join(totals) + "   rewards: score - kl_coef * kl_ref")
    return "\n".join(lines)
