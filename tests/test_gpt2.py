import math
import os
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minirlhf import gpt2
from minirlhf.common import random_stream
from minirlhf.gpt2 import (GPT2, GPT2Config, KVCache, SampleConfig, ScalarModel, behaviour_logprobs,
                           check_tokenizer, filter_logprobs, generate, sample, stream,
                           token_logprobs)
from minirlhf.weights import read_json, read_safetensors, write_json, write_safetensors

ROOT = Path(__file__).resolve().parents[1]
SMALL = GPT2Config(vocab_size=11, n_positions=16, n_embd=12, n_layer=3, n_head=3)
END = SMALL.vocab_size - 1
PROMPTS = [[10, 3], [1], [10, 4, 4, 7, 2], [5, 6, 0]]


def randomise(model, seed: int = 0):
    """Random numbers in every parameter, biases and layer norms too, in float64.

    They are large: what a token is and where it stands must matter, or the tests below would not
    see a wrong position, a wrong column of the cache or a wrong row.
    """
    generator = random_stream(seed)
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            numbers = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.copy_(1 + 0.3 * numbers)
            else:
                parameter.copy_(0.6 * numbers)
    return model


def small_model(seed: int = 5) -> GPT2:
    return randomise(GPT2(SMALL), seed).requires_grad_(False)


def padded(rows: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    return (torch.tensor([row + [fill] * (width - len(row)) for row in rows]),
            torch.tensor([len(row) for row in rows]))


def advanced(generator: torch.Generator, numbers: int) -> torch.Generator:
    """The generator after it gave so many uniform numbers."""
    torch.rand(numbers, generator=generator, dtype=torch.float64)
    return generator


def response_of(made, row: int = 0) -> list[int]:
    return made.ids[row, made.prompt_lengths[row]:made.lengths[row]].tolist()


def mask_of(made) -> torch.Tensor:
    column = torch.arange(made.ids.shape[1] - 1)
    return (column >= made.prompt_lengths[:, None] - 1) & (column < made.lengths[:, None] - 1)


# ---- the network --------------------------------------------------------------------------------

def norm(x, weights, name):
    centred = x - x.mean()
    return (centred / ((centred ** 2).mean() + 1e-5).sqrt() * weights[name + ".weight"]
            + weights[name + ".bias"])


def dense(x, weights, name):
    return x @ weights[name + ".weight"] + weights[name + ".bias"]


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow_logits(model: GPT2, row: list[int], gelu=tanh_gelu) -> torch.Tensor:
    """GPT-2 as a textbook writes it: one row, one position, one head at a time. (T, V)"""
    w, config = model.state_dict(), model.config
    hs = config.n_embd // config.n_head
    xs = [w["wte.weight"][token] + w["wpe.weight"][t] for t, token in enumerate(row)]
    for layer in range(config.n_layer):
        h = f"h.{layer}."
        keys, values, new = [], [], []
        for x in xs:
            q, k, v = dense(norm(x, w, h + "ln_1"), w, h + "attn.c_attn").chunk(3)
            keys.append(k)
            values.append(v)
            heads = []
            for head in range(config.n_head):
                part = slice(head * hs, (head + 1) * hs)
                weights = torch.stack([q[part] @ k[part] / math.sqrt(hs) for k in keys])
                weights = weights.exp() / weights.exp().sum()
                heads.append(sum(a * v[part] for a, v in zip(weights, values)))
            x = x + dense(torch.cat(heads), w, h + "attn.c_proj")
            inner = gelu(dense(norm(x, w, h + "ln_2"), w, h + "mlp.c_fc"))
            new.append(x + dense(inner, w, h + "mlp.c_proj"))
        xs = new
    return torch.stack([norm(x, w, "ln_f") for x in xs]) @ w["wte.weight"].T


def test_the_network_equals_a_slow_one_with_attention_written_out():
    model, row = small_model(), [10, 3, 3, 0, 9, 1, 5, 5, 2]
    assert torch.allclose(model(torch.tensor([row]))[0], slow_logits(model, row), atol=1e-11)


def test_the_exact_gelu_gives_other_logits():
    model, row = small_model(), [10, 3, 3, 0, 9, 1, 5, 5, 2]
    apart = (model(torch.tensor([row]))[0] - slow_logits(model, row, exact_gelu)).abs().max()
    assert apart > 1e-5                              # a million times the tolerance above


def test_no_position_sees_what_comes_after_it():
    model = small_model()
    ids = torch.randint(0, 11, (2, 9), generator=random_stream(0))
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 1) % 11
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def parameter_count(V: int, T: int, C: int, layers: int) -> int:
    return V * C + T * C + layers * (12 * C * C + 13 * C) + 2 * C


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    found = sum(p.numel() for p in GPT2(SMALL).parameters())
    assert found == parameter_count(11, 16, 12, 3)   # SMALL
    for layers, channels, expected in ((12, 768, 124_439_808), (24, 1024, 354_823_168),
                                       (36, 1280, 774_030_080), (48, 1600, 1_557_611_200)):
        assert parameter_count(50257, 1024, channels, layers) == expected


