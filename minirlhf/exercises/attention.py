"""Exercises of lecture 1: attention, the KV cache, the activation."""

import math
import random

import torch
import torch.nn.functional as F

from minirlhf.exercises.exercise import Code, draw, tensor

# ---- attention -----------------------------------------------------------------------------------

def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one head: every position looks at itself and at what came before.

    q, k, v (T, hs) -> (T, hs): row t is the mean of v[0..t], weighted by the softmax of
    q[t] . k[s] / sqrt(hs) over s = 0..t.

    Example: hs = 1, q of zeros: all weights are equal, so v = 2, 4, 9 gives 2, 3, 5.
    """
    T, hs = q.shape
    scores = q @ k.T / math.sqrt(hs)                                                # (T, T)
    past = torch.ones(T, T, dtype=torch.bool).tril()                                # (T, T)
    weights = torch.where(past, scores, -math.inf).softmax(dim=1)                   # (T, T)
    return weights @ v                                                              # (T, hs)


def heads_case(rng: random.Random) -> tuple:
    """q, k, v."""
    return tuple(draw(rng, 3, 5, 4, scale=2.0))


def slow_attention(q, k, v):
    """One position at a time."""
    rows = []
    for t in range(len(q)):
        scores = [sum((q[t] * k[s]).tolist()) / math.sqrt(q.shape[1]) for s in range(t + 1)]
        total = sum(math.exp(score) for score in scores)
        rows.append(sum(math.exp(score) / total * v[s] for s, score in enumerate(scores)).tolist())
    return rows


def attention_to_all(q, k, v):
    """No mask."""
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v


def attention_masked_late(q, k, v):
    """The mask comes after the softmax."""
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(1).tril() @ v


def attention_unscaled(q, k, v):
    """Scores are not divided by sqrt(hs)."""
    return attention(q * math.sqrt(q.shape[1]), k, v)


def attention_by_size(q, k, v):
    """Scores are divided by hs."""
    return attention(q / math.sqrt(q.shape[1]), k, v)


def attention_to_zeros(q, k, v):
    """Scores of the future are 0 and not -inf."""
    return (q @ k.T / math.sqrt(q.shape[1])).tril().softmax(1) @ v


def attention_without_itself(q, k, v):
    """The mask hides the diagonal, too."""
    past = torch.ones(len(q), len(q), dtype=torch.bool).tril(-1)                    # (T, T)
    return torch.where(past, q @ k.T / math.sqrt(q.shape[1]), -math.inf).softmax(1) @ v


ATTENTION = Code(
    attention, 1, 25, "medium", "causal attention of one head",
    (tensor([0], [0], [0]), tensor([1], [2], [3]), tensor([2], [4], [9])),
    tensor([2], [3], [5]), heads_case, slow_attention,
    ((attention_to_all, "Your positions see the future. Nothing after t may change row t."),
     (attention_masked_late, "You mask after the softmax, so the weights that are left do not add "
      "up to 1. Set the scores of the future to -inf before it."),
     (attention_unscaled, "The scores are not divided by sqrt(hs)."),
     (attention_by_size, "The scores are divided by hs; it is its square root."),
     (attention_to_zeros, "Scores of the future are 0 in your version, and exp(0) is 1: they still "
      "get weight. Use -inf."),
     (attention_without_itself, "Your mask hides the diagonal, too. Row t looks at itself; without "
      "that row 0 has nothing to look at, and its softmax is NaN.")),
    "All scores at once are q @ k.T, (T, T). tril() keeps what is not in the future.",
    "A score of -inf has weight exp(-inf) = 0, and the softmax normalises over what is left. "
    "Dividing by sqrt(hs) keeps the scores' deviation near 1 when q and k have deviation 1, so "
    "that the softmax is not saturated from the start. Because no row looks to the right, padding "
    "on the right needs no mask of its own.")


# ---- cache_step ----------------------------------------------------------------------------------

def cache_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor,
               values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One new token with a KV cache, one head: its attention, and the cache with it in.

    q, k, v (hs,) of the new token; keys, values (T, hs) of the tokens so far
    -> attention (hs,), keys (T+1, hs), values (T+1, hs).

    Example: hs = 1, q 0, k 1, v 9, keys 1, 1 and values 2, 4: the attention is 5, the mean of
    2, 4, 9.
    """
    keys = torch.cat([keys, k[None]])                                               # (T+1, hs)
    values = torch.cat([values, v[None]])                                           # (T+1, hs)
    weights = (keys @ q / math.sqrt(len(q))).softmax(dim=0)                         # (T+1,)
    return weights @ values, keys, values


