"""siblings/groups.py: vectors, exact enumeration on a bandit, slow references, runs that learn."""

import itertools
import math

import pytest
import torch
from helpers import torchrun, toy_tokenizer
from rollouts import ragged_prompts
from sibling_runs import files_of, groups_config, run, stop, with_reward_model

from minirlhf import ppo
from minirlhf.engine.metrics import read_metrics
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
from minirlhf.ppo import gae, policy_loss
from minirlhf.rewards import load_reward
from minirlhf.siblings import groups
from minirlhf.siblings.groups import (
    GroupsConfig,
    PolicyAlone,
    all_equal,
    group_advantages,
    k3_to_reference,
    token_weights,
)

METHODS = ("rloo", "grpo", "dr_grpo", "reinforce_pp")
OF_A_GROUP = METHODS[:3]
EIGHT = torch.tensor([1.0, 0, 0, 1, 0, 0, 1, 0])


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- advantages ----------------------------------------------------------------------------------

@pytest.mark.parametrize("method, high, low", [
    ("rloo", 0.7143, -0.4286), ("grpo", 1.2076, -0.7246), ("dr_grpo", 0.625, -0.375)])
def test_advantages_of_three_right_ones_among_eight(method, high, low):
    expected = [high if reward else low for reward in EIGHT.tolist()]
    assert group_advantages(method, EIGHT, 8).tolist() == pytest.approx(expected, abs=5e-5)


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    rewards = torch.randn(12, dtype=torch.float64)
    advantages = group_advantages("rloo", rewards, 4)
    for row in range(12):
        first = row - row % 4
        others = [rewards[i].item() for i in range(first, first + 4) if i != row]
        assert advantages[row].item() == pytest.approx(rewards[row].item() - sum(others) / 3)
    torch.testing.assert_close(advantages, 4 / 3 * group_advantages("dr_grpo", rewards, 4))


@pytest.mark.parametrize("method", OF_A_GROUP)
def test_a_constant_added_to_a_groups_rewards_changes_nothing(method):
    rewards = torch.randn(12, dtype=torch.float64)
    shift = double(100.0, 0.0, -7.0).repeat_interleave(4)
    torch.testing.assert_close(group_advantages(method, rewards + shift, 4),
                               group_advantages(method, rewards, 4))


def test_groups_are_neighbours_and_do_not_mix():
    alone = [group_advantages("grpo", part, 4) for part in EIGHT.split(4)]
    assert torch.equal(group_advantages("grpo", EIGHT, 4), torch.cat(alone))


def test_grpo_of_a_pair_forgets_how_far_the_rewards_are_apart():
    for gap in (0.01, 1.0, 1000.0):
        advantages = group_advantages("grpo", torch.tensor([0.0, gap]), 2)
        assert advantages.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


@pytest.mark.parametrize("method", OF_A_GROUP)
@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [0.0, 0.0, 0.0], [-1e4, -1e4, -1e4],
                                     [0.7, 0.7 + 1e-6, 0.7]])
def test_groups_of_equal_rewards_give_exactly_0(method, rewards):
    both = torch.tensor(rewards + [0.0, 1.0, 2.0])
    advantages = group_advantages(method, both, 3)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    assert advantages[3] < 0 < advantages[5]
    assert all_equal(both.view(2, 3)).tolist() == [True, False]


# ---- exact enumeration on a bandit ---------------------------------------------------------------

LOGITS, REWARD = double(0.3, -0.5, 0.1, 0.8), double(1.0, 0.0, 3.0, 0.5)


def grad_of_expected_reward() -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad((logits.softmax(0) * REWARD).sum(), logits)[0]


