"""Exercises of lecture 4: advantages, and the two losses of PPO."""

import math
import random

import torch

from minirlhf.engine.training import masked_mean, whiten
from minirlhf.exercises.exercise import Code, draw, draw_mask, ones, tensor
from minirlhf.museum import mistakes
from minirlhf.ppo import gae, policy_loss, value_loss

# ---- gae -----------------------------------------------------------------------------------------

def gae_case(rng: random.Random) -> tuple:
    """Rewards, values, mask, gamma and lam; junk outside the mask."""
    mask = draw_mask(rng)
    return draw(rng, 3, 6), draw(rng, 3, 6), mask, rng.uniform(0.5, 1), rng.uniform(0.3, 0.95)


def slow_gae(rewards, values, mask, gamma, lam):
    """By the definition, a sum over all later tokens."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(mask)):
        columns = mask[b].nonzero().squeeze(1).tolist()
        v = [values[b, t].item() for t in columns] + [0.0]
        errors = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(columns)]
        for i, t in enumerate(columns):
            advantages[b, t] = sum((gamma * lam) ** n * e for n, e in enumerate(errors[i:]))
            returns[b, t] = advantages[b, t] + v[i]
    return advantages, returns


def gae_from_the_left(rewards, values, mask, gamma, lam):
    """Advantages gather what came before."""
    flipped = gae(rewards.flip(1), values.flip(1), mask.flip(1), gamma, lam)
    return flipped[0].flip(1), flipped[1].flip(1)


def gae_without_mask(rewards, values, mask, gamma, lam):
    """The padding's rewards and values count."""
    return gae(rewards, values, torch.ones_like(mask), gamma, lam)


def gae_masked_at_the_end(rewards, values, mask, gamma, lam):
    """The result is masked, what goes in is not."""
    return tuple(x * mask for x in gae(rewards, values, torch.ones_like(mask), gamma, lam))


def gae_of_padding(rewards, values, mask, gamma, lam):
    """The value of the padding after the last action is used."""
    beyond = torch.nn.functional.pad(values[:, 1:], (0, 1))
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    return gae(torch.where(last, rewards + gamma * beyond, rewards), values, mask, gamma, lam)


def gae_returns_of_rewards(rewards, values, mask, gamma, lam):
    """Returns are those of lam 1."""
    return gae(rewards, values, mask, gamma, lam)[0], gae(rewards, values, mask, gamma, 1.0)[1]


def gae_of_errors(rewards, values, mask, gamma, lam):
    """The one-step errors."""
    return gae(rewards, values, mask, gamma, 0.0)


def gae_discounted_once(rewards, values, mask, gamma, lam):
    """gamma is missing in front of the next advantage."""
    return gae(rewards, values, mask, gamma, lam / gamma)


GAE = Code(
    gae, 4, 30, "hard", "rewards and values become advantages and returns",
    (tensor([-0.1, -0.2, 1.0]), tensor([0.5, 0.4, 0.6]), ones(1, 3), 1.0, 0.95),
    (tensor([0.161, 0.38, 0.4]), tensor([0.661, 0.78, 1.0])), gae_case, slow_gae,
    ((mistakes.gae_whitened_too_early, "You whiten before the returns are taken. Returns are what "
      "the critic learns: they must keep the unit of the rewards. Whiten afterwards."),
     (mistakes.gae_of_immediate_rewards, "Your return is the token's own reward: only the last "
      "token would learn from the score."),
     (mistakes.gae_beyond_the_end, "After the last action you go on with a value. The response has "
      "ended: what comes after it is worth 0."),
     (gae_of_padding, "The value of the padding after the last action is in your errors. It counts "
      "as 0."),
     (gae_without_mask, "Rewards and values of padding or prompt are in your result: mask first."),
     (gae_masked_at_the_end, "You mask the result only. By then the padding's rewards and values "
      "have flowed into the response: mask them first."),
     (gae_from_the_left, "You go from left to right. What comes later flows back: begin at the "
      "last token."),
     (gae_returns_of_rewards, "The advantages are right. The returns are advantages + values, with "
      "the same lam."),
     (gae_of_errors, "These are the errors of one step; lam is not used."),
     (gae_discounted_once, "The next advantage is multiplied by gamma * lam, not by lam alone.")),
    "One loop over columns from the right, with next_value and next_advantage of shape (B,).",
    "The recursion advantages[t] = delta[t] + gamma * lam * advantages[t+1] is the definition with "
    "its sum written from the end. All rows go through it together. A column outside the mask "
    "leaves a 0 behind, so that the column before it starts anew: this is how a value after the "
    "end counts as 0 without a special case.")


# ---- whiten --------------------------------------------------------------------------------------