def test_initial_weights_have_deviation_002_and_residual_ones_are_scaled():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=500, n_positions=128, n_embd=128, n_layer=8, n_head=4))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif ".ln_" in name or name.startswith("ln_f"):
            assert (p == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < 0.05 * expected, name


def test_the_embedding_is_the_unembedding():
    model = randomise(GPT2(SMALL))
    assert not any("lm_head" in name for name in model.state_dict())
    hidden = model.hidden(torch.tensor([[1, 2]]))
    assert torch.equal(model.logits(hidden), hidden @ model.wte.weight.T)
    model(torch.tensor([[1, 2]])).sum().backward()
    assert (model.wte.weight.grad != 0).any(dim=1).all()     # tokens that are not in ids, too


def test_there_is_no_dropout_anywhere():
    model = small_model().train()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids), model(ids))


def test_a_sequence_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="sequence of 17 tokens exceeds the model's context of 16"):
        small_model()(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("sizes, message", [
    ({"n_embd": 0}, "n_embd is 0, expected an integer from 1 to"),
    ({"n_layer": True}, "n_layer is True, expected"), ({"n_head": 5}, "n_embd 768 .* of n_head 5"),
    ({"vocab_size": 2.0}, "vocab_size is 2.0, expected"), ({"n_layer": 10**9}, "n_layer is 10"),
    ({"n_positions": "64"}, "n_positions is '64', expected"), ({"n_embd": 2**40}, "n_embd is 10")])
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**sizes)


# ---- padding ------------------------------------------------------------------------------------

def test_a_row_alone_equals_the_row_in_a_padded_batch():
    model = small_model()
    scorer = randomise(ScalarModel(SMALL)).requires_grad_(False)
    rows = [prompt + [2, 9] for prompt in PROMPTS]
    ids, lengths = padded(rows, END)
    hidden, scores = model.hidden(ids), scorer.score(ids, lengths)
    logprobs, entropy = token_logprobs(hidden, ids, torch.ones_like(ids[:, 1:]).bool(),
                                       model.wte.weight)
    for b, row in enumerate(rows):
        alone = torch.tensor([row])
        assert torch.allclose(model.hidden(alone)[0], hidden[b, :len(row)], atol=1e-12)
        score = scorer.score(alone, torch.tensor([len(row)]))
        assert torch.allclose(score[0], scores[b], atol=1e-12)
        one, spread = token_logprobs(model.hidden(alone), alone, torch.ones(1, len(row) - 1).bool(),
                                     model.wte.weight)
        assert torch.allclose(one[0], logprobs[b, :len(row) - 1], atol=1e-12)
        assert torch.allclose(spread[0], entropy[b, :len(row) - 1], atol=1e-12)


def test_what_fills_the_padding_changes_nothing():
    model, scorer = small_model(), randomise(ScalarModel(SMALL)).requires_grad_(False)
    one, lengths = padded(PROMPTS, END)
    other, _ = padded(PROMPTS, 3)
    real = torch.arange(one.shape[1]) < lengths[:, None]
    assert torch.equal(model.hidden(one)[real], model.hidden(other)[real])
    assert torch.equal(scorer.score(one, lengths), scorer.score(other, lengths))
    mask = real[:, 1:]
    for first, second in zip(token_logprobs(model.hidden(one), one, mask, model.wte.weight),
                             token_logprobs(model.hidden(other), other, mask, model.wte.weight)):
        assert torch.equal(first, second)


def test_the_score_is_read_at_the_last_real_token_even_if_it_is_the_end_token():
    scorer = randomise(ScalarModel(SMALL)).requires_grad_(False)
    ids = torch.tensor([[10, 3, END, END, END], [10, 3, 4, 5, END]])
    every = scorer(ids)
    assert every.shape == (2, 5)
    scores = scorer.score(ids, torch.tensor([3, 5]))
    assert scores.tolist() == [every[0, 2].item(), every[1, 4].item()]
    assert scores[0] != every[0, 1] and scores[0] != every[0, 4]


def test_the_score_is_the_head_applied_to_the_last_hidden_state():
    scorer = randomise(ScalarModel(SMALL)).requires_grad_(False)
    ids = torch.tensor([[1, 2, 3]])
    expected = scorer.transformer.hidden(ids)[0, 2] @ scorer.score_head.weight[0]
    assert torch.allclose(scorer.score(ids, torch.tensor([3]))[0], expected, atol=1e-13)


# ---- token_logprobs -----------------------------------------------------------------------------

def test_token_logprobs_of_the_docstring():
    mask = torch.tensor([[False, True, False]])
    logprobs, entropy = token_logprobs(torch.zeros(1, 4, 3), torch.tensor([[0, 1, 1, 0]]), mask,
                                       torch.ones(2, 3))
    assert logprobs[0].tolist() == pytest.approx([0, -0.6931, 0], abs=1e-4)
    assert entropy[0].tolist() == pytest.approx([0, 0.6931, 0], abs=1e-4)


