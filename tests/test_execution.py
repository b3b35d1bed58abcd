"""Rewards from execution: who is paid, what is limited, what is left of a killed answer, and whose
fault a failure is.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import REPOSITORY

from minirlhf import execution, ppo, reward_model, sft
from minirlhf.data import encode_prompt, encode_response, format_prompt, pad
from minirlhf.engine.metrics import read_metrics
from minirlhf.execution import runner, scoring, tasks
from minirlhf.execution.__main__ import ExecutionConfig
from minirlhf.execution.__main__ import main as try_answer
from minirlhf.execution.runner import Outcome, run_answers
from minirlhf.lab import execution as lab_execution
from minirlhf.lab.experiment import REFUTED, SHOWN, verdict
from minirlhf.lab.shared import Task
from minirlhf.tokenizer import Tokenizer

PROMPT = "Write f(x): plus 3, then times 2. f(4) is 14."
INPUTS = (4, -5, 0)
RIGHT = {4: 14, -5: -4, 0: 6}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def run(source: str) -> Outcome:
    return run_answers([(source, INPUTS)])[0]


# ---- who is paid ---------------------------------------------------------------------------------

@pytest.mark.parametrize("source", [
    "(x + 3) * 2", "2 * x + 6", " (x+3)*2 ".strip(), "sum([x, 3, x, 3])",
    "def f(x):\n    y = x + 3\n    return y * 2", "f = lambda x: 2 * (x + 3)",
    "g = [3]\ndef f(x):\n    return (lambda a: a * 2)(x + g[0])"])
def test_a_right_expression_or_function_is_paid(source):
    assert run(source).passes(RIGHT)


WRITE = "open({path!r}, 'w').write('caught')"
UNPAID = {                          # what it is: (answer, end, what happened for the first input)
    "wrong": ("x + 3 * 2", "ran", "value 10"),
    "constant": ("14", "ran", "value 14"),
    "another type": ("(x + 3) * 2.0", "ran", "value 14.0"),
    "does not parse": ("(x + 3 * 2", "ran", "raised SyntaxError"),
    "empty": ("", "ran", "raised KeyError"),
    "prose": ("f adds 3 and doubles.", "ran", "raised SyntaxError"),
    "defines no f": ("y = 3", "ran", "raised KeyError"),
    "raises": ("(x + 3) * 2 / 0", "ran", "raised ZeroDivisionError"),
    "raises for one input only": ("(x + 3) * 2 if x else y", "ran", "value 14"),
    "prints the answer": ("print((x + 3) * 2)", "ran", "value None"),
    "prints and exits": ("print(14)\nraise SystemExit(0)", "ran", "raised SystemExit"),
    "exit": ("exit(0)", "ran", "raised NameError"),
    "sys.exit": ("__import__('sys').exit(0)", "ran", "raised SystemExit"),
    "os._exit": ("__import__('os')._exit(0)", "died", None),
    "aborts": ("__import__('os').abort()", "died", None),
    "recurses": ("def f(x):\n    return f(x + 1)", "ran", "raised RecursionError"),
    "imports": ("import math\ndef f(x):\n    return (x + 3) * 2", "refused", "import"),
    "forks": ("__import__('os').fork()", "refused", "os.fork"),
    "starts a program": ("__import__('os').system('true')", "refused", "os.system"),
    "kills its parent": ("__import__('os').kill(__import__('os').getppid(), 9)", "refused",
                         "os.kill"),
    "opens a file": ("open('/etc/passwd').read()", "refused", "open"),
    "evaluates": ("eval('(x + 3) * 2')", "refused", "compile"),
    "looks at frames": ("__import__('sys')._getframe()", "refused", "sys._getframe"),
    "is equal to everything": (
        "class Y(int):\n    def __eq__(self, other):\n        return True\n"
        "def f(x):\n    return Y((x + 3) * 2)", "ran", "gave Y"),
    "is written as the answer": (
        "class Y:\n    def __repr__(self):\n        return '14'\ndef f(x):\n    return Y()",
        "ran", "gave Y"),
    "a list that is its own item": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "ran",
                                    "raised RecursionError"),
    "changes the builtins": (
        "b = __import__('builtins')\nb.type = lambda value: int\nb.repr = lambda value: '14'\n"
        "def f(x):\n    return 14", "ran", "value 14"),
    "too long": ("x" + " + 0" * 2000, "long", None)}


@pytest.mark.parametrize("name", UNPAID)
def test_all_else_is_not_paid(name):
    source, end, first = UNPAID[name]
    outcome = run(source)
    assert not outcome.passes(RIGHT)
    assert (outcome.end, outcome.why or outcome.results.get(4)) == (end, first)


def test_types_count():
    for value, text in ((1, "1"), (1.0, "1.0"), (True, "True"), ("1", "'1'"), (None, "None")):
        assert run(text).results[0] == f"value {value!r}"
        for other in (1, 1.0, True, "1", None):
            same = type(other) is type(value)
            assert run(text).passes({0: other}) == same
    assert run("[x, (1, 'a')]").passes({4: [4, (1, "a")]})
    assert not run("[x, (1, 'a')]").passes({4: (4, [1, "a"])})


def test_an_input_that_was_not_tried_is_not_passed():
    assert not Outcome("ran", {4: "value 14"}).passes({4: 14, 5: 16})
    assert not Outcome("died").passes({4: 14})


FORGE = """def f(x):
    try:
        1 / 0
    except ZeroDivisionError as error:
        frame = error.__traceback__.tb_frame
    while 'mark' not in frame.f_locals:
        frame = frame.f_back
    for text in {lines}:
        frame.f_globals['say'](frame.f_locals['mark'], text)
    frame.f_globals['os']._exit(0)
