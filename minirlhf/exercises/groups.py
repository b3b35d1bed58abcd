"""Exercises of lecture 9: advantages of groups, DPO, best of n."""

import math
import random
from itertools import combinations

import torch
import torch.nn.functional as F

from minirlhf.exercises.exercise import Code, draw, tensor

# ---- rloo_advantages -----------------------------------------------------------------------------

def rloo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """RLOO: how much better each response is than the mean of the others to its prompt.

    rewards (P, k), k responses to each of P prompts -> advantages (P, k).

    Example: rewards 3, 1, 0, 0 give 2.6667, 0, -1.3333, -1.3333.
    Source: Ahmadian et al. 2024 (arXiv 2402.14740), section 3.
    """
    others = rewards.sum(dim=1, keepdim=True) - rewards                             # (P, k)
    return rewards - others / (rewards.shape[1] - 1)                                # (P, k)


def group_case(rng: random.Random) -> tuple:
    """Two groups of four, one of them of equal rewards."""
    rewards = draw(rng, 2, 4)
    rewards[1] = rng.choice([0.0, 1.0, 0.1])
    return (rewards,)


def slow_rloo(rewards):
    """One response at a time."""
    return [[row[i] - sum(row[:i] + row[i + 1:]) / (len(row) - 1) for i in range(len(row))]
            for row in rewards.tolist()]


def rloo_with_itself(rewards):
    """The baseline holds the response itself."""
    return rewards - rewards.mean(dim=1, keepdim=True)


def rloo_of_the_batch(rewards):
    """The baseline is over all prompts."""
    return rewards - rewards.mean()


def rloo_divided(rewards):
    """Divided by k in place of k - 1."""
    k = rewards.shape[1]
    return rewards - (rewards.sum(dim=1, keepdim=True) - rewards) / k


RLOO = Code(
    rloo_advantages, 9, 10, "easy", "a baseline without a critic", (tensor([3, 1, 0, 0]),),
    tensor([8 / 3, 0, -4 / 3, -4 / 3]), group_case, slow_rloo,
    ((rloo_with_itself, "Your baseline contains the response itself. Its expected gradient is "
      "(k-1)/k of the right one: leave the response out."),
     (rloo_of_the_batch, "Your baseline mixes prompts: an easy prompt would look like a good "
      "answer. Take the mean within a group."),
     (rloo_divided, "There are k - 1 others.")),
    "The sum of the others is the sum of all minus your own.",
    "A baseline may be anything that does not depend on the action. The other responses to the "
    "prompt do not, so their mean is allowed and is a good guess of the value; the response itself "
    "does.")


# ---- grpo_advantages -----------------------------------------------------------------------------

def grpo_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """GRPO: rewards of each group, shifted to mean 0 and scaled to deviation 1.

    rewards (P, k) -> advantages (P, k). The deviation has the divisor k - 1. A group whose rewards
    are all equal says nothing: its advantages are exactly 0.

    Example: rewards 1, 0, 0 give 1.1547, -0.5774, -0.5774; rewards 1, 1, 1 give 0, 0, 0.
    Source: Shao et al. 2024 (arXiv 2402.03300), section 4.1.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)                           # (P, k)
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)                    # (P, 1)
    return torch.where(equal, 0.0, centred / rewards.std(dim=1, keepdim=True))      # (P, k)


def slow_grpo(rewards):
    """One group at a time."""
    rows = []
    for row in rewards.tolist():
        mean = sum(row) / len(row)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))
        rows.append([0.0 if min(row) == max(row) else (x - mean) / deviation for x in row])
    return rows


def grpo_of_nothing(rewards):
    """Equal rewards are divided by their deviation, 0 or what rounding leaves of it."""
    return (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)


def grpo_biased(rewards):
    """The divisor k."""
    k = rewards.shape[1]
    return grpo_advantages(rewards) * math.sqrt(k / (k - 1))


def grpo_of_the_batch(rewards):
    """One mean and deviation for all prompts."""
    return (rewards - rewards.mean()) / rewards.std()


GRPO = Code(
    grpo_advantages, 9, 15, "medium", "advantages by the deviation of a group",
    (tensor([1, 0, 0], [1, 1, 1]),), tensor([4 / 3, -2 / 3, -2 / 3], [0, 0, 0]) * math.sqrt(0.75),
    group_case, slow_grpo,
    ((grpo_of_nothing, "A group of equal rewards has deviation 0, and 0 / 0 is nan. Such a group "
      "says nothing: its advantages are 0."),
     (rloo_with_itself, "These are Dr. GRPO's advantages; GRPO divides by the deviation, too."),
     (grpo_biased, "Your deviation has the divisor k. Papers do not say; the project takes k - 1, "
      "as TRL does, and with k = 2 the two differ by 41 %."),
     (grpo_of_the_batch, "Mean and deviation are those of a group, not of the batch.")),
    "torch.where with a mask of the groups whose rewards are all equal.",
    "The division makes a small difference within a group as loud as a large one: with k = 2 every "
    "pair gives +-0.7071, whatever the gap. So its mean gradient is not that of the expected "
    "reward. Comparing with the first reward is exact; std() of equal numbers need not be 0, for "
    "their mean is rounded.")


# ---- dpo_loss ------------------------------------------------------------------------------------

def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor,
             ref_rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """DPO: Bradley-Terry on beta times the log-ratio to the reference.

    Log-probabilities of whole responses (sums over their tokens), under the policy: chosen,
    rejected (B,), and under the reference: ref_chosen, ref_rejected (B,) -> the mean loss ().

    Example: policy -3 and -5, reference -4 and -4, beta 0.1: the log-ratios differ by 2, the loss
    is 0.5981. At the start, with policy and reference equal, it is log 2 = 0.6931.
    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)                     # (B,)
    return -F.logsigmoid(beta * margins).mean()


