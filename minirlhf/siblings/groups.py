"""Stage 3 without a critic: RLOO, GRPO, Dr. GRPO and REINFORCE++, on PPO's own rollout and loss.

    python -m minirlhf.siblings.groups --method grpo
    python -m minirlhf.siblings.groups --method rloo --reward my_module:my_reward --gold ""

In:  an SFT folder (start of the policy, and the frozen reference), a reward, and prompts.
Out: a checkpoint folder with the policy, `metrics.csv` and `samples.txt` with token tables.

The algorithm, once per iteration:
    sample k responses to each of batch_size / k prompts, and score them        (PPO's `rollout`)
    the advantage of a response: how much better it is than others of the batch
    for `epochs` passes over shuffled minibatches:                                       (update)
        log-probabilities of the same tokens now; the weighted policy loss; one Adam step

What each method changes; R is the reward of a whole response, n its number of tokens:

                rloo              grpo              dr_grpo           reinforce_pp
  reward R      score - kl        score             score             per token, as in PPO
  baseline      mean of the       mean of all k     mean of all k     mean of all tokens
                other k - 1                                           of the batch
  scale         1                 1 / std of the k  1                 1 / std of these tokens
  a token's     1 / B             1 / (B n)         1 / (B longest)   1 / tokens of
  weight                                                              the minibatch
  KL            k1, in R          k3, in the loss   k3, in the loss   k1, in the reward
  clip          none              PPO's             PPO's             PPO's

Choices and deviations:
 1. REINFORCE++ is PPO with a critic that says 0 and with lambda 1: `rollout` and nothing else. It
    needs no groups, so --k 1 is allowed for it alone.
 2. A group whose rewards are all equal says nothing: its advantages are exactly 0. Such groups are
    counted (`equal_groups`). "Equal" allows for rounding, which GRPO would blow up to size 1.
 3. GRPO's deviation is the unbiased one (k - 1), as in TRL; nothing is added to it.
 4. Dr. GRPO's paper has no KL penalty: --kl_coef 0. `longest` is --max_new_tokens.
 5. RLOO's formula is for fresh samples. In a rollout's further steps the ratio stays in the loss,
    without a clip; at ratio 1 its gradient is that of the log-probability.
 6. At ratio 1 GRPO's `pg_loss` over a whole rollout is 0 for any rewards. Its gradient is not.
 7. Several processes and accumulation work as in PPO (`parallel.parts`).

Shapes: B responses, T tokens in the padded row, k responses to a prompt, P = B / k prompts.
Lecture: lectures/09-what-came-after.md, "A baseline without a critic".
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn

from minirlhf import ppo
from minirlhf import ppo_report as report
from minirlhf.data import read_prompts
from minirlhf.engine import parallel, training
from minirlhf.engine.fields import Amount, Count, Device, Natural, Positive, Precision, Seed
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.run_folder import RunFolder, begin, check_run_options
from minirlhf.engine.state import run_inputs
from minirlhf.engine.training import masked_mean
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, token_logprobs
from minirlhf.rewards import Ensemble, load_gold, load_reward, reward_folders, try_once
from minirlhf.tokenizer import load_tokenizer

KL_IN_THE_REWARD = ("rloo", "reinforce_pp")     # the other methods have it in the loss


@dataclass(frozen=True)
class GroupsConfig:
    """Options of `python -m minirlhf.siblings.groups`."""
    method: Literal["rloo", "grpo", "dr_grpo", "reinforce_pp"] = "rloo"    # which of the four
    model: str = "checkpoints/sft"      # SFT folder: start of the policy, and the frozen reference
    reward: str = "checkpoints/reward_model"    # folder, folders with commas, or module:function
    ensemble: Ensemble = "mean"    # how several reward models vote
    prompts: str = "minirlhf.world:prompts"     # .jsonl file, or module:function giving records
    prompt_count: Natural = 4000        # prompts to draw from; 0: all that the file has
    gold: str = "minirlhf.world:gold_reward"    # module:function, logged and never optimised
    out: str = "checkpoints/groups"     # folder to write
    iterations: Count = 25              # rollouts, each with its update
    k: Count = 4                        # responses to each prompt (RLOO 2 and 4, GRPO 64)
    batch_size: Count = 64              # responses in a rollout: batch_size / k prompts
    max_new_tokens: Count = 32          # longest response, tokens
    temperature: Positive = 1.0         # of sampling and every log-probability
    epochs: Count = 2                   # passes over a rollout (1 in the papers of RLOO and GRPO)
    minibatch_size: Count = 32          # responses in one optimiser step
    lr: Amount = 5e-4                   # peak rate; for GPT-2 124M about 1e-6
    warmup_iterations: Natural = 3      # linear warm-up, then linear down to 0
    kl_coef: Amount = 0.2               # weight of the KL to the reference, wherever it stands
    cliprange: Amount = 0.2             # ratio clip; RLOO has none
    missing_end_penalty: Amount = 1.0   # taken off the score of a response that does not end
    max_grad_norm: Positive = 1.0       # gradients are clipped to this norm
    accumulation: Count = 1             # parts that a minibatch is computed in, to save memory
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: Precision = "float32"        # of matrix products
    device: Device = "cpu"              # where to compute
    sample_every: Count = 10            # iterations between printed token tables
    save_every: Count = 5               # iterations between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: Seed = 0                      # of prompts, samples and minibatches

    gamma = lam = 1.0                   # no options: what PPO's rollout reads, without a critic

    def __post_init__(self):
        check_run_options(self)
        check(self.k > 1 or self.method == "reinforce_pp", f"--k is {self.k}, expected at least 2: "
              f"{self.method} compares a response with others to the same prompt")
        check(self.batch_size % self.k == 0, f"--batch_size {self.batch_size} is no multiple of "
              f"--k {self.k}, the responses to each prompt")
        check(self.minibatch_size <= self.batch_size, f"--minibatch_size {self.minibatch_size} is "
              f"larger than --batch_size {self.batch_size}")


METRICS = ["iteration",      # rollouts before this one
           "score",          # mean of the reward function, missing-end penalty included
           "gold",           # mean of the gold judge, which nothing optimises; empty without one
           "rewards",        # mean over responses of R: the score, less the KL where it is in R
           "kl_ref",         # mean over responses of the sum of kl_ref: nats per response
           "kl_old",         # how far the policy moved from its rollout: nats per token
           "entropy",        # of the sampling distribution: nats per token
           "clipfrac",       # share of tokens with the ratio outside the clip range
           "ratio_first",    # largest |ratio - 1| in the first minibatch: 0 up to rounding
           "ratio_max",      # largest ratio of any token
           "pg_loss",        # policy loss
           "kl_loss",        # k3 to the reference, weighted like the policy loss, before kl_coef
           "equal_groups",   # share of prompts whose k rewards are all equal: they teach nothing
           "advantage_std",  # standard deviation of the advantages over response tokens
           "response_len",   # mean response length in tokens, end token included
           "end_rate",       # share of responses that chose the end token
           "sampled_tokens",  # response tokens that were sampled so far, this iteration included
           "grad_norm",      # before clipping, mean over steps
           "lr"]             # learning rate of the iteration


# ---- the mathematics -----------------------------------------------------------------------------

def all_equal(groups: torch.Tensor) -> torch.Tensor:
    """Which groups have equal rewards, up to rounding: (P, k) -> (P,) bool."""
    rounding = 1e-5 * (1 + groups.abs().amax(dim=1))                                # (P,)
    return groups.amax(dim=1) - groups.amin(dim=1) <= rounding


def group_advantages(method: str, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """How much better each response is than the others to its prompt: (B,) -> (B,).

    rewards (B,): k neighbours belong to one prompt. Groups of equal rewards give exactly 0.

    Example: one group with three rewards of 1 and five of 0 gives to these
    rloo .7143 and -.4286, dr_grpo .625 and -.375, grpo 1.2076 and -.7246.
    Source: RLOO: Ahmadian et al. 2024 (arXiv 2402.14740), section 3; GRPO: Shao et al. 2024
    (arXiv 2402.03300), section 4.1; Dr. GRPO: Liu et al. 2025 (arXiv 2503.20783), section 3.1.
    Lecture: lectures/09-what-came-after.md, "A baseline without a critic".
    """
    groups = rewards.view(-1, k)                                                    # (P, k)
    total = groups.sum(dim=1, keepdim=True)                                         # (P, 1)
    if method == "rloo":
        # careful: a mean over all k holds the response itself; it gives (k-1)/k of the gradient
        advantages = groups - (total - groups) / (k - 1)                            # (P, k)
    elif method == "grpo":
        advantages = (groups - total / k) / groups.std(dim=1, keepdim=True)         # (P, k)
    else:
        advantages = groups - total / k                                             # (P, k)
    # careful: 0 / 0 in GRPO, and in all of them what rounding leaves
    return torch.where(all_equal(groups)[:, None], 0.0, advantages).view(-1)        # (B,)


def token_weights(method: str, mask: torch.Tensor, longest: int) -> torch.Tensor:
    """How much each token counts in the loss: mask (B, T-1) -> weights (B, T-1), 0 outside.

    The mask is that of a whole minibatch; `longest` is the limit of a response in tokens.

    Example: responses of 2 and 8 tokens, longest 10. A token of the first and of the second weighs
    rloo 1/2 and 1/2, grpo 1/4 and 1/16, dr_grpo 1/20 and 1/20, reinforce_pp 1/10 and 1/10.
    Source: as in `group_advantages`; reinforce_pp: as PPO's mean.
    Lecture: lectures/09-what-came-after.md, "A baseline without a critic".
    """
    B, lengths = len(mask), mask.sum(dim=1, keepdim=True)                           # (B, 1)
    divisors = {"rloo": B, "grpo": B * lengths, "dr_grpo": B * longest,
                "reinforce_pp": mask.sum()}
    return torch.where(mask, 1 / divisors[method], 0.0)                             # (B, T-1)


def k3_to_reference(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimate of KL(policy || reference), per token: (B, T-1) nats, never below 0.

    As a value it is unbiased. careful: as a loss its expected gradient is that of the other
    direction, KL(reference || policy).

    Example: log-probabilities -1 under the policy and -2 under the reference give
    exp(-1) - 1 + 1 = 0.3679.
    Source: Schulman 2020, joschu.net/blog/kl-approx.html; GRPO's paper, equation 4.
    Lecture: lectures/09-what-came-after.md, "Where the KL stands".
    """
    difference = ref_logprobs - logprobs                                            # (B, T-1)
    return difference.clamp(max=80).exp() - 1 - difference


