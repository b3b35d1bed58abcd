"""What is measured: PPO iterations of networks with random weights on prompts of random tokens.

A product of (a, b) and (b, c) matrices counts 2abc operations. What costs little beside the matrix
products is left out: layer norms, GELU, softmax, biases, the value head, the optimiser.
"""

from types import SimpleNamespace

import torch

from minirlhf import ppo
from minirlhf.benchmark import naive
from minirlhf.benchmark.machine import figure, peak_memory, timed
from minirlhf.engine import fast
from minirlhf.engine.training import random_stream
from minirlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue, ScalarModel

PROMPT_TOKENS, ITERATION = 16, 1         # in iteration 0 the policy has to equal the reference


def forward_flops(config: GPT2Config, rows: int, tokens: int, logit_positions: int) -> int:
    """Operations of one forward pass over `rows` rows of `tokens` tokens.

    Every token passes all matrices of the layers, 12 C^2 entries each. Attention multiplies each
    token's query with the keys up to its own, and the weights with as many values: 4 C operations
    per pair and layer. Logits are made for `logit_positions` positions in all (0: a critic).

    Example: one layer, C 2, V 5, one row of 3 tokens, logits for 2: 2*48*3 + 4*2*6 + 2*2*5*2 = 376.
    """
    C = config.n_embd
    layer = 2 * 12 * C ** 2 * tokens + 4 * C * (tokens * (tokens + 1) // 2)
    return config.n_layer * layer * rows + 2 * C * config.vocab_size * logit_positions


def limits(config: GPT2Config, cfg: ppo.PPOConfig, speeds: dict) -> dict[str, float]:
    """Seconds of an iteration's phases if only the machine's two limits held them up.

    Scoring and update are bound by arithmetic, and so is the first pass of sampling. Each later
    pass takes its arithmetic or the reading of all float32 weights, whichever takes longer.
    """
    B, N, C, gemm = cfg.batch_size, cfg.max_new_tokens, config.n_embd, speeds["gemm"]
    policy = forward_flops(config, B, PROMPT_TOKENS + N, B * N)
    critic = forward_flops(config, B, PROMPT_TOKENS + N, 0) * (cfg.critic == "separate")
    context = PROMPT_TOKENS + N // 2                     # in sight of a new token, on average
    step = forward_flops(config, B, context, B) - forward_flops(config, B, context - 1, 0)
    read = 4 * (12 * C ** 2 * config.n_layer + config.vocab_size * C) / speeds["bandwidth"]
    first = forward_flops(config, B, PROMPT_TOKENS, B)
    # the reference makes logits, too; a backward pass makes two products for each forward one
    seconds = {"sample": first / gemm + (N - 1) * max(step / gemm, read),
               "score": (2 * policy + critic) / gemm,
               "update": cfg.epochs * 3 * (policy + critic) / gemm}
    return {**seconds, "iteration": sum(seconds.values())}


def even_tokens(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward that costs nothing: the share of even token ids. ids (B, T) -> scores (B,)."""
    real = torch.arange(ids.shape[1]) < lengths[:, None]                            # (B, T)
    return ((ids % 2 == 0) & real).sum(dim=1) / lengths


def random_model(config: GPT2Config, seed: int) -> GPT2:
    """A network whose responses never end, so that all do the same work; a seed repeats it."""
    torch.manual_seed(seed)
    model = GPT2(config)
    with torch.no_grad():                # the end token's logit is about -100 wherever one looks
        model.ln_f.weight[0], model.ln_f.bias[0] = 0.0, 10.0
        model.wte.weight[-1] = 0.0
        model.wte.weight[-1, 0] = -10.0
    return model


class Iterations:
    """Networks, ready for one PPO iteration after the other."""

    def __init__(self, config: GPT2Config, cfg: ppo.PPOConfig):
        policy, ref_policy = [random_model(config, cfg.seed) for _ in range(2)]
        critic = ScalarModel(config, trunk=policy if cfg.critic == "shared" else None)
        policy.dtype = critic.transformer.dtype = ref_policy.dtype = cfg.dtype
        self.cfg, self.networks = cfg, PolicyWithValue(policy, critic)
        self.optimizer = ppo.make_optimizer(self.networks, cfg)
        tokenizer = SimpleNamespace(end_token=config.vocab_size - 1)    # there is no text here
        prompts = torch.randint(0, tokenizer.end_token, (cfg.batch_size, PROMPT_TOKENS),
                                generator=random_stream(cfg.seed)).tolist()
        self.inputs = (self.networks, ref_policy, even_tokens, tokenizer, prompts)

    def run(self) -> dict[str, float]:
        """One iteration as `ppo.main` makes it; returns the seconds of its phases."""
        cfg = self.cfg
        batch, rollout = timed(ppo.rollout, *self.inputs, cfg, cfg.kl_coef, ITERATION)
        _, update = timed(ppo.update, self.networks, self.optimizer, batch, cfg, ITERATION)
        self.optimizer.zero_grad()      # as `ppo.main` does
        ids, mask = batch.ids, batch.response_mask
        with torch.no_grad():           # once more: the part of the rollout that is not sampling
            _, score = timed(ppo.forward_pass, *self.inputs[:2], ids, mask, cfg)
        assert int(batch.lengths.sum()) == batch.ids.numel(), "a response ended early"
        return {"sample": rollout - score, "score": score, "rollout": rollout, "update": update,
                "iteration": rollout + update}

    def run_naively(self) -> dict[str, float]:
        """The same by the naive baseline, with plain Adam and stock matrix products."""
        cfg, ours, fast.PRODUCTS = self.cfg, fast.PRODUCTS, "stock"
        optimizer = torch.optim.Adam(self.networks.parameters(), cfg.lr, (0.9, 0.95), 1e-5)
        uniforms = torch.rand(cfg.batch_size, cfg.max_new_tokens, dtype=torch.float64,
                              generator=random_stream(cfg.seed, 1, ITERATION))
        responses, rollout = timed(naive.rollout, *self.inputs, uniforms, cfg, cfg.kl_coef)
        _, update = timed(naive.update, self.networks, optimizer, responses, cfg)
        fast.PRODUCTS = ours
        reference = sum(response.reference_seconds for response in responses)
        return {"sample": rollout, "sample alone": rollout - reference,    # without its passes
                "rollout": rollout, "update": update, "iteration": rollout + update}


def figures(runs: list[dict[str, float]]) -> dict[str, dict]:
    """Each phase's figure over several iterations; {} of none."""
    return {phase: figure([run[phase] for run in runs]) for phase in (runs[0] if runs else {})}


def measure(config: GPT2Config, cfg: ppo.PPOConfig, runs: int, naive_runs: int) -> dict:
    """Figures of iterations of ours and, in turn, of the baseline's; call it in a new process."""
    iterations = Iterations(config, cfg)
    iterations.run()                                     # not counted
    ours, naively = [iterations.run()], []
    memory = peak_memory()                               # before the baseline adds its own
    for number in range(max(runs - 1, naive_runs)):
        naively += [iterations.run_naively()] if number < naive_runs else []
        ours += [iterations.run()] if number < runs - 1 else []
    return {"seconds": figures(ours), "naive": figures(naively), "memory": memory}
