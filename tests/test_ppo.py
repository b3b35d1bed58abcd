"""ppo.py: formulas by hand, by slow references, by enumeration; invariants; runs that learn."""

import copy
import dataclasses
import itertools
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch

from minirlhf import ppo
from minirlhf.common import (clip_gradients, learning_rate, masked_mean, random_stream,
                             read_metrics, whiten)
from minirlhf.data import Tokenizer, encode_prompt, response_mask
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel, token_logprobs
from minirlhf.ppo import (PolicyWithValue, Rollout, adapt_kl_coef, check_invariants, draw_prompts,
                          gae, make_networks, measure, policy_loss, rollout, shaped_rewards,
                          token_table, train_step, update, value_loss)
from minirlhf.rewards import load_reward

from helpers import (grad_norm_of, metrics_without_time, ppo_config, quietly, random_reward_folder,
                     reward_folder, save_folder, sft_folder, share_of_red, toy_model, toy_tokenizer,
                     weights_equal)

END = toy_tokenizer().end_token
CRITICS = ("separate", "shared")


def double(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ragged_masks(seed: int, B: int = 6, T: int = 9) -> torch.Tensor:
    """Masks as rollouts have them: prompts and responses of any length, (B, T-1)."""
    rng = random.Random(seed)
    prompts = [rng.randint(1, T - 1) for _ in range(B)]
    lengths = [rng.randint(prompt + 1, T) for prompt in prompts]
    return response_mask(torch.tensor(prompts), torch.tensor(lengths), T)


# ---- rewards -------------------------------------------------------------------------------------

def test_shaped_rewards_hand_example():
    rewards = shaped_rewards(double(1), double([0.5, -0.2, 0.3]), torch.ones(1, 3) > 0, 0.1)
    assert rewards.tolist() == [pytest.approx([-0.05, 0.02, 0.97])]


@pytest.mark.parametrize("prompt, length, case", [
    (2, 5, "ends with the end token, padding behind it"), (2, 7, "no end token: cut at the limit"),
    (2, 3, "ends at once: a response of one token"), (6, 7, "one token, at the end of the row"),
    (1, 2, "a prompt of one token")])
def test_the_score_is_exactly_at_the_last_action(prompt, length, case):
    mask = response_mask(torch.tensor([prompt, 3]), torch.tensor([length, 6]), 7)   # (2, 6)
    rewards = shaped_rewards(torch.tensor([1.0, 2.0]), torch.zeros(2, 6), mask, 0.1)
    expected = torch.zeros(2, 6)
    expected[0, length - 2] = 1.0                        # the action ids[length-1]
    expected[1, 4] = 2.0
    assert torch.equal(rewards, expected), case


@pytest.mark.parametrize("seed", range(5))
def test_rewards_add_up_to_score_minus_kl(seed):
    mask = ragged_masks(seed)
    scores, kl_ref = torch.randn(6).double(), torch.randn(mask.shape).double()
    rewards = shaped_rewards(scores, kl_ref, mask, 0.3)
    expected = [scores[b] - 0.3 * kl_ref[b][mask[b]].sum() for b in range(6)]
    torch.testing.assert_close(rewards.sum(dim=1), torch.stack(expected))
    assert (rewards[~mask] == 0).all()


def test_without_a_coefficient_the_reward_is_the_score_alone():
    mask = ragged_masks(0)
    rewards = shaped_rewards(torch.ones(6), torch.randn(mask.shape), mask, 0.0)
    assert (rewards != 0).sum(dim=1).tolist() == [1] * 6 and rewards.sum() == 6


# ---- GAE -----------------------------------------------------------------------------------------

HAND = {"rewards": [-0.1, -0.2, 1.0], "values": [0.5, 0.4, 0.6]}


def test_gae_hand_example():
    mask = torch.ones(1, 3) > 0
    advantages, returns = gae(double(HAND["rewards"]), double(HAND["values"]), mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.161, 0.38, 0.4])
    assert returns[0].tolist() == pytest.approx([0.661, 0.78, 1.0])


