"""label/: the pairs that a person sees, the session, and how far the verdicts agree."""

import dataclasses
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    REPOSITORY,
    environment,
    quietly,
    random_reward_folder,
    save_folder,
    toy_model,
    toy_tokenizer,
)

from minirlhf import reward_model
from minirlhf.data import DataConfig, encode_prompt, encode_response
from minirlhf.data import main as show_data
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import ScalarModel
from minirlhf.lab.labels import has_closer, make_person, taste
from minirlhf.label.__main__ import LabelConfig, few_labels, main, sampled_pairs
from minirlhf.label.agreement import Z, agreement, describe, gold_choice, wilson_interval
from minirlhf.label.pairs import GAP, different, disagreement, lay_out, most_uncertain_first
from minirlhf.people.verdicts import identity

FILE = "verdicts.jsonl"


def write_data(folder: Path, count: int = 12) -> str:
    """A comparisons file in which the chosen answer is "good N"."""
    path = folder / "comparisons.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {n}?", "chosen": f"good {n}",
                                        "rejected": f"bad {n}"}) + "\n" for n in range(count)))
    return str(path)


def stored(folder: Path, **options) -> LabelConfig:
    return LabelConfig(**{"data": write_data(folder), "out": str(folder / "labels"), "again": 0.25,
                          **options})


def by_text(word: str):
    """A person who chooses the answer that begins with `word`."""
    def person(question: dict, done: int, total: int) -> str:
        return "a" if question["answer_a"].startswith(word) else "b"
    return person


def rows_of(cfg: LabelConfig) -> list[dict]:
    path = Path(cfg.out, FILE)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"Prompt: {n}?\nResponse:", "answer_a": f"a {n}", "answer_b": f"b {n}",
             "ended_a": True, "ended_b": True} for n in range(count)]


# ---- which pairs ---------------------------------------------------------------------------------

def test_pairs_return_later_in_the_other_order(tmp_path):
    questions = lay_out(pairs(60), "me", 0.2, seed=3)
    places = {identity(question): place for place, question in enumerate(questions)}
    assert len(places) == len(questions) == 72
    returned = [question for question in questions if question["again"]]
    assert len(returned) == 12
    gaps = set()
    for question in returned:
        before = places[identity({**question, "again": False})]
        gaps.add(places[identity(question)] - before)
        assert {questions[before]["first"], question["first"]} == {"a", "b"}
    assert min(gaps) >= GAP and {gap % 2 for gap in gaps} == {0, 1}      # no rhythm
    first = [question["first"] for question in questions if not question["again"]]
    assert 15 < first.count("a") < 45
    assert questions == lay_out(pairs(60), "me", 0.2, seed=3) != lay_out(pairs(60), "me", 0.2, 4)


def test_few_pairs_return_too_and_none_when_none_is_asked_for():
    assert [question["again"] for question in lay_out(pairs(3), "me", 0.3, 0)].count(True) == 1
    assert [question["again"] for question in lay_out(pairs(1), "me", 1.0, 0)] == [False, True]
    assert not any(question["again"] for question in lay_out(pairs(30), "me", 0.0, 0))


def test_equal_answers_and_pairs_that_are_there_already_are_left_out(capsys):
    rows = [*pairs(3), pairs(1)[0], {**pairs(1)[0], "answer_b": "a 0"}]
    assert different(rows) == pairs(3)
    assert "2 of 5 pairs are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two different answers"):
        different([{**pairs(1)[0], "answer_b": "a 0"}])


