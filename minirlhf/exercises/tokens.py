"""Exercises of lectures 0, 1 and 2: masks, log-probabilities, files, the SFT loss."""

import json
import math
import random
import struct

import torch
import torch.nn.functional as F

from minirlhf.data import response_mask
from minirlhf.exercises.exercise import Code, draw, draw_lengths, draw_mask, tensor
from minirlhf.sft import sft_loss

# ---- response_mask -------------------------------------------------------------------------------


def lengths_case(rng: random.Random) -> tuple:
    """Prompt lengths, lengths and a width."""
    return (*draw_lengths(rng), 7)


def slow_mask(prompt_lengths, lengths, width):
    """Column t is a response action if ids[t+1] is a response token."""
    return [[float(prompt <= t + 1 < length) for t in range(width - 1)]
            for prompt, length in zip(prompt_lengths.tolist(), lengths.tolist())]


def mask_of_tokens(prompt_lengths, lengths, width):
    """Marks tokens and not actions."""
    return torch.tensor(slow_mask(prompt_lengths + 1, lengths + 1, width)) > 0


def mask_without_end(prompt_lengths, lengths, width):
    """Leaves the last token out."""
    return response_mask(prompt_lengths, lengths - 1, width)


def mask_with_padding(prompt_lengths, lengths, width):
    """Everything after the prompt counts."""
    return response_mask(prompt_lengths, torch.full_like(lengths, width), width)


def mask_of_prompt(prompt_lengths, lengths, width):
    """The prompt counts, too."""
    return response_mask(torch.ones_like(lengths), lengths, width)


RESPONSE_MASK = Code(
    response_mask, 0, 15, "easy", "which columns of a per-token tensor are response tokens?",
    (torch.tensor([2]), torch.tensor([5]), 6), tensor([0, 1, 1, 1, 0]), lengths_case, slow_mask,
    ((mask_of_tokens, "Your mask is one column late: column t is the action ids[t+1], so the first "
      "response token, ids[prompt_length], is the action of column prompt_length - 1."),
     (mask_without_end, "The last token is missing. The end token that the policy chose is an "
      "action like any other: it stays in the mask."),
     (mask_with_padding, "The padding is in your mask: a response ends at lengths."),
     (mask_of_prompt, "The prompt is in your mask: nobody chose its tokens.")),
    "Write down for one row which column chooses the first response token, and which the last.",
    "Column t describes the step from state ids[0..t] to action ids[t+1]. The first response token "
    "is ids[prompt_length], so its column is prompt_length - 1; the last is ids[length - 1], so "
    "its column is length - 2. Comparing a row of column numbers with these two gives the mask for "
    "all rows at once, and no id is looked at: an end token that was chosen and padding are the "
    "same id.")


# ---- token_logprobs ------------------------------------------------------------------------------

