"""Stage 3, PPO: improve the SFT policy against the reward model, one token at a time.

    python -m minirlhf.ppo
    python -m minirlhf.ppo --reward my_module:my_reward --prompts prompts.jsonl --gold ""

In:  an SFT folder (start of the policy, and the reference), a reward (folders or a function),
     prompts. Out: a checkpoint folder: policy, critic, `metrics.csv`, `samples.txt`.

The algorithm, once per iteration:
    sample a response to each of `batch_size` prompts from the policy                      (rollout)
    log-probabilities of its tokens under policy and reference; values by the critic; one score
    reward of every token: -kl_coef * kl_ref; the last action gets the score on top
    GAE turns rewards and values into advantages and returns; then advantages are whitened
    for `epochs` passes over shuffled minibatches:                                          (update)
        new log-probabilities and values of the same tokens
        clipped policy loss + vf_coef * clipped value loss - ent_coef * entropy; one Adam step

Choices and deviations:
 1. All log-probabilities come from one function, with one temperature, and without dropout. So the
    ratio is 1 on the first minibatch, kl_ref 0 in iteration 0, or the run stops (`ppo_report`).
 2. The score sits on the last action, less `missing_end_penalty` if that is no end token; a reward
    function may also pay per token, (B, T-1). The value after the last action counts as 0.
 3. `returns` are taken before whitening; whitening is over all response tokens of the rollout.
 4. Losses are means over response tokens, so a long response weighs more than a short one.
 5. `--critic separate` (InstructGPT) starts from the first reward model, or from the policy if the
    reward is a function; `shared` puts a head on the policy's trunk. Both heads start at 0.
 6. The value loss is clipped and halved, Adam's epsilon is 1e-5 (Ziegler et al. 2019); its betas
    are InstructGPT's. PPO-ptx and weight averaging, also InstructGPT's, are left out.
 7. A minibatch may be computed in parts and by several processes (`parallel.parts`): each part's
    loss is its share of the minibatch's mean, so gradients add up. The rest sees whole batches.

Shapes: B sequences, T tokens in the padded row.   Lecture: lectures/04-ppo-mathematics.md.
"""

import copy
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch

from minirlhf import ppo_report as report
from minirlhf.data import read_prompts, response_mask
from minirlhf.engine import parallel, training
from minirlhf.engine.fields import Amount, Count, Device, Natural, Positive, Precision, Seed, Share
from minirlhf.engine.options import check, one_sentence, parse_config
from minirlhf.engine.run_folder import RunFolder, begin, check_run_options
from minirlhf.engine.state import run_inputs
from minirlhf.engine.training import masked_mean, random_stream, whiten
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, PolicyWithValue, ScalarModel, token_logprobs
from minirlhf.ppo_tokens import show_responses
from minirlhf.rewards import adapt_kl_coef, load_gold, load_reward, reward_folders, try_once
from minirlhf.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class PPOConfig:
    """Options of `python -m minirlhf.ppo`."""
    model: str = "checkpoints/sft"      # SFT folder: start of the policy, and the frozen reference
    reward: str = "checkpoints/reward_model"    # folder, folders with commas, or module:function
    ensemble: Literal["mean", "min", "uwo"] = "mean"    # how several reward models vote
    prompts: str = "minirlhf.world:prompts"     # .jsonl file, or module:function giving records
    prompt_count: Natural = 4000        # prompts to draw from; 0: all that the file has
    gold: str = "minirlhf.world:gold_reward"    # module:function, logged and never optimised
    out: str = "checkpoints/ppo"        # folder to write
    critic: Literal["separate", "shared"] = "separate"    # separate network, or head on the policy
    iterations: Count = 25              # rollouts, each with its update
    batch_size: Count = 64              # prompts in a rollout (512 in InstructGPT)
    max_new_tokens: Count = 32          # longest response, tokens
    temperature: Positive = 1.0         # of sampling and every log-probability (1 in InstructGPT)
    epochs: Count = 2                   # passes over a rollout (Ziegler et al. 4, InstructGPT 1)
    minibatch_size: Count = 32          # sequences in one optimiser step
    lr: Amount = 5e-4                   # peak rate of the policy; for GPT-2 124M 3e-6 to 1e-5
    critic_lr: Amount = 1e-3            # peak rate of a separate critic, or of the value head
    warmup_iterations: Natural = 3      # linear warm-up, then linear down to 0
    critic_warmup: Natural = 0          # first iterations, in which only the critic is trained
    gamma: Share = 1.0                  # discount; 1: a token now is worth a token later
    lam: Share = 0.95                   # GAE's lambda (Ziegler et al.)
    kl_coef: Amount = 0.2               # weight of kl_ref, beta in papers (0.02 in InstructGPT)
    kl_target: Amount = 0.0             # > 0: adapt kl_coef to this kl_ref, nats per response
    kl_horizon: Amount = 10_000.0       # responses over which the adaptation works (Ziegler et al.)
    cliprange: Amount = 0.2             # ratio clip (Schulman et al. 2017)
    cliprange_value: Amount = 0.2       # how far a value may move from the old one in an update
    vf_coef: Amount = 0.1               # weight of the value loss (Ziegler et al.)
    ent_coef: Amount = 0.0              # weight of the entropy bonus
    missing_end_penalty: Amount = 1.0   # taken off the score of a response that does not end
    max_grad_norm: Positive = 1.0       # gradients of all that is trained are clipped to this norm
    kl_old_stop: Amount = 0.0           # > 0: end an update when kl_old exceeds it, nats per token
    accumulation: Count = 1             # parts that a minibatch is computed in, to save memory
    checkpointing: bool = False         # compute each layer twice, to save memory
    dtype: Precision = "float32"        # of matrix products
    device: Device = "cpu"              # where to compute
    sample_every: Count = 5             # iterations between token tables, and kept answers
    save_every: Count = 5               # iterations between checkpoints
    resume: bool = False                # go on from the last checkpoint of --out
    seed: Seed = 0                      # of prompts, samples and minibatches

    def __post_init__(self):
        check_run_options(self)
        check(self.minibatch_size <= self.batch_size, f"--minibatch_size {self.minibatch_size} is "
              f"larger than --batch_size {self.batch_size}")
        check(self.kl_horizon >= self.batch_size or self.kl_target == 0, f"--kl_horizon is "
              f"{self.kl_horizon}, expected at least the --batch_size of {self.batch_size}")
        check(self.critic_warmup <= self.iterations, f"--critic_warmup {self.critic_warmup} is "
              f"longer than the run of --iterations {self.iterations}")


