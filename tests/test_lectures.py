"""The lectures are read beside the code; these tests keep the two together.

Quotes equal their source, code blocks run, debugger tours print what the lecture says, links and
section titles exist, and each metric has its sentence.
"""

import contextlib
import importlib.util
import io
import json
import os
import pdb
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from lectures import quotes
from minirlhf import ppo_report
from minirlhf.files.pretrained import save_network
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel
from minirlhf.tokenizer import Tokenizer
from minirlhf.world import demonstrations

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted((REPOSITORY / "lectures").glob("*.md"))
TEXT = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
NAMES = [name for name in TEXT if name[0].isdigit()]     # lectures; the other pages hold results
TITLES_WITHOUT_TOUR = {"Sources"}

# what makes a tour quick: the same command with small numbers; a tour's own options come last
SMALL = {
    "minirlhf.generate": ["--max_new_tokens", "8"],
    "minirlhf.pretrain": ["--characters", "20000", "--vocab_size", "300", "--n_embd", "16",
                          "--n_layer", "1", "--n_head", "2", "--context", "32", "--steps", "2"],
    "minirlhf.sft": ["--examples", "40", "--held_out", "8", "--batch_size", "8", "--epochs", "1",
                     "--max_new_tokens", "8"],
    "minirlhf.reward_model": ["--data", "comparisons.jsonl", "--held_out", "8", "--batch_size", "8",
                              "--norm_samples", "8", "--max_new_tokens", "8"],
    "minirlhf.ppo": ["--prompt_count", "40", "--batch_size", "8", "--minibatch_size", "4",
                     "--iterations", "2", "--max_new_tokens", "8"],
    "minirlhf.evaluate": ["--prompt_count", "8", "--answers", "2", "--max_new_tokens", "8"],
    "minirlhf.experiments.reviews": [],
}


# its `b NAME` ends in a TypeError where the function's first constant is no code: a default, say
pdb_works = pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0),
                               reason="pdb of Python 3.13.0 cannot stop in a function by its name")


# ---- what the tours need -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with random one-layer checkpoints under the default names, and small data files."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = Tokenizer([])                            # bytes only
    torch.manual_seed(0)
    policy = GPT2(GPT2Config(tokenizer.vocab_size, 192, 16, 1, 2))
    reward_model = ScalarModel(policy.config)
    for name, command, model in (("tiny", "", policy), ("sft", "SFT", policy),
                                 ("ppo", "PPO", policy),
                                 ("reward_model", "RewardModel", reward_model)):
        tokenizer.save(str(folder / "checkpoints" / name))
        save_network(model, str(folder / "checkpoints" / name))
        if command:                                      # a later run may write there
            run = {"command": command, "finished": True}
            (folder / "checkpoints" / name / "run.json").write_text(json.dumps(run))
    rows = [{"prompt": row["prompt"], "chosen": row["response"] + " Enjoy!", "rejected": "No."}
            for row in demonstrations(40, 0)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "comparisons.jsonl").write_text(lines, encoding="utf-8")
    ratings = "1\t2.5\tA fine film.\n2\t-3.0\tA dull film.\n"
    (folder / "movieReviewSnippets_GroundTruth.txt").write_text(ratings, encoding="utf-8")
    return folder


def read_tour(text: str) -> tuple[str, list[str], list[tuple[str, str]]]:
    """A tour's module, its options, and its debugger commands with the text expected of each."""
    first, *lines = text.splitlines()
    prefix = "$ python -m pdb -m "
    assert first.startswith(prefix), f"expected {prefix}MODULE, found {first}"
    module, *options = first.removeprefix(prefix).split()
    steps: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("(Pdb) "):
            steps.append((line.removeprefix("(Pdb) "), ""))
        else:
            command, expected = steps[-1]
            steps[-1] = (command, expected + line + "\n")
    return module, options, steps


