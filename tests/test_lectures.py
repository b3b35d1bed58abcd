"""The lectures are read beside the code; these tests keep the two together.

Quotes equal their source, code blocks run, debugger tours print what the lecture says, links and
section titles exist, and each metric has its sentence.
"""

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import os
import pdb
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_launch import config_of

from lectures import quotes
from minirlhf import ppo, ppo_report, reward_model, sft
from minirlhf.diagnose.__main__ import DiagnoseConfig
from minirlhf.diagnose.__main__ import main as diagnose
from minirlhf.engine.options import parse_config
from minirlhf.exercises.__main__ import EXERCISES
from minirlhf.files.pretrained import save_network
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel
from minirlhf.museum.effect import differs, read_effects
from minirlhf.museum.exhibits import EXHIBITS
from minirlhf.tokenizer import Tokenizer
from minirlhf.world import demonstrations

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted((REPOSITORY / "lectures").glob("*.md"))
TEXT = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
NAMES = [name for name in TEXT if name[0].isdigit()]     # lectures; the other pages hold results
FRAMED = ("00-map.md", "01-gpt2.md", "02-sft.md", "03-reward-model.md",      # with questions etc.
          "04-ppo-mathematics.md", "05-ppo-the-run.md", "06-what-goes-wrong.md",
          "07-does-it-work.md", "08-scale-and-history.md", "09-what-came-after.md")
TITLES_WITHOUT_TOUR = {"Sources", "Notation", "What to take away", "Test yourself",
                       "Exercises", "What comes next",
                       "The lecture notes this project began from"}

# what makes a tour quick: the same command with small numbers; a tour's own options come last.
# Tours of SFT start from the shipped base model with the reader's own numbers, so they need none
SMALL = {
    "minirlhf.generate": ["--max_new_tokens", "8"],
    "minirlhf.pretrain": ["--characters", "20000", "--vocab_size", "300", "--n_embd", "16",
                          "--n_layer", "1", "--n_head", "2", "--context", "32", "--steps", "2"],
    "minirlhf.sft": [],
    "minirlhf.reward_model": ["--data", "comparisons.jsonl", "--norm_samples", "8",
                              "--max_new_tokens", "8"],
    "minirlhf.ppo": ["--prompt_count", "100", "--iterations", "2", "--max_new_tokens", "8"],
    "minirlhf.evaluate": ["--prompt_count", "8", "--answers", "2", "--max_new_tokens", "8"],
    "minirlhf.siblings.groups": ["--prompt_count", "40", "--batch_size", "8", "--minibatch_size",
                                 "4", "--iterations", "2", "--max_new_tokens", "8"],
    "minirlhf.siblings.dpo": ["--data", "comparisons.jsonl", "--held_out", "8", "--batch_size",
                              "8"],
    "minirlhf.siblings.rejection": ["--prompt_count", "40", "--prompts_per_round", "16",
                                    "--rounds", "1", "--batch_size", "4"],
    "minirlhf.experiments.reviews": [],
    "minirlhf.label": ["--max_new_tokens", "8"],
    "minirlhf.lab": [],
}


# its `b NAME` ends in a TypeError where the function's first constant is no code: a default, say
pdb_works = pytest.mark.skipif(sys.version_info[:3] == (3, 13, 0),
                               reason="pdb of Python 3.13.0 cannot stop in a function by its name")


# ---- what the tours need -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Path:
    """A folder with the shipped base model, random one-layer checkpoints under the names of the
    stages, and small data files."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(REPOSITORY / "checkpoints" / "tiny", folder / "checkpoints" / "tiny")
    make_stages(folder)
    return folder


def make_stages(folder: Path) -> None:
    """What `python -m minirlhf` leaves in `folder`, with random networks; and small data files."""
    tokenizer = Tokenizer([])                            # bytes only
    torch.manual_seed(0)
    policy = GPT2(GPT2Config(tokenizer.vocab_size, 192, 16, 1, 2))
    reward_model = ScalarModel(policy.config)
    for name, command, model in (("sft", "SFT", policy), ("ppo", "PPO", policy),
                                 ("reward_model", "RewardModel", reward_model)):
        tokenizer.save(str(folder / "checkpoints" / name))
        save_network(model, str(folder / "checkpoints" / name))
        run = {"command": command, "finished": True}     # a later run may write there
        (folder / "checkpoints" / name / "run.json").write_text(json.dumps(run))
    rows = [{"prompt": row["prompt"], "chosen": row["response"] + " Enjoy!", "rejected": "No."}
            for row in demonstrations(100, 0)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "comparisons.jsonl").write_text(lines, encoding="utf-8")
    ratings = "1\t2.5\tA fine film.\n2\t-3.0\tA dull film.\n"
    (folder / "movieReviewSnippets_GroundTruth.txt").write_text(ratings, encoding="utf-8")


def read_tour(text: str) -> tuple[str, list[str], list[tuple[str, str]]]:
    """A tour's module, its options, and its debugger commands with the text expected of each."""
    first, *lines = text.replace("\\\n", " ").splitlines()
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
    if spec.submodule_search_locations is not None:      # of a package its __main__ runs
        spec = importlib.util.find_spec(f"{module}.__main__")
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