# ---- the mathematics -----------------------------------------------------------------------------

def shaped_rewards(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                   kl_coef: float) -> torch.Tensor:
    """Reward of every token: -kl_coef * kl_ref, and the score on each row's last action.

    scores (B,), kl_ref (B, T-1) nats, mask (B, T-1) bool -> rewards (B, T-1), 0 outside the mask.
    Scores (B, T-1), one per token, are paid each where it stands.

    Example: score 1, kl_coef 0.1, kl_ref 0.5, -0.2, 0.3, all in the mask: -0.05, 0.02, 0.97.
    Source: Ziegler et al. 2019 (arXiv 1909.08593), equation 2, token by token.
    Lecture: lectures/04-ppo-mathematics.md, "The KL-shaped reward".
    """
    rewards = torch.where(mask, -kl_coef * kl_ref, 0.0)                             # (B, T-1)
    if scores.dim() == 2:
        return rewards + torch.where(mask, scores, 0.0)
    column = torch.arange(mask.shape[1], device=mask.device)                        # (T-1,)
    # careful: the last action is the last column of the mask, not the last column of the row
    last_action = torch.where(mask, column, -1).max(dim=1).values                   # (B,)
    is_last = column == last_action[:, None]                                        # (B, T-1)
    return rewards + torch.where(is_last, scores[:, None], 0.0)


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float,
        lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation: advantages and returns, (B, T-1) each, 0 outside the mask.

    rewards, values (B, T-1), mask (B, T-1) bool. The value after the last action counts as 0.
    delta[t] = rewards[t] + gamma * values[t+1] - values[t]
    advantages[t] = delta[t] + gamma * lam * advantages[t+1];  returns = advantages + values

    Example: rewards -0.1, -0.2, 1.0, values 0.5, 0.4, 0.6, gamma 1, lam 0.95: delta is -0.2, 0.0,
    0.4, advantages are 0.161, 0.38, 0.4 and returns 0.661, 0.78, 1.0. With lam below 1 and values
    that are still 0, the first of n tokens gets only (gamma * lam)^(n-1) of the score.
    Source: Schulman et al. 2015 (arXiv 1506.02438), equation 16.
    Lecture: lectures/04-ppo-mathematics.md, "GAE by hand".
    """
    values = torch.where(mask, values, 0.0)                                         # (B, T-1)
    rewards = torch.where(mask, rewards, 0.0)                                       # (B, T-1)
    advantages = torch.zeros_like(values)                                           # (B, T-1)
    next_value = next_advantage = torch.zeros_like(values[:, 0])                    # (B,)
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

    Example, cliprange 0.2, ratio 1.5: advantage 1 gives -1.2 and no gradient, -1 gives 1.5 with it.
    Source: Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    Lecture: lectures/04-ppo-mathematics.md, "The clipped objective".
    """
    difference = torch.where(mask, logprobs - old_logprobs, 0.0)                    # (B, T-1)
    # careful: exp(89) is inf in float32, and 0 * inf, its gradient where the clip holds, is nan
    ratio = difference.clamp(max=80).exp()                                          # (B, T-1)
    unclipped = -ratio * advantages                                                 # (B, T-1)
    clipped = -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages               # (B, T-1)
    return masked_mean(torch.maximum(unclipped, clipped), mask, token_count), ratio


