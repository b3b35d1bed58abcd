"""Where the KL penalty stands, and which gradient each place has in expectation, by enumeration.

    python -m minirlhf.siblings.where_the_kl_stands

A policy with one token of four, another with two tokens of three: so few responses that all can be
visited, and each expectation is a sum. In: nothing. Out: two tables.

All of them look like a penalty on the distance to the reference. The log-ratio of a sample is
l = log pi - log ref. Only some have the gradient of KL(pi || ref), which PPO's objective asks for.
Lecture: lectures/09-what-came-after.md, "Where the KL stands".
"""

import torch

LOGITS = torch.tensor([0.5, -0.3, 0.2, -1.0], dtype=torch.float64)         # one token of four
REF_LOGITS = torch.tensor([-0.4, 0.6, 0.1, 0.3], dtype=torch.float64)
# two tokens of three: row 0 is for the first, row 1 + a for the second after the first was a
LOGITS_OF_TWO = torch.tensor([[0.5, -0.3, 0.2], [1.0, 0.0, -0.5], [-0.7, 0.4, 0.1],
                              [0.2, 0.2, -1.2]], dtype=torch.float64)
REF_LOGITS_OF_TWO = torch.tensor([[-0.4, 0.6, 0.1], [0.3, -0.2, 0.4], [0.1, 0.1, -0.3],
                                  [-0.5, 0.8, 0.0]], dtype=torch.float64)


# ---- one token -----------------------------------------------------------------------------------

def penalties(logits: torch.Tensor, ref_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each place of the KL a number whose gradient is the expected one of the penalty: () each.

    logits, ref_logits (V,). A loss is averaged over samples, and no gradient flows through the
    choice of the sample: hence pi.detach(). What is in the reward is multiplied by grad log pi.
    """
    logprobs = logits.log_softmax(0)                                                # (V,)
    pi = logprobs.detach().exp()                                                    # (V,)
    k1 = logprobs - ref_logits.log_softmax(0)                                       # (V,)
    k3, inverted = (-k1).exp() - 1 + k1, k1.exp() - 1 - k1                          # (V,) each
    return {"k1 in the reward": (pi * k1.detach() * logprobs).sum(),
            "k1 in the loss": (pi * k1).sum(),
            "minus k1 in the loss": (pi * -k1).sum(),
            "k2 in the loss": (pi * k1 ** 2 / 2).sum(),
            "k3 in the loss": (pi * k3).sum(),
            "k3 inverted, in the loss": (pi * inverted).sum(),
            "k3, detached, in the loss": (pi * k3.detach()).sum() + 0 * logits.sum(),
            "all of the vocabulary": (logprobs.exp() * k1).sum()}


def divergences(logits: torch.Tensor, ref_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What such a gradient may be the gradient of: () each."""
    logprobs, ref_logprobs = logits.log_softmax(0), ref_logits.log_softmax(0)       # (V,) each
    return {"KL(policy || reference)": (logprobs.exp() * (logprobs - ref_logprobs)).sum(),
            "KL(reference || policy)": (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(),
            "half the chi-squared": (2 * logprobs - ref_logprobs).exp().sum() / 2,
            "nothing: it is 0": 0 * logits.sum()}


def gradients_of(values: dict[str, torch.Tensor], logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of each value with respect to `logits`."""
    return {name: torch.autograd.grad(value, logits, retain_graph=True)[0]
            for name, value in values.items()}


def name_gradients() -> dict[str, str]:
    """For each place of the KL the divergence whose gradient it has; "" for none of them."""
    logits, names = LOGITS.clone().requires_grad_(), {}
    targets = gradients_of(divergences(logits, REF_LOGITS), logits)
    for place, gradient in gradients_of(penalties(logits, REF_LOGITS), logits).items():
        fitting = [name for name, target in targets.items()
                   if torch.allclose(gradient, target, atol=1e-9)]
        names[place] = fitting[0] if fitting else ""
    return names


# ---- two tokens ----------------------------------------------------------------------------------

def penalties_of_two(logits: torch.Tensor, ref_logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """As `penalties`, for responses of two tokens: logits, ref_logits (1 + V, V) -> () each."""
    logprobs, ref_logprobs = logits.log_softmax(1), ref_logits.log_softmax(1)       # (1 + V, V)
    V = logits.shape[1]
    of_first = logprobs[0][:, None].expand(V, V)         # (V, V): all responses, first by second
    of_second = logprobs[1:]                                                        # (V, V)
    pi = (of_first + of_second).detach().exp()                                      # (V, V)
    k1_first = of_first - ref_logprobs[0][:, None]                                  # (V, V)
    k1_second = of_second - ref_logprobs[1:]                                        # (V, V)
    whole = k1_first + k1_second                                                    # (V, V)
    per_state = (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=1)             # (1 + V,)
    first = logprobs[0].detach().exp()                   # (V,): how often each second state is met
    return {"k1 in the reward": (pi * (whole.detach() * of_first
                                       + k1_second.detach() * of_second)).sum(),
            "k2 of the whole response": (pi * whole ** 2 / 2).sum(),
            "k2 of each token": (pi * (k1_first ** 2 + k1_second ** 2) / 2).sum(),
            "all of the vocabulary": per_state[0] + (first * per_state[1:]).sum(),
            "KL(policy || reference)": ((of_first + of_second).exp() * whole).sum()}


def errors_of_two() -> dict[str, float]:
    """How far each gradient is from that of KL(policy || reference), relative to its norm."""
    logits = LOGITS_OF_TWO.clone().requires_grad_()
    gradients = gradients_of(penalties_of_two(logits, REF_LOGITS_OF_TWO), logits)
    target = gradients.pop("KL(policy || reference)")                               # (1 + V, V)
    return {name: ((gradient - target).norm() / target.norm()).item()
            for name, gradient in gradients.items()}


def main() -> None:
    """Print both tables."""
    print("one token: the expected gradient is that of")
    for place, name in name_gradients().items():
        print(f"  {place:26}{name}")
    print("\ntwo tokens: relative error against the gradient of KL(policy || reference)")
    for place, error in errors_of_two().items():
        print(f"  {place:26}{error:.3f}")


if __name__ == "__main__":
    main()
