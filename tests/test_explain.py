"""explain/: the numbers that it prints are those of PPO's own tensors, and they fit one another."""

import functools
import math
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import (
    ppo_config,
    quietly,
    random_reward_folder,
    reward_folder,
    scratch_folder,
    sft_folder,
)

from lectures import quotes
from lectures.pictures import explained_tables
from minirlhf import ppo
from minirlhf.data import read_prompts
from minirlhf.engine import training
from minirlhf.engine.training import masked_mean
from minirlhf.explain.__main__ import ExplainConfig, main
from minirlhf.explain.follow import each_loss
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, ScalarModel
from minirlhf.rewards import load_reward
from minirlhf.tokenizer import Tokenizer

LECTURE = Path(__file__).resolve().parents[1] / "lectures" / "05-ppo-the-run.md"
STORED = LECTURE.parent / "results" / "explain.txt"


@functools.cache
def run_folder() -> str:
    """A PPO run of the toy world, which starts from the reward model."""
    folder = os.path.join(scratch_folder(), "explained_run")
    quietly(ppo.main, ppo_config(out=folder, reward=reward_folder()))
    return folder


def config(**options) -> ExplainConfig:
    return ExplainConfig(**{
        "run": run_folder(), "model": sft_folder(), "reward": reward_folder(),
        "prompts": "helpers:toy_prompts", "batch_size": 8, "max_new_tokens": 5, "lr": 5e-3,
        **options})


@pytest.mark.parametrize("run", ["of a run", ""])
def test_the_numbers_printed_are_those_of_the_tensors(run, capsys):
    seen = main(config() if run else config(run=""))
    sampled, scored, credited, first, last = explained_tables(capsys.readouterr().out)
    mask, row = seen["row"].response_mask[0], seen["row"]
    kl_ref = row.kl_ref[0]
    expected = [
        (sampled, {"sampled_logprobs": row.sampled_logprobs, "old_logprobs": row.old_logprobs,
                   "ref_logprobs": row.ref_logprobs, "old_values": row.old_values}),
        (scored, {"kl_ref": kl_ref, "payment": -0.2 * kl_ref, "rewards": row.rewards}),
        (credited, {"rewards": row.rewards, "old_values": row.old_values, "delta": seen["delta"],
                    "unwhitened": seen["raw_advantages"], "returns": row.returns,
                    "advantages": row.advantages}),
        (first, {"logprobs": seen["before"]["logprobs"], "ratio": seen["before"]["ratio"],
                 "advantages": row.advantages, "loss": seen["before"]["loss"],
                 "slope": seen["before"]["slope"], "value_loss": seen["before"]["value_loss"]}),
        (last, {"logprobs": seen["after"]["logprobs"], "ratio": seen["after"]["ratio"],
                "slope": seen["after"]["slope"], "values": seen["after"]["values"],
                "returns": row.returns})]
    assert sampled["ids[t+1]"] == [str(token) for token in row.ids[0, 1:][mask].tolist()]
    for printed, tensors in expected:
        assert len(printed["token"]) == int(mask.sum())
        for name, tensor in tensors.items():
            numbers = tensor.reshape(-1)[mask].tolist()
            assert printed[name] == [f"{number:.3f}" for number in numbers], name
    moved = {"kl_ref": kl_ref, "old_values": row.old_values}
    for name, tensor in moved.items():                   # both are 0 in iteration 0 only
        assert (tensor.abs().max().item() > 1e-3) == bool(run), name


