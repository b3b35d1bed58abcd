"""GPT-2 by hand: the network, a scalar head, and the log-probabilities of the tokens in a row.

The architecture is the published one (pre-layer-norm, learned positions, tied embedding, tanh GELU,
residual-scaled initialisation), and parameters carry GPT-2's own names and layout, so published
files load without renaming or transposing (`files/pretrained.py`; `generate.py` samples).

THE ALIGNMENT LAW, which every file of this project follows:
    Rows are right-padded. Column t of every per-token tensor describes the step
        state ids[0..t]  ->  action ids[t+1]
    so a per-token tensor of ids (B, T) is (B, T-1). In the stages only `token_logprobs` shifts.
Right padding needs neither position ids nor an attention mask in a full forward pass: attention
looks back only, so no real token ever sees the padding after it.

Shapes: B sequences, T tokens in the padded row, C channels, V vocabulary, nh heads, hs head size.
Lecture: lectures/01-gpt2.md.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minirlhf.engine import fast
from minirlhf.engine.options import check, one_sentence
from minirlhf.files.pretrained import Pretrained


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2, named as in its config.json; the defaults are the 124M model's."""
    vocab_size: int = 50257     # V
    n_positions: int = 1024     # the longest sequence
    n_embd: int = 768           # C
    n_layer: int = 12
    n_head: int = 12            # nh; the head size hs is C / nh

    def __post_init__(self):
        for name, low, high in (("vocab_size", 2, 10**7), ("n_positions", 2, 10**7),
                                ("n_embd", 1, 10**6), ("n_layer", 1, 1000), ("n_head", 1, 10**6)):
            value = getattr(self, name)
            check(type(value) is int and low <= value <= high,
                  f"GPT-2 config: {name} is {value!r}, expected an integer from {low} to {high}")
        check(self.n_embd % self.n_head == 0,
              f"GPT-2 config: n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


# ---- the network ---------------------------------------------------------------------------------

class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2's files have it."""

    def __init__(self, n_in: int, n_out: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)       # (in, out)
        self.bias = nn.Parameter(torch.zeros(n_out))                     # (out,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])                                # (N, in)
        y = fast.addmm(self.bias, rows, self.weight)                     # (N, out), as torch.addmm
        return y.view(*x.shape[:-1], y.shape[1])                         # (..., out)


class Attention(nn.Module):
    """Causal self-attention: every position looks at itself and at what came before."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd, std=0.02)
        # 2 * n_layer branches are added up, so each starts smaller (Radford et al. 2019, 2.3)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x: torch.Tensor, cache=None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)                         # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        else:                                            # while sampling: generate.KVCache
            y = cache.attend(self.layer, q, k, v)                        # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)                           # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Two linear layers with GPT-2's GELU, the tanh form (the exact form gives other logits)."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        C = config.n_embd
        self.c_fc = Conv1D(C, 4 * C, std=0.02)
        self.c_proj = Conv1D(4 * C, C, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: normalise, attend, add; normalise, transform, add."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache=None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)                           # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                # (B, T, C)


class GPT2(Pretrained, nn.Module):
    """The language model. There is no dropout in it: what is sampled is what is scored."""
    config_class, scalar = GPT2Config, False     # for load_network: config; a scalar head?

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.checkpointing = False       # True: backward repeats each layer's forward pass
        self.dtype = "float32"           # of the layers' matrix products; or bfloat16
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)        # also the unembedding
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def precision(self) -> torch.autocast:
        """Within it matrix products are computed in `self.dtype`; weights and sums stay float32.

        careful: bfloat16 weights of 0.02 are 1.2e-4 apart, a step of 1e-5 would be rounded away.
        Here the optimiser adds to float32 weights; each forward pass uses rounded copies of them.
        """
        return torch.autocast(self.wte.weight.device.type, dtype=torch.bfloat16,
                              enabled=self.dtype == "bfloat16")

    def hidden(self, ids: torch.Tensor, cache=None) -> torch.Tensor:
        """ids (B, T) -> final hidden states (B, T, C). With a cache, `ids` are the new tokens only.

        Raises: ValueError when T exceeds the context.
        """
        if cache is None:
            T, limit = ids.shape[1], self.config.n_positions
            check(T <= limit, f"a sequence of {T} tokens exceeds the model's context of {limit}")
            positions = torch.arange(T, device=ids.device)               # (T,)
        else:
            positions = cache.begin(ids.shape[1])                        # (T,) or (B, 1)
        x = self.wte(ids) + self.wpe(positions)                          # (B, T, C)
        with self.precision():
            for block in self.h:
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, cache, use_reentrant=False)     # (B, T, C)
                else:
                    x = block(x, cache)                                  # (B, T, C)
        return self.ln_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> logits (..., V), through the transposed token embedding.

        careful: always in float32; around -100, as GPT-2's are, bfloat16 numbers are 0.5 apart.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return fast.linear(hidden, self.wte.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, V); logits[:, t] predict ids[:, t+1]."""
        return self.logits(self.hidden(ids))


# ---- a scalar head -------------------------------------------------------------------------------

class ScalarModel(Pretrained, nn.Module):
    """One number per position in place of logits: reward model or critic, on `trunk` if given."""
    config_class, scalar = GPT2Config, True

    def __init__(self, config: GPT2Config, trunk: GPT2 | None = None):
        super().__init__()
        self.config = config
        self.transformer = GPT2(config) if trunk is None else trunk
        # the head starts random (Stiennon et al. 2020); PolicyWithValue sets a critic's to 0
        self.score_head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(config.n_embd + 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> one number per position (B, T)."""
        return self.score_head(self.transformer.hidden(ids)).squeeze(2)  # (B, T)

    def score(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids (B, T), lengths (B,) -> the number at each row's last real token (B,)."""
        last = (lengths - 1)[:, None]                                    # (B, 1)
        # careful: ids[:, -1] would be padding in every row but the longest
        return fast.by_length(self, ids, lengths).gather(1, last).squeeze(1)        # (B,)


# ---- from logits to log-probabilities ------------------------------------------------------------

def behaviour_logprobs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """logits (..., V) -> log-probabilities (..., V) of the distribution that actions come from.

    careful: sampling, old, new and reference log-probabilities all go through here, temperature
    included. Sampling at 0.7 and scoring at 1.0 is a well-known bug that runs without a word.

    Example: logits 0 and 0.6931 (log 2) give probabilities 1/3 and 2/3; with temperature 0.5,
    1/5 and 4/5.
    """
    return F.log_softmax(logits / temperature, dim=-1)


def action_logprobs(states: torch.Tensor, unembedding: torch.Tensor, actions: torch.Tensor,
                    temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each action, and entropy of the distribution it came from.

    states (N, C), unembedding (V, C), actions (N,) -> chosen (N,), entropy (N,), both in nats.
    """
    logits = F.linear(states, unembedding)                               # (N, V)
    logprobs = behaviour_logprobs(logits, temperature)                   # (N, V)
    chosen = logprobs.gather(1, actions[:, None]).squeeze(1)             # (N,)
    entropy = -(logprobs.exp() * logprobs).sum(dim=1)                    # (N,)
    return chosen, entropy


def token_logprobs(hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                   unembedding: torch.Tensor, temperature: float = 1.0,
                   entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each masked action, and the entropy of the distribution it came from.

    hidden (B, T, C), ids (B, T), mask (B, T-1) bool, unembedding (V, C)
    -> logprobs (B, T-1) and entropy (B, T-1) in nats, both 0 outside the mask.
    Logits are made for masked positions only: prompts and padding cost nothing. Unless the entropy
    needs a gradient, a fast twin of `action_logprobs` does the same with less memory.

    Example: with V = 2, equal logits everywhere and one masked column, that column is -0.6931 in
    `logprobs` and 0.6931 in `entropy`.
    Raises: ValueError for a mask of another shape or type; a 0/1 integer mask would pick rows.
    Lecture: lectures/00-map.md, "The alignment law".
    """
    check(mask.dtype == torch.bool and mask.shape == ids[:, 1:].shape, "token_logprobs expects a "
          f"bool mask of shape {tuple(ids[:, 1:].shape)}, found {mask.dtype} {tuple(mask.shape)}")
    states = hidden[:, :-1][mask]                                        # (N, C)
    actions = ids[:, 1:][mask]                                           # (N,)   the only shift
    if entropy_grad:
        chosen, entropy = action_logprobs(states, unembedding, actions, temperature)        # (N,)
    else:
        chosen, entropy = fast.action_logprobs(behaviour_logprobs, states, unembedding, actions,
                                               temperature)              # (N,) each
    zeros = torch.zeros(mask.shape, dtype=chosen.dtype, device=ids.device)          # (B, T-1)
    return zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, entropy)


# ---- what PPO trains -----------------------------------------------------------------------------

class PolicyWithValue(nn.Module):
    """All that PPO trains: the policy, and a critic on a trunk of its own or on the policy's."""

    def __init__(self, policy: GPT2, critic: ScalarModel):
        super().__init__()
        self.policy, self.critic = policy, critic
        nn.init.zeros_(critic.score_head.weight)         # first advantages are the rewards' alone

    def evaluate_actions(self, ids: torch.Tensor, mask: torch.Tensor, temperature: float,
                         entropy_grad: bool = False):
        """ids (B, T), mask (B, T-1) -> logprobs, values, entropy, each (B, T-1)."""
        policy, trunk = self.policy, self.critic.transformer
        hidden, weight = policy.hidden(ids), policy.wte.weight          # (B, T, C), (V, C)
        logprobs, entropy = token_logprobs(hidden, ids, mask, weight, temperature,
                                           entropy_grad)                            # (B, T-1) each
        states = hidden if trunk is policy else trunk.hidden(ids)                   # (B, T, C)
        values = self.critic.score_head(states).squeeze(2)[:, :-1]                  # (B, T-1)
        return logprobs, torch.where(mask, values, 0.0), entropy


if __name__ == "__main__":
    with one_sentence():
        check(False, "this file is no command; to sample: python -m minirlhf.generate --prompt ...")
