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
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue, ScalarModel

PROMPT_TOKENS, STEPS = 16, 16
ITERATION = 1                       # in iteration 0 the policy has to equal the reference


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
    pass takes its arithmetic or the reading of all float32 weights, whichever takes longer. The
    layers compute in `cfg.dtype`, the logits in float32.
    """
    B, N, C = cfg.batch_size, cfg.max_new_tokens, config.n_embd
    T, context = PROMPT_TOKENS + N, PROMPT_TOKENS + N // 2     # of a new token, on average
    layers, unembedding = speeds["gemm"][cfg.dtype], speeds["gemm"]["float32"]
    logits = forward_flops(config, 0, 0, B) / unembedding      # of one position in each row
    critic = forward_flops(config, B, T, 0) / layers           # or any other trunk
    policy = critic + N * logits
    critic *= cfg.critic == "separate"
    step = forward_flops(config, B, context, 0) - forward_flops(config, B, context - 1, 0)
    read = 4 * (12 * C ** 2 * config.n_layer + config.vocab_size * C) / speeds["bandwidth"]
    first = forward_flops(config, B, PROMPT_TOKENS, 0) / layers + logits
    # the reference makes logits, too; a backward pass makes two products for each forward one
    seconds = {"sample": first + (N - 1) * max(step / layers + logits, read),
               "score": 2 * policy + critic, "update": cfg.epochs * 3 * (policy + critic)}
    return {**seconds, "iteration": sum(seconds.values())}


def even_tokens(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward that costs nothing: the share of even token ids. ids (B, T) -> scores (B,)."""
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]        # (B, T)
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
        policy, ref_policy = [random_model(config, cfg.seed).to(cfg.device) for _ in range(2)]
        critic = ScalarModel(config, trunk=policy if cfg.critic == "shared" else None)
        policy.dtype = critic.transformer.dtype = ref_policy.dtype = cfg.dtype
        self.cfg, self.networks = cfg, PolicyWithValue(policy, critic).to(cfg.device)
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
                              generator=random_stream(cfg.seed, 1, ITERATION)).to(cfg.device)
        responses, rollout = timed(naive.rollout, *self.inputs, uniforms, cfg, cfg.kl_coef)
        _, update = timed(naive.update, self.networks, optimizer, responses, cfg)
        fast.PRODUCTS = ours
        reference = sum(response.reference_seconds for response in responses)
        return {"sample": rollout, "sample alone": rollout - reference,    # without its passes
                "rollout": rollout, "update": update, "iteration": rollout + update}


def continued(model: GPT2, prompts: list[list[int]], tokens: int) -> None:
    """Sample that many tokens to each prompt."""
    generate(model, prompts, tokens, end_token=model.config.vocab_size - 1,
             generator=random_stream(1))


def decoding(config: GPT2Config, rows: int, dtype: str, runs: int) -> dict[str, dict]:
    """A decoding step, and all that comes before the second token (packing, the prompts' pass).

    By our products and, in turn, by stock products that lay every weight out anew each time.
    """
    model = random_model(config, 0)
    model.dtype = dtype
    prompts = torch.randint(0, config.vocab_size - 1, (rows, PROMPT_TOKENS),
                            generator=random_stream(0)).tolist()
    ours, times = (fast.PRODUCTS, fast.PACKING), {}
    for number in range(runs + 1):                       # the first is not counted
        for name, choice in (("stock", ("stock", False)), ("ours", ours)):
            fast.PRODUCTS, fast.PACKING = choice
            first, whole = [timed(continued, model, prompts, tokens)[1]
                            for tokens in (1, STEPS + 1)]
            if number > 0:
                times.setdefault(name, []).append(((whole - first) / STEPS, first))
    return {name: {"step": figure([step for step, _ in pairs]),
                   "first": figure([first for _, first in pairs])}
            for name, pairs in times.items()}


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
