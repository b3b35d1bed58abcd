"""Exercises of lecture 4: the KL penalty, in the rewards, with a target, and at its optimum."""

import math
import random

import torch

from minirlhf.exercises.exercise import Code, draw, draw_mask, ones, tensor
from minirlhf.museum import mistakes
from minirlhf.ppo import shaped_rewards
from minirlhf.rewards import adapt_kl_coef

# ---- shaped_rewards ------------------------------------------------------------------------------


def rewards_case(rng: random.Random) -> tuple:
    """Scores, kl_ref with junk outside the mask, mask, coefficient."""
    mask = draw_mask(rng)
    return draw(rng, 3), draw(rng, *mask.shape), mask, rng.uniform(0.1, 1)


def slow_rewards(scores, kl_ref, mask, kl_coef):
    """Token by token."""
    rows = []
    for score, kls, marks in zip(scores.tolist(), kl_ref.tolist(), mask.tolist()):
        row = [-kl_coef * kl if counts else 0.0 for kl, counts in zip(kls, marks)]
        row[max(t for t, counts in enumerate(marks) if counts)] += score
        rows.append(row)
    return rows


def score_everywhere(scores, kl_ref, mask, kl_coef):
    """Every token gets the score."""
    return torch.where(mask, scores[:, None] - kl_coef * kl_ref, 0.0)


def score_at_the_edge(scores, kl_ref, mask, kl_coef):
    """The score stands in the last column of the row."""
    rewards = torch.where(mask, -kl_coef * kl_ref, 0.0)
    rewards[:, -1] += scores
    return rewards


def score_alone(scores, kl_ref, mask, kl_coef):
    """No penalty."""
    return shaped_rewards(scores, kl_ref, mask, 0.0)


def penalty_outside(scores, kl_ref, mask, kl_coef):
    """Prompt and padding pay, too."""
    return shaped_rewards(scores, 0 * kl_ref, mask, 0.0) - kl_coef * kl_ref


SHAPED_REWARDS = Code(
    shaped_rewards, 4, 20, "medium", "a score and a KL become rewards of tokens",
    (tensor(1), tensor([0.5, -0.2, 0.3]), ones(1, 3), 0.1), tensor([-0.05, 0.02, 0.97]),
    rewards_case, slow_rewards,
    ((mistakes.score_one_too_late, "The score is one column late: the last action is the last "
      "column of the mask. One further nothing reads it."),
     (score_at_the_edge, "You put the score into the last column of the row, which is padding in "
      "all rows but the longest."),
     (score_everywhere, "Every token gets the score in your version, so long responses are paid "
      "more. It is paid once, with the last action."),
     (mistakes.penalty_with_the_wrong_sign, "The penalty has the wrong sign: leaving the reference "
      "is paid for."),
     (mistakes.penalty_counted_twice, "The penalty is counted twice: token by token, and in the "
      "score again."),
     (mistakes.penalty_of_the_batch, "Your penalty is one number for the whole batch. All "
      "responses pay the same, so it changes nothing: every token must pay its own."),
     (score_alone, "kl_coef changes nothing in your version."),
     (penalty_outside, "Prompt and padding pay a penalty, too: use the mask.")),
    "torch.where(mask, ..., 0.0) first. To find the last action, take the largest column number "
    "that is in the mask.",
    "The logarithm of a response's probability is a sum over its tokens, so the KL penalty splits "
    "into tokens by itself and each pays its own. Of the score no token's share is known: it is "
    "paid when the response is complete. The sum of a row is score - kl_coef * kl_ref, which PPO "
    "checks in every run.")


# ---- adapt_kl_coef -------------------------------------------------------------------------------

def controller_case(rng: random.Random) -> tuple:
    """Within the cut and beyond it."""
    return 0.1, rng.choice([1.0, 5.5, 6.5, 20.0]), 6.0, rng.choice([64, 512]), 10_000.0


