"""Where each number in the prose of the lectures comes from.

    python lectures/origins.py           # names each number without an origin, and each wrong one

A number here has a decimal point, a percent sign or a unit (seconds, GB, times), and stands
outside code, formulas and links. Its origin is one of these:

1. It also stands in a block of the same page that a test runs or compares (quoted code, a stop, a
   printed output, a result of the laboratory or of the benchmark), or is an option's default.
2. A stored result, named directly after it; `*` stands for all, whose mean, :min or :max is meant

       0.57<!-- museum.json effects/pad_mask/wrong/gold -->
       97 %<!-- seeds.json reports/*/win_rate:min -->

3. A note inside its paragraph, list item or row of a table. On a line of its own, the note is for
   all up to the next empty line:

       <!-- numbers: cited -->         published by others; the page names where
       <!-- numbers: arithmetic -->    follows from what is written there
       <!-- numbers: chosen -->        an example's, a target, a setting
       <!-- numbers: seeds.json -->    each is, as far as it is printed, a number of that result
       <!-- numbers: tests/test_ppo.py::test_gae_hand_example -->    each stands in that test

An equation such as 0.2 * 0.986 = 0.197 is computed wherever it stands.
"""

import ast
import functools
import json
import math
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
FIGURE = re.compile(r"([-+]?[\d,]*\.?\d+)(\s%)?<!-- ([\w./]+\.json) (.+?)(:min|:max)? -->")
NOTE = re.compile(r"<!-- numbers: (.+?) -->")
FENCE = re.compile(r"^(?P<indent> *)```.*?^(?P=indent)```$", re.M | re.S)
TESTED = re.compile(r"^<!-- (?:code|tour|output|stored)\b.*?-->\n```.*?^```$"
                    r"|^```(?:python|pdb)\n.*?^```$"
                    r"|^<!-- (?:lab|verdict|benchmark): .*?^<!-- end -->$", re.M | re.S)
NOT_PROSE = re.compile(r"^\$\$.*?^\$\$|`[^`\n]+`|\$[^$\n]+\$|\[?\d{4}\.\d{5}|\]\([^)]*\)"
                       r"|https?:\S+|\b(?:sections?|appendix|table|figure|equation|Python|PyTorch|"
                       r"TRL|transformers) \w?[\d.]+(?:(?:,| and| to| or) [\d.]*\d)*",
                       re.M | re.S | re.I)
NUM = r"(?:\d[\d,]*)?\.?\d+(?:e-?\d+)?"
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d[\d,]*)?(?:\.\d+(?:e-?\d+)?(?: ?%)?"
                    r"|\d(?: ?%| (?:seconds|[KMG]i?B|times)\b))")
TERM = rf"(?:exp|log|sqrt)?\(*[-+]?{NUM}\)*"
EQUATION = re.compile(rf"(?<![\w.)^*/+-])(?<![-+*/^] )"
                      rf"({TERM}(?: ?[-+*/^] ?{TERM})+|(?:exp|log|sqrt)\([-+]?{NUM}\))"
                      rf" = ([-+]?{NUM})( ?%| [KMG]i?B)?(?![\w(]| ?[-+*/^])")