def compare(steps: list[tuple[str, str]], printed: str) -> None:
    """Every expected text was printed; "..." in it stands for anything. Nothing went wrong."""
    answers = printed.split("(Pdb) ")[1:]
    assert len(answers) >= len(steps), f"the debugger stopped early:\n{printed}"
    for (command, expected), answer in zip(steps, answers):
        if command.startswith("b "):
            assert "Breakpoint" in answer, f"{command}: {answer}"
        assert "***" not in answer or "***" in expected, f"{command}: {answer}"
        ended = re.search(r"The program (finished|exited)", answer)
        assert not ended, f"{command} ran to the end of the program"
        if expected:
            pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
            fits = re.fullmatch(pattern, answer.strip(), re.S)
            assert fits, f"{command}: expected {expected!r}, found {answer!r}"


def run_under_debugger(module: str, options: list[str], commands: list[str]) -> str:
    """What `python -m pdb -m module options` prints for these commands, without a new process."""
    spec = importlib.util.find_spec(module)
    source = Path(spec.origin).read_text(encoding="utf-8")
    main_module = types.ModuleType("__main__")
    main_module.__file__ = spec.origin
    screen = io.StringIO()
    debugger = pdb.Pdb(stdin=io.StringIO("\n".join([*commands, "q"]) + "\n"), stdout=screen,
                       nosigint=True, readrc=False)
    saved = sys.modules["__main__"], sys.argv
    try:
        sys.modules["__main__"], sys.argv = main_module, [spec.origin, *options]
        debugger.run(compile(source, spec.origin, "exec"), main_module.__dict__)
    finally:
        sys.modules["__main__"], sys.argv = saved
        debugger.clear_all_breaks()
    return screen.getvalue()


# ---- quotes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEXT)
def test_quoted_code_equals_its_source(name):
    _, changes, broken = quotes.renew(TEXT[name])
    stale = "\n".join([*changes, *broken])
    assert not stale, (f"lectures/{name} quotes code that has changed. `python lectures/quotes.py "
                       f"--fix` rewrites the quotes; then read the text around them.\n{stale}")


def test_the_tool_finds_functions_classes_methods_and_assignments(tmp_path):
    (tmp_path / "a.py").write_text(
        "LIMIT = 3      # why\nSIZE: int = 4\n\n\n@decorated\ndef f(x):\n    \"\"\"Doc.\n\n"
        "    More.\n    \"\"\"\n    return x\n\n\nclass C:\n    \"\"\"Doc.\"\"\"\n\n"
        "    def m(self):\n        return 1\n", encoding="utf-8")
    assert quotes.quote("a.py::LIMIT", tmp_path) == "LIMIT = 3      # why\n"
    assert quotes.quote("a.py::SIZE", tmp_path) == "SIZE: int = 4\n"
    assert quotes.quote("a.py::f nodoc", tmp_path) == "@decorated\ndef f(x):\n    return x\n"
    assert quotes.quote("a.py::C.m", tmp_path) == "def m(self):\n    return 1\n"
    without_doc = "class C:\n    def m(self):\n        return 1\n"
    assert quotes.quote("a.py::C nodoc", tmp_path) == without_doc
    for wrong in ("a.py::g", "b.py::f", "a.py", "a.py::C.f", "a.py::C.m nodoc"):
        with pytest.raises(ValueError):
            quotes.quote(wrong, tmp_path)


def test_the_tool_says_where_a_moved_symbol_is_now(tmp_path):
    (tmp_path / "minirlhf" / "engine").mkdir(parents=True)
    (tmp_path / "a.py").write_text("", encoding="utf-8")
    (tmp_path / "minirlhf" / "engine" / "b.py").write_text("def f():\n    pass\n", encoding="utf-8")
    for gone in ("a.py::f", "c.py::f"):
        with pytest.raises(ValueError, match="minirlhf/engine/b.py does"):
            quotes.quote(gone, tmp_path)
    with pytest.raises(ValueError, match="no file of minirlhf/ defines g"):
        quotes.quote("a.py::g", tmp_path)