def test_it_is_the_iteration_that_ppo_makes(capsys):
    """Looking at the tensors changes nothing: neither the random numbers nor the weights."""
    cfg = config(response=2)
    seen = main(cfg)
    ppo_cfg = ppo_config(reward=reward_folder(), lr=5e-3, critic_lr=1e-3, kl_coef=0.2,
                         prompt_count=8)
    networks, ref_policy = ppo.make_networks(ppo_cfg)
    for network, kind, folder in ((networks.policy, GPT2, run_folder()),
                                  (networks.critic, ScalarModel, run_folder() + "/critic")):
        network.load_state_dict(load_network(kind, folder).state_dict())
    tokenizer = Tokenizer.load(sft_folder())
    prompts, _ = read_prompts("helpers:toy_prompts", tokenizer, 32, 5, count=8, seed=0)
    order = training.batch_order(8, 8, 0, 1, True)
    batch = ppo.rollout(networks, ref_policy, load_reward(reward_folder(), "mean", tokenizer),
                        tokenizer, [prompts[i].ids for i in order], ppo_cfg, 0.2, 1)
    for name in ("ids", "old_logprobs", "ref_logprobs", "rewards", "advantages", "returns"):
        assert torch.equal(getattr(batch, name), getattr(seen["batch"], name)), name
    metrics = ppo.update(networks, ppo.make_optimizer(networks, ppo_cfg), batch, ppo_cfg, 1)
    assert metrics == seen["metrics"]
    number = seen["number"]
    assert number == int(ppo.minibatches(ppo_cfg, 1)[0][2])
    with torch.no_grad():
        logprobs, _, _ = networks.evaluate_actions(batch.ids, batch.response_mask, 1.0)
    assert torch.allclose(logprobs[number], seen["after"]["logprobs"], atol=1e-5)


def test_the_numbers_fit_one_another(capsys):
    seen = main(config())
    row, mask = seen["row"], seen["row"].response_mask[0]
    assert math.isclose(row.rewards.sum(), row.scores - 0.2 * row.kl_ref[0][mask].sum(),
                        abs_tol=1e-5)
    rewards, values = row.rewards[0][mask].tolist(), [*row.old_values[0][mask].tolist(), 0.0]
    delta = [reward + after - now for reward, now, after in zip(rewards, values, values[1:])]
    assert torch.allclose(seen["delta"][mask], torch.tensor(delta), atol=1e-5)
    advantage, expected = 0.0, []
    for one in reversed(delta):
        advantage = one + 0.95 * advantage
        expected.insert(0, advantage)
    raw = seen["raw_advantages"][mask]
    assert torch.allclose(raw, torch.tensor(expected), atol=1e-5)
    assert torch.allclose(row.returns[0][mask], raw + row.old_values[0][mask], atol=1e-5)
    whitened = (raw - seen["mean"]) / seen["deviation"]
    assert torch.allclose(row.advantages[0][mask], whitened, atol=1e-3)
    assert torch.allclose(seen["before"]["ratio"][mask], torch.ones(int(mask.sum())), atol=1e-4)
    assert torch.allclose(seen["before"]["loss"], -row.advantages[0] * mask, atol=1e-4)


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_the_losses_of_tokens_have_the_mean_and_the_gradient_of_the_loss(shift, capsys):
    seen = main(config())
    row, cfg = seen["row"], ppo_config()
    logprobs = (row.old_logprobs + shift).requires_grad_()
    losses, slopes = each_loss(logprobs, row, cfg)
    loss, _ = ppo.policy_loss(logprobs, row.old_logprobs, row.advantages, row.response_mask, 0.2)
    gradient, = torch.autograd.grad(loss, logprobs)
    assert torch.isclose(masked_mean(losses, row.response_mask[0]), loss, atol=1e-6)
    assert torch.allclose(slopes / row.response_mask.sum(), gradient[0], atol=1e-6)


def test_words_say_where_a_token_goes(capsys):
    main(config(lr=0.05, response=1))
    last = explained_tables(capsys.readouterr().out)[-1]
    assert "clipped" in last["goes"]
    for slope, word in zip(last["slope"], last["goes"]):
        number = float(slope)
        assert word == ("up" if number < 0 else "down" if number > 0 else "clipped") or abs(
            number) < 1e-3


def test_a_cut_response_pays_the_penalty(capsys):
    seen = main(config(max_new_tokens=1, run=""))
    printed = capsys.readouterr().out
    cut = not bool(seen["row"].ended)
    assert f"missing-end penalty {float(cut):.3f}" in printed
    assert math.isclose(seen["given"] - cut, seen["row"].scores.item(), abs_tol=1e-6)