def value_loss(values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor,
               mask: torch.Tensor, cliprange_value: float,
               token_count: int | None = None) -> torch.Tensor:
    """Half the mean squared error of the values, clipped around the old ones. All inputs (B, T-1).

    Example, range 0.2: value 1, old value 0, return 1: 0.32; the clipped 0.2 errs more, by 0.8.
    Source: openai/lm-human-preferences, lm_human_preferences/train_policy.py, loss.
    Lecture: lectures/04-ppo-mathematics.md, "The critic".
    """
    # careful: mask first; masked afterwards, an infinite entry has gradient 0 * inf, which is nan
    values = torch.where(mask, values, 0.0)                                         # (B, T-1)
    old_values = torch.where(mask, old_values, 0.0)                                 # (B, T-1)
    returns = torch.where(mask, returns, 0.0)                                       # (B, T-1)
    nearby = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    errors = torch.maximum((values - returns) ** 2, (nearby - returns) ** 2)        # (B, T-1)
    return 0.5 * masked_mean(errors, mask, token_count)


# ---- the networks --------------------------------------------------------------------------------

def make_networks(cfg: PPOConfig) -> tuple[PolicyWithValue, GPT2]:
    """Policy with critic, and the frozen reference; policy and reference start equal."""
    policy = load_network(GPT2, cfg.model)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    if cfg.critic == "shared":
        critic = ScalarModel(policy.config, trunk=policy)
    elif not reward_folders(cfg.reward):                 # a function has no weights to start from
        critic = ScalarModel(policy.config, trunk=copy.deepcopy(policy))
    else:
        critic = load_network(ScalarModel, reward_folders(cfg.reward)[0])
    policy.checkpointing = critic.transformer.checkpointing = cfg.checkpointing
    policy.dtype = critic.transformer.dtype = ref_policy.dtype = cfg.dtype
    return PolicyWithValue(policy, critic).to(cfg.device), ref_policy.to(cfg.device)