def numbers_case(rng: random.Random) -> tuple:
    """Numbers with junk outside the mask."""
    return 3 * draw(rng, 3, 6) + 2, draw_mask(rng)


def slow_whiten(x, mask):
    """Plain lists."""
    kept = x[mask].tolist()
    mean = sum(kept) / len(kept)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in kept) / len(kept))
    return [[(number - mean) / deviation if counts else 0.0 for number, counts in zip(*rows)]
            for rows in zip(x.tolist(), mask.tolist())]


def whiten_rows(x, mask):
    """Every row by itself."""
    return torch.cat([whiten(row[None], marks[None]) for row, marks in zip(x, mask)])


def whiten_unbiased(x, mask):
    """The divisor N - 1."""
    n = mask.sum()
    return whiten(x, mask) * ((n - 1) / n).sqrt()


def whiten_all(x, mask):
    """Padding counts."""
    return whiten(x, torch.ones_like(mask))


def whiten_beyond(x, mask):
    """Padding is moved, too."""
    kept = x[mask]
    return (x - kept.mean()) / kept.std(unbiased=False)


def scale_only(x, mask):
    """The mean stays."""
    return torch.where(mask, x / x[mask].std(unbiased=False), 0.0)


def by_the_variance(x, mask):
    """Divided by the variance."""
    return whiten(x, mask) / x[mask].std(unbiased=False)


WHITEN = Code(
    whiten, 4, 10, "easy", "advantages get mean 0 and deviation 1",
    (tensor([1, 3, 9]), torch.tensor([[True, True, False]])), tensor([-1, 1, 0]), numbers_case,
    slow_whiten,
    ((mistakes.whiten_and_add_the_mean, "The mean is added back. Advantages without their mean are "
      "the point here."),
     (scale_only, "The mean is still there."),
     (whiten_all, "Prompt and padding are in your mean and deviation: use the mask."),
     (whiten_beyond, "Outside the mask the result must be 0."),
     (whiten_rows, "You whiten each row by itself. It is over all response tokens of the rollout, "
      "or a bad response would look as good as a good one."),
     (whiten_unbiased, "You divide by N - 1. The project, as Ziegler et al., divides by N."),
     (by_the_variance, "You divide by the variance; it is the deviation, its square root.")),
    "masked_mean does the averages.",
    "Whitening makes the size of a step independent of the unit of the reward. It comes after the "
    "returns. The 1e-8 in the root keeps equal advantages at 0 in place of 0 / 0.")


# ---- policy_loss ---------------------------------------------------------------------------------

def update_case(rng: random.Random) -> tuple:
    """Log-probabilities, old ones near them, advantages, mask, cliprange."""
    old = -draw(rng, 3, 6).abs()
    return old + draw(rng, 3, 6, scale=0.4), old, draw(rng, 3, 6), draw_mask(rng), 0.2


def slow_policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """Token by token."""
    losses, ratios = [], []
    for row in range(len(mask)):
        ratios.append([])
        for t in range(mask.shape[1]):
            ratio = 1.0
            if mask[row, t]:
                ratio = math.exp(logprobs[row, t] - old_logprobs[row, t])
                near = min(max(ratio, 1 - cliprange), 1 + cliprange)
                advantage = advantages[row, t].item()
                losses.append(max(-ratio * advantage, -near * advantage))
            ratios[-1].append(ratio)
    return sum(losses) / len(losses), ratios


def surrogate(unclipped, clipped, mask, ratio):
    """Mean of the larger one; the ratio is 1 outside the mask."""
    return masked_mean(torch.maximum(unclipped, clipped), mask), ratio


def ratio_of(logprobs, old_logprobs, mask):
    """exp(new - old), 1 outside the mask."""
    return torch.where(mask, logprobs - old_logprobs, 0.0).exp()


def policy_loss_without_clip(logprobs, old_logprobs, advantages, mask, cliprange):
    """No clip."""
    ratio = ratio_of(logprobs, old_logprobs, mask)
    return masked_mean(-ratio * advantages, mask), ratio


def policy_loss_always_clipped(logprobs, old_logprobs, advantages, mask, cliprange):
    """The clipped one alone."""
    ratio = ratio_of(logprobs, old_logprobs, mask)
    return masked_mean(-ratio.clamp(1 - cliprange, 1 + cliprange) * advantages, mask), ratio


def policy_loss_minimum(logprobs, old_logprobs, advantages, mask, cliprange):
    """The smaller loss."""
    ratio = ratio_of(logprobs, old_logprobs, mask)
    clipped = -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return masked_mean(torch.minimum(-ratio * advantages, clipped), mask), ratio


