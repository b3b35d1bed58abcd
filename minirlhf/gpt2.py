"""GPT-2 by hand: the network, its published weights, a scalar head, and sampling with a KV cache.

    python -m minirlhf.gpt2 --model checkpoints/tiny --prompt "What is the capital of France?"

The architecture is the published one (pre-layer-norm, learned positions, tied embedding, tanh GELU,
residual-scaled initialisation), and parameters carry GPT-2's own names and layout, so published
files load without renaming or transposing anything.

THE ALIGNMENT LAW, which every file of this project follows:
    Rows are right-padded. Column t of every per-token tensor describes the step
        state ids[0..t]  ->  action ids[t+1]
    so a per-token tensor of ids (B, T) is (B, T-1). Only `token_logprobs` shifts.
Right padding needs neither position ids nor an attention mask in a full forward pass: attention
looks back only, so no real token ever sees the padding behind it.

Shapes: B sequences, T tokens in the padded row, C channels, V vocabulary, nh heads, hs head size.
Lecture: lectures/00-map.md, "The four networks".
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minirlhf.common import check, check_finite, check_range, random_stream, run
from minirlhf.weights import (PUBLISHED_NAMES, download_published, read_json, read_weights,
                              write_json, write_safetensors)


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


# ---- matrix products -----------------------------------------------------------------------------

# On some CPUs the library behind F.linear takes up to twice as long as oneDNN, which PyTorch also
# has, for a few rows (a decoding step) and for GPT-2's wide unembedding. The operator used here is
# the one behind torch.compile's linear layers.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
FEWEST_ROWS, SMALLEST_WEIGHT = 2, 1 << 18    # below these F.linear is as fast or faster


def suits_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (N, in) times `weight` is a product that oneDNN computes faster."""
    return (ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and len(x) >= FEWEST_ROWS and weight.numel() >= SMALLEST_WEIGHT)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` where no gradient is needed: x (N, in), weight (out, in) -> (N, out)."""
    if torch.is_grad_enabled() or not suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """`torch.addmm(bias, x, weight)` with gradients, by `product`: x (N, in), weight (in, out)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        """x (N, in), weight (in, out), bias (out,) -> (N, out)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight.T, bias)                                # (N, out)

    @staticmethod
    def backward(ctx, grad):
        """grad (N, out) -> gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        return product(grad, weight, None), product(x.T, grad.T, None), grad.sum(dim=0)


# ---- the network --------------------------------------------------------------------------------

class Conv1D(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2's files have it."""

    def __init__(self, n_in: int, n_out: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) * std)       # (in, out)
        self.bias = nn.Parameter(torch.zeros(n_out))                     # (out,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])                                # (rows, in)
        if suits_onednn(flat, self.weight):
            y = Product.apply(flat, self.weight, self.bias)              # (rows, out)
        else:
            y = torch.addmm(self.bias, flat, self.weight)                # (rows, out)
        return y.view(*x.shape[:-1], y.shape[1])                         # (..., out)


class Attention(nn.Module):
    """Causal self-attention: every position looks at itself and at what came before."""

    def __init__(self, config: GPT2Config, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd, std=0.02)
        # 2 * n_layer branches are added up: each starts smaller, so that the sum keeps its size
        # (Radford et al. 2019, section 2.3)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)                         # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        visible = None                                   # None: each position sees those up to it
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)                        # (B, nh, columns, hs)
            visible = cache.visible                                      # (B, 1, 1, columns)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=visible is None)
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

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), cache)                           # (B, T, C)
        return x + self.mlp(self.ln_2(x))                                # (B, T, C)


class GPT2(nn.Module):
    """The language model. There is no dropout in it: what is sampled is what is scored."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.checkpointing = False       # True: backward repeats each layer's forward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)        # also the unembedding
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def hidden(self, ids: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
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
        for block in self.h:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cache, use_reentrant=False)     # (B, T, C)
            else:
                x = block(x, cache)                                      # (B, T, C)
        return self.ln_f(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (..., C) -> logits (..., V), through the transposed token embedding."""
        if hidden.dim() == 2:
            return product(hidden, self.wte.weight, None)
        return F.linear(hidden, self.wte.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> logits (B, T, V); logits[:, t] predict ids[:, t+1]."""
        return self.logits(self.hidden(ids))

    @classmethod
    def from_pretrained(cls, name_or_folder: str) -> "GPT2":
        """Load a folder in Hugging Face format, or a published size by name (fetched once).

        Raises: FileNotFoundError with what to do when files are missing; ValueError naming file
        and tensor when something is missing, extra or misshapen.
        """
        folder = find_folder(name_or_folder)
        config, tensors = read_config(folder), read_weights(folder)
        check("score.weight" not in tensors, f"{folder} holds a reward model (it has a tensor "
              "score.weight), expected a language model: a base, SFT or PPO folder")
        trunk = trunk_tensors(tensors, folder)
        check_sizes(config, trunk, folder)
        with torch.random.fork_rng(devices=[]):          # loading leaves the random state alone
            model = cls(config)
        load_tensors(model, trunk, folder)
        return model

    def save_pretrained(self, folder: str, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors as transformers' GPT2LMHeadModel expects them.

        With dtype float16 the file is half as large. config.json says float32 all the same, so
        that transformers computes in float32, as we do.
        """
        write_config(folder, self.config, {"architectures": ["GPT2LMHeadModel"]})
        tensors = {"transformer." + name: tensor.to(dtype)
                   for name, tensor in self.state_dict().items()}
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})


def scalar_head(head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """hidden (B, T, C) -> one number per position (B, T), in float32 under autocast, too.

    Scores and values are compared, subtracted and summed: 8 bits would make near ones equal.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype)).squeeze(2)             # (B, T)


class ScalarModel(nn.Module):
    """A GPT-2 with one number per position in place of logits: a reward model or a critic."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = GPT2(config)
        # reward models start with a small random head (Stiennon et al. 2020); a critic zeroes it
        self.score_head = nn.Linear(config.n_embd, 1, bias=False)
        nn.init.normal_(self.score_head.weight, std=1 / math.sqrt(config.n_embd + 1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids (B, T) -> one number per position (B, T)."""
        return scalar_head(self.score_head, self.transformer.hidden(ids))    # (B, T)

    def score(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """ids (B, T), lengths (B,) -> the number at each row's last real token (B,)."""
        last = (lengths - 1)[:, None]                                    # (B, 1)
        # careful: ids[:, -1] would be padding in every row but the longest
        return self(ids).gather(1, last).squeeze(1)                      # (B,)

    @classmethod
    def from_pretrained(cls, folder: str) -> "ScalarModel":
        """Load a folder written by `save_pretrained`.

        Raises: FileNotFoundError when files are missing; ValueError for a language model, and
        naming the tensor when something is missing, extra or misshapen.
        """
        config, tensors = read_config(folder), read_weights(folder)
        check("score.weight" in tensors, f"{folder} holds a language model (it has no tensor "
              "score.weight), expected a reward model; make one with: "
              "python -m minirlhf.reward_model")
        head = tensors.pop("score.weight")
        check_shape("score.weight", head, (1, config.n_embd), folder)
        trunk = trunk_tensors(tensors, folder)
        check_sizes(config, trunk, folder)
        with torch.random.fork_rng(devices=[]):          # loading leaves the random state alone
            model = cls(config)
        load_tensors(model.score_head, {"weight": head}, folder)
        load_tensors(model.transformer, trunk, folder)
        return model

    def save_pretrained(self, folder: str) -> None:
        """Write the folder as transformers' GPT2ForSequenceClassification (one label) expects it.

        careful: that class knows no lengths. It reads a row's score at the last id that is not
        `pad_token_id`; with the end token as padding it would overlook the end token that the
        policy chose. So config.json names an id that is in no text (PAD_TOKEN); whoever scores a
        batch with transformers fills the rows up with that one.
        """
        trunk = self.transformer.state_dict()
        tensors = {"transformer." + name: tensor for name, tensor in trunk.items()}
        tensors["score.weight"] = self.score_head.weight.detach()
        extra = {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "SCORE"},
                 "label2id": {"SCORE": 0}}
        if self.config.vocab_size > 256:     # a vocabulary that has all bytes
            extra["pad_token_id"] = PAD_TOKEN
        write_config(folder, self.config, extra)
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})


# ---- from logits to log-probabilities -----------------------------------------------------------

def behaviour_logprobs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """logits (..., V) -> log-probabilities (..., V) of the distribution that actions come from.

    careful: sampling, old, new and reference log-probabilities all go through here, temperature
    included. Sampling at 0.7 and scoring at 1.0 is a well-known bug that runs without a word.

    Example: logits 0 and 0.6931 (log 2) give probabilities 1/3 and 2/3, at temperature 0.5 1/5
    and 4/5.
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()              # a sum over 50,257 tokens needs more than 8 or 11 bits
    return F.log_softmax(logits / temperature, dim=-1)


def plain_action_logprobs(states: torch.Tensor, unembedding: torch.Tensor, actions: torch.Tensor,
                          temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each action and entropy of its distribution, written plainly.

    states (N, C), unembedding (V, C), actions (N,) -> chosen (N,), spread (N,), both in nats.
    """
    everything = behaviour_logprobs(F.linear(states, unembedding), temperature)     # (N, V)
    chosen = everything.gather(1, actions[:, None]).squeeze(1)           # (N,)
    spread = -(everything.exp() * everything).sum(dim=1)                 # (N,)
    return chosen, spread


class ActionLogprobs(torch.autograd.Function):
    """`plain_action_logprobs` with one (N, V) tensor; the plain form has up to five at a time.

    For GPT-2's vocabulary these tensors are the largest of all, and little is computed on them but
    memory is moved. So logits, probabilities and gradient take turns in one tensor, which
    log-softmax passes through in blocks of a few rows. The gradient of one log-probability with
    respect to the logits is (1 at the action, 0 elsewhere) - probabilities, over the temperature;
    the entropy has none here.
    """

    BLOCK = 1 << 20                     # numbers in a block: it stays in the processor's cache

    @staticmethod
    def forward(ctx, states, unembedding, actions, temperature):
        """states (N, C), unembedding (V, C), actions (N,) -> chosen (N,), spread (N,) in nats."""
        table = product(states, unembedding, None)                       # (N, V) logits
        N, V = table.shape
        number = torch.promote_types(table.dtype, torch.float32)
        chosen = torch.empty(N, dtype=number, device=table.device)       # (N,)
        spread = torch.empty(N, dtype=number, device=table.device)       # (N,)
        step = max(1, ActionLogprobs.BLOCK // V)
        for first in range(0, N, step):
            rows = slice(first, first + step)
            everything = behaviour_logprobs(table[rows], temperature)    # (step, V)
            chosen[rows] = everything.gather(1, actions[rows, None]).squeeze(1)
            probabilities = everything.exp()                             # (step, V)
            spread[rows] = -(probabilities * everything).sum(dim=1)
            table[rows] = probabilities                                  # the logits are used up
        ctx.save_for_backward(states, unembedding, actions)
        ctx.table, ctx.temperature = table, temperature
        ctx.mark_non_differentiable(spread)
        return chosen, spread

    @staticmethod
    def backward(ctx, grad_chosen, _):
        """grad_chosen (N,) -> gradients of states and unembedding."""
        states, unembedding, actions = ctx.saved_tensors
        table, ctx.table = ctx.table, None                               # (N, V) probabilities
        assert table is not None, "ActionLogprobs: backward was called twice"
        scale = (grad_chosen / ctx.temperature).to(table.dtype)[:, None]     # (N, 1)
        table.mul_(-scale).scatter_add_(1, actions[:, None], scale)      # (N, V) now the gradient
        grad_states = (table @ unembedding.to(table.dtype)).to(states.dtype)         # (N, C)
        grad_unembedding = (table.T @ states.to(table.dtype)).to(unembedding.dtype)  # (V, C)
        return grad_states, grad_unembedding, None, None


def token_logprobs(hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                   unembedding: torch.Tensor, temperature: float = 1.0,
                   entropy_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each masked action, and the entropy of the distribution it came from.

    hidden (B, T, C), ids (B, T), mask (B, T-1) bool, unembedding (V, C)
    -> logprobs (B, T-1) and entropy (B, T-1) in nats, both 0 outside the mask.
    Logits are made for masked positions only: prompts and padding cost nothing. The entropy has a
    gradient only if `entropy_grad`; without, `ActionLogprobs` does the same with less memory.

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
        chosen, spread = plain_action_logprobs(states, unembedding, actions, temperature)
    else:
        chosen, spread = ActionLogprobs.apply(states, unembedding, actions, temperature)    # (N,)
    zeros = torch.zeros(mask.shape, dtype=chosen.dtype, device=ids.device)          # (B, T-1)
    return zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, spread)


# ---- sampling -----------------------------------------------------------------------------------

class KVCache:
    """Keys and values of every layer, so that a new token costs one column, not the whole row.

    The first pass stores the right-padded prompts in columns 0 .. longest-1. Each later pass adds
    one token to every row, in the next column. So a short prompt has padding between itself and
    its response: `visible` hides it, and `lengths` knows the tokens' true positions.

    Example: prompts of 2 and 4 tokens and two new tokens each. Row 0 sees columns 0 1 4 5, whose
    tokens have positions 0 1 2 3; row 1 sees columns 0 to 5.
    """

    def __init__(self, config: GPT2Config, prompt_lengths: torch.Tensor, columns: int,
                 like: torch.Tensor):
        B, hs = len(prompt_lengths), config.n_embd // config.n_head
        shape = (config.n_layer, B, config.n_head, columns, hs)
        kind, dtype = like.device.type, like.dtype
        if torch.is_autocast_enabled(kind):              # keys and values come in this type
            dtype = torch.get_autocast_dtype(kind)
        self.keys = torch.empty(shape, dtype=dtype, device=like.device)
        self.values = torch.empty(shape, dtype=dtype, device=like.device)
        self.filled = 0                                  # columns in use
        self.lengths = prompt_lengths.clone()            # (B,) real tokens in use
        self.visible = None                              # the first pass is plainly causal
        column = torch.arange(columns, device=like.device)
        real = (column < prompt_lengths[:, None]) | (column >= prompt_lengths.max())
        self.real = real[:, None, None]                  # (B, 1, 1, columns) bool: not padding

    def begin(self, T: int) -> torch.Tensor:
        """Start a pass of T new tokens a row; returns their positions: (T,) first, (B, 1) later."""
        self.new = slice(self.filled, self.filled + T)
        self.filled += T
        if self.new.start == 0:
            return torch.arange(T, device=self.real.device)              # (T,)
        self.visible = self.real[..., :self.filled]                      # (B, 1, 1, columns)
        self.lengths = self.lengths + 1                                  # (B,)
        return self.lengths[:, None] - 1                                 # (B, 1)

    def extend(self, layer: int, k: torch.Tensor,
               v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new k, v (B, nh, T, hs); return all of them so far (B, nh, columns, hs)."""
        self.keys[layer, :, :, self.new] = k
        self.values[layer, :, :, self.new] = v
        return self.keys[layer, :, :, :self.filled], self.values[layer, :, :, :self.filled]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop finished rows; `rows` (B,) bool says which stay."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths, self.real = self.lengths[rows], self.real[rows]


@dataclass
class Generation:
    """What `generate` made. Per-token tensors follow the alignment law."""
    ids: torch.Tensor             # (B, T) prompt + response, right-padded with the end token
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor         # (B,) prompt + response, the end token included where chosen
    ended: torch.Tensor           # (B,) bool: the end token was chosen
    logprobs: torch.Tensor        # (B, T-1) nats, of each response token when it was picked; else 0


def filter_logprobs(logprobs: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Keep the `top_k` likeliest tokens (0: all) and the smallest set holding `top_p` of the mass.

    logprobs (B, V) -> logprobs (B, V) that are normalised again, -inf for what was left out.
    For people only: PPO samples from the whole distribution, because that is what it scores.
    Example: probabilities .5 .3 .2 with top_p 0.7 become .625 .375 0.
    Source: top-p: Holtzman et al. 2019 (arXiv 1904.09751), section 3.1.
    """
    if top_k > 0:
        kth = logprobs.topk(min(top_k, logprobs.shape[-1])).values[:, -1:]          # (B, 1)
        logprobs = logprobs.masked_fill(logprobs < kth, -math.inf)
    if top_p < 1.0:
        ordered, order = logprobs.softmax(dim=1).sort(dim=1, descending=True)       # (B, V)
        behind = ordered.cumsum(dim=1) - ordered >= top_p                # mass before it is enough
        logprobs = logprobs.masked_fill(behind.scatter(1, order, behind), -math.inf)
    return logprobs.log_softmax(dim=1)


def sample(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token a row by inverting the cumulative distribution. (B, V), (B,) -> (B,).

    One uniform number decides one token, so a row's sample does not depend on its neighbours.
    Example: probabilities .2 .5 .3 and a uniform of 0.6 give token 1, because .2 <= 0.6 < .7.
    """
    # careful: just below 1, float32 numbers are 6e-8 apart, more than many a token's probability
    fine = torch.float32 if logprobs.device.type == "mps" else torch.float64     # mps has no other
    cumulative = logprobs.exp().cumsum(dim=1, dtype=fine)                # (B, V)
    target = uniforms[:, None].to(cumulative) * cumulative[:, -1:]       # (B, 1)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp(max=logprobs.shape[1] - 1)                       # (B,)


def next_logprobs(model: GPT2, last: torch.Tensor, temperature: float, top_k: int,
                  top_p: float) -> torch.Tensor:
    """Final hidden states (B, C) -> log-probabilities (B, V) of the next token, filtered."""
    logprobs = behaviour_logprobs(model.logits(last), temperature)       # (B, V)
    if top_k > 0 or top_p < 1.0:
        return filter_logprobs(logprobs, top_k, top_p)                   # (B, V)
    return logprobs


def generate(model: GPT2, prompts: list[list[int]], max_new_tokens: int, *, end_token: int,
             generator: torch.Generator | None = None, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, greedy: bool = False, where: str = "generate") -> Generation:
    """Continue every prompt until its end token or `max_new_tokens`, batched, with a KV cache.

    prompts: B lists of token ids, of unequal lengths. Every row uses its own `max_new_tokens`
    uniform numbers, drawn row after row before the first token: the same generator state repeats
    the same sample, and a row's sample depends neither on its neighbours nor on when they end.
    Rows that ended leave the batch when they are a quarter of it.
    Raises: ValueError for an empty prompt, ids outside the vocabulary, or when prompt plus response
    exceed the context; FloatingPointError, saying `where`, when the model gives no numbers.
    """
    longest = check_prompts(model, prompts, max_new_tokens, end_token)
    check(temperature > 0, f"temperature is {temperature}, expected a value above 0")
    check(top_k >= 0, f"top_k is {top_k}, expected at least 0")
    check(0 < top_p <= 1, f"top_p is {top_p}, expected a value above 0 and at most 1")
    B, device = len(prompts), model.wte.weight.device
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)   # (B,)
    ids = torch.full((B, longest + max_new_tokens), end_token, device=device)           # (B, T)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt, device=device)
    number = torch.promote_types(model.wte.weight.dtype, torch.float32)
    picked = torch.zeros(B, ids.shape[1] - 1, dtype=number, device=device)              # (B, T-1)
    uniforms = torch.rand(B, max_new_tokens, generator=generator, dtype=torch.float64)
    lengths = prompt_lengths.clone()                                     # (B,)
    ended = torch.zeros(B, dtype=torch.bool, device=device)              # (B,)
    rows = torch.arange(B, device=device)                # (R,) the rows that are still computed
    with torch.no_grad():
        cache = KVCache(model.config, prompt_lengths, ids.shape[1], model.wte.weight)
        last = model.hidden(ids[:, :longest], cache)[rows, prompt_lengths - 1]          # (R, C)
        for step in range(max_new_tokens):
            logprobs = next_logprobs(model, last, temperature, top_k, top_p)            # (R, V)
            u = uniforms[rows.cpu(), step]                               # (R,)
            tokens = logprobs.argmax(dim=1) if greedy else sample(logprobs, u)      # (R,)
            going = ~ended[rows]                                         # (R,) bool
            live = rows[going]
            ids[live, lengths[live]] = tokens[going]
            picked[live, lengths[live] - 1] = logprobs[going, tokens[going]]
            lengths[live] += 1
            ended[live] = tokens[going] == end_token
            going = ~ended[rows]
            if step + 1 == max_new_tokens or not going.any():
                break
            if going.sum() <= 0.75 * len(rows):
                cache.keep(going)
                rows, tokens = rows[going], tokens[going]
            last = model.hidden(tokens[:, None], cache)[:, 0]            # (R, C)
    T = int(lengths.max())
    check_finite("the log-probability of a sampled token", picked, where)
    return Generation(ids[:, :T], prompt_lengths, lengths, ended, picked[:, :T - 1])


def check_prompts(model: GPT2, prompts: list[list[int]], max_new_tokens: int,
                  end_token: int) -> int:
    """Refuse prompts that cannot be continued; return the length of the longest."""
    check(len(prompts) > 0 and min(len(prompt) for prompt in prompts) > 0,
          "generate needs at least one prompt, and at least one token in each")
    check(max_new_tokens >= 1, f"max_new_tokens is {max_new_tokens}, expected at least 1")
    longest, limit = max(len(prompt) for prompt in prompts), model.config.n_positions
    check(longest + max_new_tokens <= limit,
          f"a prompt of {longest} tokens plus a response of {max_new_tokens} exceeds the model's "
          f"context of {limit} tokens; shorten one of them")
    used = {end_token}.union(*prompts)
    check(0 <= min(used) and max(used) < model.config.vocab_size,
          f"token id {min(used) if min(used) < 0 else max(used)} is outside the model's vocabulary "
          f"of {model.config.vocab_size}; is this the tokenizer that the model was trained with?")
    return longest


# ---- files --------------------------------------------------------------------------------------

FIXED_CONFIG = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False, "tie_word_embeddings": True, "n_inner": None}
# The single byte 0xff, in GPT-2's vocabulary and in every other that starts with the 256 bytes. It
# is part of no UTF-8 text, so a tokenizer never makes it.
PAD_TOKEN = 187


def find_folder(name_or_folder: str) -> str:
    """A folder as it is; a published name becomes checkpoints/<name>, downloaded when absent."""
    if name_or_folder not in PUBLISHED_NAMES or os.path.isdir(name_or_folder):
        return name_or_folder
    folder = os.path.join("checkpoints", name_or_folder)
    download_published(name_or_folder, folder)
    return folder


def read_config(folder: str) -> GPT2Config:
    """Read config.json; anything that would change the arithmetic is refused by name.

    A folder is refused, too, while a run writes its result there or after it was killed in that.
    """
    run_file = os.path.join(folder, "run.json")
    if os.path.exists(run_file):
        check(read_json(run_file).get("finished") is True, f"{folder}: the run that wrote here was "
              "stopped while it wrote its result; finish it by its command with --resume")
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    for name, expected in FIXED_CONFIG.items():
        found = values.get(name, expected)
        check(found == expected, f"{path}: {name} is {found!r}, minirlhf's GPT-2 has {expected!r}")
    sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    missing = [name for name in sizes if name not in values]
    check(not missing, f"{path}: {', '.join(missing)} missing; expected the config of a GPT-2")
    try:
        return GPT2Config(**{name: values[name] for name in sizes})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_config(folder: str, config: GPT2Config, extra: dict) -> None:
    """Write config.json; the end token is the last id of the vocabulary, as in GPT-2."""
    end = config.vocab_size - 1
    values = {"vocab_size": config.vocab_size, "n_positions": config.n_positions,
              "n_ctx": config.n_positions, "n_embd": config.n_embd, "n_layer": config.n_layer,
              "n_head": config.n_head, "bos_token_id": end, "eos_token_id": end,
              "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "torch_dtype": "float32"}
    write_json(os.path.join(folder, "config.json"), {**FIXED_CONFIG, **values, **extra})


def trunk_tensors(tensors: dict[str, torch.Tensor], folder: str) -> dict[str, torch.Tensor]:
    """Bring the published key styles to ours: no prefix, no mask buffers, one embedding."""
    found = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("transformer.")
        if short.endswith((".attn.bias", ".attn.masked_bias")):
            continue                                     # the causal mask, stored by older writers
        check(short not in found, f"{folder}: tensor {short} is there with and without prefix")
        found[short] = tensor
    head = found.pop("lm_head.weight", None)
    if head is not None and "wte.weight" in found:
        tied = torch.equal(head.float(), found["wte.weight"].float())
        check(tied, f"{folder}: lm_head.weight differs from wte.weight, expected tied embeddings")
    return found


def check_shape(name: str, tensor: torch.Tensor, expected: tuple, folder: str) -> None:
    """Refuse a tensor of another shape by name."""
    check(tuple(tensor.shape) == tuple(expected), f"{folder}: tensor {name} has shape "
          f"{tuple(tensor.shape)}, expected {tuple(expected)} for the sizes in config.json")


def check_names(expected, found, folder: str) -> None:
    """Refuse a file in which tensors are missing, or that has others, by name."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    check(not missing, f"{folder}: tensor {', '.join(missing[:3])} is missing ({len(missing)} in "
          "all); is this a GPT-2 checkpoint of the size that config.json states?")
    check(not extra, f"{folder}: unexpected tensor {', '.join(extra[:3])} ({len(extra)} in all); "
          "is this a GPT-2 checkpoint of the size that config.json states?")


def check_sizes(config: GPT2Config, trunk: dict[str, torch.Tensor], folder: str) -> None:
    """Compare config.json with the file, before memory for a model of that size is asked for."""
    with torch.device("meta"):                           # names and shapes without memory
        expected = GPT2(config).state_dict()
    check_names(expected, trunk, folder)
    for name, tensor in expected.items():
        check_shape(name, trunk[name], tensor.shape, folder)


def load_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], folder: str) -> None:
    """Copy `tensors` into `module`, converting to float32; name what does not fit."""
    expected = module.state_dict()
    check_names(expected, tensors, folder)
    for name, target in expected.items():
        source = tensors[name]
        check_shape(name, source, target.shape, folder)
        check(source.is_floating_point(), f"{folder}: tensor {name} has type {source.dtype}, "
              "expected floating-point numbers")
        target.copy_(source)
        check(bool(torch.isfinite(target).all()), f"{folder}: tensor {name} holds nan or inf; "
              "the file is damaged, or the run that wrote it diverged")


def check_tokenizer(model: nn.Module, tokenizer, folder: str) -> None:
    """Refuse a tokenizer whose vocabulary is not the model's."""
    check(tokenizer.vocab_size == model.config.vocab_size, f"{folder}: the tokenizer has "
          f"{tokenizer.vocab_size} tokens, config.json says {model.config.vocab_size}; "
          "the folder mixes files of two models")


# ---- command line -------------------------------------------------------------------------------

@dataclass(frozen=True)
class SampleConfig:
    """Options of `python -m minirlhf.gpt2`."""
    model: str = "checkpoints/tiny"     # checkpoint folder, or gpt2, gpt2-medium, ... to download
    prompt: str = "Prompt: What is the capital of France?\nResponse:"    # text; \n: new line
    max_new_tokens: int = 40            # longest continuation, tokens
    temperature: float = 1.0            # below 1 sharpens the distribution, above 1 flattens it
    top_k: int = 0                      # sample among the k likeliest tokens; 0: all
    top_p: float = 1.0                  # sample among the likeliest tokens holding this mass
    greedy: bool = False                # always take the likeliest token
    seed: int = 0                       # the same seed repeats the sample
    selfcheck: bool = False             # verify GPT-2 124M's known greedy continuation and stop

    def __post_init__(self):
        check_range(self, "max_new_tokens", 1, 100_000)
        check_range(self, "temperature", 1e-3, 100)
        check_range(self, "top_k", 0, 10**9)
        check_range(self, "top_p", 1e-6, 1)


# "Alan Turing theorized that computers would one day become" -> " the most powerful machines on the
# planet.", the greedy continuation of the published 124M weights
KNOWN_PROMPT = [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
KNOWN_END = 50256
KNOWN_CONTINUATION = [262, 749, 3665, 8217, 319, 262, 5440, 13]


def stream(model: GPT2, prompt: list[int], cfg: SampleConfig, end_token: int) -> Iterator[int]:
    """Yield the tokens that `generate` would make, one by one, as they are sampled."""
    check_prompts(model, [prompt], cfg.max_new_tokens, end_token)
    generator = random_stream(cfg.seed)
    cache = KVCache(model.config, torch.tensor([len(prompt)]), len(prompt) + cfg.max_new_tokens,
                    model.wte.weight)
    new = torch.tensor([prompt])                                         # (1, T)
    for _ in range(cfg.max_new_tokens):
        with torch.no_grad():
            last = model.hidden(new, cache)[:, -1]                       # (1, C)
            logprobs = next_logprobs(model, last, cfg.temperature, cfg.top_k, cfg.top_p)   # (1, V)
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        token = logprobs.argmax(dim=1) if cfg.greedy else sample(logprobs, uniform)        # (1,)
        if token.item() == end_token:
            return
        yield token.item()
        new = token[:, None]                                             # (1, 1)


def selfcheck(model: GPT2, name: str) -> None:
    """Compare the greedy continuation of KNOWN_PROMPT with that of the published 124M weights."""
    check(model.config == GPT2Config(), f"selfcheck: {name} is no GPT-2 of 124M parameters; "
          "the known continuation is that of: python -m minirlhf.gpt2 --model gpt2 --selfcheck")
    made = generate(model, [KNOWN_PROMPT], len(KNOWN_CONTINUATION), end_token=KNOWN_END,
                    greedy=True)
    tokens = made.ids[0, len(KNOWN_PROMPT):].tolist()
    check(tokens == KNOWN_CONTINUATION, f"selfcheck: {name} continues greedily with {tokens}, the "
          f"published 124M weights with {KNOWN_CONTINUATION}; these are other weights")
    print("selfcheck passed: the greedy continuation is that of the published 124M weights")


def main(cfg: SampleConfig) -> str:
    """Write a continuation to the terminal as it is sampled; return it."""
    from minirlhf.data import Tokenizer                  # here: the network itself needs no text

    folder = find_folder(cfg.model)
    model = GPT2.from_pretrained(folder)
    if cfg.selfcheck:
        selfcheck(model, cfg.model)
        return ""
    tokenizer = Tokenizer.load(folder)
    check_tokenizer(model, tokenizer, folder)
    prompt = cfg.prompt.replace("\\n", "\n")            # shells pass the two characters on
    print(prompt, end="", flush=True)
    tokens, shown, text = [], "", ""
    ids = [tokenizer.end_token] + tokenizer.encode(prompt)
    for token in stream(model, ids, cfg, tokenizer.end_token):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):                  # hold back half of a multi-byte character
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(text[len(shown):])
    return text


if __name__ == "__main__":
    run(main, SampleConfig)