def test_behaviour_logprobs_of_the_docstring():
    logits = torch.tensor([0, math.log(2)])
    assert behaviour_logprobs(logits).exp().tolist() == pytest.approx([1 / 3, 2 / 3])
    assert behaviour_logprobs(logits, 0.5).exp().tolist() == pytest.approx([1 / 5, 4 / 5])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_column_t_is_the_step_from_ids_up_to_t_to_the_next_id(temperature):
    model = small_model()
    ids, lengths = padded([prompt + [2, 9] for prompt in PROMPTS], END)
    mask = torch.arange(ids.shape[1] - 1) < lengths[:, None] - 1
    logprobs, entropy = token_logprobs(model.hidden(ids), ids, mask, model.wte.weight, temperature)
    for b, t in product(range(ids.shape[0]), range(ids.shape[1] - 1)):
        every = torch.log_softmax(slow_logits(model, ids[b, :t + 1].tolist())[-1] / temperature, 0)
        expected = every[ids[b, t + 1]] if mask[b, t] else torch.tensor(0.0)
        assert logprobs[b, t].item() == pytest.approx(expected.item(), abs=1e-11)
        expected = -sum(p * math.log(p) for p in every.exp().tolist()) if mask[b, t] else 0
        assert entropy[b, t].item() == pytest.approx(expected, abs=1e-11)


def test_logits_are_computed_for_masked_positions_only(monkeypatch):
    rows, original = [], F.linear

    def counting(x, *rest):
        rows.append(x.shape[0])
        return original(x, *rest)

    monkeypatch.setattr(F, "linear", counting)
    mask = torch.tensor([[False, True, True], [True, False, False]])
    ids = torch.zeros(2, 4, dtype=torch.long)
    token_logprobs(torch.zeros(2, 4, 3), ids, mask, torch.ones(5, 3))
    assert rows == [3]


def test_nothing_outside_the_mask_is_read():
    hidden = torch.randn(1, 5, 3, generator=random_stream(0))
    ids, mask = torch.tensor([[0, 1, 1, 0, 1]]), torch.tensor([[False, True, True, False]])
    unembedding = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    changed = hidden.clone()
    changed[0, [0, 3, 4]] = math.nan
    for one, other in zip(token_logprobs(hidden, ids, mask, unembedding),
                          token_logprobs(changed, ids, mask, unembedding)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_logprobs_and_entropy_are_right(temperature):
    generator = random_stream(1)
    hidden = torch.randn(2, 4, 3, dtype=torch.double, generator=generator, requires_grad=True)
    unembedding = torch.randn(5, 3, dtype=torch.double, generator=generator, requires_grad=True)
    ids = torch.randint(0, 5, (2, 4), generator=generator)
    mask = torch.tensor([[True, True, False], [False, True, True]])

    def both(hidden, unembedding):
        return token_logprobs(hidden, ids, mask, unembedding, temperature, entropy_grad=True)

    assert torch.autograd.gradcheck(both, (hidden, unembedding))


def test_the_entropy_has_a_gradient_only_when_asked_for():
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    ids, mask, unembedding = torch.tensor([[0, 1, 2]]), torch.ones(1, 2).bool(), torch.randn(5, 4)
    logprobs, entropy = token_logprobs(hidden, ids, mask, unembedding)
    assert logprobs.requires_grad and not entropy.requires_grad
    _, same = token_logprobs(hidden, ids, mask, unembedding, entropy_grad=True)
    assert same.requires_grad and torch.equal(same, entropy)
    with torch.no_grad():
        _, entropy = token_logprobs(hidden, ids, mask, unembedding, entropy_grad=True)
    assert not entropy.requires_grad


def test_an_empty_mask_gives_zeros():
    logprobs, entropy = token_logprobs(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long),
                                       torch.zeros(2, 2).bool(), torch.randn(5, 4))
    assert not logprobs.any() and not entropy.any()


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4).bool(),
                                  torch.ones(2, 3)])
def test_a_mask_of_another_type_or_width_is_refused(mask):
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"expects a bool mask of shape \(2, 3\), found torch"):
        token_logprobs(torch.randn(2, 4, 3), ids, mask, torch.randn(5, 3))


@pytest.mark.parametrize("kind, expected", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64)])
def test_log_probabilities_are_never_in_half_precision(kind, expected):
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=kind)
    assert behaviour_logprobs(logits, 0.7).dtype == expected


# ---- picking a token ----------------------------------------------------------------------------

def test_sample_of_the_docstring_and_at_every_edge():
    logprobs = torch.tensor([[0.2, 0.5, 0.3]]).log().double()
    picks = [sample(logprobs, torch.tensor([u], dtype=torch.double)).item()
             for u in (0.0, 0.1999, 0.6, 0.6999, 0.7001, 1 - 2**-53)]
    assert picks == [0, 0, 1, 1, 2, 2]


