"""Stage 3, PPO: improve the SFT policy against the reward model, one token at a time.

    python -m minirlhf.ppo
    python -m minirlhf.ppo --reward my_module:my_reward --prompts prompts.jsonl --gold ""

In:  an SFT folder (start of the policy, and the frozen reference), a reward: reward-model folders
     or a Python function, and prompts. Out: a checkpoint folder with the policy, its critic,
     `metrics.csv` and `samples.txt` with token tables.

The algorithm, once per iteration:
    sample a response to each of `batch_size` prompts from the policy                      (rollout)
    log-probabilities of its tokens under policy and reference; values by the critic; one score
    reward of every token: -kl_coef * kl_ref; the last action gets the score on top
    GAE turns rewards and values into advantages and returns; then advantages are whitened
    for `epochs` passes over shuffled minibatches:                                          (update)
        new log-probabilities and values of the same tokens
        clipped policy loss + vf_coef * clipped value loss - ent_coef * entropy; one Adam step

Choices and deviations:
 1. Sampling, old, new and reference log-probabilities all come from one function, with one
    temperature, and no network has dropout. So the ratio is 1 on the first minibatch and kl_ref is
    0 in iteration 0, and the run stops if they are not (`check_invariants`, `update`).
 2. The score sits on the last action: the end token, or the last token if none was chosen; then
    `missing_end_penalty` is taken off the score, and the value behind it counts as 0.
 3. `returns` are taken before whitening; whitening is over all response tokens of the rollout.
 4. Means are over response tokens, so a long response weighs more than a short one.
 5. `--critic separate` (InstructGPT) starts the value network from the reward model;
    `--critic shared` (the lecture) puts a value head on the policy's trunk. Both heads start at 0.
 6. The value loss is clipped and halved and Adam's epsilon is 1e-5, as in Ziegler et al. 2019.
 7. InstructGPT's PPO-ptx term and weight averaging are left out.
 8. A minibatch may be computed in parts, by several processes (torchrun): each part's loss is its
    share of the minibatch's mean, so gradients add up. Whitening and metrics see the whole batch.

Shapes: B sequences, T tokens in the padded row, C channels, V vocabulary.
Lecture: lectures/03-ppo.md.
"""

import copy
import math
import os
import time
from dataclasses import dataclass, fields

import torch
import torch.nn as nn

from minirlhf import parallel
from minirlhf.checkpoint import RunFolder, check_run_options, fingerprint
from minirlhf.common import (check, check_choice, check_finite, check_output, check_range,
                             clip_gradients, learning_rate, masked_mean, random_stream, run,
                             whiten)
from minirlhf.data import (Tokenizer, encode_prompt, fit_rows, load_function, read_records,
                           response_mask)
from minirlhf.gpt2 import (GPT2, Generation, ScalarModel, check_tokenizer, find_folder, generate,
                           scalar_head, token_logprobs)
from minirlhf.rewards import ModelReward, is_function, load_reward


