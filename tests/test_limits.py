"""The smallest, the largest and the longest that the trainers meet, through their public entries.

    MINIRLHF_ITERATIONS=1000 python -m pytest -s tests/test_limits.py -k long

runs PPO for as many iterations as it takes to see memory grow (without the variable a few).
"""

import gc
import gzip
import json
import math
import os
import random
import sys
import time

import pytest
import torch
from fuzzing import MEBIBYTE, peak_memory, reset_peak
from helpers import (
    CONTEXT,
    limited_file_size,
    ppo_config,
    quietly,
    reward_config,
    save_folder,
    sft_config,
    share_of_red,
    toy_model,
    toy_tokenizer,
)

from minirlhf import ppo, reward_model, sft
from minirlhf.data import (
    encode_prompt,
    encode_response,
    format_prompt,
    read_prompts,
    read_records,
)
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.options import describe_error
from minirlhf.engine.output import PART_FILES
from minirlhf.engine.state import read_state
from minirlhf.engine.training import batch_order, random_stream
from minirlhf.files.pretrained import load_network, save_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel
from minirlhf.ppo import make_networks, rollout, update
from minirlhf.tokenizer import Tokenizer

END = toy_tokenizer().end_token
ITERATIONS = int(os.environ.get("MINIRLHF_ITERATIONS", "16"))


def all_finite(row: dict) -> bool:
    return all(math.isfinite(value) for value in row.values() if value != "")


def write_rows(path, rows) -> str:
    path.write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    return str(path)


def text_of_length(tokens: int, letter: str = "a") -> str:
    """A prompt whose templated form, end token in front, has that many tokens."""
    tokenizer = toy_tokenizer()
    for letters in range(1, 4 * tokens):
        if len(encode_prompt(tokenizer, format_prompt(letter * letters))) == tokens:
            return letter * letters
    raise AssertionError(tokens)


# ---- prompts of length 0, 1 and the full context -------------------------------------------------

@pytest.mark.parametrize("empty", ["", " ", "\n\t"])
def test_an_empty_prompt_is_refused_with_file_and_line(tmp_path, empty):
    good = {"prompt": "Hi?", "response": "red", "chosen": "red", "rejected": "blue"}
    for stage, keys in (("sft", ["prompt", "response"]), ("ppo", ["prompt"]),
                        ("reward_model", ["prompt", "chosen", "rejected"])):
        row = {key: good[key] for key in keys}
        path = write_rows(tmp_path / "rows.jsonl", [row, row, {**row, "prompt": empty}])
        with pytest.raises(ValueError, match=r"rows.jsonl:3: expected text as 'prompt'"):
            if stage == "sft":
                quietly(sft.main, sft_config(data=path, out=str(tmp_path / "out")))
            elif stage == "ppo":
                quietly(ppo.main, ppo_config(prompts=path, out=str(tmp_path / "out")))
            else:
                quietly(reward_model.main, reward_config(data=path, out=str(tmp_path / "out")))
        assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_prompts_of_one_token_are_rolled_out_and_learned_from(critic):
    """The end token alone: what every document begins with."""
    cfg = ppo_config(critic=critic, max_new_tokens=CONTEXT - 1)
    torch.manual_seed(0)
    networks, ref_policy = make_networks(cfg)
    batch = rollout(networks, ref_policy, share_of_red, toy_tokenizer(), [[END]] * 8, cfg, 0.1, 0)
    assert (batch.prompt_lengths == 1).all() and batch.response_mask[:, 0].all()
    optimizer = torch.optim.SGD(networks.parameters(), lr=0.1)
    assert all_finite(update(networks, optimizer, batch, cfg, 0))


def test_a_prompt_of_length_0_or_of_the_full_context_is_refused_by_generate():
    model = toy_model()
    for prompt, message in (([], "at least one token"), ([END] * CONTEXT, "exceeds the model's")):
        with pytest.raises(ValueError, match=message):
            generate(model, [[END], prompt], 1, end_token=END)
    made = generate(model, [[END] * (CONTEXT - 1), [END]], 1, end_token=END)
    assert made.ids.shape == (2, CONTEXT) and made.lengths.tolist() == [CONTEXT, 2]


