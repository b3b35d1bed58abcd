"""The naive baseline: RLHF as one writes it down first, written from a lecture's description.

One prompt at a time. No cache: every new token costs a pass over the whole row. The reference
model runs for every token, too. Every pass makes logits for all positions. GAE is a loop over one
response. The update takes one optimiser step a response and epoch, with plain Adam.

It is naive and not wrong: it uses the same network classes, samples the same tokens from the same
random numbers, and gets the same log-probabilities and advantages as minirlhf.ppo (tested). So it
shows what batching, a cache, and logits only where they are needed are worth.
"""

import time
from dataclasses import dataclass, field

import torch

from minirlhf.gpt2 import GPT2, behaviour_logprobs, sample
from minirlhf.ppo import PolicyWithValue, PPOConfig


@dataclass
class Response:
    """One prompt with its response; the lists have one number a response token."""
    ids: list[int]                      # prompt and response
    prompt_length: int
    logprobs: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    reference_seconds: float = 0.0      # of the reference model's passes


def respond(networks: PolicyWithValue, ref_policy: GPT2, prompt: list[int], uniforms: torch.Tensor,
            cfg: PPOConfig, end_token: int) -> Response:
    """Sample one response; uniforms (max_new_tokens,) decide its tokens as in `gpt2.generate`."""
    response = Response(list(prompt), len(prompt))
    policy = networks.policy
    for uniform in uniforms:
        ids = torch.tensor([response.ids])                                          # (1, T)
        hidden = policy.hidden(ids)                                                 # (1, T, C)
        logits = policy.logits(hidden)[:, -1]                                       # (1, V)
        logprobs = behaviour_logprobs(logits, cfg.temperature)                      # (1, V)
        token = sample(logprobs, uniform[None]).item()
        started = time.perf_counter()
        ref_logits = ref_policy(ids)[:, -1]                                         # (1, V)
        ref_logprobs = behaviour_logprobs(ref_logits, cfg.temperature)              # (1, V)
        response.ref_logprobs.append(ref_logprobs[0, token].item())
        response.reference_seconds += time.perf_counter() - started
        response.logprobs.append(logprobs[0, token].item())
        response.values.append(networks.value_head(hidden[0, -1]).item())
        response.ids.append(token)
        if token == end_token:
            break
    return response


def estimate_advantages(response: Response, score: float, cfg: PPOConfig, kl_coef: float) -> None:
    """Reward every token, then GAE backwards through the response."""
    rewards = [-kl_coef * (new - ref)
               for new, ref in zip(response.logprobs, response.ref_logprobs)]
    rewards[-1] += score
    next_value, advantage, advantages = 0.0, 0.0, []
    for reward, value in zip(reversed(rewards), reversed(response.values)):
        delta = reward + cfg.gamma * next_value - value
        advantage = delta + cfg.gamma * cfg.lam * advantage
        advantages.append(advantage)
        next_value = value
    response.advantages = advantages[::-1]
    response.returns = [a + v for a, v in zip(response.advantages, response.values)]


def normalise(responses: list[Response]) -> None:
    """Shift and scale the advantages of all responses to mean 0 and deviation 1."""
    everything = [a for response in responses for a in response.advantages]
    mean = sum(everything) / len(everything)
    variance = sum((a - mean) ** 2 for a in everything) / len(everything)
    for response in responses:
        response.advantages = [(a - mean) / (variance + 1e-8) ** 0.5 for a in response.advantages]


def rollout(networks: PolicyWithValue, ref_policy: GPT2, reward_function, tokenizer,
            prompts: list[list[int]], uniforms: torch.Tensor, cfg: PPOConfig,
            kl_coef: float) -> tuple[list[Response], dict[str, float]]:
    """Responses with all that the update needs; uniforms (B, max_new_tokens). And the seconds."""
    started = time.perf_counter()
    with torch.no_grad():
        responses = [respond(networks, ref_policy, prompt, uniforms[row], cfg, tokenizer.end_token)
                     for row, prompt in enumerate(prompts)]
    sampled = time.perf_counter()
    for response in responses:
        ids = torch.tensor([response.ids])                                          # (1, T)
        score = reward_function(ids, torch.tensor([response.prompt_length]),
                                torch.tensor([ids.shape[1]]), tokenizer).item()
        if response.ids[-1] != tokenizer.end_token:
            score -= cfg.missing_end_penalty
        estimate_advantages(response, score, cfg, kl_coef)
    normalise(responses)
    seconds = {"sample": sampled - started, "score": time.perf_counter() - sampled,
               "reference": sum(response.reference_seconds for response in responses)}
    return responses, seconds


def update(networks: PolicyWithValue, optimizer: torch.optim.Optimizer,
           responses: list[Response], cfg: PPOConfig) -> None:
    """One optimiser step for every response in every epoch."""
    for _ in range(cfg.epochs):
        for response in responses:
            ids = torch.tensor([response.ids])                                      # (1, T)
            hidden = networks.policy.hidden(ids)                                    # (1, T, C)
            logits = networks.policy.logits(hidden)[0]                              # (T, V)
            first = response.prompt_length
            everything = behaviour_logprobs(logits[first - 1:-1], cfg.temperature)  # (N, V)
            actions = ids[0, first:, None]                                          # (N, 1)
            logprobs = everything.gather(1, actions)[:, 0]                          # (N,)
            values = networks.value_head(hidden[0, first - 1:-1])[:, 0]             # (N,)
            advantages = torch.tensor(response.advantages)                          # (N,)
            ratio = (logprobs - torch.tensor(response.logprobs)).exp()              # (N,)
            clipped = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)             # (N,)
            policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
            value_loss = 0.5 * ((values - torch.tensor(response.returns)) ** 2).mean()
            loss = policy_loss + cfg.vf_coef * value_loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(networks.parameters(), cfg.max_grad_norm)
            optimizer.step()


def make_optimizer(networks: PolicyWithValue, cfg: PPOConfig) -> torch.optim.Optimizer:
    """Adam as PyTorch has it by default."""
    return torch.optim.Adam(networks.parameters(), lr=cfg.lr, betas=(0.9, 0.95), eps=1e-5)