@pytest.mark.parametrize("name", TEXT)
def test_what_the_laboratory_measured_is_told_as_it_is_stored(name):
    assert quotes.renew_results(TEXT[name])[1] == [], "python lectures/quotes.py --fix"


def test_the_tool_tells_a_result_renews_it_and_takes_it_away(tmp_path):
    figure = {"mean": 2.0, "low": 1.5, "high": 2.5, "values": [2.0]}
    result = {"command": "python -m minirlhf.lab x --seeds 4", "seeds": 4, "claim": "So it is.",
              "verdict": "shown", "figures": ["gold"], "arms": {"a": {"gold": figure}},
              "findings": [{"word": "shown", "claim": "a > 1", "mean": 1, "low": 0.5, "high": 1.5}]}
    page = "Text.\n\n<!-- lab: x -->\n\nMore.\n\n<!-- verdict: x -->\n<!-- lab: y -->\n"
    assert quotes.renew_results(page, tmp_path) == (page, [])
    (tmp_path / "x.json").write_text(json.dumps(result), encoding="utf-8")
    told, changes = quotes.renew_results(page, tmp_path)
    assert len(changes) == 2 and quotes.renew_results(told, tmp_path) == (told, [])
    assert "| a | 2.00 [1.50, 2.50] |\n" in told and told.count("**shown**") == 2
    assert "- shown: a > 1 (difference +1.00 [+0.50, +1.50])\n" in told
    (tmp_path / "x.json").unlink()
    assert quotes.renew_results(told, tmp_path)[0] == page


# ---- figures of runs -----------------------------------------------------------------------------

def test_how_many_mistakes_show_in_no_curve_is_what_the_museum_measured():
    effects = read_effects(str(REPOSITORY / "lectures" / "results" / "museum.json"))
    hidden = [name for name, effect in effects.items()
              if not any(differs(right, effect["wrong"][figure])
                         for figure, right in effect["right"].items())]
    assert len(effects) == len(EXHIBITS)
    assert f"{len(hidden)} of the {len(effects)} show in no curve" in TEXT["06-what-goes-wrong.md"]
    assert f"{len(effects)} of {len(effects)}; in {len(hidden)} of them" in TEXT["reliability.md"]


def test_the_table_of_bugs_has_every_exhibit_of_the_museum():
    section = TEXT["06-what-goes-wrong.md"].split("| exhibit | bug |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", section, re.M)
    assert sorted(rows) == sorted(exhibit.name for exhibit in EXHIBITS)


