"""Sampling: responses from a GPT-2, token by token, with a cache of keys and values.

    python -m minirlhf.generate --model checkpoints/tiny --prompt "What is the capital of France?"

The distribution that a token is drawn from is `gpt2.behaviour_logprobs`, the one that scores it.

Shapes: B sequences, T tokens in the padded row, C channels, V vocabulary, nh heads, hs head size;
R of the B rows are still being continued, N is max_new_tokens.
Lecture: lectures/01-gpt2.md, "From log-probabilities to tokens".
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minirlhf.data import pad
from minirlhf.engine import fast
from minirlhf.engine.fields import Count, Mass, Natural, Positive, Seed, check_fields
from minirlhf.engine.options import check, one_sentence, parse_config, printable
from minirlhf.engine.training import check_finite, random_stream
from minirlhf.files.hub import find_folder
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, GPT2Config, behaviour_logprobs
from minirlhf.tokenizer import load_tokenizer

# ---- the cache -----------------------------------------------------------------------------------

class KVCache:
    """Keys and values of every layer, so that a new token costs one column, not the whole row.

    The first pass stores the right-padded prompts, each later pass one token of every row in the
    next column. So a short prompt has padding between itself and its response: `visible` hides
    it, and `lengths` knows the tokens' true positions.

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
        """Start a pass of T new tokens per row; returns their positions: (T,), later (B, 1)."""
        self.new = slice(self.filled, self.filled + T)
        self.filled += T
        if self.new.start == 0:
            return torch.arange(T, device=self.real.device)              # (T,)
        self.visible = self.real[..., :self.filled]                      # (B, 1, 1, columns)
        self.lengths = self.lengths + 1                                  # (B,)
        return self.lengths[:, None] - 1                                 # (B, 1)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor,
               v: torch.Tensor) -> torch.Tensor:
        """Store the new k, v (B, nh, T, hs); q (B, nh, T, hs) looks at all of them so far."""
        self.keys[layer, :, :, self.new] = k
        self.values[layer, :, :, self.new] = v
        keys = self.keys[layer, :, :, :self.filled]                      # (B, nh, columns, hs)
        values = self.values[layer, :, :, :self.filled]                  # (B, nh, columns, hs)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.visible,
                                              is_causal=self.visible is None)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop finished rows; `rows` (B,) bool says which stay."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths, self.real = self.lengths[rows], self.real[rows]


# ---- from log-probabilities to tokens ------------------------------------------------------------

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
        beyond = ordered.cumsum(dim=1) - ordered >= top_p                # mass before it is enough
        logprobs = logprobs.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    return logprobs.log_softmax(dim=1)