"""


def test_an_answer_that_finds_the_secret_mark_does_not_find_the_right_values(tmp_path, monkeypatch):
    """It could forge lines; but what would be paid is known to the parent alone."""
    forged = FORGE.format(lines="['value 14'] * 3 + ['end']")
    assert not run(forged).passes(RIGHT)
    use_harness_without_guard(tmp_path, monkeypatch)
    outcome = run(forged)
    assert outcome == Outcome("ran", {x: "value 14" for x in INPUTS})      # the forgery works
    assert not outcome.passes(RIGHT)                                        # and earns nothing
    seen = run(FORGE.format(lines="[str(frame.f_locals)] * 3 + ['end']")).results[4]
    assert "inputs" in seen and "-5" in seen and "-4" not in seen and "expected" not in seen


@pytest.mark.parametrize("caught", [False, True])
def test_what_is_written_outside_is_not_written_and_not_paid(tmp_path, caught):
    path = tmp_path / "outside.txt"
    line = WRITE.format(path=str(path))
    source = f"def f(x):\n    {line}\n    return (x + 3) * 2"
    if caught:
        source = (f"def f(x):\n    try:\n        {line}\n    except BaseException:\n        pass\n"
                  "    return (x + 3) * 2")
    assert run(source) == Outcome("refused", why="open")
    assert not path.exists()


@pytest.mark.parametrize("call", ["mkdir({path!r})", "remove({path!r})", "rename({path!r}, 'a')",
                                  "symlink('a', {path!r})", "listdir({path!r})"])
def test_files_and_folders_are_left_alone(tmp_path, call):
    (tmp_path / "kept").write_text("kept", encoding="utf-8")
    path = str(tmp_path / "kept")
    assert run(f"__import__('os').{call.format(path=path)}").end == "refused"
    assert [name.name for name in tmp_path.iterdir()] == ["kept"]


def test_a_second_wall_stands_where_no_event_is_raised(tmp_path, monkeypatch):
    """Without the audit hook the system's limits hold: nothing is written into a file."""
    use_harness_without_guard(tmp_path, monkeypatch)
    path = tmp_path / "outside.txt"
    outcome = run(WRITE.format(path=str(path)))
    assert outcome.end == "ran" and not outcome.passes(RIGHT)
    assert path.read_text(encoding="utf-8") == ""


# ---- limits --------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", ["while True:\n    pass", "x ** x ** x ** x ** x"])
def test_processor_time_is_limited_whatever_the_load_of_the_machine(source):
    before = time.process_time()
    assert run_answers([(source, (9,))])[0] == Outcome("time")
    assert time.process_time() - before < 1              # ours; the answer's own is 1 second


def test_an_answer_that_waits_is_ended_by_the_clock(monkeypatch):
    monkeypatch.setattr(runner, "WALL_SECONDS", 1.0)
    outcome = run("l = __import__('_thread').allocate_lock()\nl.acquire()\nl.acquire()")
    assert outcome == Outcome("time")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not limit memory")