def token_logprobs(logits: torch.Tensor, ids: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability of every action of a row, in nats.

    logits (B, T, V) of the network at every position, ids (B, T) -> (B, T-1): column t is the
    log-probability of ids[t+1] under softmax(logits[t] / temperature).

    Example: V = 2, all logits 0: every log-probability is -0.6931, which is log 1/2.
    """
    logprobs = F.log_softmax(logits[:, :-1] / temperature, dim=-1)                  # (B, T-1, V)
    return logprobs.gather(2, ids[:, 1:, None]).squeeze(2)                          # (B, T-1)


def logits_case(rng: random.Random) -> tuple:
    """Logits, ids and a temperature that is not 1."""
    ids = torch.tensor([[rng.randrange(4) for _ in range(5)] for _ in range(2)])
    return draw(rng, 2, 5, 4, scale=2.0), ids, rng.choice([0.5, 2.0])


def slow_logprobs(logits, ids, temperature):
    """One token at a time."""
    rows = []
    for row, tokens in zip(logits.tolist(), ids.tolist()):
        rows.append([])
        for t in range(len(tokens) - 1):
            weights = [math.exp(logit / temperature) for logit in row[t]]
            rows[-1].append(math.log(weights[tokens[t + 1]] / sum(weights)))
    return rows


def logprobs_without_shift(logits, ids, temperature):
    """The action is taken for the token that the state ends with."""
    return (logits / temperature).log_softmax(2).gather(2, ids[..., None]).squeeze(2)[:, :-1]


def logprobs_late(logits, ids, temperature):
    """States and actions both begin at 1."""
    return (logits / temperature).log_softmax(2).gather(2, ids[..., None]).squeeze(2)[:, 1:]


def logprobs_at_1(logits, ids, temperature):
    """The temperature is not used."""
    return token_logprobs(logits, ids, 1.0)


def logprobs_hotter(logits, ids, temperature):
    """Logits are multiplied by the temperature."""
    return token_logprobs(logits, ids, 1 / temperature)


def plain_probabilities(logits, ids, temperature):
    """No logarithm."""
    return token_logprobs(logits, ids, temperature).exp()


def plain_logits(logits, ids, temperature):
    """Logits that are not normalised."""
    return (logits[:, :-1] / temperature).gather(2, ids[:, 1:, None]).squeeze(2)


TOKEN_LOGPROBS = Code(
    token_logprobs, 0, 20, "medium", "logits and ids become log-probabilities of actions",
    (tensor(*[[[0.0, 0.0]] * 3]), torch.tensor([[0, 1, 0]]), 1.0),
    tensor([-math.log(2), -math.log(2)]), logits_case, slow_logprobs,
    ((logprobs_without_shift, "You look up ids[t] in logits[t], the token that the state ends "
      "with. logits[t] predict the next one, ids[t+1]."),
     (logprobs_late, "States and actions are both shifted: logits[t] predict ids[t+1], so drop the "
      "last position of the logits and the first of the ids."),
     (logprobs_at_1, "The temperature is not used. Who samples at 0.7 and scores at 1 trains "
      "another policy than the one that wrote the tokens."),
     (logprobs_hotter, "Logits are divided by the temperature, not multiplied."),
     (plain_probabilities, "These are probabilities; take their logarithm, by log_softmax."),
     (plain_logits, "Logits are not log-probabilities yet: normalise them over the vocabulary.")),
    "Shift once: logits[:, :-1] belong to ids[:, 1:]. log_softmax, then gather along the last "
    "dimension.",
    "The only shift of the three stages stands in this function. log_softmax is computed from the "
    "logits directly: the logarithm of a softmax would be -inf where a probability rounds to 0. "
    "The project's own token_logprobs in gpt2.py makes logits for masked positions only, which "
    "gives the same numbers with less memory.")


# ---- read_header ---------------------------------------------------------------------------------

def read_header(data: bytes) -> dict[str, tuple[int, int]]:
    """Where the tensors of a safetensors file lie: name -> (first byte, byte after the last).

    data: the whole file. Its first 8 bytes are an unsigned little-endian integer n, the next n
    bytes are JSON: name -> {"dtype": ..., "shape": ..., "data_offsets": [begin, end]}, with offsets
    from the end of the header. A key "__metadata__" is no tensor. Results count from the start of
    the file.

    Example: a header of 64 bytes that says {"a": {"dtype": "F32", "shape": [2], "data_offsets":
    [0, 8]}}, padded with spaces, gives {"a": (72, 80)}.
    Source: https://github.com/huggingface/safetensors/blob/v0.4.5/README.md#format
    """
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + n])
    return {name: (8 + n + entry["data_offsets"][0], 8 + n + entry["data_offsets"][1])
            for name, entry in header.items() if name != "__metadata__"}


def file_of(header: dict, size: int) -> tuple:
    """The bytes of a file with this header, padded to `size`, and 24 bytes of data."""
    text = json.dumps(header).encode().ljust(size)
    return (len(text).to_bytes(8, "little") + text + bytes(24),)


def entry_of(begin: int, end: int) -> dict:
    """What a header says of a tensor of float32."""
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def header_case(rng: random.Random) -> tuple:
    """Metadata and two tensors."""
    cut = 4 * rng.randint(1, 5)
    return file_of({"__metadata__": {"format": "pt"}, "wte": entry_of(0, cut),
                    "wpe": entry_of(cut, 24)}, rng.randint(180, 300))


def slow_header(data):
    """Byte by byte."""
    n = sum(byte * 256 ** place for place, byte in enumerate(data[:8]))
    entries = json.loads(data[8:8 + n].decode())
    entries.pop("__metadata__", None)
    return {name: tuple(8 + n + offset for offset in entry["data_offsets"])
            for name, entry in entries.items()}


def header_from_the_data(data):
    """Offsets as the file has them."""
    start = 8 + struct.unpack("<Q", data[:8])[0]
    return {name: (first - start, last - start)
            for name, (first, last) in read_header(data).items()}


def header_without_the_length(data):
    """The 8 bytes of the length are forgotten."""
    return {name: (first - 8, last - 8) for name, (first, last) in read_header(data).items()}


READ_HEADER = Code(
    read_header, 1, 20, "medium", "find the tensors in a safetensors file",
    file_of({"a": entry_of(0, 8)}, 64), {"a": (72, 80)}, header_case, slow_header,
    ((header_from_the_data, "data_offsets count from the end of the header. Add 8 + n to count "
      "from the start of the file."),
     (header_without_the_length, "You forgot the 8 bytes of the length in front of the header.")),
    'struct.unpack("<Q", data[:8]) reads the length, json.loads the rest of the header.',
    "Nothing in such a file is executed: a length, JSON, and numbers. That is the reason why the "
    "format was made. A reader for files of strangers also checks each number before it uses it: "
    "minirlhf/files/tensors.py is this function with those checks.")


# ---- sft_loss ------------------------------------------------------------------------------------

def sft_case(rng: random.Random) -> tuple:
    """Log-probabilities, not 0 outside the mask; the step has more tokens than these."""
    mask = draw_mask(rng)
    return -draw(rng, *mask.shape).abs(), mask, int(mask.sum()) + rng.randint(1, 9)


def slow_sft_loss(logprobs, mask, token_count):
    """Token by token."""
    total = 0.0
    for row, marks in zip(logprobs.tolist(), mask.tolist()):
        total -= sum(x for x, counts in zip(row, marks) if counts)
    return total / token_count


def sft_loss_of_all(logprobs, mask, token_count):
    """The mask is not used."""
    return -logprobs.mean()


def sft_sum_of_all(logprobs, mask, token_count):
    """The mask is not used in the sum."""
    return -logprobs.sum() / token_count


def sft_mean_of_all(logprobs, mask, token_count):
    """Divided by all columns."""
    return -(logprobs * mask).mean()


def sft_of_this_part(logprobs, mask, token_count):
    """Divided by the part's own tokens."""
    return -(logprobs * mask).sum() / mask.sum()


def sft_of_rows(logprobs, mask, token_count):
    """Mean of the rows' means."""
    return -((logprobs * mask).sum(1) / mask.sum(1)).mean()


def sft_upwards(logprobs, mask, token_count):
    """The sign is missing."""
    return -sft_loss(logprobs, mask, token_count)


SFT_LOSS = Code(
    sft_loss, 2, 10, "easy", "the loss on response tokens", (tensor([-1, -2, -9]),
    torch.tensor([[True, True, False]]), 2), 1.5, sft_case, slow_sft_loss,
    ((sft_loss_of_all, "Prompt and padding are in your mean: the mask is not used."),
     (sft_sum_of_all, "Prompt and padding are in your sum: the mask is not used."),
     (sft_mean_of_all, "You divide by the number of all columns. Divide by token_count, the number "
      "of response tokens."),
     (sft_of_this_part, "You divide by the response tokens of this part. Divide by token_count, "
      "those of the whole step: only then do the losses of its parts add up."),
     (sft_of_rows, "You take the mean of each row and then the mean of the rows, so a token of a "
      "short response weighs more. Here every token weighs the same."),
     (sft_upwards, "The sign is missing: minimising this makes the demonstrations unlikely.")),
    "torch.where(mask, logprobs, 0.0) is safer than a product: 0 * inf is nan.",
    "One number per response token, added up and divided by the number of tokens in the whole "
    "step. Dividing by a count that is given, and not by this part's own, lets the losses of the "
    "parts of a large batch add up to the loss of the batch.", (0,))

EXERCISES = [RESPONSE_MASK, TOKEN_LOGPROBS, READ_HEADER, SFT_LOSS]
