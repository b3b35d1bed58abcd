"""The mathematics under random shapes, masks and extreme values: what must hold for every input.

    MINIRLHF_PROPERTIES=2000 python -m pytest -s tests/test_properties.py

draws as many cases for each property (without the variable fewer) and prints their number. Each
case has its own seed, so a failure repeats. The references here are slow, in Python's own numbers.
"""

import math
import os
import random

import pytest
import torch

from minirlhf.data import response_mask
from minirlhf.engine import fast
from minirlhf.engine.training import learning_rate, masked_mean, whiten
from minirlhf.generate import filter_logprobs, sample
from minirlhf.gpt2 import behaviour_logprobs, token_logprobs
from minirlhf.ppo import gae, policy_loss, shaped_rewards, value_loss
from minirlhf.reward_model import accuracy, bradley_terry_loss, calibration_error
from minirlhf.rewards import adapt_kl_coef
from minirlhf.sft import sft_loss

CASES = int(os.environ.get("MINIRLHF_PROPERTIES", "40"))
JUNK = [1e30, -1e30, math.inf, -math.inf, math.nan]
drawn = {"cases": 0}


@pytest.fixture(scope="module", autouse=True)
def count_of_cases():
    yield
    print(f"\nproperties: {drawn['cases']} random cases")


# ---- random cases --------------------------------------------------------------------------------

def cases(count: int = CASES):
    """Random generators, one a case; the number of the case is its seed."""
    for number in range(count):
        drawn["cases"] += 1
        yield random.Random(number)


def draw(rng: random.Random, *shape, scale: float = 1.0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(62))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def rollout_mask(rng: random.Random) -> torch.Tensor:
    """A mask as rollouts have it, (B, T-1): prompt, response of at least one token, padding."""
    B, T = rng.randint(1, 6), rng.randint(2, 12)
    prompts = [rng.randint(1, T - 1) for _ in range(B)]
    lengths = [rng.randint(prompt + 1, T) for prompt in prompts]
    return response_mask(torch.tensor(prompts), torch.tensor(lengths), T)


def any_mask(rng: random.Random) -> torch.Tensor:
    """Any mask with one entry at least: gaps, and rows that are masked out whole."""
    mask = torch.rand(rng.randint(1, 6), rng.randint(1, 12),
                      generator=torch.Generator().manual_seed(rng.getrandbits(62))) < rng.random()
    mask[rng.randrange(mask.shape[0]), rng.randrange(mask.shape[1])] = True
    return mask