def test_the_hand_example_with_a_prompt_before_and_padding_behind():
    mask = torch.tensor([[False, False, True, True, True, False]])
    rewards, values = double([9, 9, -0.1, -0.2, 1.0, 9]), double([9, 9, 0.5, 0.4, 0.6, 9])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0, 0, 0.161, 0.38, 0.4, 0])
    assert returns[0].tolist() == pytest.approx([0, 0, 0.661, 0.78, 1.0, 0])


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Equation 16 as it is written: a sum of discounted one-step errors."""
    after = values[1:] + [0.0]
    deltas = [r + gamma * v2 - v for r, v2, v in zip(rewards, after, values)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
            for t in range(len(deltas))]


@pytest.mark.parametrize("seed", range(8))
def test_gae_equals_a_slow_reference_on_ragged_batches(seed):
    mask = ragged_masks(seed)
    rng = random.Random(seed)
    gamma, lam = rng.choice([1.0, 0.9]), rng.random()
    rewards, values = torch.randn(2, *mask.shape).double()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for b in range(len(mask)):
        expected = slow_gae(rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist(), gamma, lam)
        assert advantages[b][mask[b]].tolist() == pytest.approx(expected)
    torch.testing.assert_close((returns - advantages)[mask], values[mask])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_lam_0_gives_one_step_errors_and_lam_1_reward_to_go_minus_value():
    mask = ragged_masks(3)
    rewards, values = torch.randn(2, *mask.shape).double()
    one_step, _ = gae(rewards, values, mask, 0.9, 0.0)
    to_go, returns = gae(rewards, values, mask, 0.9, 1.0)
    for b in range(len(mask)):
        r, v = rewards[b][mask[b]].tolist(), values[b][mask[b]].tolist()
        after = v[1:] + [0.0]
        assert one_step[b][mask[b]].tolist() == pytest.approx(
            [r[t] + 0.9 * after[t] - v[t] for t in range(len(r))])
        sums = [sum(0.9 ** k * x for k, x in enumerate(r[t:])) for t in range(len(r))]
        assert returns[b][mask[b]].tolist() == pytest.approx(sums)
        assert to_go[b][mask[b]].tolist() == pytest.approx([s - x for s, x in zip(sums, v)])


def test_with_values_0_the_first_of_n_tokens_gets_gamma_lam_to_the_n_minus_1_of_the_score():
    mask = torch.ones(1, 5) > 0
    advantages, _ = gae(double([0, 0, 0, 0, 2]), torch.zeros(1, 5).double(), mask, 0.9, 0.8)
    assert advantages[0].tolist() == pytest.approx([2 * 0.72 ** n for n in (4, 3, 2, 1, 0)])


def test_whiten_and_masked_mean_hand_examples():
    x, mask = double([1, 3, 9]), torch.tensor([[1, 1, 0]])
    assert masked_mean(x, mask).item() == 2
    assert whiten(x, mask)[0].tolist() == pytest.approx([-1, 1, 0], abs=1e-6)
    assert whiten(double([5, 0]), torch.tensor([[1, 0]])).tolist() == [[0, 0]]


def test_returns_are_computed_before_whitening():
    mask = torch.ones(1, 3) > 0
    values = double(HAND["values"])
    advantages, returns = gae(double(HAND["rewards"]), values, mask, 1.0, 0.95)
    white = whiten(advantages, mask)
    assert white.mean().item() == pytest.approx(0, abs=1e-12)        # the mean is not added back
    assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert returns[0].tolist() == pytest.approx([0.661, 0.78, 1.0])
    assert not torch.allclose(white + values, returns)
    _, _, batch = fresh_rollout(ppo_config())
    again, returns = gae(batch.rewards, batch.old_values, batch.response_mask, 1.0, 0.95)
    assert torch.equal(batch.returns, returns)
    assert torch.equal(batch.advantages, whiten(again, batch.response_mask))
    assert abs(masked_mean(batch.advantages, batch.response_mask).item()) < 1e-6


# ---- losses --------------------------------------------------------------------------------------

@pytest.mark.parametrize("ratio, advantage, loss, slope", [
    (1.5, 1.0, -1.2, 0.0),       # better and already likelier: no more gradient
    (1.5, -1.0, 1.5, 1.5),       # worse but likelier: pushed back
    (0.5, 1.0, -0.5, -0.5),      # better but less likely: pushed up
    (0.5, -1.0, 0.8, 0.0),       # worse and already less likely: no more gradient
    (1.0, 1.0, -1.0, -1.0)])
def test_policy_loss_cases(ratio, advantage, loss, slope):
    logprobs = double([math.log(ratio) - 2, 7]).requires_grad_()
    found, ratios = policy_loss(logprobs, double([-2, 3]), double([advantage, 5]),
                                torch.tensor([[True, False]]), 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss) and ratios[0, 0].item() == pytest.approx(ratio)
    assert logprobs.grad[0].tolist() == pytest.approx([slope, 0])


def test_policy_loss_gradcheck():
    mask = ragged_masks(1)
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(mask.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    old_logprobs = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    advantages = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old_logprobs, advantages, mask, 0.2)[0], logprobs)


def test_at_ratio_1_the_policy_loss_is_the_plain_policy_gradient():
    mask = ragged_masks(2)
    logprobs = torch.randn(mask.shape).double().requires_grad_()
    advantages = torch.randn(mask.shape).double()
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    expected = torch.where(mask, -advantages / mask.sum(), 0.0)
    torch.testing.assert_close(logprobs.grad, expected)


@pytest.mark.parametrize("value, old, target, loss, slope", [
    (1.0, 0.0, 1.0, 0.32, 0.0),      # moved too far towards the target: the clipped error counts
    (0.1, 0.0, 1.0, 0.405, -0.9),    # within the range: plain half square
    (1.0, 0.0, -1.0, 2.0, 2.0),      # moved the wrong way: its own error counts, with gradient
    (-1.0, 0.0, -0.5, 0.125, -0.5),  # overshot: own error 0.5, clipped error 0.3
    (0.3, 0.3, 0.3, 0.0, 0.0)])
def test_value_loss_cases(value, old, target, loss, slope):
    values = double([value, 50]).requires_grad_()
    mask = torch.tensor([[True, False]])
    found = value_loss(values, double([old, 3]), double([target, -9]), mask, 0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad[0].tolist() == pytest.approx([slope, 0])


def test_value_loss_gradcheck():
    mask = ragged_masks(4)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(mask.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    old_values = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    returns = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old_values, returns, mask, 0.2), values)


def test_adapt_kl_coef_hand_example_and_limits():
    assert adapt_kl_coef(0.1, 9, 6, 64, 10_000) == pytest.approx(0.100128)
    assert adapt_kl_coef(0.1, 6, 6, 64, 10_000) == 0.1
    assert adapt_kl_coef(0.1, 6.6, 6, 100, 1000) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, 0, 6, 100, 1000) == pytest.approx(0.1 * 0.98)


# ---- masks ---------------------------------------------------------------------------------------

def masked_formulas(mask, tensors):
    """Every formula that takes a mask, as a list of results to compare."""
    a, b, c = tensors
    scores = torch.arange(len(mask)).double()
    found = [masked_mean(a, mask), whiten(a, mask), shaped_rewards(scores, a, mask, 0.3)]
    found += gae(a, b, mask, 0.9, 0.8)
    found += [policy_loss(a, b, c, mask, 0.2)[0], value_loss(a, b, c, mask, 0.2)]
    return found


@pytest.mark.parametrize("junk", [1e6, -1e6, math.inf, math.nan])
def test_masked_entries_change_nothing(junk):
    mask = ragged_masks(5)
    clean = torch.randn(3, *mask.shape).double()
    dirty = torch.where(mask, clean, torch.full_like(clean, junk))
    for one, other in zip(masked_formulas(mask, clean), masked_formulas(mask, dirty)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_masked_entries_change_no_gradient_and_get_none():
    mask = ragged_masks(6)
    clean = torch.randn(3, *mask.shape).double()
    gradients = []
    for a, b, c in (clean, torch.where(mask, clean, 1e6)):
        a.requires_grad_()
        (policy_loss(a, b, c, mask, 0.2)[0] + value_loss(a, b, c, mask, 0.2)).backward()
        gradients.append(a.grad)
    assert torch.equal(*gradients) and (gradients[0][~mask] == 0).all()


def test_hidden_states_outside_the_mask_change_nothing():
    mask = ragged_masks(7)                                                          # (6, 8)
    ids, hidden = torch.randint(5, (6, 9)), torch.randn(6, 9, 4)
    states = torch.cat([mask, torch.zeros(6, 1, dtype=torch.bool)], dim=1)[:, :, None]
    dirty = torch.where(states, hidden, torch.full_like(hidden, math.nan))
    results = [token_logprobs(x, ids, mask, torch.eye(5, 4)) for x in (hidden, dirty)]
    for one, other in zip(*results):
        assert torch.equal(one, other) and (one[~mask] == 0).all()


def test_the_chosen_end_token_gets_score_advantage_and_gradient():
    ids = torch.tensor([[2, 0, 1, 2, 2, 2]])             # a response 1, end; then padding, also 2
    mask = response_mask(torch.tensor([2]), torch.tensor([4]), 6)                   # (1, 5)
    logits = torch.zeros(1, 6, 3, requires_grad=True)
    logprobs, _ = token_logprobs(logits, ids, mask, torch.eye(3))                   # (1, 5)
    rewards = shaped_rewards(torch.tensor([1.0]), torch.zeros(1, 5), mask, 0.1)
    assert mask[0].tolist() == [False, True, True, False, False]
    assert rewards[0].tolist() == [0, 0, 1, 0, 0]        # on the action end token, column 2
    advantages, _ = gae(rewards, torch.zeros(1, 5), mask, 1.0, 0.95)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    assert logits.grad[0, 2, 2].item() == pytest.approx(-0.5 * 2 / 3)    # advantage 1, p 1/3, N 2
    assert (logits.grad[0, 3:] == 0).all()               # the padding's end tokens get none


# ---- exact enumeration on a vocabulary of 3 tokens -----------------------------------------------

THREE = GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=1)


def small_model(seed: int, scale: float) -> GPT2:
    torch.manual_seed(seed)
    model = GPT2(THREE)
    with torch.no_grad():
        model.wte.weight.mul_(scale)
        model.wpe.weight.mul_(scale)
    return model


def all_responses(limit: int) -> list[tuple]:
    """Every response over tokens 0, 1 and the end token 2: ended, or cut at the limit."""
    found = []
    for length in range(1, limit + 1):
        for head in itertools.product((0, 1), repeat=length - 1):
            found += [head + (last,) for last in ((0, 1, 2) if length == limit else (2,))]
    return found


def exact_kl(one: GPT2, other: GPT2, prompt: list[int], limit: int, temperature: float):
    """KL(one || other) over whole responses, from full distributions; and the expected length."""
    total = length = 0.0
    stack = [((), 1.0)]
    while stack:
        made, weight = stack.pop()
        ids = torch.tensor([prompt + list(made)])
        with torch.no_grad():
            p = (one(ids)[0, -1].double() / temperature).log_softmax(0)
            q = (other(ids)[0, -1].double() / temperature).log_softmax(0)
        total += weight * (p.exp() * (p - q)).sum().item()
        length += weight
        if len(made) + 1 < limit:
            stack += [(made + (token,), weight * p[token].exp().item()) for token in (0, 1)]
    return total, length


def zero_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    return torch.zeros(len(ids))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_expected_kl_ref_is_the_exact_kl_and_samples_follow_their_logprobs(temperature):
    policy, ref_policy, prompt, limit = small_model(0, 12), small_model(1, 12), [2, 0], 3
    cfg = ppo_config(max_new_tokens=limit, temperature=temperature, critic="shared")
    B = 4000
    batch = rollout(PolicyWithValue(policy, None), ref_policy, zero_reward,
                    SimpleNamespace(end_token=2), [prompt] * B, cfg, 0.1, iteration=1)
    rows, counts = {}, {}
    for b in range(B):
        key = tuple(batch.ids[b, 2:batch.lengths[b]].tolist())
        rows[key], counts[key] = b, counts.get(key, 0) + 1
    assert set(rows) == set(all_responses(limit)), "one was never sampled: choose other seeds"
    weights = {key: batch.old_logprobs[b].double().sum().exp().item() for key, b in rows.items()}
    assert sum(weights.values()) == pytest.approx(1, abs=1e-5)
    expected = sum(weights[key] * batch.kl_ref[b].double().sum().item() for key, b in rows.items())
    exact, length = exact_kl(policy, ref_policy, prompt, limit, temperature)
    assert exact > 0.05 and expected == pytest.approx(exact, rel=1e-4)
    assert sum(weights[key] * len(key) for key in rows) == pytest.approx(length, rel=1e-4)
    for key, weight in weights.items():                  # frequencies within 5 standard deviations
        assert abs(counts[key] / B - weight) < 5 * math.sqrt(weight * (1 - weight) / B), key


def uniform_batch(networks: PolicyWithValue, cfg) -> Rollout:
    """All 2-token responses of a uniform policy, each as often as it occurs: 3 x end, 6 others."""
    responses = [(2,)] * 3 + [row for row in all_responses(2) if len(row) == 2]
    lengths = torch.tensor([1 + len(row) for row in responses])
    ids = torch.tensor([[2, *row] + [2] * (2 - len(row)) for row in responses])     # (9, 3)
    prompt_lengths = torch.ones(9, dtype=torch.long)
    mask = response_mask(prompt_lengths, lengths, 3)                                # (9, 2)
    with torch.no_grad():
        logprobs, values, entropy = networks(ids, mask, 1.0)
    advantages = torch.where(mask, torch.linspace(-1, 2, 18).view(9, 2), 0.0)
    return Rollout(ids, prompt_lengths, lengths, ids[:, 1] == 2, mask, logprobs, logprobs, values,
                   entropy, torch.zeros(9), torch.zeros(9, 2), torch.zeros(9, 2), advantages,
                   values)


def test_expected_kl_old_is_the_exact_kl_of_the_rollout_policy_to_the_updated_one():
    policy = small_model(0, 1)
    with torch.no_grad():
        policy.wte.weight.zero_()                        # all logits 0: the uniform policy
    networks, found = PolicyWithValue(policy, None), {}
    for epochs in (1, 2):                                # the second epoch measures after one step
        cfg = ppo_config(batch_size=9, minibatch_size=9, epochs=epochs, max_grad_norm=1e9)
        trained = copy.deepcopy(networks)
        optimizer = torch.optim.SGD(trained.parameters(), lr=2.0)
        found[epochs] = update(trained, optimizer, uniform_batch(networks, cfg), cfg, 1)["kl_old"]
        if epochs == 1:
            exact, length = exact_kl(policy, trained.policy, [2], 2, 1.0)
            reverse, _ = exact_kl(trained.policy, policy, [2], 2, 1.0)
    assert found[1] == pytest.approx(0, abs=1e-7)
    assert exact > 0.01 and abs(exact - reverse) > 1e-3 * exact
    assert 2 * found[2] == pytest.approx(exact / length, rel=1e-4)       # mean of 0 and of this


def test_the_estimated_gradient_is_that_of_the_expected_reward():
    limit, kl_coef, generator = 3, 0.3, torch.Generator().manual_seed(0)
    states = [head for n in range(limit) for head in itertools.product((0, 1), repeat=n)]
    index = {state: number for number, state in enumerate(states)}
    logits, ref_logits = torch.randn(2, len(states), 3, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    baseline = torch.randn(len(states), dtype=torch.float64, generator=generator)   # any function
    objective, estimate = 0.0, torch.zeros_like(logits)
    for response in all_responses(limit):
        visited = torch.tensor([index[response[:t]] for t in range(len(response))])
        actions = torch.tensor(response)
        logprobs = logits.log_softmax(1)[visited, actions]                          # (n,)
        ref_logprobs = ref_logits.log_softmax(1)[visited, actions]                  # (n,)
        score = double(math.sin(3.0 * sum(response) + len(response)))               # (1,)
        probability = logprobs.sum().exp()
        objective = objective + probability * (
            score[0] - kl_coef * (logprobs - ref_logprobs).sum())
        # the same through the shipped functions, as rollout and update call them
        old = logprobs.detach()
        mask = torch.ones(1, len(response), dtype=torch.bool)
        rewards = shaped_rewards(score, (old - ref_logprobs)[None], mask, kl_coef)
        advantages, _ = gae(rewards, baseline[visited][None], mask, gamma=1.0, lam=1.0)
        loss, _ = policy_loss(logprobs[None], old[None], advantages, mask, 0.2)
        # policy_loss is a mean over tokens; the theorem has their sum
        gradient, = torch.autograd.grad(loss * len(response), logits, retain_graph=True)
        estimate = estimate - probability.detach() * gradient
    exact, = torch.autograd.grad(objective, logits)
    assert exact.abs().max() > 0.05
    torch.testing.assert_close(estimate, exact, rtol=1e-9, atol=1e-12)


# ---- rollouts ------------------------------------------------------------------------------------

def ragged_prompts(count: int) -> list[list[int]]:
    tokenizer = toy_tokenizer()
    return [encode_prompt(tokenizer, f"Prompt: Colours{' for' * (i % 4)} bana?\nResponse:")
            for i in range(count)]


def fresh_rollout(cfg, iteration: int = 0, kl_coef: float = 0.02):
    networks, ref_policy = make_networks(cfg)
    reward = load_reward(cfg.reward, cfg.ensemble, toy_tokenizer())
    batch = rollout(networks, ref_policy, reward, toy_tokenizer(), ragged_prompts(cfg.batch_size),
                    cfg, kl_coef, iteration)
    return networks, ref_policy, batch


def test_a_rollout_has_every_score_at_its_last_action():
    _, _, batch = fresh_rollout(ppo_config(batch_size=32, max_new_tokens=4))
    assert batch.ended.any() and not batch.ended.all()
    assert (batch.lengths - batch.prompt_lengths).unique().numel() >= 3
    for b, length in enumerate(batch.lengths.tolist()):
        expected = torch.zeros(batch.rewards.shape[1])
        expected[length - 2] = batch.scores[b]           # kl_ref is 0 in iteration 0
        assert torch.equal(batch.rewards[b], expected)
        assert (batch.ids[b, length - 1] == END) == batch.ended[b]


def test_the_rollout_holds_what_the_alignment_law_says():
    networks, ref_policy, batch = fresh_rollout(ppo_config(reward=reward_folder(), temperature=0.8))
    networks.critic.score_head.weight.data.normal_()
    with torch.no_grad():
        logprobs, values, _ = networks(batch.ids, batch.response_mask, 0.8)
        for b in range(len(batch.ids)):
            alone = batch.ids[b:b + 1, :batch.lengths[b]]                           # (1, length)
            table = (networks.policy(alone)[0] / 0.8).log_softmax(1)                # (length, V)
            critic = networks.critic(alone)[0]                                      # (length,)
            for t in range(batch.prompt_lengths[b] - 1, batch.lengths[b] - 1):
                action = alone[0, t + 1]
                assert logprobs[b, t].item() == pytest.approx(table[t, action].item(), abs=1e-4)
                assert values[b, t].item() == pytest.approx(critic[t].item(), abs=1e-4)
    assert (values[~batch.response_mask] == 0).all()
    assert torch.equal(batch.old_logprobs, logprobs)
    assert torch.equal(batch.kl_ref, batch.old_logprobs - batch.ref_logprobs)
    assert (batch.kl_ref == 0).all()


def test_the_missing_end_penalty_is_for_rows_that_did_not_end():
    usual = {"batch_size": 32, "max_new_tokens": 4}
    _, _, free = fresh_rollout(ppo_config(missing_end_penalty=0.0, **usual))
    _, _, taxed = fresh_rollout(ppo_config(missing_end_penalty=5.0, **usual))
    assert torch.equal(free.ids, taxed.ids) and free.ended.any() and not free.ended.all()
    torch.testing.assert_close(free.scores - taxed.scores, 5.0 * (~free.ended).float())
    limit = free.lengths - free.prompt_lengths == 4
    assert (limit & free.ended).any()                    # ended with the last token: no penalty


def test_a_rollout_prints_one_line_a_field():
    _, _, batch = fresh_rollout(ppo_config())
    lines = repr(batch).split("\n")
    assert [line.split()[0] for line in lines[1:]] == [f.name for f in dataclasses.fields(batch)]
    assert all(word in lines[1] for word in ("(8, ", "mean", "min", "max"))


def test_the_first_values_are_0_and_a_separate_critic_has_the_reward_models_trunk():
    for critic in CRITICS:
        networks, _, batch = fresh_rollout(ppo_config(critic=critic, reward=reward_folder()))
        assert (batch.old_values == 0).all()
    networks, _ = make_networks(ppo_config(reward=reward_folder()))
    rewarding = ScalarModel.from_pretrained(reward_folder())
    assert weights_equal(networks.critic.transformer, rewarding.transformer)
    networks, ref_policy = make_networks(ppo_config(reward="helpers:share_of_red"))
    assert weights_equal(networks.critic.transformer, networks.policy)
    assert weights_equal(ref_policy, networks.policy)
    assert networks.critic.transformer.wte.weight is not networks.policy.wte.weight


# ---- rewards -------------------------------------------------------------------------------------

def test_ensembles_take_the_mean_or_the_minimum(tmp_path):
    folders = [random_reward_folder(str(tmp_path / str(seed)), seed) for seed in range(3)]
    ids, lengths = torch.randint(END, (5, 8)), torch.tensor([8, 3, 5, 8, 4])
    with torch.no_grad():
        votes = torch.stack([ScalarModel.from_pretrained(folder).score(ids, lengths)
                             for folder in folders])                                # (3, 5)
        for how, expected in (("mean", votes.mean(dim=0)), ("min", votes.amin(dim=0))):
            reward = load_reward(",".join(folders), how, toy_tokenizer())
            torch.testing.assert_close(reward(ids, None, lengths, toy_tokenizer()), expected)


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path, tiny_tokenizer):
    folder = random_reward_folder(str(tmp_path), 0)
    with pytest.raises(ValueError, match="tokenizer is not the policy's"):
        load_reward(folder, "mean", tiny_tokenizer)


@pytest.mark.parametrize("name, found", [("column_reward", r"\(8, 1\)"), ("list_reward", "list")])
def test_a_reward_function_must_return_one_score_a_response(name, found):
    with pytest.raises(ValueError, match=rf"helpers:{name} returned {found}, .* shape \(8,\): one"):
        fresh_rollout(ppo_config(reward=f"helpers:{name}"))


def test_a_score_that_is_not_finite_is_named():
    words = r"scores is not finite at iteration 7, index \[7\]"
    with pytest.raises(FloatingPointError, match=words):
        fresh_rollout(ppo_config(reward="helpers:nan_reward"), iteration=7)


# ---- invariants ----------------------------------------------------------------------------------

class Dropout(torch.nn.Module):
    """A layer norm followed by dropout, as a network with dropout would have it."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.on = norm, True

    def forward(self, x):
        return torch.nn.functional.dropout(self.norm(x), 0.5, training=self.on)