@dataclass(frozen=True)
class PPOConfig:
    """Options of `python -m minirlhf.ppo`."""
    model: str = "checkpoints/sft"      # SFT folder: start of the policy, and the frozen reference
    reward: str = "checkpoints/reward_model"    # folder, folders with commas, or module:function
    ensemble: str = "mean"              # how several reward models vote: mean, or min (pessimistic)
    prompts: str = "minirlhf.world:prompts"     # .jsonl file, or module:function giving records
    prompt_count: int = 4000            # prompts to draw from; 0: all that the file has
    gold: str = "minirlhf.world:gold_reward"    # module:function logged beside the score, not used
    out: str = "checkpoints/ppo"        # folder to write
    critic: str = "separate"            # separate (from the reward model), shared (head on policy)
    iterations: int = 25                # rollouts, each with its update
    batch_size: int = 64                # prompts in a rollout (512 in InstructGPT)
    max_new_tokens: int = 32            # longest response, tokens
    temperature: float = 1.0            # of sampling and every log-probability (1 in InstructGPT)
    epochs: int = 2                     # passes over a rollout (Ziegler et al. 4, InstructGPT 1)
    minibatch_size: int = 32            # sequences in one optimiser step
    lr: float = 5e-4                    # peak rate of the policy; for GPT-2 124M 3e-6 to 1e-5
    critic_lr: float = 1e-3             # peak rate of a separate critic, or of the value head
    warmup_iterations: int = 3          # linear warm-up, then linear down to 0
    gamma: float = 1.0                  # discount; 1: a token now is worth a token later
    lam: float = 0.95                   # GAE's lambda (Ziegler et al.)
    kl_coef: float = 0.2                # weight of kl_ref, beta in papers (0.02 in InstructGPT)
    kl_target: float = 0.0              # > 0: adapt kl_coef to this kl_ref, nats a response
    kl_horizon: float = 10_000.0        # responses over which the adaptation works (Ziegler et al.)
    cliprange: float = 0.2              # ratio clip (Schulman et al. 2017)
    cliprange_value: float = 0.2        # how far a value may move from the old one in an update
    vf_coef: float = 0.1                # weight of the value loss (Ziegler et al.)
    ent_coef: float = 0.0               # weight of the entropy bonus
    missing_end_penalty: float = 1.0    # taken off the score of a response that does not end
    max_grad_norm: float = 1.0          # gradients of all that is trained are clipped to this norm
    kl_old_stop: float = 0.0            # > 0: end an update when kl_old exceeds it, nats a token
    accumulation: int = 1               # parts that a minibatch is computed in, to save memory
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: str = "float32"              # of matrix products: float32, bfloat16
    device: str = "cpu"                 # cpu, cuda, mps
    sample_every: int = 10              # iterations between printed token tables
    save_every: int = 5                 # iterations between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: int = 0                       # of prompts, samples and minibatches

    def __post_init__(self):
        check_run_options(self)
        check_choice(self, "critic", ("separate", "shared"))
        check_choice(self, "ensemble", ("mean", "min"))
        for name in ("iterations", "batch_size", "max_new_tokens", "epochs", "minibatch_size",
                     "sample_every"):
            check_range(self, name, 1, 10**9)
        for name in ("prompt_count", "warmup_iterations"):
            check_range(self, name, 0, 10**9)
        # with a horizon shorter than a rollout kl_coef could turn negative
        check_range(self, "kl_horizon", self.batch_size if self.kl_target > 0 else 1, 10**9)
        for name in ("lr", "critic_lr", "kl_coef", "kl_target", "vf_coef", "ent_coef",
                     "kl_old_stop", "missing_end_penalty", "cliprange", "cliprange_value"):
            check_range(self, name, 0, 1e6)
        for name in ("gamma", "lam"):
            check_range(self, name, 0, 1)
        check_range(self, "temperature", 1e-3, 100)
        check_range(self, "max_grad_norm", 1e-9, 1e9)
        check(self.minibatch_size <= self.batch_size, f"--minibatch_size {self.minibatch_size} is "
              f"larger than --batch_size {self.batch_size}")


# ---- the mathematics -----------------------------------------------------------------------------