# ---- the network ---------------------------------------------------------------------------------

class PolicyAlone(nn.Module):
    """A policy in the place of PPO's policy with critic: all its values are 0."""

    def __init__(self, policy: GPT2):
        super().__init__()
        self.policy = policy

    def evaluate_actions(self, ids: torch.Tensor, mask: torch.Tensor, temperature: float):
        """ids (B, T), mask (B, T-1) -> logprobs, values, entropy, each (B, T-1)."""
        logprobs, entropy = token_logprobs(self.policy.hidden(ids), ids, mask,
                                           self.policy.wte.weight, temperature)
        return logprobs, torch.zeros_like(logprobs), entropy


# ---- collecting ----------------------------------------------------------------------------------

def rollout(networks: PolicyAlone, ref_policy: GPT2, reward_function, tokenizer,
            prompts: list[list[int]], cfg: GroupsConfig, iteration: int) -> ppo.Rollout:
    """PPO's rollout of k responses to each prompt, with the method's own advantages."""
    rows = [prompt for prompt in prompts for _ in range(cfg.k)]                     # B
    kl_coef = cfg.kl_coef if cfg.method in KL_IN_THE_REWARD else 0.0
    batch = ppo.rollout(networks, ref_policy, reward_function, tokenizer, rows, cfg, kl_coef,
                        iteration)
    if cfg.method != "reinforce_pp":                     # whose advantages are there already
        totals = batch.rewards.sum(dim=1)                                           # (B,)
        advantages = group_advantages(cfg.method, totals, cfg.k)                    # (B,)
        batch.advantages = torch.where(batch.response_mask, advantages[:, None], 0.0)
    return batch