def sample(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw one token per row by inverting the cumulative distribution. (B, V), (B,) -> (B,).

    One uniform number decides one token, so a row's sample does not depend on its neighbours.
    Example: probabilities .2 .5 .3 and a uniform of 0.6 give token 1, because .2 <= 0.6 < .7.
    """
    cumulative = logprobs.exp().cumsum(dim=1, dtype=uniforms.dtype)      # (B, V)
    target = uniforms[:, None] * cumulative[:, -1:]       # (B, 1)
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp(max=logprobs.shape[1] - 1)                       # (B,)


def next_logprobs(model: GPT2, last: torch.Tensor, temperature: float, top_k: int,
                  top_p: float) -> torch.Tensor:
    """Final hidden states (B, C) -> log-probabilities (B, V) of the next token, filtered."""
    logprobs = behaviour_logprobs(model.logits(last), temperature)       # (B, V)
    return filter_logprobs(logprobs, top_k, top_p) if top_k > 0 or top_p < 1.0 else logprobs


# ---- whole responses -----------------------------------------------------------------------------

@dataclass
class Generation:
    """What `generate` made. Per-token tensors follow the alignment law."""
    ids: torch.Tensor             # (B, T) prompt + response, right-padded with the end token
    prompt_lengths: torch.Tensor  # (B,)
    lengths: torch.Tensor         # (B,) prompt + response, the end token included where chosen
    ended: torch.Tensor           # (B,) bool: the end token was chosen
    logprobs: torch.Tensor        # (B, T-1) nats, of each response token when it was picked; else 0


def generate(model: GPT2, prompts: list[list[int]], max_new_tokens: int, *, end_token: int,
             generator: torch.Generator | None = None, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, greedy: bool = False, first_row: int = 0,
             where: str = "generate") -> Generation:
    """Continue every prompt until its end token or `max_new_tokens`, batched, with a KV cache.

    prompts: B lists of token ids. Every row uses its own `max_new_tokens` uniform numbers, drawn
    row after row at the start: the same generator state repeats the same sample, and a row's sample
    depends neither on its neighbours nor on when they end.
    `first_row` is the number of the first prompt among those of all processes; the numbers of the
    rows before it are drawn, too. Rows that ended leave the batch when they are a quarter or more.
    Raises: ValueError for an empty prompt, ids outside the vocabulary, or when prompt plus response
    exceed the context; FloatingPointError, saying `where`, when the model's output is not finite.
    """
    longest = check_prompts(model, prompts, max_new_tokens, end_token)
    check(temperature > 0, f"temperature is {temperature}, expected a value above 0")
    check(top_k >= 0 and 0 < top_p <= 1, f"top_k is {top_k} and top_p {top_p}, expected top_k at "
          "least 0, top_p above 0 and at most 1")
    B, device = len(prompts), model.wte.weight.device
    ids, prompt_lengths = pad(prompts, end_token, device)                # (B, longest), (B,)
    # careful: just below 1, float32 numbers are 6e-8 apart, more than many tokens' probability
    fine = torch.float32 if device.type == "mps" else torch.float64      # Apple's have no float64
    dtype = torch.promote_types(model.wte.weight.dtype, torch.float32)
    uniforms = torch.rand(first_row + B, max_new_tokens, generator=generator,
                          dtype=torch.float64)[first_row:].to(device, fine)             # (B, N)
    tokens = torch.full_like(uniforms, end_token, dtype=torch.long)      # (B, N) of the responses
    logprobs = torch.zeros_like(uniforms, dtype=dtype)                   # (B, N) of those tokens
    ended = torch.zeros(B, dtype=torch.bool, device=device)              # (B,)
    rows = torch.arange(B, device=device)                # (R,) the rows that are still computed
    with torch.no_grad(), model.precision(), fast.packed(model, model.wte.weight, B):
        cache = KVCache(model.config, prompt_lengths, longest + max_new_tokens, model.wte.weight)
        last = model.hidden(ids, cache)[rows, prompt_lengths - 1]        # (R, C)
        for step in range(max_new_tokens):
            choices = next_logprobs(model, last, temperature, top_k, top_p)             # (R, V)
            new = choices.argmax(dim=1) if greedy else sample(choices, uniforms[rows, step])
            tokens[rows, step] = new                                     # (R,)
            logprobs[rows, step] = choices.gather(1, new[:, None]).squeeze(1)
            ended[rows] = ended[rows] | (new == end_token)
            going = ~ended[rows]                                         # (R,) bool
            live = int(going.sum())
            if step + 1 == max_new_tokens or live == 0:
                break
            if live <= 0.75 * len(rows):
                cache.keep(going)
                rows, new = rows[going], new[going]
            last = model.hidden(new[:, None], cache)[:, 0]               # (R, C)
    # careful: until it left the batch, a row that had ended went on; nothing of that counts
    column = torch.arange(max_new_tokens, device=device)                 # (N,)
    first_end = torch.where(tokens == end_token, column, max_new_tokens).amin(dim=1)    # (B,)
    counts = torch.where(ended, first_end + 1, max_new_tokens)           # (B,) tokens of a response
    written = column < counts[:, None]                                   # (B, N)
    places = prompt_lengths[:, None] + column                            # (B, N) columns of ids
    ids = F.pad(ids, (0, max_new_tokens), value=end_token)               # (B, T)
    picked = torch.zeros(ids.shape, dtype=dtype, device=device)          # (B, T)
    ids = ids.scatter(1, places, torch.where(written, tokens, end_token))
    picked = picked.scatter(1, places - 1, torch.where(written, logprobs, 0.0))
    lengths = prompt_lengths + counts                                    # (B,)
    T = int(lengths.max())
    check_finite(where, sampled_logprobs=picked)
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


# ---- command line -------------------------------------------------------------------------------

@dataclass(frozen=True)
class SampleConfig:
    """Options of `python -m minirlhf.generate`."""
    model: str = "checkpoints/tiny"     # checkpoint folder, or gpt2, gpt2-medium, ... to download
    prompt: str = "Prompt: What is the capital of France?\nResponse:"    # \n: new line, \\n: \n
    max_new_tokens: Count = 40          # longest continuation, tokens
    temperature: Positive = 1.0         # below 1 sharpens the distribution, above 1 flattens it
    top_k: Natural = 0                  # sample among the k likeliest tokens; 0: all
    top_p: Mass = 1.0                   # sample among the likeliest tokens holding this mass
    greedy: bool = False                # always take the likeliest token
    seed: Seed = 0                      # the same seed repeats the sample
    selfcheck: bool = False             # verify GPT-2 124M's known greedy continuation and stop

    def __post_init__(self):
        check_fields(self)


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
          "the known continuation is that of: python -m minirlhf.generate --model gpt2 --selfcheck")
    made = generate(model, [KNOWN_PROMPT], len(KNOWN_CONTINUATION), end_token=KNOWN_END,
                    greedy=True)
    tokens = made.ids[0, len(KNOWN_PROMPT):].tolist()
    check(tokens == KNOWN_CONTINUATION, f"selfcheck: {name} continues greedily with {tokens}, the "
          f"published 124M weights with {KNOWN_CONTINUATION}; these are other weights")
    print("selfcheck passed: the greedy continuation is that of the published 124M weights")


def main(cfg: SampleConfig) -> str:
    """Write a continuation to the terminal as it is sampled; return it."""
    folder = find_folder(cfg.model)
    model = load_network(GPT2, folder)
    if cfg.selfcheck:
        selfcheck(model, cfg.model)
        return ""
    tokenizer = load_tokenizer(folder, model)
    # shells pass \n on as two characters: a new line; \\n is a backslash and an n
    prompt = cfg.prompt.replace("\\\\n", "\0").replace("\\n", "\n").replace("\0", "\\n")
    if prompt != prompt.rstrip():
        print("the prompt ends in white space, which GPT-2 writes in front of the next word",
              file=sys.stderr)
    print(printable(prompt), end="", flush=True)
    tokens, shown, text = [], "", ""
    ids = [tokenizer.end_token] + tokenizer.encode(prompt)
    for token in stream(model, ids, cfg, tokenizer.end_token):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):                  # hold back half of a multi-byte character
            print(printable(text[len(shown):]), end="", flush=True)
            shown = text
    print(printable(text[len(shown):]))
    return text


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(SampleConfig))
