"""ppo.py: formulas by hand, by slow references, by enumeration; rollouts; runs that learn."""

import copy
import dataclasses
import itertools
import math
import os
import random
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    grad_norm_of,
    metrics_without_time,
    ppo_config,
    quietly,
    reward_folder,
    save_folder,
    sft_folder,
    share_of_red,
    torchrun,
    toy_model,
    toy_tokenizer,
    weights_equal,
)
from precision import EXPECTED_DTYPES, record_dtypes
from rollouts import CRITICS, fresh_rollout, ragged_prompts, with_shared_critic

from minirlhf import ppo
from minirlhf.data import encode_prompt, format_prompt, response_mask
from minirlhf.engine import training
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.training import learning_rate, masked_mean, random_stream, whiten
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue, ScalarModel, token_logprobs
from minirlhf.ppo import (
    Rollout,
    forward_pass,
    gae,
    make_networks,
    minibatches,
    policy_loss,
    rollout,
    shaped_rewards,
    update,
    value_loss,
)
from minirlhf.ppo_report import TOLERANCE, totals
from minirlhf.rewards import adapt_kl_coef, load_reward
from minirlhf.tokenizer import Tokenizer

END = toy_tokenizer().end_token


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
    (2, 5, "ends with the end token, then padding"), (2, 7, "no end token: cut at the limit"),
    (2, 3, "ends at once: a response of one token"), (6, 7, "one token, at the end of the row"),
    (1, 2, "a prompt of one token")])
def test_the_score_is_exactly_at_the_last_action(prompt, length, case):
    mask = response_mask(torch.tensor([prompt, 3]), torch.tensor([length, 6]), 7)   # (2, 6)
    rewards = shaped_rewards(torch.tensor([1.0, 2.0]), torch.zeros(2, 6), mask, 0.1)
    expected = torch.zeros(2, 6)
    expected[0, length - 2] = 1.0                        # the action ids[length-1]
    expected[1, 4] = 2.0
    assert torch.equal(rewards, expected), case


def test_without_a_coefficient_the_reward_is_the_score_alone():
    mask = ragged_masks(0)
    rewards = shaped_rewards(torch.ones(6), torch.randn(mask.shape), mask, 0.0)
    assert (rewards != 0).sum(dim=1).tolist() == [1] * 6 and rewards.sum() == 6


def test_scores_per_token_are_paid_where_they_stand_and_never_outside_the_mask():
    mask = torch.tensor([[False, True, True, True, False]])
    scores = torch.tensor([[math.nan, 0.5, 0.0, 2.0, math.inf]])
    kl_ref = torch.tensor([[0.0, 0.1, 0.2, -0.3, 0.0]])
    rewards = shaped_rewards(scores, kl_ref, mask, 0.1)
    assert rewards.tolist() == [pytest.approx([0, 0.49, -0.02, 2.03, 0])]
    assert totals(scores, mask).tolist() == [2.5]


def test_zeros_with_the_score_at_the_last_action_are_the_score():
    mask = ragged_masks(5)
    scores, kl_ref = torch.randn(6), torch.randn(mask.shape)
    placed = torch.zeros(mask.shape)
    for b in range(6):
        placed[b, mask[b].nonzero().max()] = scores[b]
    assert torch.equal(shaped_rewards(placed, kl_ref, mask, 0.1),
                       shaped_rewards(scores, kl_ref, mask, 0.1))
    assert torch.equal(totals(placed, mask), scores) and totals(scores, mask) is scores


# ---- GAE -----------------------------------------------------------------------------------------

HAND = {"rewards": [-0.1, -0.2, 1.0], "values": [0.5, 0.4, 0.6]}


def test_gae_hand_example():
    mask = torch.ones(1, 3) > 0
    advantages, returns = gae(double(HAND["rewards"]), double(HAND["values"]), mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.161, 0.38, 0.4])
    assert returns[0].tolist() == pytest.approx([0.661, 0.78, 1.0])


