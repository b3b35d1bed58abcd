"""The exercises: stubs fail, solutions pass, each known mistake gets its own words."""

import json
import math
import random
import re
import subprocess
import sys

import pytest
from helpers import REPOSITORY, environment, sft_folder

from minirlhf.exercises import bugs, checking, record
from minirlhf.exercises.__main__ import EXERCISES, ExercisesConfig, find, main
from minirlhf.exercises.checking import check_file, expected, judge, observe
from minirlhf.exercises.exercise import Code, Question, imports_for, source_parts, stub
from minirlhf.museum import effect
from minirlhf.museum.exhibits import EXHIBITS

CODES = [exercise for exercise in EXERCISES if isinstance(exercise, Code)]
QUESTIONS = [exercise for exercise in EXERCISES if isinstance(exercise, Question)]
NUMBERS = [question for question in QUESTIONS if not question.choices]
every_code = pytest.mark.parametrize("exercise", CODES, ids=lambda exercise: exercise.name)
every_number = pytest.mark.parametrize("question", NUMBERS, ids=lambda question: question.name)


def trials_of(exercise: Code) -> list[tuple]:
    cases = range(checking.CASES)
    return [exercise.example, *[exercise.case(random.Random(seed)) for seed in cases]]


def unfolded(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def check_text(tmp_path, exercise: Code, text: str, **options) -> tuple[bool, str]:
    """The verdict on a student's file with this text."""
    path = tmp_path / f"{exercise.name}.py"
    path.write_text(text, encoding="utf-8")
    right, verdict = check_file(exercise, str(path), **options)
    return right, unfolded(verdict)


# ---- the collection ------------------------------------------------------------------------------

def test_there_is_enough_of_everything_and_every_lecture_has_a_question():
    assert len({exercise.name for exercise in EXERCISES}) == len(EXERCISES) >= 24
    assert {question.lecture for question in NUMBERS} == set(range(10))
    assert len([question for question in QUESTIONS if question.choices]) == 6
    for exercise in EXERCISES:
        assert 5 <= exercise.minutes <= 30 and exercise.difficulty in ("easy", "medium", "hard")
        assert exercise.task and exercise.hint and len(exercise.why) > 40, exercise.name


def test_the_list_has_one_line_for_each(capsys):
    assert main(ExercisesConfig())
    lines = capsys.readouterr().out.splitlines()
    for exercise in [*EXERCISES, None]:
        name = exercise.name if exercise else "evening"
        assert len([line for line in lines if re.search(rf"  {name} ", line)]) == 1, name


def test_the_task_of_the_last_evening_has_a_checklist_of_commands_that_exist(capsys):
    main(ExercisesConfig(name="evening"))
    text = capsys.readouterr().out
    assert text.count("[ ]") >= 15
    for module in re.findall(r"python -m (minirlhf[.\w]*)", text):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


# ---- functions to write --------------------------------------------------------------------------

@every_code
def test_a_stub_fails_its_check_and_says_that_it_is_not_written(tmp_path, exercise):
    right, text = check_text(tmp_path, exercise, stub(exercise))
    assert not right and "not written yet" in text


@every_code
def test_a_stub_has_all_of_the_solution_but_its_body(exercise):
    head, body = source_parts(exercise.solution)
    assert head in stub(exercise) and "Example" in head and body.strip() not in stub(exercise)


@every_code
def test_a_solution_passes_its_check(tmp_path, exercise):
    source = "\n".join(source_parts(exercise.solution))
    right, text = check_text(tmp_path, exercise,
                             f"{imports_for(exercise.solution)}\n\n\n{source}\n")
    assert right, text


@every_code
def test_the_example_gives_what_the_docstring_says(exercise):
    example = observe(exercise.solution, exercise.example)
    form, numbers = checking.numbers_of(exercise.result)
    assert example.form == form and example.numbers == pytest.approx(numbers, abs=5e-5)
    said = [float(x) for x in re.findall(r"-?\d*\.?\d+", exercise.solution.__doc__)]
    for number in numbers:
        assert any(math.isclose(number, other, abs_tol=5e-5) for other in said), number


MISTAKES = [(exercise, wrong, words) for exercise in CODES for wrong, words in exercise.mistakes]


@pytest.mark.parametrize("exercise, wrong, words", MISTAKES,
                         ids=[f"{x.name}-{wrong.__name__}" for x, wrong, _ in MISTAKES])
def test_a_known_mistake_gets_its_own_words(exercise, wrong, words):
    trials = trials_of(exercise)
    found = [observe(wrong, arguments, exercise.gradient_of) for arguments in trials]
    right, text = judge(exercise, trials, found)
    assert not right and words in unfolded(text)
    assert [other for _, other in exercise.mistakes].count(words) == 1


# the exercise, a student's lines (not those of the wrong twin in the package), the words
ATTEMPTS = [
    ("shaped_rewards", """
    out = [[-kl_coef * k * m for k, m in zip(*rows)]
           for rows in zip(kl_ref.tolist(), mask.tolist())]
    for row, marks, score in zip(out, mask.tolist(), scores.tolist()):
        row[min(len(row) - marks[::-1].index(True), len(row) - 1)] += score
    return torch.tensor(out)""", None),
    ("shaped_rewards", """
    rewards = -kl_coef * kl_ref * mask
    for b in range(len(mask)):
        last = int(mask[b].nonzero().max()) + 1
        if last < mask.shape[1]:
            rewards[b, last] += scores[b]
    return rewards""", "The score is one column late"),
    ("shaped_rewards", """
    rewards = kl_coef * kl_ref * mask
    for b in range(len(mask)):
        rewards[b, mask[b].nonzero().max()] += scores[b]
    return rewards""", "leaving the reference is paid for"),
    ("gae", """
    advantages = torch.zeros_like(rewards)
    after = 0.0
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = values[:, t + 1] * mask[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantages[:, t] = after = (delta + gamma * lam * after) * mask[:, t]
    kept = advantages[mask]
    advantages = (advantages - kept.mean()) / (kept.var(unbiased=False) + 1e-8) ** 0.5 * mask
    return advantages, advantages + values * mask""", "You whiten before the returns are taken"),
    ("whiten", """
    kept = x[mask]
    return ((x - kept.mean()) / kept.std(unbiased=False) + kept.mean()) * mask""",
     "The mean is added back"),
    ("policy_loss", """
    ratio = ((old_logprobs - logprobs) * mask).exp()
    loss = torch.max(-ratio * advantages, -torch.clip(ratio, 0.8, 1.2) * advantages)
    return loss[mask].mean(), ratio""", "The ratio is old over new"),
    ("value_loss", """
    values = values.detach()
    near = torch.min(torch.max(values, old_values - 0.2), old_values + 0.2)
    loss = torch.max((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * loss[mask].mean()""", "a dead critic"),
    ("sft_loss", "    return -(logprobs.sum() / logprobs.numel())", "the mask is not used"),
    ("response_mask", """
    rows = []
    for prompt, length in zip(prompt_lengths.tolist(), lengths.tolist()):
        rows.append([prompt <= t < length for t in range(width - 1)])
    return torch.tensor(rows)""", "Your mask is one column late"),
    ("token_logprobs", """
    table = torch.softmax(logits, dim=-1).log()
    return torch.stack([table[b, torch.arange(ids.shape[1] - 1), ids[b, 1:]]
                        for b in range(len(ids))])""", "The temperature is not used"),
    ("bradley_terry_loss", """
    odds = (rejected_scores - chosen_scores).exp()
    return -(1 / (1 + odds)).log().mean()""", "the sigmoid of -2000 rounds to 0"),
    ("k3", "    return (old_logprobs - logprobs).exp() - 1 + logprobs - old_logprobs",
     "The ratio is upside down"),
    ("grpo_advantages", """
    return torch.stack([(row - row.mean()) / row.std() for row in rewards])""",
     "0 / 0 is nan"),
    ("rloo_advantages", "    return rewards - rewards.sum(1, True) / rewards.shape[1]",
     "Your baseline contains the response itself"),
    ("entropy", "    return -logprobs.sum(1) / logprobs.shape[1]",
     "minus the mean log-probability"),
    ("gelu", "    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))", "This is the exact GELU"),
    ("score_of_rows", "    return numbers[torch.arange(len(numbers)), -1]", "the last column"),
]


@pytest.mark.parametrize("name, lines, words", ATTEMPTS,
                         ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(ATTEMPTS)])