def test_a_token_of_probability_0_is_never_sampled():
    logprobs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).log().expand(1001, -1)
    tokens = sample(logprobs, torch.linspace(0, 1 - 1e-9, 1001, dtype=torch.double))
    assert sorted(set(tokens.tolist())) == [1, 3]


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


def test_every_row_is_filtered_by_itself():
    rows = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]).double().log()
    both = filter_logprobs(rows, top_p=0.75)
    assert torch.equal(both[:1], filter_logprobs(rows[:1], top_p=0.75))
    assert torch.equal(both[1:], filter_logprobs(rows[1:], top_p=0.75))
    assert both[1].exp().tolist() == pytest.approx([0, 3 / 8, 5 / 8])


def outcome_probabilities(model: GPT2, prompt: list[int], end: int, temperature: float) -> dict:
    """Exact probability of every response of at most two tokens, by uncached forward passes."""
    V, found = model.config.vocab_size, {}
    first = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(0)
    for one in range(V):
        if one == end:
            found[(one,)] = first[one].item()
            continue
        second = (model(torch.tensor([prompt + [one]]))[0, -1] / temperature).softmax(0)
        for two in range(V):
            found[(one, two)] = (first[one] * second[two]).item()
    return found


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


# ---- generate -----------------------------------------------------------------------------------

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
        assert response_of(made, row) == response_of(alone)
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
    assert made.ids.shape[1] <= 16
    model(made.ids)


@pytest.mark.parametrize("prompts, n, options, message", [
    ([[1, 2, 3]], 14, {}, "prompt of 3 tokens plus a response of 14 exceeds .* context of 16"),
    ([[1], []], 3, {}, "at least one token in each"), ([], 3, {}, "at least one prompt"),
    ([[1, 11]], 3, {}, "token id 11 is outside the model's vocabulary of 11"),
    ([[1], [-1, 2]], 3, {}, "token id -1 is outside the model's vocabulary of 11"),
    ([[1]], 3, {"end_token": 50256}, "token id 50256 is outside the model's vocabulary of 11"),
    ([[1]], 0, {}, "max_new_tokens is 0, expected at least 1"),
    ([[1]], 3, {"temperature": 0.0}, "temperature is 0.0, expected a value above 0"),
    ([[1]], 3, {"temperature": math.nan}, "temperature is nan, expected a value above 0"),
    ([[1]], 3, {"top_k": -1}, "top_k is -1, expected at least 0"),
    ([[1]], 3, {"top_p": 0.0}, "top_p is 0.0, expected a value above 0 and at most 1"),
    ([[1]], 3, {"top_p": 1.5}, "top_p is 1.5, expected a value above 0 and at most 1")])
def test_generate_refuses_what_it_cannot_do(prompts, n, options, message):
    with pytest.raises(ValueError, match=message):
        generate(small_model(), prompts, n, **{"end_token": END, **options})


@pytest.mark.parametrize("position, greedy", [(1, True), (1, False), (2, True)])
def test_a_broken_model_is_not_sampled_from(position, greedy):
    model = small_model()
    model.wpe.weight[position, 0] = math.nan         # 2: met when the second token is chosen
    with pytest.raises(FloatingPointError, match="of a sampled token is not finite"):
        generate(model, PROMPTS[:1], 4, end_token=END, greedy=greedy, generator=random_stream(0))


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


# ---- files --------------------------------------------------------------------------------------

