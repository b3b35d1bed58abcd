"""DANGER, MUSEUM: every function in this file is wrong on purpose.

Each is the twin of a right one, with the same arguments and results, and differs in the one line
that somebody got wrong in published code. The line is marked `# WRONG`. Which function it stands
for, what it does to a run, and which test catches it, is on its label in `exhibits.py`.
"""

import torch
import torch.nn.functional as F

from minirlhf.engine.training import clip_gradients, masked_mean, whiten
from minirlhf.generate import Generation, filter_logprobs, generate
from minirlhf.gpt2 import GPT2, MLP, ScalarModel, behaviour_logprobs, token_logprobs
from minirlhf.ppo import Rollout, gae, policy_loss, shaped_rewards, value_loss
from minirlhf.ppo_report import measure
from minirlhf.sft import Demonstration, SFTConfig, batch_loss, make_batch
from minirlhf.tokenizer import Tokenizer

# ---- sampling and scoring ------------------------------------------------------------------------

def next_logprobs(model: GPT2, last: torch.Tensor, temperature: float, top_k: int,
                  top_p: float) -> torch.Tensor:
    """Tokens are sampled at temperature 0.7 and scored at 1."""
    return behaviour_logprobs(model.logits(last), 0.7 * temperature)                # WRONG


def next_logprobs_of_the_top(model: GPT2, last: torch.Tensor, temperature: float, top_k: int,
                             top_p: float) -> torch.Tensor:
    """Tokens are sampled from the three likeliest and scored under all."""
    logprobs = behaviour_logprobs(model.logits(last), temperature)                  # (B, V)
    return filter_logprobs(logprobs, top_k=3)                                       # WRONG