def test_the_tool_rewrites_a_stale_quote_and_nothing_else():
    mark = "<!-- code: minirlhf/gpt2.py::behaviour_logprobs nodoc -->\n"
    before, after = "Text.\n\n" + mark + "```python\n", "```\n\n```python\nx = 1\n```\n"
    fixed, changes, broken = quotes.renew(before + "old\n" + after)
    assert broken == [] and len(changes) == 1
    assert changes[0].startswith("line 4: minirlhf/gpt2.py::behaviour_logprobs nodoc: line 1 of "
                                 "the quote is 'old', the code has 'def behaviour_logprobs(")
    assert fixed == before + quotes.quote("minirlhf/gpt2.py::behaviour_logprobs nodoc") + after
    assert quotes.renew(fixed) == (fixed, [], [])


def test_the_tool_keeps_a_quote_whose_source_is_gone_and_rewrites_the_others():
    def page(text: str) -> str:
        return ("<!-- code: minirlhf/gpt2.py::no_such_name -->\n```python\nkept\n```\n"
                f"<!-- code: minirlhf/data.py::TEMPLATE -->\n```python\n{text}```\n")

    fixed, changes, broken = quotes.renew(page("old\n"))
    assert fixed == page(quotes.quote("minirlhf/data.py::TEMPLATE"))
    assert len(changes) == 1 and "line 6" in changes[0]
    assert len(broken) == 1 and "line 1" in broken[0] and "no_such_name" in broken[0]


# ---- code blocks and tours -----------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_the_python_blocks_of_a_lecture_run_in_order(name, workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    namespace: dict = {"__name__": "lecture"}
    printed, count = "", 0
    for block in quotes.read_blocks(TEXT[name]):
        if block.language == "python" and block.mark == "":
            screen = io.StringIO()
            with contextlib.redirect_stdout(screen):
                exec(compile("\n" * block.line + block.text, name, "exec"), namespace)
            printed, count = screen.getvalue(), count + 1
        elif block.mark == "output":
            stripped = "\n".join(line.rstrip() for line in printed.splitlines()) + "\n"
            place = f"{name}, line {block.line}"
            assert block.text == stripped, f"{place}: the block above prints\n{printed}"
    assert count > 0


@pdb_works
@pytest.mark.parametrize("name", NAMES)
def test_debugger_tours_print_what_the_lecture_says(name, workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    for block in quotes.read_blocks(TEXT[name]):
        if block.language == "pdb":
            module, options, steps = read_tour(block.text)
            commands = [command for command, _ in steps]
            printed = run_under_debugger(module, SMALL[module] + options, commands)
            try:
                compare(steps, printed)
            except AssertionError as error:
                raise AssertionError(f"{name}, line {block.line}: {error}") from None


@pdb_works
def test_a_tour_works_when_typed_at_a_terminal(workshop):
    tours = [block for block in quotes.read_blocks(TEXT["00-map.md"]) if block.language == "pdb"]
    module, options, steps = read_tour(tours[0].text)
    commands = "\n".join([command for command, _ in steps] + ["q"]) + "\n"
    process = subprocess.run([sys.executable, "-m", "pdb", "-m", module, *SMALL[module], *options],
                             input=commands, capture_output=True, text=True, encoding="utf-8",
                             cwd=workshop, timeout=120,
                             env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "1"})
    compare(steps, process.stdout)


@pytest.mark.parametrize("formula, caller", [
    ("shaped_rewards", "rollout"), ("gae", "rollout"), ("whiten", "rollout"),
    ("policy_loss", "update"), ("value_loss", "update")])
def test_at_a_formula_of_ppo_four_frames_of_ours_are_on_the_stack(formula, caller, workshop,
                                                                  monkeypatch):
    monkeypatch.chdir(workshop)
    commands = ["b main", "c", f"b {formula}", "c", "w"]
    printed = run_under_debugger("minirlhf.ppo", SMALL["minirlhf.ppo"], commands)
    stack = printed.split("(Pdb) ")[5]
    frames = re.findall(r"minirlhf.*[\\/]?\w+\.py\(\d+\)(\S+)\(\)", stack)
    assert frames == ["<module>", "main", caller, formula]