def dpo_case(rng: random.Random) -> tuple:
    """Four comparisons."""
    return (*(-3 * draw(rng, 4, 4).abs()), rng.uniform(0.1, 0.5))


def slow_dpo(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Comparison by comparison."""
    losses = [math.log1p(math.exp(-beta * ((w - rw) - (r - rr)))) for w, r, rw, rr
              in zip(*(x.tolist() for x in (chosen, rejected, ref_chosen, ref_rejected)))]
    return sum(losses) / len(losses)


def dpo_without_reference(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The reference is not used."""
    return dpo_loss(chosen, rejected, 0 * ref_chosen, 0 * ref_rejected, beta)


def dpo_turned_round(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The rejected response is preferred."""
    return dpo_loss(rejected, chosen, ref_rejected, ref_chosen, beta)


def dpo_beta_outside(chosen, rejected, ref_chosen, ref_rejected, beta):
    """beta in front of the loss."""
    return beta * dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 1.0)


def dpo_at_1(chosen, rejected, ref_chosen, ref_rejected, beta):
    """beta is not used."""
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 1.0)


def dpo_reference_added(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The reference has the wrong sign."""
    return dpo_loss(chosen, rejected, -ref_chosen, -ref_rejected, beta)


DPO = Code(
    dpo_loss, 9, 15, "medium", "comparisons without a reward model",
    (tensor(-3), tensor(-5), tensor(-4), tensor(-4), 0.1), 0.598139, dpo_case, slow_dpo,
    ((dpo_without_reference, "The reference is missing: a response that is likely under both "
      "would count as preferred."),
     (dpo_reference_added, "The reference has the wrong sign: the log-ratio is log policy minus "
      "log reference."),
     (dpo_turned_round, "Chosen and rejected have changed places."),
     (dpo_beta_outside, "beta belongs into the sigmoid, not in front of the loss."),
     (dpo_at_1, "beta is not used.")),
    "Bradley-Terry with beta * log(policy / reference) as the score.",
    "Solve the optimum policy = reference * exp(score / beta) / Z for the score, put it into the "
    "Bradley-Terry loss, and Z cancels, because both responses belong to the same prompt. What is "
    "left needs log-probabilities only. The sums are over response tokens, end token included.",
    (0, 1))


# ---- best_of_n -----------------------------------------------------------------------------------

def best_of_n(proxy: torch.Tensor, gold: torch.Tensor, n: int) -> float:
    """Expected gold of the best of n by the proxy, from N >= n responses to one prompt.

    proxy, gold (N,), no two proxy scores equal -> the mean of gold over all sets of n of the N
    responses, of each set at the largest proxy.

    Example: proxy .1 .4 .7 .9, gold 1 3 2 0: n = 1, 2, 3, 4 give 1.5, 1.1667, 0.5, 0.
    Source: OpenAI 2022, "Measuring Goodhart's law", openai.com/research/measuring-goodharts-law
    """
    N, ordered = len(proxy), gold[proxy.argsort()].tolist()
    # the i-th smallest of N is the best of a set if the other n - 1 are among the i - 1 below it
    return sum(math.comb(i, n - 1) * value for i, value in enumerate(ordered)) / math.comb(N, n)


def drawn_case(rng: random.Random) -> tuple:
    """Six responses."""
    return draw(rng, 6), draw(rng, 6), rng.randint(2, 5)


def slow_best_of_n(proxy, gold, n):
    """Every set."""
    best = [max(chosen, key=lambda i: proxy[i].item())
            for chosen in combinations(range(len(proxy)), n)]
    return sum(gold[i].item() for i in best) / len(best)


def best_by_gold(proxy, gold, n):
    """Chosen by gold."""
    return best_of_n(gold, gold, n)


def best_of_the_first(proxy, gold, n):
    """One set only."""
    return gold[:n][proxy[:n].argmax()].item()


def best_with_replacement(proxy, gold, n):
    """A response may be drawn twice."""
    N, ordered = len(proxy), gold[proxy.argsort()].tolist()
    return sum(value * ((i + 1) ** n - i ** n) for i, value in enumerate(ordered)) / N ** n


def worst_of_n(proxy, gold, n):
    """The smallest proxy."""
    return best_of_n(-proxy, gold, n)


BEST_OF_N = Code(
    best_of_n, 9, 25, "hard", "optimisation pressure without training",
    (tensor(0.1, 0.4, 0.7, 0.9), tensor(1, 3, 2, 0), 2), 7 / 6, drawn_case, slow_best_of_n,
    ((best_by_gold, "You choose by gold. The proxy chooses, and gold only judges: that is the "
      "point."),
     (best_of_the_first, "You take one set of n. The mean over all sets uses all N responses and "
      "has much less noise."),
     (best_with_replacement, "You draw with replacement, so that a response may meet itself."),
     (worst_of_n, "You take the smallest proxy.")),
    "Sort by proxy. In how many sets of n is the i-th smallest the best?",
    "The i-th smallest (from 0) is the best of a set if the other n - 1 come from the i below it: "
    "comb(i, n-1) sets of comb(N, n). So one drawing of N gives the curve for every n. When it "
    "turns down, the proxy is over-optimised.")

EXERCISES = [RLOO, GRPO, DPO, BEST_OF_N]