def test_a_mistake_is_recognised_however_it_is_written(tmp_path, name, lines, words):
    exercise = find(name)
    head = source_parts(exercise.solution)[0]
    right, text = check_text(tmp_path, exercise, f"import math\nimport torch\n\n{head}\n{lines}\n")
    assert not right
    if words is None:                                    # wrong in a way that nobody foresaw
        assert "not right yet. In " in text and "expected" in text and "found" in text
    else:
        assert words in text, text


ELSEWHERE = {       # exhibits that are no mistake in a single function of the exercises
    "last_metrics", "padded_metrics", "late_clip", "unclipped_critic", "encoded_prompt",
    "all_ended", "dropout", "sampled_top_k"}
OF_ANOTHER_FORM = {     # those that the exercise has in a form of its own
    "temperature": ("token_logprobs", "temperature is not used"),
    "pad_mask": ("response_mask", "end token that the policy chose"),
    "unused_mask": ("sft_loss", "the mask is not used"), "exact_gelu": ("gelu", "exact GELU"),
    "padded_score": ("score_of_rows", "the mean of the row"),
    "surprise": ("entropy", "minus the mean log-probability"),
    "group_of_equals": ("grpo_advantages", "0 / 0 is nan")}


def test_every_mistake_of_the_museum_that_fits_an_exercise_is_known_there():
    twins = {wrong for exercise in CODES for wrong, _ in exercise.mistakes}
    for exhibit in EXHIBITS:
        if exhibit.name in OF_ANOTHER_FORM:
            name, words = OF_ANOTHER_FORM[exhibit.name]
            assert any(words in text for _, text in find(name).mistakes), exhibit.name
        else:
            assert (exhibit.wrong in twins) or exhibit.name in ELSEWHERE, exhibit.name