def with_junk(rng: random.Random, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`x` with something else where the mask is 0, another junk at every entry."""
    junk = torch.tensor([rng.choice(JUNK) for _ in range(x.numel())]).reshape(x.shape)
    return torch.where(mask, x, junk.to(x.dtype))


class Case:
    """A mask with random tensors for every formula that takes one."""

    def __init__(self, rng: random.Random, mask: torch.Tensor, dtype=torch.float64):
        self.mask, self.rng = mask, rng
        self.a, self.b, self.c = draw(rng, 3, *mask.shape, dtype=dtype)
        self.scores = draw(rng, len(mask), scale=rng.choice([1, 100]), dtype=dtype)
        self.kl_coef, self.cliprange = rng.random(), rng.choice([0.0, 0.1, 0.2, 0.9])
        self.gamma, self.lam = rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.7, 1.0])

    def changed(self, function) -> "Case":
        """The same case with `function` applied to each per-token tensor and the mask."""
        other = object.__new__(Case)
        other.__dict__.update(self.__dict__)
        other.a, other.b, other.c = function(self.a), function(self.b), function(self.c)
        other.mask = function(self.mask)
        return other

    def with_junk(self) -> "Case":
        """The same case with junk outside the mask."""
        other = self.changed(torch.clone)
        other.a, other.b, other.c = [with_junk(self.rng, x, self.mask)
                                     for x in (self.a, self.b, self.c)]
        return other


def run_masked_mean(x: Case):
    return [masked_mean(x.a, x.mask)]


def run_whiten(x: Case):
    return [whiten(x.a, x.mask)]


def run_shaped_rewards(x: Case):
    return [shaped_rewards(x.scores, x.a, x.mask, x.kl_coef)]


def run_gae(x: Case):
    return list(gae(x.a, x.b, x.mask, x.gamma, x.lam))


def run_policy_loss(x: Case):
    return [policy_loss(x.a, x.b, x.c, x.mask, x.cliprange)[0]]


def run_value_loss(x: Case):
    return [value_loss(x.a, x.b, x.c, x.mask, x.cliprange)]


def run_sft_loss(x: Case):
    return [sft_loss(x.a, x.mask, int(x.mask.sum()))]


PER_TOKEN = [run_whiten, run_shaped_rewards, run_gae]
LOSSES = [run_masked_mean, run_policy_loss, run_value_loss, run_sft_loss]


def assert_equal(results: list, expected: list, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# ---- what is outside the mask --------------------------------------------------------------------

@pytest.mark.parametrize("formula", PER_TOKEN + LOSSES)
def test_nothing_outside_the_mask_changes_anything(formula):
    for rng in cases():
        x = Case(rng, rollout_mask(rng), rng.choice([torch.float32, torch.float64]))
        y = x.with_junk()
        assert_equal(formula(y), formula(x), 0, 0)
        for result in formula(y):
            if result.dim() == 2:
                assert (result[~x.mask] == 0).all() and result.isfinite().all()


@pytest.mark.parametrize("formula", [
    run_masked_mean, run_policy_loss, run_sft_loss,
    run_value_loss])
def test_nothing_outside_the_mask_changes_a_gradient_or_gets_one(formula):
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        y = x.with_junk()
        for case in (x, y):
            case.a.requires_grad_()
            formula(case)[0].backward()
        assert torch.equal(x.a.grad, y.a.grad)
        assert (x.a.grad[~x.mask] == 0).all() and x.a.grad.isfinite().all()


@pytest.mark.parametrize("formula", PER_TOKEN + LOSSES)
def test_padding_on_either_side_changes_nothing(formula):
    """More prompt in front (state columns before the response) or more padding after it."""
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        front, after = rng.randint(0, 3), rng.randint(0, 3)


        def widen(t: torch.Tensor, rng=rng, front=front, after=after) -> torch.Tensor:
            fill = False if t.dtype == torch.bool else rng.choice(JUNK)
            return torch.nn.functional.pad(t, (front, after), value=fill)

        for result, expected in zip(formula(x.changed(widen)), formula(x)):
            if expected.dim() == 2:
                expected = torch.nn.functional.pad(expected, (front, after))
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("formula", PER_TOKEN + LOSSES)
def test_the_order_of_rows_does_not_matter(formula):
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        order = torch.tensor(rng.sample(range(len(x.mask)), len(x.mask)))
        y = x.changed(lambda t, order=order: t[order])
        y.scores = x.scores[order]
        assert_equal(formula(y), [r[order] if r.dim() == 2 else r for r in formula(x)])


@pytest.mark.parametrize("formula", PER_TOKEN + LOSSES)
def test_rows_that_are_masked_out_whole_change_nothing(formula):
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        rows = rng.randint(1, 3)

        def add_rows(t: torch.Tensor, rng=rng, rows=rows) -> torch.Tensor:
            fill = False if t.dtype == torch.bool else rng.choice(JUNK)
            return torch.cat([t, torch.full((rows, t.shape[1]), fill, dtype=t.dtype)])

        y = x.changed(add_rows)
        y.scores = torch.cat([x.scores, torch.full((rows,), 7.0, dtype=x.scores.dtype)])
        for result, expected in zip(formula(y), formula(x)):
            if expected.dim() == 2:
                assert (result[len(x.mask):] == 0).all()
                result = result[:len(x.mask)]
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("formula", [run_shaped_rewards, run_gae])
def test_a_row_alone_equals_the_row_in_its_batch(formula):
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        row = rng.randrange(len(x.mask))
        y = x.changed(lambda t, row=row: t[row:row + 1])
        y.scores = x.scores[row:row + 1]
        assert_equal(formula(y), [result[row:row + 1] for result in formula(x)], 0, 0)


@pytest.mark.parametrize("formula", PER_TOKEN + LOSSES)
def test_float32_agrees_with_float64(formula):
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        y = x.changed(lambda t: t if t.dtype == torch.bool else t.float())
        y.scores = x.scores.float()
        results = formula(y)
        assert all(result.dtype == torch.float32 for result in results)
        assert_equal([result.double() for result in results], formula(x), 1e-4, 1e-3)


def test_losses_of_parts_with_the_count_of_the_whole_add_up_with_their_gradients():
    """As `--accumulation` and several processes compute them; a part may hold no token at all."""
    for rng in cases():
        x = Case(rng, any_mask(rng))
        count, cut = int(x.mask.sum()), rng.randint(0, len(x.mask))
        rows = [slice(0, cut), slice(cut, None)]
        for loss in (run_masked_mean, run_policy_loss, run_value_loss):
            parts, whole = x.a.clone().requires_grad_(), x.changed(torch.clone)
            whole.a.requires_grad_()
            loss(whole)[0].backward()
            for part in rows:
                a, b, c, mask = parts[part], x.b[part], x.c[part], x.mask[part]
                if loss is run_masked_mean:
                    masked_mean(a, mask, count).backward()
                elif loss is run_policy_loss:
                    policy_loss(a, b, c, mask, x.cliprange, count)[0].backward()
                else:
                    value_loss(a, b, c, mask, x.cliprange, count).backward()
            torch.testing.assert_close(parts.grad, whole.a.grad, rtol=1e-9, atol=1e-12)


# ---- masked mean, whitening ----------------------------------------------------------------------

def test_masked_mean_and_whitening_equal_plain_python():
    for rng in cases():
        mask = any_mask(rng)
        x = draw(rng, *mask.shape, scale=rng.choice([1e-3, 1, 1e3]))
        values = x[mask].tolist()
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-8)
        assert masked_mean(x, mask).item() == pytest.approx(mean, rel=1e-9, abs=1e-12)
        expected = [(value - mean) / deviation for value in values]
        assert whiten(x, mask)[mask].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_whitening_forgets_shift_and_scale():
    """As far as its 1e-8 and the numbers of the type allow: scales from 1 to 1e15 in float32."""
    for rng in cases():
        mask = any_mask(rng)
        x = draw(rng, *mask.shape)
        scale, shift = 10 ** rng.uniform(0, 15), rng.uniform(-5, 5)
        if x[mask].std(unbiased=False) > 0.1:
            expected = whiten(x, mask)
            result = whiten(scale * (x + shift), mask)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
            result = whiten((scale * (x + shift)).float(), mask)
            torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


def test_whitened_numbers_have_mean_0_deviation_1_and_keep_their_order():
    for rng in cases():
        mask = any_mask(rng)
        x = draw(rng, *mask.shape, scale=10 ** rng.uniform(-1, 6))
        white = whiten(x, mask)
        values = white[mask]
        assert abs(values.mean().item()) < 1e-9
        if x[mask].std(unbiased=False) > 0.1:
            assert values.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(x[mask].argsort(stable=True), values.argsort(stable=True))


# ---- rewards and advantages ----------------------------------------------------------------------

def test_rewards_are_the_penalty_everywhere_and_the_score_once():
    for rng in cases():
        x = Case(rng, any_mask(rng))
        x.a = x.a * 10 ** rng.uniform(-3, 4)
        result = shaped_rewards(x.scores, x.a, x.mask, x.kl_coef)
        for row in range(len(x.mask)):
            columns = x.mask[row].nonzero()[:, 0].tolist()
            for column in range(x.mask.shape[1]):
                expected = -x.kl_coef * x.a[row, column].item() if column in columns else 0.0
                if columns and column == columns[-1]:
                    expected += x.scores[row].item()
                assert result[row, column].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def slow_advantages(rewards: list, values: list, gamma: float, lam: float) -> list[float]:
    """Equation 16 as it is written: a sum of discounted one-step errors."""
    deltas = [reward + gamma * later - value
              for reward, later, value in zip(rewards, values[1:] + [0.0], values)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))]


def test_advantages_equal_their_definition():
    for rng in cases():
        x = Case(rng, rollout_mask(rng))
        advantages, returns = gae(x.a, x.b, x.mask, x.gamma, x.lam)
        for row, mask in enumerate(x.mask):
            expected = slow_advantages(x.a[row][mask].tolist(), x.b[row][mask].tolist(), x.gamma,
                                       x.lam)
            assert advantages[row][mask].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert_equal([returns], [torch.where(x.mask, advantages + x.b, 0.0)])


def test_advantages_are_linear_and_perfect_values_give_none():
    for rng in cases():
        x, y = Case(rng, rollout_mask(rng)), rng.uniform(-3, 3)
        one, _ = gae(x.a, x.b, x.mask, x.gamma, x.lam)
        other, _ = gae(y * x.a, y * x.b, x.mask, x.gamma, x.lam)
        torch.testing.assert_close(other, y * one, rtol=1e-9, atol=1e-9)
        _, perfect = gae(x.a, torch.zeros_like(x.b), x.mask, x.gamma, 1.0)      # rewards to go
        none, _ = gae(x.a, perfect, x.mask, x.gamma, x.lam)
        torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-9)


def test_large_rewards_and_values_stay_finite():
    for rng in cases():
        mask = rollout_mask(rng)
        rewards = draw(rng, *mask.shape, scale=1e30, dtype=torch.float32)
        values = draw(rng, *mask.shape, scale=1e30, dtype=torch.float32)
        for result in gae(rewards, values, mask, 1.0, 1.0):
            assert result.isfinite().all()


# ---- the policy loss -----------------------------------------------------------------------------

def slow_policy_loss(new, old, advantages, cliprange):
    """The loss and its derivative by each new log-probability, token by token."""
    losses, slopes = [], []
    for logprob, old_logprob, advantage in zip(new, old, advantages):
        ratio = math.exp(logprob - old_logprob)
        clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
        losses.append(max(-ratio * advantage, -clipped * advantage))
        inside = 1 - cliprange < ratio < 1 + cliprange
        counts = inside or -ratio * advantage > -clipped * advantage
        slopes.append(-ratio * advantage / len(new) if counts else 0.0)
    return sum(losses) / len(losses), slopes


def test_policy_loss_and_gradient_equal_a_token_by_token_reference():
    for rng in cases():
        x = Case(rng, any_mask(rng))
        new = x.a.requires_grad_()
        loss, ratio = policy_loss(new, x.b, x.c, x.mask, x.cliprange)
        loss.backward()
        expected, slopes = slow_policy_loss(x.a[x.mask].tolist(), x.b[x.mask].tolist(),
                                            x.c[x.mask].tolist(), x.cliprange)
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        assert new.grad[x.mask].tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-12)
        assert_equal([ratio[x.mask]], [(x.a - x.b)[x.mask].exp()])


def test_policy_loss_needs_only_the_ratio_and_scales_with_the_advantages():
    for rng in cases():
        x, shift, scale = Case(rng, any_mask(rng)), rng.uniform(-9, 9), 10 ** rng.uniform(-6, 6)
        loss = run_policy_loss(x)[0]
        shifted, _ = policy_loss(x.a + shift, x.b + shift, x.c, x.mask, x.cliprange)
        torch.testing.assert_close(shifted, loss, rtol=1e-9, atol=1e-9)
        scaled, _ = policy_loss(x.a, x.b, scale * x.c, x.mask, x.cliprange)
        torch.testing.assert_close(scaled, scale * loss, rtol=1e-9, atol=1e-9)
        unclipped = masked_mean(-(x.a - x.b).exp() * x.c, x.mask)
        assert loss >= unclipped - 1e-12                 # the pessimistic one of two objectives


def test_every_ratio_that_sampling_can_give_has_a_finite_loss_and_gradient():
    """Uniform numbers are multiples of 2**-53, so no sampled token is rarer than exp(-37)."""
    for rng in cases():
        mask = any_mask(rng)
        old = -37 * torch.rand(mask.shape)
        new = (-10 ** rng.uniform(0, 5) * torch.rand(mask.shape) * (rng.random() < 0.7))
        advantages = draw(rng, *mask.shape, scale=3, dtype=torch.float32)
        new.requires_grad_()
        loss, _ = policy_loss(new, old, advantages, mask, 0.2)
        loss.backward()
        assert loss.isfinite() and new.grad.isfinite().all()


def test_a_ratio_that_overflows_is_clipped_without_a_gradient():
    """Advantage 1: the clipped objective counts, whose slope is 0 however large the ratio is."""
    new, mask = torch.tensor([[0.0, -1.0]]), torch.ones(1, 2) > 0
    old = torch.tensor([[-1000.0, -1.0]])
    new.requires_grad_()
    loss, _ = policy_loss(new, old, torch.ones(1, 2), mask, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-1.1) and new.grad.tolist() == [[0.0, -0.5]]


# ---- the value loss ------------------------------------------------------------------------------

def test_value_loss_equals_a_token_by_token_reference():
    for rng in cases():
        x = Case(rng, any_mask(rng))
        losses = []
        for value, old, target in zip(x.a[x.mask], x.b[x.mask], x.c[x.mask]):
            near = min(max(value, old - x.cliprange), old + x.cliprange)
            losses.append(0.5 * max((value - target) ** 2, (near - target) ** 2).item())
        assert run_value_loss(x)[0].item() == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_value_loss_is_at_least_the_squared_error_and_0_only_for_the_target():
    for rng in cases():
        x = Case(rng, any_mask(rng))
        loss = run_value_loss(x)[0]
        assert loss >= 0.5 * masked_mean((x.a - x.c) ** 2, x.mask) - 1e-12
        assert value_loss(x.c, x.c, x.c, x.mask, x.cliprange) == 0
        shift = rng.uniform(-1e3, 1e3)
        moved = value_loss(x.a + shift, x.b + shift, x.c + shift, x.mask, x.cliprange)
        torch.testing.assert_close(moved, loss, rtol=1e-6, atol=1e-9)


def test_value_gradients_are_finite_for_large_errors():
    for rng in cases():
        x = Case(rng, any_mask(rng), torch.float32)
        values = (1e15 * x.a).detach().requires_grad_()
        value_loss(values, x.b, -1e15 * x.c, x.mask, x.cliprange).backward()
        assert values.grad.isfinite().all()


# ---- SFT and reward-model losses -----------------------------------------------------------------

def test_sft_losses_of_parts_add_up_however_they_are_cut():
    for rng in cases():
        x = Case(rng, any_mask(rng))
        x.a, count, parts = -x.a.abs(), int(x.mask.sum()), []
        cuts = sorted(rng.sample(range(len(x.mask) + 1), rng.randint(0, len(x.mask))))
        for first, last in zip([0, *cuts], [*cuts, len(x.mask)]):
            parts.append(sft_loss(x.a[first:last], x.mask[first:last], count).item())
        whole = sft_loss(x.a, x.mask, count).item()
        assert sum(parts) == pytest.approx(whole, rel=1e-9, abs=1e-12)
        assert whole == pytest.approx(-sum(x.a[x.mask].tolist()) / count, rel=1e-9)


def test_bradley_terry_depends_on_differences_alone():
    for rng in cases():
        n, scale = rng.randint(1, 20), rng.choice([1, 100, 1e4])
        chosen, rejected = draw(rng, n, scale=scale), draw(rng, n, scale=scale)
        loss, shift = bradley_terry_loss(chosen, rejected), rng.uniform(-100, 100)
        order = torch.tensor(rng.sample(range(n), n))
        for other in (bradley_terry_loss(chosen + shift, rejected + shift),
                      bradley_terry_loss(chosen[order], rejected[order])):
            torch.testing.assert_close(other, loss, rtol=1e-9, atol=1e-9)
        swapped = bradley_terry_loss(rejected, chosen)
        difference = (rejected - chosen).mean()          # -log s(m) + log s(-m) == -m
        torch.testing.assert_close(loss - swapped, difference, rtol=1e-9, atol=1e-9)
        margins = (chosen - rejected).tolist()
        expected = [max(-m, 0) + math.log1p(math.exp(-abs(m))) for m in margins]
        assert loss.item() == pytest.approx(sum(expected) / n, rel=1e-9)


def test_bradley_terry_gradients_push_apart_and_never_harder_than_one():
    for rng in cases():
        n = rng.randint(1, 20)
        for dtype in (torch.float32, torch.float64):
            chosen = draw(rng, n, scale=rng.choice([1, 1e2, 1e4, 1e30]), dtype=dtype)
            rejected = draw(rng, n, scale=rng.choice([1, 1e2, 1e4]), dtype=dtype)
            chosen.requires_grad_(), rejected.requires_grad_()
            loss = bradley_terry_loss(chosen, rejected)
            loss.backward()
            assert loss.isfinite() and (chosen.grad <= 0).all() and (rejected.grad >= 0).all()
            assert torch.equal(chosen.grad, -rejected.grad)
            assert chosen.grad.abs().max() <= 1 / n + 1e-6


def slow_statistics(margins: list[float], bins: int) -> tuple[float, float]:
    """Accuracy and calibration error, one comparison at a time."""
    choices, gaps = 0.0, [0.0] * bins
    for margin in margins:
        stated = 1 / (1 + math.exp(-min(abs(margin), 700)))
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        choices += right
        gaps[min(int((stated - 0.5) * 2 * bins), bins - 1)] += stated - right
    return choices / len(margins), sum(abs(gap) for gap in gaps) / len(margins)


def test_accuracy_and_calibration_equal_a_slow_reference_and_do_not_depend_on_order():
    for rng in cases():
        n, bins = rng.randint(1, 40), rng.randint(1, 15)
        margins = draw(rng, n, scale=rng.choice([0.1, 1, 10, 1e4]))
        margins[rng.randrange(n)] = rng.choice([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, 1.0])
        share, error = slow_statistics(margins.tolist(), bins)
        assert accuracy(margins) == pytest.approx(share)
        assert calibration_error(margins, bins) == pytest.approx(error, abs=1e-9)
        shuffled = margins[torch.tensor(rng.sample(range(n), n))]
        assert calibration_error(shuffled, bins) == pytest.approx(error, abs=1e-9)


# ---- products ------------------------------------------------------------------------------------

def test_products_without_a_gradient_equal_those_with_one():
    """On either side of the sizes from which another library computes them."""
    for rng in cases(max(10, CASES // 20)):
        rows, n_in, n_out = rng.randint(1, 9), rng.randint(256, 700), rng.randint(256, 700)
        scale = rng.choice([1e-3, 1, 1e4])
        x = draw(rng, rows, n_in, scale=scale, dtype=torch.float32)
        weight = draw(rng, n_out, n_in, dtype=torch.float32)
        if rng.random() < 0.5:
            weight = weight.T.contiguous().T             # as Conv1D stores it
        bias = rng.choice([None, draw(rng, n_out, dtype=torch.float32)])
        junk = rng.choice([None, *JUNK])
        if junk is not None:
            x[rng.randrange(rows), rng.randrange(n_in)] = junk
        expected = torch.nn.functional.linear(x, weight, bias)
        with torch.no_grad():
            result = fast.linear(x, weight, bias)
        size = scale * math.sqrt(n_in) if junk is None or not math.isfinite(junk) else 1e30
        assert torch.equal(result.isnan(), expected.isnan())
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * size, equal_nan=True)


# ---- from hidden states to log-probabilities -----------------------------------------------------

class TokenCase:
    """Random hidden states, ids, unembedding and mask for `token_logprobs`."""

    def __init__(self, rng: random.Random, scale: float = 1.0, dtype=torch.float64):
        self.mask = rollout_mask(rng)
        B, T, C, V = len(self.mask), self.mask.shape[1] + 1, rng.randint(1, 4), rng.randint(2, 7)
        self.hidden = draw(rng, B, T, C, dtype=dtype)
        self.unembedding = draw(rng, V, C, scale=scale, dtype=dtype)
        self.ids = torch.tensor([[rng.randrange(V) for _ in range(T)] for _ in range(B)])
        self.temperature = rng.choice([1.0, 0.3, 2.5])
        self.entropy_grad = rng.random() < 0.5           # the plain form, or its fast twin

    def run(self, **changes):
        x = {**self.__dict__, **changes}
        return token_logprobs(x["hidden"], x["ids"], x["mask"], x["unembedding"], x["temperature"],
                              entropy_grad=x["entropy_grad"])


def test_token_logprobs_equal_a_token_by_token_reference():
    for rng in cases():
        x = TokenCase(rng)
        logprobs, entropy = x.run()
        for row in range(len(x.mask)):
            for t in range(x.mask.shape[1]):
                expected, surprise = 0.0, 0.0            # of the action, and its mean
                if x.mask[row, t]:
                    logits = [sum(h * w for h, w in zip(x.hidden[row, t].tolist(), weight))
                              / x.temperature for weight in x.unembedding.tolist()]
                    norm = math.log(sum(math.exp(logit) for logit in logits))
                    expected = logits[x.ids[row, t + 1]] - norm
                    surprise = -sum((z - norm) * math.exp(z - norm) for z in logits)
                assert logprobs[row, t].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
                assert entropy[row, t].item() == pytest.approx(surprise, rel=1e-9, abs=1e-9)


def test_the_fast_form_gives_the_values_and_gradients_of_the_plain_one():
    for rng in cases():
        dtype, scale = rng.choice([torch.float32, torch.float64]), rng.choice([1, 30, 1e4])
        x = TokenCase(rng, scale, dtype)
        weights_of_tokens = draw(rng, *x.mask.shape, dtype=dtype)
        forms = []
        for entropy_grad in (True, False):
            states = x.hidden.clone().requires_grad_()
            unembedding = x.unembedding.clone().requires_grad_()
            logprobs, entropy = x.run(hidden=states, unembedding=unembedding,
                                      entropy_grad=entropy_grad)
            (logprobs * weights_of_tokens).sum().backward()
            forms.append([logprobs.detach(), entropy.detach(), states.grad, unembedding.grad])
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        for one, other in zip(*forms):
            size = 1 + other.abs().max().item()          # sums over tokens of unequal size
            torch.testing.assert_close(one / size, other / size, rtol=tolerance, atol=tolerance)


def test_states_and_ids_that_no_action_in_the_mask_needs_change_nothing_and_get_no_gradient():
    for rng in cases():
        x = TokenCase(rng)
        V = len(x.unembedding)
        used = torch.nn.functional.pad(x.mask, (0, 1))[..., None].expand_as(x.hidden)
        hidden = [x.hidden.clone(), with_junk(rng, x.hidden, used)]
        needed = torch.nn.functional.pad(x.mask, (1, 0))                    # the action ids[t+1]
        ids = torch.where(needed, x.ids, (x.ids + 1) % V)
        results, gradients = [], []
        for states, row_ids in zip(hidden, (x.ids, ids)):
            states.requires_grad_()
            weight = x.unembedding.clone().requires_grad_()
            logprobs, entropy = x.run(hidden=states, ids=row_ids, unembedding=weight)
            (logprobs.sum() + (entropy.sum() if x.entropy_grad else 0)).backward()
            results += [logprobs, entropy]
            gradients += [states.grad, weight.grad]
        assert_equal(results[2:], results[:2], 0, 0)
        assert_equal(gradients[2:], gradients[:2], 0, 0)
        assert (gradients[2][~used] == 0).all() and gradients[3].isfinite().all()


def test_rows_and_padding_do_not_change_token_logprobs():
    for rng in cases():
        x = TokenCase(rng)
        expected = x.run()
        order = torch.tensor(rng.sample(range(len(x.mask)), len(x.mask)))
        result = x.run(hidden=x.hidden[order], ids=x.ids[order], mask=x.mask[order])
        assert_equal(result, [result[order] for result in expected], 1e-9, 1e-9)
        more = rng.randint(1, 4)
        pad = torch.nn.functional.pad
        result = x.run(hidden=pad(x.hidden, (0, 0, 0, more), value=math.nan),
                      ids=pad(x.ids, (0, more), value=0), mask=pad(x.mask, (0, more)))
        assert_equal(result, [pad(result, (0, more)) for result in expected], 1e-9, 1e-9)


def test_logits_of_ten_thousand_stay_finite_with_their_gradients():
    for rng in cases():
        x = TokenCase(rng, scale=1e4, dtype=torch.float32)
        states = x.hidden.requires_grad_()
        logprobs, entropy = x.run(hidden=states)
        (logprobs.sum() + (entropy.sum() if x.entropy_grad else 0)).backward()
        assert logprobs.isfinite().all() and entropy.isfinite().all()
        assert states.grad.isfinite().all()
        assert (logprobs <= 0).all() and (entropy >= -1e-5).all()
        assert (entropy <= math.log(len(x.unembedding)) + 1e-5).all()


def test_token_logprobs_of_float32_agree_with_float64():
    for rng in cases():
        x = TokenCase(rng)
        result = x.run(hidden=x.hidden.float(), unembedding=x.unembedding.float())
        assert_equal([one.double() for one in result], x.run(), 1e-4, 1e-4)


def test_behaviour_logprobs_are_a_distribution_that_forgets_shifts():
    for rng in cases():
        logits = draw(rng, rng.randint(1, 4), rng.randint(1, 9), scale=rng.choice([1, 30, 1e4]))
        temperature = rng.choice([1e-3, 0.5, 1.0, 100.0])
        result = behaviour_logprobs(logits, temperature)
        assert result.isfinite().all() and (result <= 0).all()
        torch.testing.assert_close(result.exp().sum(-1), torch.ones_like(result[:, 0]))
        shifted = behaviour_logprobs(logits + rng.uniform(-50, 50), temperature)
        torch.testing.assert_close(shifted, result, rtol=1e-7, atol=1e-6)
        torch.testing.assert_close(behaviour_logprobs(logits / temperature), result)
        assert torch.equal(result.argmax(-1), logits.argmax(-1))
        single = behaviour_logprobs(logits.float(), temperature).double()
        size = (logits / temperature).abs().max().item()         # float32 has 24 bits of it
        torch.testing.assert_close(single, result, rtol=0, atol=1e-5 + 1e-6 * size)


# ---- sampling ------------------------------------------------------------------------------------

def random_logprobs(rng: random.Random, dtype=torch.float64) -> torch.Tensor:
    """(B, V) log-probabilities, some of them -inf, some of them far below any sampling."""
    logits = draw(rng, rng.randint(1, 4), rng.randint(1, 9), scale=rng.choice([1, 10, 1000]))
    for row in logits:
        for token in rng.sample(range(len(row)), rng.randrange(len(row))):
            if rng.random() < 0.4:
                row[token] = -math.inf
    return logits.log_softmax(dim=1).to(dtype)


def test_sampling_equals_a_walk_along_the_probabilities():
    for rng in cases():
        logprobs = random_logprobs(rng)
        uniforms = [rng.choice([0.0, 2 ** -53, rng.random(), 1 - 2 ** -53]) for _ in logprobs]
        result = sample(logprobs, torch.tensor(uniforms, dtype=torch.float64)).tolist()
        for row, uniform, token in zip(logprobs.exp().tolist(), uniforms, result):
            below, upto = sum(row[:token]), sum(row[:token + 1])
            assert row[token] > 0                        # never a token of probability 0
            assert below - 1e-12 <= uniform * sum(row) <= upto + 1e-12


def test_a_sample_depends_on_nothing_but_its_own_row_and_number():
    for rng in cases():
        logprobs = random_logprobs(rng, rng.choice([torch.float32, torch.float64]))
        uniforms = torch.tensor([rng.random() for _ in logprobs], dtype=torch.float64)
        result = sample(logprobs, uniforms)
        order = torch.tensor(rng.sample(range(len(logprobs)), len(logprobs)))
        assert torch.equal(sample(logprobs[order], uniforms[order]), result[order])
        for row in range(len(logprobs)):
            alone = sample(logprobs[row:row + 1], uniforms[row:row + 1])
            assert torch.equal(alone, result[row:row + 1])


def test_larger_uniforms_never_give_smaller_tokens():
    for rng in cases():
        row = random_logprobs(rng)[:1]
        uniforms = torch.tensor(sorted(rng.random() for _ in range(20)), dtype=torch.float64)
        tokens = sample(row.expand(20, -1), uniforms)
        assert (tokens[1:] >= tokens[:-1]).all()


def slow_filter(row: list[float], top_k: int, top_p: float) -> list[float]:
    """Probabilities after top-k (ties of the k-th stay) and the smallest set holding top_p."""
    if top_k > 0:
        kth = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        row = [value if value >= kth else 0.0 for value in row]
    row = [value / sum(row) for value in row]
    if top_p < 1:
        mass, kept = 0.0, [0.0] * len(row)
        for token in sorted(range(len(row)), key=lambda token: -row[token]):
            if mass < top_p:
                kept[token] = row[token]
            mass += row[token]
        row = [value / sum(kept) for value in kept]
    return row


def test_filtering_equals_a_slow_reference():
    for rng in cases():
        logprobs = random_logprobs(rng)
        top_k, top_p = rng.choice([0, 1, 2, 5, 100]), rng.choice([1.0, 0.01, rng.random(), 0.999])
        result = filter_logprobs(logprobs, top_k, top_p)
        torch.testing.assert_close(result.exp().sum(1), torch.ones_like(result[:, 0]))
        for row, filtered in zip(logprobs.exp().tolist(), result.exp().tolist()):
            assert filtered == pytest.approx(slow_filter(row, top_k, top_p), abs=1e-9)


def test_filtering_keeps_the_likeliest_token_and_the_proportions():
    for rng in cases():
        logprobs = random_logprobs(rng, rng.choice([torch.float32, torch.float64]))
        result = filter_logprobs(logprobs, rng.choice([0, 1, 3]), rng.choice([1.0, 1e-6, 0.9]))
        assert not result.isnan().any()
        best = logprobs.argmax(dim=1, keepdim=True)
        assert torch.equal(result.argmax(dim=1, keepdim=True), best)
        kept = result > -math.inf
        assert kept.gather(1, best).all()
        apart = (result - logprobs) - (result - logprobs).gather(1, best)
        assert apart[kept].abs().max() < 1e-3
        assert torch.equal(filter_logprobs(logprobs).exp(), logprobs.log_softmax(1).exp())


# ---- schedules -----------------------------------------------------------------------------------

def test_the_learning_rate_rises_once_falls_once_and_stays_between_0_and_its_peak():
    for rng in cases():
        total, warmup = rng.randint(1, 60), rng.choice([0, 1, 5, 60, 100])
        peak, schedule = 10 ** rng.uniform(-8, 1), rng.choice(["constant", "linear", "cosine"])
        rates = [learning_rate(step, total, peak, warmup, schedule) for step in range(total + 5)]
        assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)
        assert all(rate > 0 for rate in rates[:total])
        rising, falling = rates[:warmup], rates[warmup:]
        assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
        if warmup < total:
            assert falling[0] == peak
            assert schedule == "constant" or rates[total] == pytest.approx(0, abs=1e-12)


def test_the_learning_rate_is_proportional_to_its_peak():
    for rng in cases():
        total, step, warmup = rng.randint(1, 60), rng.randint(0, 70), rng.randint(0, 70)
        schedule, factor = rng.choice(["constant", "linear", "cosine"]), 10 ** rng.uniform(-5, 5)
        one = learning_rate(step, total, 1.0, warmup, schedule)
        assert learning_rate(step, total, factor, warmup, schedule) == pytest.approx(factor * one)


def test_the_kl_coefficient_stays_positive_moves_the_right_way_and_slowly():
    for rng in cases():
        coef, target = 10 ** rng.uniform(-4, 2), 10 ** rng.uniform(-3, 3)
        responses = rng.randint(1, 10 ** 4)
        horizon = responses * 10 ** rng.uniform(0, 4)    # a shorter one is refused by PPOConfig
        kl_refs = sorted([-target, 0.0, target, rng.uniform(-1e3, 1e3), 1e30, -1e30])
        coefs = [adapt_kl_coef(coef, kl_ref, target, responses, horizon) for kl_ref in kl_refs]
        assert coefs == sorted(coefs)                    # the more kl_ref, the more penalty
        for kl_ref, moved in zip(kl_refs, coefs):
            assert 0.8 * coef * (1 - 1e-9) <= moved <= 1.2 * coef * (1 + 1e-9)
            assert (moved - coef) * (kl_ref - target) >= 0
        assert coefs[kl_refs.index(target)] == coef