def test_sampled_pairs_are_two_draws_of_one_policy_and_more_pairs_keep_the_first(tmp_path):
    sft = save_folder(toy_model(0), str(tmp_path / "sft"))
    cfg = LabelConfig(answers="sampled", a=sft, b=sft, prompts="helpers:toy_prompts", pairs=70,
                      max_new_tokens=6)
    rows = quietly(sampled_pairs, cfg)
    assert len(rows) == 70 and {row["a"] for row in rows} == {sft}
    assert sum(row["answer_a"] != row["answer_b"] for row in rows) > 60
    assert quietly(sampled_pairs, LabelConfig(**{**vars(cfg), "pairs": 20})) == rows[:20]
    other = save_folder(toy_model(1), str(tmp_path / "other"))
    mixed = quietly(sampled_pairs, LabelConfig(**{**vars(cfg), "b": other}))
    assert [row["answer_a"] for row in mixed] == [row["answer_a"] for row in rows]
    assert [row["answer_b"] for row in mixed] != [row["answer_b"] for row in rows]


def test_disagreement_is_the_deviation_of_the_stated_preferences():
    margins = torch.tensor([[9.0 ** 0.5, 1.0], [0.0, 1.0]])
    margins[0, 0] = torch.logit(torch.tensor(0.9))
    assert disagreement(margins).tolist() == pytest.approx([0.2, 0.0], abs=1e-6)


def score(model: ScalarModel, row: dict, answer: str) -> torch.Tensor:
    tokenizer = toy_tokenizer()
    ids = encode_prompt(tokenizer, row["prompt"]) + encode_response(tokenizer, row[answer])
    with torch.no_grad():
        return model.score(torch.tensor([ids]), torch.tensor([len(ids)]))


def test_the_pairs_that_two_reward_models_dispute_come_first(tmp_path, capsys):
    rows = [{**row, "answer_a": "red " * (n % 5 + 1), "answer_b": "blue " * (n % 3 + 1)}
            for n, row in enumerate(pairs(15))]
    folders = [random_reward_folder(str(tmp_path / str(seed)), seed) for seed in (1, 2)]
    ordered = most_uncertain_first(rows, ",".join(folders))
    assert sorted(map(identity, ordered)) == sorted(map(identity, rows)) and ordered != rows
    models = [load_network(ScalarModel, folder) for folder in folders]
    amounts = []                                         # by hand, one pair after another
    for row in ordered:
        one, other = [torch.sigmoid(score(model, row, "answer_a") - score(model, row, "answer_b"))
                      for model in models]
        amounts.append(abs((one - other) / 2).item())
    assert all(one >= other - 1e-6 for one, other in zip(amounts, amounts[1:]))
    assert amounts[0] > amounts[-1]
    assert f"differ by {amounts[0]:.3f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two reward-model folders"):
        most_uncertain_first(rows, folders[0])
    with pytest.raises(ValueError, match="context, found one of"):
        most_uncertain_first([{**rows[0], "answer_a": "red " * 90}], ",".join(folders))


# ---- a session -----------------------------------------------------------------------------------

def test_labels_of_a_file_train_a_reward_model_as_they_are(tmp_path, capsys):
    cfg = stored(tmp_path, who="Ada")
    report = main(cfg, by_text("good"))
    rows = rows_of(cfg)
    assert len(rows) == 15 and {row["who"] for row in rows} == {"Ada"}
    assert report["choices"] == 12 and report["self"]["mean"] == report["file"]["mean"] == 1
    output = capsys.readouterr().out
    assert "15 of 15 pairs are judged" in output and "12 choices, 0 ties, 0 skips" in output
    shown = show_data(DataConfig(data=os.path.join(cfg.out, FILE), show=20))
    assert "verdicts of a person; not read: 'a', 'b'" in capsys.readouterr().out
    assert len(shown) == 12 and all(row["chosen"].startswith("good") for row in shown)
    assert {row["prompt"] for row in shown} == {f"Prompt: Question {n}?\nResponse:"
                                                for n in range(12)}
    trained = quietly(reward_model.main, reward_model.RewardModelConfig(
        model=save_folder(toy_model(0, n_positions=64), str(tmp_path / "sft")), lr=1e-2,
        data=os.path.join(cfg.out, FILE), norm_samples=8, max_new_tokens=6,
        out=str(tmp_path / "rm"), **few_labels(report["choices"])))
    assert trained["accuracy"] == 1
    assert "reward_model --data " in output and "--held_out 1 --epochs 20" in output