def same_weights(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


@pytest.fixture
def saved(tmp_path) -> tuple[GPT2, str]:
    """A small language model in float32 and the folder where it is saved."""
    model, folder = small_model().float(), str(tmp_path / "model")
    model.save_pretrained(folder)
    return model, folder


def change(folder: str, **tensors) -> None:
    """Replace tensors of a saved model (dots of their names as __); None removes one."""
    path = os.path.join(folder, "model.safetensors")
    found = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        found.pop(name, None)
        if tensor is not None:
            found[name] = tensor
    write_safetensors(path, found)


def test_a_saved_model_loads_as_it_was(saved):
    model, folder = saved
    loaded = GPT2.from_pretrained(folder)
    assert same_weights(model, loaded) and loaded.config == SMALL
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


def test_a_saved_reward_model_loads_as_it_was(tmp_path):
    torch.manual_seed(0)
    scorer = ScalarModel(SMALL)
    scorer.save_pretrained(str(tmp_path))
    assert same_weights(scorer, ScalarModel.from_pretrained(str(tmp_path)))


def test_loading_uses_no_random_numbers(saved):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    GPT2.from_pretrained(saved[1])
    assert torch.equal(torch.rand(2), expected)


def test_a_loaded_model_does_not_hold_its_file(saved):
    model, folder = saved
    loaded = GPT2.from_pretrained(folder)
    with torch.no_grad():
        loaded.wte.weight.zero_()
    assert same_weights(model, GPT2.from_pretrained(folder))
    path = os.path.join(folder, "model.safetensors")
    with open(path, "r+b") as file:                  # a mapped page would show the new bytes
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    assert torch.equal(loaded.state_dict()["ln_f.bias"], model.state_dict()["ln_f.bias"])


def hub_style(model: GPT2) -> dict:
    """The keys of the published files: no prefix, with the causal mask as a buffer."""
    n, tensors = model.config.n_positions, dict(model.state_dict())
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def prefixed(model: GPT2) -> dict:
    return {"transformer." + name: tensor for name, tensor in model.state_dict().items()}


def with_head(model: GPT2) -> dict:
    return {**prefixed(model), "lm_head.weight": model.wte.weight.detach().clone()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("style", [hub_style, prefixed, with_head])
def test_every_published_style_of_file_loads(style, form, saved):
    model, folder = saved
    path = Path(folder) / "model.safetensors"
    if form == "safetensors":
        write_safetensors(str(path), style(model))
    else:
        path.unlink()
        torch.save(style(model), path.with_name("pytorch_model.bin"))
    assert same_weights(GPT2.from_pretrained(folder), model)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_into_float32(kind, saved):
    model, folder = saved
    model.save_pretrained(folder, dtype=kind)
    for name, tensor in GPT2.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(kind).float()), name


@pytest.mark.parametrize("tensors, message", [
    ({"transformer__h__1__ln_1__bias": None}, r"tensor h.1.ln_1.bias is missing \(1 in all\)"),
    ({"transformer__h__2__ln_1__weight": None}, "tensor h.2.ln_1.weight is missing"),
    ({"transformer__wte__weight": None}, "tensor wte.weight is missing"),
    ({"transformer__h__3__ln_1__bias": torch.ones(12)}, "unexpected tensor h.3.ln_1.bias"),
    ({"transformer__ln_f__bias": torch.ones(13)}, r"ln_f.bias has shape \(13,\), expected \(12,\)"),
    ({"transformer__h__0__attn__c_attn__weight": torch.ones(36, 12)},
     r"h.0.attn.c_attn.weight has shape \(36, 12\), expected \(12, 36\)"),
    ({"transformer__ln_f__bias": torch.ones(12).long()}, "ln_f.bias has type torch.int64"),
    ({"transformer__ln_f__bias": torch.full((12,), math.nan)}, "tensor ln_f.bias holds nan or inf"),
    ({"ln_f__bias": torch.ones(12)}, "tensor ln_f.bias is there with and without prefix"),
    ({"lm_head__weight": torch.ones(11, 12)}, "lm_head.weight differs from wte.weight")])
def test_a_tensor_that_does_not_fit_is_named_with_its_folder(tensors, message, saved):
    _, folder = saved
    change(folder, **tensors)
    with pytest.raises(ValueError, match=message) as error:
        GPT2.from_pretrained(folder)
    assert folder in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_config_cannot_ask_for_memory(saved, monkeypatch):
    original = gpt2.Block

    def without_memory(*arguments):
        assert torch.get_default_device().type == "meta", "built before its size was checked"
        return original(*arguments)

    _, folder = saved
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    monkeypatch.setattr(gpt2, "Block", without_memory)
    for name, value in (("n_embd", 30_000), ("n_layer", 1000), ("n_positions", 10**6),
                        ("vocab_size", 10**6)):
        write_json(path, {**values, name: value})
        with pytest.raises(ValueError, match="is missing|has shape"):
            GPT2.from_pretrained(folder)


@pytest.mark.parametrize("values, message", [
    ({"activation_function": "gelu"}, "activation_function is 'gelu', minirlhf's GPT-2 has"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"n_inner": 99}, "n_inner is 99"), ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"n_embd": "12"}, "n_embd is '12', expected an integer"),
    ({"n_head": 5}, "n_embd 12 must be a multiple of n_head 5"),
    ({"n_layer": 4}, "tensor h.3.attn.c_attn.bias, .* missing"),
    ({"n_layer": 2}, "unexpected tensor h.2"),
    ({"vocab_size": 12}, r"wte.weight has shape \(11, 12\), expected \(12, 12\)"),
    ({"n_embd": 999_999}, "has shape"), ({"n_layer": 10**12}, "n_layer is 1000000000000")])
def test_a_config_of_another_network_is_refused(values, message, saved):
    _, folder = saved
    path = os.path.join(folder, "config.json")
    write_json(path, {**read_json(path), **values})
    with pytest.raises(ValueError, match=message) as error:
        GPT2.from_pretrained(folder)
    assert folder in str(error.value) and "\n" not in str(error.value)


def test_a_config_without_sizes_is_refused(saved):
    _, folder = saved
    write_json(os.path.join(folder, "config.json"), {"model_type": "gpt2", "n_embd": 12})
    with pytest.raises(ValueError, match="vocab_size, n_positions, n_layer, n_head missing"):
        GPT2.from_pretrained(folder)


