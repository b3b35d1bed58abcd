"""The naive baseline: RLHF as one writes it down first, one prompt at a time and without a cache.

Every new token costs a pass over the whole row, by the reference model too, and logits for all
positions; the update takes one step of plain Adam per response and epoch. It is naive and not
wrong: same tokens from the same random numbers, same log-probabilities, same advantages (tested).
"""

from dataclasses import dataclass

import torch

from minirlhf.benchmark.machine import timed
from minirlhf.engine.training import whiten
from minirlhf.generate import sample
from minirlhf.gpt2 import GPT2, PolicyWithValue, behaviour_logprobs
from minirlhf.ppo import PPOConfig, gae, shaped_rewards


@dataclass
class Response:
    """One prompt with its response of N tokens."""
    ids: torch.Tensor                   # (1, T) prompt and response
    columns: torch.Tensor               # (3, N) logprobs, ref_logprobs and values
    reference_seconds: float            # of the reference model's passes
    advantages: torch.Tensor | None = None    # (N,)
    returns: torch.Tensor | None = None       # (N,)


def respond(networks: PolicyWithValue, ref_policy: GPT2, prompt: list[int], uniforms: torch.Tensor,
            cfg: PPOConfig, end_token: int) -> Response:
    """Sample one response; uniforms (max_new_tokens,) decide its tokens as in `generate`."""
    ids = torch.tensor([prompt], device=uniforms.device)                            # (1, T)
    columns, reference_seconds = [], 0.0
    for uniform in uniforms:
        hidden = networks.policy.hidden(ids)                                        # (1, T, C)
        logits = networks.policy.logits(hidden)[:, -1]                              # (1, V)
        logprobs = behaviour_logprobs(logits, cfg.temperature)                      # (1, V)
        token = sample(logprobs, uniform[None])                                     # (1,)
        ref_logits, seconds = timed(ref_policy, ids)                                # (1, T, V)
        ref_logprobs = behaviour_logprobs(ref_logits[:, -1], cfg.temperature)       # (1, V)
        value = networks.critic.score_head(hidden[0, -1])                           # (1,)
        columns.append(torch.cat([logprobs[0, token], ref_logprobs[0, token], value]))
        ids, reference_seconds = torch.cat([ids, token[None]], 1), reference_seconds + seconds
        if token == end_token:
            break
    return Response(ids, torch.stack(columns, dim=1), reference_seconds)


def rollout(networks: PolicyWithValue, ref_policy: GPT2, reward_function, tokenizer,
            prompts: list[list[int]], uniforms: torch.Tensor, cfg: PPOConfig,
            kl_coef: float) -> list[Response]:
    """Responses with all that the update needs; uniforms (B, max_new_tokens)."""
    responses = []
    for prompt, row in zip(prompts, uniforms):
        with torch.no_grad():
            response = respond(networks, ref_policy, prompt, row, cfg, tokenizer.end_token)
        lengths = torch.tensor([[len(prompt)], [response.ids.shape[1]]]).to(row.device)    # (2, 1)
        score = reward_function(response.ids, *lengths, tokenizer)                  # (1,)
        score = score - cfg.missing_end_penalty * (response.ids[:, -1] != tokenizer.end_token)
        logprobs, ref_logprobs, values = response.columns[:, None]                  # (1, N) each
        mask = torch.ones_like(values, dtype=torch.bool)                            # (1, N)
        rewards = shaped_rewards(score, logprobs - ref_logprobs, mask, kl_coef)     # (1, N)
        advantages, returns = gae(rewards, values, mask, cfg.gamma, cfg.lam)        # (1, N) each
        response.advantages, response.returns = advantages[0], returns[0]
        responses.append(response)
    together = torch.cat([response.advantages for response in responses])           # (all N,)
    together = whiten(together, torch.ones_like(together))
    for response in responses:
        response.advantages, together = together.tensor_split([len(response.advantages)])
    return responses


def update(networks: PolicyWithValue, optimizer: torch.optim.Optimizer,
           responses: list[Response], cfg: PPOConfig) -> None:
    """One optimiser step for every response in every epoch."""
    for response in responses * cfg.epochs:
        ids, first = response.ids, response.ids.shape[1] - len(response.returns)    # (1, T)
        hidden = networks.policy.hidden(ids)                                        # (1, T, C)
        logits = networks.policy.logits(hidden)[0, first - 1:-1]                    # (N, V)
        table = behaviour_logprobs(logits, cfg.temperature)                         # (N, V)
        logprobs = table.gather(1, ids[0, first:, None])[:, 0]                      # (N,)
        values = networks.critic.score_head(hidden[0, first - 1:-1])[:, 0]          # (N,)
        ratio = (logprobs - response.columns[0]).exp()                              # (N,)
        clipped = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)                 # (N,)
        gains = torch.min(ratio * response.advantages, clipped * response.advantages)
        loss = -gains.mean() + cfg.vf_coef * 0.5 * ((values - response.returns) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), cfg.max_grad_norm)
        optimizer.step()