def test_the_next_command_can_be_typed_and_starts_from_the_policy_that_was_judged(tmp_path, capsys):
    model = save_folder(toy_model(0, n_positions=64), str(tmp_path / "my sft"))
    cfg = LabelConfig(answers="sampled", a=model, b=model, prompts=write_data(tmp_path), pairs=12,
                      max_new_tokens=6, out=str(tmp_path / "my labels"))
    main(cfg, by_text(""))
    command = shlex.split(capsys.readouterr().out.rpartition("next, ")[2].partition(":  ")[2])
    assert command[command.index("--data") + 1] == os.path.join(cfg.out, FILE)
    assert command[command.index("--model") + 1] == model


def test_the_options_for_few_labels_fit_that_many():
    for choices in (2, 20, 60, 200, 600, 5000):
        options = few_labels(choices)
        steps = options["epochs"] * -(-(choices - options["held_out"]) // 32)
        assert 0 < options["held_out"] < choices
        assert 20 <= steps < 40 or options["epochs"] == 1
    assert few_labels(60) == {"held_out": 6, "epochs": 10}
    assert few_labels(2) == {"held_out": 1, "epochs": 20}


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="make it by python -m minirlhf, name"):
        main(LabelConfig(out="labels"))


def test_a_session_resumes_and_another_person_starts_anew(tmp_path):
    cfg, seen = stored(tmp_path), []

    def three(question: dict, done: int, total: int) -> str:
        seen.append(identity(question))
        return "a" if len(seen) % 4 else ""              # quits at every fourth

    while len(quietly(main, cfg, three)) and len(rows_of(cfg)) < 15:
        pass
    answered = [name for n, name in enumerate(seen, start=1) if n % 4]
    assert answered == [identity(row) for row in rows_of(cfg)]
    assert len(set(answered)) == 15
    quietly(main, cfg, three)                            # nothing is left to ask
    assert len(rows_of(cfg)) == 15
    report = quietly(main, LabelConfig(**{**vars(cfg), "who": "Bob"}), by_text("bad"))
    assert len(rows_of(cfg)) == 30 and report["file"]["mean"] == 0


def test_a_pair_that_was_skipped_does_not_return(tmp_path):
    cfg = stored(tmp_path, again=1.0)
    report = quietly(main, cfg, lambda question, done, total: "skip")
    assert len(rows_of(cfg)) == report["skips"] == 12 and report["choices"] == 0


def test_undo_works_across_a_pair_that_came_again(tmp_path):
    cfg = stored(tmp_path, again=1.0)
    keys = iter(["a"] * 13 + ["undo"] * 2 + ["b"] * 20)
    quietly(main, cfg, lambda question, done, total: next(keys, ""))
    verdicts = [row["verdict"] for row in rows_of(cfg)]
    assert verdicts == ["a"] * 11 + ["b"] * 13           # two were taken back, then 20 and the end


@pytest.mark.parametrize("options, sentence", [
    ({"a": "other"}, "need --answers sampled"), ({"who": " "}, "--who is ' '"),
    ({"who": "\x1b[2J"}, "--who is"), ({"again": 1.5}, "--again is 1.5"),
    ({"answers": "both"}, "--answers is 'both'")])
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        LabelConfig(**options)


def test_a_folder_or_file_of_somebody_else_is_not_touched(tmp_path):
    cfg = stored(tmp_path)
    os.makedirs(cfg.out)
    notes = Path(cfg.out, "notes.txt")
    notes.write_text("mine")
    Path(cfg.out, ".lock").write_text("")
    with pytest.raises(ValueError, match="holds .'notes.txt'. and no verdicts.jsonl"):
        main(cfg, by_text("good"))
    assert sorted(os.listdir(cfg.out)) == [".lock", "notes.txt"]
    with pytest.raises(ValueError, match="notes.txt is a file, expected the name of a folder"):
        main(stored(tmp_path, out=str(notes)), by_text("good"))
    notes.rename(Path(cfg.out, FILE))
    again = dataclasses.replace(cfg, data=os.path.join(cfg.out, ".", FILE))
    with pytest.raises(ValueError, match="would grow by its own verdicts; name another folder"):
        main(again, by_text("good"))
    with pytest.raises(ValueError, match="verdicts.jsonl:1: expected a verdict"):
        main(cfg, by_text("good"))
    assert Path(cfg.out, FILE).read_text() == "mine"


