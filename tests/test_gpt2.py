"""The network, its scalar head, and the log-probabilities of the tokens in a row."""

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from networks import END, PROMPTS, SMALL, padded, randomise, small_model

from minirlhf.engine.training import random_stream
from minirlhf.gpt2 import (
    GPT2,
    Conv1D,
    GPT2Config,
    PolicyWithValue,
    ScalarModel,
    behaviour_logprobs,
    token_logprobs,
)

# ---- the network ---------------------------------------------------------------------------------

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


@pytest.mark.parametrize("n_layer, n_embd, n_head, published", [
    (12, 768, 12, 124_439_808), (24, 1024, 16, 354_823_168), (36, 1280, 20, 774_030_080),
    (48, 1600, 25, 1_557_611_200)])
def test_the_published_sizes_have_the_published_numbers_of_parameters(n_layer, n_embd, n_head,
                                                                      published):
    with torch.device("meta"):                       # shapes without memory
        model = GPT2(GPT2Config(n_embd=n_embd, n_layer=n_layer, n_head=n_head))
    assert sum(parameter.numel() for parameter in model.parameters()) == published


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


# ---- padding -------------------------------------------------------------------------------------

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
        one, uncertainty = token_logprobs(model.hidden(alone), alone,
                                          torch.ones(1, len(row) - 1).bool(), model.wte.weight)
        assert torch.allclose(one[0], logprobs[b, :len(row) - 1], atol=1e-12)
        assert torch.allclose(uncertainty[0], entropy[b, :len(row) - 1], atol=1e-12)


def test_what_fills_the_padding_changes_nothing():
    model, scorer = small_model(), randomise(ScalarModel(SMALL)).requires_grad_(False)
    one, lengths = padded(PROMPTS, END)
    other, _ = padded(PROMPTS, 3)
    real = torch.arange(one.shape[1]) < lengths[:, None]
    assert torch.equal(model.hidden(one)[real], model.hidden(other)[real])
    assert torch.equal(scorer.score(one, lengths), scorer.score(other, lengths))


def test_the_score_is_read_at_the_last_real_token_even_if_it_is_the_end_token():
    scorer = randomise(ScalarModel(SMALL)).requires_grad_(False)
    ids = torch.tensor([[10, 3, END, END, END], [10, 3, 4, 5, END]])
    all_scores = scorer(ids)
    assert all_scores.shape == (2, 5)
    scores = scorer.score(ids, torch.tensor([3, 5]))
    assert scores.tolist() == [all_scores[0, 2].item(), all_scores[1, 4].item()]
    assert scores[0] != all_scores[0, 1] and scores[0] != all_scores[0, 4]


def test_the_score_is_the_head_applied_to_the_last_hidden_state():
    scorer = randomise(ScalarModel(SMALL)).requires_grad_(False)
    ids = torch.tensor([[1, 2, 3]])
    expected = scorer.transformer.hidden(ids)[0, 2] @ scorer.score_head.weight[0]
    assert torch.allclose(scorer.score(ids, torch.tensor([3]))[0], expected, atol=1e-13)


# ---- token_logprobs ------------------------------------------------------------------------------

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
        logits = slow_logits(model, ids[b, :t + 1].tolist())[-1]
        row = torch.log_softmax(logits / temperature, 0)
        expected = row[ids[b, t + 1]] if mask[b, t] else torch.tensor(0.0)
        assert logprobs[b, t].item() == pytest.approx(expected.item(), abs=1e-11)
        expected = -sum(p * math.log(p) for p in row.exp().tolist()) if mask[b, t] else 0
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


# ---- precision -----------------------------------------------------------------------------------

def dtypes_of_products(network: torch.nn.Module) -> set:
    """A set that gets the dtype of every product of a layer (Conv1D) that the network computes."""
    dtypes = set()

    def note(module, inputs, output):
        dtypes.add(output.dtype)

    for module in network.modules():
        if isinstance(module, Conv1D):
            module.register_forward_hook(note)
    return dtypes


