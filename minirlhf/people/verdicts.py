"""A person as the judge: pairs of answers at the terminal, blinded, in an order drawn by seed.

Started by `python -m minirlhf.evaluate --judge person --out FOLDER`. Every verdict is appended to
FOLDER/human.jsonl before the next pair is shown, one JSON object per line, so a session may end at
any time (q, Ctrl-C, the end of a pipe) and the next one goes on where it stopped.

A question is one pair with all that its verdict depends on: folders, prompts, seed, both texts, and
which of them shows first. A verdict is its question plus the key that was chosen. So a file that
belongs to other weights or options is recognised by comparing it with the questions of today.
"""

import json
import os

import numpy as np
import torch

from minirlhf.engine.options import check, printable
from minirlhf.engine.training import random_stream
from minirlhf.files.disk import open_own, open_regular, parse_json, write_atomically

POINTS = {"a": 0.0, "tie": 0.5, "b": 1.0}            # what a verdict adds to the win rate of b


def shown(text: str, ended: bool = True) -> str:
    """Text as a person sees it: no character can drive the terminal, and a missing end is marked.

    Example: shown("one\\x1b[2J two", False) == "one\\ufffd[2J two [cut off]".
    """
    return printable(text) + ("" if ended else " [cut off]")


def make_questions(prompts: list[str], answers_a: list[str], answers_b: list[str],
                   setup: dict) -> list[dict]:
    """One question per prompt; which answer shows first is drawn by setup["seed"]."""
    a_first = torch.rand(len(prompts), generator=random_stream(setup["seed"], 4)) < 0.5     # (P,)
    return [{**setup, "pair": p, "prompt": prompts[p], "answer_a": answers_a[p],
             "answer_b": answers_b[p], "first": "a" if a_first[p] else "b"}
            for p in range(len(prompts))]


def read_verdicts(path: str, questions: list[dict]) -> dict[int, str]:
    """Verdicts of earlier sessions, by pair; a last line that was cut off in writing is dropped.

    Raises: ValueError naming file and line for anything else that is not an answer to `questions`.
    """
    if not os.path.exists(path):
        return {}
    with open_regular(path) as file:
        whole, end, rest = file.read().rpartition(b"\n")
    if rest:
        print(f"{path}: dropped a half-written last line; that pair will be asked again")
        write_atomically(path, whole + end)
    verdicts = {}
    for number, line in enumerate(whole.split(b"\n") if end else [], start=1):
        place = f"{path}:{number}"
        line_values = parse_json(line, place)
        pair, verdict = line_values.pop("pair", None), line_values.pop("verdict", None)
        check(type(pair) is int and isinstance(verdict, str) and verdict in POINTS,
              f"{place}: expected a pair and a verdict (a, b or tie), found none; remove the line")
        check(0 <= pair < len(questions), f"{place}: pair {pair} is not among the {len(questions)} "
              "pairs of today; restore --prompt_count or choose another --out")
        expected = {name: value for name, value in questions[pair].items() if name != "pair"}
        changed = [name for name in expected if line_values.get(name) != expected[name]]
        check(not changed, f"{place}: belongs to another setup, {', '.join(changed)} changed; "
              "restore folders, weights and options, or choose another --out")
        check(pair not in verdicts, f"{place}: a second verdict on pair {pair}; remove one of them")
        verdicts[pair] = verdict
    return verdicts


def ask(question: dict, done: int, total: int) -> str:
    """Show one pair without saying whose is whose; returns a, b, tie, or "" to quit."""
    first, second = ("a", "b") if question["first"] == "a" else ("b", "a")
    print(f"\n---- pair {done + 1} of {total}\n{question['prompt']}\n\n"
          f"1: {question['answer_' + first]}\n\n2: {question['answer_' + second]}\n")
    keys = {"1": first, "2": second, "t": "tie", "tie": "tie", "q": "", "quit": ""}
    while True:
        try:
            key = input("which is better? 1, 2, t(ie) or q(uit): ").strip().lower()
        except EOFError:                             # a closed terminal, or the end of a pipe
            print()
            return ""
        if key in keys:
            return keys[key]
        print(f"expected 1, 2, t or q, found {shown(key[:20])!r}")


def judge_by_person(questions: list[dict], path: str) -> np.ndarray:
    """Ask until all pairs are judged or the person quits: 1 where b won, 0.5 for a tie, (judged,).

    Verdicts of earlier sessions count and are not asked again. Equal answers are a tie, recorded
    without asking.
    """
    verdicts = read_verdicts(path, questions)
    print(f"{len(verdicts)} of {len(questions)} pairs are judged; verdicts go to {path}")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for question in questions:
        if question["pair"] in verdicts:
            continue
        verdict = "tie"
        if question["answer_a"] != question["answer_b"]:
            verdict = ask(question, len(verdicts), len(questions))
            if not verdict:
                break
        line = json.dumps({**question, "verdict": verdict}, ensure_ascii=False) + "\n"
        with open_own(path, "ab") as file:           # careful: as text, Windows would write \r\n
            file.write(line.encode("utf-8"))
        verdicts[question["pair"]] = verdict
    return np.array([POINTS[verdicts[pair]] for pair in sorted(verdicts)])          # (judged,)
