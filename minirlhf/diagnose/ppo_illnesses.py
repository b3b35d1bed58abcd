"""The illnesses of a PPO run: one small function each, from the rows of metrics.csv to a finding.

    function(rows) -> Finding, or None if the run does not have this illness

Where an option decides what a figure means, the function also takes the run's options, {} where
they are not known.
The list at the end says which columns and how many rows a verdict needs, and what to say when all
is well. Every threshold is a constant with its reason. "Measured" means: on the runs of
`experiments/ill_runs.py` with the seeds 100 and (only the ill ones) 101; `diagnose_rates` reports
other seeds.
Lecture: lectures/06-what-goes-wrong.md, "Reading the curves".
"""

from operator import itemgetter
from statistics import NormalDist

from minirlhf.diagnose.findings import Examination, Finding, late, mean, place, smooth, values_of

# ---- is the program right? -----------------------------------------------------------------------

# A KL is never negative; its estimate from samples is, a little, while policy and reference are
# nearly equal. Measured: -0.01 with a reward that pays for nothing, -3 with a stale sampler.
NEGATIVE_KL = -0.1

# The first minibatch is scored by the weights that sampled it: |ratio - 1| is rounding, 1e-6 in
# float32. Measured with dropout 0.1 in the update: 30. bfloat16 rounds up to 0.1.
RATIO_OFF = {"float32": 1e-2, "bfloat16": 0.1}


def negative_kl_ref(rows: list[dict]) -> Finding | None:
    """You learn: log(policy / reference) of one token may be negative, its mean may not.

    The mean is a KL only if the tokens were sampled from the policy that scores them. So a mean
    below 0 says that they were not.
    """
    last = late(rows)
    kl = mean(values_of(last, "kl_ref"))
    if kl > NEGATIVE_KL:
        return None
    return Finding(
        "kl_ref is negative", f"kl_ref is {kl:.2f} nats per response on average over "
        f"{place(last)}; a KL is never below 0, and only noise around 0 would be harmless",
        ("the tokens are sampled from another distribution than the one that scores them: stale "
         "weights in the sampler, another temperature, top-k or top-p",
         "old_logprobs and ref_logprobs are swapped"),
        ("compare the log-probabilities noted while sampling with those of a full forward pass "
         "(check_rollout does)", "sample with the temperature that scores, without top-k"),
        'lectures/04-ppo-mathematics.md, "Why `kl_ref` may be negative"')


def first_ratio_off(rows: list[dict], options: dict) -> Finding | None:
    """You learn: before the first step of an update nothing has changed, so every ratio is 1."""
    worst = max(rows, key=itemgetter("ratio_first"))
    if worst["ratio_first"] < RATIO_OFF.get(str(options.get("dtype")), RATIO_OFF["float32"]):
        return None
    precision = () if options.get("dtype") == "float32" else (
        "--dtype bfloat16: then up to about 0.1 is rounding",)
    return Finding(
        "first ratio off 1", f"ratio_first is {worst['ratio_first']:.3g} at {place([worst])}; "
        "it should be 0 up to rounding",
        ("dropout is on in the update and off in the rollout", "another temperature in the update "
         "than in the rollout", "the row is shifted by one, or padding changes the scores",
         *precision),
        ("use the same function for old and new log-probabilities, and no dropout",
         "score one batch twice without a step in between, and compare token by token"),
        'lectures/05-ppo-the-run.md, "What is checked on every run"')


# ---- how far it goes -----------------------------------------------------------------------------

# Nats per token between policy and reference. Measured: healthy runs below 0.3; without a penalty
# above 1. The second limit spares long sums of small differences: below 6 nats per response nothing
# was ever seen to be hacked here.
KL_PER_TOKEN, KL_PER_RESPONSE = 0.6, 6.0

# One update, from its rollout to its last minibatch. Measured (three-row means): healthy runs at
# most 0.02 nats per token and 0.08 of the tokens clipped.
KL_OLD_HIGH, CLIPFRAC_HIGH = 0.1, 0.2

# If the logarithms of the ratios were normal, kl_old would be half of their variance, and clipfrac
# would say which range they leave. The usual cliprange is 0.2; many clipped tokens at a small
# kl_old mean that the range is this narrow.
CLIP_NARROW, CLIPRANGE_NARROW = 0.03, 0.05

# KL grows with the square of the rate: a rate 100 times too small leaves 1e-4 of the usual 0.01 in
# kl_old. Healthy runs pass 1e-3, and 1 nat in kl_ref.
KL_OLD_STILL, KL_REF_STILL = 1e-5, 0.05