def shaped_rewards(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                   kl_coef: float) -> torch.Tensor:
    """Reward of every token: -kl_coef * kl_ref, and the score on each row's last action.

    scores (B,), kl_ref (B, T-1) nats, mask (B, T-1) bool -> rewards (B, T-1), 0 outside the mask.

    Example: score 1, kl_coef 0.1, kl_ref 0.5, -0.2, 0.3 and all in the mask give
    -0.05, 0.02, 0.97.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2, token by token.
    Lecture: lectures/03-ppo.md, "The KL-shaped reward".
    """
    rewards = torch.where(mask, -kl_coef * kl_ref, torch.zeros_like(kl_ref))        # (B, T-1)
    column = torch.arange(mask.shape[1], device=mask.device)                        # (T-1,)
    # careful: the last action is the last column of the mask, not the last column of the row
    last_action = torch.where(mask, column, -1).max(dim=1).values                   # (B,)
    is_last = column == last_action[:, None]                                        # (B, T-1)
    return rewards + torch.where(is_last, scores[:, None], torch.zeros_like(rewards))


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
        lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: advantages and returns, (B, T-1) each, 0 outside the mask.

    rewards, values (B, T-1), mask (B, T-1) bool. The value behind the last action counts as 0.
    delta[t] = rewards[t] + gamma * values[t+1] - values[t]
    advantages[t] = delta[t] + gamma * lam * advantages[t+1]
    returns = advantages + values

    Example: rewards -0.1, -0.2, 1.0, values 0.5, 0.4, 0.6, gamma 1, lam 0.95: delta is -0.2, 0.0,
    0.4, advantages are 0.161, 0.38, 0.4 and returns 0.661, 0.78, 1.0. With lam below 1 and values
    that are still 0, the first of n tokens gets only (gamma * lam)^(n-1) of the score.
    Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16.
    Lecture: lectures/03-ppo.md, "GAE by hand".
    """
    values = torch.where(mask, values, torch.zeros_like(values))                    # (B, T-1)
    rewards = torch.where(mask, rewards, torch.zeros_like(rewards))                 # (B, T-1)
    advantages = torch.zeros_like(values)                                           # (B, T-1)
    next_value = torch.zeros_like(values[:, 0])                                     # (B,)
    next_advantage = torch.zeros_like(values[:, 0])                                 # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]                   # (B,)
        advantages[:, t] = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def policy_loss(logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor,
                mask: torch.Tensor, cliprange: float,
                token_count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective, to be minimised, and the ratio of every token. All inputs (B, T-1).

    `token_count` is that of the whole minibatch when these rows are a part of it (`masked_mean`).
    ratio = exp(logprobs - old_logprobs); a token's loss is the larger of -ratio * advantage and
    -clip(ratio, 1 - cliprange, 1 + cliprange) * advantage.

    Example, cliprange 0.2: ratio 1.5 with advantage 1 gives -1.2 and no gradient; ratio 1.5 with
    advantage -1 gives 1.5 with its gradient; ratio 1 with advantage 1 gives -1.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    Lecture: lectures/03-ppo.md, "The clipped objective".
    """
    difference = torch.where(mask, logprobs - old_logprobs, torch.zeros_like(logprobs))
    # careful: exp(89) is inf in float32, and 0 * inf, its gradient where the clip holds, is nan
    ratio = difference.clamp(max=80).exp()                                          # (B, T-1)
    unclipped = -ratio * advantages                                                 # (B, T-1)
    clipped = -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages               # (B, T-1)
    return masked_mean(torch.maximum(unclipped, clipped), mask, token_count), ratio


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor,
               mask: torch.Tensor, cliprange_value: float,
               token_count: int | None = None) -> torch.Tensor:
    """Half the mean squared error of the values, clipped around the old ones. All inputs (B, T-1).

    Example, cliprange_value 0.2: value 1, old value 0, return 1: the clipped value 0.2 errs by 0.8,
    the larger error counts, the loss is 0.5 * 0.64 = 0.32.
    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py, loss.
    Lecture: lectures/03-ppo.md, "The critic".
    """
    # careful: the gradient of what is masked afterwards is 0 * inf if it was inf
    zeros = torch.zeros_like(values)                                                # (B, T-1)
    values = torch.where(mask, values, zeros)
    old_values = torch.where(mask, old_values, zeros)
    returns = torch.where(mask, returns, zeros)
    nearby = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors = torch.maximum((values - returns) ** 2, (nearby - returns) ** 2)        # (B, T-1)
    return 0.5 * masked_mean(errors, mask, token_count)


def adapt_kl_coef(kl_coef: float, kl_ref: float, target: float, responses: int,
                  horizon: float) -> float:
    """Move kl_coef so that kl_ref (nats a response) approaches `target`.

    Example: kl_coef 0.1, kl_ref 9, target 6, 64 responses, horizon 10000: the error 0.5 is cut to
    0.2 and 0.1 becomes 0.1 * (1 + 0.2 * 64 / 10000) = 0.100128.
    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py, AdaptiveKLController.
    """
    error = max(-0.2, min(0.2, kl_ref / target - 1))
    return kl_coef * (1 + error * responses / horizon)


# ---- the networks --------------------------------------------------------------------------------

class PolicyWithValue(nn.Module):
    """All that PPO trains: the policy, and a critic of its own or a value head on its trunk."""

    def __init__(self, policy: GPT2, critic: ScalarModel | None):
        super().__init__()
        self.policy, self.critic = policy, critic
        if critic is None:
            self.value_head = nn.Linear(policy.config.n_embd, 1, bias=False)    # as ScalarModel's
            nn.init.zeros_(self.value_head.weight)       # first advantages are the rewards' alone
        else:
            nn.init.zeros_(critic.score_head.weight)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, temperature: float,
                entropy_grad: bool = False):
        """ids (B, T), mask (B, T-1) -> logprobs, values, entropy, each (B, T-1)."""
        hidden = self.policy.hidden(ids)                                            # (B, T, C)
        logprobs, entropy = token_logprobs(hidden, ids, mask, self.policy.wte.weight, temperature,
                                           entropy_grad)                            # (B, T-1) each
        if self.critic is None:
            values = scalar_head(self.value_head, hidden)[:, :-1]                   # (B, T-1)
        else:
            values = self.critic(ids)[:, :-1]                                       # (B, T-1)
        return logprobs, torch.where(mask, values, torch.zeros_like(values)), entropy


