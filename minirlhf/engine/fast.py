"""Fast twins of plain formulas: the same numbers up to rounding, in less time or memory.

Nothing here needs to be read to follow the three stages. Each twin has a plain form, and a test
compares the two, values and gradients:

    linear            F.linear
    addmm             torch.addmm
    action_logprobs   gpt2.action_logprobs
    by_length         the call of the network that it is given

Which product is taken is a rule, not a measurement, so that a run that goes on on the same machine
takes the same one: oneDNN's on AMD's processors, where the library behind F.linear takes up to
twice as long, and PyTorch's own on all others. The variable MINIRLHF_PRODUCTS (onednn, stock)
overrules it. Within `packed` weights are laid out once for many products with few rows.

Imports nothing of ours.
"""

import contextlib
import os
import platform

import torch
import torch.nn.functional as F

# Below these F.linear is as fast or faster.
FEWEST_ROWS, SMALLEST_WEIGHT = 2, 1 << 18
# The operators behind torch.compile's linear layers; some builds of PyTorch lack them.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKING = ONEDNN and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


# ---- matrix products -----------------------------------------------------------------------------

def cpu_vendor() -> str:
    """The maker of the processor as the system names it: "AuthenticAMD", "GenuineIntel", ..."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii",
                                            errors="replace") as file:
        for line in file:
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def choose_products(variable: str, vendor: str) -> str:
    """Which products are taken: "onednn" or "stock".

    Raises: ValueError for another value of the variable MINIRLHF_PRODUCTS.
    """
    if variable not in ("", "onednn", "stock"):
        raise ValueError(f"MINIRLHF_PRODUCTS is {variable!r}, expected onednn or stock")
    default = "onednn" if "AMD" in vendor else "stock"
    return (variable or default) if ONEDNN else "stock"


PRODUCTS = choose_products(os.environ.get("MINIRLHF_PRODUCTS", ""), cpu_vendor())
LAID_OUT: dict[int, torch.Tensor] = {}       # within `packed`: id of a weight -> its packed copy


def describe_products(networks: torch.nn.Module) -> str:
    """A line about the products of these networks, "" where all of them are too small."""
    if not any(p.numel() >= SMALLEST_WEIGHT and p.dim() == 2 and p.device.type == "cpu"
               for p in networks.parameters()):
        return ""
    name = {"onednn": "oneDNN's", "stock": "PyTorch's own"}[PRODUCTS]
    return f"large matrix products: {name} (MINIRLHF_PRODUCTS overrules it)\n"


def is_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (N, in) times `weight` is a product that oneDNN can compute, and large enough."""
    return (x.dim() == 2 and x.device.type == "cpu" and x.dtype == torch.float32
            and len(x) >= FEWEST_ROWS and weight.numel() >= SMALLEST_WEIGHT
            and not torch.is_autocast_enabled("cpu"))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear`: x (..., in), weight (out, in) -> (..., out); the twin serves without gradient."""
    if torch.is_grad_enabled() or not is_large(x, weight):
        return F.linear(x, weight, bias)
    laid_out = LAID_OUT.get(id(weight))
    if laid_out is None and PRODUCTS == "stock":
        return F.linear(x, weight, bias)
    weight = weight if laid_out is None else laid_out
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def addmm(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`torch.addmm`, bias + x @ weight: bias (out,), x (N, in), weight (in, out) -> (N, out)."""
    laid_out = LAID_OUT.get(id(weight))
    if laid_out is not None and len(x) >= FEWEST_ROWS and not torch.is_grad_enabled():
        x, bias = x.to(laid_out.dtype), bias.to(laid_out.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")
    if PRODUCTS == "stock" or not is_large(x, weight):
        return torch.addmm(bias, x, weight)
    return Addmm.apply(bias, x, weight)


class Addmm(torch.autograd.Function):
    """`addmm` with gradients, all three products by `linear`."""

    @staticmethod
    def forward(ctx, bias, x, weight):
        """bias (out,), x (N, in), weight (in, out) -> (N, out)."""
        ctx.save_for_backward(x, weight)
        return linear(x, weight.T, bias)                                 # (N, out)

    @staticmethod
    def backward(ctx, grad):
        """grad (N, out) -> gradients of bias, x and weight."""
        x, weight = ctx.saved_tensors
        return grad.sum(dim=0), linear(grad, weight), linear(x.T, grad.T)


@contextlib.contextmanager
def packed(network: torch.nn.Module, unembedding: torch.Tensor, rows: int):
    """Within it the large weights of a GPT-2 are laid out once for products with `rows` rows.

    Without, each product lays its weight out anew: in a decoding step that is most of the work. The
    copies take as much memory as the weights, in bfloat16 half of it; they are dropped at the end.
    Weights must not change within. Where the operator is missing, or nothing is large, nothing
    happens.
    """
    weights = {id(module.weight): module.weight.T for module in network.modules()
               if type(module).__name__ == "Conv1D"}     # stored (in, out)
    weights[id(unembedding)] = unembedding
    half = torch.is_autocast_enabled("cpu")              # then the logits alone are in float32
    try:
        for key, weight in weights.items() if PACKING and rows >= FEWEST_ROWS else ():
            if (weight.numel() >= SMALLEST_WEIGHT and weight.dtype == torch.float32
                    and weight.device.type == "cpu"):
                dtype = torch.bfloat16 if half and key != id(unembedding) else torch.float32
                weight = weight.detach().to(dtype)
                LAID_OUT[key] = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        yield
    finally:
        LAID_OUT.clear()


# ---- padding -------------------------------------------------------------------------------------

GROUP = 16                      # rows; smaller products are slower than the padding they save


def by_length(network, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`network(ids)`, (B, T), in groups of rows that are about equally long.

    ids (B, T), lengths (B,); in the padding the numbers mean nothing. In a batch of comparisons of
    the text world four tokens of ten are padding. A GPU computes one large batch faster than
    several small ones.
    """
    if ids.device.type != "cpu" or len(ids) < 2 * GROUP:
        return network(ids)
    order, results = lengths.argsort(), []                               # (B,)
    for rows in order.split(GROUP):
        longest = int(lengths[rows[-1]])
        numbers = network(ids[rows, :longest])                           # (GROUP, longest)
        results.append(F.pad(numbers, (0, ids.shape[1] - longest)))      # (GROUP, T)
    return torch.cat(results)[order.argsort()]                           # (B, T)


# ---- log-probabilities of actions ----------------------------------------------------------------

def action_logprobs(behaviour_logprobs, states: torch.Tensor, unembedding: torch.Tensor,
                    actions: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`gpt2.action_logprobs` in a fraction of the memory; the entropy has no gradient.

    It is given gpt2's `behaviour_logprobs`, so that there is only one of them.
    """
    return ActionLogprobs.apply(behaviour_logprobs, states, unembedding, actions, temperature)


class ActionLogprobs(torch.autograd.Function):
    """`action_logprobs` with one (N, V) tensor; the plain form has up to five at a time.

    For GPT-2's vocabulary these tensors are the largest of all, and most of the time goes into
    moving them. So logits, probabilities and gradient take turns in one tensor, which log-softmax
    passes through in blocks of a few rows. The gradient of one log-probability with respect to the
    logits is (1 at the action, 0 elsewhere) - probabilities, over the temperature.
    """

    BLOCK = 1 << 20                     # numbers in a block: it stays in the processor's cache

    @staticmethod
    def forward(ctx, behaviour_logprobs, states, unembedding, actions, temperature):
        """states (N, C), unembedding (V, C), actions (N,) -> chosen (N,), entropy (N,), nats."""
        table = linear(states, unembedding)                              # (N, V) logits
        N, V = table.shape
        dtype = torch.promote_types(table.dtype, torch.float32)
        chosen = torch.empty(N, dtype=dtype, device=table.device)        # (N,)
        entropy = torch.empty(N, dtype=dtype, device=table.device)       # (N,)
        step = max(1, ActionLogprobs.BLOCK // V)
        for first in range(0, N, step):
            rows = slice(first, first + step)
            logprobs = behaviour_logprobs(table[rows], temperature)      # (step, V)
            chosen[rows] = logprobs.gather(1, actions[rows, None]).squeeze(1)
            probabilities = logprobs.exp()                               # (step, V)
            entropy[rows] = -(probabilities * logprobs).sum(dim=1)
            table[rows] = probabilities                                  # the logits are used up
        ctx.save_for_backward(states, unembedding, actions)
        ctx.table, ctx.temperature = table, temperature
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy

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
        return None, grad_states, grad_unembedding, None, None