def kl_runs_away(rows: list[dict]) -> Finding | None:
    """You learn: the score alone never says stop; kl_ref is the distance that was paid for it."""
    last = late(rows)
    kl = mean(values_of(last, "kl_ref"))
    per_token = kl / max(1.0, mean(values_of(last, "response_len")))
    if kl < KL_PER_RESPONSE or per_token < KL_PER_TOKEN:
        return None
    return Finding(
        "KL runs away", f"kl_ref is {kl:.1f} nats per response, {per_token:.2f} per token, over "
        f"{place(last)}",
        ("kl_coef is too small for the size of the scores", "too many iterations",
         "the rate is too large"),
        ("raise kl_coef, or set kl_target to the nats that you allow",
         "take the policy of an earlier iteration", "read samples.txt: is it still text?"),
        'lectures/04-ppo-mathematics.md, "Why a KL penalty"')


def clip_width(kl_old: float, clipped: float) -> float:
    """The cliprange that a share of clipped tokens speaks of, if the ratios' logarithms are normal.

    Example: kl_old 0.02 is a deviation of 0.2, which a third of the tokens leaves: width 0.2.
    """
    deviation = max(0.0, 2 * kl_old) ** 0.5
    return deviation * NormalDist().inv_cdf(1 - min(1.0, max(1e-6, clipped)) / 2)


def clip_too_tight(kl_old: float, clipped: float, where: str, options: dict) -> Finding | None:
    """Tokens that are clipped because the range is narrow, not because the policy ran far."""
    cliprange = options.get("cliprange")
    known = type(cliprange) in (int, float)
    narrow = cliprange < CLIPRANGE_NARROW if known else clip_width(kl_old, clipped) < CLIP_NARROW
    if not narrow:
        return None
    return Finding(
        "clip too tight", f"clipfrac is {clipped:.2f} around {where} (mean of three), yet kl_old "
        f"is only {kl_old:.3g} nats per token there: the policy moved no further than usual" +
        (f", and cliprange is {cliprange:.7g}" if known else ""),
        ("cliprange is far below the usual 0.1 to 0.3, so that nearly all tokens are clipped after "
         "one step and give no gradient",),
        ("raise cliprange to 0.2",
         "leave lr and epochs as they are: the updates are not too large"),
        'lectures/04-ppo-mathematics.md, "The clipped objective"')


def updates_too_large(rows: list[dict], options: dict) -> Finding | None:
    """You learn: PPO trusts a rollout only near the policy that made it; kl_old says how near.

    clipfrac alone does not: a narrow clip range has many tokens outside it, too.
    """
    kl_old, clipped = smooth(values_of(rows, "kl_old")), smooth(values_of(rows, "clipfrac"))
    worst = max(range(len(rows)), key=clipped.__getitem__)
    furthest = max(range(len(rows)), key=kl_old.__getitem__)
    if kl_old[furthest] < KL_OLD_HIGH:
        if clipped[worst] < CLIPFRAC_HIGH:
            return None
        tight = clip_too_tight(kl_old[worst], clipped[worst], place([rows[worst]]), options)
        if tight is not None:
            return tight
    clip = () if "cliprange" in options or kl_old[furthest] >= KL_OLD_HIGH else (
        "or cliprange is far below 0.2: then it, and not lr, is the one to change",)
    return Finding(
        "updates too large", f"kl_old is {kl_old[furthest]:.3f} nats per token around "
        f"{place([rows[furthest]])}, clipfrac {clipped[worst]:.2f} around {place([rows[worst]])} "
        f"(means of three; usual here: below {KL_OLD_HIGH} and {CLIPFRAC_HIGH})",
        ("lr is too large", "too many epochs or minibatches for one rollout",
         "so few responses in a rollout that the advantages are mostly noise", *clip),
        ("lower lr", "lower epochs", "set kl_old_stop to end an update that goes too far",
         "raise batch_size"),
        'lectures/04-ppo-mathematics.md, "The clipped objective"')


def nothing_moves(rows: list[dict]) -> Finding | None:
    """You learn: a flat score has two reasons; kl_old tells "no step" from "steps to nowhere"."""
    largest = max(values_of(rows, "kl_old"))
    furthest = max(abs(value) for value in values_of(rows, "kl_ref"))
    if largest > KL_OLD_STILL or furthest > KL_REF_STILL:
        return None
    return Finding(
        "nothing moves", f"over {place(rows)} kl_old is at most {largest:.2g} nats per token "
        f"and kl_ref at most {furthest:.2g} nats per response: the policy is still the SFT model",
        ("lr is too small", "the scores of a batch are all alike, so no advantage is left",
         "the weights are in a precision too coarse for steps of this size"),
        ("raise lr tenfold until kl_old is about 0.001 to 0.01",
         "look at advantage_std and at the scores in samples.txt"),
        'lectures/06-what-goes-wrong.md, "What goes wrong"')