def make_networks(cfg: PPOConfig) -> tuple[PolicyWithValue, GPT2]:
    """Policy with critic, and the frozen reference. The policy and reference start equal."""
    policy = GPT2.from_pretrained(cfg.model)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    critic = None
    if cfg.critic == "separate":
        if is_function(cfg.reward):                      # a function has no weights to start from
            critic = ScalarModel(policy.config)
            critic.transformer.load_state_dict(policy.state_dict())
        else:
            critic = ScalarModel.from_pretrained(cfg.reward.split(",")[0])
        critic.transformer.checkpointing = cfg.checkpointing
    policy.checkpointing = cfg.checkpointing
    return PolicyWithValue(policy, critic).to(cfg.device), ref_policy.to(cfg.device)


# ---- collecting ----------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One batch of responses with all that the update needs."""
    ids: torch.Tensor             # (B, T)
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor         # (B,)
    ended: torch.Tensor           # (B,) bool
    response_mask: torch.Tensor   # (B, T-1) bool
    old_logprobs: torch.Tensor    # (B, T-1)
    ref_logprobs: torch.Tensor    # (B, T-1)
    old_values: torch.Tensor      # (B, T-1)
    entropy: torch.Tensor         # (B, T-1)
    scores: torch.Tensor          # (B,)
    kl_ref: torch.Tensor          # (B, T-1)
    rewards: torch.Tensor         # (B, T-1)
    advantages: torch.Tensor      # (B, T-1) whitened
    returns: torch.Tensor         # (B, T-1)

    def __repr__(self) -> str:
        lines = []
        for field in fields(self):
            x = getattr(self, field.name)
            kept = x[self.response_mask] if x.shape == self.response_mask.shape else x
            numbers = kept.float()
            lines.append(f"{field.name:15} {str(tuple(x.shape)):12} mean {numbers.mean():9.3f}  "
                         f"min {numbers.min():9.3f}  max {numbers.max():9.3f}")
        return "Rollout (figures over response tokens)\n  " + "\n  ".join(lines)


def row_parts(rows: torch.Tensor, cfg: PPOConfig) -> list[torch.Tensor]:
    """This process's share of the row numbers `rows`, in parts that fit into memory."""
    most = math.ceil(cfg.minibatch_size / cfg.accumulation)
    return [part for part in rows[parallel.share(len(rows))].split(most) if len(part) > 0]


def sample_responses(policy: GPT2, prompts: list[list[int]], cfg: PPOConfig, tokenizer: Tokenizer,
                     iteration: int) -> Generation:
    """One response to every prompt; several processes sample a share each."""
    B, mine = len(prompts), parallel.share(len(prompts))
    generator = random_stream(cfg.seed, 1, iteration)
    # each row uses its own random numbers: here those of the rows of the processes before are drawn
    torch.rand(mine.start, cfg.max_new_tokens, generator=generator, dtype=torch.float64)
    made = generate(policy, prompts[mine], cfg.max_new_tokens, end_token=tokenizer.end_token,
                    temperature=cfg.temperature, generator=generator,
                    where=f"iteration {iteration}")
    return Generation(parallel.gather_rows(made.ids, B, fill=tokenizer.end_token),
                      parallel.gather_rows(made.prompt_lengths, B),
                      parallel.gather_rows(made.lengths, B), parallel.gather_rows(made.ended, B),
                      parallel.gather_rows(made.logprobs, B))


def score_responses(networks: PolicyWithValue, ref_policy: GPT2, reward_function,
                    tokenizer: Tokenizer, made: Generation, mask: torch.Tensor, cfg: PPOConfig):
    """old_logprobs, old_values, entropy, ref_logprobs (B, T-1) each, and scores (B,)."""
    B, mine = len(made.ids), parallel.share(len(made.ids))
    parts = []
    for part in row_parts(torch.arange(B), cfg):         # (b,) row numbers
        ids, part_mask = made.ids[part], mask[part]                                 # (b, T)
        old_logprobs, old_values, entropy = networks(ids, part_mask, cfg.temperature)
        ref_logprobs, _ = token_logprobs(ref_policy.hidden(ids), ids, part_mask,
                                         ref_policy.wte.weight, cfg.temperature)    # (b, T-1)
        parts.append((old_logprobs, old_values, entropy, ref_logprobs))
    per_token = [parallel.gather_rows(torch.cat(column), B) for column in zip(*parts)]
    scores = reward_function(made.ids[mine], made.prompt_lengths[mine], made.lengths[mine],
                             tokenizer)                                             # (b,)
    shape = tuple(scores.shape) if torch.is_tensor(scores) else type(scores).__name__
    # careful: scores of shape (B, 1) would broadcast to (B, B) later
    check(shape == (mine.stop - mine.start,), f"--reward {cfg.reward} returned {shape}, expected a "
          f"tensor of shape {(mine.stop - mine.start,)}: one score a response")
    scores = parallel.gather_rows(scores.float().to(mask.device), B)                # (B,)
    return *per_token, scores                            # 4 x (B, T-1), (B,)


