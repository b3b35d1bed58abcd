"""Reads a run's folder, examines it, and writes the findings as text."""

import csv
import math
import os
import re
import textwrap

from minirlhf.common import check
from minirlhf.diagnose.illnesses import (PPO, REWARD_MODEL, SFT, Examination, Finding, mean,
                                         smooth, values_of)

STAGES = {"PPO": PPO, "reward model": REWARD_MODEL, "SFT": SFT}
TABLE_WIDTH = 7 * 14                    # the numbers of a token table in PPO's samples.txt


# ---- reading -------------------------------------------------------------------------------------

def find_file(folder: str, name: str) -> str:
    """`name` or `name`.part in the folder, "" for neither. The part belongs to a later run."""
    for candidate in (name + ".part", name):
        if os.path.isfile(os.path.join(folder, candidate)):
            return os.path.join(folder, candidate)
    return ""


def read_run(folder: str) -> tuple[str, list[str], list[dict]]:
    """The path of a run's metrics, the columns, and the rows as numbers, empty cells left out.

    Raises: FileNotFoundError when there is no folder or no metrics in it; ValueError for a file
    that does not hold numbers under names.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found none of that name; "
                                "it is the --out of sft, reward_model or ppo")
    path = find_file(folder, "metrics.csv")
    if not path:
        raise FileNotFoundError(f"{folder}: expected a file metrics.csv, or metrics.csv.part of a "
                                "run that is not finished, found neither; is it the --out of a "
                                "trainer?")
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    complete = lines[:-1]                # what follows the last line end is still being written
    check(len(complete) >= 2, f"{path}: expected a line of names and at least one row of numbers")
    try:
        columns, *table = csv.reader(complete)
    except csv.Error as error:
        raise ValueError(f"{path}: expected a table with commas, found something else "
                         f"({error})") from None
    rows = []
    for number, cells in enumerate(table, start=2):
        try:
            check(len(cells) == len(columns), "")
            rows.append({name: float(cell) for name, cell in zip(columns, cells) if cell})
        except ValueError:
            raise ValueError(f"{path}:{number}: expected {len(columns)} numbers, one for each name "
                             f"of the first line, found {','.join(cells)[:60]!r}") from None
    return path, columns, rows


def stage_of(columns: list[str], path: str) -> str:
    """Which trainer wrote these columns: PPO, reward model or SFT.

    Raises: ValueError when it was none of them.
    """
    for stage, needed in (("PPO", {"iteration", "score", "kl_ref", "entropy"}),
                          ("reward model", {"step", "loss", "held_out_loss", "held_out_accuracy"}),
                          ("SFT", {"step", "loss", "held_out_loss", "grad_norm"})):
        if needed <= set(columns):
            return stage
    raise ValueError(f"{path}: expected the columns of ppo (iteration, score, kl_ref, entropy ...) "
                     "or of sft and reward_model (step, loss, held_out_loss, grad_norm ...), found "
                     f"{', '.join(columns)[:200]}")


def samples_of(folder: str) -> list[str]:
    """What the policy wrote, first and last, one line each; empty if there is no samples.txt."""
    path = find_file(folder, "samples.txt")
    if not path:
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    blocks = re.split(r"^(?=(?:iteration|step) \d+$)", text, flags=re.M)[1:]
    lines = [sample_line(block) for block in blocks]
    return lines[:1] + lines[1:][-1:]


def sample_line(block: str) -> str:
    """One sample of a block of samples.txt: its first prompt with the response behind it."""
    head, *body = block.strip().split("\n")
    first = body[0].strip() if body else ""
    if not first.startswith("prompt: "):                 # SFT: prompt | response in one line
        return f"{head}: {first}"
    tokens = [line[:-TABLE_WIDTH].rstrip("\n") for line in body[2:] if not line.startswith("sum ")]
    # a token is padded to 16 columns: what it ends with is lost, what it begins with is not
    response = "".join(token.rstrip() for token in tokens)
    return f"{head}: {first.removeprefix('prompt: ')}\n    response: {response.strip()}"


# ---- examining -----------------------------------------------------------------------------------

def check_numbers(path: str, rows: list[dict], unit: str, columns: set[str]) -> None:
    """Refuse nan and inf: what follows such a row says nothing."""
    for number, row in enumerate(rows, start=2):
        check(math.isfinite(row.get(unit, math.nan)), f"{path}:{number}: expected a number of the "
              f"{unit}")
        for name in sorted(columns & set(row)):
            check(math.isfinite(row[name]), f"{path}:{number}: {name} is {row[name]} at {unit} "
                  f"{int(row[unit])}; the run broke down there: look at the data and the reward, "
                  "or lower the rate")


def examine(stage: str, columns: list[str], rows: list[dict]):
    """Findings, what is healthy (examination each), and what could not be said (illness, why).

    Example: a PPO run of 6 iterations has too few for "critic explains nothing".
    """
    findings, healthy, unsaid = [], [], []
    for examination in STAGES[stage]:
        reason = missing(examination, columns, rows)
        if reason:
            unsaid.append((examination.illness, reason))
            continue
        found = examination.function(rows)
        if found is None:
            healthy.append(examination)
        else:
            assert found.illness == examination.illness, (found.illness, examination.illness)
            findings.append(found)
    return findings, healthy, unsaid


def missing(examination: Examination, columns: list[str], rows: list[dict]) -> str:
    """Why an illness cannot be looked for in these rows; "" if it can."""
    for name in examination.columns:
        if name not in columns:
            return f"there is no column {name}"
        count = len(values_of(rows, name))
        if count == 0 and name == "gold":
            return "gold is empty (--gold names a judge)"
        if count < examination.rows:
            return f"{name} has {count} values so far, {examination.rows} are needed"
        if count < len(rows) and not name.startswith("held_out_"):
            return f"{name} is empty in {len(rows) - count} rows"
    return ""


# ---- writing -------------------------------------------------------------------------------------

def describe_healthy(examination: Examination, rows: list[dict]) -> str:
    """A column at the beginning and at the end (means of two values), and what is well there."""
    values = smooth(values_of(rows, examination.columns[0]))
    change = f"{examination.columns[0]} {values[0]:.3g} -> {values[-1]:.3g}"
    return f"  {change:34}{examination.healthy}"


def describe_finding(finding: Finding) -> str:
    """A finding as a paragraph."""
    lines = [f"  {finding.illness.upper()}", wrapped(finding.figure, "  "), "    likely causes:"]
    lines += [wrapped(cause, "      - ") for cause in finding.causes]
    lines += ["    what to try:"] + [wrapped(remedy, "      - ") for remedy in finding.remedies]
    lines += [f"    read: {finding.lecture}"]
    return "\n".join(lines)


def wrapped(text: str, start: str) -> str:
    """Lines of at most 96 columns, of which the first begins with `start`."""
    return textwrap.fill(text, 96, initial_indent=start, subsequent_indent=" " * len(start))


def write_report(folder: str) -> tuple[str, list[Finding]]:
    """Examine the run in a folder; returns the text and the findings."""
    path, columns, rows = read_run(folder)
    stage = stage_of(columns, path)
    unit = "iteration" if stage == "PPO" else "step"
    check_numbers(path, rows, unit, {name for examination in STAGES[stage]
                                     for name in examination.columns})
    findings, healthy, unsaid = examine(stage, columns, rows)
    state = ", not finished" if path.endswith(".part") else ""
    parts = [f"{path}: {stage}, {len(rows)} {unit}s{state}"]
    if findings:
        parts.append("NOT HEALTHY\n" + "\n\n".join(describe_finding(x) for x in findings))
    if healthy:
        parts.append("healthy\n"
                     + "\n".join(describe_healthy(examination, rows) for examination in healthy))
    if unsaid:
        parts.append("too early or not possible to say\n" + "\n".join(
            wrapped(f"{illness}: {reason}", "  ") for illness, reason in unsaid))
    samples = samples_of(folder)
    if samples:
        parts.append("what it writes (samples.txt has more)\n" + "\n".join(
            f"  {line}" for line in samples))
    parts.append(conclusion(findings, stage, len(unsaid)))
    return "\n\n".join(parts), findings


def conclusion(findings: list[Finding], stage: str, unsaid: int) -> str:
    """The last sentence: what to do next."""
    if len(findings) > 1:
        return f"{len(findings)} findings. Begin with the first: the others may follow from it."
    if findings:
        return "1 finding."
    text = "Nothing ill was found" + (f"; {unsaid} kinds of illness could not be looked for."
                                      if unsaid else ".")
    if stage == "PPO":
        text += (" Whether the responses are better is another question: "
                 "python -m minirlhf.evaluate")
    return wrapped(text, "")