# ---- what is it that gets better? ----------------------------------------------------------------

# Gold has to lose this share of what it had gained, and this many times its usual step from one
# iteration to the next. Measured: healthy runs lose at most 0.2 of the gain.
GOLD_LOST, GOLD_STEPS = 0.4, 2.0

# Measured: healthy runs end with responses 0.9 to 1.4 times as long as the first ones.
LENGTH_FACTOR = 1.6

# Share of the first entropy. Measured: healthy runs keep 0.35 and more, 60 iterations without a KL
# penalty 0.2, a policy that has only one response left 0.00 to 0.1.
ENTROPY_LEFT = 0.25

# One response in five is cut. Measured: healthy runs 0.97 and more from the first iteration on.
END_RATE_LOW = 0.8


def reward_hacking(rows: list[dict]) -> Finding | None:
    """You learn: score is what PPO climbs, gold is what you want; where they part, it is fooled."""
    gold, score = smooth(values_of(rows, "gold")), smooth(values_of(rows, "score"))
    best = max(range(len(gold)), key=gold.__getitem__)
    last = late(rows)
    end, end_score = mean(values_of(last, "gold")), mean(values_of(last, "score"))
    raw = values_of(rows, "gold")
    step = mean([abs(b - a) for a, b in zip(raw, raw[1:])])
    lost = gold[best] - end
    if lost < GOLD_STEPS * step or lost < GOLD_LOST * (gold[best] - gold[0]) \
            or end_score <= score[best]:
        return None
    return Finding(
        "reward hacking", f"gold fell from {gold[best]:.2f} around {place([rows[best]])} to "
        f"{end:.2f} over {place(last)}, while score rose from {score[best]:.2f} to {end_score:.2f}",
        ("the policy has left the texts that the reward model has seen: it climbs its errors",
         "kl_coef is too small, or the run too long"),
        (f"stop near iteration {int(rows[best]['iteration'])}", "raise kl_coef",
         "use several reward models (--ensemble min), or compare responses of this policy and "
         "train the reward model on them too"),
        'lectures/06-what-goes-wrong.md, "What goes wrong"')


def length_drifts(rows: list[dict]) -> Finding | None:
    """You learn: length is the first place to look for a reward that is fooled."""
    first, last = rows[:3], late(rows)
    before, after = (mean(values_of(part, "response_len")) for part in (first, last))
    gain = mean(values_of(last, "score")) - mean(values_of(first, "score"))
    if gain <= 0 or before / LENGTH_FACTOR < after < before * LENGTH_FACTOR:
        return None
    return Finding(
        "length drifts with the score", f"responses went from {before:.1f} tokens over "
        f"{place(first)} to {after:.1f} over {place(last)}, while score rose by {gain:.2f}",
        ("the reward pays for length itself, or for something that comes with it (several closing "
         "sentences, repetition)", "or longer answers are better: only reading can tell"),
        ("read samples.txt from the first to the last", "plot score against length",
         "balance the lengths of chosen and rejected responses in the comparisons",
         "log a judge with --gold"),
        'lectures/06-what-goes-wrong.md, "What goes wrong"')


def entropy_collapse(rows: list[dict]) -> Finding | None:
    """You learn: without the KL term one single response is the optimum, and PPO finds it."""
    start, last = mean(values_of(rows[:2], "entropy")), late(rows)
    end = mean(values_of(last, "entropy"))
    if end > ENTROPY_LEFT * start:
        return None
    return Finding(
        "entropy collapse", f"entropy fell from {start:.2f} nats per token over {place(rows[:2])} "
        f"to {end:.3f} over {place(last)}: nearly every next token is decided",
        ("kl_coef is too small: nothing pays for variety", "lr is too large"),
        ("raise kl_coef before you try ent_coef, which restores variety and not sense",
         "lower lr", "take the policy of an earlier iteration"),
        'lectures/06-what-goes-wrong.md, "What goes wrong"')


