"""Exercises with solutions: functions to write, questions for pen and paper, bugs to find.

    python -m minirlhf.exercises                    # the list
    python -m minirlhf.exercises gae                # writes exercises/gae.py, for you to fill in
    python -m minirlhf.exercises --check gae        # is it right? what is wrong?
    python -m minirlhf.exercises --hint gae
    python -m minirlhf.exercises --solution gae     # with the reasoning
    python -m minirlhf.exercises paper_gae          # a question
    python -m minirlhf.exercises --check paper_gae --answer 0.5
    python -m minirlhf.exercises evening            # the task at the end of the course

In:  with --check your file, which is executed. Out: text; a stub, never over a file that is there.
"""

import os
import shlex
import sys
from dataclasses import dataclass

from minirlhf.engine.options import check, name_first_argument, one_sentence, parse_config
from minirlhf.exercises import attention, bugs, groups, losses, metrics, paper, penalty, rl, tokens
from minirlhf.exercises.checking import check_answer, check_file
from minirlhf.exercises.evening import TASK
from minirlhf.exercises.exercise import Code, Question, folded, solution_text, stub
from minirlhf.files.disk import write_atomically

EXERCISES = sorted((exercise for module in (tokens, attention, losses, penalty, rl, metrics, groups,
                                            paper, bugs) for exercise in module.EXERCISES),
                   key=lambda exercise: exercise.lecture)


@dataclass(frozen=True)
class ExercisesConfig:
    """Options of `python -m minirlhf.exercises`; a first argument without -- is the exercise."""
    name: str = ""                      # exercise to begin: writes its stub, or asks its question
    check: str = ""                     # exercise to check
    hint: str = ""                      # exercise whose hint is printed
    solution: str = ""                  # exercise whose solution is printed
    answer: str = ""                    # your answer to a question, with --check
    folder: str = "exercises"           # your folder, where stubs are written and checked

    def __post_init__(self):
        for name in (self.name, self.check, self.hint, self.solution):
            if name not in ("", "evening"):
                find(name)
        check(sum(map(bool, (self.name, self.check, self.hint, self.solution))) <= 1,
              "expected one of: a name, --check, --hint, --solution")
        check(not self.answer or bool(self.check), "--answer goes with --check NAME")
        check(bool(self.folder.strip()), "--folder is empty, expected the name of a folder")
        check(os.path.isdir(self.folder) or not os.path.lexists(self.folder), "--folder is "
              f"{self.folder!r}, a file; expected the name of a folder")


def find(name: str) -> Code | Question:
    """The exercise of that name.

    Raises: ValueError that says where the names are.
    """
    for exercise in EXERCISES:
        if exercise.name == name:
            return exercise
    raise ValueError(f"there is no exercise {name!r}; python -m minirlhf.exercises lists them")


def list_exercises() -> str:
    """All exercises, one line each, by lecture."""
    lines = [f"{len(EXERCISES)} exercises, {sum(x.minutes for x in EXERCISES) / 60:.0f} hours in "
             "all. Begin one by its name: python -m minirlhf.exercises NAME", "",
             f"lecture  {'name':24}{'minutes':>7}  {'':8}"]
    lines += [f"{x.lecture:7d}  {x.name:24}{x.minutes:7d}  {x.difficulty:8}{x.task}"
              for x in EXERCISES]
    lines += [f"{'end':>7}  {'evening':24}{240:7d}  {'':8}a reward, labels or a data set of your "
              "own, from SFT to a report"]
    return "\n".join(lines)


def begin(exercise: Code | Question, folder: str) -> str:
    """Write the stub of a function, or ask a question."""
    if isinstance(exercise, Question):
        text = exercise.text() if callable(exercise.text) else folded(exercise.text)
        return (f"{text}\n\nYour answer:\n  python -m minirlhf.exercises --check {exercise.name} "
                f"--answer {'WORD' if exercise.choices else 'NUMBER'}")
    path = os.path.join(folder, f"{exercise.name}.py")
    check(not os.path.lexists(path), f"{path} is there already and is left as it is; go on with "
          "it, move it away, or name another --folder")
    write_atomically(path, stub(exercise).encode("utf-8"))
    where = "" if folder == ExercisesConfig.folder else f" --folder {shlex.quote(folder)}"
    return (f"wrote {path}; write the body of the function, then run\n"
            f"  python -m minirlhf.exercises --check {exercise.name}{where}")


def solve(exercise: Code | Question) -> str:
    """The solution with the reasoning."""
    if isinstance(exercise, Question):
        answer = exercise.answer()
        return f"{answer if isinstance(answer, str) else f'{answer:.6g}'}\n\n{folded(exercise.why)}"
    return solution_text(exercise)


def main(cfg: ExercisesConfig) -> bool:
    """List, begin, check, hint or solve; returns False for an attempt that is not right."""
    if "evening" in (cfg.name, cfg.check, cfg.hint, cfg.solution):
        print(TASK, end="")
    elif cfg.check:
        exercise = find(cfg.check)
        if isinstance(exercise, Question):
            right, text = check_answer(exercise, cfg.answer)
        else:
            check(not cfg.answer, f"{exercise.name} is a function to write, it needs no --answer")
            right, text = check_file(exercise, os.path.join(cfg.folder, f"{exercise.name}.py"))
        print(text)
        return right
    elif cfg.hint:
        print(folded(find(cfg.hint).hint))
    elif cfg.solution:
        print(solve(find(cfg.solution)))
    else:
        print(begin(find(cfg.name), cfg.folder) if cfg.name else list_exercises())
    return True


if __name__ == "__main__":
    name_first_argument("name")
    with one_sentence():
        sys.exit(0 if main(parse_config(ExercisesConfig)) else 1)