def test_the_published_config_of_gpt2_is_accepted(tmp_path):
    write_json(str(tmp_path / "config.json"), {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "vocab_size": 50257})
    assert gpt2.read_config(str(tmp_path)) == GPT2Config()


def test_a_reward_model_is_no_language_model_and_the_reverse(saved, tmp_path):
    with pytest.raises(ValueError, match="holds a language model .* expected a reward model"):
        ScalarModel.from_pretrained(saved[1])
    folder = str(tmp_path / "reward")
    ScalarModel(SMALL).save_pretrained(folder)
    with pytest.raises(ValueError, match="holds a reward model .* expected a language model"):
        GPT2.from_pretrained(folder)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
    ScalarModel(SMALL).save_pretrained(str(tmp_path))
    change(str(tmp_path), score__weight=torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"score.weight has shape \(2, 12\), expected \(1, 12\)"):
        ScalarModel.from_pretrained(str(tmp_path))


def test_missing_files_and_folders_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        GPT2.from_pretrained(str(tmp_path / "nowhere"))
    _, folder = saved
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        GPT2.from_pretrained(folder)


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="x: the tokenizer has 320 tokens, config.json says 11"):
        check_tokenizer(small_model(), tiny_tokenizer, "x")


def test_the_padding_id_of_reward_models_is_in_no_text(tiny_tokenizer):
    assert tiny_tokenizer.vocabulary()["\u00ff"] == gpt2.PAD_TOKEN
    assert tiny_tokenizer.decode([gpt2.PAD_TOKEN]) == "\ufffd"       # no UTF-8 text has that byte
    assert gpt2.PAD_TOKEN not in tiny_tokenizer.encode("\u00ff \ufffd \U0001f600 plain text")


# ---- transformers -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def texts() -> list[str]:
    return ["Prompt: What is the capital of France?\nResponse: Paris. It's  2+2",
            "na\u00efve \u00ff\u20ac \U0001f600\n\n  tabs\tand 12345", "<|endoftext|> as text"]


def text_model(tokenizer) -> GPT2:
    config = GPT2Config(tokenizer.vocab_size, n_positions=80, n_embd=24, n_layer=2, n_head=3)
    return randomise(GPT2(config)).requires_grad_(False).float()