def policy_loss_upwards(logprobs, old_logprobs, advantages, mask, cliprange):
    """The objective in place of the loss."""
    loss, ratio = policy_loss(logprobs, old_logprobs, -advantages, mask, cliprange)
    return loss, ratio


def policy_loss_over_padding(logprobs, old_logprobs, advantages, mask, cliprange):
    """The mask is not used in the mean."""
    ratio = ratio_of(logprobs, old_logprobs, mask)
    clipped = -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return torch.maximum(-ratio * advantages, clipped).mean(), ratio


POLICY_LOSS = Code(
    policy_loss, 4, 25, "medium", "PPO's clipped objective",
    (tensor([math.log(1.5) - 2]), tensor([-2]), tensor([1]), ones(1, 1), 0.2),
    (-1.2, tensor([1.5])), update_case, slow_policy_loss,
    ((mistakes.policy_loss_old_minus_new, "The ratio is old over new: good tokens would become "
      "unlikely. It is exp(logprobs - old_logprobs)."),
     (mistakes.policy_loss_with_inverted_ratio, "The loss is right, and the ratio that you return "
      "is upside down: kl_old would be estimated from it."),
     (mistakes.policy_loss_of_sequence_means, "You use one ratio for all tokens of a response, "
      "that of its mean log-probabilities. It stays near 1, and the clip never works."),
     (policy_loss_without_clip, "The clip is missing."),
     (policy_loss_always_clipped, "You use the clipped term alone. A token that went the wrong way "
      "has no gradient then and can never come back: take the larger of both losses."),
     (policy_loss_minimum, "The loss is the larger of the two terms. (The paper takes the smaller "
      "one of the objective, which is minus the loss.)"),
     (policy_loss_upwards, "The sign is missing: this is to be minimised."),
     (policy_loss_over_padding, "Prompt and padding are in your mean: the mask is not used.")),
    "Two losses per token, -ratio * advantage and the same with the ratio clamped; torch.maximum; "
    "masked_mean.",
    "The clip takes away the reason to go further than 20 %, and only that: where a token has "
    "moved the wrong way, the unclipped loss is the larger one and its gradient brings it back. "
    "The clamp at 80 keeps exp finite, for 0 * inf would be nan.", (0,))


# ---- value_loss ----------------------------------------------------------------------------------

def critic_case(rng: random.Random) -> tuple:
    """Values, old ones near them, returns, mask, range."""
    old = draw(rng, 3, 6)
    return old + draw(rng, 3, 6, scale=0.4), old, draw(rng, 3, 6), draw_mask(rng), 0.2


def slow_value_loss(values, old_values, returns, mask, cliprange_value):
    """Token by token."""
    losses = []
    for value, old, target in zip(values[mask].tolist(), old_values[mask].tolist(),
                                  returns[mask].tolist()):
        near = min(max(value, old - cliprange_value), old + cliprange_value)
        losses.append(0.5 * max((value - target) ** 2, (near - target) ** 2))
    return sum(losses) / len(losses)


def value_loss_whole(values, old_values, returns, mask, cliprange_value):
    """Not halved."""
    return 2 * value_loss(values, old_values, returns, mask, cliprange_value)


def value_loss_without_clip(values, old_values, returns, mask, cliprange_value):
    """No clip."""
    return 0.5 * masked_mean((values - returns) ** 2, mask)


def value_loss_always_clipped(values, old_values, returns, mask, cliprange_value):
    """The clipped one alone."""
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * masked_mean((near - returns) ** 2, mask)


def value_loss_over_padding(values, old_values, returns, mask, cliprange_value):
    """The mask is not used."""
    return value_loss(values, old_values, returns, torch.ones_like(mask), cliprange_value)


VALUE_LOSS = Code(
    value_loss, 4, 15, "medium", "the critic's loss, clipped around the old values",
    (tensor([1]), tensor([0]), tensor([1]), ones(1, 1), 0.2), 0.32, critic_case, slow_value_loss,
    ((mistakes.value_loss_without_gradient, "The number is right, and it carries no gradient: the "
      "values are detached on the way, so the critic is never trained (a dead critic)."),
     (value_loss_whole, "The factor 1/2 is missing."),
     (value_loss_without_clip, "The clip around the old values is missing."),
     (value_loss_always_clipped, "You use the clipped error alone; the larger of both counts."),
     (value_loss_over_padding, "Prompt and padding are in your mean: the mask is not used.")),
    "The clipped value is old + clamp(value - old). The larger squared error counts.",
    "As in the policy's loss, taking the larger of both means that the clip removes only the "
    "gradient of a value that has gone far enough towards its target; one that went the wrong way "
    "still comes back.", (0,))

EXERCISES = [GAE, WHITEN, POLICY_LOSS, VALUE_LOSS]