def rollout(networks: PolicyWithValue, ref_policy: GPT2, reward_function, tokenizer: Tokenizer,
            prompts: list[list[int]], cfg: PPOConfig, kl_coef: float, iteration: int) -> Rollout:
    """Sample responses, score them, and turn scores into advantages and returns."""
    with torch.no_grad(), parallel.precision(cfg):
        made = sample_responses(networks.policy, prompts, cfg, tokenizer, iteration)
        mask = response_mask(made.prompt_lengths, made.lengths, made.ids.shape[1])  # (B, T-1)
        old_logprobs, old_values, entropy, ref_logprobs, scores = score_responses(
            networks, ref_policy, reward_function, tokenizer, made, mask, cfg)
    for name, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs),
                         ("old_values", old_values), ("scores", scores)):
        check_finite(name, tensor, f"iteration {iteration}")
    scores = scores - cfg.missing_end_penalty * ~made.ended                         # (B,)
    kl_ref = old_logprobs - ref_logprobs                                            # (B, T-1)
    rewards = shaped_rewards(scores, kl_ref, mask, kl_coef)                         # (B, T-1)
    advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)        # (B, T-1) each
    advantages = whiten(advantages, mask)                # careful: after the returns, not before
    batch = Rollout(made.ids, made.prompt_lengths, made.lengths, made.ended, mask, old_logprobs,
                    ref_logprobs, old_values, entropy, scores, kl_ref, rewards, advantages,
                    returns)
    check_invariants(batch, made.logprobs, kl_coef, iteration, TOLERANCE[cfg.dtype])
    return batch


# How far apart, in nats, two log-probabilities of the same token may be: their sums are added in
# another order. The largest found in 25 default iterations: 7e-6 with float32, 0.12 with bfloat16.
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}


def check_invariants(batch: Rollout, sampled_logprobs: torch.Tensor, kl_coef: float,
                     iteration: int, tolerance: float = 1e-2) -> None:
    """What must hold in every rollout."""
    mask = batch.response_mask
    apart = ((sampled_logprobs - batch.old_logprobs) * mask).abs().max().item()
    check(apart < tolerance, f"iteration {iteration}: tokens were sampled from another "
          f"distribution than they are scored under (log-probabilities differ by {apart:.3g})")
    if iteration == 0:
        largest = batch.kl_ref.abs().max().item()
        check(largest < 1e-3, f"kl_ref is {largest:.3g} in iteration 0, expected 0: policy and "
              "reference must start from the same weights")
    expected = batch.scores - kl_coef * (batch.kl_ref * mask).sum(dim=1)            # (B,)
    apart = (batch.rewards.sum(dim=1) - expected).abs().max().item()
    check(apart < 1e-3 * (1 + expected.abs().max().item()), f"iteration {iteration}: the rewards "
          f"of a response do not add up to score - kl_coef * kl_ref (off by {apart:.3g})")


# ---- update --------------------------------------------------------------------------------------