def test_rows_that_fill_the_context_are_learned_from_and_longer_ones_dropped(tmp_path, capsys):
    room = len(encode_response(toy_tokenizer(), "red"))
    fits, too_long = text_of_length(CONTEXT - room), text_of_length(CONTEXT - room + 1)
    rows = [{"prompt": fits, "response": "red"}, {"prompt": too_long, "response": "red"}] * 4
    path = write_rows(tmp_path / "rows.jsonl", rows)
    row = sft.main(sft_config(data=path, out=str(tmp_path / "out"), held_out=1, epochs=1))
    assert f"4 demonstrations of at most {CONTEXT} tokens (4 longer ones" in capsys.readouterr().out
    assert all_finite(row)


def test_comparisons_that_fill_the_context_are_learned_from(tmp_path, capsys):
    tokenizer = toy_tokenizer()
    room = max(len(encode_response(tokenizer, text)) for text in ("red", "blue"))
    rows = []
    for letter in "abcdef":
        for tokens in (CONTEXT - room, CONTEXT - room + 1):
            prompt = text_of_length(tokens, letter)
            rows.append({"prompt": prompt, "chosen": "red", "rejected": "blue"})
    path = write_rows(tmp_path / "rows.jsonl", rows)
    cfg = reward_config(data=path, out=str(tmp_path / "out"), held_out=1, epochs=1, norm_samples=4,
                        max_new_tokens=room)
    assert all_finite(reward_model.main(cfg))
    assert f"6 comparisons of at most {CONTEXT} tokens (6 longer ones" in capsys.readouterr().out


def test_prompts_and_responses_that_fill_the_context_are_rolled_out(tmp_path, capsys):
    room = 3
    rows = [{"prompt": text_of_length(CONTEXT - room + more)} for more in (0, 1)] * 8
    path = write_rows(tmp_path / "rows.jsonl", rows)
    row = ppo.main(ppo_config(prompts=path, out=str(tmp_path / "out"), max_new_tokens=room))
    assert "8 prompts (8 that leave no room" in capsys.readouterr().out
    assert all_finite(row)


# ---- one row, one token, one of everything -------------------------------------------------------

def test_a_batch_of_one_runs_in_every_stage(tmp_path):
    data = {"examples": 8, "held_out": 1, "epochs": 1, "batch_size": 1, "eval_every": 1}
    assert all_finite(quietly(sft.main, sft_config(out=str(tmp_path / "sft"), **data)))
    row = quietly(reward_model.main, reward_config(
        out=str(tmp_path / "rm"), comparisons=4, held_out=1, epochs=1, batch_size=1, eval_every=1,
        norm_samples=2))
    assert all_finite(row)
    row = quietly(ppo.main, ppo_config(
        out=str(tmp_path / "ppo"), model=str(tmp_path / "sft"), reward=str(tmp_path / "rm"),
        prompt_count=1, batch_size=1, minibatch_size=1, iterations=2, epochs=1, max_new_tokens=1))
    assert all_finite(row) and row["response_len"] == 1


def tiny_folder(folder: str, **sizes) -> str:
    """A checkpoint with the smallest vocabulary that has all texts: 256 bytes and the end token."""
    tokenizer = Tokenizer([])
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**{"vocab_size": 257, "n_positions": 48, "n_embd": 2, "n_layer": 1,
                               "n_head": 1, **sizes}))
    tokenizer.save(folder, model.config.n_positions)
    save_network(model, folder)
    return folder


def test_the_smallest_vocabulary_and_network_pass_all_three_stages(tmp_path):
    base = tiny_folder(str(tmp_path / "base"))
    assert Tokenizer.load(base).vocab_size == 257
    data = {"examples": 20, "held_out": 2, "epochs": 1, "eval_every": 100, "max_new_tokens": 4}
    folders = {name: str(tmp_path / name) for name in ("sft", "rm", "ppo")}
    rows = [{"prompt": f"{number}?", "response": "yes", "chosen": "yes", "rejected": "no"}
            for number in range(20)]
    demonstrations = write_rows(tmp_path / "d", [{k: r[k] for k in ("prompt", "response")}
                                                 for r in rows])
    comparisons = write_rows(tmp_path / "c", [{k: r[k] for k in ("prompt", "chosen", "rejected")}
                                              for r in rows])
    row = quietly(sft.main, sft_config(model=base, data=demonstrations, out=folders["sft"], **data))
    assert all_finite(row)
    row = quietly(reward_model.main, reward_config(
        model=folders["sft"], data=comparisons, out=folders["rm"], held_out=2, epochs=1,
        norm_samples=16, max_new_tokens=4))
    assert all_finite(row)
    row = quietly(ppo.main, ppo_config(model=folders["sft"], reward=folders["rm"],
                                       prompts=demonstrations, out=folders["ppo"]))
    assert all_finite(row)