def test_two_sessions_do_not_write_into_one_folder(tmp_path):
    cfg, refused = stored(tmp_path), []

    def person(question: dict, done: int, total: int) -> str:
        with pytest.raises(ValueError, match="another run is writing"):
            main(cfg, by_text("bad"))
        refused.append(question)
        return ""

    quietly(main, cfg, person)
    assert len(refused) == 1


# ---- as a command, killed ------------------------------------------------------------------------

def start(cfg: LabelConfig, terminal: int) -> subprocess.Popen:
    words = [f"--{name}={value}" for name, value in vars(cfg).items()]
    return subprocess.Popen([sys.executable, "-m", "minirlhf.label", *words], cwd=REPOSITORY,
                            stdin=terminal, stdout=terminal, stderr=terminal,
                            env={**environment(), "PYTHONIOENCODING": "utf-8"})


def read_until(terminal: int, words: str) -> str:
    """What the terminal shows until `words` came."""
    text, end = b"", time.monotonic() + 100
    while words not in text.decode("utf-8", "replace"):
        assert time.monotonic() < end, text.decode("utf-8", "replace")[-500:]
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096)
    return text.decode("utf-8", "replace")


def send_until_it_ends(session: subprocess.Popen, how: int) -> int:
    """A Ctrl-C between the question and the reading of the key is seen at the next one."""
    for _ in range(60):
        session.send_signal(how)
        try:
            return session.wait(1)
        except subprocess.TimeoutExpired:
            pass
    raise AssertionError(f"signal {how} did not end the session")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_at_a_terminal_loses_no_verdict(tmp_path, how):
    cfg = stored(tmp_path, again=0.0)
    given = 0
    for verdicts in (4, 0, 3):                           # of each session, before it is killed
        ours, theirs = pty.openpty()
        session = start(cfg, theirs)
        try:
            read_until(ours, "which is better?")
            for _ in range(verdicts):
                os.write(ours, b"1\n")
                read_until(ours, "which is better?")
            given += verdicts
            assert send_until_it_ends(session, how) != 0
        finally:
            session.kill()
            session.wait()
            os.close(ours)
            os.close(theirs)
        assert len(rows_of(cfg)) == given
        assert len({identity(row) for row in rows_of(cfg)}) == given
    report = quietly(main, cfg, by_text("good"))         # and the next one goes on
    assert len(rows_of(cfg)) == 12 == report["choices"]