def close_in_float64(ours, theirs, ids: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(ours.double()(ids), theirs.double()(ids).logits, atol=1e-10)


def test_transformers_loads_a_saved_folder_as_it_is(transformers, tiny_tokenizer, texts, tmp_path):
    model = text_model(tiny_tokenizer)
    model.save_pretrained(str(tmp_path))
    tiny_tokenizer.save(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in texts[:2]:
        ids = tiny_tokenizer.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    ids = torch.tensor([tiny_tokenizer.encode(texts[0])])
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == tiny_tokenizer.end_token
    assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)
    assert close_in_float64(model, theirs, ids)


def test_transformers_computes_in_float32_from_a_float16_file(transformers, tiny_tokenizer,
                                                              tmp_path):
    text_model(tiny_tokenizer).save_pretrained(str(tmp_path), dtype=torch.float16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    assert theirs.dtype == torch.float32
    assert close_in_float64(GPT2.from_pretrained(str(tmp_path)), theirs, torch.tensor([[5, 6, 7]]))


def test_the_exact_gelu_fails_the_parity_test(transformers, tiny_tokenizer, tmp_path, monkeypatch):
    model = text_model(tiny_tokenizer)
    model.save_pretrained(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    with monkeypatch.context() as patch:
        patch.setattr(gpt2.F, "gelu", lambda x, approximate: exact_gelu(x))
        ours = model.double()(torch.tensor([[5, 6, 7]]))
    apart = (ours - theirs.double()(torch.tensor([[5, 6, 7]])).logits).abs().max().item()
    assert apart > 1e-5                              # the tolerance is 1e-10


def test_greedy_generation_equals_that_of_transformers(transformers, tiny_tokenizer, tmp_path):
    model = text_model(tiny_tokenizer)
    model.save_pretrained(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    prompt = [tiny_tokenizer.end_token, 5, 6]
    made = generate(model, [prompt, prompt * 4], 20, end_token=prompt[0], greedy=True)
    found = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    assert found[0].tolist() == prompt + response_of(made)


def test_transformers_scores_a_reward_model_the_same(transformers, tiny_tokenizer, texts, tmp_path):
    end = tiny_tokenizer.end_token
    torch.manual_seed(0)
    scorer = ScalarModel(text_model(tiny_tokenizer).config)
    randomise(scorer).float()
    scorer.save_pretrained(str(tmp_path))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    rows = [[end] + tiny_tokenizer.encode(text) + [end] * ends for text in texts for ends in (0, 1)]
    with torch.no_grad():
        alone = torch.stack([theirs(torch.tensor([row])).logits for row in rows])[:, 0, 0]
        batch = theirs(padded(rows, theirs.config.pad_token_id)[0]).logits[:, 0]
        ours = scorer.score(*padded(rows, end))      # with lengths, any padding will do
    assert alone.shape == batch.shape == ours.shape == (6,)
    assert torch.allclose(ours, alone, atol=1e-4) and torch.allclose(ours, batch, atol=1e-4)
    assert (ours[0::2] - ours[1::2]).abs().min() > 1e-3      # a chosen end token counts


def test_folders_that_transformers_writes_load(transformers, tmp_path):
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=12, n_layer=2, n_head=2,
                                     bos_token_id=29, eos_token_id=29, num_labels=1)
    torch.manual_seed(0)
    language = transformers.GPT2LMHeadModel(config).eval()
    language.save_pretrained(str(tmp_path / "language"))
    scorer = transformers.GPT2ForSequenceClassification(config).eval()
    scorer.save_pretrained(str(tmp_path / "scorer"))
    ids = torch.tensor([[29, 3, 4, 5]])
    assert close_in_float64(GPT2.from_pretrained(str(tmp_path / "language")), language, ids)
    ours = ScalarModel.from_pretrained(str(tmp_path / "scorer"))
    with torch.no_grad():
        expected = scorer(ids).logits[:, 0]
        assert torch.allclose(ours.score(ids, torch.tensor([4])), expected, atol=1e-6)


# ---- command line -------------------------------------------------------------------------------

@pytest.fixture
def text_folder(tiny_tokenizer, tmp_path) -> str:
    folder = str(tmp_path / "text model")
    text_model(tiny_tokenizer).save_pretrained(folder)
    tiny_tokenizer.save(folder)
    return folder


def test_main_prints_prompt_and_continuation_and_returns_it(text_folder, capsys):
    cfg = SampleConfig(model=text_folder, prompt="A lion\\nlives", max_new_tokens=30, seed=3)
    text = gpt2.main(cfg)
    assert len(text) > 5
    assert capsys.readouterr().out == f"A lion\nlives{text}\n"
    assert gpt2.main(cfg) == text
    assert gpt2.main(SampleConfig(model=text_folder, prompt="A lion\nlives", seed=4)) != text


def test_characters_of_several_tokens_are_printed_whole(text_folder, tiny_tokenizer, capsys,
                                                        monkeypatch):
    expected = "a\u20acb \U0001f600"
    tokens = tiny_tokenizer.encode(expected) + [gpt2.PAD_TOKEN]      # and a byte that is in no text
    printed = []

    def fixed(*arguments):
        for token in tokens:
            printed.append(capsys.readouterr().out)
            yield token

    monkeypatch.setattr(gpt2, "stream", fixed)
    assert gpt2.main(SampleConfig(model=text_folder, prompt="x")) == expected + "\ufffd"
    printed.append(capsys.readouterr().out)
    assert "".join(printed) == f"x{expected}\ufffd\n"
    assert not any("\ufffd" in text for text in printed[:-1])


def test_a_prompt_that_is_too_long_is_one_sentence(text_folder):
    with pytest.raises(ValueError, match="plus a response of 80 exceeds the model's context of 80"):
        gpt2.main(SampleConfig(model=text_folder, max_new_tokens=80))


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": math.nan}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1},
    {"max_new_tokens": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=f"--{next(iter(options))} is .*, expected a value from"):
        SampleConfig(**options)


def test_selfcheck_of_another_size_says_so(text_folder):
    with pytest.raises(ValueError, match="text model is no GPT-2 of 124M parameters"):
        gpt2.main(SampleConfig(model=text_folder, selfcheck=True))


def test_selfcheck_tells_right_weights_from_wrong_ones(text_folder, tiny_tokenizer, monkeypatch,
                                                       capsys):
    model = GPT2.from_pretrained(text_folder)        # stands in for the 124M weights
    made = generate(model, [[5, 6]], 8, end_token=tiny_tokenizer.end_token, greedy=True)
    monkeypatch.setattr(gpt2, "GPT2Config", lambda **sizes: model.config)
    monkeypatch.setattr(gpt2, "KNOWN_END", tiny_tokenizer.end_token)
    monkeypatch.setattr(gpt2, "KNOWN_PROMPT", [5, 6])
    monkeypatch.setattr(gpt2, "KNOWN_CONTINUATION", response_of(made))
    gpt2.main(SampleConfig(model=text_folder, selfcheck=True))
    assert "selfcheck passed" in capsys.readouterr().out
    monkeypatch.setattr(gpt2, "KNOWN_CONTINUATION", response_of(made)[:-1] + [0])
    with pytest.raises(ValueError, match="these are other weights"):
        gpt2.main(SampleConfig(model=text_folder, selfcheck=True))


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, cwd=ROOT,
                          env={**os.environ, "PYTHONIOENCODING": "utf-8"})


@pytest.mark.parametrize("start", [["-m", "minirlhf.gpt2"], [os.path.join("minirlhf", "gpt2.py")]])
def test_both_ways_to_start_it_write_the_same_text(start, text_folder):
    done = command(*start, "--model", text_folder, "--prompt", "A lion", "--max_new_tokens", "9")
    assert done.returncode == 0, done.stderr.decode()
    expected = gpt2.main(SampleConfig(model=text_folder, prompt="A lion", max_new_tokens=9))
    assert done.stdout.decode().replace("\r\n", "\n") == f"A lion{expected}\n"


def test_bad_input_exits_with_2_and_one_sentence(tmp_path):
    done = command("-m", "minirlhf.gpt2", "--model", str(tmp_path / "nowhere"))
    lines = done.stderr.decode().strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and "nowhere" in lines[0]


# ---- products and tables -------------------------------------------------------------------------

@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_a_product_without_gradient_is_the_plain_one(rows):
    weight, bias = torch.randn(600, 700), torch.randn(600)           # large enough for oneDNN
    x = torch.randn(rows, 700)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    for inner in (weight, weight.T.contiguous().T):      # as the unembedding lies, and as Conv1D's
        with torch.no_grad():
            found = gpt2.product(x, inner, bias)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert gpt2.product(x.requires_grad_(), weight, None).requires_grad


@pytest.mark.skipif(not gpt2.ONEDNN, reason="this PyTorch has no oneDNN")
def test_large_layers_have_the_gradients_of_plain_ones(monkeypatch):
    torch.manual_seed(0)
    layer, x = gpt2.Conv1D(512, 1536, std=0.02), torch.randn(2, 30, 512)
    results = []
    for onednn in (True, False):
        monkeypatch.setattr(gpt2, "ONEDNN", onednn)
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        assert ("Product" in str(y.grad_fn.next_functions)) == onednn
        (y ** 2).sum().backward()
        results.append((y.detach(), given.grad, layer.weight.grad.clone(), layer.bias.grad.clone()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@pytest.mark.skipif(not gpt2.ONEDNN, reason="this PyTorch has no oneDNN")
def test_only_large_products_of_several_rows_without_gradient_take_the_other_way():
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            calls.append(str(function))
            return function(*arguments, **(options or {}))

    def taken(rows: int, columns: int, grad: bool) -> bool:
        calls.clear()
        with torch.set_grad_enabled(grad), Watch():
            gpt2.product(torch.randn(rows, columns), torch.randn(600, columns), None)
        return any("_linear_pointwise" in call for call in calls)

    assert taken(8, 700, False)
    assert not taken(8, 700, True) and not taken(1, 700, False) and not taken(8, 70, False)


class TableWatch(TorchDispatchMode):
    """Counts how many numbers of tensors with V columns are alive at once, at most."""

    def __init__(self, V: int):
        super().__init__()
        self.V, self.alive, self.most = V, {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and self.V in tensor.shape:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = weakref.ref(tensor), storage.nbytes() // 4
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items()
                      if ref() is not None}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return made


def most_table_numbers(function, N: int, V: int) -> float:
    """The most (N, V) tables that are alive at once in forward and backward, in tables.

    The unembedding's own gradient, (V, C), is the same for both forms and is left out: C is small.
    """
    states = torch.randn(N, 2, requires_grad=True)
    unembedding = torch.randn(V, 2, requires_grad=True)
    actions = torch.randint(V, (N,))
    with TableWatch(V) as watch:
        chosen, _ = function(states, unembedding, actions, 0.7)
        chosen.sum().backward()
    return watch.most / (N * V)


def test_the_table_of_rows_and_vocabulary_never_exists_twice(monkeypatch):
    N, V = 64, 1000
    monkeypatch.setattr(gpt2.ActionLogprobs, "BLOCK", 2 * V)         # blocks of two rows
    assert most_table_numbers(gpt2.plain_action_logprobs, N, V) > 2
    assert most_table_numbers(gpt2.ActionLogprobs.apply, N, V) < 1.3    # the table and its blocks


@pytest.mark.parametrize("block", [1, 70, 1 << 20])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_one_table_gives_values_and_gradients_of_the_plain_form(monkeypatch, block, temperature):
    monkeypatch.setattr(gpt2.ActionLogprobs, "BLOCK", block)
    found = []
    for function in (gpt2.plain_action_logprobs, gpt2.ActionLogprobs.apply):
        states = torch.randn(9, 4, dtype=torch.double, generator=random_stream(2)) * 3
        unembedding = torch.randn(30, 4, dtype=torch.double, generator=random_stream(3)) * 3
        states.requires_grad_(), unembedding.requires_grad_()
        actions = torch.randint(30, (9,), generator=random_stream(4))
        chosen, spread = function(states, unembedding, actions, temperature)
        weights = torch.randn(9, dtype=torch.double, generator=random_stream(5))
        (chosen * weights).sum().backward()
        found.append((chosen.detach(), spread.detach(), states.grad, unembedding.grad))
    for plain, lean in zip(*found):
        torch.testing.assert_close(plain, lean, rtol=1e-10, atol=1e-12)