def test_a_network_of_one_number_a_token_and_two_tokens_works(tmp_path):
    """One channel: layer norm leaves nothing of it, so every state is the same; no step fails."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=2, n_positions=2, n_embd=1, n_layer=1, n_head=1))
    made = generate(model, [[1]], 1, end_token=1, generator=random_stream(0))
    assert made.ids.shape == (1, 2)
    assert made.logprobs.isfinite().all()
    scalar = ScalarModel(model.config)
    scalar.score(made.ids, made.lengths).sum().backward()
    assert all(p.grad.isfinite().all() for p in scalar.parameters())
    save_network(model, str(tmp_path))
    assert load_network(GPT2, str(tmp_path)).config == model.config


# ---- responses that end at once, and responses that are all equal --------------------------------

def constant_folder(folder: str, token: int) -> str:
    """A policy that writes `token` whatever came before."""
    model = toy_model()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(1e4 * model.wte.weight[token])
    return save_folder(model, folder)


@pytest.mark.parametrize("word", ["", " red"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_ppo_on_responses_that_are_all_equal_stays_finite(tmp_path, word, critic):
    """They end at once, or never end. Prompts, responses and scores are all the same."""
    token = toy_tokenizer().encode(word)[0] if word else END
    folder = constant_folder(str(tmp_path / "policy"), token)
    cfg = ppo_config(model=folder, prompts="helpers:equal_prompts", critic=critic, iterations=3,
                     reward="helpers:constant_reward", out=str(tmp_path / "out"))
    row = quietly(ppo.main, cfg)
    assert all_finite(row)
    assert (row["response_len"], row["end_rate"]) == ((5, 0) if word else (1, 1))
    for tensor in load_network(GPT2, cfg.out).state_dict().values():
        assert tensor.isfinite().all()


def test_a_reward_model_on_equal_responses_says_that_there_is_nothing_to_normalise(tmp_path):
    policy = constant_folder(str(tmp_path / "policy"), END)
    rows = [{"prompt": "Colours for bana?", "chosen": "red", "rejected": f"blue {number}"}
            for number in range(6)]
    rows += [{**rows[0], "prompt": text_of_length(28)}]      # leaves no room: is not sampled to
    data = write_rows(tmp_path / "rows", rows)
    cfg = reward_config(model=policy, data=data, held_out=1, epochs=1, norm_samples=20,
                        batch_size=2, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="all SFT responses get the same score"):
        quietly(reward_model.main, cfg)


def test_sft_samples_of_a_policy_that_ends_at_once_are_written(tmp_path):
    policy = constant_folder(str(tmp_path / "policy"), END)
    row = quietly(sft.main, sft_config(model=policy, out=str(tmp_path / "out"), examples=20, lr=0.0,
                                       held_out=4, epochs=1))
    assert all_finite(row)
    assert "Colours for" in (tmp_path / "out" / "samples.txt").read_text(encoding="utf-8")


# ---- a hundred thousand prompts ------------------------------------------------------------------

PROMPTS = 100_000


@pytest.fixture(scope="module")
def many_prompts(tmp_path_factory):
    rng = random.Random(0)
    lines = [json.dumps({"prompt": f"What is {rng.randrange(10 ** 6)} plus {rng.randrange(10)}?"})
             for _ in range(PROMPTS)]
    path = tmp_path_factory.mktemp("many") / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_a_hundred_thousand_prompts_are_read_in_bounded_memory(many_prompts, tmp_path, packed):
    path, size = many_prompts, many_prompts.stat().st_size
    if packed:
        path = tmp_path / "prompts.jsonl.gz"
        path.write_bytes(gzip.compress(many_prompts.read_bytes(), 1))
    before, start = reset_peak(), time.process_time()
    records = read_records(str(path), "prompts")
    seconds, grown = time.process_time() - start, (peak_memory() - before) / MEBIBYTE
    print(f"\n{PROMPTS} prompts, {size / MEBIBYTE:.1f} MiB: {seconds:.1f} s, +{grown:.0f} MiB")
    assert len(records) == PROMPTS
    assert grown < 64 and seconds < 60


def test_the_first_prompts_of_a_large_file_cost_nothing(many_prompts):
    before, start = reset_peak(), time.process_time()
    assert len(read_records(str(many_prompts), "prompts", count=100)) == 100
    assert time.process_time() - start < 1 and peak_memory() - before < 4 * MEBIBYTE


def test_ppo_draws_from_a_hundred_thousand_prompts(many_prompts):
    before, start = reset_peak(), time.process_time()
    prompts, _ = quietly(read_prompts_of, str(many_prompts))
    seconds, grown = time.process_time() - start, (peak_memory() - before) / MEBIBYTE
    print(f"\n{PROMPTS} prompts tokenized: {seconds:.1f} s, +{grown:.0f} MiB")
    assert len(prompts) == PROMPTS and grown < 160 and seconds < 120
    start, drawn = time.process_time(), []
    for iteration in range(20):
        drawn += batch_order(len(prompts), 8, 0, iteration, whole=True)
    assert time.process_time() - start < 20 * 0.5
    assert len(set(drawn)) == 20 * 8


def read_prompts_of(path: str) -> tuple[list, int]:
    return read_prompts(path, toy_tokenizer(), 64, 1, count=0, seed=0)


# ---- long runs -----------------------------------------------------------------------------------

seen: list[tuple[int, int]] = []        # memory in use, bytes, and live tensors, at each rollout


def watching_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward that looks at this process's memory."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    seen.append((pages * os.sysconf("SC_PAGESIZE"), tensors))
    return share_of_red(ids, prompt_lengths, lengths, tokenizer)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_a_long_run_keeps_its_memory(tmp_path, critic):
    seen.clear()
    cfg = ppo_config(reward="test_limits:watching_reward", critic=critic, iterations=ITERATIONS,
                     batch_size=4, out=str(tmp_path / "out"), save_every=max(8, ITERATIONS // 20),
                     sample_every=10**6,
                     prompts="helpers:equal_prompts", kl_target=1.0, kl_horizon=1000.0)
    start = time.perf_counter()
    assert all_finite(quietly(ppo.main, cfg))
    # a trial, before anything is computed; and the answers that are kept of the first iteration and
    # of the last, which come after the rollout
    del seen[-1], seen[2], seen[0]
    assert len(seen) == ITERATIONS and len(read_metrics(cfg.out)) == ITERATIONS
    early, late = seen[ITERATIONS // 5], seen[-1]
    grown = (late[0] - early[0]) / MEBIBYTE
    print(f"\n{ITERATIONS} iterations, {critic} critic, {time.perf_counter() - start:.0f} s: "
          f"{early[0] / MEBIBYTE:.1f} MiB and {early[1]} tensors after {ITERATIONS // 5}, "
          f"{late[0] / MEBIBYTE:.1f} MiB and {late[1]} at the end")
    assert late[1] <= early[1] + 5
    assert grown < 16, f"memory grew by {grown:.1f} MiB"


# ---- a disk that fills up ------------------------------------------------------------------------

full = {"calls": 0, "from": 0, "limit": 0}


def filling_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A reward beside which somebody else fills the disk."""
    full["calls"] += 1
    if full["calls"] == full["from"]:
        import resource
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (full["limit"], hard))
    return share_of_red(ids, prompt_lengths, lengths, tokenizer)


