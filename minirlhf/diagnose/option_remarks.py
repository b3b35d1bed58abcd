"""What a run's options say before any curve is looked at: values far from the usual ones.

An option far from its usual value is no illness, but it is the first suspect, and a mistake such as
a gamma of 0 shows in no curve. Limits are wide: a remark says "ten times off", not "not the best".
Lecture: lectures/06-what-goes-wrong.md, "Reading the curves".
"""

import math
import os
from dataclasses import dataclass

from minirlhf.diagnose.findings import mean, values_of
from minirlhf.engine.options import check, describe_error
from minirlhf.engine.output import RUN_FILE
from minirlhf.engine.state import STATE_FILE, read_state
from minirlhf.files.disk import read_json

COMMANDS = {"PPO": "PPO", "reward model": "RewardModel", "SFT": "SFT"}      # stage -> in run.json


@dataclass(frozen=True)
class Remark:
    """One option of a run that is far from its usual value."""
    option: str
    value: str
    usual: str
    effect: str                         # what such a value does
    lecture: str                        # file and section


@dataclass(frozen=True)
class Limits:
    """Where an option begins to be suspect: below `low` or above `high`."""
    option: str
    low: float
    high: float
    usual: str
    too_low: str                        # the effect of a value below `low`
    too_high: str
    lecture: str
    off: float | None = None            # the value that switches the option off, never suspect


SFT_RATE = 'lectures/02-sft.md, "Rate, epochs, and forgetting"'
ONE_EPOCH = 'lectures/03-reward-model.md, "One step, and one epoch"'
NORMALISED = 'lectures/03-reward-model.md, "Normalised scores, inside the weights"'
KL = 'lectures/04-ppo-mathematics.md, "Why a KL penalty"'
CLIP = 'lectures/04-ppo-mathematics.md, "The clipped objective"'
GAE = 'lectures/04-ppo-mathematics.md, "GAE by hand"'
CRITIC = 'lectures/04-ppo-mathematics.md, "The critic"'
ENDING, WRONG = ('lectures/04-ppo-mathematics.md, "How a response can end"',
                 'lectures/06-what-goes-wrong.md, "What goes wrong"')
ROLLOUT = 'lectures/05-ppo-the-run.md, "The rollout"'
NONE = ""                               # on this side nothing is suspect

GRADIENTS = ("steps are cut to almost nothing", "gradients are in effect not clipped")

PPO = [
    Limits("kl_coef", 0.001, 2, "0.01 to 0.5, for scores with a deviation of 1",
           "next to nothing holds the policy near the SFT model: expect a fooled reward model and "
           "one response to all prompts",
           "the penalty outweighs the score: the policy stays where SFT left it", KL),
    Limits("kl_target", 0.3, 60, "3 to 10 nats per response, or 0 for a fixed kl_coef",
           "kl_coef is raised until the policy stands still", "kl_coef is lowered to almost 0",
           'lectures/04-ppo-mathematics.md, "Adapting the coefficient"', off=0),
    Limits("lam", 0.5, math.inf, "0.9 to 1", "each token sees the score through the critic's "
           "guesses alone, and an untrained critic misleads it", NONE, GAE),
    Limits("cliprange", 0.03, 1, "0.1 to 0.3",
           "the clip stops the policy at once: most tokens are outside it after one step, and "
           "learning is slow however large lr is", "the clip hardly holds an update back", CLIP),
    Limits("cliprange_value", 0.02, math.inf, "0.2 and more, for scores with a deviation of 1",
           "the critic may hardly move in an update, so it foresees little", NONE, CRITIC),
    Limits("vf_coef", 0.001, 10, "0.1 to 1", "the critic gets next to no gradient",
           "the critic's loss outweighs that of the policy", CRITIC),
    Limits("ent_coef", 0, 0.05, "0 to 0.01", NONE,
           "variety is paid for beside the score: expect responses without sense", WRONG),
    Limits("temperature", 0.5, 1.5, "0.7 to 1.2", "nearly all samples are alike, so there is "
           "little to compare", "most samples are noise that nobody would write", ROLLOUT),
    Limits("epochs", 1, 8, "1 to 4", NONE,
           "one rollout is used so often that the policy leaves it behind", CLIP),
    Limits("batch_size", 8, math.inf, "32 to 512", "so few responses give advantages that are "
           "mostly noise", NONE, ROLLOUT),
    Limits("prompt_count", 8, math.inf, "hundreds and more, or 0 for all", "the policy sees these "
           "few prompts again and again", NONE, ROLLOUT, off=0),
    Limits("missing_end_penalty", 0.01, 20, "about 1, the deviation of the scores",
           "a response that is cut at the limit costs nothing",
           "to end at all is worth far more than to answer well", ENDING),
    Limits("max_new_tokens", 8, math.inf, "more than the longest good answer",
           "most answers are cut before their end", NONE, ENDING),
    Limits("max_grad_norm", 0.01, 1000, "about 1", *GRADIENTS, WRONG),
    Limits("kl_old_stop", 1e-4, math.inf, "0.01 to 0.1 nats per token, or 0 for none",
           "every update ends after its first steps", NONE, CLIP, off=0)]
