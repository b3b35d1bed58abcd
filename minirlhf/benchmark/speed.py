"""The measurements: beside the baseline, tokens a second, memory, growth."""

import importlib
import importlib.util
from dataclasses import replace

import torch

from minirlhf import gpt2
from minirlhf.benchmark import arithmetic, machine, naive
from minirlhf.benchmark.setting import (Iterations, Setting, even_tokens, peak_of_iterations,
                                        phase_figures, random_model, random_prompts, timed)
from minirlhf.common import random_stream
from minirlhf.gpt2 import GPT2, generate


# ---- beside the naive baseline and transformers --------------------------------------------------

class NaiveIterations(Iterations):
    """The same networks and prompts, by the naive baseline and PyTorch's stock matrix products."""

    def __init__(self, setting: Setting, seed: int = 0):
        super().__init__(setting, seed)
        self.optimizer = naive.make_optimizer(self.networks, self.cfg)

    def run(self) -> dict[str, float]:
        """One iteration; returns the seconds of its phases."""
        ours, gpt2.ONEDNN = gpt2.ONEDNN, False           # a network as one writes it down first
        try:
            return self.run_naively()
        finally:
            gpt2.ONEDNN = ours

    def run_naively(self) -> dict[str, float]:
        """What `run` does, with the products as they are now."""
        uniforms = torch.rand(self.setting.prompts, self.setting.new_tokens, dtype=torch.float64,
                              generator=random_stream(self.cfg.seed, 1, self.done))
        responses, seconds = naive.rollout(self.networks, self.ref_policy, even_tokens,
                                           self.tokenizer, self.prompts, uniforms, self.cfg,
                                           self.cfg.kl_coef)
        assert all(len(response.values) == self.setting.new_tokens for response in responses)
        with timed(self.optimizer, "step") as steps:
            seconds["update"] = machine.seconds_of(naive.update, self.networks, self.optimizer,
                                                   responses, self.cfg)
        seconds["optimizer"] = sum(steps)
        self.done += 1
        seconds["rollout"] = seconds["sample"] + seconds.pop("score")
        seconds["iteration"] = seconds["rollout"] + seconds["update"]
        seconds["sample alone"] = seconds["sample"] - seconds.pop("reference")
        return seconds


def transformers_model(model: GPT2):
    """The same weights in transformers' GPT-2; None where that package is not installed."""
    if importlib.util.find_spec("transformers") is None:
        return None
    transformers = importlib.import_module("transformers")
    sizes = {name: getattr(model.config, name)
             for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    end_token = model.config.vocab_size - 1
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **sizes, bos_token_id=end_token, eos_token_id=end_token)).eval()
    tensors = {"transformer." + name: tensor for name, tensor in model.state_dict().items()}
    other.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
    ids = torch.arange(8)[None]                                                     # (1, T)
    with torch.no_grad():
        apart = (other(ids).logits - model(ids)).abs().max().item()
    assert apart < 1e-2, f"transformers computes other logits, off by {apart}"
    return other


def transformers_sample(model, prompts: list[list[int]], new_tokens: int, end_token: int) -> None:
    """Its `generate`, sampling from the whole distribution as ours does."""
    ids = torch.tensor(prompts)                                                     # (B, T)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                          top_p=1.0, temperature=1.0, max_new_tokens=new_tokens,
                          pad_token_id=end_token)
    assert made.shape[1] == ids.shape[1] + new_tokens, "a response ended early"


def compare(setting: Setting, runs: int, naive_runs: int, seed: int) -> dict:
    """Iterations of ours, of the baseline and generations of transformers, taking turns."""
    ours, baseline = Iterations(setting, seed), NaiveIterations(setting, seed)
    other = transformers_model(ours.ref_policy)
    sample = (other, ours.prompts, setting.new_tokens, ours.tokenizer.end_token)
    ours.run()                                           # not counted
    if other is not None:
        transformers_sample(*sample)                     # not counted
    found, slow, theirs = [], [], []
    for run in range(max(runs, naive_runs)):
        found.append(ours.run())
        if other is not None:
            theirs.append(machine.seconds_of(transformers_sample, *sample))
        if run < naive_runs:
            slow.append(baseline.run())
    result = {"ours": phase_figures(found), "naive": phase_figures(slow) if slow else None,
              "transformers": machine.figure(theirs) if theirs else None}
    ours_of = {"sample alone": "sample"}                 # nothing but sampling is in our phase
    if slow:
        result["ratios"] = {name: machine.ratio(seconds, result["ours"][ours_of.get(name, name)])
                            for name, seconds in result["naive"].items()}
    if theirs:
        result["transformers_ratio"] = machine.ratio(result["transformers"],
                                                     result["ours"]["sample"])
    return result


