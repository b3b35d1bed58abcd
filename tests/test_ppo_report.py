"""ppo_report.py: the checks of every run, the metrics, and the token table."""

import dataclasses

import pytest
import torch
from helpers import ppo_config, reward_folder, share_of_red, toy_tokenizer
from rollouts import Dropout, fresh_rollout, ragged_prompts

from minirlhf import ppo
from minirlhf.ppo import make_networks, rollout, update
from minirlhf.ppo_report import (
    METRICS,
    TOLERANCE,
    check_first_ratio,
    check_rollout,
    measure,
    progress,
    summarise,
    token_table,
)

# ---- what must hold ------------------------------------------------------------------------------

def test_a_score_that_is_not_finite_is_named():
    words = r"scores is not finite at iteration 7, index \[7\]"
    with pytest.raises(FloatingPointError, match=words):
        fresh_rollout(ppo_config(reward="helpers:nan_reward"), iteration=7)


def test_another_sampling_distribution_is_noticed(monkeypatch):
    generate = ppo.generate

    def colder(*arguments, **options):
        return generate(*arguments, **{**options, "temperature": 0.7})

    monkeypatch.setattr(ppo, "generate", colder)
    with pytest.raises(ValueError, match="iteration 4: tokens were sampled from another"):
        fresh_rollout(ppo_config(), iteration=4)


def test_dropout_in_the_rollout_is_noticed():
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
    check_rollout(batch, 0.02, 0)
    with pytest.raises(ValueError, match="iteration 0: the rewards of a response do not add up"):
        check_rollout(moved, 0.02, 0)


@pytest.mark.parametrize("field", ["old_logprobs", "ref_logprobs", "old_values"])
def test_a_rollout_with_a_value_that_is_not_finite_is_refused_by_name(field):
    _, _, batch = fresh_rollout(ppo_config())
    getattr(batch, field)[3, 2] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"{field} is not finite at iteration 5, index "
                                                 r"\[3, 2\]: nan"):
        check_rollout(batch, 0.02, 5)


def test_bfloat16_may_be_off_by_its_rounding_and_float32_may_not():
    _, _, batch = fresh_rollout(ppo_config())
    apart = 0.9 * TOLERANCE["bfloat16"]
    batch.sampled_logprobs = torch.where(batch.response_mask, batch.old_logprobs + apart, 0.0)
    check_rollout(batch, 0.02, 0, "bfloat16")
    check_first_ratio({"ratio_off": apart}, "iteration 0, step 0", "bfloat16")
    with pytest.raises(ValueError, match="sampled from another distribution"):
        check_rollout(batch, 0.02, 0, "float32")
    with pytest.raises(ValueError, match="iteration 0, step 0: the first ratio is off 1 by 0.45"):
        check_first_ratio({"ratio_off": apart}, "iteration 0, step 0", "float32")


# ---- metrics -------------------------------------------------------------------------------------

def number_of_row(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A judge whose points are 0, 1, 2, ...: whole numbers, as a judge may give them."""
    return torch.arange(len(ids))


def test_measure_equals_a_slow_reference_on_a_ragged_batch():
    cfg = ppo_config(batch_size=9, max_new_tokens=4, reward=reward_folder())
    _, _, batch = fresh_rollout(cfg, iteration=1)
    mask = batch.response_mask
    batch.kl_ref = torch.randn(mask.shape)               # junk outside the mask must not count
    batch.old_values = torch.randn(mask.shape)
    metrics = measure(batch, number_of_row, toy_tokenizer())
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
    assert metrics == pytest.approx({
        "score": sum(batch.scores.tolist()) / 9, "gold": 4.0,
        "rewards": sum(row.sum().item() for row in batch.rewards) / 9, "kl_ref": sum(kl) / 9,
        "entropy": sum(entropy) / len(entropy),
        "explained_var": 1 - variance(errors) / variance(returns),
        "advantage_std": variance(errors) ** 0.5, "response_len": sum(response_lengths) / 9,
        "end_rate": sum(batch.ended.tolist()) / 9}, rel=1e-4)
    assert measure(batch, None, toy_tokenizer())["gold"] == ""


def test_an_update_is_summarised_over_its_tokens_and_the_norm_over_its_steps():
    one = {"tokens": 1, "kl_old": 0.4, "clipfrac": 1.0, "pg_loss": -1.0, "vf_loss": 2.0,
           "ratio_off": 0.01, "ratio_max": 1.5, "grad_norm": 3.0}
    two = {"tokens": 3, "kl_old": 0.0, "clipfrac": 0.0, "pg_loss": 1.0, "vf_loss": 0.0,
           "ratio_off": 0.8, "ratio_max": 1.8, "grad_norm": 1.0}
    assert summarise([one, two]) == pytest.approx(
        {"kl_old": 0.1, "clipfrac": 0.25, "pg_loss": 0.5, "vf_loss": 0.5, "ratio_first": 0.01,
         "ratio_max": 1.8, "grad_norm": 2.0})


# ---- text ----------------------------------------------------------------------------------------

def test_a_rollout_prints_one_line_for_each_field_with_figures_over_response_tokens():
    _, _, batch = fresh_rollout(ppo_config())
    lines = repr(batch).split("\n")[1:]
    assert [line.split()[0] for line in lines] == [f.name for f in dataclasses.fields(batch)]
    words = next(line for line in lines if line.split()[0] == "old_logprobs").split()
    numbers = batch.old_logprobs[batch.response_mask]
    assert words[1:3] == ["(8,", f"{batch.old_logprobs.shape[1]})"] and words[3::2] == [
        "mean", "min", "max"]
    expected = [numbers.mean().item(), numbers.min().item(), numbers.max().item()]
    assert [float(word) for word in words[4::2]] == pytest.approx(expected, abs=1e-3)


def test_the_line_of_an_iteration_names_the_gold_judge_only_where_there_is_one():
    row = {name: 1.25 for name in METRICS}
    line = progress({**row, "iteration": 7}, 2.04)
    assert line.startswith("  iteration   7  score   1.25  gold   1.25  kl_ref  1.25")
    assert line.endswith("  2.0 s")
    assert "gold" not in progress({**row, "iteration": 7, "gold": ""}, 2.04)


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