def train_step(networks: PolicyWithValue, optimizer: torch.optim.Optimizer, batch: Rollout,
               rows: torch.Tensor, cfg: PPOConfig, first: bool, where: str) -> dict | None:
    """One optimiser step on the minibatch of the row numbers `rows` (b,); None if kl_old stops it.

    Returns metrics as sums over the minibatch's response tokens, and how many these are.
    """
    tokens = int(batch.response_mask[rows].sum())
    sums = dict.fromkeys(("kl_old", "clipfrac", "pg_loss", "vf_loss"), 0.0)
    ratio_max, ratio_first = 0.0, 0.0
    optimizer.zero_grad()
    for part in row_parts(rows, cfg):
        mask = batch.response_mask[part]                                            # (b, T-1)
        with parallel.precision(cfg):
            logprobs, values, entropy = networks(batch.ids[part], mask, cfg.temperature,
                                                 entropy_grad=cfg.ent_coef > 0)     # (b, T-1) each
        check_finite("logprobs", logprobs.detach(), where, part)
        check_finite("values", values.detach(), where, part)
        pg_loss, ratio = policy_loss(logprobs, batch.old_logprobs[part], batch.advantages[part],
                                     mask, cfg.cliprange, tokens)
        vf_loss = value_loss(values, batch.old_values[part], batch.returns[part], mask,
                             cfg.cliprange_value, tokens)
        ent_bonus = masked_mean(entropy, mask, tokens)
        loss = pg_loss + cfg.vf_coef * vf_loss - cfg.ent_coef * ent_bonus
        check_finite("loss", loss.detach(), where)
        loss.backward()
        real_ratio = ratio.detach()[mask]                                           # (N,)
        k3 = real_ratio - 1 - real_ratio.clamp(min=1e-30).log()     # (N,) a ratio may round to 0
        sums["kl_old"] += k3.sum().item()
        sums["clipfrac"] += ((real_ratio - 1).abs() > cfg.cliprange).sum().item()
        sums["pg_loss"] += pg_loss.item() * tokens
        sums["vf_loss"] += vf_loss.item() * tokens
        ratio_max = max(ratio_max, real_ratio.max().item())
        ratio_first = max(ratio_first, (real_ratio - 1).abs().max().item())
    sums = parallel.sum_over_processes(sums, batch.ids.device)
    # before the first step kl_old is 0 up to rounding, so an update is never empty
    if not first and 0 < cfg.kl_old_stop < sums["kl_old"] / tokens:
        return None                                      # the gradients are left: zero_grad is next
    ratio_first = parallel.largest_over_processes(ratio_first, batch.ids.device)
    check(not first or ratio_first < TOLERANCE[cfg.dtype], f"{where}: the first ratio is off 1 by "
          f"{ratio_first:.3g}: policy and rollout disagree before any step was taken")
    parallel.add_gradients(networks.parameters())
    grad_norm = clip_gradients(networks, cfg.max_grad_norm, where)
    optimizer.step()
    return {**sums, "tokens": tokens, "grad_norm": grad_norm, "ratio_first": ratio_first,
            "ratio_max": parallel.largest_over_processes(ratio_max, batch.ids.device)}


def minibatches(cfg: PPOConfig, iteration: int) -> list[torch.Tensor]:
    """Row numbers (b,) for every optimiser step of an update: `epochs` shuffles of the rollout."""
    found: list[torch.Tensor] = []
    for epoch in range(cfg.epochs):
        generator = random_stream(cfg.seed, 2, iteration, epoch)
        found += torch.randperm(cfg.batch_size, generator=generator).split(cfg.minibatch_size)
    return found


def update(networks: PolicyWithValue, optimizer: torch.optim.Optimizer, batch: Rollout,
           cfg: PPOConfig, iteration: int) -> dict:
    """Several passes over the rollout in shuffled minibatches; metrics over all real tokens."""
    steps: list[dict] = []
    for rows in minibatches(cfg, iteration):
        found = train_step(networks, optimizer, batch, rows, cfg, not steps,
                           f"iteration {iteration}, step {len(steps)}")
        if found is None:
            break
        steps.append(found)
    tokens = sum(step["tokens"] for step in steps)
    means = {name: sum(step[name] for step in steps) / tokens
             for name in ("kl_old", "clipfrac", "pg_loss", "vf_loss")}
    return {**means, "ratio_first": steps[0]["ratio_first"],
            "ratio_max": max(step["ratio_max"] for step in steps),
            "grad_norm": sum(step["grad_norm"] for step in steps) / len(steps)}


# ---- metrics and the token table -----------------------------------------------------------------

METRICS = ["iteration",      # rollouts before this one
           "score",          # mean of the reward function, missing-end penalty included
           "gold",           # mean of the gold judge, which nothing optimises; empty without one
           "rewards",        # mean over responses of the sum of a response's rewards
           "kl_ref",         # mean over responses of the sum of kl_ref: nats a response
           "kl_old",         # how far the policy moved from its rollout before a step: nats a token
           "entropy",        # of the sampling distribution: nats a token
           "clipfrac",       # share of tokens with the ratio outside the clip range
           "ratio_first",    # largest |ratio - 1| in the first minibatch: 0 up to rounding
           "ratio_max",      # largest ratio of any token
           "pg_loss",        # policy loss
           "vf_loss",        # value loss, before vf_coef
           "explained_var",  # 1 - Var(returns - old_values) / Var(returns): 1 perfect, 0 useless
           "advantage_std",  # standard deviation of the advantages before whitening
           "response_len",   # mean response length in tokens, end token included
           "end_rate",       # share of responses that chose the end token
           "grad_norm",      # before clipping, mean over steps
           "lr",             # the policy's
           "kl_coef"]        # weight of kl_ref that this iteration used


