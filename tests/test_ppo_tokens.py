"""ppo_tokens.py: the responses that a PPO run keeps for its page."""

import functools
import json
import os

import pytest
import torch
from helpers import (
    ppo_config,
    quietly,
    scratch_folder,
    sft_folder,
    toy_tokenizer,
    weights_equal,
)

from minirlhf import ppo
from minirlhf.engine.metrics import read_kept, read_metrics
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
from minirlhf.ppo_tokens import (
    COLUMNS,
    LIKELIEST,
    PROMPTS,
    STOPS,
    TOKENS,
    describe,
    is_kept,
    likeliest,
    rounded,
)


@functools.cache
def toy_run() -> str:
    """Three iterations, all of them kept."""
    folder = os.path.join(scratch_folder(), "tokens")
    quietly(ppo.main, ppo_config(iterations=3, sample_every=1, out=folder,
                                 gold="helpers:constant_reward"))
    return folder


def test_of_many_iterations_few_are_kept_and_always_the_last():
    assert [i for i in range(1000) if is_kept(i, 1000, 10)] == [*range(0, 1000, 30), 999]
    assert [i for i in range(25) if is_kept(i, 25, 10)] == [0, 10, 20, 24]
    for iterations in (1, 2, 39, 40, 41, 400, 401, 12345):
        for sample_every in (1, 3, 10, 10**9):
            kept = [i for i in range(iterations) if is_kept(i, iterations, sample_every)]
            assert kept[0] == 0 and kept[-1] == iterations - 1 and len(kept) <= STOPS + 1


def test_the_same_prompts_are_asked_in_every_kept_iteration():
    records = read_kept(toy_run())
    assert [record["iteration"] for record in records] == [0] * 4 + [1] * 4 + [2] * 4
    asked = [[record["prompt"] for record in records if record["iteration"] == i
              and record["asked_again"]] for i in range(3)]
    assert len(asked[0]) == PROMPTS and asked[0] == asked[1] == asked[2]
    assert {record["gold"] for record in records} == {0.5}


def test_a_kept_response_adds_up():
    """The sums, and the law that the page states under its table."""
    for record in read_kept(toy_run()):
        count = record["length"]
        assert len(record["tokens"]) == len(record["policy"]) == count > 0
        for name in COLUMNS:
            assert len(record[name]) == count
        for name, total in record["sums"].items():
            assert sum(record[name]) == pytest.approx(total, abs=1e-4)
        assert record["sums"]["rewards"] == pytest.approx(
            record["score"] - record["kl_coef"] * record["sums"]["kl_ref"], abs=1e-4)
        for old, ref, kl_ref in zip(*(record[name] for name in COLUMNS[:3])):
            assert old - ref == pytest.approx(kl_ref, abs=3e-5)
        assert toy_tokenizer().decode(record["ids"], skip_end=False) == "".join(record["tokens"])
        assert ("ratio" in record) != record["asked_again"]