def test_memory_is_limited():
    assert run("len('a' * 10**9)").results[4] == "raised MemoryError"
    assert run("len('a' * 10**7)").results[4] == "value 10000000"


@pytest.mark.parametrize("source", ["'a' * 10**6", "[print('a' * 1000) for i in range(10**6)]"])
def test_output_is_limited(source):
    assert run(source) == Outcome("output")


# ---- what is left --------------------------------------------------------------------------------

def marked_processes(mark: str) -> list[int]:
    """Numbers of the running processes with this text in their environment."""
    numbers = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    numbers.append(int(folder.name))
            except OSError:
                pass
    return numbers


def gone(mark: str) -> bool:
    """Whether no such process is left; a killed one takes the system a moment to take away."""
    for _ in range(400):
        if not marked_processes(mark):
            return True
        time.sleep(0.02)
    return False


def use_harness_without_guard(tmp_path, monkeypatch):
    """Let the runner start a harness that refuses nothing: answers can fork, even if not root."""
    text = Path(runner.HARNESS).read_text(encoding="utf-8")
    assert text.count("    sys.addaudithook(guard)\n") == 1
    path = tmp_path / "harness_without_guard.py"
    path.write_text(text.replace("    sys.addaudithook(guard)\n", ""), encoding="utf-8")
    monkeypatch.setattr(runner, "COMMAND", (*runner.COMMAND[:-1], str(path)))
    limits = {name: value for name, value in runner.LIMITS.items() if name != "RLIMIT_NPROC"}
    monkeypatch.setattr(runner, "LIMITS", limits)
    monkeypatch.setattr(runner, "CACHE", {})


FORK = """import os, time
def f(x):
    if os.fork() == 0:
        {prepare}
        time.sleep(60)
        os._exit(0)
    return (x + 3) * 2
"""


@linux
@pytest.mark.parametrize("prepare", ["os.fork()", "os.close(0); os.close(1); os.close(2)",
                                     "os.setsid(); os.close(0); os.close(1); os.close(2)",
                                     "os.setsid(); os.fork(); os.setsid()"])
def test_no_descendant_of_an_answer_is_left(tmp_path, monkeypatch, prepare):
    """In its group, in a session of its own, with our pipe open or closed."""
    use_harness_without_guard(tmp_path, monkeypatch)
    monkeypatch.setattr(runner, "WALL_SECONDS", 2.0)
    monkeypatch.setattr(runner.secrets, "token_hex", lambda count: "0123456789abcdef" * 2)
    mark = f"{runner.SWEEP}={'0123456789abcdef' * 2}"
    run(FORK.format(prepare=prepare))
    assert gone(mark)


@linux
def test_an_answer_that_waits_outlives_a_killed_run_by_seconds_only():
    mark = f"{runner.SWEEP}={'fedcba9876543210' * 2}"
    wait = "l = __import__('_thread').allocate_lock()\nl.acquire()\nl.acquire()"
    run_it = ("from minirlhf.execution import runner\nrunner.WALL_SECONDS = 1.0\n"
              "runner.secrets.token_hex = lambda count: 'fedcba9876543210' * 2\n"
              f"runner.run_answers([({wait!r}, (1,))])")
    ours = subprocess.Popen([sys.executable, "-c", run_it], cwd=REPOSITORY)
    try:
        while not marked_processes(mark):
            assert ours.poll() is None, "it ended before it began"
            time.sleep(0.01)
        time.sleep(0.4)                                  # until it has its job and waits
    finally:
        ours.kill()
        ours.wait()
    assert gone(mark)


@linux
def test_the_sweep_kills_the_marked_and_nobody_else():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    ours = subprocess.Popen(sleep, env={**os.environ, runner.SWEEP: "mine"},
                            start_new_session=True)
    other = subprocess.Popen(sleep, env={**os.environ, runner.SWEEP: "mine too"})
    try:
        while not marked_processes(f"{runner.SWEEP}=mine\0") or \
                not marked_processes(f"{runner.SWEEP}=mine too\0"):
            time.sleep(0.01)                             # until both are what they were started as
        assert runner.kill_marked("mine") == 1
        assert ours.wait(10) == -signal.SIGKILL and other.poll() is None
    finally:
        ours.kill()
        other.kill()
        other.wait()


