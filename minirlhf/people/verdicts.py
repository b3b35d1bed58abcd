"""A person as the judge: two answers at the terminal, blinded, in an order drawn by seed.

Used by `python -m minirlhf.label` and by `python -m minirlhf.evaluate --judge person`. Every
verdict is on the disk before the next pair shows: one JSON object per line, appended to a file. So
a session may end at any time (q, Ctrl-C, a kill, the end of a pipe), and the next one goes on where
it stopped. Undo cuts the last line off.

A question is one pair with all that its verdict depends on: prompt, both answers, who wrote them,
which of them shows first. A verdict is its question plus the key that was chosen and the time.
The trainers read such a file as comparisons (`files/formats.py`, `read_verdict`).
Lecture: lectures/09-what-came-after.md, "You are the labeller".
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timezone

import torch

from minirlhf.engine.options import check, printable
from minirlhf.engine.training import random_stream
from minirlhf.files.disk import open_own, open_regular, parse_json
from minirlhf.files.formats import read_verdict

POINTS = {"a": 0.0, "tie": 0.5, "b": 1.0}            # what a verdict adds to the win rate of b
KEYS = {"t": "tie", "tie": "tie", "s": "skip", "skip": "skip", "u": "undo", "undo": "undo",
        "q": "", "quit": ""}
START = b'{"verdict": "'                             # every line of ours begins so
SAME = ("who", "pair", "prompt", "answer_a", "answer_b", "again")    # tell questions apart


# ---- questions -----------------------------------------------------------------------------------

def shown(text: str, ended: bool = True) -> str:
    """Text as a person sees it: no character can drive the terminal, and a missing end is marked.

    Example: shown("one\\x1b[2J two", False) == "one\\ufffd[2J two [cut off]".
    """
    return printable(text) + ("" if ended else " [cut off]")


def draw_first(count: int, seed: int) -> list[str]:
    """Which answer of each pair shows first, "a" or "b": a coin for each pair."""
    a_first = torch.rand(count, generator=random_stream(seed, 4)) < 0.5             # (count,)
    return ["a" if heads else "b" for heads in a_first.tolist()]


def make_questions(pairs: list[dict], setup: dict) -> list[dict]:
    """The questions of one setup, numbered; setup["seed"] draws which answer shows first.

    pairs: {"prompt", "answer_a", "answer_b", "ended_a", "ended_b"} each.
    """
    first = draw_first(len(pairs), setup["seed"])
    return [{**setup, "pair": number, **pair, "first": first[number]}
            for number, pair in enumerate(pairs)]


def identity(row: dict) -> str:
    """What is equal of a question and of its verdict, and different for every question."""
    return json.dumps([row.get(name) for name in SAME])


# ---- the file ------------------------------------------------------------------------------------

class VerdictFile:
    """The verdicts of one file, oldest first: `rows` is what is on the disk.

    Two programs must not write into it at the same time; `engine.output.result_folder` sees to it.
    Raises: ValueError naming file and line for what is no verdict. That file is not changed.
    """

    def __init__(self, path: str):
        self.path, self.rows, self.sizes = path, [], []      # sizes: bytes of each line
        if not os.path.lexists(path):
            return
        with open_regular(path) as file:
            whole, end, rest = file.read().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if end else [], start=1):
            row = parse_json(line, f"{path}:{number}")
            read_verdict(row, f"{path}:{number}")
            self.rows.append(row)
            self.sizes.append(len(line) + 1)
        if rest:
            # careful: only now, when all other lines are ours; and this one may be a stranger's
            check(START.startswith(rest[:len(START)]), f"{path}:{len(self.rows) + 1}: expected a "
                  "verdict, found a line of something else; name another folder by --out")
            print(f"{path}: dropped a half-written last line; that pair will be asked again")
            self.cut()

    def add(self, question: dict, verdict: str) -> None:
        """Append a verdict; when this returns, neither a kill nor a power cut can lose it."""
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        row = {"verdict": verdict, "when": when, **question}
        try:
            line = json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:                   # a folder's name with bytes that are no UTF-8
            line = json.dumps(row).encode("utf-8")
        with open_own(self.path, "ab") as file:      # careful: as text, Windows would write \r\n
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        self.sizes.append(len(line) + 1)

    def undo(self) -> None:
        """Take the last verdict back: after a kill the file has its line, or has it not."""
        check(os.path.getsize(self.path) == sum(self.sizes), f"{self.path} was changed by somebody "
              "else while verdicts were made; start again")
        self.rows.pop()
        self.sizes.pop()
        self.cut()

    def cut(self) -> None:
        """Cut the file off after the last row."""
        with open_own(self.path, "rb+") as file:
            file.truncate(sum(self.sizes))


def check_setup(file: VerdictFile, questions: list[dict]) -> None:
    """Refuse a file with a verdict on anything but `questions`, which are numbered as "pair".

    For a win rate: it must not mix the verdicts of two setups.
    """
    for number, row in enumerate(file.rows, start=1):
        place, pair = f"{file.path}:{number}", row.get("pair")
        check(type(pair) is int and 0 <= pair < len(questions), f"{place}: pair {pair} is not "
              f"among the {len(questions)} pairs of today; restore --prompt_count or choose "
              "another --out")
        changed = [name for name, value in questions[pair].items() if row.get(name) != value]
        check(not changed, f"{place}: belongs to another setup, {', '.join(changed)} changed; "
              "restore folders, weights and options, or choose another --out")


# ---- judging -------------------------------------------------------------------------------------

def ask(question: dict, done: int, total: int) -> str:
    """Show one pair without saying whose is whose; returns a, b, tie, skip, undo, or "" to quit."""
    first, second = ("a", "b") if question["first"] == "a" else ("b", "a")
    texts = {name: shown(question[f"answer_{name}"], question[f"ended_{name}"]) for name in "ab"}
    print(f"\n---- pair {done + 1} of {total}\n{shown(question['prompt'])}\n\n"
          f"1: {texts[first]}\n\n2: {texts[second]}\n")
    keys = {"1": first, "2": second, **KEYS}
    while True:
        try:
            key = input("which is better? 1, 2, t(ie), s(kip), u(ndo) or q(uit): ").strip().lower()
        except EOFError:                             # a closed terminal, or the end of a pipe
            print()
            return ""
        if key in keys:
            return keys[key]
        print(f"expected 1, 2, t, s, u or q, found {shown(key[:20])!r}")


def judge_by_person(questions: list[dict], file: VerdictFile,
                    ask: Callable[[dict, int, int], str] = ask) -> list[str]:
    """Ask until all questions are judged or the person quits; the verdicts, "" where none is.

    Verdicts of earlier sessions count and are not asked again; those on other questions stay as
    they are. Equal answers are a tie, recorded without asking. A question with "again" is dropped
    when its first showing was skipped.
    """
    places = {identity(question): place for place, question in enumerate(questions)}
    firsts = [places.get(identity({**question, "again": False})) if question.get("again") else None
              for question in questions]
    verdicts = [""] * len(questions)
    for number, row in enumerate(file.rows, start=1):
        place = places.get(identity(row))
        if place is not None:
            check(not verdicts[place], f"{file.path}:{number}: a second verdict on one pair; "
                  "remove one of them")
            verdicts[place] = row["verdict"]
    print(f"{sum(map(bool, verdicts))} of {len(questions)} pairs are judged; verdicts go to "
          f"{file.path}\nstop whenever you like: every verdict is kept, and the same command goes "
          "on", flush=True)
    with contextlib.suppress(AttributeError, OSError):
        sys.stdin.reconfigure(errors="replace")          # a key that is no UTF-8 ends no session
    while True:
        waiting = [place for place, first in enumerate(firsts) if not verdicts[place]
                   and (first is None or verdicts[first] != "skip")]
        if not waiting:
            return verdicts
        question, verdict = questions[waiting[0]], "tie"
        if question["answer_a"] != question["answer_b"]:
            done = sum(map(bool, verdicts))
            verdict = ask(question, done, done + len(waiting))
        if not verdict:
            return verdicts
        if verdict == "undo":
            take_back(file, verdicts, places)
        else:
            file.add(question, verdict)
            verdicts[waiting[0]] = verdict


def take_back(file: VerdictFile, verdicts: list[str], places: dict[str, int]) -> None:
    """Undo the last verdict that a person gave, with the ties after it that nobody was asked for.

    A verdict on a question that is not among those of today stays.
    """
    while file.rows and identity(file.rows[-1]) in places:
        row = file.rows[-1]
        file.undo()
        verdicts[places[identity(row)]] = ""
        if row["answer_a"] != row["answer_b"]:
            print("took the last verdict back")
            return
    print("there is no verdict of today's pairs to take back")
