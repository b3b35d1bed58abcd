"""DANGER, MUSEUM: every function in this file is wrong on purpose.

Each is the twin of a right one, with the same arguments and results, and differs in the one line
that somebody got wrong in published code. The line is marked `# WRONG`. Which function it stands
for, what it does to a run, and which test catches it, is on its label in `exhibits.py`.
"""

import torch
import torch.nn.functional as F

from minirlhf.common import clip_gradients, masked_mean, whiten
from minirlhf.data import Tokenizer, pad, response_mask
from minirlhf.gpt2 import GPT2, MLP, Generation, ScalarModel, behaviour_logprobs
from minirlhf.ppo import (PolicyWithValue, PPOConfig, Rollout, gae, measure, minibatches,
                          policy_loss, sample_responses, train_step)
from minirlhf.sft import Demonstration, SFTConfig, batch_loss, make_batch


# ---- sampling and scoring ------------------------------------------------------------------------

def next_logprobs(model: GPT2, last: torch.Tensor, temperature: float, top_k: int,
                  top_p: float) -> torch.Tensor:
    """Samples at 0.7 what is scored at 1."""
    return behaviour_logprobs(model.logits(last), 0.7 * temperature)                # WRONG


def mlp_forward(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """Dropout while gradients are on: in the update, and not in the rollout."""
    y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
    return F.dropout(y, 0.1, training=torch.is_grad_enabled())                      # WRONG


def exact_gelu_forward(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """The exact GELU, with weights that were trained with the tanh form."""
    return self.c_proj(F.gelu(self.c_fc(x)))                                        # WRONG


# ---- masks and ends ------------------------------------------------------------------------------

def make_batch_with_pad_mask(rows: list[Demonstration], end_token: int, device: str = "cpu"):
    """A mask that leaves out every padding id, and so the end token, which has the same id."""
    ids, lengths = pad([row.prompt + row.response for row in rows], end_token)      # (B, T), (B,)
    prompt_lengths = torch.tensor([len(row.prompt) for row in rows])                # (B,)
    mask = response_mask(prompt_lengths, lengths, ids.shape[1])                     # (B, T-1)
    mask = mask & (ids[:, 1:] != end_token)                                         # WRONG
    return ids.to(device), mask.to(device)


def responses_all_ended(policy: GPT2, prompts: list[list[int]], cfg: PPOConfig,
                        tokenizer: Tokenizer, iteration: int) -> Generation:
    """Every response counts as finished, also one that was cut at the limit."""
    made = sample_responses(policy, prompts, cfg, tokenizer, iteration)
    made.ended = torch.ones_like(made.ended)                                        # WRONG
    return made


def responses_with_encoded_prompts(policy: GPT2, prompts: list[list[int]], cfg: PPOConfig,
                                   tokenizer: Tokenizer, iteration: int) -> Generation:
    """The prompt's length is found by encoding its text again, which has no end token in front."""
    made = sample_responses(policy, prompts, cfg, tokenizer, iteration)
    lengths = [len(tokenizer.encode(tokenizer.decode(prompt))) for prompt in prompts]     # WRONG
    made.prompt_lengths = torch.tensor(lengths)
    return made


def masked_mean_without_mask(x: torch.Tensor, mask: torch.Tensor,
                             count: int | None = None) -> torch.Tensor:
    """Takes a mask and does not use it."""
    return x.mean()                                                                 # WRONG


def score_of_the_row(self: ScalarModel, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The mean over all columns, padding among them: another score in another batch."""
    return self(ids).mean(dim=1)                                                    # WRONG


# ---- rewards and advantages ----------------------------------------------------------------------

def score_one_too_late(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                       kl_coef: float) -> torch.Tensor:
    """The score one column behind the last action, where nothing reads it."""
    rewards = torch.where(mask, -kl_coef * kl_ref, torch.zeros_like(kl_ref))        # (B, T-1)
    column = torch.arange(mask.shape[1], device=mask.device)                        # (T-1,)
    last_action = torch.where(mask, column, -1).max(dim=1).values + 1               # WRONG
    is_last = column == last_action[:, None]                                        # (B, T-1)
    return rewards + torch.where(is_last, scores[:, None], torch.zeros_like(rewards))


def penalty_with_the_wrong_sign(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                                kl_coef: float) -> torch.Tensor:
    """k1 negated: the penalty becomes a prize for leaving the reference."""
    rewards = torch.where(mask, kl_coef * kl_ref, torch.zeros_like(kl_ref))         # WRONG
    column = torch.arange(mask.shape[1], device=mask.device)                        # (T-1,)
    last_action = torch.where(mask, column, -1).max(dim=1).values                   # (B,)
    is_last = column == last_action[:, None]                                        # (B, T-1)
    return rewards + torch.where(is_last, scores[:, None], torch.zeros_like(rewards))


def gae_whitened_too_early(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
                           gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns from whitened advantages: numbers without a unit, other ones in each batch."""
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    advantages = whiten(advantages, mask)                                           # WRONG
    return advantages, advantages + torch.where(mask, values, torch.zeros_like(values))


def whiten_and_add_the_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whitens, and then adds the mean that it had taken away."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8) + mean                     # WRONG
    return torch.where(mask > 0, whitened, torch.zeros_like(x))


# ---- the update ----------------------------------------------------------------------------------

def policy_loss_old_minus_new(logprobs: torch.Tensor, old_logprobs: torch.Tensor,
                              advantages: torch.Tensor, mask: torch.Tensor, cliprange: float,
                              token_count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio upside down: what did well becomes less likely."""
    difference = torch.where(mask, old_logprobs - logprobs, torch.zeros_like(logprobs))   # WRONG
    ratio = difference.exp()                                                        # (B, T-1)
    unclipped = -ratio * advantages                                                 # (B, T-1)
    clipped = -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages               # (B, T-1)
    return masked_mean(torch.maximum(unclipped, clipped), mask, token_count), ratio


def policy_loss_with_inverted_ratio(logprobs: torch.Tensor, old_logprobs: torch.Tensor,
                                    advantages: torch.Tensor, mask: torch.Tensor, cliprange: float,
                                    token_count: int | None = None
                                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """The right loss, but the k3 estimate of kl_old gets the ratio upside down."""
    loss, ratio = policy_loss(logprobs, old_logprobs, advantages, mask, cliprange, token_count)
    return loss, 1 / ratio                                                          # WRONG


def train_step_clipped_before_backward(policy: GPT2, optimizer: torch.optim.Optimizer,
                                       rows: list[Demonstration], cfg: SFTConfig, end_token: int,
                                       where: str) -> tuple[float, float]:
    """Clips gradients that are not there yet."""
    token_count = sum(len(row.response) for row in rows)
    optimizer.zero_grad()
    grad_norm = clip_gradients(policy, cfg.max_grad_norm, where)                    # WRONG
    ids, mask = make_batch(rows, end_token, cfg.device)
    loss = batch_loss(policy, ids, mask, token_count)
    loss.backward()
    optimizer.step()
    return loss.item(), grad_norm


def clip_policy_only(networks: torch.nn.Module, max_norm: float, where: str) -> float:
    """Leaves the critic's gradients outside the clip."""
    return clip_gradients(networks.policy, max_norm, where)                         # WRONG


# ---- metrics -------------------------------------------------------------------------------------

def measure_with_padding(batch: Rollout, gold: torch.Tensor | None) -> dict:
    """Means over all columns, prompt and padding among them, where entropy is 0."""
    return {**measure(batch, gold), "entropy": batch.entropy.mean().item()}         # WRONG


def update_with_last_metrics(networks: PolicyWithValue, optimizer: torch.optim.Optimizer,
                             batch: Rollout, cfg: PPOConfig, iteration: int) -> dict:
    """Reports the last minibatch as if it were the whole update."""
    steps: list[dict] = []
    for rows in minibatches(cfg, iteration):
        found = train_step(networks, optimizer, batch, rows, cfg, not steps,
                           f"iteration {iteration}, step {len(steps)}")
        if found is None:
            break
        steps.append(found)
    last = steps[-1]
    means = {name: last[name] / last["tokens"]                                      # WRONG
             for name in ("kl_old", "clipfrac", "pg_loss", "vf_loss")}
    return {**means, "ratio_first": steps[0]["ratio_first"], "ratio_max": last["ratio_max"],
            "grad_norm": last["grad_norm"]}
