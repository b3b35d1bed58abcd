"""What is measured: networks with random weights, prompts of random tokens, one PPO iteration."""

import contextlib
import time
from dataclasses import dataclass

import torch

from minirlhf import ppo
from minirlhf.benchmark import arithmetic, machine
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel
from minirlhf.ppo import PolicyWithValue, PPOConfig

FULL = GPT2Config()                                                     # 124M parameters
QUARTER = GPT2Config(n_embd=384, n_layer=6, n_head=6)                   # 30M
TINY = GPT2Config(vocab_size=2048, n_positions=64, n_embd=96, n_layer=4, n_head=3)  # as shipped
TOY = GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=2, n_head=2)    # for --quick


@dataclass(frozen=True)
class Setting:
    """Sizes and counts of a PPO iteration; the defaults are those of the comparison."""
    config: GPT2Config = FULL
    prompts: int = 8                    # one response each; all of them are one minibatch
    prompt_tokens: int = 16
    new_tokens: int = 32                # of every response: none ends before
    epochs: int = 4
    critic: str = "shared"

    def ppo_config(self) -> PPOConfig:
        """The options of minirlhf.ppo that this stands for."""
        return PPOConfig(model="", reward="even_tokens", gold="", critic=self.critic,
                         batch_size=self.prompts, minibatch_size=self.prompts,
                         max_new_tokens=self.new_tokens, epochs=self.epochs, lr=1e-6)

    def flops(self) -> dict[str, float]:
        """Operations of the phases: sampling's first pass, scoring and update."""
        positions, tokens = self.prompts * self.new_tokens, self.prompt_tokens + self.new_tokens
        policy = arithmetic.forward_flops(self.config, self.prompts, tokens, positions)
        critic = arithmetic.forward_flops(self.config, self.prompts, tokens, 0)
        trained = policy + critic * (self.critic == "separate")
        return {"prefill": arithmetic.forward_flops(self.config, self.prompts, self.prompt_tokens,
                                                    self.prompts),
                "score": trained + policy,               # the reference makes logits, too
                "update": self.epochs * arithmetic.training_flops(trained)}

    def decode_limit(self, gemm: float, bandwidth: float) -> float:
        """Seconds of one decoding step if nothing but its limit held it up."""
        context = self.prompt_tokens + self.new_tokens // 2
        operations = arithmetic.decode_flops(self.config, self.prompts, context)
        return max(operations / gemm, arithmetic.bytes_per_step(self.config) / bandwidth)


@dataclass(frozen=True)
class EndToken:
    """Stands for a tokenizer: there is no text here."""
    end_token: int


def even_tokens(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                tokenizer) -> torch.Tensor:
    """A reward that costs nothing: the share of even token ids. ids (B, T) -> scores (B,)."""
    real = torch.arange(ids.shape[1]) < lengths[:, None]                            # (B, T)
    return ((ids % 2 == 0) & real).sum(dim=1) / lengths


def forbid_end_token(model: GPT2, end_token: int) -> None:
    """Change the weights so that the end token has a logit of about -100 wherever one looks.

    Channel 0 of the last layer norm becomes 10 everywhere, and the end token's embedding -10 there.
    So responses never end early, whoever samples from these weights, and all do the same work.
    """
    with torch.no_grad():
        model.ln_f.weight[0], model.ln_f.bias[0] = 0.0, 10.0
        model.wte.weight[end_token] = 0.0
        model.wte.weight[end_token, 0] = -10.0


def random_model(config: GPT2Config, seed: int) -> GPT2:
    """A network whose responses never end; the same seed gives the same weights."""
    torch.manual_seed(seed)
    model = GPT2(config)
    forbid_end_token(model, config.vocab_size - 1)
    return model


def random_prompts(setting: Setting, seed: int) -> list[list[int]]:
    """Prompts of random tokens, all of one length."""
    generator = torch.Generator().manual_seed(seed)
    shape = (setting.prompts, setting.prompt_tokens)
    return torch.randint(0, setting.config.vocab_size - 1, shape, generator=generator).tolist()


class Iterations:
    """The networks of a setting, ready for one PPO iteration after the other."""

    def __init__(self, setting: Setting, seed: int = 0):
        self.use(setting, seed)
        self.done = 0
        policy, self.ref_policy = [random_model(setting.config, seed) for _ in range(2)]
        self.ref_policy.requires_grad_(False)
        critic = ScalarModel(setting.config) if setting.critic == "separate" else None
        self.networks = PolicyWithValue(policy, critic)
        self.optimizer = ppo.make_optimizer(self.networks, self.cfg)
        self.tokenizer = EndToken(setting.config.vocab_size - 1)

    def use(self, setting: Setting, seed: int) -> None:
        """Go on with other counts for the same networks."""
        self.setting, self.cfg = setting, setting.ppo_config()
        self.prompts = random_prompts(setting, seed)

    def run(self) -> dict[str, float]:
        """One iteration as `ppo.main` makes it; returns the seconds of its phases."""
        started = time.perf_counter()
        with timed(ppo, "generate") as sampling:
            batch = ppo.rollout(self.networks, self.ref_policy, even_tokens, self.tokenizer,
                                self.prompts, self.cfg, self.cfg.kl_coef, self.done)
        collected = time.perf_counter()
        with timed(self.optimizer, "step") as steps:
            ppo.update(self.networks, self.optimizer, batch, self.cfg, self.done)
        ended = time.perf_counter()
        assert int(batch.lengths.sum()) == batch.ids.numel(), "a response ended early"
        self.done += 1
        return {"sample": sum(sampling), "score": collected - started - sum(sampling),
                "rollout": collected - started, "update": ended - collected,
                "optimizer": sum(steps), "iteration": ended - started}


def phase_figures(found: list[dict[str, float]]) -> dict[str, dict]:
    """Seconds of several iterations, phase by phase."""
    return {phase: machine.figure([seconds[phase] for seconds in found]) for phase in found[0]}


@contextlib.contextmanager
def timed(owner, name: str):
    """While it lasts, each call of `owner.name` adds its seconds to the list that it gives."""
    function, seconds, own = getattr(owner, name), [], name in vars(owner)

    def measured(*arguments, **options):
        started = time.perf_counter()
        result = function(*arguments, **options)
        seconds.append(time.perf_counter() - started)
        return result

    setattr(owner, name, measured)
    try:
        yield seconds
    finally:
        if own:
            setattr(owner, name, function)
        else:                           # a method: its class has it
            delattr(owner, name)


def peak_of_iterations(setting: Setting) -> int | None:
    """Peak memory of a process that makes two iterations; call it in a new process."""
    iterations = Iterations(setting)
    iterations.run()
    iterations.run()                    # now with the optimiser's moments from the start
    return machine.peak_memory()
