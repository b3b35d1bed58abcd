"""Keep the code that the lectures quote equal to the code that runs.

    python lectures/quotes.py            # names each quote that differs, and its first difference
    python lectures/quotes.py --fix      # rewrites those blocks

In a lecture, a quoted block comes after a comment that names a file and a symbol in it:

    <!-- code: minirlhf/ppo.py::gae -->
    <!-- code: minirlhf/ppo.py::gae nodoc -->

The symbol is a function, a class, `Class.method`, or a name assigned at module level. With `nodoc`
its docstring is left out: a lecture says the same at more length. A comment that names a file or a
symbol that is gone is not rewritten: the message says which file defines the symbol now, and you
change the comment. The exit code is 1 if a quote or a comment is still wrong at the end.

What the laboratory measured comes after

    <!-- lab: beta -->          claim, verdict, table, findings and picture of lectures/results/lab
    <!-- verdict: beta -->      claim and verdict only, for a second place

and a table of `minirlhf.benchmark` after

    <!-- benchmark: benchmark_gpu limits -->

Both end with `<!-- end -->`. As long as there is no stored result the comment stands alone.
"""

import argparse
import ast
import importlib
import json
import re
import sys
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
RESULT = re.compile(r"^<!-- (lab|verdict): (\w+) -->\n"
                    r"((?:(?!<!-- (?:lab|verdict): ).)*?<!-- end -->\n)?", re.M | re.S)
BENCHMARK = re.compile(r"^<!-- benchmark: (\w+) (\w+) -->\n"
                       r"(?:\n(?:(?!<!-- benchmark: ).)*?^<!-- end -->\n)?", re.M | re.S)