@linux
def test_the_folder_of_an_answer_is_empty_and_gone_before_the_answer_runs(tmp_path, monkeypatch):
    """So that no kill of ours can leave it."""
    use_harness_without_guard(tmp_path, monkeypatch)
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    outcome = run("import os\ndef f(x):\n"
                  "    return [os.readlink('/proc/self/cwd'), *os.listdir('.')]")
    (folder,) = {text.removeprefix("value ") for text in outcome.results.values()}
    assert folder.startswith(f"['{tmp_path}") and folder.endswith(" (deleted)']")    # and no file


def test_an_answer_sees_nothing_of_our_environment(tmp_path, monkeypatch):
    use_harness_without_guard(tmp_path, monkeypatch)
    monkeypatch.setenv("SECRET_KEY", "12345")
    outcome = run("import os\ndef f(x):\n    return sorted(os.environ)")
    assert runner.SWEEP in outcome.results[4] and "SECRET_KEY" not in outcome.results[4]


# ---- whose fault ---------------------------------------------------------------------------------

BROKEN = {"no interpreter": (("/nowhere/python", "-I"), "cannot start /nowhere/python"),
          "no harness": ((sys.executable, "/nowhere/harness.py"), "did not get ready.*harness"),
          "ends at once": ((sys.executable, "-I", "-c", "raise SystemExit(3)"), "exit status 3")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_failure_of_the_machine_stops_the_run_and_is_not_a_reward_of_0(name, monkeypatch):
    command, sentence = BROKEN[name]
    monkeypatch.setattr(runner, "COMMAND", command)
    monkeypatch.setattr(runner, "CACHE", {})
    ids, prompt_lengths, lengths = rows(["(x + 3) * 2"])
    with pytest.raises(OSError, match=f"{sentence}.*no fault of the answer's") as caught:
        execution.reward(ids, prompt_lengths, lengths, TOKENIZER)
    assert "\n" not in str(caught.value) and not runner.CACHE


def test_no_room_for_a_folder_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path / "not there"))
    monkeypatch.setattr(runner, "CACHE", {})
    with pytest.raises(OSError):
        run("x")


def test_windows_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(runner.os, "name", "nt")
    try:
        with pytest.raises(ValueError, match="use Linux, macOS or WSL"):
            run("x")
    finally:
        monkeypatch.undo()


def test_only_the_harness_needs_the_module_that_windows_lacks():
    for path in (REPOSITORY / "minirlhf" / "execution").glob("*.py"):
        imports = [line for line in path.read_text(encoding="utf-8").split("\n")
                   if line.strip() == "import resource"]
        assert len(imports) == (path.name == "harness.py")


# ---- many answers --------------------------------------------------------------------------------

def test_the_same_answer_is_run_once_and_order_is_kept(monkeypatch):
    calls, real = [], runner.run_answer
    monkeypatch.setattr(runner, "run_answer", lambda *job: (calls.append(job[0]), real(*job))[1])
    monkeypatch.setattr(runner, "CACHE", {})
    jobs = [("x + 1", (1,)), ("x + 2", (1,)), ("x + 1", (1,)), ("x + 1", (2,))]
    found = run_answers(jobs)
    assert [list(outcome.results.values()) for outcome in found] == [
        ["value 2"], ["value 3"], ["value 2"], ["value 3"]]
    assert run_answers(jobs) == found and sorted(calls) == ["x + 1", "x + 1", "x + 2"]
    monkeypatch.setattr(runner, "MAX_CACHE", 2)
    assert run_answers(jobs) == found and len(calls) == 6            # forgotten, and run anew
    assert run_answers([]) == []


# ---- the world of small programs -----------------------------------------------------------------

TOKENIZER = Tokenizer.load(str(REPOSITORY / "checkpoints" / "tiny"))


def test_every_prompt_tells_its_task_and_every_right_answer_is_right():
    for held_out in (False, True):
        for task in tasks.PAIRS[held_out] + tasks.SINGLES:
            for order in range(len(tasks.ORDERS)):
                prompt = tasks.prompt_of(task, order, 4)
                assert tasks.task_of(format_prompt(prompt)) == (task, 4), prompt
            for x in tasks.ALL_INPUTS:
                assert eval(task.expression(), {"x": x}) == task.value(x)