def rows_of_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (3, 9) of the small vocabulary, lengths (3,), and the mask of all their actions."""
    ids = torch.randint(0, 11, (3, 9), generator=random_stream(0))
    lengths = torch.tensor([9, 5, 7])
    return ids, lengths, torch.arange(8) < lengths[:, None] - 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_products_of_the_layers_are_in_the_networks_dtype(dtype):
    model = randomise(GPT2(SMALL)).float()
    model.dtype, dtypes = dtype, dtypes_of_products(model)
    ids, _, mask = rows_of_tokens()
    hidden, logits = model.hidden(ids), model(ids)
    with model.precision():                          # as in `generate`
        assert model.hidden(ids).dtype == model(ids).dtype == torch.float32
    for entropy_grad in (True, False):               # the plain form and its fast twin
        logprobs, entropy = token_logprobs(hidden, ids, mask, model.wte.weight, 0.7, entropy_grad)
        logprobs.sum().backward(retain_graph=True)
        assert logprobs.dtype == entropy.dtype == torch.float32
    assert dtypes == {getattr(torch, dtype)}
    assert hidden.dtype == logits.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_values_and_their_gradients_are_in_float32(dtype):
    ids, lengths, mask = rows_of_tokens()
    policy, critic = randomise(GPT2(SMALL), 1).float(), randomise(ScalarModel(SMALL), 2).float()
    policy.dtype = critic.transformer.dtype = dtype
    scores, dtypes = critic.score(ids, lengths), dtypes_of_products(critic)
    for networks in (PolicyWithValue(policy, critic),
                     PolicyWithValue(policy, ScalarModel(SMALL, trunk=policy))):
        logprobs, values, entropy = networks.evaluate_actions(ids, mask, 1.0)
        ((values - 1) ** 2).sum().backward()
        assert {x.dtype for x in (scores, logprobs, values, entropy)} == {torch.float32}
        head = networks.critic.score_head.weight
        assert head.dtype == head.grad.dtype == torch.float32 and head.grad.any()
    assert dtypes == {getattr(torch, dtype)}


def test_a_small_step_is_not_rounded_away_under_bfloat16():
    """Near 0.02 bfloat16 numbers are 1.2e-4 apart; Adam's first step is the learning rate."""
    model = randomise(GPT2(SMALL)).float()
    model.dtype, weight = "bfloat16", model.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    model(rows_of_tokens()[0])[..., 0].sum().backward()
    torch.optim.Adam(model.parameters(), lr=1e-5).step()
    torch.testing.assert_close((weight - before).abs(), torch.full_like(before, 1e-5), rtol=0.1,
                               atol=0)


def test_bfloat16_changes_the_log_probabilities_a_little():
    ids, _, mask = rows_of_tokens()
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=11, n_positions=16, n_embd=48, n_layer=3, n_head=3))
    results = []
    for model.dtype in ("float32", "bfloat16"):
        hidden = model.hidden(ids)
        results.append(token_logprobs(hidden, ids, mask, model.wte.weight)[0])
    apart = (results[0] - results[1]).abs().max()
    assert 0 < apart < 0.01


# ---- what PPO trains -----------------------------------------------------------------------------

def policy_with_value(shared: bool) -> PolicyWithValue:
    """The same weights either way: the critic's trunk is the policy, or a copy of it."""
    policy = randomise(GPT2(SMALL), 1)
    trunk = policy if shared else copy.deepcopy(policy)
    networks = PolicyWithValue(policy, ScalarModel(SMALL, trunk=trunk)).double()
    with torch.no_grad():
        networks.critic.score_head.weight.copy_(torch.linspace(-1, 1, SMALL.n_embd))
    return networks


def test_a_critic_starts_at_0_whatever_its_trunk():
    ids, _, mask = rows_of_tokens()
    policy = small_model()
    for critic in (randomise(ScalarModel(SMALL)), ScalarModel(SMALL, trunk=policy).double()):
        _, values, _ = PolicyWithValue(policy, critic).evaluate_actions(ids, mask, 1.0)
        assert not values.any()


def test_values_are_the_heads_numbers_at_the_states_and_0_outside_the_mask():
    ids, _, mask = rows_of_tokens()
    networks = policy_with_value(shared=False)
    logprobs, values, entropy = networks.evaluate_actions(ids, mask, 0.7, entropy_grad=True)
    assert torch.equal(values, torch.where(mask, networks.critic(ids)[:, :-1], 0.0))
    policy = networks.policy
    expected = token_logprobs(policy.hidden(ids), ids, mask, policy.wte.weight, 0.7, True)
    assert torch.equal(logprobs, expected[0]) and torch.equal(entropy, expected[1])
    assert entropy.requires_grad


def test_a_shared_trunk_gives_what_a_separate_one_with_equal_weights_gives():
    ids, lengths, mask = rows_of_tokens()
    shared, separate = policy_with_value(shared=True), policy_with_value(shared=False)
    assert torch.equal(shared.critic.score(ids, lengths), separate.critic.score(ids, lengths))
    results = []
    for networks in (shared, separate):
        results.append(networks.evaluate_actions(ids, mask, 0.7))
        logprobs, values, _ = results[-1]
        (logprobs.sum() + values.sum()).backward()
    for one, other in zip(*results):
        assert torch.equal(one, other)
    trunk = separate.critic.transformer.named_parameters()
    for (name, parameter), (_, of_policy), (_, of_critic) in zip(
            shared.policy.named_parameters(), separate.policy.named_parameters(), trunk):
        expected = of_policy.grad + of_critic.grad   # the trunk serves both, so it gets both
        torch.testing.assert_close(parameter.grad, expected, msg=name)


@pytest.mark.parametrize("shared", [True, False])
def test_a_shared_trunk_is_computed_and_trained_once(shared):
    ids, _, mask = rows_of_tokens()
    networks, passes = policy_with_value(shared), []
    for module in networks.modules():
        if isinstance(module, GPT2):                 # a shared one comes up once
            module.ln_f.register_forward_hook(lambda *_: passes.append(1))
    networks.evaluate_actions(ids, mask, 1.0)
    assert len(passes) == (1 if shared else 2)
    trunk = sum(parameter.numel() for parameter in networks.policy.parameters())
    parameters = sum(parameter.numel() for parameter in networks.parameters())
    assert parameters == trunk * (1 if shared else 2) + SMALL.n_embd