def test_another_sampling_distribution_is_noticed(monkeypatch):
    generate = ppo.generate
    monkeypatch.setattr(ppo, "generate",
                        lambda *args, temperature, **kw: generate(*args, temperature=0.7, **kw))
    with pytest.raises(ValueError, match="iteration 4: tokens were sampled from another"):
        fresh_rollout(ppo_config(), iteration=4)


def test_dropout_in_the_rollout_is_noticed(monkeypatch):
    torch.manual_seed(0)
    networks, ref_policy = make_networks(ppo_config())
    networks.policy.ln_f = Dropout(networks.policy.ln_f)
    with pytest.raises(ValueError, match="sampled from another distribution"):
        rollout(networks, ref_policy, share_of_red, toy_tokenizer(), ragged_prompts(8),
                ppo_config(), 0.02, 3)


def test_dropout_in_the_update_is_noticed():
    torch.manual_seed(0)
    networks, ref_policy = make_networks(ppo_config())
    networks.policy.ln_f = Dropout(networks.policy.ln_f)
    networks.policy.ln_f.on = False
    batch = rollout(networks, ref_policy, share_of_red, toy_tokenizer(), ragged_prompts(8),
                    ppo_config(), 0.02, 3)
    networks.policy.ln_f.on = True
    with pytest.raises(ValueError, match="iteration 3, step 0: the first ratio is off 1"):
        update(networks, torch.optim.SGD(networks.parameters(), lr=0.1), batch, ppo_config(), 3)