def test_the_curves_of_the_hacked_run_are_those_of_the_stored_runs():
    section = TEXT["06-what-goes-wrong.md"].split("| iteration | 0 | 6 |")[1].split("\n\n")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]]
            for line in section.splitlines()[2:]]
    iterations = (0, 6, 12, 24, 36, 48, 59)
    assert len(rows) == 6
    for row, (file, column, digits) in zip(rows, [
            (file, column, digits) for file in ("hacked.csv", "healthy.csv")
            for column, digits in (("score", 1), ("gold", 1), ("kl_ref", 0))]):
        with open(REPOSITORY / "lectures" / "results" / file, encoding="utf-8") as lines:
            stored = list(csv.DictReader(lines))
        expected = [f"{float(stored[i][column]):.{digits}f}" if i < len(stored) else ""
                    for i in iterations]
        assert row[1:] == expected, (file, column)


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
@pytest.mark.slow
def test_all_tours_work_one_after_another_in_one_folder_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "checkpoints" / "tiny", tmp_path / "checkpoints" / "tiny")
    has_run = False                                      # as in a fresh clone
    for name in NAMES:
        for block in quotes.read_blocks(TEXT[name]):
            if block.language == "pdb":
                module, options, steps = read_tour(block.text)
                assert module in ("minirlhf.generate", "minirlhf.evaluate",
                                  "minirlhf.experiments.reviews") or options[-2:] == \
                    ["--out", f"checkpoints/tour/{module.rpartition('.')[2]}"], block.text
                printed = run_under_debugger(module, SMALL[module] + options,
                                             [command for command, _ in steps])
                compare(steps, printed)
            elif block.text == "python -m minirlhf\n" and not has_run:
                make_stages(tmp_path)
                has_run = True
                before = contents(tmp_path)
    assert has_run and contents(tmp_path) == before
    sft.main(sft.SFTConfig(examples=40, held_out=8, epochs=1, max_new_tokens=8))
    reward_model.main(reward_model.RewardModelConfig(data="comparisons.jsonl", held_out=8,
                                                     norm_samples=8, max_new_tokens=8))
    ppo.main(ppo.PPOConfig(prompt_count=100, iterations=1, max_new_tokens=8))
    assert diagnose(DiagnoseConfig(run="checkpoints/ppo")) is not None


