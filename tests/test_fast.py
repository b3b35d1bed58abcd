"""The fast twins of plain formulas: when they serve, their gradients, and the memory they save.

Random sizes and numbers are in test_properties.py.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf.engine import fast
from minirlhf.engine.training import random_stream
from minirlhf.generate import generate
from minirlhf.gpt2 import (
    GPT2,
    Conv1D,
    GPT2Config,
    ScalarModel,
    action_logprobs,
    behaviour_logprobs,
)

# ---- matrix products -----------------------------------------------------------------------------

needs_onednn = pytest.mark.skipif(not fast.ONEDNN, reason="this PyTorch has no oneDNN")
needs_packing = pytest.mark.skipif(not fast.PACKING, reason="this PyTorch cannot lay weights out")


@pytest.mark.parametrize("variable, vendor, onednn, expected", [
    ("", "AuthenticAMD", True, "onednn"), ("", "GenuineIntel", True, "stock"),
    ("", "", True, "stock"), ("", "AuthenticAMD", False, "stock"),
    ("stock", "AuthenticAMD", True, "stock"), ("onednn", "GenuineIntel", True, "onednn"),
    ("onednn", "GenuineIntel", False, "stock")])
def test_the_products_follow_from_the_processor_unless_the_variable_overrules_it(
        monkeypatch, variable, vendor, onednn, expected):
    monkeypatch.setattr(fast, "ONEDNN", onednn)
    assert fast.choose_products(variable, vendor) == expected


def test_another_value_of_the_variable_is_refused():
    with pytest.raises(ValueError, match="MINIRLHF_PRODUCTS is 'mkl', expected onednn or stock"):
        fast.choose_products("mkl", "AuthenticAMD")


@needs_onednn
@pytest.mark.parametrize("products", ["onednn", "stock"])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_a_product_without_gradient_is_the_plain_one(monkeypatch, rows, products):
    monkeypatch.setattr(fast, "PRODUCTS", products)
    weight, bias = torch.randn(600, 700), torch.randn(600)           # large enough for oneDNN
    x = torch.randn(rows, 700)
    expected = F.linear(x.double(), weight.double(), bias.double())
    for inner in (weight, weight.T.contiguous().T):      # as the unembedding lies, and as Conv1D's
        with torch.no_grad():
            y = fast.linear(x, inner, bias)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_large_layers_have_the_gradients_of_plain_ones(monkeypatch):
    torch.manual_seed(0)
    layer, x = Conv1D(512, 1536, std=0.02), torch.randn(2, 30, 512)
    results = []
    for products in ("onednn", "stock"):
        monkeypatch.setattr(fast, "PRODUCTS", products)
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        product = y.grad_fn.next_functions[0][0]         # torch.addmm's own is AddmmBackward0
        assert (product.name() == "AddmmBackward") == (products == "onednn")
        (y ** 2).sum().backward()
        results.append((y.detach(), given.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


class CallWatch(TorchDispatchMode):
    """The names of all operators that are called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.calls.append(str(function))
        return function(*arguments, **(options or {}))

    def count(self) -> int:
        return sum("_linear_pointwise" in call for call in self.calls)


def takes_onednn(*shape: int, grad: bool = False, half: bool = False, dtype=torch.float32) -> bool:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(600, shape[-1], dtype=dtype)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    with torch.set_grad_enabled(grad), autocast, CallWatch() as watch:
        fast.linear(x, weight)
    return watch.count() > 0


@needs_onednn
def test_only_large_products_of_several_rows_without_gradient_take_the_other_way(monkeypatch):
    monkeypatch.setattr(fast, "PRODUCTS", "onednn")
    assert takes_onednn(8, 700)
    assert not takes_onednn(8, 700, grad=True) and not takes_onednn(1, 700)
    assert not takes_onednn(8, 70) and not takes_onednn(2, 4, 700)
    assert not takes_onednn(8, 700, half=True) and not takes_onednn(8, 700, dtype=torch.float64)
    monkeypatch.setattr(fast, "PRODUCTS", "stock")
    assert not takes_onednn(8, 700)


# ---- weights laid out once -----------------------------------------------------------------------

WIDE = GPT2Config(vocab_size=700, n_positions=16, n_embd=384, n_layer=1, n_head=2)