def test_a_loss_needs_the_gradient_that_finite_differences_give(tmp_path):
    exercise = find("sft_loss")
    head = source_parts(exercise.solution)[0]
    for line, words in (("-(logprobs * mask).sum().item() / token_count", "carries no gradient"),
                        ("-(logprobs * mask).sum() / token_count - (logprobs - logprobs.detach())"
                         ".sum()", "its gradient is not")):
        right, text = check_text(tmp_path, exercise, f"import torch\n{head}\n    return {line}\n")
        assert not right and words in text
    arguments = exercise.case(random.Random(0))
    slopes = expected(exercise, arguments).gradient
    mask, count = arguments[1].flatten().tolist(), arguments[2]
    assert slopes == pytest.approx([-marked / count for marked in mask], abs=1e-6)


def test_an_attempt_may_change_its_arguments(tmp_path):
    text = ("from torch.nn import functional\ndef gelu(x):\n"
            "    y = functional.gelu(x, approximate='tanh')\n    x.zero_()\n    return y\n")
    assert check_text(tmp_path, find("gelu"), text)[0]


# ---- what a student's file may do ----------------------------------------------------------------

@pytest.mark.parametrize("text, words", [
    ("def gelu(x)\n    return x\n", r"gelu.py, line 1: not Python"),
    ("import nothing_of_that_name\n", r"gelu.py, line 1: ModuleNotFoundError: No module named"),
    ("x = 1\n", "has no function gelu"),
    ("gelu = 3\n", "has no function gelu"),
    ("def gelu():\n    return 1\n", r"gelu.py: TypeError: gelu\(\) takes 0 positional"),
    ("def gelu(x):\n    y = 1\n    return x + z\n", r"gelu.py, line 3: NameError: name 'z'"),
    ("def gelu(x):\n    return x.reshape(999)\n", r"gelu.py, line 2: RuntimeError: shape"),
    ("def gelu(x):\n    raise SystemExit\n", "ends the program"),
    ("import sys\nsys.exit(0)\n", "ends the program"),
    ("def gelu(x):\n    raise ValueError('mine')\n", r"gelu.py, line 2: ValueError: mine"),
    ("def gelu(x):\n    while True:\n        pass\n",
     r"gelu.py did not end within 1 seconds \(it was at line [23]\)"),
    ("while True:\n    x = 1\n", r"did not end within 1 seconds \(it was at line [12]\)")])