def mean_gradient(method: str, k: int) -> torch.Tensor:
    """The mean over all 4^k groups of minus the gradient of the method's loss, by our functions."""
    logits = LOGITS.clone().requires_grad_()
    actions = torch.tensor(list(itertools.product(range(4), repeat=k)))             # (4^k, k)
    chance = LOGITS.softmax(0)[actions].prod(dim=1)                                 # (4^k,)
    logprobs = logits.log_softmax(0)[actions].view(-1, 1)        # (4^k * k, 1): rows of one token
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    advantages = group_advantages(method, REWARD[actions].view(-1), k)[:, None]
    weights = token_weights(method, mask[:k], longest=1)         # of one group, the same for all
    weights = chance.repeat_interleave(k)[:, None] * weights.double().repeat(len(actions), 1)
    loss, _ = policy_loss(logprobs, logprobs.detach(), weights * advantages, mask, math.inf, 1)
    return -torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_mean_gradient_of_rloo_is_that_of_the_expected_reward(k):
    torch.testing.assert_close(mean_gradient("rloo", k), grad_of_expected_reward())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_a_baseline_that_holds_the_response_itself_gives_k_minus_1_of_k(k):
    torch.testing.assert_close(mean_gradient("dr_grpo", k), (k - 1) / k * grad_of_expected_reward())


@pytest.mark.parametrize("k", [2, 3, 4])
def test_grpos_mean_gradient_points_elsewhere(k):
    exact, mean = grad_of_expected_reward(), mean_gradient("grpo", k)
    cosine = torch.nn.functional.cosine_similarity(exact, mean, dim=0).item()
    assert 0.9 < cosine < 0.995


# ---- weights of tokens ---------------------------------------------------------------------------

TWO_AND_EIGHT = torch.arange(8) < torch.tensor([[2], [8]])                          # (2, 8)


@pytest.mark.parametrize("method, short, long", [
    ("rloo", 1 / 2, 1 / 2), ("grpo", 1 / 4, 1 / 16), ("dr_grpo", 1 / 20, 1 / 20),
    ("reinforce_pp", 1 / 10, 1 / 10)])
def test_what_a_token_of_a_short_and_of_a_long_response_weighs(method, short, long):
    weights = token_weights(method, TWO_AND_EIGHT, longest=10)
    expected = torch.where(TWO_AND_EIGHT, torch.tensor([[short], [long]]), 0.0)
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("method, times", [("grpo", 4.0), ("dr_grpo", 1.0)])
def test_with_one_advantage_below_0_grpo_spares_the_tokens_of_the_long_response(method, times):
    """The length effect, in gradients: why wrong answers grow longer under GRPO."""
    logprobs = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    advantages = torch.where(TWO_AND_EIGHT, -0.7, 0.0)
    weights = token_weights(method, TWO_AND_EIGHT, longest=10)
    loss, _ = policy_loss(logprobs, logprobs.detach(), weights * advantages, TWO_AND_EIGHT, 0.2, 1)
    loss.backward()
    of_short, of_long = logprobs.grad[0, :2], logprobs.grad[1]
    assert (of_short > 0).all() and (of_long > 0).all()
    torch.testing.assert_close(of_short, times * of_long[:2])
    assert (logprobs.grad[~TWO_AND_EIGHT] == 0).all()


def test_k3_to_the_reference_hand_example_and_gradcheck():
    assert k3_to_reference(double(-1.0), double(-2.0)).item() == pytest.approx(math.exp(-1))
    assert (k3_to_reference(torch.randn(50), torch.randn(50)) >= -1e-6).all()
    logprobs = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(k3_to_reference, (logprobs, torch.randn(3, 4).double()))


# ---- rollout and update --------------------------------------------------------------------------