def responses_do_not_end(rows: list[dict]) -> Finding | None:
    """You learn: a response that is cut is scored as a torso; the policy has to choose its end.

    PPO can teach the end token, because of missing_end_penalty. It then mends what SFT should have
    done, which is said too.
    """
    last, start = late(rows), rows[0]["end_rate"]
    end, length = mean(values_of(last, "end_rate")), mean(values_of(last, "response_len"))
    if min(start, end) > END_RATE_LOW:
        return None
    if start > END_RATE_LOW:
        causes = ("the reward pays for length, by more than missing_end_penalty takes",
                  "missing_end_penalty is 0")
        remedies = ("raise missing_end_penalty", "read samples.txt: what comes before the cut?")
        lecture = 'lectures/04-ppo-mathematics.md, "How a response can end"'
    else:
        causes = ("SFT did not teach the end token: it was missing from the responses, or masked "
                  "because it is also the padding", "max_new_tokens is too small for the answers")
        remedies = ("read samples.txt: does it go on after the answer, or is the answer cut off?",
                    "if it goes on, look at the mask of a demonstration with python -m "
                    "minirlhf.data FILE --show 1, and train SFT again",
                    "if it is cut off, raise max_new_tokens")
        lecture = 'lectures/02-sft.md, "The end token"'
    return Finding(
        "responses do not end", f"{start:.0%} of the responses chose the end token in iteration "
        f"0, {end:.0%} over {place(last)}, at {length:.1f} tokens" +
        ("; PPO has taught it since" if end > END_RATE_LOW else ""), causes, remedies, lecture)


# ---- the critic and the advantages ---------------------------------------------------------------

# Measured: 0.00 with critic_lr 0; healthy runs 0.1 (the gold judge: hard to foresee) to 0.85 late.
EXPLAINED_LOW = 0.05

# In units of the score, whose deviation a reward model brings to 1. Measured: healthy runs 0.3 and
# more, a constant reward 0.03 and less (the KL term is what is left). A constant reward with a
# single response that does not end, and so pays missing_end_penalty, has 0.1.
ADVANTAGE_LOW = 0.03


def critic_explains_nothing(rows: list[dict]) -> Finding | None:
    """You learn: the critic need not be right for PPO to be right, but it takes away the noise."""
    last = late(rows)
    explained = mean(values_of(last, "explained_var"))
    if explained > EXPLAINED_LOW:
        return None
    return Finding(
        "critic explains nothing", f"explained_var is {explained:.3g} over {place(last)}; by now "
        "it is above 0.1 in healthy runs. 0 is what a constant explains, and less is worse",
        ("critic_lr is too small (or vf_coef 0)",
         "returns are so large that the clipped value loss never reaches them: more than about "
         "10 times cliprange_value", "returns that cannot be foreseen: the score is noise, or all "
         "the scores are alike"),
        ("raise critic_lr", "scale the reward to a deviation of about 1, as reward_model does",
         "look at old_values and returns in samples.txt"),
        'lectures/04-ppo-mathematics.md, "The critic"')


def advantages_vanish(rows: list[dict]) -> Finding | None:
    """You learn: whitening makes any advantage large; of equal scores it makes pure noise."""
    deviation = mean(values_of(rows, "advantage_std"))
    if deviation > ADVANTAGE_LOW:
        return None
    return Finding(
        "advantages vanish", f"advantage_std is {deviation:.2g} over {place(rows)}, before "
        "whitening scales it up to 1",
        ("all responses get the same score", "the score never reaches the rewards: look at the "
         "last token of a table in samples.txt", "the scores are tiny beside kl_coef * kl_ref"),
        ("print the scores of one batch", "scale the reward to a deviation of about 1",
         "ask for responses that differ: a higher temperature, more varied prompts"),
        'lectures/04-ppo-mathematics.md, "Whitening, after the returns"')


# ---- what is looked for --------------------------------------------------------------------------

# in the order in which one illness explains the next
PPO = [
    Examination("first ratio off 1", first_ratio_off, ("ratio_first",), 1,
                "old and new log-probabilities agree before the first step", asks_options=True),
    Examination("kl_ref is negative", negative_kl_ref, ("kl_ref",), 4,
                "the samples come from the policy that scores them"),
    Examination("advantages vanish", advantages_vanish, ("advantage_std",), 5,
                "the responses of a batch differ in what they earn"),
    Examination("nothing moves", nothing_moves, ("kl_old", "kl_ref"), 5, "the policy moves"),
    Examination("updates too large", updates_too_large, ("kl_old", "clipfrac"), 3,
                "updates stay near their rollout", "clip too tight", asks_options=True),
    Examination("responses do not end", responses_do_not_end, ("end_rate", "response_len"), 1,
                "responses end by themselves"),
    Examination("KL runs away", kl_runs_away, ("kl_ref", "response_len"), 3,
                "the policy stays near the SFT model"),
    Examination("reward hacking", reward_hacking, ("gold", "score"), 10,
                "gold keeps up with the score"),
    Examination("length drifts with the score", length_drifts, ("response_len", "score"), 10,
                "the score does not live on length"),
    Examination("entropy collapse", entropy_collapse, ("entropy",), 5, "variety is left"),
    Examination("critic explains nothing", critic_explains_nothing, ("explained_var",), 10,
                "the critic foresees a part of the returns"),
]
