"""Reads a run's folder, examines curves and options, and writes the findings as text."""

import csv
import math
import os
import re
import textwrap

from minirlhf.diagnose.findings import Examination, Finding, smooth, values_of
from minirlhf.diagnose.option_remarks import Remark, read_options, remarks_on
from minirlhf.diagnose.ppo_illnesses import PPO
from minirlhf.diagnose.sft_illnesses import REWARD_MODEL, SFT
from minirlhf.engine.options import check, printable
from minirlhf.files.disk import open_regular

# which trainer writes which columns, and what is looked for in its runs
STAGES = {"PPO": ({"iteration", "score", "kl_ref", "entropy"}, PPO),
          "reward model": ({"step", "loss", "held_out_loss", "held_out_accuracy"}, REWARD_MODEL),
          "SFT": ({"step", "loss", "held_out_loss", "grad_norm"}, SFT)}
UNSEEN = ("a reward, a judge or data that ask for the wrong thing; labels that are all the wrong "
          "way round; prompts unlike those of use; an option that nothing reads; a critic's "
          "gradient that is not clipped; means over padding; a KL estimate upside down. Such runs "
          "have good curves; only reading samples and tests show them. python -m minirlhf.museum "
          "has such mistakes, each with its test")


# ---- reading -------------------------------------------------------------------------------------

def find_file(folder: str, name: str) -> str:
    """`name` or `name`.part in the folder, "" for neither. The part belongs to a later run."""
    for candidate in (name + ".part", name):
        if os.path.lexists(os.path.join(folder, candidate)):
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
    with open_regular(path) as file:
        lines = printable(file.read().decode("utf-8", "replace").replace("\r\n", "\n")).split("\n")
    complete = lines[:-1]                # what follows the last line end is still being written
    check(len(complete) >= 2, f"{path}: expected a line of names and at least one row of numbers")
    try:
        columns, *table = csv.reader(complete)
    except csv.Error as error:
        raise ValueError(f"{path}: expected a table with commas, found something else "
                         f"({error})") from None
    rows = []
    for line, cells in enumerate(table, start=2):
        try:
            check(len(cells) == len(columns), "")
            rows.append({name: float(cell) for name, cell in zip(columns, cells) if cell})
        except ValueError:
            raise ValueError(f"{path}:{line}: expected {len(columns)} numbers, one for each name "
                             f"of the first line, found {','.join(cells)[:60]!r}") from None
    return path, columns, rows


def stage_of(columns: list[str], path: str) -> str:
    """Which trainer wrote these columns: PPO, reward model or SFT.

    Raises: ValueError when it was none of them.
    """
    for stage, (needed, _) in STAGES.items():
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
    with open_regular(path) as file:
        text = printable(file.read().decode("utf-8", "replace").replace("\r\n", "\n"))
    blocks = re.split(r"^(?=(?:iteration|step) \d+$)", text, flags=re.M)[1:]
    lines = [sample_line(block) for block in blocks]
    return lines[:1] + lines[1:][-1:]


def sample_line(block: str) -> str:
    """One sample of a block of samples.txt: its first prompt with the response to it."""
    head, *body = block.strip().split("\n")
    first = body[0].strip() if body else ""
    if not first.startswith("prompt: "):                 # SFT: prompt | response in one line
        return f"{head}: {first}"
    numbers = len(body[1].split()) - 1 if len(body) > 1 else 0
    parts = [line.rsplit(None, numbers) for line in body[2:] if not line.startswith("sum ")]
    # a token is padded: spaces that it ends with are lost, those it begins with are not
    response = "".join(part[0] for part in parts if len(part) > numbers)
    return f"{head}: {first.removeprefix('prompt: ')}\n    response: {response.strip()}"


# ---- examining -----------------------------------------------------------------------------------

def check_numbers(path: str, rows: list[dict], unit: str, columns: set[str]) -> None:
    """Refuse nan and inf: what follows such a row says nothing."""
    for line, row in enumerate(rows, start=2):
        check(math.isfinite(row.get(unit, math.nan)), f"{path}:{line}: expected a number of the "
              f"{unit}")
        for name in sorted(columns & set(row)):
            check(math.isfinite(row[name]), f"{path}:{line}: {name} is {row[name]} at {unit} "
                  f"{int(row[unit])}; the run broke down there: look at the data and the reward, "
                  "or lower the rate")