SFT = [
    Limits("epochs", 1, 10, "1 to 5 (InstructGPT 16)", NONE,
           "the demonstrations are learned by heart", SFT_RATE),
    Limits("batch_size", 4, math.inf, "16 to 64", "each step follows the noise of a few rows", NONE,
           SFT_RATE),
    Limits("weight_decay", 0, 0.5, "0 to 0.1", NONE, "the weights are pulled to 0", SFT_RATE),
    Limits("max_grad_norm", 0.01, 1000, "about 1", *GRADIENTS, SFT_RATE),
    Limits("held_out", 20, math.inf, "100 and more", "held-out figures of so few rows say little",
           NONE, SFT_RATE)]
REWARD_MODEL = [
    Limits("epochs", 1, 3, "1", NONE, "the comparisons are learned by heart", ONE_EPOCH),
    Limits("norm_samples", 32, math.inf, "about 256", "mean and deviation of the scores are "
           "guesses", NONE, NORMALISED),
    Limits("max_new_tokens", 8, math.inf, "as in PPO", "scores are normalised on answers that are "
           "cut before their end", NONE, NORMALISED),
    *SFT[1:]]
LIMITS = {"PPO": PPO, "SFT": SFT, "reward model": REWARD_MODEL}

# Rates from which on they are suspect, and what is usual. Small: up to 256 channels, such as the
# shipped model; large: 512 and more, GPT-2; between these, or unknown: the wider of both limits.
RATES = {"PPO": {"small": (1e-5, 1e-2, "2e-4 to 1e-3"), "large": (1e-7, 3e-4, "3e-6 to 1e-5")},
         "SFT": {"small": (1e-5, 5e-2, "2e-4 to 1e-3"), "large": (1e-7, 6e-4, "about 2e-5")},
         "reward model": {"small": (1e-5, 5e-2, "5e-4 to 1e-3"),
                          "large": (1e-7, 3e-4, "about 1e-5")}}
CRITIC_FACTOR = 5                       # a critic bears so much larger rates than a policy
WARMUP_SHARE = 0.8                      # of the run
GAMMA_LEFT = 0.5                        # of the score, at the first token
STEPS_PER_ROLLOUT = 64                  # optimiser steps; usual 4 to 16
ROUNDING = (1e-4, 0.1)                  # of the first ratio with bfloat16


# ---- reading -------------------------------------------------------------------------------------

def read_options(folder: str, stage: str, finished: bool) -> tuple[dict, str]:
    """The options of a run, with `n_embd` of its model where known; or {} and why there are none.

    Those of a finished run stand in run.json, those of an unfinished one in its training state.
    """
    path = os.path.join(folder, RUN_FILE if finished else STATE_FILE)
    if not os.path.lexists(path):
        return {}, f"there is no {os.path.basename(path)}" + ("" if finished else
                                                              ", no checkpoint was written yet")
    try:
        run, tensors = (read_json(path), {}) if finished else read_state(path)
        options = run.get("config")
        check(isinstance(options, dict), f"{path}: expected the options of a run")
        check(run.get("command") == COMMANDS[stage], f"{path} is of another command than the "
              "metrics")
        config = os.path.join(folder, "config.json")
        if finished and os.path.lexists(config):
            return {**options, "n_embd": read_json(config).get("n_embd")}, ""
    except (ValueError, OSError) as error:
        return {}, describe_error(error)
    widths = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith("wte.weight")]
    return {**options, "n_embd": widths[0] if widths else None}, ""


def number(options: dict, name: str) -> float | None:
    """An option as a number; None if it is missing or something else."""
    value = options.get(name)
    return value if type(value) in (int, float) else None


# ---- remarks -------------------------------------------------------------------------------------

def from_limits(stage: str, options: dict) -> list[Remark]:
    """A remark for each option outside its limits."""
    remarks = []
    for limits in LIMITS[stage]:
        value = number(options, limits.option)
        if value is not None and value != limits.off and not limits.low <= value <= limits.high:
            effect = limits.too_low if value < limits.low else limits.too_high
            remarks.append(Remark(limits.option, f"{value:.7g}", limits.usual, effect,
                                  limits.lecture))
    return remarks