def test_another_temperature_in_the_update_is_noticed():
    networks, _, batch = fresh_rollout(ppo_config())
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the first ratio is off 1"):
        update(networks, optimizer, batch, ppo_config(temperature=0.9), 0)


def test_a_policy_that_does_not_start_from_the_reference_is_noticed():
    networks, ref_policy = make_networks(ppo_config())
    with torch.no_grad():
        ref_policy.ln_f.bias.add_(0.1 * torch.arange(32))
    arguments = (networks, ref_policy, share_of_red, toy_tokenizer(), ragged_prompts(8),
                 ppo_config(), 0.02)
    with pytest.raises(ValueError, match="in iteration 0, expected 0: policy and reference"):
        rollout(*arguments, 0)
    rollout(*arguments, 1)                               # later it is the rule


def test_rewards_that_do_not_add_up_are_noticed():
    _, _, batch = fresh_rollout(ppo_config())
    moved = dataclasses.replace(batch, rewards=torch.zeros_like(batch.rewards))
    check_invariants(batch, batch.old_logprobs, 0.02, 0)
    with pytest.raises(ValueError, match="iteration 0: the rewards of a response do not add up"):
        check_invariants(moved, batch.old_logprobs, 0.02, 0)


# ---- update --------------------------------------------------------------------------------------