# ---- tokens a second -----------------------------------------------------------------------------

def generation_speed(setting: Setting, batches: tuple, runs: int, seed: int) -> dict:
    """Prefill and decode in tokens a second, for each number of rows."""
    model, found = random_model(setting.config, seed), {}
    end_token, prompts = setting.config.vocab_size - 1, random_prompts(setting, seed)
    for batch in batches:
        rows = [prompts[row % len(prompts)] for row in range(batch)]
        prefill, step = [], []
        for run in range(runs + 1):
            first = machine.seconds_of(sample, model, rows, 1, end_token)
            whole = machine.seconds_of(sample, model, rows, setting.new_tokens, end_token)
            if run > 0:                                  # the first is not counted
                prefill.append(first)
                step.append((whole - first) / (setting.new_tokens - 1))
        prefill, step = machine.figure(prefill), machine.figure(step)
        read = machine.rate(arithmetic.bytes_per_step(setting.config), step)
        found[str(batch)] = {"prefill": machine.rate(batch * setting.prompt_tokens, prefill),
                             "step": step, "decode": machine.rate(batch, step), "read": read}
    return found


def add_shares(speeds: dict, bandwidth: float) -> dict:
    """The share of the memory bandwidth at which each decoding step reads the weights."""
    return {batch: {**found, "share": machine.scaled(found["read"], 1 / bandwidth)}
            for batch, found in speeds.items()}


def sample(model: GPT2, prompts: list[list[int]], new_tokens: int, end_token: int) -> None:
    """Our `generate`."""
    made = generate(model, prompts, new_tokens, end_token=end_token, generator=random_stream(0))
    assert bool((made.lengths == made.ids.shape[1]).all()), "a response ended early"


# ---- shares of the limits ------------------------------------------------------------------------

def shares(setting: Setting, phases: dict[str, dict], gemm: float, bandwidth: float) -> dict:
    """Each phase's time at its limit over its measured time.

    The limit of scoring and update is their arithmetic at the rate of matrix products; that of
    sampling is the arithmetic of the prompts, and then for every step the slower of arithmetic and
    reading the weights.
    """
    flops = setting.flops()
    limits = {"sample": flops["prefill"] / gemm
              + (setting.new_tokens - 1) * setting.decode_limit(gemm, bandwidth),
              "score": flops["score"] / gemm, "update": flops["update"] / gemm}
    limits["iteration"] = sum(limits.values())
    return {name: {"limit": limit, "flops": flops.get(name),
                   "share": machine.rate(limit, phases[name])} for name, limit in limits.items()}


# ---- memory and growth ---------------------------------------------------------------------------

def memory(setting: Setting, critics: tuple) -> dict:
    """Peak memory of an iteration, in a new process each, for each kind of critic."""
    return {critic: machine.in_new_process(peak_of_iterations, replace(setting, critic=critic))
            for critic in critics}


def growth(setting: Setting, axes: dict[str, list], runs: int, seed: int) -> dict:
    """Phases of iterations that differ from `setting` in one size, for each value of each axis."""
    found, iterations = {}, None
    for axis, values in axes.items():
        found[axis] = {}
        for name, value in values:
            changed = replace(setting, **{axis: value})
            if iterations is None or iterations.setting.config != changed.config:
                iterations = None                        # frees the old networks first
                iterations = Iterations(changed, seed)
                iterations.run()                         # not counted
            iterations.use(changed, seed)
            found[axis][name] = phase_figures([iterations.run() for _ in range(runs)])
    return found
