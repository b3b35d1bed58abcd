"""training.py: random streams, order of rows, masked statistics, learning rates, optimiser steps.

That nothing outside the mask changes a mean or a whitened tensor is in test_properties.py.
"""

import math

import pytest
import torch
from helpers import grad_norm_of

from minirlhf.engine import parallel
from minirlhf.engine.training import (
    batch_order,
    check_finite,
    check_frozen,
    clip_gradients,
    learning_rate,
    masked_mean,
    optimiser_step,
    random_stream,
    set_learning_rate,
    whiten,
)

# ---- randomness ----------------------------------------------------------------------------------

def test_random_streams_have_the_values_that_they_always_had():
    draws = [torch.randint(10**6, (1,), generator=random_stream(*name)).item()
             for name in [(0,), (0, 1), (1, 0), (5, 2, 7)]]
    assert draws == [136044, 198065, 808614, 583163]


def test_a_stream_depends_on_seed_and_counters_only():
    torch.manual_seed(1)
    first = torch.rand(5, generator=random_stream(3, 4))
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, torch.rand(5, generator=random_stream(3, 4)))


def test_no_two_streams_of_a_run_are_the_same():
    names = [(seed, stage, iteration, *epoch) for seed in (0, 1, 7) for stage in range(3)
             for iteration in range(150) for epoch in ((), (0,), (1,), (2,), (3,))]
    names += [(seed, step) for seed in (0, 1, 7) for step in range(3000)]
    used_bits = [random_stream(*name).initial_seed() % 2**32 for name in names]
    assert len(set(used_bits)) == len(names)


@pytest.mark.parametrize("seed", [-1, -10**30, 10**30, 2**63])
def test_any_integer_is_a_seed(seed):
    assert 0 <= torch.rand(1, generator=random_stream(seed, 1)).item() < 1


# ---- order of rows -------------------------------------------------------------------------------

def test_batches_of_the_docstring():
    batches = [batch_order(10, 4, 0, step) for step in range(4)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4]


@pytest.mark.parametrize("total, batch_size", [(10, 4), (12, 4), (3, 8), (5, 1), (7, 7)])
def test_every_row_comes_once_in_each_epoch_in_another_order(total, batch_size):
    steps, orders = math.ceil(total / batch_size), []
    for epoch in range(4):
        rows = [batch_order(total, batch_size, 5, epoch * steps + i) for i in range(steps)]
        orders.append([row for batch in rows for row in batch])
        assert sorted(orders[-1]) == list(range(total))
    assert total <= 3 or len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("total, batch_size", [(10, 4), (12, 4), (11, 10), (7, 7), (5, 1)])
def test_whole_batches_leave_the_rest_of_an_epoch_out_and_never_repeat_a_row_in_it(total,
                                                                                   batch_size):
    steps, left_out = total // batch_size, set()
    for epoch in range(30):
        rows = [batch_order(total, batch_size, 5, epoch * steps + i, True) for i in range(steps)]
        assert all(len(batch) == batch_size for batch in rows)
        used = [row for batch in rows for row in batch]
        assert len(set(used)) == steps * batch_size
        assert used == batch_order(total, total, 5, epoch)[:len(used)]
        left_out |= set(range(total)) - set(used)
    assert len(left_out) == (total if total % batch_size else 0)         # not always the same rows


def test_the_order_depends_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = batch_order(50, 8, 3, 20)
    torch.rand(7)
    assert batch_order(50, 8, 3, 20) == first
    assert batch_order(50, 8, 4, 20) != first


# ---- masked statistics ---------------------------------------------------------------------------

def test_masked_mean_of_the_docstring():
    mean = masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    assert mean.shape == () and mean.item() == 2


def test_masked_mean_divides_by_the_count_of_the_whole_step_when_it_is_given():
    x, mask = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0])
    assert masked_mean(x, mask, 4).item() == 1


def test_masked_mean_is_over_the_tensor_not_over_rows():
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 0.0, 0.0]])
    assert masked_mean(x, torch.tensor([[1, 1, 1], [1, 0, 0]])).item() == 4


def test_whiten_of_the_docstring():
    white = whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    assert white.tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


def test_a_single_entry_and_equal_entries_whiten_to_0():
    assert whiten(torch.tensor([[5.0, 7.0]]), torch.tensor([[1, 0]])).tolist() == [[0, 0]]
    assert whiten(torch.full((2, 3), 4.0), torch.ones(2, 3)).tolist() == [[0] * 3] * 2


def test_an_empty_mask_gives_nan_which_check_finite_stops():
    mean = masked_mean(torch.ones(2, 2), torch.zeros(2, 2).bool())
    with pytest.raises(FloatingPointError, match="pg_loss is not finite at step 3: nan;"):
        check_finite("step 3", pg_loss=mean)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_type_mean_the_same(kind):
    x, mask = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]).to(kind)
    assert masked_mean(x, mask) == 2
    assert whiten(x, mask).tolist() == pytest.approx([-1, 1, 0], abs=1e-6)


# ---- learning rates ------------------------------------------------------------------------------

def test_learning_rate_of_the_docstring():
    rates = [learning_rate(step, 10, 1.0, 2, "linear") for step in (0, 1, 2, 6)]
    assert rates == [0.5, 1, 1, 0.5]


