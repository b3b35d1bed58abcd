"""The illnesses of SFT and of the reward model, in the form of `ppo_illnesses.py`.

Lecture: lectures/02-sft.md, "Rate, epochs, and forgetting".
"""

from operator import itemgetter

from minirlhf.diagnose.findings import Examination, Finding, mean, place, values_of

# The held-out set is always the same one, so its loss changes only if the weights do.
HELD_OUT_STILL = 0.001

# The held-out loss above its lowest, as a share of it, while the training loss went on falling.
# Measured: healthy runs end at most 0.02 above.
LEARNED_BY_HEART = 0.1

# Mean training loss of 10 steps against the first 3. Measured: healthy runs never above 1.1.
LOSS_RISE = 1.25

# A coin on 400 held-out comparisons stays below 0.55 in 39 of 40 cases; a little above that there
# is still next to nothing for PPO to climb. Measured: healthy reward models 0.75 to 0.88 in the
# text world, 0.64 on real comparisons; with a rate of 0.1 0.57.
CHANCE = 0.58

# With 40 % of the labels flipped no model is right more often than 0.6, nor has a lower loss than
# 0.673; a coin has 0.693. Measured: 0.613 at an accuracy of 0.64 on real comparisons.
NOISY_ACCURACY, NOISY_LOSS = 0.65, 0.665


def window_means(values: list[float], width: int) -> list[float]:
    """Means of `width` neighbours: window_means([1, 3, 5], 2) == [2, 4]."""
    return [mean(values[i:i + width]) for i in range(len(values) - width + 1)]


def loss_does_not_move(rows: list[dict]) -> Finding | None:
    """You learn: look at the held-out loss; that of the batches jumps with the batch."""
    held_out = values_of(rows, "held_out_loss")
    change = max(held_out) - min(held_out)
    if change > HELD_OUT_STILL * held_out[0]:
        return None
    labels = ("the labels are noise: whatever is learned of them helps on no held-out comparison",)
    return Finding(
        "nothing moves", f"the held-out loss stays between {min(held_out):.4f} and "
        f"{max(held_out):.4f} over {place(rows)}",
        ("lr is too small", "the weights are frozen, or in a precision too coarse for such steps",
         *(labels if values_of(rows, "held_out_accuracy") else ())),
        ("raise lr tenfold until the loss falls", "look at grad_norm: 0 means that no gradient "
         "arrives"),
        'lectures/02-sft.md, "Rate, epochs, and forgetting"')


def rate_too_high(rows: list[dict]) -> Finding | None:
    """You learn: too large a step destroys in one stroke what the model came with."""
    losses = values_of(rows, "loss")
    start, means = mean(losses[:3]), window_means(losses, 10)
    worst = max(range(len(means)), key=means.__getitem__)
    if means[worst] < LOSS_RISE * start:
        return None
    return Finding(
        "rate too high", f"the loss rose from {start:.2f} over {place(rows[:3])} to "
        f"{means[worst]:.2f} over {place(rows[worst:worst + 10])}; the last ten steps: "
        f"{means[-1]:.2f}",
        ("lr is too large", "warmup_steps is too small for this lr"),
        ("lower lr three- to tenfold and start again from the same checkpoint",
         "do not use these weights: what was lost does not come back"),
        'lectures/02-sft.md, "Rate, epochs, and forgetting"')


def learned_by_heart(rows: list[dict]) -> Finding | None:
    """You learn: where the held-out loss turns, the model begins to learn its examples by heart."""
    evaluated = [row for row in rows if "held_out_loss" in row]
    best = min(evaluated, key=itemgetter("held_out_loss"))
    last = evaluated[-1]
    rise = last["held_out_loss"] / max(best["held_out_loss"], 1e-9) - 1
    here = rows.index(best)
    before = mean(values_of(rows[max(0, here - 9):here + 1], "loss"))
    after = mean(values_of(rows[-10:], "loss"))
    if rise < LEARNED_BY_HEART or after >= before:
        return None
    return Finding(
        "learned by heart", f"the held-out loss was {best['held_out_loss']:.3f} at {place([best])} "
        f"and is {last['held_out_loss']:.3f} at {place([last])}, while that of the batches fell "
        f"from {before:.3f} to {after:.3f}",
        ("too many epochs for so few examples", "lr is too large"),
        ("fewer epochs: stop where the held-out loss was lowest", "more examples", "lower lr"),
        'lectures/03-reward-model.md, "One step, and one epoch"' if "held_out_accuracy" in last
        else 'lectures/02-sft.md, "Rate, epochs, and forgetting"')


def at_chance(rows: list[dict]) -> Finding | None:
    """You learn: a coin is right half of the time, and PPO would follow it just as gladly.

    A model of noisy labels is a little better than a coin, and its loss stays near that of one.
    """
    evaluated = [row for row in rows if "held_out_accuracy" in row and "held_out_loss" in row]
    last = evaluated[-1]
    noisy = (len(evaluated) >= 3 and last["held_out_accuracy"] <= NOISY_ACCURACY
             and last["held_out_loss"] >= NOISY_LOSS)
    if last["held_out_accuracy"] > CHANCE and not noisy:
        return None
    return Finding(
        "reward model at chance", f"held_out_accuracy is {last['held_out_accuracy']:.3f} at "
        f"{place([last])}, held_out_loss {last['held_out_loss']:.3f}; a coin has 0.5 and 0.693",
        ("the labels are noisy: they contradict one another, or chosen and rejected are mixed up "
         "in part (with 40 % flipped nothing gets above 0.6)",
         "chosen and rejected are the same text, or differ only after the cut",
         "the rate is too small, or so large that the trunk was destroyed",
         "the score is read at padding instead of the last token"),
        ("read twenty comparisons: would you choose the same?",
         "train on 32 comparisons for many epochs: a model that cannot learn those by heart has "
         "a bug", "try lr three times smaller and larger"),
        'lectures/03-reward-model.md, "Accuracy and calibration"')


SFT = [
    Examination("nothing moves", loss_does_not_move, ("held_out_loss",), 2, "the loss moves"),
    Examination("rate too high", rate_too_high, ("loss",), 20, "the loss never shoots up"),
    Examination("learned by heart", learned_by_heart, ("held_out_loss", "loss"), 3,
                "the held-out loss does not turn upwards"),
]

# noisy labels first: they, too, keep the held-out loss where it is
REWARD_MODEL = [
    Examination("reward model at chance", at_chance, ("held_out_accuracy", "held_out_loss"), 1,
                "the reward model knows more than a coin"),
    *SFT,
]