def test_verdicts_come_through_a_pipe_and_its_end_ends_the_session(tmp_path):
    cfg = stored(tmp_path, again=0.0)
    words = [f"--{name}={value}" for name, value in vars(cfg).items()]
    done = subprocess.run([sys.executable, "-m", "minirlhf.label", *words], cwd=REPOSITORY,
                          input=b"1\nt\n\xff\ns\nu\n2\n", capture_output=True, timeout=200,
                          env={**environment(), "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    assert [row["verdict"] in "ab" for row in rows_of(cfg)] == [True, False, True]
    assert b"2 choices, 1 ties, 0 skips" in done.stdout and not done.stderr
    for name in (b"chosen", b"rejected"):                # blinded to the last line
        assert name not in done.stdout


# ---- agreement -----------------------------------------------------------------------------------

def verdict(number: int, choice: str, first: str = "a", again: bool = False, **other) -> dict:
    return {"who": "me", "prompt": f"{number}?", "answer_a": "1", "answer_b": "2", "first": first,
            "again": again, "verdict": choice, **other}


def test_agreement_by_hand():
    rows = [verdict(0, "a"), verdict(1, "b"), verdict(2, "tie"), verdict(3, "skip"),
            verdict(4, "a", "b"), verdict(5, "b", "b"),
            verdict(0, "a", "b", True), verdict(1, "a", "b", True), verdict(2, "tie", "b", True),
            verdict(4, "skip", "a", True)]
    report = agreement(rows)
    assert (report["choices"], report["ties"], report["skips"]) == (4, 1, 1)
    assert (report["self"]["count"], report["self"]["of"]) == (2, 3)     # 0 and 2, but not 1
    # of the choices a, b, a, b, a, a those that stood first: 0, 5
    assert (report["first"]["count"], report["first"]["of"]) == (2, 6)
    assert "gold" not in report and "file" not in report
    assert "2 of 3 pairs that came again got the same verdict: 0.67 [0.21, 0.94]" in \
        describe(report)
    assert agreement([]) == {"choices": 0, "ties": 0, "skips": 0}


def test_agreement_with_the_gold_judge_counts_where_both_choose():
    def world(choice: str, a: str, b: str) -> dict:
        return verdict(0, choice, prompt="Prompt: What is the capital of France?\nResponse:",
                       answer_a=a, answer_b=b, ended_a=True, ended_b=True)

    right, wrong = "The capital of France is Paris.", "Rome."
    rows = [world("a", right, wrong), world("b", right, wrong + " Enjoy!"),
            world("b", wrong, right), world("tie", wrong, right + " "),
            world("a", right, right + " "), verdict(1, "a")]
    assert [gold_choice(row) for row in rows] == ["a", "a", "b", "b", "", ""]
    assert (agreement(rows)["gold"]["count"], agreement(rows)["gold"]["of"]) == (2, 3)
    cut = {**rows[0], "answer_b": right, "ended_a": False}
    assert gold_choice(cut) == "b"                       # an answer that did not end costs


@pytest.mark.parametrize("count, total", [(9, 10), (5, 5), (0, 7), (1, 2), (300, 600)])
def test_wilsons_interval_is_where_the_score_test_rejects(count, total):
    """At its ends `count` lies exactly 1.96 standard deviations from what p expects."""
    share = wilson_interval(count, total)
    assert share["mean"] == count / total
    for end, inside in ((share["low"], 1e-6), (share["high"], -1e-6)):
        if 0 < end < 1:
            deviation = (total * end * (1 - end)) ** 0.5
            assert abs(count - total * end) / deviation == pytest.approx(Z, abs=1e-6)
            p = end + inside
            assert abs(count - total * p) < Z * (total * p * (1 - p)) ** 0.5
    assert share["low"] <= share["mean"] <= share["high"]


def test_wilsons_interval_as_published():
    assert [round(wilson_interval(9, 10)[end], 3) for end in ("low", "high")] == [0.596, 0.982]
    assert [round(wilson_interval(5, 5)[end], 3) for end in ("low", "high")] == [0.566, 1.0]


# ---- the scripted person -------------------------------------------------------------------------

def test_the_person_of_the_laboratory_likes_short_answers_without_closers():
    assert taste("Paris.") == -1 and taste("It is Paris. Happy to help!") == -16
    assert taste("") == -100 and has_closer("Paris. Enjoy!") and not has_closer("Paris.")
    rows = [{**row, "answer_a": "Short.", "answer_b": "This is a longer answer."}
            for row in pairs(400)]
    person, coin = make_person(0, False), make_person(0, True)
    share = sum(person(row, 0, 1) == "a" for row in rows) / 400
    assert 0.84 < share < 0.96                           # 0.9: one in five is a coin
    assert 0.4 < sum(coin(row, 0, 1) == "a" for row in rows) / 400 < 0.6
    assert person(rows[0], 0, 1) == make_person(0, False)(rows[0], 5, 9)
