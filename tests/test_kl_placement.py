"""siblings/where_the_kl_stands.py: the enumeration itself against independent derivatives."""

import math

import pytest
import torch
from helpers import quietly

from minirlhf.siblings import where_the_kl_stands as kl
from minirlhf.siblings.groups import k3_to_reference
from minirlhf.siblings.where_the_kl_stands import (
    LOGITS,
    LOGITS_OF_TWO,
    REF_LOGITS,
    REF_LOGITS_OF_TWO,
    divergences,
    errors_of_two,
    gradients_of,
    name_gradients,
    penalties,
    penalties_of_two,
)


def test_what_each_place_is_the_gradient_of():
    assert name_gradients() == {
        "k1 in the reward": "KL(policy || reference)",
        "k1 in the loss": "nothing: it is 0",
        "minus k1 in the loss": "nothing: it is 0",
        "k2 in the loss": "KL(policy || reference)",
        "k3 in the loss": "KL(reference || policy)",
        "k3 inverted, in the loss": "half the chi-squared",
        "k3, detached, in the loss": "nothing: it is 0",
        "all of the vocabulary": "KL(policy || reference)"}


def numeric_gradient(function, logits: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """Central differences: no autograd in it."""
    gradient = torch.zeros_like(logits)
    for i in range(logits.numel()):
        shift = torch.zeros_like(logits).flatten()
        shift[i] = step
        shift = shift.view_as(logits)
        gradient.view(-1)[i] = (function(logits + shift) - function(logits - shift)) / (2 * step)
    return gradient


def plain_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> float:
    """KL of the softmax of `logits` from that of `ref_logits`, in plain Python."""
    p, q = [[math.exp(x) for x in row.tolist()] for row in (logits, ref_logits)]
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_the_divergences_and_the_two_right_places_agree_with_central_differences():
    logits = LOGITS.clone().requires_grad_()
    forward = numeric_gradient(lambda x: plain_kl(x, REF_LOGITS), LOGITS)
    backward = numeric_gradient(lambda x: plain_kl(REF_LOGITS, x), LOGITS)
    values = gradients_of({**divergences(logits, REF_LOGITS), **penalties(logits, REF_LOGITS)},
                          logits)
    for name in ("KL(policy || reference)", "k1 in the reward", "k2 in the loss"):
        torch.testing.assert_close(values[name], forward, rtol=1e-6, atol=1e-8)
    for name in ("KL(reference || policy)", "k3 in the loss"):
        torch.testing.assert_close(values[name], backward, rtol=1e-6, atol=1e-8)


def test_the_k3_of_the_enumeration_is_the_one_of_the_group_methods():
    logits = LOGITS.clone().requires_grad_()
    logprobs, ref_logprobs = logits.log_softmax(0), REF_LOGITS.log_softmax(0)
    mean = (logprobs.detach().exp() * k3_to_reference(logprobs, ref_logprobs)).sum()
    expected = penalties(logits, REF_LOGITS)["k3 in the loss"]
    assert mean.item() == pytest.approx(expected.item())
    torch.testing.assert_close(*[torch.autograd.grad(x, logits)[0] for x in (mean, expected)])


def test_as_values_k1_and_k3_are_the_kl_and_k2_is_not():
    values = {name: value.item() for name, value in penalties(LOGITS, REF_LOGITS).items()}
    exact = plain_kl(LOGITS, REF_LOGITS)
    assert values["k1 in the loss"] == pytest.approx(exact)
    assert values["k3 in the loss"] == pytest.approx(exact)
    assert abs(values["k2 in the loss"] - exact) > 0.01
    assert abs(values["k3 inverted, in the loss"] - exact) > 0.01


def kl_of_two(logits: torch.Tensor) -> float:
    """KL over responses of two tokens, in plain Python, from the chain rule."""
    first = logits[0].softmax(0).tolist()
    return plain_kl(logits[0], REF_LOGITS_OF_TWO[0]) + sum(
        first[a] * plain_kl(logits[1 + a], REF_LOGITS_OF_TWO[1 + a]) for a in range(3))


def test_over_two_tokens_the_places_per_token_miss_what_a_token_does_to_the_next_state():
    exact = numeric_gradient(kl_of_two, LOGITS_OF_TWO)
    logits = LOGITS_OF_TWO.clone().requires_grad_()
    gradients = gradients_of(penalties_of_two(logits, REF_LOGITS_OF_TWO), logits)
    for name in ("k1 in the reward", "k2 of the whole response", "KL(policy || reference)"):
        torch.testing.assert_close(gradients[name], exact, rtol=1e-6, atol=1e-8)
    for name in ("k2 of each token", "all of the vocabulary"):
        torch.testing.assert_close(gradients[name][1:], exact[1:], rtol=1e-6, atol=1e-8)
        assert (gradients[name][0] - exact[0]).abs().max() > 0.01    # the first token's row
    assert [round(error, 3) for error in errors_of_two().values()] == [0.0, 0.0, 0.056, 0.056]


def test_the_command_prints_both_tables(capsys):
    kl.main()
    printed = capsys.readouterr().out
    assert "k3 in the loss            KL(reference || policy)" in printed
    assert "k2 of each token          0.056" in printed
    assert quietly(kl.main) is None