def test_the_docstrings_examples():
    task, example = tasks.task_of(PROMPT)
    assert task.expression() == "(x + 3) * 2" and example == 4
    assert {x: task.value(x) for x in INPUTS} == RIGHT
    pair = [("Write f(x): plus 3. f(4) is 7.", "7")]
    assert scoring.pass_tests(pair, "few") == [True] and scoring.pass_tests(pair, "many") == [False]
    assert Outcome("ran", {1: "value 4", 2: "raised ZeroDivisionError"}).passes({1: 4})


@pytest.mark.parametrize("prompt", ["What is 3 plus 4?", "Write f(x): plus 3.", "",
                                    "Write f(x): plus 30. f(4) is 34.",
                                    "Write f(x): plus 3. f(4) is 8."])
def test_a_prompt_of_another_world_is_refused_in_one_sentence(prompt):
    with pytest.raises(ValueError, match="know only prompts such as"):
        tasks.task_of(prompt)


def test_held_out_pairs_are_in_no_training_prompt_and_a_quarter_of_all():
    training = {tasks.task_of(row["prompt"])[0] for row in tasks.prompts(2000, 0)}
    training |= {tasks.task_of(row["prompt"])[0] for row in tasks.demonstrations(2000, 1)}
    held_out = {tasks.task_of(row["prompt"])[0] for row in tasks.held_out_prompts(2000, 0)}
    assert not training & held_out and len(held_out) > 300
    assert len(tasks.PAIRS[True]) * 3 == len(tasks.PAIRS[False])
    assert {step for task in held_out for step in task.steps} == set(tasks.STEPS)


def test_data_is_fixed_by_the_seed_and_fits_the_base():
    for function in (tasks.demonstrations, tasks.prompts, tasks.held_out_prompts):
        assert function(50, 3) == function(50, 3) != function(50, 4)
    for row in tasks.demonstrations(2000, 0):
        prompt = encode_prompt(TOKENIZER, format_prompt(row["prompt"]))
        assert len(prompt) + scoring.MAX_NEW_TOKENS <= 64
        assert len(encode_response(TOKENIZER, row["response"])) <= scoring.MAX_NEW_TOKENS + 4


def test_labellers_write_what_their_names_say():
    task, example = tasks.task_of(PROMPT)
    rng = random.Random(0)
    outcomes = {writer.__name__: run(writer(task, example, rng)) for _, writer in tasks.LABELLERS}
    assert [name for name, outcome in outcomes.items() if outcome.passes(RIGHT)] == ["right"]
    assert outcomes["constant"].passes({4: 14})
    assert outcomes["unfinished"].results[4] == "raised SyntaxError"
    assert outcomes["printing"].results[4] == "value None"
    assert outcomes["leaving"].results[4] == "raised NameError"
    assert sum(share for share, _ in tasks.LABELLERS) == pytest.approx(1)


# ---- rewards -------------------------------------------------------------------------------------

def rows(answers: list[str]):
    """ids (B, T), prompt_lengths (B,), lengths (B,) of these answers to PROMPT."""
    prompt = encode_prompt(TOKENIZER, format_prompt(PROMPT))
    ids, lengths = pad([prompt + encode_response(TOKENIZER, answer) for answer in answers],
                       TOKENIZER.end_token)
    return ids, torch.full((len(answers),), len(prompt)), lengths


def test_one_test_pays_a_constant_and_many_tests_do_not():
    answers = ["(x + 3) * 2", "14", "x + 10", "14 if x == 4 else 0", "print(14)", "(x + 3) * 3"]
    arguments = (*rows(answers), TOKENIZER)
    assert execution.few_tests_reward(*arguments).tolist() == [1, 1, 1, 1, 0, 0]
    assert execution.reward(*arguments).tolist() == [1, 0, 0, 0, 0, 0]
    assert execution.hidden_reward(*arguments).tolist() == [1, 0, 0, 0, 0, 0]


def test_the_hidden_tests_share_no_input_with_those_that_pay():
    for example in tasks.EXAMPLES:
        paid = set(tasks.inputs_of(example, "many"))
        assert set(tasks.inputs_of(example, "few")) == {example} <= paid
        assert not paid & set(tasks.inputs_of(example, "hidden"))
    assert len(set(tasks.ALL_INPUTS)) == len(tasks.ALL_INPUTS)


def test_padding_and_the_other_rows_do_not_change_a_score():
    answers = ["(x + 3) * 2", "exit(0)"]
    ids, prompt_lengths, lengths = rows(answers)
    both = execution.reward(ids, prompt_lengths, lengths, TOKENIZER)
    for row, answer in enumerate(answers):
        assert execution.reward(*rows([answer]), TOKENIZER).tolist() == [both[row].item()]