MARK = re.compile(r"^<!-- (code|tour|output|stored)(?:: (.*?))? -->\n\Z", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a lecture, and the comment that stands directly before it."""
    language: str
    text: str           # what is between the fences, with its last newline
    mark: str           # "code", "tour", "output", "stored", or "" without a comment
    argument: str       # what the comment says after the colon
    start: int          # where `text` begins in the lecture
    line: int           # line of the opening fence, from 1


def read_blocks(lecture: str) -> list[Block]:
    """The fenced blocks of a lecture, in order.

    Example: "<!-- code: a.py::f -->\\n```python\\nx\\n```\\n" is one block with language "python",
    text "x\\n", mark "code" and argument "a.py::f".
    """
    blocks = []
    for fence in FENCE.finditer(lecture):
        before = lecture[:fence.start()]
        mark = MARK.search(before[before.rfind("\n", 0, -1) + 1:])
        kind, argument = (mark.group(1), mark.group(2) or "") if mark else ("", "")
        blocks.append(Block(fence.group(1), fence.group(2), kind, argument, fence.start(2),
                            before.count("\n") + 1))
    return blocks


def find_symbol(tree: ast.Module, name: str) -> ast.stmt | None:
    """The statement that defines `name`, or `Class.method`; the last one if there are several."""
    body: list[ast.stmt] = tree.body
    definition = None
    for part in name.split("."):
        definition = None
        for statement in body:
            names = [getattr(statement, "name", None)]
            if isinstance(statement, ast.Assign):
                names = [target.id for target in statement.targets if isinstance(target, ast.Name)]
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                names = [statement.target.id]
            if part in names:
                definition = statement
        if definition is None:
            return None
        body = getattr(definition, "body", [])
    return definition


def hint(name: str, repository: Path) -> str:
    """Which files of the package define `name` now, as the end of an error message."""
    places = [path.relative_to(repository).as_posix()
              for path in sorted((repository / "minirlhf").rglob("*.py"))
              if find_symbol(ast.parse(path.read_text(encoding="utf-8")), name) is not None]
    if not places:
        return f"no file of minirlhf/ defines {name}: quote its successor"
    return f"{' and '.join(places)} does: name that file in the comment"


def quote(argument: str, repository: Path = REPOSITORY) -> str:
    """The source that `file.py::symbol` or `file.py::symbol nodoc` names: whole lines, dedented.

    Raises: ValueError if the argument has another form, or the file or the symbol is not there.
    """
    match = re.fullmatch(r"([\w/]+\.py)::([\w.]+)( nodoc)?", argument)
    if match is None:
        raise ValueError("expected `file.py::symbol` or `file.py::symbol nodoc`, found "
                         f"{argument!r}")
    path, name, without_docstring = repository / match.group(1), match.group(2), match.group(3)
    if not path.is_file():
        raise ValueError(f"{argument}: there is no file {match.group(1)}; {hint(name, repository)}")
    source = path.read_text(encoding="utf-8")
    node = find_symbol(ast.parse(source), name)
    if node is None:
        raise ValueError(f"{argument}: {match.group(1)} defines no {name}; "
                         f"{hint(name, repository)}")
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = source.split("\n")
    kept = range(first, node.end_lineno + 1)
    if without_docstring:
        if ast.get_docstring(node) is None:
            raise ValueError(f"{argument}: {name} has no docstring to leave out")
        docstring = node.body[0]
        end = docstring.end_lineno
        if isinstance(node, ast.ClassDef) and not lines[end].strip():
            end += 1                                     # the empty line after a class's docstring
        kept = [n for n in kept if not docstring.lineno <= n <= end]
    return textwrap.dedent("\n".join(lines[n - 1] for n in kept)) + "\n"


def first_difference(old: str, new: str) -> str:
    """Where a quote and its source part, in words.

    Example: "a\\nb\\n" and "a\\nc\\n" give "line 2 of the quote is 'b', the code has 'c'".
    """
    pairs = zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    number, line, source = next((number, line, source)
                                for number, (line, source) in enumerate(pairs, start=1)
                                if line != source)
    return f"line {number} of the quote is {line!r}, the code has {source!r}"


def renew(lecture: str) -> tuple[str, list[str], list[str]]:
    """The lecture with every quoted block as its source has it; what changed; what is broken.

    Each change names the line of the block, its source and the first difference. A comment whose
    file or symbol is gone is broken: its block stays as it is.
    """
    changes: list[str] = []
    broken: list[str] = []
    for block in reversed(read_blocks(lecture)):         # from the end: positions stay right
        if block.mark != "code":
            continue
        try:
            expected = quote(block.argument)
        except ValueError as error:
            broken.insert(0, f"line {block.line - 1}: {error}")
            continue
        if block.text != expected:
            difference = first_difference(block.text, expected)
            changes.insert(0, f"line {block.line}: {block.argument}: {difference}")
            lecture = lecture[:block.start] + expected + lecture[block.start + len(block.text):]
    return lecture, changes, broken


def measured(kind: str, result: dict, name: str) -> str:
    """What a stored result of the laboratory says, as Markdown: all of it, or the verdict."""
    seeds = result["seeds"]
    text = (f"\n**Measured** (`{result['command']}`, {seeds} seeds). The claim: "
            f"*{result['claim']}* By the rule that was stated beforehand: "
            f"**{result['verdict']}**.\n")
    if kind == "lab":
        figures = [figure for figure in result["figures"]
                   if any(figure in arm for arm in result["arms"].values())]
        titles = [name.replace("_", "_<wbr>") if len(figures) > 7 else name for name in figures]
        lines = [["mean [95 % over seeds]", *titles], ["---"] * (1 + len(figures))]
        for arm, of_arm in result["arms"].items():
            lines.append([arm, *(interval(of_arm[figure]) if figure in of_arm else ""
                                 for figure in figures)])
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
        for part in result["findings"]:
            text += f"- {part['word']}: {part['claim']} (difference {interval(part, '+')})\n"
        text += f"\n![{name}: each arm's figures over the seeds](results/lab/{name}.png)\n"
    return text + "\n<!-- end -->\n"


def interval(figure: dict, sign: str = "") -> str:
    """Mean, low and high of a stored figure; small ones keep a digit where a sign is asked for.

    Example: {"mean": 1.234, "low": -0.003, "high": 1.5} gives "1.23 [0.00, 1.50]", and with the
    sign "+" it gives "+1.23 [-0.003, +1.50]": a finding depends on which side of 0 an end lies.
    """
    ends = []
    for end in ("mean", "low", "high"):
        rounded = round(figure[end], 2) + 0.0                              # + 0.0: no -0.00
        small = sign and rounded == 0 != figure[end]
        ends.append(f"{figure[end]:+.1g}" if small else f"{rounded:{sign}.2f}")
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def renew_results(lecture: str, folder: Path = FOLDER / "results" / "lab") -> tuple[str, list[str]]:
    """The lecture with the laboratory's results as they are stored in `folder`; what changed."""
    changes: list[str] = []

    def stored(mark: re.Match) -> str:
        path = folder / f"{mark[2]}.json"
        text = f"<!-- {mark[1]}: {mark[2]} -->\n"
        if path.exists():
            text += measured(mark[1], json.loads(path.read_text(encoding="utf-8")), mark[2])
        if text != mark[0]:
            changes.append(f"{mark[1]}: {mark[2]}: the stored result says something else")
        return text

    def tables(mark: re.Match) -> str:
        path = folder.parent / f"{mark[1]}.json"
        text = f"<!-- benchmark: {mark[1]} {mark[2]} -->\n"
        if path.exists():
            sys.path.insert(0, str(REPOSITORY))          # when this file runs as a script
            report = importlib.import_module("minirlhf.benchmark.report")
            result = json.loads(path.read_text(encoding="utf-8"))
            text += f"\n{getattr(report, f'{mark[2]}_table')(result)}\n\n<!-- end -->\n"
        if text != mark[0]:
            changes.append(f"benchmark: {mark[1]} {mark[2]}: the stored result says something else")
        return text

    return BENCHMARK.sub(tables, RESULT.sub(stored, lecture)), changes


def main() -> int:
    """Report or rewrite stale quotes and results; the exit code."""
    parser = argparse.ArgumentParser(description="Compare the lectures' quotes with the code.")
    parser.add_argument("--fix", action="store_true", help="rewrite the quotes that differ")
    fix = parser.parse_args().fix
    left, stale = 0, 0
    for path in sorted(FOLDER.glob("*.md")):
        renewed, changes, broken = renew(path.read_text(encoding="utf-8"))
        renewed, results = renew_results(renewed)
        changes += results
        for text in changes:
            print(f"{path.name}, {text}{' (rewritten)' if fix else ''}")
        for text in broken:
            print(f"{path.name}, {text}")
        if fix and changes:
            path.write_text(renewed, encoding="utf-8", newline="\n")
        stale += 0 if fix else len(changes)
        left += len(broken)
    if stale:
        print("rewrite them with: python lectures/quotes.py --fix")
    return 1 if stale or left else 0


if __name__ == "__main__":
    raise SystemExit(main())
