"""Sampling: what is drawn is what is scored, whatever the batch, the cache and the padding."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import END, PROMPTS, SMALL, randomise, response_of, small_model, text_model

from minirlhf import generate as sampling
from minirlhf.data import encode_prompt, format_prompt
from minirlhf.engine.options import printable
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import PAD_TOKEN, load_network, save_folder, save_network
from minirlhf.generate import KVCache, SampleConfig, filter_logprobs, generate, sample, stream
from minirlhf.gpt2 import GPT2, GPT2Config, token_logprobs
from minirlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def advanced(generator: torch.Generator, numbers: int) -> torch.Generator:
    """The generator after it gave so many uniform numbers."""
    torch.rand(numbers, generator=generator, dtype=torch.float64)
    return generator


def mask_of(made) -> torch.Tensor:
    column = torch.arange(made.ids.shape[1] - 1)
    return (column >= made.prompt_lengths[:, None] - 1) & (column < made.lengths[:, None] - 1)


# ---- picking a token -----------------------------------------------------------------------------

def test_sample_of_the_docstring_and_at_every_edge():
    logprobs = torch.tensor([[0.2, 0.5, 0.3]]).log().double()
    picks = [sample(logprobs, torch.tensor([u], dtype=torch.double)).item()
             for u in (0.0, 0.1999, 0.6, 0.6999, 0.7001, 1 - 2**-53)]
    assert picks == [0, 0, 1, 1, 2, 2]


def test_rare_tokens_of_a_large_vocabulary_keep_their_share():
    V, tokens = 50257, torch.tensor([1, 25000, 50000, 50256])
    logprobs = torch.full((1, V), math.log(1e-8))
    logprobs[0, 0] = math.log(1 - (V - 1) * 1e-8)
    mass = logprobs[0].exp().double()
    middle = mass.cumsum(0)[tokens] - mass[tokens] / 2
    assert sample(logprobs.expand(4, -1), middle / mass.sum()).tolist() == tokens.tolist()


def test_filter_of_the_docstring():
    filtered = filter_logprobs(torch.tensor([[0.5, 0.3, 0.2]]).log(), top_p=0.7)
    assert filtered.exp()[0].tolist() == pytest.approx([0.625, 0.375, 0])


@pytest.mark.parametrize("top_k, top_p, expected", [
    (1, 1.0, [0, 1, 0, 0]), (2, 1.0, [0, 4 / 7, 3 / 7, 0]), (99, 1.0, [0.1, 0.4, 0.3, 0.2]),
    (0, 0.39, [0, 1, 0, 0]), (0, 1e-6, [0, 1, 0, 0]), (0, 0.71, [0, 4 / 9, 3 / 9, 2 / 9]),
    (2, 0.5, [0, 1, 0, 0]), (3, 0.75, [0, 4 / 7, 3 / 7, 0])])
def test_top_k_and_top_p_keep_the_likeliest_tokens(top_k, top_p, expected):
    logprobs = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).double().log()
    filtered = filter_logprobs(logprobs, top_k, top_p)
    assert filtered.exp()[0].tolist() == pytest.approx(expected)


def outcome_probabilities(model: GPT2, prompt: list[int], end: int, temperature: float) -> dict:
    """Exact probability of every response of at most two tokens, by uncached forward passes."""
    V, probabilities = model.config.vocab_size, {}
    first = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(0)
    for one in range(V):
        if one == end:
            probabilities[(one,)] = first[one].item()
            continue
        second = (model(torch.tensor([prompt + [one]]))[0, -1] / temperature).softmax(0)
        for two in range(V):
            probabilities[(one, two)] = (first[one] * second[two]).item()
    return probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_samples_have_the_frequencies_that_their_log_probabilities_say(temperature):
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    model = randomise(GPT2(config), 4).requires_grad_(False)
    prompt, N = [4, 1], 6000
    expected = outcome_probabilities(model, prompt, 4, temperature)
    assert sum(expected.values()) == pytest.approx(1)
    made = generate(model, [prompt] * N, 2, end_token=4, generator=random_stream(0),
                    temperature=temperature)
    counts = dict.fromkeys(expected, 0)
    for row in range(N):
        response = tuple(response_of(made, row))
        counts[response] += 1
        stated = made.logprobs[row].sum().exp().item()
        assert stated == pytest.approx(expected[response], rel=1e-9)
    chi_square = sum((counts[r] - N * p) ** 2 / (N * p) for r, p in expected.items())
    assert chi_square < 45.3                         # 0.1% of right samplers exceed it: 20 freedoms
    wrong = outcome_probabilities(model, prompt, 4, 1.7 - temperature)
    assert sum((counts[r] - N * p) ** 2 / (N * p) for r, p in wrong.items()) > 90


# ---- whole responses -----------------------------------------------------------------------------

def uncached_greedy(model: GPT2, prompt: list[int], max_new_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_new_tokens):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == END:
            break
    return ids[len(prompt):]


@pytest.mark.parametrize("seed", [0, 3, 4, 5])
def test_cached_greedy_equals_uncached_for_prompts_of_unequal_length(seed):
    model = small_model(seed)
    made = generate(model, PROMPTS, 11, end_token=END, greedy=True)
    for row, prompt in enumerate(PROMPTS):
        assert response_of(made, row) == uncached_greedy(model, prompt, 11)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}])
def test_a_row_alone_makes_the_sample_that_it_makes_in_the_batch(options):
    model = small_model()
    prompts = PROMPTS * 4
    made = generate(model, prompts, 9, end_token=END, generator=random_stream(5), **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 9, end_token=END,
                         generator=advanced(random_stream(5), 9 * row), **options)
        placed = generate(model, [prompt], 9, end_token=END, generator=random_stream(5),
                          first_row=row, **options)      # as a process does with its share
        assert response_of(made, row) == response_of(alone) == response_of(placed)
        n = len(response_of(alone))
        begin = len(prompt) - 1
        assert torch.allclose(made.logprobs[row, begin:begin + n], alone.logprobs[0, begin:],
                              atol=1e-11)


def test_a_seed_repeats_a_sample_and_another_seed_does_not():
    model = small_model()
    one, same, other = (generate(model, PROMPTS, 8, end_token=END, generator=random_stream(seed))
                        for seed in (1, 1, 2))
    assert torch.equal(one.ids, same.ids) and torch.equal(one.logprobs, same.logprobs)
    assert one.ids.shape != other.ids.shape or not torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_the_sampling_equal_those_of_a_full_forward_pass(temperature):
    model = small_model()
    made = generate(model, PROMPTS * 5, 9, end_token=END, generator=random_stream(3),
                    temperature=temperature)
    mask = mask_of(made)
    scored, _ = token_logprobs(model.hidden(made.ids), made.ids, mask, model.wte.weight,
                               temperature)
    assert torch.allclose(made.logprobs, scored, atol=1e-11)
    assert mask.sum() == (made.lengths - made.prompt_lengths).sum()


def test_what_generate_returns_follows_the_alignment_law():
    model = small_model()
    prompts = PROMPTS * 8
    made = generate(model, prompts, 6, end_token=END, generator=random_stream(0))
    T = int(made.lengths.max())
    assert made.ids.shape == (32, T) and made.logprobs.shape == (32, T - 1)
    assert made.prompt_lengths.tolist() == [len(prompt) for prompt in prompts]
    assert 0 < made.ended.sum() < 32
    for row, prompt in enumerate(prompts):
        response, length = response_of(made, row), made.lengths[row]
        assert made.ids[row, :len(prompt)].tolist() == prompt
        assert END not in response[:-1] and 1 <= len(response) <= 6
        assert made.ended[row].item() == (response[-1] == END)
        assert made.ended[row] or len(response) == 6
        assert (made.ids[row, length:] == END).all()             # padding
        assert not made.logprobs[row, :len(prompt) - 1].any()    # prompt columns
        assert not made.logprobs[row, length - 1:].any()


def test_a_response_can_be_the_end_token_alone():
    model = small_model()
    with torch.no_grad():
        model.ln_f.weight.zero_()                    # the end token, whatever came before
        model.ln_f.bias.copy_(model.wte.weight[END] * 100)
    made = generate(model, PROMPTS, 5, end_token=END, generator=random_stream(0))
    assert made.lengths.tolist() == [len(prompt) + 1 for prompt in PROMPTS]
    assert made.ended.all() and made.ids.shape[1] == 6
    assert made.logprobs.shape == (4, 5)


def test_end_tokens_in_the_prompt_do_not_end_a_row():
    made = generate(small_model(), [[END, END, 3, END]], 4, end_token=END, greedy=True)
    assert made.ids[0, :4].tolist() == [END, END, 3, END] and made.lengths[0] > 4


def test_greedy_ignores_temperature_top_k_and_the_generator():
    model = small_model()
    plain = generate(model, PROMPTS, 8, end_token=END, greedy=True)
    other = generate(model, PROMPTS, 8, end_token=END, greedy=True, temperature=3.0, top_k=2,
                     generator=random_stream(7))
    assert torch.equal(plain.ids, other.ids)
    top_1 = generate(model, PROMPTS, 8, end_token=END, top_k=1, generator=random_stream(7))
    assert torch.equal(plain.ids, top_1.ids)


def test_generate_fills_the_context_to_its_last_position():
    model = small_model()
    model.wte.weight[END] = 0
    made = generate(model, [[1, 2, 3, 4]], 12, end_token=END, top_k=2, generator=random_stream(0))
    assert made.lengths.item() == 16
    assert model(made.ids).isfinite().all()


@pytest.mark.parametrize("prompts, n, options, message", [
    ([[1, 2, 3]], 14, {}, "prompt of 3 tokens plus a response of 14 exceeds .* context of 16"),
    ([[1], []], 3, {}, "at least one token in each"), ([], 3, {}, "at least one prompt"),
    ([[1, 11]], 3, {}, "token id 11 is outside the model's vocabulary of 11"),
    ([[1], [-1, 2]], 3, {}, "token id -1 is outside the model's vocabulary of 11"),
    ([[1]], 3, {"end_token": 50256}, "token id 50256 is outside the model's vocabulary of 11"),
    ([[1]], 0, {}, "max_new_tokens is 0, expected at least 1"),
    ([[1]], 3, {"temperature": 0.0}, "temperature is 0.0, expected a value above 0"),
    ([[1]], 3, {"temperature": math.nan}, "temperature is nan, expected a value above 0"),
    ([[1]], 3, {"top_k": -1}, "top_k is -1 and top_p 1.0, expected top_k at least 0"),
    ([[1]], 3, {"top_p": 0.0}, "top_p 0.0, expected .* top_p above 0 and at most 1"),
    ([[1]], 3, {"top_p": 1.5}, "top_p 1.5, expected .* top_p above 0 and at most 1")])
def test_generate_refuses_what_it_cannot_do(prompts, n, options, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), prompts, n, **{"end_token": END, **options})


@pytest.mark.parametrize("position, greedy", [(1, True), (1, False), (2, True)])
def test_a_broken_model_is_not_sampled_from(position, greedy):
    model = small_model()
    model.wpe.weight[position, 0] = math.nan         # 2: met when the second token is chosen
    message = rf"sampled_logprobs is not finite at iteration 7, index \[0, {position}\]: nan"
    with pytest.raises(FloatingPointError, match=message):
        generate(model, PROMPTS[:1], 4, end_token=END, greedy=greedy, generator=random_stream(0),
                 where="iteration 7")


def test_greedy_generation_equals_that_of_transformers(tiny_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = text_model(tiny_tokenizer)
    save_network(model, str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    prompt = [tiny_tokenizer.end_token, 5, 6]
    made = generate(model, [prompt, prompt * 4], 20, end_token=prompt[0], greedy=True)
    their_ids = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    assert their_ids[0].tolist() == prompt + response_of(made)


# ---- bfloat16 ------------------------------------------------------------------------------------

@pytest.fixture
def far_from_zero() -> tuple[GPT2, list[list[int]], int]:
    """The shipped model with logits around -100, as GPT-2's are; prompts, and the end token.

    With m added to every row of wte and taken off wpe the hidden states h stay the same and the
    logits change by h.m, which softmax forgets. m is the smallest vector with h.m near -100.
    """
    folder = str(ROOT / "checkpoints" / "tiny")
    model = load_network(GPT2, folder).requires_grad_(False)
    tokenizer = load_tokenizer(folder, model)
    prompts = [encode_prompt(tokenizer, format_prompt(text)) for text in (
        "What is the capital of Nepal?", "How do I bake a cake?", "Good morning! Is a lion big?")]
    made = generate(model, prompts * 8, 24, end_token=tokenizer.end_token,
                    generator=random_stream(1))
    states = model.hidden(made.ids)[:, :-1][mask_of(made)].double()      # (N, C)
    gram = states.T @ states + 0.1 * torch.eye(states.shape[1], dtype=torch.double)
    m = torch.linalg.solve(gram, states.sum(dim=0) * -100).float()       # (C,)
    model.wte.weight += m
    model.wpe.weight -= m
    return model, prompts * 8, tokenizer.end_token


def test_sampled_equals_scored_in_bfloat16_with_logits_around_minus_100(far_from_zero):
    """There bfloat16 numbers are 0.5 apart: logits in it made log-probabilities differ by 0.7."""
    model, prompts, end = far_from_zero
    model.dtype = "bfloat16"
    made = generate(model, prompts, 24, end_token=end, generator=random_stream(0))
    mask, unembedding = mask_of(made), model.wte.weight
    scored, _ = token_logprobs(model.hidden(made.ids), made.ids, mask, unembedding)
    model.dtype = "float32"
    exact, _ = token_logprobs(model.hidden(made.ids), made.ids, mask, unembedding)
    mean_logits = model(made.ids)[:, :-1][mask].mean(dim=1)              # (N,)
    assert mean_logits.mean().item() == pytest.approx(-100, abs=10) and mean_logits.max() < -64
    assert made.logprobs.dtype == scored.dtype == torch.float32
    assert (made.logprobs - scored)[mask].abs().max() < 0.1
    assert 0 < (scored - exact)[mask].abs().mean() < 0.01
    assert (scored - exact)[mask].abs().max() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_cache_keeps_keys_and_values_as_they_come(dtype):
    model = small_model().float()
    model.dtype = dtype
    with model.precision():
        cache = KVCache(SMALL, torch.tensor([3]), 5, model.wte.weight)
        model.hidden(torch.tensor([[1, 2, 3]]), cache)
    assert cache.keys.dtype == cache.values.dtype == getattr(torch, dtype)


# ---- what it costs -------------------------------------------------------------------------------

def counted(model: GPT2) -> list[tuple[int, int]]:
    """A list that gets (rows, columns) of every forward pass of `model`."""
    passes = []

    def record(module, inputs, output):
        passes.append(tuple(output.shape[:2]))

    model.ln_f.register_forward_hook(record)
    return passes


def test_a_token_costs_one_forward_pass_of_one_column():
    model = small_model()
    model.wte.weight[END] = 0
    passes = counted(model)
    made = generate(model, PROMPTS, 7, end_token=END, top_k=2, generator=random_stream(0))
    steps = int((made.lengths - made.prompt_lengths).max())
    assert len(passes) == steps and passes[0] == (4, 5)
    assert all(columns == 1 for _, columns in passes[1:])


def test_rows_that_ended_leave_the_batch():
    model = small_model()
    passes = counted(model)
    made = generate(model, PROMPTS * 16, 11, end_token=END, generator=random_stream(0))
    responses = made.lengths - made.prompt_lengths
    rows = [rows for rows, _ in passes]
    assert rows == sorted(rows, reverse=True)
    for step, computed in enumerate(rows[1:], start=1):          # at most a quarter is wasted
        still_going = int((responses > step).sum())
        assert still_going <= computed < still_going / 0.75
    assert sum(rows) < 0.8 * 64 * len(rows)


def test_the_batch_stops_when_all_rows_ended():
    model = small_model()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(model.wte.weight[END] * 100)
    passes = counted(model)
    generate(model, PROMPTS, 11, end_token=END, generator=random_stream(0))
    assert len(passes) == 1


def test_the_cache_of_the_docstring():
    cache = KVCache(SMALL, torch.tensor([2, 4]), 6, torch.zeros(1))
    assert cache.begin(4).tolist() == [0, 1, 2, 3] and cache.visible is None
    assert cache.begin(1).tolist() == [[2], [4]]
    assert cache.begin(1).tolist() == [[3], [5]]
    assert cache.visible[:, 0, 0].tolist() == [[True, True, False, False, True, True], [True] * 6]


def test_unused_columns_of_the_cache_are_never_read(monkeypatch):
    def junk(*shape, **options):
        return torch.full(*shape, math.nan, **options)

    model = small_model()
    expected = generate(model, PROMPTS, 8, end_token=END, generator=random_stream(0))
    monkeypatch.setattr(torch, "empty", junk)
    made = generate(model, PROMPTS, 8, end_token=END, generator=random_stream(0))
    assert torch.equal(made.ids, expected.ids)


# ---- token by token ------------------------------------------------------------------------------

@pytest.mark.parametrize("greedy", [True, False])
def test_stream_yields_what_generate_makes(greedy):
    model = small_model()
    ends = set()
    for seed in range(6):
        cfg = SampleConfig(max_new_tokens=10, seed=seed, greedy=greedy, temperature=0.9, top_k=6,
                           top_p=0.95)
        for prompt in PROMPTS:
            made = generate(model, [prompt], 10, end_token=END, greedy=greedy, temperature=0.9,
                            top_k=6, top_p=0.95, generator=random_stream(seed))
            expected = [token for token in response_of(made) if token != END]
            assert list(stream(model, prompt, cfg, END)) == expected
            ends.add(made.ended.item())
    assert greedy or ends == {True, False}


def test_stream_yields_every_token_before_it_computes_the_next():
    model = small_model()
    passes = counted(model)
    tokens = stream(model, [1, 2, 3], SampleConfig(max_new_tokens=5, greedy=True), END)
    assert passes == []
    next(tokens)
    assert passes == [(1, 3)]
    next(tokens)
    assert passes == [(1, 3), (1, 1)]


# ---- command line --------------------------------------------------------------------------------

@pytest.fixture
def text_folder(tiny_tokenizer, tmp_path) -> str:
    folder = str(tmp_path / "text model")
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, folder)
    return folder


def test_main_prints_prompt_and_continuation_and_returns_it(text_folder, capsys):
    cfg = SampleConfig(model=text_folder, prompt="A lion\\nlives", max_new_tokens=30, seed=3)
    text = sampling.main(cfg)
    assert len(text) > 5
    assert capsys.readouterr().out == printable(f"A lion\nlives{text}\n")
    assert sampling.main(cfg) == text
    assert sampling.main(SampleConfig(model=text_folder, prompt="A lion\nlives", seed=4)) != text


def test_characters_of_several_tokens_are_printed_whole(text_folder, tiny_tokenizer, capsys,
                                                        monkeypatch):
    expected = "a\u20acb \U0001f600"
    tokens = tiny_tokenizer.encode(expected) + [PAD_TOKEN]      # and a byte that is in no text
    printed = []

    def fixed(*arguments):
        for token in tokens:
            printed.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(sampling, "stream", fixed)
    assert sampling.main(SampleConfig(model=text_folder, prompt="x")) == expected + "\ufffd"
    printed.append(capsys.readouterr().out)
    assert "".join(printed) == f"x{expected}\ufffd\n"
    assert not any("\ufffd" in text for text in printed[:-1])


def test_a_prompt_that_is_too_long_is_one_sentence(text_folder):
    with pytest.raises(ValueError, match="plus a response of 80 exceeds the model's context of 80"):
        sampling.main(SampleConfig(model=text_folder, max_new_tokens=80))


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": math.nan}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
    {"max_new_tokens": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))} is .*, expected a value from"):
        SampleConfig(**options)


def test_selfcheck_of_another_size_says_so(text_folder):
    with pytest.raises(ValueError, match="text model is no GPT-2 of 124M parameters"):
        sampling.main(SampleConfig(model=text_folder, selfcheck=True))


def test_selfcheck_tells_right_weights_from_wrong_ones(text_folder, tiny_tokenizer, monkeypatch,
                                                       capsys):
    model = load_network(GPT2, text_folder)        # stands in for the 124M weights
    made = generate(model, [[5, 6]], 8, end_token=tiny_tokenizer.end_token, greedy=True)
    monkeypatch.setattr(sampling, "GPT2Config", lambda **sizes: model.config)
    monkeypatch.setattr(sampling, "KNOWN_END", tiny_tokenizer.end_token)
    monkeypatch.setattr(sampling, "KNOWN_PROMPT", [5, 6])
    monkeypatch.setattr(sampling, "KNOWN_CONTINUATION", response_of(made))
    sampling.main(SampleConfig(model=text_folder, selfcheck=True))
    assert "selfcheck passed" in capsys.readouterr().out
    monkeypatch.setattr(sampling, "KNOWN_CONTINUATION", response_of(made)[:-1] + [0])
    with pytest.raises(ValueError, match="these are other weights"):
        sampling.main(SampleConfig(model=text_folder, selfcheck=True))


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})


@pytest.mark.parametrize("start", [["-m", "minirlhf.generate"],
                                   [os.path.join("minirlhf", "generate.py")]])
def test_both_ways_to_start_it_write_the_same_text(start, text_folder):
    done = command(*start, "--model", text_folder, "--prompt", "A lion", "--max_new_tokens", "9")
    assert done.returncode == 0, done.stderr.decode()
    expected = sampling.main(SampleConfig(model=text_folder, prompt="A lion", max_new_tokens=9))
    assert done.stdout.decode().replace("\r\n", "\n") == printable(f"A lion{expected}\n")


def test_the_place_where_sampling_was_names_the_new_one():
    done = command("-m", "minirlhf.gpt2", "--model", "checkpoints/tiny", "--prompt", "A lion")
    lines = done.stderr.decode().strip().splitlines()
    assert done.returncode != 0 and done.stdout == b"" and len(lines) == 1
    assert lines[0].startswith("error: ") and "python -m minirlhf.generate --prompt" in lines[0]


def test_bad_input_exits_with_2_and_one_sentence(tmp_path):
    done = command("-m", "minirlhf.generate", "--model", str(tmp_path / "nowhere"))
    lines = done.stderr.decode().strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and "nowhere" in lines[0]
