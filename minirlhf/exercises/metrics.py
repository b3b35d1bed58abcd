"""Exercises of lectures 5 and 7: what PPO measures, and whether a policy got better."""

import math
import random

import torch

from minirlhf.exercises.exercise import Code, draw, draw_mask, ones, tensor

# ---- k3 ------------------------------------------------------------------------------------------


def k3(logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate, for every token, of KL(old || new), from tokens that the old policy sampled.

    logprobs, old_logprobs, any shape -> the same shape: ratio - 1 - log(ratio), with the ratio
    new over old. Never below 0, and right in the mean over samples of the old policy.

    Example: logprobs -1.6931, old -1: the ratio is 0.5 and the estimate 0.1931.
    Source: Schulman 2020, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html
    """
    log_ratio = logprobs - old_logprobs
    return log_ratio.exp() - 1 - log_ratio


def two_rows_case(rng: random.Random) -> tuple:
    """Log-probabilities of two policies."""
    return tuple(-draw(rng, 2, 2, 3).abs())


def slow_k3(logprobs, old_logprobs):
    """Token by token."""
    return [[math.exp(new) / math.exp(old) - 1 - (new - old) for new, old in zip(*rows)]
            for rows in zip(logprobs.tolist(), old_logprobs.tolist())]


def k3_inverted(logprobs, old_logprobs):
    """Old over new."""
    return k3(old_logprobs, logprobs)


def k1(logprobs, old_logprobs):
    """The plain difference."""
    return old_logprobs - logprobs


def k1_negated(logprobs, old_logprobs):
    """The plain difference, negated."""
    return logprobs - old_logprobs


def k2(logprobs, old_logprobs):
    """Half the square."""
    return (logprobs - old_logprobs) ** 2 / 2


K3 = Code(
    k3, 5, 10, "easy", "estimate a KL from samples",
    (tensor([-1 - math.log(2)]), tensor([-1])), tensor([math.log(2) - 0.5]), two_rows_case,
    slow_k3,
    ((k3_inverted, "The ratio is upside down: it is new over old. Yours is plausible and never "
      "negative, and its mean is no KL."),
     (k1, "This is k1. Its mean is right, too, but single values may be negative and vary much "
      "more."),
     (k1_negated, "This is k1 with the wrong sign."),
     (k2, "This is k2, half the square: close to it for small steps, and biased.")),
    "log(ratio) is a difference that you have already.",
    "-log(ratio) alone, k1, has the right mean. ratio - 1 has mean 0 under the old policy, since "
    "probabilities add up to 1; adding it removes most of the noise. x - 1 - log(x) is never "
    "negative, because the logarithm lies below its tangent at 1.")


# ---- entropy -------------------------------------------------------------------------------------

def entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy of each distribution, in nats.

    logprobs (N, V), every row a distribution over the vocabulary -> (N,).

    Example: two tokens with probability 1/2 each give 0.6931.
    """
    return -(logprobs.exp() * logprobs).sum(dim=1)                                  # (N,)


def distributions_case(rng: random.Random) -> tuple:
    """Four distributions over five tokens."""
    return (draw(rng, 4, 5, scale=2.0).log_softmax(1),)


def slow_entropy(logprobs):
    """Token by token."""
    return [-sum(math.exp(x) * x for x in row) for row in logprobs.tolist()]


def entropy_of_means(logprobs):
    """Minus the mean log-probability."""
    return -logprobs.mean(dim=1)


def entropy_negative(logprobs):
    """The sign is missing."""
    return -entropy(logprobs)


def entropy_divided(logprobs):
    """A mean in place of a sum."""
    return -(logprobs.exp() * logprobs).mean(dim=1)


def entropy_in_bits(logprobs):
    """Logarithms to base 2."""
    return entropy(logprobs) / math.log(2)


ENTROPY = Code(
    entropy, 5, 10, "easy", "how much choice is left?", (tensor([0.5, 0.5]).log(),),
    tensor(math.log(2)), distributions_case, slow_entropy,
    ((entropy_of_means, "This is minus the mean log-probability, in which every token counts the "
      "same. In the entropy a token counts as often as it is sampled: by its probability."),
     (entropy_negative, "The sign is missing: an entropy is never negative."),
     (entropy_divided, "Sum over the vocabulary. The probabilities are the weights of the mean "
      "already."),
     (entropy_in_bits, "These are bits; the project counts in nats.")),
    "The expectation of -log p under p itself.",
    "Minus the log-probability of the sampled token has the entropy as its mean over samples. As "
    "a metric it is noisy. As a bonus in the loss it does not work: its gradient pushes down "
    "whatever was sampled, and its mean over samples is 0. The exact sum over the vocabulary costs "
    "little, as the logits are there.")


# ---- explained_variance --------------------------------------------------------------------------

def explained_variance(values: torch.Tensor, returns: torch.Tensor,
                       mask: torch.Tensor) -> torch.Tensor:
    """The share of the variance of the returns that the critic foresaw: 1 perfect, 0 useless.

    values, returns (B, T-1), mask (B, T-1) bool -> 1 - Var(returns - values) / Var(returns), over
    the entries in the mask.

    Example: returns 1, 3 and values 1, 2 give 0.75.
    """
    errors = (returns - values)[mask]                                               # (N,)
    return 1 - errors.var(unbiased=False) / returns[mask].var(unbiased=False)


def critic_case(rng: random.Random) -> tuple:
    """Values that are half right, and junk outside the mask."""
    mask, returns = draw_mask(rng), draw(rng, 3, 6)
    return returns / 2 + draw(rng, 3, 6, scale=0.5) + 1, returns, mask


def slow_explained_variance(values, returns, mask):
    """Plain lists."""
    pairs = [(r - v, r) for v, r in zip(values[mask].tolist(), returns[mask].tolist())]
    squares = []
    for numbers in zip(*pairs):
        mean = sum(numbers) / len(numbers)
        squares.append(sum((x - mean) ** 2 for x in numbers))
    return 1 - squares[0] / squares[1]


def explained_everywhere(values, returns, mask):
    """Padding counts."""
    return explained_variance(values, returns, torch.ones_like(mask))


def unexplained(values, returns, mask):
    """1 minus it."""
    return 1 - explained_variance(values, returns, mask)


def explained_squares(values, returns, mask):
    """The square error in place of its variance."""
    return 1 - ((returns - values)[mask] ** 2).mean() / returns[mask].var(unbiased=False)


def explained_by_values(values, returns, mask):
    """The variance of the values."""
    return values[mask].var(unbiased=False) / returns[mask].var(unbiased=False)


EXPLAINED = Code(
    explained_variance, 5, 10, "easy", "is the critic any good?",
    (tensor([1, 2]), tensor([1, 3]), ones(1, 2)), 0.75, critic_case, slow_explained_variance,
    ((explained_everywhere, "Prompt and padding are among your numbers: use the mask."),
     (unexplained, "This is the share that the critic did not foresee."),
     (explained_squares, "You take the mean square of the errors and not their variance, so that a "
      "critic that is off by a constant looks worse than it is."),
     (explained_by_values, "This says how much the values vary, not whether they are right.")),
    "tensor[mask] is one row of the entries that count.",
    "With lambda 1 a constant error of the critic is taken away again by the whitening, so it is "
    "the variance of the error that counts. Below 0 the critic is worse than a constant.")


# ---- win_rate_with_interval ----------------------------------------------------------------------

def win_rate_with_interval(scores_a: torch.Tensor,
                           scores_b: torch.Tensor) -> tuple[float, float, float]:
    """How often b beats a, with a 95 % interval: (mean, low, high).

    scores_a, scores_b (P, K): K answers of each policy to the same P prompts. Within a prompt every
    answer of b meets every answer of a; the higher score wins, a tie counts half. A prompt's rate
    is the mean over its K * K pairs. The interval is mean +- 1.96 * s / sqrt(P), with s the
    standard deviation of the P rates (divisor P - 1).

    Example: scores_a 1, 2 and 0, 0, scores_b 2, 3 and 0, 0: the rates are 0.875 and 0.5, their mean
    0.6875, the interval 0.3200 to 1.0550.
    """
    margins = scores_b[:, None, :] - scores_a[:, :, None]                           # (P, K, K)
    rates = ((margins > 0).double() + 0.5 * (margins == 0).double()).mean(dim=(1, 2))   # (P,)
    mean, reach = rates.mean().item(), 1.96 * rates.std().item() / math.sqrt(len(rates))
    return mean, mean - reach, mean + reach


def scores_case(rng: random.Random) -> tuple:
    """Whole scores, so that there are ties; prompts differ in difficulty."""
    hard = draw(rng, 8, 1)
    return (2 * hard + draw(rng, 8, 3)).round(), (3 * hard + draw(rng, 8, 3)).round()


def slow_win_rate(scores_a, scores_b):
    """Pair by pair."""
    rates = []
    for row_a, row_b in zip(scores_a.tolist(), scores_b.tolist()):
        won = [1.0 if b > a else 0.5 if b == a else 0.0 for a in row_a for b in row_b]
        rates.append(sum(won) / len(won))
    mean = sum(rates) / len(rates)
    deviation = math.sqrt(sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1))
    reach = 1.96 * deviation / math.sqrt(len(rates))
    return mean, mean - reach, mean + reach


