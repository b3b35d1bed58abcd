"""What needs torch: scores by tests, and comparisons of a policy's answers that tests judged."""
import torch

from minirlhf.data import encode_prompt, format_prompt
from minirlhf.engine.options import check
from minirlhf.execution.runner import run_answers
from minirlhf.execution.tasks import ALL_INPUTS, inputs_of, prompts, task_of
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2
from minirlhf.tokenizer import Tokenizer

SAMPLES_PER_PROMPT = 4          # answers to each prompt that are compared
PROMPTS_PER_BATCH = 64
MAX_NEW_TOKENS = 16


def pass_tests(pairs: list[tuple[str, str]], tests: str) -> list[bool]:
    """For each (prompt, answer), whether the answer passes all of its "few", "many" or "hidden".

    An answer is run once, on the inputs of all three, and remembered: so a reward and the gold
    judge share a process. careful: an answer that runs for ever for one input fails all tests.

    Example: [("Write f(x): plus 3. f(4) is 7.", "7")] passes "few" and fails "many".
    """
    outcomes = run_answers([(answer, ALL_INPUTS) for _, answer in pairs])
    passed = []
    for (prompt, _), outcome in zip(pairs, outcomes):
        task, example = task_of(prompt)
        expected = {x: task.value(x) for x in inputs_of(example, tests)}
        passed.append(outcome.passes(expected))
    return passed


def score_by_tests(ids: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor,
                   tokenizer: Tokenizer, tests: str) -> torch.Tensor:
    """Scores (B,) of the responses in ids (B, T): 1 if the tests pass, else 0."""
    pairs = []
    for row, prompt_length, length in zip(ids.tolist(), prompt_lengths.tolist(), lengths.tolist()):
        answer = tokenizer.decode(row[prompt_length:length])
        pairs.append((tokenizer.decode(row[:prompt_length]), answer.strip()))
    return torch.tensor(pass_tests(pairs, tests)).float()                           # (B,)


def comparisons(count: int, seed: int, model: str) -> list[dict]:
    """`count` comparisons {"prompt", "chosen", "rejected"} of answers sampled from `model`.

    The policy writes K = 4 answers to each prompt at temperature 1. `chosen` passes the many tests,
    `rejected` does not: what the reward model is to learn is what `reward` pays.
    """
    check(count > 0, f"count must be at least 1, found {count}")
    policy, tokenizer = load_network(GPT2, model), Tokenizer.load(model)
    policy.eval()
    generator = torch.Generator().manual_seed(seed)
    supply = [record["prompt"] for record in prompts(count + PROMPTS_PER_BATCH, seed)]
    records: list[dict] = []
    for start in range(0, len(supply), PROMPTS_PER_BATCH):
        questions = [question for question in supply[start:start + PROMPTS_PER_BATCH]
                     for _ in range(SAMPLES_PER_PROMPT)]
        rows = [encode_prompt(tokenizer, format_prompt(question)) for question in questions]
        with torch.no_grad():
            made = generate(policy, rows, MAX_NEW_TOKENS, end_token=tokenizer.end_token,
                            generator=generator)
        answers = [tokenizer.decode(made.ids[i, made.prompt_lengths[i]:made.lengths[i]].tolist())
                   for i in range(len(rows))]
        pairs = [(question, answer.strip()) for question, answer in zip(questions, answers)]
        passed = pass_tests(pairs, "many")
        for first in range(0, len(pairs), SAMPLES_PER_PROMPT):
            group = range(first, first + SAMPLES_PER_PROMPT)
            records += [{"prompt": questions[i], "chosen": pairs[i][1], "rejected": pairs[j][1]}
                        for i in group for j in group
                        if passed[i] and not passed[j] and pairs[j][1]]
        if len(records) >= count:
            return records[:count]
    raise ValueError(f"expected {count} comparisons, found {len(records)} after {len(supply)} "
                     f"prompts: {model} hardly ever writes a right and a wrong answer to the same "
                     "prompt; is it an SFT model of minirlhf.execution:demonstrations?")