def test_the_same_command_prints_the_same_and_another_response_another_text(capsys):
    texts = []
    for response in (0, 0, 3):
        main(config(response=response))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("options, words", [
    ({"run": "nowhere"}, "nowhere: no such folder; first run `python -m minirlhf`"),
    ({"reward": "nowhere/at_all"}, "nowhere/at_all: no such folder"),
    ({"run": sft_folder()}, "has no folder `critic`, expected what minirlhf.ppo wrote"),
    ({"response": 4}, "--response is 4, expected less than 4")])
def test_what_is_missing_is_told_in_one_sentence(options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        main(config(**options))


def test_a_run_of_other_networks_is_refused(tmp_path):
    other = random_reward_folder(str(tmp_path / "critic"), 0)
    with pytest.raises((ValueError, FileNotFoundError)):
        main(config(run=os.path.dirname(other)))


# ---- the stored output, which the lecture tells --------------------------------------------------

def test_the_lecture_tells_the_stored_output_word_for_word():
    stored = STORED.read_text(encoding="utf-8")
    parts = [block.text for block in quotes.read_blocks(LECTURE.read_text(encoding="utf-8"))
             if block.mark == "stored"]
    assert len(parts) >= 5
    places = [stored.index(part) for part in parts]      # ValueError: the output says otherwise
    assert places == sorted(places)


def test_the_stored_output_has_the_lines_that_the_command_prints_today(capsys):
    main(config())
    printed, stored = (
        [re.sub(r"-?\d[\d.e-]*", "#", line) for line in text.splitlines() if line[:1] != " "]
        for text in (capsys.readouterr().out, STORED.read_text(encoding="utf-8")))
    assert printed == stored


def test_the_numbers_of_the_stored_output_fit_one_another():
    text = STORED.read_text(encoding="utf-8")
    sampled, scored, credited, first, last = (
        {name: cells if name in ("token", "goes") else [float(cell) for cell in cells]
         for name, cells in table.items()} for table in explained_tables(text))
    near = functools.partial(pytest.approx, abs=0.0025)
    score = float(re.search(r"penalty 0.000: scores (-?[\d.]+)", text)[1])
    for old, ref, kl in zip(sampled["old_logprobs"], sampled["ref_logprobs"], scored["kl_ref"]):
        assert kl == near(old - ref)
    payments = [-0.2 * kl for kl in scored["kl_ref"]]
    assert scored["payment"] == near(payments)
    assert scored["rewards"] == near([*payments[:-1], payments[-1] + score])
    values = [*credited["old_values"], 0.0]
    assert credited["delta"] == near([reward + after - now for reward, now, after in zip(
        credited["rewards"], values, values[1:])])
    advantages = [*credited["unwhitened"], 0.0]
    assert credited["unwhitened"] == near([one + 0.95 * after for one, after in zip(
        credited["delta"], advantages[1:])])
    assert credited["returns"] == near([a + v for a, v in zip(advantages[:-1], values)])
    mean, deviation = map(float, re.search(r"have mean (-?[\d.]+) and deviation ([\d.]+);",
                                           text).groups())
    whitened = [(advantage - mean) / deviation for advantage in advantages[:-1]]
    assert credited["advantages"] == pytest.approx(whitened, abs=0.02)
    assert first["ratio"] == [1.0] * len(first["ratio"])
    assert first["loss"] == near([-advantage for advantage in first["advantages"]])
    for old, new, ratio in zip(sampled["old_logprobs"], last["logprobs"], last["ratio"]):
        assert ratio == pytest.approx(math.exp(new - old), abs=0.003)
    for advantage, ratio, goes in zip(first["advantages"], last["ratio"], last["goes"]):
        left = ratio > 1.2 if advantage > 0 else ratio < 0.8
        assert (goes == "clipped") == left