def examine(stage: str, columns: list[str], rows: list[dict], options: dict | None = None):
    """Findings, what is healthy (examination each), and what could not be said (illness, why).

    `options` are those of the run, where they are known.
    Example: a PPO run of 6 iterations has too few for "critic explains nothing".
    """
    findings, healthy, unsaid = [], [], []
    for examination in STAGES[stage][1]:
        reason = missing(examination, columns, rows)
        if reason:
            unsaid.append((examination.illness, reason))
            continue
        arguments = (rows, options or {}) if examination.asks_options else (rows,)
        finding = examination.function(*arguments)
        if finding is None:
            healthy.append(examination)
        else:
            assert finding.illness in (examination.illness, examination.other), finding.illness
            findings.append(finding)
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
    return "\n".join([
        f"  {finding.illness.upper()}", wrapped(finding.figure, "  "),
        "    likely causes:", *[wrapped(cause, "      - ") for cause in finding.causes],
        "    what to try:", *[wrapped(remedy, "      - ") for remedy in finding.remedies],
        f"    read: {finding.lecture}"])


def describe_remark(remark: Remark) -> str:
    """A remark as a paragraph."""
    return wrapped(f"{remark.option} is {remark.value}; usual: {remark.usual}. What this does: "
                   f"{remark.effect}. Read: {remark.lecture}", "  - ")


def wrapped(text: str, start: str) -> str:
    """Lines of at most 96 columns, of which the first begins with `start`."""
    return textwrap.fill(text, 96, initial_indent=start, subsequent_indent=" " * len(start))


def write_report(folder: str) -> tuple[str, list[Finding]]:
    """Examine the run in a folder; returns the text and the findings."""
    path, columns, rows = read_run(folder)
    stage = stage_of(columns, path)
    unit = "iteration" if stage == "PPO" else "step"
    check_numbers(path, rows, unit, {name for examination in STAGES[stage][1]
                                     for name in examination.columns})
    finished = not path.endswith(".part")
    options, unknown = read_options(folder, stage, finished)
    remarks = remarks_on(stage, options, rows, finished)
    findings, healthy, unsaid = examine(stage, columns, rows, options)
    options_say = "\n".join(describe_remark(remark) for remark in remarks) or wrapped(
        f"not known: {unknown}" if unknown else "no option is far from its usual value", "  ")
    sections = {
        "NOT HEALTHY": "\n\n".join(describe_finding(finding) for finding in findings),
        "what the options say": options_say,
        "healthy": "\n".join(describe_healthy(examination, rows) for examination in healthy),
        "too early or not possible to say": "\n".join(
            wrapped(f"{illness}: {reason}", "  ") for illness, reason in unsaid),
        "what no curve can show": wrapped(f"{UNSEEN}.", "  "),
        "what it writes (samples.txt has more)": "\n".join(
            f"  {line}" for line in samples_of(folder))}
    parts = [f"{path}: {stage}, {len(rows)} {unit}s{'' if finished else ', not finished'}"]
    if not finished and os.path.lexists(os.path.join(folder, "metrics.csv")):
        parts.append(wrapped("A finished run lies beside it, with metrics.csv: this report is "
                             "about the later run, which is not finished. Copy metrics.csv and "
                             "run.json to another folder to examine the finished one.", ""))
    parts += [f"{title}\n{text}" for title, text in sections.items() if text]
    ending = conclusion(findings, remarks, stage, len(unsaid))
    return "\n\n".join([*parts, ending]), findings


def conclusion(findings: list[Finding], remarks: list[Remark], stage: str, unsaid: int) -> str:
    """The last sentence: what to do next."""
    names = ", ".join(remark.option for remark in remarks if remark.option != "dtype")
    if findings and names:
        return wrapped(f"{len(findings)} finding{'s' * (len(findings) > 1)}. Begin with the "
                       f"options ({names}): what the curves show may follow from them.", "")
    if len(findings) > 1:
        return f"{len(findings)} findings. Begin with the first: the others may follow from it."
    if findings:
        return "1 finding."
    if names:
        return wrapped(f"The curves show nothing ill, but look at the options: {names}.", "")
    more = f"; {unsaid} kinds of illness could not be looked for" if unsaid else ""
    better = " Whether the responses are better is another question: python -m minirlhf.evaluate"
    return wrapped(f"Nothing ill was found{more}.{better if stage == 'PPO' else ''}", "")