def slow_logprobs(model: GPT2, prompt: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens at each place of a response, (n, V), one forward pass."""
    start = [toy_tokenizer().end_token, *toy_tokenizer().encode(prompt)]
    with torch.no_grad():
        logits = model(torch.tensor([start + ids]))[0, len(start) - 1:-1]
    return logits.log_softmax(dim=1)


@pytest.mark.parametrize("asked_again", [False, True])
def test_the_last_kept_response_is_what_the_published_policy_says_of_it(asked_again):
    record = [one for one in read_kept(toy_run()) if one["asked_again"] == asked_again][-1]
    ids, prompt = record["ids"], record["prompt"].removeprefix("<|endoftext|>")
    for name, folder in (("policy", toy_run()), ("ref_policy", sft_folder())):
        expected = slow_logprobs(load_network(GPT2, folder), prompt, ids)
        for place, pairs in zip(expected.exp(), record[name]):
            values, tokens = place.topk(LIKELIEST)
            assert [probability for _, probability in pairs] == pytest.approx(values.tolist(),
                                                                              abs=2e-5)
            assert pairs[0][0] == toy_tokenizer().decode([int(tokens[0])], skip_end=False)
        taken = expected[torch.arange(len(ids)), torch.tensor(ids)]
        if name == "ref_policy":
            assert record["ref_logprobs"] == pytest.approx(taken.tolist(), abs=2e-5)
        elif asked_again:
            assert record["old_logprobs"] == pytest.approx(taken.tolist(), abs=2e-5)
        else:
            ratio = (taken - torch.tensor(record["old_logprobs"])).exp()
            assert record["ratio"] == pytest.approx(ratio.tolist(), rel=1e-3)


def test_the_first_kept_row_is_that_of_the_printed_token_table():
    record = [one for one in read_kept(toy_run()) if not one["asked_again"]][-1]
    with open(os.path.join(toy_run(), "samples.txt"), encoding="utf-8") as file:
        table = file.read().split("iteration 2\n")[1]
    printed = [line.split()[-5] for line in table.split("\n")[2:2 + record["length"]]]
    assert [float(word) for word in printed] == pytest.approx(record["kl_ref"], abs=6e-4)


def test_the_answers_change_only_if_the_policy_does(tmp_path):
    quietly(ppo.main, ppo_config(lr=0.0, sample_every=1, out=str(tmp_path)))
    records = [one for one in read_kept(str(tmp_path)) if one["asked_again"]]
    assert records[0]["iteration"] == 0 and records[-1]["iteration"] == 1
    assert [one["ids"] for one in records[:PROMPTS]] == [one["ids"] for one in records[PROMPTS:]]


def test_what_is_kept_changes_nothing_in_the_run(tmp_path):
    often, never = tmp_path / "often", tmp_path / "never"
    for folder, sample_every in ((often, 1), (never, 100)):
        quietly(ppo.main, ppo_config(iterations=3, sample_every=sample_every, out=str(folder)))
    assert read_metrics(str(often)) == read_metrics(str(never))
    assert weights_equal(load_network(GPT2, str(often)), load_network(GPT2, str(never)))
    assert len(read_kept(str(often))) > len(read_kept(str(never))) == 2 * (1 + PROMPTS)


def test_likeliest_hand_example():
    tokenizer = toy_tokenizer()
    logprobs = torch.full((1, tokenizer.vocab_size), -20.0)
    (red,) = tokenizer.encode(" red")
    logprobs[0, red], logprobs[0, tokenizer.end_token] = -0.5, -1.0
    (pairs,) = likeliest(logprobs, tokenizer)
    assert pairs[:2] == [[" red", 0.60653], ["<|endoftext|>", 0.36788]]
    assert len(pairs) == LIKELIEST


def test_a_long_response_is_cut_and_its_sums_are_not():
    networks, ref_policy = ppo.make_networks(ppo_config())
    tokenizer, T = toy_tokenizer(), 30
    torch.manual_seed(0)
    mask = torch.ones(1, T - 1, dtype=torch.bool)
    fields = {name: torch.randn(1, T - 1) * mask for name in (
        "sampled_logprobs", *COLUMNS)}
    batch = ppo.Rollout(ids=torch.randint(5, (1, T)), prompt_lengths=torch.tensor([1]),
                        lengths=torch.tensor([T]), ended=torch.tensor([False]),
                        response_mask=mask, scores=torch.tensor([1.0]), **fields)
    whole = describe(batch, 0, networks, ref_policy, tokenizer, ppo_config())
    assert len(whole["tokens"]) == whole["length"] == T - 1 <= TOKENS
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minirlhf.ppo_tokens.TOKENS", 4)
        cut = describe(batch, 0, networks, ref_policy, tokenizer, ppo_config())
    assert len(cut["tokens"]) == len(cut["kl_ref"]) == len(cut["policy"]) == len(cut["ratio"]) == 4
    assert cut["length"] == T - 1 and cut["sums"] == whole["sums"]
    assert cut["kl_ref"] == whole["kl_ref"][:4] and cut["policy"] == whole["policy"][:4]


def test_kept_numbers_are_short():
    assert rounded(torch.tensor([1 / 3, 2.0])) == [0.33333, 2.0]
    assert len(json.dumps(rounded(torch.rand(100)))) < 100 * 10
