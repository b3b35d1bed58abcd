"""What the steps of all trainers share: random streams, batches, masked statistics, the optimiser.

The parts that belong to one stage (its loop, its optimiser line, its evaluation) are repeated in
that stage on purpose; what must not drift apart is here.
"""

import math

import torch

from minirlhf.engine import parallel
from minirlhf.engine.options import check

# ---- randomness --------------------------------------------------------------------------------

def random_stream(seed: int, *counters: int) -> torch.Generator:
    """A generator that depends on `seed` and `counters` (epoch, iteration, ...) and nothing else.

    Every random choice of a trainer comes from a stream named by its place in the run. So a run
    can be taken up at any iteration without a saved random state. Seeds that differ by a multiple
    of 2**32 give the same streams: PyTorch's CPU generator uses no more bits.

    Example: torch.rand(1, generator=random_stream(0, 1, 2)) is the same number in every run.
    """
    mixed = seed % (1 << 62)
    for counter in counters:
        mixed = (mixed * 6364136223846793005 + counter + 1442695040888963407) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def batch_order(total: int, batch_size: int, seed: int, step: int,
                whole: bool = False) -> list[int]:
    """The row numbers of the batch at `step`: every row once in each epoch, in shuffled order.

    The last batch of an epoch is smaller when `batch_size` does not divide `total`; with `whole`
    it is left out.
    Example: 10 rows in batches of 4: steps 0, 1, 2 have 4, 4 and 2 rows; step 3 begins epoch 1.
    """
    batches = total // batch_size if whole else math.ceil(total / batch_size)
    epoch, position = divmod(step, batches)
    order = torch.randperm(total, generator=random_stream(seed, 0, epoch))          # (total,)
    return order[position * batch_size:(position + 1) * batch_size].tolist()


# ---- masked statistics --------------------------------------------------------------------------

def masked_mean(x: torch.Tensor, mask: torch.Tensor, count: int | None = None) -> torch.Tensor:
    """Mean of `x` where `mask` is 1, over the whole tensor: a 0-dimensional tensor.

    With `count` the sum is divided by that: when `x` is a part of a step (of several that are
    computed one after another, or by several processes) and `count` the number of entries in the
    whole step, the parts' means add up to the mean of the step. An empty mask gives nan, which
    `check_finite` stops.

    Example: masked_mean([1., 3., 9.], [1, 1, 0]) == 2, with count 4 it is 1.
    """
    # careful: a product with the mask would let inf or nan at masked entries through
    kept = torch.where(mask > 0, x, 0.0)
    return kept.sum() / ((mask > 0).sum() if count is None else count)


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Shift and scale `x` to mean 0 and standard deviation 1 over `mask`; 0 elsewhere.

    The variance is the biased one, as in Ziegler et al. 2019. A single entry, or entries that are
    all equal, become 0 (the 1e-8 keeps the division finite).

    Example: whiten([1., 3., 9.], [1, 1, 0]) == [-1., 1., 0.].
    Source: openai/lm-human-preferences, lm_human_preferences/utils/core.py, whiten.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return torch.where(mask > 0, (x - mean) * torch.rsqrt(variance + 1e-8), 0.0)


# ---- optimisation -------------------------------------------------------------------------------

def learning_rate(step: int, total_steps: int, peak: float, warmup_steps: int,
                  schedule: str) -> float:
    """Learning rate at `step` (from 0): linear warm-up to `peak`, then `schedule` down to 0.

    `schedule` is constant, linear or cosine. The rate would be 0 at step `total_steps`, the first
    that is not made.

    Example: total 10, warm-up 2, linear: steps 0, 1, 2, 6 give 0.5, 1.0, 1.0, 0.5 times the peak.
    """
    check(schedule in ("constant", "linear", "cosine"), f"the learning-rate schedule is "
          f"{schedule!r}, expected constant, linear or cosine")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))     # 0 .. 1
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total_steps: int,
                      warmup_steps: int, schedule: str) -> None:
    """Set the rate of each group of parameters for `step`, from the group's `peak`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total_steps, group["peak"], warmup_steps, schedule)


def check_finite(where: str, rows: list[int] | torch.Tensor | None = None, /, **tensors) -> None:
    """Stop with `FloatingPointError` at the first value that is NaN or infinite.

    `rows` are the numbers in the batch of the tensors' rows, when they hold a part of it.
    Example: check_finite("iteration 3", scores=tensor([0., nan])) says "scores is not finite at
    iteration 3, index [1]: nan; ...".
    """
    if torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).all():
        return                                           # asked once: each answer waits for a GPU
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if torch.isfinite(tensor).all():
            continue
        index = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        value = tensor[tuple(index)].item()
        if rows is not None and index:
            index[0] = int(rows[index[0]])
        place = f", index {index}" if index else ""
        raise FloatingPointError(f"{name} is not finite at {where}{place}: {value}; look at the "
                                 "data and the reward, or lower the learning rate, and start again")


def check_frozen(*networks: torch.nn.Module) -> None:
    """Our own invariant: no gradient ever reaches a network that is not trained."""
    for network in networks:
        for name, weights in network.named_parameters():
            assert weights.grad is None, f"a frozen network received a gradient: {name}"


def clip_gradients(networks: torch.nn.Module, max_norm: float, where: str) -> float:
    """Scale the gradients of all parameters so that their joint norm is at most `max_norm`.

    Returns the norm before. Raises: `FloatingPointError` naming the first gradient that is not
    finite.
    """
    try:
        norm = torch.nn.utils.clip_grad_norm_(networks.parameters(), max_norm,
                                              error_if_nonfinite=True)
    except RuntimeError as error:
        if "non-finite" not in str(error):
            raise                                        # a device error, say: no overflow
        for name, parameter in networks.named_parameters():
            if parameter.grad is not None:
                check_finite(where, **{f"gradient of {name}": parameter.grad})
        raise FloatingPointError(f"gradient norm overflows at {where}; lower the learning "
                                 "rate") from None
    return norm.item()


def optimiser_step(networks: torch.nn.Module, optimizer: torch.optim.Optimizer, max_norm: float,
                   where: str) -> float:
    """Add up the gradients of all processes, clip them, take one step; returns the norm before.

    careful: the clip comes after the sum and covers all that the optimiser owns.
    """
    parallel.add_gradients(networks.parameters())
    grad_norm = clip_gradients(networks, max_norm, where)
    optimizer.step()
    return grad_norm