def contents(folder: Path) -> list[str]:
    """The files in a folder, at any depth, outside the tours' own scratch folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.startswith("checkpoints/tour/"))


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


@pytest.mark.parametrize("trainer, functions", [
    (sft, {"main", "train_step", "batch_loss", "evaluate"}),
    (reward_model, {"main", "train_step", "held_out_scores"}),
    (ppo, {"main", "rollout", "forward_pass", "update"})])
def test_a_step_into_a_line_that_calls_us_does_not_enter_torch_first(trainer, functions, workshop,
                                                                    monkeypatch):
    monkeypatch.chdir(workshop)
    monkeypatch.setenv("MINIRLHF_PRODUCTS", "stock")     # the fast twins are no part of a tour
    calls: dict[tuple[str, int], list[str]] = {}         # who is entered from each line, in order
    lines: dict[types.FrameType, tuple[str, int]] = {}   # where each frame stands

    def note_line(frame, event, argument):
        lines[frame] = (frame.f_code.co_name, frame.f_lineno)
        return note_line

    def note_call(frame, event, argument):
        if frame.f_back in lines:
            calls.setdefault(lines[frame.f_back], []).append(frame.f_code.co_filename)
        ours = frame.f_code.co_filename == trainer.__file__ and frame.f_code.co_name in functions
        return note_line if ours else None

    options = {sft: ["--examples", "80", "--held_out", "16", "--epochs", "1"],
               reward_model: ["--held_out", "8"], ppo: []}[trainer]
    config = parse_config(config_of(trainer.__name__),
                          [*SMALL[trainer.__name__], *options, "--out", "steps"])
    before = sys.gettrace()
    sys.settrace(note_call)
    try:
        trainer.main(config)
    finally:
        sys.settrace(before)
        shutil.rmtree("steps", ignore_errors=True)
    source = Path(trainer.__file__).read_text(encoding="utf-8").split("\n")
    loop = next(number for number, line in enumerate(source, 1) if "in run.steps()" in line)
    entered = {place: ["minirlhf" in Path(path).parts for path in paths]
               for place, paths in calls.items() if place[0] != "main" or place[1] >= loop}
    entered.pop(("main", max(line for function, line in calls if function == "main")))   # publish
    assert {function for function, _ in entered} == functions
    assert [place for place, ours in entered.items() if any(ours) and not ours[0]] == []


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
            end = section.rstrip().splitlines()[-1]
            assert end in ("```", "</details>"), f"{name}: text after the tour of {title}"


@pytest.mark.parametrize("name", FRAMED)
def test_a_stop_asks_for_a_number_before_it_shows_it(name):
    stops = TEXT[name].split("**Stop here.**")[1:]
    for stop in stops:
        question, _, rest = stop.partition("Your guess")
        where = f"{name}: {question.strip()[:60]}"
        assert "?" in question and "____" in rest.splitlines()[0], where
        folded = rest.partition("<details>\n<summary>Look</summary>\n")[2].split("</details>")[0]
        (tour,) = quotes.read_blocks(folded)
        answers = "".join(expected for _, expected in read_tour(tour.text)[2])
        assert re.search(r"\d", answers), f"{where}: no number"
        assert "True" not in answers or re.search(r"\(.*\d.*\)|\d\n", answers), where
        assert len(folded[tour.start + len(tour.text):].split()) > 5, f"{where}: no reason"


@pytest.mark.parametrize("name", FRAMED)
def test_a_lecture_names_its_exercises(name):
    section = TEXT[name].split("## Exercises\n")[1].split("\n## ")[0]
    ours = {exercise.name for exercise in EXERCISES if exercise.lecture == int(name[:2])}
    assert set(re.findall(r"`(\w+)`", section)) == ours


@pytest.mark.parametrize("name", FRAMED)
def test_a_lecture_has_its_frame(name):
    text = TEXT[name]
    for words in ("**After this lecture you can**", "**Time:**", "**You need:**",
                  "## What to take away\n", "## Test yourself\n", "## What comes next\n"):
        assert text.count(words) == 1, f"{name}: {words}"
    questions, answers = text.split("## Test yourself\n")[1].split("\n## ")[0].split("<details>")
    assert answers.startswith("\n<summary>Answers</summary>")
    for part in (questions, answers):
        assert re.findall(r"^(\d)\. ", part, re.M) == ["1", "2", "3", "4", "5"], name


COMMAND = re.compile(r"^(?:torchrun \S+ -m|python -m) (minirlhf[\w.]*)(.*)$", re.M)


@pytest.mark.parametrize("name", TEXT)
def test_the_commands_of_a_page_have_options_that_exist(name):
    for block in quotes.read_blocks(TEXT[name]):
        text = block.text.replace("\\\n", " ").replace("cuda", "cpu")
        for module, rest in COMMAND.findall(text if block.language in ("text", "bash") else ""):
            words = shlex.split(rest, comments=True)
            if words and not words[0].startswith("-"):
                words = words[1:]                        # a folder or a name: a first argument
            parse_config(config_of(module), words)


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


def test_the_glossary_has_every_metric_and_every_name_and_option_that_a_lecture_uses():
    rows = re.findall(r"^\| ([^|]+) \|", TEXT["glossary.md"], re.M)
    entries = {word for row in rows for word in re.findall(r"`(\w+)`", row)}
    metrics = {*sft.METRICS, *reward_model.METRICS, *ppo_report.METRICS}
    assert metrics <= entries
    names = [field.name for thing in (ppo.Rollout, sft.SFTConfig, reward_model.RewardModelConfig,
                                      ppo.PPOConfig) for field in dataclasses.fields(thing)]
    lectures = "".join(TEXT[name] for name in NAMES)
    used = {name for name in names if re.search(rf"`(?:--)?{name}[` ]|--{name}\b", lectures)}
    assert len(used) > 30 and used <= entries, used - entries


# names of things that are no idea of these lectures; an idea's short name is in the glossary
NAMES_OF_THINGS = {"AI", "AMD", "BIG", "CPU", "EPYC", "GB", "GPU", "GPT", "ICWSM", "JASA", "LLM",
                   "MB", "MT", "NOT", "NVIDIA", "PEP", "README", "SIGTERM", "SWE", "TRL", "VADER"}


@pytest.mark.parametrize("name", NAMES)
def test_the_glossary_has_every_idea_that_a_lecture_calls_by_capital_letters(name):
    prose = quotes.FENCE.sub("", TEXT[name])
    prose = re.sub(r"`[^`]*`|<!--.*?-->|\]\([^)]*\)|\*\*Measured\*\*.*", " ", prose)
    used = set(re.findall(r"\b[A-Z]{2,}\b(?:\+\+)?", prose)) - NAMES_OF_THINGS
    words = re.findall(r"^\| ([^|]+) \| ", TEXT["glossary.md"], re.M)
    entries = {part for word in words for part in re.findall(r"[\w+]+", word)}
    assert used <= entries, used - entries


def test_the_words_of_the_glossary_are_in_order_and_none_is_there_twice():
    words = TEXT["glossary.md"].split("## Words\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ", words, re.M)[1:]
    assert len(set(rows)) == len(rows) > 80 and rows == sorted(rows, key=str.lower)


@pytest.mark.parametrize("name", TEXT)
def test_lectures_use_the_words_of_the_code(name):
    text = TEXT[name].replace("*query*", "")             # attention's
    other_words = r"\b(completions?|quer(?:y|ies)|actors?|y_w|y_l|approx_kl|log_probs|logp)\b"
    assert re.findall(other_words, text, re.I) == [], ("the code says response, prompt, "
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