def test_what_goes_wrong_in_a_file_is_said_in_one_sentence(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        check_text(tmp_path, find("gelu"), text, seconds=1.0)


def test_a_file_that_is_no_text_is_named_and_the_mark_of_an_editor_is_no_error(tmp_path):
    path, name = tmp_path / "gelu.py", "names 1, a\ufffd with"
    for data in (b"x = 'caf\xe9'\n", b"x = '\0'\n"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="gelu.py: not Python"):
            checking.check_file(find("gelu"), str(path))
    path.write_text("def gelu(x):\n    return {1: x, 'a\\x1b': x}\n", encoding="utf-8-sig")
    right, text = checking.check_file(find("gelu"), str(path))
    assert not right and name in text


def test_after_an_endless_loop_ctrl_c_is_what_it_was(tmp_path):
    import signal
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="a loop that does not end"):
        check_text(tmp_path, find("gelu"), "while True:\n    x = 1\n", seconds=0.3)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("lines, found", [
    ("None", "NoneType"), ("x.tolist()", None), ("x[:2]", r"shape \(2,\)"), ("'text'", "str"),
    ("{'a': x}", "names a with"), ("(x, x)", r"\(shape"), ("x * float('nan')", "nan")])
def test_results_of_any_kind_are_described(tmp_path, lines, found):
    right, text = check_text(tmp_path, find("gelu"), f"def gelu(x):\n    return {lines}\n")
    assert not right and "expected" in text
    if found:
        assert re.search(f"found .*{found}", text), text


def test_numpy_and_lists_are_results_like_tensors(tmp_path):
    for line in ("numpy.array([0, 0.841192, -0.158808])", "[0, 0.841192, -0.158808]"):
        form, numbers = checking.numbers_of(eval(line, {"numpy": __import__("numpy")}))
        assert form == "shape (3,)" and numbers == pytest.approx([0, 0.841192, -0.158808])


# ---- questions -----------------------------------------------------------------------------------

@every_number
def test_the_right_number_is_explained_and_the_explanation_names_it(question):
    right = question.answer()
    good, text = checking.check_answer(question, f"{right:.10g}")
    assert good and question.why in unfolded(text)
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", question.why)]
    assert any(math.isclose(number, abs(right), rel_tol=max(question.tolerance, 1e-9))
               for number in numbers)


@every_number
def test_a_wrong_number_gets_its_own_words_or_a_hint(question):
    right = question.answer()
    for wrong, words in question.slips:
        assert not math.isclose(wrong, right, rel_tol=question.tolerance)
        good, text = checking.check_answer(question, str(wrong))
        assert not good and words in unfolded(text)
    assert "--hint" in checking.check_answer(question, str(right + 17))[1]


@pytest.mark.parametrize("answer, words", [("", "--answer NUMBER"), ("a lot", "expected a number")])
def test_an_answer_that_is_no_number_is_refused(answer, words):
    with pytest.raises(ValueError, match=words):
        checking.check_answer(find("paper_gae"), answer)


# ---- bugs ----------------------------------------------------------------------------------------

def column(run: dict, name: str) -> list[float]:
    """A column of a stored token table, without the line of sums."""
    lines = run["table"].split("\n")
    place = len(lines[1]) - len(lines[1].split(name)[0]) - len(name)
    end = len(lines[1]) - place
    return [float(line[:end].split()[-1]) for line in lines[2:-1]]


def test_the_stored_runs_show_what_the_explanations_say():
    runs = bugs.read_json(bugs.PATH)
    assert list(runs) == ["healthy", *[name for name, *_ in bugs.BUGS]]
    first = {name: run["curves"] for name, run in runs.items()}
    assert first["old_minus_new"]["score"][-1] < first["old_minus_new"]["score"][0] - 0.5
    assert first["healthy"]["score"][-1] > first["healthy"]["score"][0] + 0.5
    assert first["negated_kl"]["kl_ref"][-1] > 3 * first["healthy"]["kl_ref"][-1]
    for kl_ref, reward in zip(column(runs["negated_kl"], "kl_ref")[:-1],
                              column(runs["negated_kl"], "rewards")[:-1]):
        assert reward == pytest.approx(0.2 * kl_ref, abs=2e-3)
    late = column(runs["late_score"], "rewards")
    assert max(map(abs, late)) < 0.05 and first["late_score"]["explained_var"][-1] > 0.9
    assert first["dropout"]["ratio_first"][-1] > 0.1 > first["healthy"]["ratio_first"][-1]
    assert column(runs["immediate_return"], "returns") == pytest.approx(
        column(runs["immediate_return"], "rewards"), abs=2e-3)
    assert set(column(runs["dead_critic"], "old_values")) == {0.0}
    assert max(map(abs, first["dead_critic"]["explained_var"])) < 0.05