@needs_packing
@pytest.mark.parametrize("products", ["onednn", "stock"])
def test_packed_weights_give_the_plain_products_for_any_number_of_rows(monkeypatch, products):
    monkeypatch.setattr(fast, "PRODUCTS", products)
    torch.manual_seed(0)
    model = GPT2(WIDE).requires_grad_(False)
    large = [model.h[0].attn.c_attn, model.h[0].mlp.c_fc, model.h[0].mlp.c_proj]
    with torch.no_grad(), fast.packed(model, model.wte.weight, 8):
        assert set(fast.LAID_OUT) == {id(layer.weight) for layer in large} | {id(model.wte.weight)}
        for rows in (1, 2, 8, 50):
            for layer in large:
                x = torch.randn(rows, len(layer.weight))
                expected = x.double() @ layer.weight.double() + layer.bias.double()
                torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-5)
            x = torch.randn(rows, WIDE.n_embd)
            expected = x.double() @ model.wte.weight.double().T
            torch.testing.assert_close(model.logits(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert not fast.LAID_OUT


@needs_packing
def test_packed_weights_are_used_without_gradient_only_and_dropped_at_any_end():
    model, x = GPT2(WIDE), torch.randn(4, WIDE.n_embd)
    with pytest.raises(ZeroDivisionError), fast.packed(model, model.wte.weight, 4):
        with torch.no_grad(), CallWatch() as watch:
            model.h[0].mlp.c_fc(x)
        assert watch.count() == 1
        assert model.h[0].mlp.c_fc(x).requires_grad
        raise ZeroDivisionError
    assert not fast.LAID_OUT


def test_nothing_is_packed_for_one_row_a_small_network_or_another_precision():
    small, wide = GPT2(GPT2Config(11, 16, 12, 1, 3)), GPT2(WIDE)
    for model, rows in ((small, 8), (wide, 1), (GPT2(WIDE).double(), 8)):
        with fast.packed(model, model.wte.weight, rows):
            assert not fast.LAID_OUT


@needs_packing
def test_in_bfloat16_the_layers_are_packed_in_it_and_the_unembedding_in_float32():
    torch.manual_seed(0)
    model, x = GPT2(WIDE).requires_grad_(False), torch.randn(8, WIDE.n_embd)
    model.dtype = "bfloat16"
    layer = model.h[0].mlp.c_fc
    with torch.no_grad(), model.precision():
        plain, logits = layer(x), model.logits(x)
        with fast.packed(model, model.wte.weight, 8):
            assert fast.LAID_OUT[id(layer.weight)].dtype == torch.bfloat16
            packed = layer(x)
            assert packed.dtype == plain.dtype == torch.bfloat16
            torch.testing.assert_close(packed.float(), plain.float(), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(model.logits(x), logits, rtol=1e-5, atol=1e-5)


# ---- padding -------------------------------------------------------------------------------------

def test_groups_by_length_give_values_and_gradients_of_the_whole_batch():
    torch.manual_seed(0)
    model = ScalarModel(GPT2Config(50, 40, 16, 2, 2)).double()
    lengths = torch.randint(1, 41, (70,))                                           # (B,)
    lengths[3] = 40
    ids = torch.randint(0, 50, (70, 40))                                            # (B, T)
    real = torch.arange(40) < lengths[:, None]                                      # (B, T)
    results = []
    for numbers in (model(ids), fast.by_length(model, ids, lengths)):
        model.zero_grad()
        (torch.where(real, numbers, 0.0) ** 2).sum().backward()
        results.append((numbers[real], [p.grad.clone() for p in model.parameters()]))
    (plain, gradients), (grouped, same) = results
    torch.testing.assert_close(grouped, plain)
    for ours, theirs in zip(same, gradients):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("rows, passes", [(31, [(31, 9)]), (32, [(16, 2), (16, 9)])])
def test_a_small_batch_is_one_group_and_a_group_is_as_wide_as_its_longest(rows, passes):
    seen, lengths = [], torch.tensor([9] * 16 + [2] * (rows - 16))

    def network(ids):
        seen.append(tuple(ids.shape))
        return ids.float()

    ids = torch.randint(0, 9, (rows, 9))
    numbers = fast.by_length(network, ids, lengths)
    assert seen == passes and numbers.shape == ids.shape
    last = (lengths - 1)[:, None]
    assert torch.equal(numbers.gather(1, last), ids.gather(1, last).float())


def test_a_run_says_once_which_products_its_large_networks_take():
    assert fast.describe_products(GPT2(GPT2Config(11, 16, 12, 1, 3))) == ""
    sentence = fast.describe_products(GPT2(WIDE))
    assert {"onednn": "oneDNN's", "stock": "PyTorch's own"}[fast.PRODUCTS] in sentence
    assert "MINIRLHF_PRODUCTS" in sentence


@needs_packing
def test_packed_weights_sample_what_plain_ones_sample(monkeypatch):
    torch.manual_seed(0)
    model, prompts = GPT2(WIDE).requires_grad_(False), [[1, 2, 3], [4], [5, 6]]
    monkeypatch.setattr(fast, "PRODUCTS", "stock")
    results = []
    for packing in (True, False):
        monkeypatch.setattr(fast, "PACKING", packing)
        with CallWatch() as watch:
            results.append(generate(model, prompts, 6, end_token=0, generator=random_stream(0)))
        assert packing == (watch.count() > 6)            # a few in each pass
    assert torch.equal(results[0].ids, results[1].ids)
    torch.testing.assert_close(results[0].logprobs, results[1].logprobs, rtol=1e-4, atol=1e-4)


# ---- log-probabilities of actions ----------------------------------------------------------------

def lean_action_logprobs(*arguments):
    return fast.action_logprobs(behaviour_logprobs, *arguments)


class TableWatch(TorchDispatchMode):
    """Counts how many numbers of tensors with V columns are alive at once, at most."""

    def __init__(self, V: int):
        super().__init__()
        self.V, self.alive, self.most = V, {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and self.V in tensor.shape:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = weakref.ref(tensor), storage.nbytes() // 4
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items()
                      if ref() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def most_table_numbers(function, N: int, V: int) -> float:
    """The most (N, V) tables that are alive at once in forward and backward, in tables.

    The unembedding's own gradient, (V, C), is the same for both forms and is left out: C is small.
    """
    states = torch.randn(N, 2, requires_grad=True)
    unembedding = torch.randn(V, 2, requires_grad=True)
    actions = torch.randint(V, (N,))
    with TableWatch(V) as watch:
        chosen, _ = function(states, unembedding, actions, 0.7)
        chosen.sum().backward()
    return watch.most / (N * V)


def test_the_table_of_rows_and_vocabulary_never_exists_twice(monkeypatch):
    N, V = 64, 1000
    monkeypatch.setattr(fast.ActionLogprobs, "BLOCK", 2 * V)         # blocks of two rows
    assert most_table_numbers(action_logprobs, N, V) > 2
    assert most_table_numbers(lean_action_logprobs, N, V) < 1.3    # the table and its blocks


@pytest.mark.parametrize("block", [1, 70, 1 << 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_blocks_of_any_size_give_values_and_gradients_of_the_plain_form(monkeypatch, block,
                                                                        temperature):
    monkeypatch.setattr(fast.ActionLogprobs, "BLOCK", block)
    results = []
    for function in (action_logprobs, lean_action_logprobs):
        states = torch.randn(9, 4, dtype=torch.double, generator=random_stream(2)) * 3
        unembedding = torch.randn(30, 4, dtype=torch.double, generator=random_stream(3)) * 3
        states.requires_grad_(), unembedding.requires_grad_()
        actions = torch.randint(30, (9,), generator=random_stream(4))
        chosen, entropy = function(states, unembedding, actions, temperature)
        weights = torch.randn(9, dtype=torch.double, generator=random_stream(5))
        (chosen * weights).sum().backward()
        results.append((chosen.detach(), entropy.detach(), states.grad, unembedding.grad))
    for plain, lean in zip(*results):
        torch.testing.assert_close(plain, lean, rtol=1e-10, atol=1e-12)


def test_a_second_backward_is_refused_for_the_table_is_used_up():
    states, unembedding = torch.randn(3, 2, requires_grad=True), torch.randn(5, 2)
    chosen, entropy = lean_action_logprobs(states, unembedding, torch.tensor([0, 1, 4]), 1.0)
    assert not entropy.requires_grad
    chosen.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="backward was called twice"):
        chosen.sum().backward()