def make_optimizer(networks: PolicyWithValue, cfg: PPOConfig) -> torch.optim.Optimizer:
    """Adam over all that is trained; the critic has a rate of its own, if shared only its head."""
    policy = list(networks.policy.parameters())
    critic = [p for name, p in networks.named_parameters() if not name.startswith("policy.")]
    groups = [{"params": policy, "peak": cfg.lr}, {"params": critic, "peak": cfg.critic_lr}]
    return torch.optim.Adam(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


# ---- collecting ----------------------------------------------------------------------------------

@dataclass
class Rollout:
    """One batch of responses with all that the update needs."""
    ids: torch.Tensor               # (B, T)
    prompt_lengths: torch.Tensor    # (B,)
    lengths: torch.Tensor           # (B,)
    ended: torch.Tensor             # (B,) bool
    response_mask: torch.Tensor     # (B, T-1) bool
    sampled_logprobs: torch.Tensor  # (B, T-1) noted while sampling; equal to old_logprobs
    old_logprobs: torch.Tensor      # (B, T-1)
    ref_logprobs: torch.Tensor      # (B, T-1)
    old_values: torch.Tensor        # (B, T-1)
    entropy: torch.Tensor           # (B, T-1)
    scores: torch.Tensor            # (B,)
    kl_ref: torch.Tensor            # (B, T-1)
    rewards: torch.Tensor           # (B, T-1)
    advantages: torch.Tensor        # (B, T-1) whitened
    returns: torch.Tensor           # (B, T-1)
    __repr__ = report.describe_rollout

    def rows(self, numbers: torch.Tensor) -> "Rollout":
        """The rollout of these rows alone."""
        return Rollout(*[getattr(self, field.name)[numbers] for field in fields(self)])


def forward_pass(networks: PolicyWithValue, ref_policy: GPT2, ids: torch.Tensor, mask: torch.Tensor,
                 cfg: PPOConfig) -> list[torch.Tensor]:
    """logprobs, values, entropy and ref_logprobs of ids (B, T), mask (B, T-1): (B, T-1) each."""
    most = math.ceil(cfg.minibatch_size / cfg.accumulation)     # rows that fit into memory
    parts = []
    for part_ids, part_mask in zip(ids.split(most), mask.split(most)):          # (b, T), (b, T-1)
        logprobs, values, entropy = networks.evaluate_actions(part_ids, part_mask, cfg.temperature)
        ref_logprobs, _ = token_logprobs(ref_policy.hidden(part_ids), part_ids, part_mask,
                                         ref_policy.wte.weight, cfg.temperature)    # (b, T-1)
        parts.append((logprobs, values, entropy, ref_logprobs))
    return [torch.cat(column) for column in zip(*parts)]                            # 4 x (B, T-1)


def rollout(networks: PolicyWithValue, ref_policy: GPT2, reward_function, tokenizer: Tokenizer,
            prompts: list[list[int]], cfg: PPOConfig, kl_coef: float, iteration: int) -> Rollout:
    """Sample responses, score them, and turn scores into advantages and returns."""
    mine = parallel.share(len(prompts))                  # all of them, if there is one process
    generator, policy = random_stream(cfg.seed, 1, iteration), networks.policy
    with torch.no_grad():
        made = generate(policy, prompts[mine], cfg.max_new_tokens, generator=generator,
                        end_token=tokenizer.end_token, temperature=cfg.temperature,
                        first_row=mine.start, where=f"iteration {iteration}")
        mask = response_mask(made.prompt_lengths, made.lengths, made.ids.shape[1])  # (B, T-1)
        old_logprobs, old_values, entropy, ref_logprobs = forward_pass(networks, ref_policy,
                                                                       made.ids, mask, cfg)
        scores = reward_function(made.ids, made.prompt_lengths, made.lengths, tokenizer)
    penalty = cfg.missing_end_penalty * ~made.ended                                 # (B,)
    if scores.dim() == 2:                                # one per token: the last action pays it
        penalty = shaped_rewards(penalty, torch.zeros_like(scores), mask, 0.0)      # (B, T-1)
    scores = scores - penalty                                                # (B,) or (B, T-1)
    kl_ref = old_logprobs - ref_logprobs                                            # (B, T-1)
    rewards = shaped_rewards(scores, kl_ref, mask, kl_coef)                         # (B, T-1)
    advantages, returns = gae(rewards, old_values, mask, cfg.gamma, cfg.lam)        # (B, T-1) each
    batch = Rollout(made.ids, made.prompt_lengths, made.lengths, made.ended, mask, made.logprobs,
                    old_logprobs, ref_logprobs, old_values, entropy, report.totals(scores, mask),
                    kl_ref, rewards, advantages, returns)
    batch = parallel.gather(batch, ids=tokenizer.end_token)      # with the rows of all processes
    batch.advantages = whiten(batch.advantages, batch.response_mask)    # careful: after returns
    report.check_rollout(batch, kl_coef, iteration, cfg.dtype)
    return batch


# ---- update --------------------------------------------------------------------------------------

def minibatches(cfg: PPOConfig, iteration: int) -> list[torch.Tensor]:
    """Row numbers (b,) for every optimiser step of an update: `epochs` shuffles of the rollout."""
    steps: list[torch.Tensor] = []
    for epoch in range(cfg.epochs):
        generator = random_stream(cfg.seed, 2, iteration, epoch)
        order = torch.randperm(cfg.batch_size, generator=generator)                 # (B,)
        steps += order.to(cfg.device).split(cfg.minibatch_size)
    return steps


def update(networks: PolicyWithValue, optimizer: torch.optim.Optimizer, batch: Rollout,
           cfg: PPOConfig, iteration: int) -> dict:
    """Several passes over the rollout in shuffled minibatches; metrics over all response tokens."""
    steps: list[dict] = []
    for rows in minibatches(cfg, iteration):
        where = f"iteration {iteration}, step {len(steps)}"
        mask = batch.response_mask[rows]                                            # (b, T-1)
        token_count, measured = int(mask.sum()), []
        optimizer.zero_grad()
        for numbers in parallel.parts(rows, cfg.minibatch_size, cfg.accumulation):
            part = batch.rows(numbers)                   # by default the whole minibatch
            logprobs, values, entropy = networks.evaluate_actions(              # 3 x (b, T-1)
                part.ids, part.response_mask, cfg.temperature, entropy_grad=cfg.ent_coef > 0)
            pg_loss, ratio = policy_loss(logprobs, part.old_logprobs, part.advantages,
                                         part.response_mask, cfg.cliprange, token_count)
            vf_loss = value_loss(values, part.old_values, part.returns, part.response_mask,
                                 cfg.cliprange_value, token_count)
            ent_bonus = masked_mean(entropy, part.response_mask, token_count)
            loss = pg_loss + cfg.vf_coef * vf_loss - cfg.ent_coef * ent_bonus
            training.check_finite(where, numbers, logprobs=logprobs, values=values, loss=loss)
            loss.backward()
            measured.append((ratio.detach(), pg_loss.detach(), vf_loss.detach()))
        step = report.measure_step(measured, mask, cfg.cliprange)
        if not steps:
            report.check_first_ratio(step, where, cfg.dtype)
        elif 0 < cfg.kl_old_stop < step["kl_old"]:
            break                                        # skips this step and all that remain
        step["grad_norm"] = training.optimiser_step(networks, optimizer, cfg.max_grad_norm, where)
        steps.append(step)
    return report.summarise(steps)


# ---- main ----------------------------------------------------------------------------------------

def main(cfg: PPOConfig) -> dict:
    """Train and save; returns the last row of metrics."""
    folder = begin(cfg, cfg.model, *reward_folders(cfg.reward))
    networks, ref_policy = make_networks(cfg)
    tokenizer = load_tokenizer(folder, ref_policy)
    reward_function = load_reward(cfg.reward, cfg.ensemble, tokenizer, cfg.device, cfg.dtype)
    frozen = [ref_policy, *getattr(reward_function, "models", [])]
    context = min(network.config.n_positions for network in [networks.critic, *frozen])
    prompts, _ = read_prompts(cfg.prompts, tokenizer, context, cfg.max_new_tokens, model=folder,
                              count=cfg.prompt_count, seed=cfg.seed, fewest=cfg.batch_size)
    gold_function = load_gold(cfg.gold)
    try_once(prompts[0].ids, tokenizer, reward_function, gold_function, device=cfg.device)
    optimizer = make_optimizer(networks, cfg)
    inputs = run_inputs(ref_policy, reward_function, prompts, gold_function)
    print(f"PPO: {cfg.iterations} iterations of {cfg.batch_size}, reward {cfg.reward}", flush=True)
    with RunFolder(cfg, cfg.iterations, report.METRICS, inputs, networks, optimizer) as run:
        for iteration in run.steps():
            networks.policy.requires_grad_(iteration >= cfg.critic_warmup)
            training.set_learning_rate(optimizer, iteration, cfg.iterations, cfg.warmup_iterations,
                                       "linear")
            kl_coef = run.row.get("kl_coef", cfg.kl_coef)
            if cfg.kl_target > 0 and iteration > 0:
                kl_coef = adapt_kl_coef(kl_coef, run.row["kl_ref"], cfg.kl_target, cfg.batch_size,
                                        cfg.kl_horizon)
            order = training.batch_order(len(prompts), cfg.batch_size, cfg.seed, iteration, True)
            asked = [prompts[i].ids for i in order]
            batch = rollout(networks, ref_policy, reward_function, tokenizer, asked, cfg, kl_coef,
                            iteration)
            before = report.measure(batch, gold_function, tokenizer)
            after = update(networks, optimizer, batch, cfg, iteration)
            optimizer.zero_grad()                        # frees memory for the next rollout
            run.log({"iteration": iteration, **before, **after, "kl_coef": kl_coef,
                     "lr": optimizer.param_groups[0]["lr"]})
            print(report.progress(run.row, run.seconds()), flush=True)
            show_responses(run, rollout, batch, networks, ref_policy, reward_function,
                           gold_function, tokenizer, prompts)
        training.check_frozen(*frozen)
        run.publish(tokenizer, networks.policy, critic=networks.critic)
    return run.row


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(PPOConfig))