def around(rates, count):
    """Mean and interval of rates, as if there were `count` of them."""
    mean, reach = rates.mean().item(), 1.96 * rates.std().item() / math.sqrt(count)
    return mean, mean - reach, mean + reach


def wins_without_ties(scores_a, scores_b):
    """Ties are lost."""
    return around((scores_b[:, None] > scores_a[..., None]).double().mean((1, 2)), len(scores_a))


def wins_of_neighbours(scores_a, scores_b):
    """Answer k meets answer k only."""
    won = (scores_b > scores_a).double() + 0.5 * (scores_b == scores_a).double()
    return around(won.mean(1), len(won))


def wins_as_if_independent(scores_a, scores_b):
    """All pairs are taken for independent."""
    margins = scores_b[:, None] - scores_a[..., None]
    won = (margins > 0).double() + 0.5 * (margins == 0).double()
    return around(won.flatten(), won.numel())


def wins_of_a(scores_a, scores_b):
    """a over b."""
    return win_rate_with_interval(scores_b, scores_a)


def wins_without_root(scores_a, scores_b):
    """The deviation of single prompts."""
    mean, low, high = win_rate_with_interval(scores_a, scores_b)
    root = math.sqrt(len(scores_a))
    return mean, mean - root * (mean - low), mean + root * (high - mean)