def fresh(cfg: GroupsConfig, moved: float = 0.0):
    """Networks, reference and a rollout; the policy differs from its reference by noise."""
    torch.manual_seed(0)
    networks, ref_policy = PolicyAlone(load_network(GPT2, cfg.model)), load_network(GPT2, cfg.model)
    with torch.no_grad():
        for weights in networks.parameters():
            weights += moved * torch.randn_like(weights)
    reward = load_reward(cfg.reward, cfg.ensemble, toy_tokenizer())
    prompts = ragged_prompts(cfg.batch_size // cfg.k)
    batch = groups.rollout(networks, ref_policy.requires_grad_(False), reward, toy_tokenizer(),
                           prompts, cfg, iteration=1)
    return networks, batch


def slow_gradient(networks: PolicyAlone, batch, cfg: GroupsConfig) -> list[torch.Tensor]:
    """The gradient of the method's loss by its definition, response by response, at ratio 1."""
    B, tokens, totals = cfg.batch_size, int(batch.response_mask.sum()), []
    for row in range(B):
        kl = batch.kl_ref[row].sum().item()
        totals.append(batch.scores[row].item() - cfg.kl_coef * kl * (cfg.method == "rloo"))
    to_go = []                                           # REINFORCE++: R - kl_coef * kl to go
    for row in range(B):
        columns = batch.response_mask[row].nonzero().squeeze(1).tolist()
        to_go += [batch.scores[row].item() - cfg.kl_coef * batch.kl_ref[row, t:].sum().item()
                  for t in columns]
    mean = sum(to_go) / tokens
    deviation = math.sqrt(sum((x - mean) ** 2 for x in to_go) / tokens)
    loss, position = 0.0, 0
    logprobs, _, _ = networks.evaluate_actions(batch.ids, batch.response_mask, cfg.temperature)
    for row in range(B):
        group = totals[row - row % cfg.k:][:cfg.k]
        average = sum(group) / cfg.k
        spread = math.sqrt(sum((x - average) ** 2 for x in group) / (cfg.k - 1))
        if cfg.method == "rloo":
            advantage = totals[row] - (sum(group) - totals[row]) / (cfg.k - 1)
        else:
            advantage = totals[row] - average
        if cfg.method == "grpo":
            advantage = advantage / spread if spread > 1e-4 else 0.0
        columns = batch.response_mask[row].nonzero().squeeze(1).tolist()
        share = {"rloo": 1 / B, "grpo": 1 / (B * len(columns)), "reinforce_pp": 1 / tokens,
                 "dr_grpo": 1 / (B * cfg.max_new_tokens)}[cfg.method]
        for t in columns:
            if cfg.method == "reinforce_pp":
                advantage = (to_go[position] - mean) / deviation
            difference = batch.ref_logprobs[row, t] - logprobs[row, t]
            k3 = difference.exp() - 1 - difference
            kl_coef = cfg.kl_coef * (cfg.method in ("grpo", "dr_grpo"))
            loss = loss + share * (-advantage * logprobs[row, t] + kl_coef * k3)
            position += 1
    return torch.autograd.grad(loss, list(networks.parameters()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_of_an_update_equals_a_slow_reference(method, accumulation):
    cfg = groups_config(method=method, epochs=1, minibatch_size=8, kl_coef=0.3, max_grad_norm=1e6,
                        accumulation=accumulation)
    networks, batch = fresh(cfg, moved=0.02)
    assert batch.kl_ref.abs().max() > 0.05
    expected = slow_gradient(networks, batch, cfg)
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.0)
    groups.update(networks, optimizer, batch, cfg, iteration=1)
    for weights, gradient in zip(networks.parameters(), expected):
        torch.testing.assert_close(weights.grad, gradient, rtol=1e-3, atol=1e-6)


def test_reinforce_pp_is_gae_with_values_0_and_lambda_1_whitened():
    cfg = groups_config(method="reinforce_pp", k=1, kl_coef=0.3)
    _, batch = fresh(cfg, moved=0.02)
    to_go, _ = gae(batch.rewards, torch.zeros_like(batch.rewards), batch.response_mask, 1.0, 1.0)
    kept, found = to_go[batch.response_mask], batch.advantages[batch.response_mask]
    expected = (kept - kept.mean()) / kept.std(unbiased=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for row in range(cfg.batch_size):
        first = int(batch.response_mask[row].int().argmax())
        total = batch.scores[row] - 0.3 * batch.kl_ref[row].sum()
        assert to_go[row, first].item() == pytest.approx(total.item(), abs=1e-5)


@pytest.mark.parametrize("method, paid", [("rloo", True), ("grpo", False), ("dr_grpo", False)])
def test_where_each_method_has_its_kl(method, paid):
    """In RLOO a response pays for it; in GRPO and Dr. GRPO the rewards are the scores alone."""
    _, batch = fresh(groups_config(method=method, kl_coef=0.3), moved=0.02)
    totals = batch.scores - paid * 0.3 * batch.kl_ref.sum(dim=1)
    torch.testing.assert_close(batch.rewards.sum(dim=1), totals, rtol=1e-4, atol=1e-4)
    expected = group_advantages(method, totals, 4)
    for row in range(8):
        advantages = batch.advantages[row][batch.response_mask[row]]
        assert (advantages - expected[row]).abs().max() < 1e-3


def test_the_k_responses_to_a_prompt_are_neighbours_and_differ():
    _, batch = fresh(groups_config(batch_size=16))
    rows = [batch.ids[row, :batch.lengths[row]].tolist() for row in range(16)]
    for first in range(0, 16, 4):
        start = batch.prompt_lengths[first]
        assert len({tuple(row[:start]) for row in rows[first:first + 4]}) == 1
        assert len({tuple(row) for row in rows[first:first + 4]}) > 1


def test_grpos_loss_is_0_over_a_rollout_and_its_gradient_is_not():
    """Users report "loss 0" as a bug: it is the mean of advantages that add up to 0."""
    cfg = groups_config(method="grpo", epochs=1, minibatch_size=8, kl_coef=0.0)
    networks, batch = fresh(cfg)
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.0)
    metrics = groups.update(networks, optimizer, batch, cfg, iteration=1)
    assert abs(metrics["pg_loss"]) < 1e-6 and metrics["grad_norm"] > 0.01


@pytest.mark.parametrize("method, clipped", [("rloo", False), ("grpo", True), ("dr_grpo", True),
                                             ("reinforce_pp", True)])
def test_all_but_rloo_stop_pushing_beyond_the_clip(monkeypatch, method, clipped):
    ranges = []

    def noted(logprobs, old_logprobs, advantages, mask, cliprange, token_count):
        ranges.append(cliprange)
        return policy_loss(logprobs, old_logprobs, advantages, mask, cliprange, token_count)

    monkeypatch.setattr(ppo, "policy_loss", noted)
    cfg = groups_config(method=method)
    networks, batch = fresh(cfg)
    groups.update(networks, torch.optim.SGD(networks.parameters(), lr=0.0), batch, cfg, 1)
    assert set(ranges) == {0.2 if clipped else math.inf}
    far = torch.ones(1, 1, dtype=torch.float64).requires_grad_()         # ratio e, advantage 1
    old, one = torch.zeros(1, 1), torch.ones(1, 1)
    loss, _ = policy_loss(far, old, one, one > 0, ranges[0], 1)
    loss.backward()
    assert (far.grad.item() == 0) == clipped


def test_a_first_ratio_that_is_not_1_stops_the_run():
    cfg = groups_config()
    networks, batch = fresh(cfg)
    batch.old_logprobs = batch.old_logprobs - 0.1 * batch.response_mask
    with pytest.raises(ValueError, match="iteration 4, step 0: the first ratio is off 1 by 0.105"):
        groups.update(networks, torch.optim.SGD(networks.parameters(), lr=0.0), batch, cfg, 4)


# ---- whole runs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_each_method_raises_the_score(tmp_path, method):
    run("groups", tmp_path, method=method, iterations=20, batch_size=32, minibatch_size=16, lr=1e-2)
    rows = read_metrics(str(tmp_path))
    assert len(rows) == 20 and list(rows[0]) == [name for name in groups.METRICS if name != "gold"]
    first, last = [sum(row["score"] for row in part) / 4 for part in (rows[:4], rows[-4:])]
    assert last > first + 0.2
    assert rows[0]["kl_ref"] == pytest.approx(0, abs=1e-4) and rows[-1]["kl_ref"] > 0.1
    assert max(row["ratio_first"] for row in rows) < 1e-3 and rows[5]["ratio_max"] > 1.001


def test_equal_groups_are_counted_and_teach_nothing(tmp_path):
    row = run("groups", tmp_path, method="grpo", reward="helpers:constant_reward", kl_coef=0.0,
              missing_end_penalty=0.0)
    assert row["equal_groups"] == 1 and row["advantage_std"] == 0 and row["grad_norm"] == 0
    for name, weights in load_network(GPT2, str(tmp_path)).state_dict().items():
        assert torch.equal(weights, load_network(GPT2, groups_config().model).state_dict()[name])


def test_sampled_tokens_add_up(tmp_path):
    run("groups", tmp_path, save_every=1)
    rows, total = read_metrics(str(tmp_path)), 0.0
    for row in rows:
        total += 8 * row["response_len"]
        assert row["sampled_tokens"] == pytest.approx(total)


def test_a_run_against_a_reward_model_is_published_like_the_others(tmp_path):
    run("groups", tmp_path, method="dr_grpo", **with_reward_model())
    assert read_json(str(tmp_path / "run.json"))["command"] == "Groups"
    assert {"model.safetensors", "config.json", "metrics.csv", "samples.txt"} <= set(
        files_of(tmp_path))
    start = load_network(GPT2, groups_config().model)
    assert load_network(GPT2, str(tmp_path)).config == start.config


@pytest.mark.parametrize("method", ["rloo", "reinforce_pp"])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path, method):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"method": method, "save_every": 1, "iterations": 4}
    run("groups", whole, **options)
    stop("groups", stopped, groups, "update", 3, **options)
    run("groups", stopped, resume=True, **options)
    assert files_of(stopped) == files_of(whole)