def slow_update(networks: PolicyWithValue, optimizer, batch: Rollout, cfg, iteration: int) -> dict:
    """The update one token at a time, every row by itself, without padding or masks."""
    tokens, grad_norms = [], []
    for epoch in range(cfg.epochs):
        generator = random_stream(cfg.seed, 2, iteration, epoch)
        order = torch.randperm(len(batch.ids), generator=generator)
        for rows in order.split(cfg.minibatch_size):
            part = []
            for b in rows.tolist():
                ids = batch.ids[b:b + 1, :batch.lengths[b]]                         # (1, length)
                hidden = networks.policy.hidden(ids)
                table = (networks.policy.logits(hidden)[0] / cfg.temperature).log_softmax(1)
                if networks.critic is None:
                    values = networks.value_head(hidden)[0, :, 0]
                else:
                    values = networks.critic(ids)[0]
                for t in range(batch.prompt_lengths[b] - 1, batch.lengths[b] - 1):
                    ratio = (table[t, ids[0, t + 1]] - batch.old_logprobs[b, t]).exp()
                    near = min(max(ratio, 1 - cfg.cliprange), 1 + cfg.cliprange)
                    pg = max(-ratio * batch.advantages[b, t], -near * batch.advantages[b, t])
                    old, target = batch.old_values[b, t], batch.returns[b, t]
                    reach = cfg.cliprange_value
                    close = min(max(values[t], old - reach), old + reach)
                    vf = 0.5 * max((values[t] - target) ** 2, (close - target) ** 2)
                    part.append((ratio, pg, vf, -(table[t].exp() * table[t]).sum()))
            ratio, pg, vf, entropy = (torch.stack(x) for x in zip(*part))
            loss = pg.mean() + cfg.vf_coef * vf.mean() - cfg.ent_coef * entropy.mean()
            optimizer.zero_grad()
            loss.backward()
            grad_norms.append(grad_norm_of(networks.parameters()))
            for p in networks.parameters():
                if p.grad is not None:
                    p.grad *= min(1.0, cfg.max_grad_norm / grad_norms[-1])
            optimizer.step()
            tokens += [[x.item() for x in token] for token in part]
    count = len(tokens)
    return {"kl_old": sum(r - 1 - math.log(r) for r, *_ in tokens) / count,
            "clipfrac": sum(abs(r - 1) > cfg.cliprange for r, *_ in tokens) / count,
            "pg_loss": sum(token[1] for token in tokens) / count,
            "vf_loss": sum(token[2] for token in tokens) / count,
            "ratio_first": 0.0, "ratio_max": max(r for r, *_ in tokens),
            "grad_norm": sum(grad_norms) / len(grad_norms)}


