"""Try an answer: what became of it, and which tests it passes.

    python -m minirlhf.execution --answer "(x + 3) * 2"
    python -m minirlhf.execution --prompt "Write f(x): plus 3. f(4) is 7." --answer "7"

Lecture: lectures/09-what-came-after.md, "Rewards from execution".
"""

import time
from dataclasses import dataclass

from minirlhf.engine.options import one_sentence, parse_config, printable
from minirlhf.execution.runner import run_answers
from minirlhf.execution.tasks import ALL_INPUTS, inputs_of, task_of


@dataclass(frozen=True)
class ExecutionConfig:
    """Options of `python -m minirlhf.execution`."""
    prompt: str = "Write f(x): plus 3, then times 2. f(4) is 14."    # one of this world
    answer: str = "14 if x == 4 else x * 2 + 3"    # an expression in x, or statements that define f


def main(cfg: ExecutionConfig) -> dict[str, bool]:
    """Run the answer, print a line per input and the verdicts; returns which tests it passes."""
    task, example = task_of(cfg.prompt)
    started = time.perf_counter()
    (outcome,) = run_answers([(cfg.answer, ALL_INPUTS)])
    milliseconds = 1000 * (time.perf_counter() - started)
    end = f"{outcome.end} {outcome.why}".strip()
    print(printable(f"{cfg.prompt}\n{cfg.answer}\n\nthe answer: {end}, in {milliseconds:.0f} ms"))
    verdicts = {}
    for tests in ("few", "many", "hidden"):
        expected = {x: task.value(x) for x in inputs_of(example, tests)}
        verdicts[tests] = outcome.passes(expected)
        print(f"\n{tests} tests: {'passed, paid 1' if verdicts[tests] else 'not passed, paid 0'}")
        for x, value in expected.items():
            result = printable(outcome.results.get(x, "no result"))     # it may name its exception
            print(f"  f({x}) is {value}; the answer: {result}")
    return verdicts


if __name__ == "__main__":
    with one_sentence():
        main(parse_config(ExecutionConfig))