def rates(stage: str, options: dict) -> list[Remark]:
    """lr and critic_lr, for a model of this size."""
    width, sizes = number(options, "n_embd"), RATES[stage]
    if width is not None and (width <= 256 or width >= 512):
        low, high, usual = sizes["small" if width <= 256 else "large"]
    else:
        low, high = sizes["large"][0], sizes["small"][1]
        usual = f"{sizes['small'][2]} for a small model, {sizes['large'][2]} for GPT-2"
    remarks = []
    for name, factor in (("lr", 1), ("critic_lr", CRITIC_FACTOR)):
        value = number(options, name)
        if value is None or low <= value < factor * high:
            continue
        effect = ("nothing is learned" if value == 0 else "next to nothing is learned in a run of "
                  "this kind" if value < low else "one step may destroy what was learned before")
        if name == "critic_lr":
            effect, usual = f"by the critic: {effect}", "one to five times lr"
        remarks.append(Remark(name, f"{value:.7g}", usual, effect,
                              CRITIC if name == "critic_lr" else
                              WRONG if stage == "PPO" else SFT_RATE))
    return remarks


def discount(options: dict, rows: list[dict]) -> list[Remark]:
    """gamma, which a score at the end of a response passes once per token."""
    gamma = number(options, "gamma")
    lengths = values_of(rows, "response_len")
    length = mean(lengths) if lengths else number(options, "max_new_tokens")
    if gamma is None or length is None or not 0 <= gamma <= 1 or not 1 <= length <= 1e9:
        return []
    left = gamma ** (length - 1)
    if left >= GAMMA_LEFT:
        return []
    return [Remark("gamma", f"{gamma:.7g}", "1, or just below it", "the score comes after the last "
                   f"token: of it {left:.0%} reaches the first of {length:.0f} tokens", GAE)]


def warm_up(stage: str, options: dict, rows: list[dict], finished: bool) -> list[Remark]:
    """A warm-up as long as the run never lets the rate reach its peak."""
    name = "warmup_iterations" if stage == "PPO" else "warmup_steps"
    total = number(options, "iterations")
    if stage != "PPO":
        count = number(options, "examples" if stage == "SFT" else "comparisons") or 0
        used = count - (number(options, "held_out") or 0)
        total = used // max(1, number(options, "batch_size") or 1)
        total *= number(options, "epochs") or 1
        total = rows[-1]["step"] if finished else total
    value = number(options, name)
    if value is None or not total or total < 0 or value < WARMUP_SHARE * total:
        return []
    return [Remark(name, f"{value:.7g}", "a tenth of the run", f"the run has {total:.0f} "
                   f"{'iterations' if stage == 'PPO' else 'steps'}: the rate hardly reaches lr",
                   WRONG if stage == "PPO" else SFT_RATE)]


def steps_per_rollout(options: dict) -> list[Remark]:
    """Small minibatches make as many steps as many epochs do."""
    batch, epochs, size = (number(options, name)
                           for name in ("batch_size", "epochs", "minibatch_size"))
    if None in (batch, epochs, size) or not 0 < size <= batch:
        return []
    steps = epochs * batch / size
    if steps < STEPS_PER_ROLLOUT:
        return []
    return [Remark("minibatch_size", f"{size:.7g}", "a half to a quarter of batch_size",
                   f"{steps:.0f} optimiser steps for one rollout: the policy leaves it behind",
                   CLIP)]


def precision(options: dict, rows: list[dict]) -> list[Remark]:
    """bfloat16 explains a first ratio that is a little off 1."""
    off = max(values_of(rows, "ratio_first"), default=0.0)
    if options.get("dtype") != "bfloat16" or not ROUNDING[0] < off < ROUNDING[1]:
        return []
    return [Remark("dtype", "bfloat16", "float32 where time allows", "the first ratio is off 1 by "
                   f"up to {off:.2g}, which is the rounding of this precision and no mistake",
                   'lectures/05-ppo-the-run.md, "Parts, precision, processes"')]


def remarks_on(stage: str, options: dict, rows: list[dict], finished: bool) -> list[Remark]:
    """What the options of a run say; the rows tell its lengths.

    Example: the options {"kl_coef": 0.2, "gamma": 0.0} of PPO give one remark, on gamma.
    """
    remarks = rates(stage, options) + from_limits(stage, options)
    remarks += warm_up(stage, options, rows, finished)
    if stage == "PPO":
        remarks += discount(options, rows) + steps_per_rollout(options) + precision(options, rows)
    return remarks