UNIT = {"%": 0.01, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


# ---- stored results ------------------------------------------------------------------------------

def figures_at(thing, path: str) -> list[float]:
    """The numbers at a path like reports/*/gold in a stored result; of a list, all."""
    things = [thing]
    for part in path.split("/"):
        if part == "*":
            things = [one for thing in things
                      for one in (thing.values() if isinstance(thing, dict) else thing)]
        else:
            things = [thing[int(part) if isinstance(thing, list) else part] for thing in things]
    return [number for one in things for number in (one if isinstance(one, list) else [one])]


def all_numbers(thing) -> list[float]:
    """Every number of a stored result."""
    if isinstance(thing, (dict, list)):
        inside = thing.values() if isinstance(thing, dict) else thing
        return [number for one in inside for number in all_numbers(one)]
    if isinstance(thing, str):
        return [value(part) for part in re.findall(rf"[-+]?{NUM}", thing)]
    return [float(thing)] if isinstance(thing, (int, float)) else []


def read_result(name: str):
    """A stored result of lectures/results; of a table (.csv) or a text, its text."""
    text = (FOLDER / "results" / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text


def wrong_figures(text: str) -> list[str]:
    """The figures in a text that are not, as far as they are printed, those of their marks."""
    wrong = []
    for printed, percent, file, path, which in FIGURE.findall(text):
        numbers = figures_at(read_result(file), path)
        stored = {":min": min, ":max": max}.get(which, lambda x: sum(x) / len(x))(numbers)
        if not prints_as(stored * (100 if percent else 1), printed):
            wrong.append(f"{printed}{percent}: {file} has {stored} at {path}{which}")
    return wrong


# ---- numbers of the prose ------------------------------------------------------------------------

def value(printed: str) -> float:
    """The number that a text prints. Example: "-1,234.5" is -1234.5, "11 %" and "11 s" are 11."""
    return float(re.match(rf"[-+]?{NUM}", printed).group().replace(",", ""))


def prints_as(number: float, printed: str) -> bool:
    """True if a number, rounded to as many digits as are printed, is the printed one."""
    digits = len(re.split(r"[e\s%]", printed)[0].partition(".")[2])
    if "e" in printed:
        return math.isclose(number, value(printed), rel_tol=0.6 * 10 ** -digits)
    return abs(number - value(printed)) <= 0.5000001 * 10 ** -digits


def blank(pattern: re.Pattern, text: str) -> str:
    """The text with spaces for what the pattern finds; its lines stay where they are."""
    return pattern.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)


@functools.cache
def defaults() -> frozenset[float]:
    """The numbers that are an option's default anywhere in the package."""
    numbers = set()
    for path in (REPOSITORY / "minirlhf").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                numbers |= {float(number.value) for field in node.body
                            if isinstance(field, ast.AnnAssign) and field.value
                            for number in ast.walk(field.value)
                            if isinstance(number, ast.Constant)
                            and isinstance(number.value, (int, float))}
    return frozenset(numbers)


def pieces(text: str) -> list[tuple[int, str, str]]:
    """Paragraphs, list items, rows of tables: line of each, its text, the note that covers it."""
    found: list[tuple[int, str, str]] = []
    group = ""                                           # the note of a line of its own
    for number, line in enumerate(text.split("\n"), start=1):
        alone = re.fullmatch(r"\s*" + NOTE.pattern + r"\s*", line)
        if not line.strip():
            group = ""
        if alone:
            group = alone.group(1)
        elif not line.strip() or re.match(r"\s*(?:[-*] |\d+\. |\|)", line) or not found \
                or not found[-1][1].strip():
            found.append((number, line, group))
        else:
            start, before, note = found[-1]
            found[-1] = (start, f"{before}\n{line}", note)
    return [(number, piece, (NOTE.findall(piece) or [note])[-1]) for number, piece, note in found]


def is_of(printed: str, origin: str) -> bool:
    """True if the origin that a note names can have this number.

    Raises: ValueError if there is no such origin.
    """
    if origin in ("cited", "arithmetic", "chosen"):
        return True
    percent = 0.01 if printed.endswith("%") else 1
    if "::" in origin:
        path, _, name = origin.partition("::")
        tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
        test = [node for node in tree.body if getattr(node, "name", "") == name]
        if not test:
            raise ValueError(f"{path} has no {name}")
        return any(prints_as(abs(number) / percent, printed.lstrip("+-"))
                   for number in all_numbers(ast.unparse(test[0])))
    return any(prints_as(number / percent, printed) or prints_as(number, printed)
               for number in all_numbers(read_result(origin)))


def without_origin(text: str) -> list[str]:
    """The numbers in the prose of a page that have no origin, each with its line."""
    known = defaults() | {abs(value(number)) for block in TESTED.findall(text) for number
                          in re.findall(NUM, block)}
    prose = blank(FENCE, blank(TESTED, text))
    prose = blank(NOT_PROSE, prose)
    missing = []
    for line, piece, origin in pieces(prose):
        plain = re.sub(r"<!--.*?-->", "", FIGURE.sub("", piece), flags=re.S)
        for printed in NUMBER.findall(plain):
            size = abs(value(printed))
            share = round(size / 100, 9) if printed.endswith("%") else size
            if not {size, share} & known and not (origin and is_of(printed, origin)):
                missing.append(f"line {line}: {printed}" + (f" is not of {origin}" * bool(origin)))
    return missing


def wrong_equations(text: str) -> list[str]:
    """The equations between numbers in the prose of a page that do not hold, rounding allowed."""
    wrong = []
    for left, printed, unit in EQUATION.findall(blank(FENCE, text)):
        formula = re.sub(r"(?<=\d),(?=\d{3})", "", left).replace("^", "**")
        names = {"exp": math.exp, "log": math.log, "sqrt": math.sqrt, "__builtins__": {}}
        result = eval(formula, names) / UNIT.get(unit.strip(), 1)    # numbers and these names only
        if not prints_as(result, printed) and not math.isclose(result, value(printed),
                                                               rel_tol=0.02, abs_tol=0.002):
            wrong.append(f"{left} is {result:.6g}, not {printed}{unit}")
    return wrong


def main() -> int:
    """Print what is missing or wrong, page by page; 1 if anything is."""
    count = 0
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for problem in without_origin(text) + wrong_figures(text) + wrong_equations(text):
            print(f"{path.name}: {problem}")
            count += 1
    print(f"{count} numbers to look at")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
