"""What needs torch: scores by tests, and comparisons of a policy's answers that tests judged."""
import torch

from minirlhf.engine.options import check
from minirlhf.execution.runner import run_answers
from minirlhf.execution.tasks import ALL_INPUTS, inputs_of, prompts, task_of
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
from minirlhf.tokenizer import Tokenizer
from minirlhf.world.collect import PROMPTS_PER_BATCH, sample_responses

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
        questions = supply[start:start + PROMPTS_PER_BATCH]
        groups = sample_responses(policy, tokenizer, questions, generator, MAX_NEW_TOKENS)
        pairs = [(question, answer) for question, group in zip(questions, groups)
                 for answer, _ in group]
        passed = dict(zip(pairs, pass_tests(pairs, "many")))
        for question, group in zip(questions, groups):
            answers = [answer for answer, _ in group]
            records += [{"prompt": question, "chosen": one, "rejected": other}
                        for one in answers for other in answers
                        if passed[question, one] and not passed[question, other] and other]
        if len(records) >= count:
            return records[:count]
    raise ValueError(f"expected {count} comparisons, found {len(records)} after {len(supply)} "
                     f"prompts: {model} hardly ever writes a right and a wrong answer to the same "
                     "prompt; is it an SFT model of minirlhf.execution:demonstrations?")