def measure(batch: Rollout, gold: torch.Tensor | None) -> dict:
    """The metrics that a rollout gives, before its update."""
    mask = batch.response_mask
    # what the critic did not foresee: the error of its values, and the advantages before whitening
    errors = (batch.returns - batch.old_values)[mask]                               # (N,)
    spread = batch.returns[mask].var(unbiased=False).item()
    return {"score": batch.scores.mean().item(),
            "gold": gold.float().mean().item() if gold is not None else "",
            "rewards": batch.rewards.sum(dim=1).mean().item(),
            "kl_ref": (batch.kl_ref * mask).sum(dim=1).mean().item(),
            "entropy": masked_mean(batch.entropy, mask).item(),
            "explained_var": 1 - errors.var(unbiased=False).item() / max(spread, 1e-8),
            "advantage_std": errors.std(unbiased=False).item(),
            "response_len": (batch.lengths - batch.prompt_lengths).float().mean().item(),
            "end_rate": batch.ended.float().mean().item()}


def token_table(batch: Rollout, row: int, tokenizer: Tokenizer) -> str:
    """One response, token by token, with everything PPO knows about it; totals below."""
    prompt = batch.ids[row, :batch.prompt_lengths[row]].tolist()
    columns = batch.response_mask[row].nonzero().squeeze(1).tolist()
    names = ("old_logprobs", "ref_logprobs", "kl_ref", "rewards", "old_values", "advantages",
             "returns")
    lines = [f"prompt: {tokenizer.decode(prompt)!r}   score {batch.scores[row]:.3f}",
             f"{'token':16}" + "".join(f"{name:>14}" for name in names)]
    for t in columns:
        text = repr(tokenizer.decode([int(batch.ids[row, t + 1])], skip_end=False))[1:-1]
        numbers = [f"{getattr(batch, name)[row, t]:14.3f}" for name in names]
        lines.append(f"{text:16}" + "".join(numbers))
    totals = [f"{getattr(batch, name)[row].sum():14.3f}" for name in names[:4]]
    lines.append(f"{'sum':16}" + "".join(totals) + "   rewards = score - kl_coef * kl_ref")
    return "\n".join(lines)


# ---- main ----------------------------------------------------------------------------------------

def collect_prompts(cfg: PPOConfig, tokenizer: Tokenizer, context: int) -> list[list[int]]:
    """Prompts as token ids; those that leave no room for a response are dropped and counted."""
    records = read_records(cfg.prompts, "prompts", count=cfg.prompt_count, seed=cfg.seed,
                           model=find_folder(cfg.model))
    rows = [encode_prompt(tokenizer, record["prompt"]) for record in records]
    kept, too_long = fit_rows(rows, context - cfg.max_new_tokens)
    print(f"{len(kept)} prompts ({too_long} that leave no room for {cfg.max_new_tokens} new tokens "
          f"in the context of {context} dropped)")
    check(cfg.minibatch_size >= parallel.processes(), f"--minibatch_size {cfg.minibatch_size} is "
          f"smaller than the number of processes, {parallel.processes()}")
    check(len(kept) >= cfg.batch_size, f"{cfg.prompts}: {len(kept)} prompts, expected at least the "
          f"--batch_size of {cfg.batch_size}")
    return kept