@pytest.mark.parametrize("critic", CRITICS)
def test_update_equals_a_slow_reference_on_a_ragged_batch(critic):
    cfg = ppo_config(critic=critic, batch_size=7, minibatch_size=3, epochs=2, ent_coef=0.01,
                     vf_coef=0.5, temperature=0.9, max_grad_norm=0.5)
    networks, _, batch = fresh_rollout(cfg)
    twin = copy.deepcopy(networks)
    found = update(networks, torch.optim.SGD(networks.parameters(), lr=0.3), batch, cfg, 5)
    expected = slow_update(twin, torch.optim.SGD(twin.parameters(), lr=0.3), batch, cfg, 5)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert found["clipfrac"] > 0 and found["kl_old"] > 1e-3 and found["grad_norm"] > 0.5
    for one, other in zip(networks.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_measure_equals_a_slow_reference_on_a_ragged_batch():
    cfg = ppo_config(batch_size=9, max_new_tokens=4, reward=reward_folder())
    _, _, batch = fresh_rollout(cfg, iteration=1)
    mask = batch.response_mask
    batch.kl_ref = torch.randn(mask.shape)               # junk outside the mask must not count
    batch.old_values = torch.randn(mask.shape)
    found = measure(batch, torch.arange(9))
    kl, entropy, errors, returns = [], [], [], []
    for b in range(9):
        columns = range(batch.prompt_lengths[b] - 1, batch.lengths[b] - 1)
        kl.append(sum(batch.kl_ref[b, t].item() for t in columns))
        entropy += [batch.entropy[b, t].item() for t in columns]
        returns += [batch.returns[b, t].item() for t in columns]
        errors += [batch.returns[b, t].item() - batch.old_values[b, t].item() for t in columns]
    def variance(x):
        return sum((y - sum(x) / len(x)) ** 2 for y in x) / len(x)
    response_lengths = (batch.lengths - batch.prompt_lengths).tolist()
    assert found == pytest.approx({
        "score": sum(batch.scores.tolist()) / 9, "gold": 4.0,
        "rewards": sum(row.sum().item() for row in batch.rewards) / 9, "kl_ref": sum(kl) / 9,
        "entropy": sum(entropy) / len(entropy),
        "explained_var": 1 - variance(errors) / variance(returns),
        "advantage_std": variance(errors) ** 0.5, "response_len": sum(response_lengths) / 9,
        "end_rate": sum(batch.ended.tolist()) / 9}, rel=1e-4)
    assert measure(batch, None)["gold"] == ""


def test_the_entropy_bonus_gives_gradient_and_raises_entropy():
    for ent_coef in (0.0, 1.0):
        cfg = ppo_config(ent_coef=ent_coef, vf_coef=0.0, epochs=8)
        networks, _, batch = fresh_rollout(cfg)
        batch.advantages = torch.zeros_like(batch.advantages)
        metrics = update(networks, torch.optim.SGD(networks.parameters(), lr=0.1), batch, cfg, 0)
        with torch.no_grad():
            _, _, entropy = networks(batch.ids, batch.response_mask, 1.0)
        gain = (entropy - batch.entropy)[batch.response_mask].mean().item()
        if ent_coef == 0:
            assert metrics["grad_norm"] == 0 and gain == 0
        else:
            assert metrics["grad_norm"] > 0.01 and gain > 0.01


@pytest.mark.parametrize("kl_old_stop", [1e-12, 1e-4])
def test_kl_old_stop_ends_an_update_but_never_before_its_first_step(kl_old_stop):
    cfg = ppo_config(epochs=4, minibatch_size=8, kl_old_stop=kl_old_stop, kl_coef=0.1)
    networks, ref_policy, _ = fresh_rollout(cfg)
    for iteration in range(3):
        batch = rollout(networks, ref_policy, share_of_red, toy_tokenizer(), ragged_prompts(8), cfg,
                        0.1, iteration)
        twin = copy.deepcopy(networks)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.5) for net in (networks, twin)]
        once = dataclasses.replace(cfg, epochs=1, kl_old_stop=0.0)
        # rounding that puts kl_old above a tiny limit before the first step
        batch.old_logprobs = torch.where(batch.response_mask, batch.old_logprobs + 1e-3, 0.0)
        metrics = update(networks, optimizers[0], batch, cfg, iteration)
        update(twin, optimizers[1], batch, once, iteration)
        assert all(math.isfinite(value) for value in metrics.values())
        assert weights_equal(networks, twin)             # exactly one step was taken


def test_a_loss_that_is_not_finite_is_named():
    networks, _, batch = fresh_rollout(ppo_config())
    batch.returns = torch.full_like(batch.returns, math.inf)
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 6, step 0"):
        update(networks, optimizer, batch, ppo_config(), 6)


# ---- prompts and tables --------------------------------------------------------------------------

def test_every_prompt_is_used_once_before_any_comes_again():
    cfg, prompts = ppo_config(batch_size=4), [[i] for i in range(14)]
    drawn = [tuple(p[0] for p in draw_prompts(prompts, cfg, iteration)) for iteration in range(6)]
    for first in (0, 3):                                 # 3 batches of 4 in a pass; 2 left over
        assert len(set(itertools.chain(*drawn[first:first + 3]))) == 12
    assert drawn[:3] != drawn[3:]
    assert drawn == [tuple(p[0] for p in draw_prompts(prompts, cfg, i)) for i in range(6)]