@pytest.mark.parametrize("wrong", ["p 1 + 1\n3", "b no_such_function", "p undefined_name"])
def test_a_tour_that_prints_something_else_is_noticed(wrong, workshop, monkeypatch):
    monkeypatch.chdir(workshop)
    module, options, steps = read_tour(f"$ python -m pdb -m minirlhf.generate\n(Pdb) {wrong}\n")
    printed = run_under_debugger(module, SMALL[module] + options, [command for command, _ in steps])
    with pytest.raises(AssertionError):
        compare(steps, printed)


@pytest.mark.parametrize("name", NAMES)
def test_every_section_ends_with_a_stop(name):
    _, *sections = re.split(r"^## ", TEXT[name], flags=re.M)
    assert sections
    for section in sections:
        title = section.split("\n")[0]
        if title not in TITLES_WITHOUT_TOUR:
            last = quotes.read_blocks(section)[-1:]
            assert "**Stop here.**" in section, f"{name}: {title} has no **Stop here.**"
            assert last and last[0].language == "pdb", f"{name}: {title} does not end in a tour"
            assert section.rstrip().endswith("```"), f"{name}: text after the tour of {title}"


# ---- links, section titles, metrics, words -------------------------------------------------------

def titles(text: str) -> list[str]:
    """The section titles of a Markdown text; what stands in fences is no title."""
    without_fences = quotes.FENCE.sub("", text)
    return re.findall(r"^#{1,6} (.+)$", without_fences, re.M)


def anchor(title: str) -> str:
    """The link target that GitHub makes of a section title."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_docstrings_refer_to_sections_that_exist():
    reference = re.compile(r'Lecture:\s+lectures/([\w-]+\.md)(?:,\s+"([^"]+)")?')
    count = 0
    for path in sorted((REPOSITORY / "minirlhf").rglob("*.py")):
        for name, title in reference.findall(path.read_text(encoding="utf-8")):
            assert name in TEXT, f"{path.name} refers to lectures/{name}"
            assert not title or title in titles(TEXT[name]), f'{path.name}: {name} has no "{title}"'
            count += 1
    assert count >= 10


@pytest.mark.parametrize("name", TEXT)
def test_links_of_a_lecture_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]):
        if target.startswith(("http://", "https://")):
            continue
        file, _, section = target.partition("#")
        path = (REPOSITORY / "lectures" / file) if file else REPOSITORY / "lectures" / name
        assert path.exists(), f"{name}: {target}"
        if section:
            anchors = [anchor(title) for title in titles(path.read_text(encoding="utf-8"))]
            assert section in anchors, f"{name}: {target}"


def test_every_metric_of_ppo_has_its_sentence():
    section = TEXT["05-ppo-the-run.md"].split("## What the metrics mean\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.M)
    assert [metric for metric, _ in rows] == ppo_report.METRICS
    for metric, sentence in rows:
        assert sentence.endswith("."), f"{metric}: {sentence}"


@pytest.mark.parametrize("name", TEXT)
def test_lectures_use_the_words_of_the_code(name):
    other_words = r"\b(completions?|quer(?:y|ies)|actors?|y_w|y_l|approx_kl|log_probs|logp)\b"
    assert re.findall(other_words, TEXT[name], re.I) == [], ("the code says response, prompt, "
                                                             "policy, chosen, rejected, kl_old, "
                                                             "logprobs")


@pytest.mark.parametrize("name", TEXT)
def test_rates_are_per_and_not_a(name):
    units = r"\b(?:nats?|tokens?|points?|bytes|scores?) an? (?:token|response|second|parameter)\b"
    assert re.findall(units, TEXT[name]) == [], "write nats per token, tokens per second"


@pytest.mark.parametrize("name", NAMES)
def test_lines_of_code_in_a_lecture_fit_beside_an_editor(name):
    for block in quotes.read_blocks(TEXT[name]):
        for line in block.text.splitlines() if block.mark != "output" else ():
            assert len(line) <= 110, f"{name}, line {block.line}: {line}"