@pytest.mark.parametrize("schedule, middle", [("linear", 0.5), ("cosine", 0.5), ("constant", 1)])
def test_every_schedule_starts_at_the_peak_and_ends_where_it_should(schedule, middle):
    assert learning_rate(0, 100, 2.0, 0, schedule) == 2
    assert learning_rate(50, 100, 2.0, 0, schedule) == pytest.approx(2 * middle)
    end = 2.0 if schedule == "constant" else 0.0
    for step in (100, 150):                          # and it does not come up again
        assert learning_rate(step, 100, 2.0, 0, schedule) == pytest.approx(end)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_rises_then_falls_and_is_never_0_on_a_step_that_is_made(schedule):
    rates = [learning_rate(step, 30, 1.0, 5, schedule) for step in range(30)]
    assert rates[:6] == [0.2, 0.4, 0.6, 0.8, 1, 1]
    assert all(later < earlier for earlier, later in zip(rates[5:], rates[6:]))
    assert rates[-1] > 0


def test_a_run_shorter_than_its_warm_up_never_divides_by_0():
    assert learning_rate(0, 1, 1.0, 1, "cosine") == 1
    assert learning_rate(2, 3, 1.0, 10, "linear") == pytest.approx(0.3)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'square', expected constant, linear or cosine"):
        learning_rate(0, 10, 1.0, 2, "square")


def test_each_group_of_parameters_has_a_rate_of_its_own_peak():
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "peak": 2.0},
                                 {"params": [layer.bias], "peak": 0.5}], lr=9.0)
    set_learning_rate(optimizer, 6, 10, 2, "linear")
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]


# ---- numbers that are not finite -----------------------------------------------------------------

def test_check_finite_names_tensor_value_place_and_index():
    check_finite("step 3", loss=torch.tensor([1.0, 2.0]))
    with pytest.raises(FloatingPointError, match=r"^scores is not .* 3, index \[1\]: nan;"):
        check_finite("iteration 3", scores=torch.tensor([0.0, math.nan]))
    with pytest.raises(FloatingPointError, match=r"at step 9, index \[1, 0\]: -inf;"):
        check_finite("step 9", values=torch.tensor([[0.0, 1.0], [-math.inf, math.nan]]))


def test_check_finite_names_the_first_bad_tensor_of_several():
    good, bad = torch.zeros(2), torch.tensor(math.inf)
    with pytest.raises(FloatingPointError, match="^values is not finite at here: inf;"):
        check_finite("here", logprobs=good, values=bad, loss=bad)


def test_check_finite_counts_rows_as_in_the_whole_batch():
    part = torch.tensor([[0.0, 0.0], [0.0, math.nan]])
    with pytest.raises(FloatingPointError, match=r"index \[7, 1\]: nan"):
        check_finite("here", torch.tensor([3, 7]), values=part)
    with pytest.raises(FloatingPointError, match="^loss is not finite at here: nan"):
        check_finite("here", torch.tensor([3, 7]), loss=part.sum())


# ---- gradients and steps -------------------------------------------------------------------------

def layer_with_gradients() -> torch.nn.Linear:
    """Nine gradients of 1: their norm is 3."""
    layer = torch.nn.Linear(2, 3)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 2), torch.ones(3)
    return layer


def test_gradients_are_clipped_together_and_the_norm_before_is_returned():
    layer = layer_with_gradients()
    assert clip_gradients(layer, 1.0, "step 4") == pytest.approx(3.0)
    assert grad_norm_of(layer.parameters()) == pytest.approx(1.0)
    assert clip_gradients(layer, 1.0, "step 5") == pytest.approx(1.0)
    assert torch.allclose(layer.bias.grad, torch.full((3,), 1 / 3))


def test_a_gradient_that_is_not_finite_is_named():
    layer = layer_with_gradients()
    layer.bias.grad[2] = math.inf
    with pytest.raises(FloatingPointError,
                       match=r"gradient of bias is not finite at step 4, index \[2\]: inf"):
        clip_gradients(layer, 1.0, "step 4")
    layer.bias.grad = torch.full((3,), 1e38)             # each is finite, their norm is not
    layer.weight.grad = torch.full((3, 2), 3e38)
    with pytest.raises(FloatingPointError, match="gradient norm overflows at step 4"):
        clip_gradients(layer, 1.0, "step 4")


def test_an_optimiser_step_adds_up_then_clips_then_moves(monkeypatch):
    """As if a second process had the same gradients: the norm is that of the sum."""
    def double(parameters):
        for parameter in parameters:
            parameter.grad *= 2

    monkeypatch.setattr(parallel, "add_gradients", double)
    layer = layer_with_gradients()
    before = layer.bias.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    assert optimiser_step(layer, optimizer, 3.0, "here") == pytest.approx(6.0)
    assert torch.allclose(layer.bias, before - 0.5 * 1.0)            # 2 per entry, clipped to 1


def test_an_optimiser_step_that_would_not_be_finite_is_not_made():
    layer = layer_with_gradients()
    layer.weight.grad[0, 0] = math.nan
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    with pytest.raises(FloatingPointError, match="gradient of weight is not finite at here"):
        optimiser_step(layer, torch.optim.SGD(layer.parameters(), lr=0.5), 3.0, "here")
    assert all(torch.equal(one, other) for one, other in zip(before, layer.parameters()))


def test_a_gradient_in_a_frozen_network_is_named():
    frozen, trained = torch.nn.Linear(2, 3), layer_with_gradients()
    check_frozen(frozen)
    with pytest.raises(AssertionError, match="a frozen network received a gradient: weight"):
        check_frozen(frozen, trained)