def slow_controller(kl_coef, kl_ref, target, responses, horizon):
    """With ifs."""
    error = (kl_ref - target) / target
    if error > 0.2:
        error = 0.2
    if error < -0.2:
        error = -0.2
    return kl_coef + kl_coef * error * responses / horizon


def controller_backwards(kl_coef, kl_ref, target, responses, horizon):
    """The coefficient falls when the KL is too large."""
    return 2 * kl_coef - adapt_kl_coef(kl_coef, kl_ref, target, responses, horizon)


def controller_uncut(kl_coef, kl_ref, target, responses, horizon):
    """The error is not cut."""
    return kl_coef * (1 + (kl_ref / target - 1) * responses / horizon)


def controller_at_once(kl_coef, kl_ref, target, responses, horizon):
    """The horizon is not used."""
    return adapt_kl_coef(kl_coef, kl_ref, target, 1, 1.0)


ADAPT = Code(
    adapt_kl_coef, 4, 10, "easy", "the penalty's weight follows a target",
    (0.1, 9.0, 6.0, 64, 10_000.0), 0.100128, controller_case, slow_controller,
    ((controller_backwards, "The coefficient goes the wrong way: too much KL needs a larger one."),
     (controller_uncut, "The error is to be cut to -0.2 .. 0.2."),
     (controller_at_once, "The horizon is not used: one rollout would move the coefficient by up "
      "to 20 %.")),
    "The error is kl_ref / target - 1.",
    "A proportional controller on the logarithm of the coefficient: each response moves it by at "
    "most 0.2 / horizon of itself. The cut keeps one strange rollout from moving it far.")


# ---- best_policy ---------------------------------------------------------------------------------


def best_policy(reference: torch.Tensor, scores: torch.Tensor, beta: float) -> torch.Tensor:
    """The policy with the largest E[score] - beta * KL(policy || reference).

    reference (N,), probabilities of all N responses to one prompt, scores (N,) -> (N,): the
    reference, reweighted by exp(score / beta) and normalised.

    Example: reference 0.8, 0.2, scores 0, 1 and beta 0.5 give 0.3512, 0.6488.
    """
    weights = reference.log() + scores / beta                                       # (N,)
    return weights.softmax(dim=0)


def bandit_case(rng: random.Random) -> tuple:
    """Four responses."""
    return draw(rng, 4).softmax(0), draw(rng, 4), rng.uniform(0.3, 2)


def slow_best_policy(reference, scores, beta):
    """One response at a time."""
    weights = [p * math.exp(s / beta) for p, s in zip(reference.tolist(), scores.tolist())]
    return [weight / sum(weights) for weight in weights]


def best_times_beta(reference, scores, beta):
    """Scores are multiplied by beta."""
    return best_policy(reference, scores, 1 / beta)


def best_without_reference(reference, scores, beta):
    """The optimum with an entropy bonus."""
    return (scores / beta).softmax(0)


def best_unnormalised(reference, scores, beta):
    """Does not add up to 1."""
    return reference * (scores / beta).exp()


BEST_POLICY = Code(
    best_policy, 4, 10, "easy", "where does PPO go, if it can?",
    (tensor(0.8, 0.2), tensor(0, 1), 0.5),
    tensor(0.8, 0.2 * math.exp(2)) / (0.8 + 0.2 * math.exp(2)), bandit_case, slow_best_policy,
    ((best_times_beta, "Scores are divided by beta: a large beta keeps the policy near the "
      "reference."),
     (best_without_reference, "The reference is missing. This is the optimum of an entropy bonus."),
     (best_unnormalised, "Probabilities add up to 1: divide by the sum.")),
    "In logarithms: log reference + score / beta, then softmax.",
    "Put score = beta * log(best / reference) + constant into the objective: it becomes a constant "
    "minus beta * KL(policy || best), which is largest at policy = best. Softmax of logarithms is "
    "the same as weighing and dividing, and does not overflow for small beta.")

EXERCISES = [SHAPED_REWARDS, ADAPT, BEST_POLICY]