def draw_prompts(prompts: list[list[int]], cfg: PPOConfig, iteration: int) -> list[list[int]]:
    """The iteration's prompts: as many whole batches as there are, then a new shuffle."""
    per_pass = len(prompts) // cfg.batch_size
    generator = random_stream(cfg.seed, 0, iteration // per_pass)
    order = torch.randperm(len(prompts), generator=generator)
    first = iteration % per_pass * cfg.batch_size
    return [prompts[i] for i in order[first:first + cfg.batch_size]]


def save(networks: PolicyWithValue, tokenizer: Tokenizer, out: str) -> None:
    """Write the policy, and beside it the critic, so that nothing that was trained is lost."""
    context = networks.policy.config.n_positions
    tokenizer.save(out, context)
    critic = networks.critic
    if critic is None:                                   # written as the scalar model that it is
        critic = ScalarModel(networks.policy.config)
        critic.transformer.load_state_dict(networks.policy.state_dict())
        critic.score_head.load_state_dict(networks.value_head.state_dict())
    critic.save_pretrained(os.path.join(out, "critic"))
    tokenizer.save(os.path.join(out, "critic"), context)
    networks.policy.save_pretrained(out)


def try_gold(gold_function, prompt: list[int], tokenizer: Tokenizer) -> None:
    """Let the gold judge refuse prompts that it cannot judge before anything is computed."""
    ids = torch.tensor([prompt + [tokenizer.end_token]])                            # (1, T)
    length = torch.tensor([ids.shape[1]])                                           # (1,)
    gold_function(ids, length - 1, length, tokenizer)


def make_optimizer(networks: PolicyWithValue, cfg: PPOConfig) -> torch.optim.Optimizer:
    """Adam over all that is trained; critic or value head have a rate of their own."""
    policy = list(networks.policy.parameters())
    others = [p for name, p in networks.named_parameters() if not name.startswith("policy.")]
    groups = [{"params": policy, "peak": cfg.lr}, {"params": others, "peak": cfg.critic_lr}]
    return torch.optim.Adam(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def progress(row: dict, seconds: float) -> str:
    """One line about an iteration."""
    gold = f"gold {row['gold']:6.2f}  " if row["gold"] != "" else ""
    return (f"  iteration {row['iteration']:3d}  score {row['score']:6.2f}  {gold}kl_ref "
            f"{row['kl_ref']:5.2f}  entropy {row['entropy']:.2f}  clipfrac {row['clipfrac']:.2f}  "
            f"explained_var {row['explained_var']:5.2f}  length {row['response_len']:4.1f}  "
            f"{seconds:.1f} s")


def main(cfg: PPOConfig) -> dict:
    """Train and save; returns the last row of metrics."""
    parallel.start(cfg.device)
    folder = parallel.first_alone(find_folder, cfg.model)
    check_output(cfg.out, folder, *cfg.reward.split(","))
    networks, ref_policy = make_networks(cfg)
    policy, tokenizer = networks.policy, Tokenizer.load(folder)
    check_tokenizer(policy, tokenizer, cfg.model)
    reward_function = load_reward(cfg.reward, cfg.ensemble, tokenizer, cfg.device)
    frozen = [ref_policy]
    if isinstance(reward_function, ModelReward):
        frozen += reward_function.models
    gold_function = load_function(cfg.gold) if cfg.gold else None
    prompts = collect_prompts(cfg, tokenizer, policy.config.n_positions)
    if gold_function is not None:
        try_gold(gold_function, prompts[0], tokenizer)
    optimizer = make_optimizer(networks, cfg)
    inputs = {"--model and --reward": fingerprint(*frozen), "--prompts": fingerprint(prompts)}
    with RunFolder(cfg, cfg.iterations, METRICS, inputs) as run_folder:
        if run_folder.finished:
            return run_folder.row
        run_folder.restore(networks, optimizer)
        kl_coef = float(run_folder.extra.get("kl_coef", cfg.kl_coef))
        print(f"PPO: {cfg.iterations} iterations of {cfg.batch_size} prompts, {cfg.critic} critic, "
              f"reward {cfg.reward}", flush=True)
        for iteration in range(run_folder.step, cfg.iterations):
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(iteration, cfg.iterations, group["peak"],
                                            cfg.warmup_iterations, "linear")
            batch = rollout(networks, ref_policy, reward_function, tokenizer,
                            draw_prompts(prompts, cfg, iteration), cfg, kl_coef, iteration)
            gold = None
            if gold_function is not None:
                gold = gold_function(batch.ids, batch.prompt_lengths, batch.lengths,
                                     tokenizer)          # (B,)
            found = {**measure(batch, gold), **update(networks, optimizer, batch, cfg, iteration),
                     "iteration": iteration, "lr": optimizer.param_groups[0]["lr"],
                     "kl_coef": kl_coef}
            row = {name: found[name] for name in METRICS}
            print(progress(row, time.perf_counter() - started), flush=True)
            if iteration % cfg.sample_every == 0 or iteration + 1 == cfg.iterations:
                run_folder.sample(f"iteration {iteration}\n{token_table(batch, 0, tokenizer)}\n")
            if cfg.kl_target > 0:
                kl_coef = adapt_kl_coef(kl_coef, row["kl_ref"], cfg.kl_target, cfg.batch_size,
                                        cfg.kl_horizon)
            run_folder.end_step(iteration + 1, row, networks, optimizer, kl_coef=kl_coef)
        for network in frozen:
            assert all(p.grad is None for p in network.parameters()), (
                "a frozen network received a gradient")
        run_folder.publish(save, networks, tokenizer, cfg.out)
    return run_folder.row


if __name__ == "__main__":
    run(main, PPOConfig)
