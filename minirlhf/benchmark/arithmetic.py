"""How much arithmetic and how much reading a PPO iteration needs: pure functions of the sizes.

A product of (a, b) and (b, c) matrices counts 2abc operations. What costs little beside the matrix
products is left out: layer norms, GELU, softmax, biases, the value head, the optimiser.

Letters: C channels, V vocabulary, as in gpt2.py.
"""

from minirlhf.gpt2 import GPT2Config


def block_parameters(config: GPT2Config) -> int:
    """Entries of the weight matrices of all layers: 12 C^2 each (3 + 1 attention, 4 + 4 MLP).

    Example: 124M has 12 layers of 768 channels: 84,934,656.
    """
    return 12 * config.n_embd ** 2 * config.n_layer


def forward_flops(config: GPT2Config, rows: int, tokens: int, logit_positions: int) -> int:
    """Operations of one forward pass over `rows` rows of `tokens` tokens.

    Every token passes all matrices of the layers. Attention multiplies each token's query with the
    keys up to its own, and the weights with as many values: 4 C operations a pair and layer.
    Logits are made for `logit_positions` positions in all (0: a critic or reward model).

    Example: one layer, C 2, V 5, one row of 3 tokens, logits for 2 of them: 2 * 48 * 3 = 288 for
    the matrices, 4 * 2 * (1 + 2 + 3) = 48 for attention, 2 * 2 * 5 * 2 = 40 for the logits: 376.
    """
    C, V = config.n_embd, config.vocab_size
    matrices = 2 * block_parameters(config) * rows * tokens
    pairs = tokens * (tokens + 1) // 2
    attention = 4 * C * pairs * rows * config.n_layer
    return matrices + attention + 2 * C * V * logit_positions


def training_flops(forward: int) -> int:
    """Operations of a forward and a backward pass: the backward pass makes two products, one for
    the gradient of its input and one for that of its weight, where the forward pass makes one.

    Example: 376 becomes 1128.
    """
    return 3 * forward


def bytes_per_step(config: GPT2Config) -> int:
    """Bytes of float32 weights that one decoding step reads: all layers and the unembedding.

    Example: one layer, C 2, V 5: 4 * (48 + 10) = 232. The 124M model: 494 million.
    """
    return 4 * (block_parameters(config) + config.vocab_size * config.n_embd)


def decode_flops(config: GPT2Config, rows: int, context: int) -> int:
    """Operations of one decoding step: one new token a row, which sees `context` tokens.

    Example: one layer, C 2, V 5, one row, 3 tokens in sight: 2 * 48 + 4 * 2 * 3 + 2 * 10 = 140.
    """
    attention = 4 * config.n_embd * context * config.n_layer
    products = 2 * (block_parameters(config) + config.vocab_size * config.n_embd)
    return rows * (products + attention)