def test_the_token_table_shows_every_token_and_adds_up():
    cfg = ppo_config(temperature=1.3)
    networks, ref_policy = make_networks(cfg)
    with torch.no_grad():
        networks.policy.ln_f.bias.add_(0.05 * torch.arange(32))
    batch = rollout(networks, ref_policy, share_of_red, toy_tokenizer(), ragged_prompts(8), cfg,
                    0.5, iteration=1)
    for row in range(8):
        lines = token_table(batch, row, toy_tokenizer()).split("\n")
        assert lines[1].split() == ["token", "old_logprobs", "ref_logprobs", "kl_ref", "rewards",
                                    "old_values", "advantages", "returns"]
        count = int(batch.lengths[row] - batch.prompt_lengths[row])
        assert len(lines) == 3 + count
        numbers = [[float(x) for x in line[16:].split()[:4]] for line in lines[2:]]
        for column in range(4):
            total = sum(x[column] for x in numbers[:-1])
            assert numbers[-1][column] == pytest.approx(total, abs=0.01)
        _, _, kl_ref, rewards = numbers[-1]
        assert rewards == pytest.approx(batch.scores[row].item() - 0.5 * kl_ref, abs=0.01)
        if batch.ended[row]:
            assert lines[-2].startswith("<|endoftext|>")


# ---- whole runs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("critic", CRITICS)
def test_ppo_raises_the_score(tmp_path, critic):
    cfg = ppo_config(out=str(tmp_path), critic=critic, iterations=12, batch_size=32,
                     minibatch_size=16, max_new_tokens=8, sample_every=6)
    quietly(ppo.main, cfg)
    rows = read_metrics(str(tmp_path))
    assert [row["iteration"] for row in rows] == list(range(12))
    assert rows[0]["kl_ref"] == 0 and rows[-1]["kl_ref"] > 1
    assert rows[0]["score"] < 0.4 and rows[-1]["score"] > rows[0]["score"] + 0.3
    assert all(row["entropy"] > 0 and row["grad_norm"] > 0 and row["ratio_max"] > 1 for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx(
        [learning_rate(i, 12, 5e-3, 3, "linear") for i in range(12)])
    with open(os.path.join(tmp_path, "samples.txt"), encoding="utf-8") as file:
        assert [x for x in file.read().split("\n") if x.startswith("iteration")] == [
            "iteration 0", "iteration 6", "iteration 11"]


def test_ppo_raises_the_score_of_a_reward_model(tmp_path):
    cfg = ppo_config(out=str(tmp_path), reward=reward_folder(), gold="helpers:share_of_red",
                     iterations=10, batch_size=32, minibatch_size=16, max_new_tokens=8)
    before = ScalarModel.from_pretrained(reward_folder())
    quietly(ppo.main, cfg)
    rows = read_metrics(str(tmp_path))
    assert rows[-1]["score"] > rows[0]["score"] + 0.5
    assert all(0 <= row["gold"] <= 1 for row in rows)    # need not follow the score
    assert weights_equal(before, ScalarModel.from_pretrained(reward_folder()))


def watch(monkeypatch, name: str, seen: list) -> None:
    """Record arguments and result of each call of a function of ppo.py."""
    original = getattr(ppo, name)

    def watched(*arguments):
        result = original(*arguments)
        seen.append((arguments, result))
        return result
    monkeypatch.setattr(ppo, name, watched)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_clip_covers_all_that_the_optimiser_owns_and_frozen_networks_stay(
        monkeypatch, tmp_path, critic):
    updates, made, rewards = [], [], []
    watch(monkeypatch, "update", updates)
    watch(monkeypatch, "make_networks", made)
    watch(monkeypatch, "load_reward", rewards)
    quietly(ppo.main, ppo_config(out=str(tmp_path), critic=critic, reward=reward_folder(),
                                 vf_coef=5.0, iterations=3, max_grad_norm=0.05))
    (networks, optimizer, *_), _ = updates[-1]
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == set(networks.parameters())
    assert grad_norm_of(owned) == pytest.approx(0.05, rel=1e-3)
    assert all(metrics["grad_norm"] > 0.06 for _, metrics in updates)
    head = networks.value_head if critic == "shared" else networks.critic.score_head
    assert head.weight.grad.abs().sum() > 0
    (_, (_, ref_policy)), = made
    (_, reward), = rewards
    start = GPT2.from_pretrained(sft_folder())
    assert weights_equal(ref_policy, start) and not weights_equal(networks.policy, start)
    assert weights_equal(reward.models[0], ScalarModel.from_pretrained(reward_folder()))
    for frozen in (ref_policy, reward.models[0]):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_a_gradient_in_a_frozen_network_stops_the_run(monkeypatch, tmp_path):
    original = ppo.load_reward

    def careless(*arguments):
        reward = original(*arguments)
        for p in reward.models[0].parameters():
            p.grad = torch.zeros_like(p)
        return reward
    monkeypatch.setattr(ppo, "load_reward", careless)
    with pytest.raises(AssertionError, match="a frozen network received a gradient"):
        quietly(ppo.main, ppo_config(out=str(tmp_path), reward=reward_folder(), iterations=1))


@pytest.mark.parametrize("critic", CRITICS)
def test_the_saved_policy_and_critic_are_what_was_trained(monkeypatch, tmp_path, critic):
    made = []
    watch(monkeypatch, "make_networks", made)
    quietly(ppo.main, ppo_config(out=str(tmp_path), critic=critic, iterations=3))
    (_, (networks, _)), = made
    ids = torch.randint(END, (3, 9))
    mask = torch.ones(3, 8, dtype=torch.bool)
    with torch.no_grad():
        _, values, _ = networks(ids, mask, 1.0)
        saved = ScalarModel.from_pretrained(str(tmp_path / "critic"))(ids)[:, :-1]
    torch.testing.assert_close(values, saved)
    assert values.abs().max() > 1e-3
    assert weights_equal(networks.policy, GPT2.from_pretrained(str(tmp_path)))
    assert Tokenizer.load(str(tmp_path)).merges == toy_tokenizer().merges


@pytest.mark.parametrize("critic", CRITICS)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, critic):
    folders = [str(tmp_path / name) for name in "abc"]
    for folder, seed in zip(folders, (3, 3, 4)):
        quietly(ppo.main, ppo_config(out=folder, seed=seed, critic=critic))
    models = [GPT2.from_pretrained(folder) for folder in folders]
    metrics = [metrics_without_time(folder) for folder in folders]
    assert metrics[0] == metrics[1] != metrics[2]
    assert weights_equal(models[0], models[1]) and not weights_equal(models[0], models[2])