def test_the_hand_example_with_a_prompt_before_and_padding_after():
    mask = torch.tensor([[False, False, True, True, True, False]])
    rewards, values = double([9, 9, -0.1, -0.2, 1.0, 9]), double([9, 9, 0.5, 0.4, 0.6, 9])
    advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0, 0, 0.161, 0.38, 0.4, 0])
    assert returns[0].tolist() == pytest.approx([0, 0, 0.661, 0.78, 1.0, 0])


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
    result, ratios = policy_loss(logprobs, double([-2, 3]), double([advantage, 5]),
                                torch.tensor([[True, False]]), 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss) and ratios[0, 0].item() == pytest.approx(ratio)
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
    result = value_loss(values, double([old, 3]), double([target, -9]), mask, 0.2)
    result.backward()
    assert result.item() == pytest.approx(loss)
    assert values.grad[0].tolist() == pytest.approx([slope, 0])


def test_value_loss_gradcheck():
    mask = ragged_masks(4)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(mask.shape, dtype=torch.float64, generator=generator, requires_grad=True)
    old_values = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    returns = torch.randn(mask.shape, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old_values, returns, mask, 0.2), values)


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
    responses = []
    for length in range(1, limit + 1):
        for head in itertools.product((0, 1), repeat=length - 1):
            responses += [head + (last,) for last in ((0, 1, 2) if length == limit else (2,))]
    return responses


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
    B = 4000
    cfg = ppo_config(max_new_tokens=limit, temperature=temperature, batch_size=B,
                     minibatch_size=B)
    batch = rollout(with_shared_critic(policy), ref_policy, zero_reward,
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
        logprobs, values, entropy = networks.evaluate_actions(ids, mask, 1.0)
    advantages = torch.where(mask, torch.linspace(-1, 2, 18).view(9, 2), 0.0)
    nothing = torch.zeros(9, 2)
    return Rollout(ids, prompt_lengths, lengths, ids[:, 1] == 2, mask, sampled_logprobs=logprobs,
                   old_logprobs=logprobs, ref_logprobs=logprobs, old_values=values, entropy=entropy,
                   scores=torch.zeros(9), kl_ref=nothing, rewards=nothing, advantages=advantages,
                   returns=values)


def test_expected_kl_old_is_the_exact_kl_of_the_rollout_policy_to_the_updated_one():
    policy = small_model(0, 1)
    with torch.no_grad():
        policy.wte.weight.zero_()                        # all logits 0: the uniform policy
    networks, kl_old = with_shared_critic(policy), {}
    for epochs in (1, 2):                                # the second epoch measures after one step
        cfg = ppo_config(batch_size=9, minibatch_size=9, epochs=epochs, max_grad_norm=1e6)
        trained = copy.deepcopy(networks)
        optimizer = torch.optim.SGD(trained.parameters(), lr=2.0)
        metrics = update(trained, optimizer, uniform_batch(networks, cfg), cfg, 1)
        kl_old[epochs] = metrics["kl_old"]
        if epochs == 1:
            exact, length = exact_kl(policy, trained.policy, [2], 2, 1.0)
            reverse, _ = exact_kl(trained.policy, policy, [2], 2, 1.0)
    assert kl_old[1] == pytest.approx(0, abs=1e-7)
    assert exact > 0.01 and abs(exact - reverse) > 1e-3 * exact
    assert 2 * kl_old[2] == pytest.approx(exact / length, rel=1e-4)       # mean of 0 and of this


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

def test_a_rollout_has_every_score_at_its_last_action():
    _, _, batch = fresh_rollout(ppo_config(batch_size=32, max_new_tokens=4), kl_coef=0.0)
    assert batch.ended.any() and not batch.ended.all()
    assert (batch.lengths - batch.prompt_lengths).unique().numel() >= 3
    for b, length in enumerate(batch.lengths.tolist()):
        expected = torch.zeros(batch.rewards.shape[1])
        expected[length - 2] = batch.scores[b]           # kl_coef is 0
        assert torch.equal(batch.rewards[b], expected)
        assert (batch.ids[b, length - 1] == END) == batch.ended[b]


def test_the_rollout_holds_what_the_alignment_law_says():
    networks, ref_policy, batch = fresh_rollout(ppo_config(reward=reward_folder(), temperature=0.8))
    networks.critic.score_head.weight.data.normal_()
    with torch.no_grad():
        logprobs, values, _ = networks.evaluate_actions(batch.ids, batch.response_mask, 0.8)
        for b in range(len(batch.ids)):
            alone = batch.ids[b:b + 1, :batch.lengths[b]]                           # (1, length)
            table = (networks.policy(alone)[0] / 0.8).log_softmax(1)                # (length, V)
            critic = networks.critic(alone)[0]                                      # (length,)
            for t in range(batch.prompt_lengths[b] - 1, batch.lengths[b] - 1):
                action = alone[0, t + 1]
                assert logprobs[b, t].item() == pytest.approx(table[t, action].item(), abs=1e-4)
                assert values[b, t].item() == pytest.approx(critic[t].item(), abs=1e-4)
    assert (values[~batch.response_mask] == 0).all()
    torch.testing.assert_close(batch.old_logprobs, logprobs, rtol=0, atol=1e-5)
    assert torch.equal(batch.kl_ref, batch.old_logprobs - batch.ref_logprobs)
    assert batch.kl_ref.abs().max() < 1e-5


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_forward_pass_in_parts_equals_one_pass(critic, accumulation, monkeypatch):
    """In no pass are more rows at a time than in one of the update's; 3 + 3 + 2 of 8, for example.

    The memory that an update has must be enough for a rollout.
    """
    parts = ppo_config(critic=critic, reward=reward_folder(), minibatch_size=3,
                       accumulation=accumulation, temperature=0.8)
    networks, ref_policy, batch = fresh_rollout(parts)
    with torch.no_grad():
        networks.critic.score_head.weight.normal_()
        ref_policy.ln_f.bias.add_(0.05 * torch.arange(32))
    rows, original = [], GPT2.hidden

    def counted(self, ids, cache=None):
        rows.append(len(ids))
        return original(self, ids, cache)

    monkeypatch.setattr(GPT2, "hidden", counted)
    whole = dataclasses.replace(parts, minibatch_size=8, accumulation=1)
    results = []
    for cfg, most in ((parts, -(-3 // accumulation)), (whole, 8)):
        rows.clear()
        with torch.no_grad():
            results.append(forward_pass(networks, ref_policy, batch.ids, batch.response_mask, cfg))
        assert max(rows) == most and sum(rows) == 8 * (3 if critic == "separate" else 2)
    for one, other in zip(*results, strict=True):
        assert one.shape == batch.response_mask.shape and one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_missing_end_penalty_is_for_rows_that_did_not_end():
    usual = {"batch_size": 32, "max_new_tokens": 4}
    _, _, free = fresh_rollout(ppo_config(missing_end_penalty=0.0, **usual))
    _, _, taxed = fresh_rollout(ppo_config(missing_end_penalty=5.0, **usual))
    assert torch.equal(free.ids, taxed.ids) and free.ended.any() and not free.ended.all()
    torch.testing.assert_close(free.scores - taxed.scores, 5.0 * (~free.ended).float())
    limit = free.lengths - free.prompt_lengths == 4
    assert (limit & free.ended).any()                    # ended with the last token: no penalty


def red_per_token(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """1 for every word red of a response, and numbers elsewhere that must not count."""
    (red,) = tokenizer.encode(" red")
    return (ids[:, 1:] == red).float() + 100 * ~response_mask(prompt_lengths, lengths, ids.shape[1])


def score_at_the_end(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """`share_of_red` as a reward per token."""
    scores = torch.zeros(ids.shape[0], ids.shape[1] - 1)
    scores[torch.arange(len(ids)), lengths - 2] = share_of_red(ids, prompt_lengths, lengths,
                                                               tokenizer)
    return scores


def test_a_reward_per_token_is_paid_at_its_token_and_the_last_one_pays_the_missing_end():
    cfg = ppo_config(batch_size=32, max_new_tokens=4, missing_end_penalty=3.0)
    networks, ref_policy = make_networks(cfg)
    batch = rollout(networks, ref_policy, red_per_token, toy_tokenizer(), ragged_prompts(32), cfg,
                    0.02, 0)
    (red,) = toy_tokenizer().encode(" red")
    assert batch.ended.any() and not batch.ended.all() and batch.scores.shape == (32,)
    for b in range(32):
        response = batch.ids[b, batch.prompt_lengths[b]:batch.lengths[b]]
        expected = (response == red).float()
        expected[-1] -= 3.0 * (not batch.ended[b])
        rewards = batch.rewards[b] + 0.02 * batch.kl_ref[b]
        assert rewards[batch.response_mask[b]].tolist() == pytest.approx(expected.tolist())
        assert (batch.rewards[b][~batch.response_mask[b]] == 0).all()
        assert batch.scores[b].item() == pytest.approx(expected.sum().item())


def test_a_run_with_the_score_placed_by_the_reward_is_the_same_run(tmp_path):
    folders = [str(tmp_path / name) for name in ("placed", "plain")]
    for folder, reward in zip(folders, (f"{__name__}:score_at_the_end", "helpers:share_of_red")):
        quietly(ppo.main, ppo_config(out=folder, reward=reward, max_new_tokens=4, iterations=3))
    assert weights_equal(*[load_network(GPT2, folder) for folder in folders])
    assert metrics_without_time(folders[0]) == metrics_without_time(folders[1])


def test_the_first_values_are_0_and_a_separate_critic_has_the_reward_models_trunk():
    for critic in CRITICS:
        networks, _, batch = fresh_rollout(ppo_config(critic=critic, reward=reward_folder()))
        assert (batch.old_values == 0).all()
    networks, _ = make_networks(ppo_config(reward=reward_folder()))
    rewarding = load_network(ScalarModel, reward_folder())
    assert weights_equal(networks.critic.transformer, rewarding.transformer)
    networks, ref_policy = make_networks(ppo_config(reward="helpers:share_of_red"))
    assert weights_equal(networks.critic.transformer, networks.policy)
    assert weights_equal(ref_policy, networks.policy)
    assert networks.critic.transformer.wte.weight is not networks.policy.wte.weight


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
                values = networks.critic(ids)[0]                                    # (length,)
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


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("critic", CRITICS)
def test_update_equals_a_slow_reference_on_a_ragged_batch(critic, accumulation):
    cfg = ppo_config(critic=critic, batch_size=7, minibatch_size=3, epochs=2, ent_coef=0.01,
                     vf_coef=0.5, temperature=0.9, max_grad_norm=0.5, accumulation=accumulation)
    networks, _, batch = fresh_rollout(cfg)
    twin = copy.deepcopy(networks)
    metrics = update(networks, torch.optim.SGD(networks.parameters(), lr=0.3), batch, cfg, 5)
    expected = slow_update(twin, torch.optim.SGD(twin.parameters(), lr=0.3), batch, cfg, 5)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert metrics["clipfrac"] > 0 and metrics["kl_old"] > 1e-3 and metrics["grad_norm"] > 0.5
    for one, other in zip(networks.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_entropy_bonus_gives_gradient_and_raises_entropy():
    for ent_coef in (0.0, 1.0):
        cfg = ppo_config(ent_coef=ent_coef, vf_coef=0.0, epochs=8)
        networks, _, batch = fresh_rollout(cfg)
        batch.advantages = torch.zeros_like(batch.advantages)
        metrics = update(networks, torch.optim.SGD(networks.parameters(), lr=0.1), batch, cfg, 0)
        with torch.no_grad():
            _, _, entropy = networks.evaluate_actions(batch.ids, batch.response_mask, 1.0)
        gain = (entropy - batch.entropy)[batch.response_mask].mean().item()
        if ent_coef == 0:
            assert metrics["grad_norm"] == 0 and abs(gain) < 1e-6
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
        for one, other in zip(networks.parameters(), twin.parameters()):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)    # exactly one step


def test_a_loss_that_is_not_finite_is_named():
    networks, _, batch = fresh_rollout(ppo_config())
    batch.returns = torch.full_like(batch.returns, math.inf)
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 6, step 0"):
        update(networks, optimizer, batch, ppo_config(), 6)


def test_the_first_bad_log_probability_is_named_with_its_row():
    cfg = ppo_config(batch_size=8, minibatch_size=8, accumulation=4)
    networks, _, batch = fresh_rollout(cfg)
    with torch.no_grad():
        networks.policy.ln_f.bias[0] = math.nan          # in every row
    row = int(minibatches(cfg, 6)[0][0])                 # the first row of the first part
    column = int(batch.prompt_lengths[row]) - 1
    with pytest.raises(FloatingPointError, match=rf"logprobs is not finite at iteration 6, step 0, "
                                                 rf"index \[{row}, {column}\]: nan"):
        update(networks, torch.optim.SGD(networks.parameters()), batch, cfg, 6)


# ---- whole runs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("critic", CRITICS)
def test_ppo_raises_the_score(tmp_path, critic):
    cfg = ppo_config(out=str(tmp_path), critic=critic, iterations=12, batch_size=32,
                     minibatch_size=16, max_new_tokens=8, sample_every=6)
    quietly(ppo.main, cfg)
    rows = read_metrics(str(tmp_path))
    assert [row["iteration"] for row in rows] == list(range(12))
    assert abs(rows[0]["kl_ref"]) < 1e-4 and rows[-1]["kl_ref"] > 1
    assert rows[0]["score"] < 0.4 and rows[-1]["score"] > rows[0]["score"] + 0.3
    assert all(row["entropy"] > 0 and row["grad_norm"] > 0 and row["ratio_max"] > 1 for row in rows)
    assert [row["lr"] for row in rows] == pytest.approx(
        [learning_rate(i, 12, 5e-3, 3, "linear") for i in range(12)])
    with open(os.path.join(tmp_path, "samples.txt"), encoding="utf-8") as file:
        assert [x for x in file.read().split("\n") if x.startswith("iteration")] == [
            "iteration 0", "iteration 6", "iteration 11"]


def test_ppo_raises_the_score_of_a_reward_model(tmp_path):
    cfg = ppo_config(out=str(tmp_path), reward=reward_folder(), iterations=10, batch_size=32,
                     minibatch_size=16, max_new_tokens=8)
    before = load_network(ScalarModel, reward_folder())
    quietly(ppo.main, cfg)
    rows = read_metrics(str(tmp_path))
    assert rows[-1]["score"] > rows[0]["score"] + 0.5
    assert weights_equal(before, load_network(ScalarModel, reward_folder()))


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
    updates, made, rewards, reward_model = [], [], [], reward_folder()    # trained unwatched
    watch(monkeypatch, "update", updates)
    watch(monkeypatch, "make_networks", made)
    watch(monkeypatch, "load_reward", rewards)
    norms, head_norms, optimiser_step = [], [], training.optimiser_step

    def noted(networks, optimizer, *rest):
        before = optimiser_step(networks, optimizer, *rest)
        norms.append(grad_norm_of(p for group in optimizer.param_groups for p in group["params"]))
        head_norms.append(grad_norm_of([networks.critic.score_head.weight]))
        return before

    monkeypatch.setattr(training, "optimiser_step", noted)
    quietly(ppo.main, ppo_config(out=str(tmp_path), critic=critic, reward=reward_model,
                                 vf_coef=5.0, iterations=3, max_grad_norm=0.05))
    (networks, optimizer, *_), _ = updates[-1]
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(owned) == len(set(owned)) and set(owned) == set(networks.parameters())
    assert norms == pytest.approx([0.05] * len(norms), rel=1e-3) and len(norms) > 3
    assert all(metrics["grad_norm"] > 0.06 for _, metrics in updates)
    assert min(head_norms) > 0
    (_, (_, ref_policy)), = made
    (_, reward), = rewards
    start = load_network(GPT2, sft_folder())
    assert weights_equal(ref_policy, start) and not weights_equal(networks.policy, start)
    assert weights_equal(reward.models[0], load_network(ScalarModel, reward_folder()))
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
    critic_folder = str(tmp_path / "critic")
    with torch.no_grad():
        _, values, _ = networks.evaluate_actions(ids, mask, 1.0)
        saved = load_network(ScalarModel, critic_folder)(ids)[:, :-1]
    torch.testing.assert_close(values, saved)
    assert values.abs().max() > 1e-3
    assert weights_equal(networks.policy, load_network(GPT2, str(tmp_path)))
    assert Tokenizer.load(str(tmp_path)).merges == toy_tokenizer().merges
    # a checkpoint folder like any other: it can serve as a reward model
    again, = load_reward(critic_folder, "mean", toy_tokenizer()).models
    assert weights_equal(networks.critic, again)


@pytest.mark.parametrize("critic", CRITICS)
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, critic):
    folders = [str(tmp_path / name) for name in "abc"]
    for folder, seed in zip(folders, (3, 3, 4)):
        quietly(ppo.main, ppo_config(out=folder, seed=seed, critic=critic))
    models = [load_network(GPT2, folder) for folder in folders]
    metrics = [metrics_without_time(folder) for folder in folders]
    assert metrics[0] == metrics[1] != metrics[2]
    assert weights_equal(models[0], models[1]) and not weights_equal(models[0], models[2])


def test_the_gold_judge_is_logged_and_never_used(tmp_path):
    folders = [str(tmp_path / name) for name in "ab"]
    for folder, gold in zip(folders, ("", "helpers:constant_reward")):
        quietly(ppo.main, ppo_config(out=folder, gold=gold))
    assert weights_equal(*[load_network(GPT2, folder) for folder in folders])
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


def test_an_adaptive_run_goes_on_with_the_coefficient_that_it_would_have_had(monkeypatch, tmp_path):
    options = {"iterations": 6, "save_every": 2, "kl_target": 0.1, "kl_horizon": 20}
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    quietly(ppo.main, ppo_config(out=whole, **options))
    calls, original = [], ppo.rollout

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "rollout", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quietly(ppo.main, ppo_config(out=stopped, **options))
    quietly(ppo.main, ppo_config(out=stopped, resume=True, **options))
    coefficients = [row["kl_coef"] for row in read_metrics(stopped)]
    assert coefficients == [row["kl_coef"] for row in read_metrics(whole)]
    assert len(set(coefficients)) == 6                   # it moved in every iteration
    rows = [read_json(os.path.join(folder, "run.json"))["row"] for folder in (stopped, whole)]
    assert rows[0] == rows[1]                            # to the last digit, which a table has not


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused():
    with pytest.raises(ValueError, match="--kl_horizon is 7, expected at least the --batch_size "
                                         "of 8"):
        ppo_config(kl_target=1.0, kl_horizon=7)
    ppo_config(kl_horizon=1)                             # without a target it is not used


def test_without_a_target_the_coefficient_stays(tmp_path):
    quietly(ppo.main, ppo_config(out=str(tmp_path)))
    assert {row["kl_coef"] for row in read_metrics(str(tmp_path))} == {0.02}


@pytest.mark.parametrize("critic", CRITICS)
def test_in_its_warm_up_only_the_critic_learns(tmp_path, monkeypatch, critic):
    """A shared critic is then its head alone: the trunk is the policy's."""
    before, after, original = [], [], ppo.update

    def noted(networks, *rest):
        before.append(copy.deepcopy(networks))
        metrics = original(networks, *rest)
        after.append(copy.deepcopy(networks))
        return metrics

    monkeypatch.setattr(ppo, "update", noted)
    quietly(ppo.main, ppo_config(out=str(tmp_path), critic=critic, iterations=4, critic_warmup=2))
    for iteration, (one, other) in enumerate(zip(before, after)):
        warm = iteration < 2
        assert weights_equal(one.policy, other.policy) == warm
        assert not torch.equal(one.critic.score_head.weight, other.critic.score_head.weight)
        if critic == "separate":
            assert not weights_equal(one.critic.transformer, other.critic.transformer)
    rows = read_metrics(str(tmp_path))
    assert [abs(row["kl_ref"]) < 1e-5 for row in rows] == [True, True, True, False]
    assert [row["kl_old"] < 1e-9 for row in rows] == [True, True, False, False]
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("save_every", [1, 3])
def test_a_run_that_stops_during_or_after_the_warm_up_goes_on_bit_for_bit(
        tmp_path, monkeypatch, critic, save_every):
    options = {"critic": critic, "iterations": 5, "critic_warmup": 2, "save_every": save_every}
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    quietly(ppo.main, ppo_config(out=whole, **options))
    original = ppo.rollout

    def interrupted(*arguments):
        if arguments[-1] == save_every:                  # an iteration of the warm-up, or after it
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "rollout", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quietly(ppo.main, ppo_config(out=stopped, **options))
    quietly(ppo.main, ppo_config(out=stopped, resume=True, **options))
    assert weights_equal(*[load_network(GPT2, folder) for folder in (whole, stopped)])
    assert metrics_without_time(whole) == metrics_without_time(stopped)


def test_two_processes_that_warm_up_their_critic_equal_one(tmp_path):
    cfg = ppo_config(out=str(tmp_path / "one"), critic_warmup=2, iterations=4)
    quietly(ppo.main, cfg)
    torchrun("ppo", dataclasses.replace(cfg, out=str(tmp_path / "two")))
    one, two = [load_network(GPT2, str(tmp_path / name)) for name in ("one", "two")]
    for first, second in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(first, second, rtol=0, atol=2e-4)


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
    "warm-up only": {"critic_warmup": 2, "iterations": 2, "ent_coef": 0.1},
    "low temperature": {"temperature": 0.05},
    "high temperature": {"temperature": 20.0}}


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_run_and_stay_finite(tmp_path, edge, critic):
    result = quietly(ppo.main, ppo_config(out=str(tmp_path), critic=critic, **EDGES[edge]))
    assert all(math.isfinite(value) for name, value in result.items() if name != "gold"), result


SHORT = 20                          # positions; the toy models have 32


@pytest.mark.parametrize("short", ["policy", "reward model", "second reward model"])
@pytest.mark.parametrize("critic", CRITICS)
def test_prompts_are_limited_by_the_smallest_context_of_all_networks(tmp_path, capsys, short,
                                                                     critic):
    """A response of 5 tokens to any prompt that is kept fits into every network, just."""
    folders = {}
    for seed, name in enumerate(("reward model", "second reward model")):
        config = toy_model(n_positions=SHORT if name == short else 32).config
        torch.manual_seed(seed)
        folders[name] = save_folder(ScalarModel(config), str(tmp_path / name))
    policy = sft_folder()
    if short == "policy":
        policy = save_folder(toy_model(n_positions=SHORT), str(tmp_path / "policy"))
    data = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "' + "Colours " * count + '"}\n' for count in (9, 10)]
    lengths = [len(encode_prompt(toy_tokenizer(), format_prompt("Colours " * n))) for n in (9, 10)]
    assert lengths == [SHORT - 5, SHORT - 4]
    data.write_text(lines[0] * 8 + lines[1] * 3, encoding="utf-8")
    ppo.main(ppo_config(model=policy, reward=",".join(folders.values()), prompts=str(data),
                        critic=critic, out=str(tmp_path / "out"), iterations=3))
    words = f"8 prompts (3 that leave no room for 5 new tokens in the context of {SHORT} dropped)"
    assert words in capsys.readouterr().out


def test_prompts_that_the_gold_judge_cannot_read_are_refused_before_anything_is_trained(tmp_path):
    cfg = ppo_config(out=str(tmp_path / "out"), gold="minirlhf.world:gold_reward")
    with pytest.raises(ValueError, match="gold judge knows only the prompts of the text world"):
        quietly(ppo.main, cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("critic", CRITICS)
def test_bfloat16_is_of_the_layers_products_alone(monkeypatch, tmp_path, critic):
    """Sampling, rollout and update; the run itself checks that they agree."""
    cfg = ppo_config(dtype="bfloat16", reward=reward_folder(), critic=critic, out=str(tmp_path),
                     iterations=3)
    dtypes = record_dtypes(monkeypatch)
    quietly(ppo.main, cfg)
    assert dtypes == EXPECTED_DTYPES
    rows = read_metrics(cfg.out)
    for row in rows:
        assert row["ratio_first"] < TOLERANCE["bfloat16"]
        shaped = row["score"] - row["kl_coef"] * row["kl_ref"]
        assert row["rewards"] == pytest.approx(shaped, abs=1e-4)
    assert abs(rows[0]["kl_ref"]) < 1e-3 < abs(rows[-1]["kl_ref"])