@pytest.mark.parametrize("limit, words", [(50_000, "training_state.safetensors was not written"),
                                          (100, r"(metrics.csv|samples.txt|kept.jsonl).part")])
def test_a_disk_that_fills_up_loses_nothing_and_the_run_goes_on_later(tmp_path, limit, words):
    options = {"reward": "test_limits:filling_reward", "iterations": 4, "save_every": 1,
               "out": str(tmp_path / "out")}
    full.update(calls=0, **{"from": 5}, limit=limit)     # a trial, iteration 0, its kept answers, 1
    with limited_file_size(1 << 40):                     # whatever happens, the limit is put back
        with pytest.raises(OSError, match=words) as caught:
            quietly(ppo.main, ppo_config(**options))
    assert "free some space" in describe_error(caught.value)
    left = set(os.listdir(tmp_path / "out"))
    assert left == {".lock", *PART_FILES, "training_state.safetensors"}
    state, _ = read_state(str(tmp_path / "out" / "training_state.safetensors"))
    assert state["step"] == 2
    full.update({"from": 0})
    quietly(ppo.main, ppo_config(resume=True, **options))
    whole = quietly(ppo.main, ppo_config(**{**options, "out": str(tmp_path / "whole")}))
    for name in ("metrics.csv", "samples.txt", "kept.jsonl", "model.safetensors",
                 "critic/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert all_finite(whole)