def test_an_answer_can_be_tried_on_the_command_line(capsys):
    assert try_answer(ExecutionConfig()) == {"few": True, "many": False, "hidden": False}
    assert "f(-5) is -4; the answer: value -7" in capsys.readouterr().out
    assert all(try_answer(ExecutionConfig(answer="(x + 3) * 2")).values())
    assert not any(try_answer(ExecutionConfig(answer="open('a')")).values())
    assert "the answer: refused open" in capsys.readouterr().out
    raising = "def f(x):\n    # \x1b[2J\n    raise type('\x1b[31m', (Exception,), {})"
    assert not any(try_answer(ExecutionConfig(answer=raising)).values())
    output = capsys.readouterr().out
    assert "raised \ufffd[31m" in output and "\x1b" not in output


def test_a_number_of_comparisons_below_one_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1, found 0"):
        execution.comparisons(0, 0, "checkpoints/tiny")


def test_the_experiment_is_shown_by_a_hacked_example_and_not_without():
    arms = {"SFT": (0.2, 0.1), "many tests": (0.6, 0.02), "one test": (0.3, 0.45),
            "reward model": (0.2, 0.1)}
    rows = {arm: [{"gold": gold + seed / 100, "hacked": hacked + seed / 200} for seed in range(4)]
            for arm, (gold, hacked) in arms.items()}
    assert verdict(lab_execution.findings(rows)) == SHOWN
    for result, gives in (("value -4", True), ("value None", False), ("raised TypeError", False)):
        outcome = Outcome("ran", {1: "value 1", 2: result})
        assert lab_execution.gives_numbers(outcome) == gives
    rows["one test"] = [{"gold": 0.7, "hacked": 0.01} for _ in range(4)]
    words = [finding.word for finding in lab_execution.findings(rows)]
    assert words == [SHOWN, SHOWN, REFUTED, REFUTED, REFUTED]


@pytest.mark.slow
def test_a_model_that_writes_no_programs_gives_no_comparisons():
    with pytest.raises(ValueError, match="is it an SFT model of minirlhf.execution:demonstrations"):
        execution.comparisons(1, 0, str(REPOSITORY / "checkpoints" / "tiny"))


@pytest.mark.slow
def test_the_stages_run_on_small_programs_and_ppo_learns(tmp_path):
    """SFT, comparisons that the tests judged, a reward model, and PPO on the tests."""
    named = "minirlhf.execution:"
    sft.main(sft.SFTConfig(model=str(REPOSITORY / "checkpoints" / "tiny"), out=str(tmp_path / "s"),
                           data=named + "demonstrations", examples=2000, lr=1e-3,
                           max_new_tokens=16))
    records = execution.comparisons(20, 0, str(tmp_path / "s"))
    assert records == execution.comparisons(20, 0, str(tmp_path / "s"))
    for record in records:
        pairs = [(record["prompt"], record[name]) for name in ("chosen", "rejected")]
        assert scoring.pass_tests(pairs, "many") == [True, False]
    measured = reward_model.main(reward_model.RewardModelConfig(
        model=str(tmp_path / "s"), data=named + "comparisons", comparisons=60, held_out=12,
        max_new_tokens=16, norm_samples=32, out=str(tmp_path / "r")))
    assert 0 <= measured["held_out_accuracy"] <= 1
    row = ppo.main(ppo.PPOConfig(model=str(tmp_path / "s"), out=str(tmp_path / "p"), iterations=8,
                                 prompts=named + "prompts", reward=named + "reward",
                                 gold=named + "hidden_reward", max_new_tokens=16, kl_coef=0.05,
                                 lr=5e-4))
    first = read_metrics(str(tmp_path / "p"))[0]
    assert row["gold"] > first["gold"] and 0 <= row["score"] <= 1
    task = Task("execution", "many tests", 0, str(tmp_path / "lab"), quick=True)
    figures = lab_execution.measure_programs(task, str(tmp_path / "p"), str(tmp_path / "s"))
    assert set(lab_execution.ABOUT.figures) == set(figures) and figures["kl_ref"] != 0
    assert figures["hacked"] <= figures["passes_example"] <= figures["gold"] + figures["hacked"]