def test_a_bug_is_asked_answered_and_explained(capsys):
    assert main(ExercisesConfig(name="bug_1"))
    text = capsys.readouterr().out
    assert "A healthy run, and below" in text and "old_values" in text and "double_kl" in text
    assert not main(ExercisesConfig(check="bug_1", answer="dropout"))
    assert main(ExercisesConfig(check="bug_1", answer="old_minus_new"))
    assert "upside down" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected one of all_ended, dead_critic"):
        main(ExercisesConfig(check="bug_1", answer="hunger"))
    with pytest.raises(ValueError, match="--answer WORD"):
        main(ExercisesConfig(check="bug_1"))


def test_recording_runs_the_healthy_run_and_the_bugs(monkeypatch, tmp_path):
    toy = {"model": sft_folder(), "reward": "helpers:share_of_red", "critic_lr": 5e-3,
           "prompts": "helpers:toy_prompts", "prompt_count": 100, "gold": "helpers:share_of_red",
           "iterations": 2, "batch_size": 8, "minibatch_size": 4, "max_new_tokens": 5}
    monkeypatch.setitem(effect.OPTIONS, "ppo", toy)
    monkeypatch.setattr(record, "BUGS", (("dead_critic",),))
    for name in ("sft", "reward_model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    out = tmp_path / "bugs.json"
    record.main(record.RecordConfig(stages=str(tmp_path), out=str(out)))
    runs = json.loads(out.read_text())
    assert list(runs) == ["healthy", "dead_critic"]
    assert len(runs["healthy"]["curves"]["score"]) == 2
    assert runs["dead_critic"]["table"].startswith("prompt: ")
    assert set(column(runs["dead_critic"], "old_values")) == {0.0}


# ---- the command ---------------------------------------------------------------------------------

def test_a_stub_is_written_once_and_never_over_a_file(tmp_path, capsys):
    folder = tmp_path / "my work"
    assert main(ExercisesConfig(name="gae", folder=str(folder)))
    assert f"--check gae --folder '{folder}'\n" in capsys.readouterr().out
    (folder / "gae.py").write_text("my work")
    with pytest.raises(ValueError, match="is there already and is left as it is"):
        main(ExercisesConfig(name="gae", folder=str(folder)))
    assert (folder / "gae.py").read_text() == "my work"


def test_hints_and_solutions_of_all_are_printed(capsys):
    for exercise in EXERCISES:
        main(ExercisesConfig(hint=exercise.name))
        main(ExercisesConfig(solution=exercise.name))
        text = capsys.readouterr().out
        assert exercise.hint in unfolded(text) and exercise.why in unfolded(text)


@pytest.mark.parametrize("options, words", [
    ({"name": "nothing"}, "there is no exercise 'nothing'"),
    ({"name": "gae", "check": "gae"}, "expected one of"),
    ({"name": "gae", "answer": "3"}, "--answer goes with --check"),
    ({"folder": " "}, "--folder is empty"), ({"folder": __file__}, "a file; expected the name")])
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ExercisesConfig(**options)


def test_a_check_without_a_file_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="write the stub first: python -m minirlhf.exercises gae"):
        main(ExercisesConfig(check="gae", folder=str(tmp_path)))
    with pytest.raises(ValueError, match="it needs no --answer"):
        main(ExercisesConfig(check="gae", answer="1", folder=str(tmp_path)))


def test_the_command_exits_with_1_for_a_wrong_attempt_and_2_for_a_broken_one(tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "minirlhf.exercises", *words], cwd=tmp_path,
                              env=environment(), text=True, capture_output=True, timeout=100)

    assert run("gelu").returncode == 0
    done = run("--check", "gelu")
    assert done.returncode == 1 and "not written yet" in done.stdout
    (tmp_path / "exercises" / "gelu.py").write_text("def gelu(x):\n    return oops\n")
    done = run("--check", "gelu")
    assert done.returncode == 2 and "line 2: NameError" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