def mlp_forward(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """Dropout is on in the update and off in the rollout."""
    y = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
    return F.dropout(y, 0.1, training=torch.is_grad_enabled())                      # WRONG


def exact_gelu_forward(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """The exact GELU with weights that were trained with the tanh form."""
    return self.c_proj(F.gelu(self.c_fc(x)))                                        # WRONG


# ---- masks and ends ------------------------------------------------------------------------------

def make_batch_with_pad_mask(rows: list[Demonstration], end_token: int, device: str = "cpu"):
    """The loss leaves out every padding id, and with it the end token."""
    ids, mask = make_batch(rows, end_token, device)                                 # (B, T)
    return ids, mask & (ids[:, 1:] != end_token)                                    # WRONG


def generate_all_ended(*arguments, **options) -> Generation:
    """A response that was cut at the limit is treated as finished."""
    made = generate(*arguments, **options)
    made.ended = torch.ones_like(made.ended)                                        # WRONG
    return made


def generate_with_encoded_prompts(model: GPT2, prompts: list[list[int]], *arguments,
                                  end_token: int, **options) -> Generation:
    """The prompt is encoded again to find its length: the end token in front is missing."""
    made = generate(model, prompts, *arguments, end_token=end_token, **options)
    lengths = [len(prompt) - prompt.count(end_token) for prompt in prompts]         # WRONG
    made.prompt_lengths = torch.tensor(lengths)
    return made


def masked_mean_without_mask(x: torch.Tensor, mask: torch.Tensor,
                             count: int | None = None) -> torch.Tensor:
    """A function takes a mask and does not use it."""
    return x.mean()                                                                 # WRONG


def score_of_the_row(self: ScalarModel, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The reward model averages over the row, padding among it."""
    return self(ids).mean(dim=1)                                                    # WRONG


# ---- rewards and advantages ----------------------------------------------------------------------

def score_one_too_late(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                       kl_coef: float) -> torch.Tensor:
    """The score stands one column after the last action, where nothing reads it."""
    rewards = torch.where(mask, -kl_coef * kl_ref, 0.0)                             # (B, T-1)
    column = torch.arange(mask.shape[1], device=mask.device)                        # (T-1,)
    last_action = torch.where(mask, column, -1).max(dim=1).values + 1               # WRONG
    is_last = column == last_action[:, None]                                        # (B, T-1)
    return rewards + torch.where(is_last, scores[:, None], 0.0)


def penalty_with_the_wrong_sign(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                                kl_coef: float) -> torch.Tensor:
    """The KL penalty has the wrong sign: leaving the reference is paid for."""
    return shaped_rewards(scores, kl_ref, mask, -kl_coef)                           # WRONG


def penalty_of_the_batch(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                         kl_coef: float) -> torch.Tensor:
    """The KL penalty is one number for the batch, so that it pulls no response anywhere."""
    penalty = kl_coef * (kl_ref * mask).sum(dim=1).mean()                           # WRONG
    return shaped_rewards(scores - penalty, kl_ref, mask, 0.0)


def penalty_counted_twice(scores: torch.Tensor, kl_ref: torch.Tensor, mask: torch.Tensor,
                          kl_coef: float) -> torch.Tensor:
    """The KL penalty is counted twice: token by token, and in the score again."""
    scores = scores - kl_coef * (kl_ref * mask).sum(dim=1)                          # WRONG
    return shaped_rewards(scores, kl_ref, mask, kl_coef)


def gae_of_immediate_rewards(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
                             gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The return of a token is its own reward: only the last token learns from the score."""
    return gae(rewards, values, mask, 0.0, lam)                                     # WRONG


def gae_beyond_the_end(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
                       gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The value after the last action is not 0: the score is foreseen and then paid, too."""
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))                                    # (B, T-1)
    rewards = torch.where(is_last, rewards + gamma * values, rewards)               # WRONG
    return gae(rewards, values, mask, gamma, lam)


def gae_whitened_too_early(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor,
                           gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns are taken from whitened advantages: other ones in each batch."""
    advantages, _ = gae(rewards, values, mask, gamma, lam)
    advantages = whiten(advantages, mask)                                           # WRONG
    return advantages, advantages + torch.where(mask, values, 0.0)


def whiten_and_add_the_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whitening adds the mean back that it has taken away."""
    whitened = whiten(x, mask) + masked_mean(x, mask)                               # WRONG
    return torch.where(mask > 0, whitened, 0.0)


def group_advantages_of_rounding(method: str, rewards: torch.Tensor, k: int) -> torch.Tensor:
    """A group of equal rewards is divided by its deviation, which is what rounding leaves."""
    groups = rewards.view(-1, k)                                                    # (P, k)
    centred = groups - groups.mean(dim=1, keepdim=True)                             # (P, k)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-8)).view(-1)            # WRONG


# ---- the update ----------------------------------------------------------------------------------

def policy_loss_old_minus_new(logprobs: torch.Tensor, old_logprobs: torch.Tensor, *arguments,
                              **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio is old over new, so that good tokens become unlikely."""
    return policy_loss(old_logprobs, logprobs, *arguments, **options)               # WRONG


def policy_loss_with_inverted_ratio(*arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """kl_old is estimated with the ratio upside down."""
    loss, ratio = policy_loss(*arguments, **options)
    return loss, 1 / ratio                                                          # WRONG


def policy_loss_of_sequence_means(logprobs: torch.Tensor, old_logprobs: torch.Tensor,
                                  advantages: torch.Tensor, mask: torch.Tensor, cliprange: float,
                                  token_count: int | None = None):
    """The ratio is that of a response's mean log-probabilities: one for all of its tokens."""
    difference = torch.where(mask, logprobs - old_logprobs, 0.0)                    # (B, T-1)
    means = difference.sum(dim=1) / mask.sum(dim=1).clamp(min=1)                    # (B,)
    logprobs = old_logprobs + means[:, None]                                        # WRONG
    return policy_loss(logprobs, old_logprobs, advantages, mask, cliprange, token_count)


def value_loss_without_gradient(values: torch.Tensor, *arguments, **options) -> torch.Tensor:
    """The values are detached, so that the critic is never trained."""
    return value_loss(values.detach(), *arguments, **options)                       # WRONG


def train_step_clipped_before_backward(policy: GPT2, optimizer: torch.optim.Optimizer,
                                       rows: list[Demonstration], cfg: SFTConfig, end_token: int,
                                       where: str) -> tuple[float, float]:
    """Gradients are clipped before backward has made them."""
    token_count = sum(len(row.response) for row in rows)
    optimizer.zero_grad()
    grad_norm = clip_gradients(policy, cfg.max_grad_norm, where)                    # WRONG
    ids, mask = make_batch(rows, end_token, cfg.device)
    loss = batch_loss(policy, ids, mask, token_count)
    loss.backward()
    optimizer.step()
    return loss.item(), grad_norm


def clip_policy_only(networks: torch.nn.Module, max_norm: float, where: str) -> float:
    """The critic's gradients are outside the clip."""
    return clip_gradients(networks.policy, max_norm, where)                         # WRONG


# ---- metrics -------------------------------------------------------------------------------------

def token_logprobs_with_surprise(*arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The entropy is minus the log-probability of the token that was sampled."""
    logprobs, _ = token_logprobs(*arguments, **options)
    return logprobs, -logprobs                                                      # WRONG


def measure_with_padding(batch: Rollout, gold_function, tokenizer: Tokenizer) -> dict:
    """Metrics are averaged over prompt and padding too, where entropy is 0."""
    metrics = measure(batch, gold_function, tokenizer)
    return {**metrics, "entropy": batch.entropy.mean().item()}                      # WRONG


def summarise_the_last_step(steps: list[dict]) -> dict:
    """Metrics are those of the last minibatch."""
    last = steps[-1]                                                                # WRONG
    means = {name: last[name] for name in ("kl_old", "clipfrac", "pg_loss", "vf_loss")}
    return {**means, "ratio_first": steps[0]["ratio_off"], "ratio_max": last["ratio_max"],
            "grad_norm": last["grad_norm"]}