def test_the_gold_judge_is_logged_and_never_used(tmp_path):
    folders = [str(tmp_path / name) for name in "ab"]
    for folder, gold in zip(folders, ("", "helpers:constant_reward")):
        quietly(ppo.main, ppo_config(out=folder, gold=gold))
    assert weights_equal(*[GPT2.from_pretrained(folder) for folder in folders])
    assert all("gold" not in row for row in read_metrics(folders[0]))
    assert all(row["gold"] == 0.5 for row in read_metrics(folders[1]))


def test_kl_target_adapts_the_coefficient(tmp_path):
    quietly(ppo.main, ppo_config(out=str(tmp_path), iterations=6, kl_target=0.1, kl_horizon=20))
    rows = read_metrics(str(tmp_path))
    expected = 0.02
    for row in rows:
        assert row["kl_coef"] == pytest.approx(expected, rel=1e-5)
        expected = adapt_kl_coef(expected, row["kl_ref"], 0.1, 8, 20)
        shaped = row["score"] - row["kl_coef"] * row["kl_ref"]
        assert row["rewards"] == pytest.approx(shaped, abs=1e-4)
    coefficients = [row["kl_coef"] for row in rows]
    assert coefficients[1] == pytest.approx(0.02 * 0.92) and coefficients[-1] > min(coefficients)


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused():
    with pytest.raises(ValueError, match="--kl_horizon is 7, expected a value from 8"):
        ppo_config(kl_target=1.0, kl_horizon=7)
    ppo_config(kl_horizon=1)                             # without a target it is not used
    assert adapt_kl_coef(0.1, 0.0, 6, 8, 8) > 0


def test_without_a_target_the_coefficient_stays(tmp_path):
    quietly(ppo.main, ppo_config(out=str(tmp_path)))
    assert {row["kl_coef"] for row in read_metrics(str(tmp_path))} == {0.02}


def always_ends(folder: str) -> str:
    """A policy whose every response is the end token alone."""
    model = toy_model()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(1e4 * model.wte.weight[END])
    return save_folder(model, folder)


EDGES = {
    "one prompt at a time": {"batch_size": 1, "minibatch_size": 1},
    "one token, one prompt": {"batch_size": 1, "minibatch_size": 1, "max_new_tokens": 1},
    "one token": {"max_new_tokens": 1},
    "equal prompts": {"prompts": "helpers:equal_prompts"},
    "equal rewards": {"reward": "helpers:constant_reward", "missing_end_penalty": 0.0},
    "the last minibatch is smaller": {"batch_size": 7, "minibatch_size": 4},
    "tiny kl_old_stop": {"kl_old_stop": 1e-12, "epochs": 3},
    "no clip range": {"cliprange": 0.0, "cliprange_value": 0.0},
    "gamma and lam 0": {"gamma": 0.0, "lam": 0.0},
    "no warm-up": {"warmup_iterations": 0, "iterations": 1},
    "low temperature": {"temperature": 0.05},
    "high temperature": {"temperature": 20.0}}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_run_and_stay_finite(tmp_path, edge, critic):
    result = quietly(ppo.main, ppo_config(out=str(tmp_path), critic=critic, **EDGES[edge]))
    assert all(math.isfinite(value) for name, value in result.items() if name != "gold"), result


def test_responses_that_end_at_once_run(tmp_path):
    folder = always_ends(str(tmp_path / "sft"))
    result = quietly(ppo.main, ppo_config(model=folder, out=str(tmp_path / "out")))
    assert result["response_len"] == 1 and result["end_rate"] == 1 and result["entropy"] < 1e-6
    assert all(math.isfinite(value) for name, value in result.items() if name != "gold"), result


def test_prompts_that_leave_no_room_are_dropped_and_counted(tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    long_one = '{"prompt": "' + "Colours " * 30 + '"}\n'
    data.write_text('{"prompt": "Colours for bana?"}\n' * 8 + long_one * 3, encoding="utf-8")
    ppo.main(ppo_config(prompts=str(data), out=str(tmp_path / "out"), iterations=1))
    assert "8 prompts (3 that leave no room for 5 new tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="8 prompts, expected at least the --batch_size of 9"):
        quietly(ppo.main, ppo_config(prompts=str(data), out=str(tmp_path / "out"), batch_size=9))


def test_prompts_that_the_gold_judge_cannot_read_are_refused_before_anything_is_trained(tmp_path):
    cfg = ppo_config(out=str(tmp_path / "out"), gold="minirlhf.world:gold_reward")
    with pytest.raises(ValueError, match="gold judge knows only the prompts of the text world"):
        quietly(ppo.main, cfg)
    assert not (tmp_path / "out").exists()


# ---- runs that go bad ----------------------------------------------------------------------------

def test_the_first_bad_log_probability_is_named_with_its_row():
    cfg = ppo_config(batch_size=8, minibatch_size=8, accumulation=4)
    networks, _, batch = fresh_rollout(cfg)
    with torch.no_grad():
        networks.policy.ln_f.bias[0] = math.nan          # in every row
    order = torch.tensor([5, 2, 0, 7, 1, 3, 4, 6])       # row 5 is the first in the first part
    first = int(batch.prompt_lengths[5]) - 1
    with pytest.raises(FloatingPointError,
                       match=rf"logprobs is not finite at here, index \[5, {first}\]: nan"):
        train_step(networks, torch.optim.SGD(networks.parameters()), batch, order, cfg, True,
                   "here")


def test_a_gradient_that_is_not_finite_is_named():
    layer = torch.nn.Linear(2, 3)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 2), torch.ones(3)
    assert clip_gradients(layer, 1.0, "step 4") == pytest.approx(3.0)
    assert grad_norm_of(layer.parameters()) == pytest.approx(1.0)
    layer.bias.grad[2] = math.inf
    with pytest.raises(FloatingPointError,
                       match=r"gradient of bias is not finite at step 4, index \[2\]: inf"):
        clip_gradients(layer, 1.0, "step 4")
    layer.bias.grad = torch.full((3,), 1e38)             # each is finite, their norm is not
    layer.weight.grad = torch.full((3, 2), 3e38)
    with pytest.raises(FloatingPointError, match="gradient norm overflows at step 4"):
        clip_gradients(layer, 1.0, "step 4")


def test_several_processes_need_a_row_each(monkeypatch):
    monkeypatch.setattr(ppo.parallel, "processes", lambda: 5)
    with pytest.raises(ValueError, match="--minibatch_size 4 is smaller than the number of "
                                         "processes, 5"):
        quietly(ppo.collect_prompts, ppo_config(), toy_tokenizer(), 32)
