"""`kl_estimators`: k1, k2 and k3 beside the exact KL of policy and reference, along a PPO run.

Tokens are sampled, so the KL that a run logs is an estimate. Here the vocabulary is small enough to
have, in every state that was visited, the KL of the two full distributions, in both directions.
"""

import torch

from minirlhf import ppo
from minirlhf.gpt2 import GPT2, behaviour_logprobs
from minirlhf.lab.experiment import Experiment, Finding, Rows, compare, unchanged
from minirlhf.lab.pictures import new_picture, save_picture, show_intervals, show_series
from minirlhf.lab.shared import Task, reward_model_folder, train_policy
from minirlhf.museum.short_runs import substituted

ESTIMATORS = ("k1", "k2", "k3")
ABOUT = Experiment(
    name="kl_estimators",
    claim="k1 and k3 are right on average, k2 is not, and k3 varies less from response to response "
          "than k1.",
    source="Schulman 2020, \"Approximating KL Divergence\"",
    rule="Shown if, in the run with kl_coef 0.2, the mean error of k1 and of k3 is within 10 % of "
         "the exact KL and that of k2 is not, on either side (intervals over seeds), and if k3 "
         "deviates less from the exact KL than k1 in both runs. Refuted if one of these is on the "
         "other side.",
    figures=("exact", "exact_reverse", "error_k1", "error_k2", "error_k3", "deviation_k1",
             "deviation_k2", "deviation_k3"),
    units={"exact": "nats per response", "exact_reverse": "nats per response",
           **{f"error_{name}": "share of the exact KL" for name in ESTIMATORS},
           **{f"deviation_{name}": "nats per response" for name in ESTIMATORS}})

NEAR, FAR = "kl_coef 0.2", "kl_coef 0"
ARMS = {NEAR: {"kl_coef": 0.2}, FAR: {"kl_coef": 0.0}}


def exact_kls(policy: GPT2, ref_policy: GPT2, ids: torch.Tensor, mask: torch.Tensor,
              temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(policy || reference) and KL(reference || policy) of the next token, from all V of them.

    ids (B, T), mask (B, T-1) -> (B, T-1) nats each, 0 outside the mask, by the alignment law: in
    column t the state is ids[0..t]. The sum over a response that the policy wrote has the KL of
    whole responses as its mean, and none of the noise of the tokens that were drawn.

    Example: policy 1/2, 1/2 and reference 1/4, 3/4: 0.1438, and the other way 0.1308.
    """
    p, q = [behaviour_logprobs(network.logits(network.hidden(ids)[:, :-1][mask]), temperature)
            for network in (policy, ref_policy)]                                    # (N, V) each
    zeros = torch.zeros(mask.shape, dtype=p.dtype)                                  # (B, T-1)
    return (zeros.masked_scatter(mask, (p.exp() * (p - q)).sum(dim=1)),
            zeros.masked_scatter(mask, (q.exp() * (q - p)).sum(dim=1)))


def estimates(kl_ref: torch.Tensor) -> dict[str, torch.Tensor]:
    """k1, k2 and k3 of each token from kl_ref = old_logprobs - ref_logprobs, (B, T-1) each.

    Example: kl_ref 0.5 gives 0.5, 0.125 and 0.1065.
    """
    return {"k1": kl_ref, "k2": kl_ref ** 2 / 2, "k3": torch.expm1(-kl_ref) + kl_ref}


class Watcher:
    """Stands in the place of `ppo.rollout`, makes the same rollout, and notes its KLs."""

    def __init__(self):
        self.rollout, self.notes = ppo.rollout, []       # before it is replaced

    def __call__(self, networks, ref_policy: GPT2, reward_function, tokenizer, prompts, cfg,
                 kl_coef: float, iteration: int) -> ppo.Rollout:
        """`ppo.rollout` with its own arguments."""
        batch = self.rollout(networks, ref_policy, reward_function, tokenizer, prompts, cfg,
                             kl_coef, iteration)
        if iteration == cfg.iterations:                  # answers for the page, of no iteration
            return batch
        with torch.no_grad():
            exact, reverse = exact_kls(networks.policy, ref_policy, batch.ids, batch.response_mask,
                                       cfg.temperature)                             # (B, T-1) each
        sums = {"exact": exact, "exact_reverse": reverse, **estimates(batch.kl_ref)}
        self.notes.append({name: values.sum(dim=1) for name, values in sums.items()})     # (B,)
        return batch


def run(task: Task) -> dict:
    """A PPO run; its second half gives the figures, all of it the curves."""
    watcher = Watcher()
    with substituted([(ppo, "rollout", watcher)]):
        train_policy(task, reward=reward_model_folder(task), **ARMS[task.arm])
    half = watcher.notes[len(watcher.notes) // 2:]
    kls = {name: torch.cat([note[name] for note in half]) for name in half[0]}      # (N,) each
    exact = kls["exact"].mean().item()
    figures = {"exact": exact, "exact_reverse": kls["exact_reverse"].mean().item()}
    for name in ESTIMATORS:
        errors = kls[name] - kls["exact"]                                           # (N,)
        figures[f"error_{name}"] = errors.mean().item() / exact
        figures[f"size_of_error_{name}"] = abs(figures[f"error_{name}"])
        figures[f"deviation_{name}"] = errors.std().item()
    curves = {f"{name}_by_step": [round(note[name].mean().item(), 4) for note in watcher.notes]
              for name in ("exact", *ESTIMATORS)}
    return {**figures, **curves}


def findings(rows: Rows) -> list[Finding]:
    """Means, and deviations."""
    found = [unchanged(rows, f"mean error of {name} within 10 % at kl_coef 0.2",
                       (NEAR, f"error_{name}"), 0.0, 0.1) for name in ("k1", "k3")]
    found.append(compare(rows, "mean error of k2 more than 10 % at kl_coef 0.2",
                         (NEAR, "size_of_error_k2"), ">", 0.1))
    return found + [compare(rows, f"{arm}: k3 deviates less than k1", (arm, "deviation_k3"), "<",
                            (arm, "deviation_k1")) for arm in ARMS]


def picture(rows: Rows, path: str) -> None:
    """The estimates along both runs, and how far single responses are off."""
    figure, axes = new_picture(6)
    for panel, arm in zip(axes, ARMS):
        curves = {name: [{"kl": row[f"{name}_by_step"]} for row in rows[arm]]
                  for name in ("exact", *ESTIMATORS)}
        show_series(panel, curves, "kl", f"along the run with {arm}", "iteration",
                    "nats per response")
    for panel, name in zip(axes[2:], ("error_k1", "error_k3", "deviation_k1", "deviation_k3")):
        show_intervals(panel, rows, name, unit=ABOUT.units[name])
    save_picture(figure, path)