def test_another_method_is_not_taken_up(tmp_path):
    stop("groups", tmp_path, groups, "update", 2, save_every=1)
    with pytest.raises(ValueError, match="--method was 'rloo', is 'grpo'"):
        run("groups", tmp_path, resume=True, method="grpo", save_every=1)


def test_two_processes_give_what_one_gives(tmp_path):
    options = {"method": "grpo", "reward": "helpers:share_of_red", "iterations": 2}
    run("groups", tmp_path / "one", **options)
    torchrun("siblings.groups", groups_config(out=str(tmp_path / "two"), **options))
    for one, two in zip(*[read_metrics(str(tmp_path / name)) for name in ("one", "two")]):
        assert one == pytest.approx(two, rel=1e-2, abs=2e-3)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"k": 1}, "--k is 1, expected at least 2: rloo compares a response with others"),
    ({"k": 1, "method": "grpo"}, "--k is 1, expected at least 2: grpo"),
    ({"k": 1, "method": "dr_grpo"}, "--k is 1, expected at least 2: dr_grpo"),
    ({"k": 3}, "--batch_size 8 is no multiple of --k 3"),
    ({"minibatch_size": 9}, "--minibatch_size 9 is larger than --batch_size 8"),
    ({"method": "ppo"}, "--method is 'ppo', expected one of rloo, grpo, dr_grpo, reinforce_pp"),
    ({"k": 0}, "--k is 0, expected a value from 1")])
def test_options_that_make_no_group_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        groups_config(**options)


def test_reinforce_pp_needs_no_group(tmp_path):
    row = run("groups", tmp_path, method="reinforce_pp", k=1, iterations=1)
    assert row["equal_groups"] == ""


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="scores is not finite at iteration 0"):
        run("groups", tmp_path, reward="helpers:nan_reward")