def measure(batch: ppo.Rollout, gold_function, tokenizer, cfg: GroupsConfig, sampled: int) -> dict:
    """The metrics that a rollout gives, before its update; `sampled` tokens came before it."""
    row = report.measure(batch, gold_function, tokenizer)
    advantages = batch.advantages[batch.response_mask]                              # (N,)
    row.update(equal_groups=all_equal(batch.rewards.sum(dim=1).view(-1, cfg.k)).float().mean()
               .item() if cfg.k > 1 else "",
               advantage_std=advantages.std(unbiased=False).item(),
               sampled_tokens=sampled + len(advantages))
    return {name: row[name] for name in METRICS if name in row}


# ---- update --------------------------------------------------------------------------------------

def update(networks: PolicyAlone, optimizer: torch.optim.Optimizer, batch: ppo.Rollout,
           cfg: GroupsConfig, iteration: int) -> dict:
    """Several passes over the rollout in shuffled minibatches; metrics over all response tokens."""
    cliprange = math.inf if cfg.method == "rloo" else cfg.cliprange
    kl_coef = 0.0 if cfg.method in KL_IN_THE_REWARD else cfg.kl_coef
    steps: list[dict] = []
    for rows in ppo.minibatches(cfg, iteration):
        where = f"iteration {iteration}, step {len(steps)}"
        mask = batch.response_mask[rows]                                            # (b, T-1)
        weights = token_weights(cfg.method, mask, cfg.max_new_tokens)               # (b, T-1)
        measured = []
        optimizer.zero_grad()
        for places in parallel.parts(torch.arange(len(rows)), cfg.minibatch_size,
                                     cfg.accumulation):
            part, weight = batch.rows(rows[places]), weights[places]     # the whole, by default
            logprobs, _, _ = networks.evaluate_actions(part.ids, part.response_mask,
                                                       cfg.temperature)             # (b, T-1)
            # a weighted sum: the weights are in the advantages, and nothing is divided by 1
            pg_loss, ratio = ppo.policy_loss(logprobs, part.old_logprobs, weight * part.advantages,
                                             part.response_mask, cliprange, token_count=1)
            k3 = k3_to_reference(logprobs, part.ref_logprobs)                       # (b, T-1)
            kl_loss = masked_mean(weight * k3, part.response_mask, 1)
            loss = pg_loss + kl_coef * kl_loss
            training.check_finite(where, rows[places], logprobs=logprobs, loss=loss)
            loss.backward()
            measured.append((ratio.detach(), pg_loss.detach(), kl_loss.detach()))
        step = report.measure_step(measured, mask, cfg.cliprange)
        if not steps:
            report.check_first_ratio(step, where, cfg.dtype)
        step["grad_norm"] = training.optimiser_step(networks, optimizer, cfg.max_grad_norm, where)
        steps.append(step)
    after = report.summarise(steps)
    after["kl_loss"] = after.pop("vf_loss")              # the second of the measured losses
    return after


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: GroupsConfig) -> dict:
    """Train and save; returns the last row of metrics."""
    folder = begin(cfg, cfg.model, *reward_folders(cfg.reward))
    policy = load_network(GPT2, folder).to(cfg.device)
    policy.checkpointing, policy.dtype = cfg.checkpointing, cfg.dtype
    ref_policy, networks = copy.deepcopy(policy).requires_grad_(False), PolicyAlone(policy)
    tokenizer = load_tokenizer(folder, policy)
    reward_function = load_reward(cfg.reward, cfg.ensemble, tokenizer, cfg.device, cfg.dtype)
    frozen = [ref_policy, *getattr(reward_function, "models", [])]
    context = min(network.config.n_positions for network in frozen)
    per_rollout = cfg.batch_size // cfg.k
    prompts, _ = read_prompts(cfg.prompts, tokenizer, context, cfg.max_new_tokens, model=folder,
                              count=cfg.prompt_count, seed=cfg.seed, fewest=per_rollout)
    gold_function = load_gold(cfg.gold)
    try_once(prompts[0].ids, tokenizer, reward_function, gold_function, device=cfg.device)
    groups = [{"params": list(networks.parameters()), "peak": cfg.lr}]
    optimizer = torch.optim.Adam(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5, fused=True)
    inputs = run_inputs(ref_policy, reward_function, prompts, gold_function)
    print(f"{cfg.method}: {cfg.iterations} iterations of {per_rollout} prompts with {cfg.k} "
          f"responses each, reward {cfg.reward}", flush=True)
    with RunFolder(cfg, cfg.iterations, METRICS, inputs, networks, optimizer) as run:
        for iteration in run.steps():
            training.set_learning_rate(optimizer, iteration, cfg.iterations, cfg.warmup_iterations,
                                       "linear")
            order = training.batch_order(len(prompts), per_rollout, cfg.seed, iteration, True)
            batch = rollout(networks, ref_policy, reward_function, tokenizer,
                            [prompts[i].ids for i in order], cfg, iteration)
            before = measure(batch, gold_function, tokenizer, cfg, run.row.get("sampled_tokens", 0))
            after = update(networks, optimizer, batch, cfg, iteration)
            optimizer.zero_grad()                        # frees memory for the next rollout
            run.log({"iteration": iteration, **before, **after,
                     "lr": optimizer.param_groups[0]["lr"]})
            gold = f"gold {run.row['gold']:6.2f}  " if gold_function else ""
            print(f"  iteration {iteration:3d}  score {run.row['score']:6.2f}  {gold}kl_ref "
                  f"{run.row['kl_ref']:5.2f}  entropy {run.row['entropy']:.2f}  clipfrac "
                  f"{run.row['clipfrac']:.2f}  equal groups {run.row['equal_groups'] or 0:.2f}  "
                  f"length {run.row['response_len']:4.1f}  {run.seconds():.1f} s", flush=True)
            if iteration % cfg.sample_every == 0 or iteration + 1 == cfg.iterations:
                run.sample(f"iteration {iteration}\n{report.token_table(batch, 0, tokenizer)}\n")
        training.check_frozen(*frozen)
        run.publish(tokenizer, policy)
    return run.row


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(GroupsConfig))
