"""Exercises of lecture 3: the reward model's score, loss, calibration and normalisation."""

import math
import random

import torch

from minirlhf.exercises.exercise import Code, draw, draw_lengths, tensor
from minirlhf.reward_model import bradley_terry_loss, calibration_error

# ---- score_of_rows -------------------------------------------------------------------------------


def score_of_rows(numbers: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The score of each row: the scalar head's number at the row's last real token.

    numbers (B, T), one for every position, padding included; lengths (B,) -> scores (B,).

    Example: numbers 1, 2, 3, 4 with length 3 give 3.
    """
    return numbers.gather(1, (lengths - 1)[:, None]).squeeze(1)                     # (B,)


def numbers_case(rng: random.Random) -> tuple:
    """Numbers and lengths."""
    return draw(rng, 3, 7), draw_lengths(rng)[1]


def slow_score(numbers, lengths):
    """Row by row."""
    return [row[length - 1] for row, length in zip(numbers.tolist(), lengths.tolist())]


def score_of_the_padding(numbers, lengths):
    """The last column."""
    return numbers[:, -1]


def score_of_the_mean(numbers, lengths):
    """Padding counts."""
    return numbers.mean(dim=1)


def score_one_late(numbers, lengths):
    """One column after the last token."""
    return numbers.gather(1, lengths[:, None]).squeeze(1)


def score_one_early(numbers, lengths):
    """Before the end token."""
    return numbers.gather(1, lengths[:, None] - 2).squeeze(1)


SCORE = Code(
    score_of_rows, 3, 10, "easy", "read the reward model at the last real token",
    (tensor([1, 2, 3, 4]), torch.tensor([3])), tensor(3), numbers_case, slow_score,
    ((score_of_the_padding, "You read the last column, which is padding in every row but the "
      "longest: the score would depend on the other rows of the batch."),
     (score_of_the_mean, "You take the mean of the row, padding among it: the score would depend "
      "on the other rows of the batch."),
     (score_one_late, "You read one position too late: the last real token is at lengths - 1."),
     (score_one_early, "You read before the last token. The reward model is trained on the number "
      "at the end token.")),
    "gather(1, index) wants an index of shape (B, 1).",
    "Only the last real token has seen the whole response. Read at lengths - 1, a row's score does "
    "not depend on what it is padded to: a row alone and a row in a batch score the same.")


# ---- bradley_terry_loss --------------------------------------------------------------------------

def pairs_case(rng: random.Random) -> tuple:
    """Scores, one pair of them very far apart in the wrong order."""
    scores = draw(rng, 2, 4, scale=2.0)
    scores[0, rng.randrange(4)] -= 2000.0
    return tuple(scores)


def slow_bradley_terry(chosen_scores, rejected_scores):
    """Pair by pair; log(1 + exp(x)) is x for large x."""
    losses = []
    for chosen, rejected in zip(chosen_scores.tolist(), rejected_scores.tolist()):
        x = rejected - chosen
        losses.append(x if x > 500 else math.log1p(math.exp(x)))
    return sum(losses) / len(losses)


def preference_turned_round(chosen_scores, rejected_scores):
    """The rejected response is preferred."""
    return bradley_terry_loss(rejected_scores, chosen_scores)


def preference_that_overflows(chosen_scores, rejected_scores):
    """The logarithm of a sigmoid that has rounded to 0."""
    return -torch.log(torch.sigmoid(chosen_scores - rejected_scores)).mean()


def preference_summed(chosen_scores, rejected_scores):
    """The sum."""
    return bradley_terry_loss(chosen_scores, rejected_scores, 1)


def preference_without_logarithm(chosen_scores, rejected_scores):
    """Minus the probability."""
    return -torch.sigmoid(chosen_scores - rejected_scores).mean()


BRADLEY_TERRY = Code(
    bradley_terry_loss, 3, 10, "easy", "the loss of a comparison", (tensor(2), tensor(1)),
    math.log1p(math.exp(-1)), pairs_case, slow_bradley_terry,
    ((preference_turned_round, "Chosen and rejected have changed places: the model would learn to "
      "prefer what people rejected."),
     (preference_that_overflows, "It is right for small margins, but the sigmoid of -2000 rounds "
      "to 0 and its logarithm is -inf. F.logsigmoid computes both in one step."),
     (preference_summed, "This is the sum; take the mean over the comparisons."),
     (preference_without_logarithm, "The logarithm is missing. Without it a model that is sure and "
      "wrong gets nearly no gradient.")),
    "Minus the mean of F.logsigmoid of the margin, chosen - rejected.",
    "The model says that the chosen response is preferred with probability sigmoid(margin), and "
    "the loss is minus the logarithm of the probability of what people chose. Only differences "
    "count: a constant added to all scores changes nothing.", (0, 1))


# ---- calibration_error ---------------------------------------------------------------------------

def margins_case(rng: random.Random) -> tuple:
    """Margins of both signs, and ties."""
    return (torch.cat([draw(rng, 37, scale=2.0) + 0.5, tensor(0, 0, 0)]),)


def slow_calibration(margins):
    """Interval by interval."""
    stated, right = [[] for _ in range(10)], [[] for _ in range(10)]
    for margin in margins.tolist():
        p = 1 / (1 + math.exp(-abs(margin)))
        interval = min(int((p - 0.5) * 20), 9)
        stated[interval].append(p)
        right[interval].append(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0)
    return sum(abs(sum(p) / len(p) - sum(r) / len(r)) * len(p)
               for p, r in zip(stated, right) if p) / len(margins)


def calibration_of_each(margins):
    """No intervals: each statement is compared with its own outcome."""
    stated = torch.sigmoid(margins.abs())
    return (stated - (margins > 0).double()).abs().mean().item()


def calibration_of_all(margins):
    """One interval for all."""
    return calibration_error(margins, 1)


def calibration_without_ties(margins):
    """A tie counts as wrong."""
    return calibration_error(torch.where(margins == 0, -1e-12, margins))


def calibration_unweighted(margins):
    """Every interval weighs the same."""
    stated, right = torch.sigmoid(margins.abs()), (margins > 0).double()
    interval = ((stated - 0.5) * 20).long().clamp(max=9)
    gaps = [(stated[interval == i].mean() - right[interval == i].mean()).abs()
            for i in range(10) if (interval == i).any()]
    return torch.stack(gaps).mean().item()


CALIBRATION = Code(
    calibration_error, 3, 25, "hard", "does a stated 80 % come true in 80 %?",
    (math.log(3) * tensor(1, 1, 1, -1),), 0.0, margins_case, slow_calibration,
    ((calibration_of_each, "You compare each statement with its own outcome, which is 0 or 1. Of a "
      "perfectly calibrated model that is not 0: compare means within each interval."),
     (calibration_of_all, "You compare one mean over all. A model that says too much here and too "
      "little there would look perfect: use intervals."),
     (calibration_without_ties, "A margin of 0 is a tie, which counts half and not as wrong."),
     (calibration_unweighted, "Your intervals weigh the same. Weigh each by how many comparisons "
      "fall into it.")),
    "Within an interval, |mean statement - share right| times its number of comparisons is the "
    "same as |sum of (statement - right)|.",
    "A probability cannot be checked on one case, only on many of the same statement; so cases are "
    "put into intervals. Multiplying the gap of means by the count turns it into a sum, which is "
    "one index_add. max(p, 1-p) is stated of the response that the model prefers, so it runs from "
    "0.5 to 1.")


# ---- fold_normalisation --------------------------------------------------------------------------

def fold(weight: torch.Tensor, bias: torch.Tensor, mean: float,
         std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """New weights of the scalar head and of the bias before it, so that scores are normalised.

    A score is weight . (x + bias), with x (C,) the last layer norm before its bias is added, and
    the head has no bias of its own. weight, bias (C,) -> weight, bias (C,): with the new ones the
    score is (old score - mean) / std for every x. Add a multiple of the head's weight to the bias.

    Example: C = 1, weight 2, bias 0, mean 1, std 4: the new weight is 0.5, the new bias -0.5.
    """
    new_weight = weight / std                                                       # (C,)
    shift = -mean / std                                  # what every score must gain
    return new_weight, bias + shift * new_weight / new_weight.dot(new_weight)


def head_case(rng: random.Random) -> tuple:
    """A head of four channels."""
    return (*draw(rng, 2, 4), rng.uniform(-2, 2), rng.uniform(0.5, 3))


def slow_fold(weight, bias, mean, std):
    """Shift first, then scale."""
    square = sum(w * w for w in weight.tolist())
    return weight / std, torch.stack([b - mean * w / square for w, b in zip(weight, bias)])


def fold_shift_not_scaled(weight, bias, mean, std):
    """The new score is old / std - mean."""
    new = weight / std
    return new, bias - mean * new / new.dot(new)


def fold_wrong_way(weight, bias, mean, std):
    """The mean is added."""
    return fold(weight, bias, -mean, std)


def fold_unsquared(weight, bias, mean, std):
    """The step is not divided by the square of the weight."""
    return weight / std, bias - mean / std * weight / std


def fold_scale_only(weight, bias, mean, std):
    """No shift."""
    return weight / std, bias


FOLD = Code(
    fold, 3, 20, "hard", "put the normalisation of the scores into the weights",
    (tensor(2), tensor(0), 1.0, 4.0), (tensor(0.5), tensor(-0.5)), head_case, slow_fold,
    ((fold_shift_not_scaled, "Your scores are old / std - mean: the mean is divided by std, too."),
     (fold_wrong_way, "The shift has the wrong sign: scores gain -mean / std."),
     (fold_unsquared, "weight . (step * weight) is step times the square of the weight: divide by "
      "weight . weight."),
     (fold_scale_only, "The scale is right, and the mean is still there.")),
    "What does weight . (bias + a * weight) gain over weight . bias? Solve for a.",
    "A scalar head in a published file has no bias, so a constant must come from what stands "
    "before it. The direction of the head's own weight does it with the smallest step. After "
    "folding nobody can forget to normalise: the weights do it.")

EXERCISES = [SCORE, BRADLEY_TERRY, CALIBRATION, FOLD]