def cache_case(rng: random.Random) -> tuple:
    """A new token and a cache of four."""
    new, past = draw(rng, 3, 4), draw(rng, 2, 4, 4)
    return (*new, *past)


def slow_cache_step(q, k, v, keys, values):
    """The whole row again, of which the last position is kept."""
    keys, values = torch.stack([*keys, k]), torch.stack([*values, v])
    queries = torch.stack([q] * len(keys))
    return torch.tensor(slow_attention(queries, keys, values)[-1]), keys, values


def cache_step_before(q, k, v, keys, values):
    """The new token does not look at itself."""
    weights = (keys @ q / math.sqrt(len(q))).softmax(dim=0)
    return weights @ values, torch.cat([keys, k[None]]), torch.cat([values, v[None]])


def cache_step_in_front(q, k, v, keys, values):
    """The new column is the first."""
    keys, values = torch.cat([k[None], keys]), torch.cat([v[None], values])
    return (keys @ q / math.sqrt(len(q))).softmax(dim=0) @ values, keys, values


def cache_step_unscaled(q, k, v, keys, values):
    """Scores are not divided by sqrt(hs)."""
    return cache_step(q * math.sqrt(len(q)), k, v, keys, values)


def cache_step_forgotten(q, k, v, keys, values):
    """The cache is given back as it was."""
    return cache_step(q, k, v, keys, values)[0], keys, values


CACHE_STEP = Code(
    cache_step, 1, 20, "medium", "one step of sampling with a KV cache",
    (tensor(0), tensor(1), tensor(9), tensor([1], [1]), tensor([2], [4])),
    (tensor(5), tensor([1], [1], [1]), tensor([2], [4], [9])), cache_case, slow_cache_step,
    ((cache_step_before, "The new token does not see itself. Put its key and value into the cache "
      "first, then attend."),
     (cache_step_in_front, "The new key and value belong at the end of the cache: the order of "
      "columns is that of the tokens."),
     (cache_step_unscaled, "The scores are not divided by sqrt(hs)."),
     (cache_step_forgotten, "The attention is right, but the new key and value are not in the "
      "cache that you return: the next token would not see this one.")),
    "Append first, then it is one row of the attention exercise.",
    "Causality makes the cache exact. A later token never changes the keys and values of an "
    "earlier one, so they may be kept, and a new token costs one row of attention in place of T. "
    "No mask is needed: all that is in the cache is the past.")


# ---- gelu ----------------------------------------------------------------------------------------

def gelu(x: torch.Tensor) -> torch.Tensor:
    """GPT-2's activation, the tanh form of the GELU: any shape -> the same shape.

    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))

    Example: 0, 1, -1 give 0, 0.8412, -0.1588.
    Source: Hendrycks and Gimpel 2016 (arXiv 1606.08415), section 2.
    """
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def row_case(rng: random.Random) -> tuple:
    """Some numbers."""
    return (draw(rng, 6, scale=2.0),)


def slow_gelu(x):
    """PyTorch's own."""
    return F.gelu(x, approximate="tanh")


def exact_gelu(x):
    """The form with the error function."""
    return F.gelu(x)


def gelu_by_sigmoid(x):
    """The form with the sigmoid."""
    return x * torch.sigmoid(1.702 * x)


GELU = Code(
    gelu, 1, 5, "easy", "GPT-2's activation, in the form that its weights need",
    (tensor(0, 1, -1),), tensor(0, 0.841192, -0.158808), row_case, slow_gelu,
    ((exact_gelu, "This is the exact GELU, with the error function. GPT-2 was trained with the "
      "tanh form; with the exact one every logit is slightly off, and no curve shows it."),
     (gelu_by_sigmoid, "This is the sigmoid form, a coarser approximation than GPT-2's.")),
    "The formula is in the docstring; math.sqrt and torch.tanh are all that it takes.",
    "A network is its weights and its arithmetic. The two forms differ by less than 0.001, which "
    "a training curve does not show and a comparison with published logits does.")

EXERCISES = [ATTENTION, CACHE_STEP, GELU]
