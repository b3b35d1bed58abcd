"""Small GPT-2s with large random weights, for the tests of the network, sampling and files."""

import torch

from minirlhf.engine.training import random_stream
from minirlhf.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(vocab_size=11, n_positions=16, n_embd=12, n_layer=3, n_head=3)
END = SMALL.vocab_size - 1
PROMPTS = [[10, 3], [1], [10, 4, 4, 7, 2], [5, 6, 0]]         # of unequal lengths


def randomise(model, seed: int = 0):
    """Random numbers in every parameter, biases and layer norms too, in float64.

    They are large: what a token is and where it stands must matter, or the tests would not see
    a wrong position, a wrong column of the cache or a wrong row.
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
    """A network of SMALL sizes in float64."""
    return randomise(GPT2(SMALL), seed).requires_grad_(False)


def text_model(tokenizer) -> GPT2:
    """A network with the tokenizer's vocabulary in float32."""
    config = GPT2Config(tokenizer.vocab_size, n_positions=80, n_embd=24, n_layer=2, n_head=3)
    return randomise(GPT2(config)).requires_grad_(False).float()


def padded(rows: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids (B, T) and lengths (B,), not by the function of data.py."""
    width = max(len(row) for row in rows)
    return (torch.tensor([row + [fill] * (width - len(row)) for row in rows]),
            torch.tensor([len(row) for row in rows]))


def response_of(made, row: int = 0) -> list[int]:
    """The response of one row of a `Generation`."""
    return made.ids[row, made.prompt_lengths[row]:made.lengths[row]].tolist()
