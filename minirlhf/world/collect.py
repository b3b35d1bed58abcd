"""What needs torch: comparisons of a policy's responses, and the gold judge as a reward."""
import torch

from minirlhf.data import encode_prompt, format_prompt
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2
from minirlhf.tokenizer import Tokenizer
from minirlhf.world.judge import judge, judge_by_token
from minirlhf.world.labellers import prompts

SAMPLES_PER_PROMPT = 4          # K: up to 6 pairs per prompt for the price of 4 responses
PROMPTS_PER_BATCH = 64
MAX_NEW_TOKENS = 32


def sample_responses(policy: GPT2, tokenizer: Tokenizer, questions: list[str],
                     generator: torch.Generator,
                     max_new_tokens: int = MAX_NEW_TOKENS) -> list[list[tuple[str, bool]]]:
    """K responses to each question: a list, one entry a question, of K pairs (text, ended)."""
    rows = [encode_prompt(tokenizer, format_prompt(question)) for question in questions
            for _ in range(SAMPLES_PER_PROMPT)]
    with torch.no_grad():
        out = generate(policy, rows, max_new_tokens, end_token=tokenizer.end_token,
                       generator=generator)
    samples = []
    for row in range(len(rows)):
        response = out.ids[row, out.prompt_lengths[row]:out.lengths[row]].tolist()
        samples.append((tokenizer.decode(response).strip(), bool(out.ended[row])))
    return [samples[start:start + SAMPLES_PER_PROMPT]
            for start in range(0, len(rows), SAMPLES_PER_PROMPT)]


def compare(question: str, samples: list[tuple[str, bool]]) -> list[dict]:
    """All pairs of a prompt's responses that the judge tells apart, the better one as `chosen`."""
    judged = [(judge(question, text, ended).score, text) for text, ended in samples if text]
    records = []
    for first in range(len(judged)):
        for second in range(first + 1, len(judged)):
            pair = sorted((judged[first], judged[second]), reverse=True)
            (better, chosen), (worse, rejected) = pair
            if better > worse and chosen != rejected:
                records.append({"prompt": question, "chosen": chosen, "rejected": rejected,
                                "margin": round(better - worse, 6)})
    return records


def comparisons(count: int, seed: int, model: str) -> list[dict]:
    """`count` comparisons of responses sampled from the policy in folder `model`.

    For each prompt of the training split the policy writes K = 4 responses at temperature 1. The
    gold judge orders them, and every pair that it tells apart is one comparison
    {"prompt", "chosen", "rejected", "margin"}, the margin being the difference in score.
    careful: the pairs of one prompt stand together; to hold some out, cut between prompts.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, found {count}")
    policy = load_network(GPT2, model)
    policy.eval()
    tokenizer = Tokenizer.load(model)
    generator = torch.Generator().manual_seed(seed)
    supply = prompts(count + PROMPTS_PER_BATCH, seed)       # enough, unless most are ties
    records = []
    for start in range(0, len(supply), PROMPTS_PER_BATCH):
        questions = [record["prompt"] for record in supply[start:start + PROMPTS_PER_BATCH]]
        samples = sample_responses(policy, tokenizer, questions, generator)
        for question, responses in zip(questions, samples):
            records += compare(question, responses)
        if len(records) >= count:
            return records[:count]
    raise ValueError(f"expected {count} comparisons, found {len(records)} after {len(supply)} "
                     f"prompts: the responses of {model} hardly differ, so nothing can be compared")


def gold_reward(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                tokenizer: Tokenizer) -> torch.Tensor:
    """The gold judge as a reward function: scores (B,) of the responses in ids (B, T).

    Raises ValueError if a row's prompt is not one of the text world's.
    """
    scores = []
    for row, prompt_length, length in zip(ids.tolist(), prompt_lengths.tolist(), lengths.tolist()):
        prompt = tokenizer.decode(row[:prompt_length])
        response = tokenizer.decode(row[prompt_length:length])
        ended = length > prompt_length and row[length - 1] == tokenizer.end_token
        scores.append(judge(prompt, response, ended).score)
    return torch.tensor(scores)                                                     # (B,)


def gold_reward_per_token(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                          tokenizer: Tokenizer) -> torch.Tensor:
    """`gold_reward` paid where the facts are stated: ids (B, T) -> scores per token (B, T-1).

    Column t is for the action ids[t+1]; a row's sum is its `gold_reward`. See `judge_by_token`.
    """
    scores = torch.zeros(ids.shape[0], ids.shape[1] - 1)                            # (B, T-1)
    for b, row in enumerate(ids.tolist()):
        start, stop = int(prompt_lengths[b]), int(lengths[b])
        if stop > start:                                 # of an empty response nothing can be paid
            prefixes = [tokenizer.decode(row[start:end]) for end in range(start + 1, stop + 1)]
            points = judge_by_token(tokenizer.decode(row[:start]), prefixes,
                                    row[stop - 1] == tokenizer.end_token)
            scores[b, start - 1:stop - 1] = torch.tensor(points)
    return scores