WIN_RATE = Code(
    win_rate_with_interval, 7, 25, "hard", "did it get better, and how sure are we?",
    (tensor([1, 2], [0, 0]), tensor([2, 3], [0, 0])), (0.6875, 0.32, 1.055), scores_case,
    slow_win_rate,
    ((wins_without_ties, "Ties count as lost in your version; they count half, or a policy would "
      "lose against itself."),
     (wins_of_neighbours, "You compare answer k with answer k only. Every answer of b meets every "
      "answer of a: the same samples, and less noise."),
     (wins_as_if_independent, "Your interval is too narrow: it takes the K * K pairs of one prompt "
      "for independent. The unit is the prompt."),
     (wins_of_a, "This is how often a beats b."),
     (wins_without_root, "This is where single prompts lie. The interval of a mean is smaller by "
      "the square root of their number.")),
    "Margins (P, K, K) by broadcasting; one rate per prompt; then forget the answers.",
    "Answers to one prompt are alike: an easy prompt is easy for all K. So what was drawn "
    "independently is the prompt, and the interval is over prompts. The project's evaluate.py "
    "draws prompts again with replacement (the bootstrap) in place of 1.96 deviations, which also "
    "keeps the interval within 0 and 1.")

EXERCISES = [K3, ENTROPY, EXPLAINED, WIN_RATE]
