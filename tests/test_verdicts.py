"""people/verdicts.py: a person at the keys, blinded, who may stop at any time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, environment, quietly, save_folder, toy_model

from minirlhf.evaluate import EvaluateConfig, main
from minirlhf.people.verdicts import ask, judge_by_person, make_questions, read_verdicts, shown


def questions(count: int = 5, seed: int = 0) -> list[dict]:
    return make_questions([f"Prompt: {p}?" for p in range(count)], [f"a{p}" for p in range(count)],
                          [f"b{p}" for p in range(count)], {"a": "A", "b": "B", "seed": seed})


def type_keys(monkeypatch, keys: list[str]) -> list[str]:
    """Answer each input() with the next key, then with the end of input; returns what was asked."""
    waiting, asked = iter(keys), []

    def typed(text=""):
        asked.append(text)
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    return asked


def key_for(question: dict, answer: str) -> str:
    return "1" if question["first"] == answer else "2"


def test_verdicts_follow_the_answer_and_not_its_place(tmp_path, monkeypatch, capsys):
    rows = questions(40)
    assert 10 < sum(row["first"] == "a" for row in rows) < 30
    keys = [key_for(row, "b") for row in rows[:-2]] + [key_for(rows[-2], "a"), "T"]
    type_keys(monkeypatch, keys)
    rates = judge_by_person(rows, str(tmp_path / "human.jsonl"))
    assert rates.tolist() == [1.0] * 38 + [0.0, 0.5]
    output = capsys.readouterr().out                     # blinded: in the order drawn, no names
    for row in rows:
        first, second = ("a", "b") if row["first"] == "a" else ("b", "a")
        assert f"1: {row['answer_' + first]}\n\n2: {row['answer_' + second]}\n" in output


def test_each_line_holds_all_that_the_verdict_depends_on(tmp_path, monkeypatch):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["1", "q"])
    judge_by_person(questions(), str(path))
    (line,) = path.read_text(encoding="utf-8").splitlines()
    row = questions()[0]
    assert json.loads(line) == {**row, "verdict": row["first"]}
    assert {"a", "b", "seed", "pair", "prompt", "answer_a", "answer_b", "first"} <= set(row)


def test_a_session_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = str(tmp_path / "human.jsonl")
    type_keys(monkeypatch, ["t", "t"])                   # then the input ends
    assert len(judge_by_person(questions(), path)) == 2
    asked = type_keys(monkeypatch, [key_for(row, "b") for row in questions()[2:]])
    assert judge_by_person(questions(), path).tolist() == [0.5, 0.5, 1, 1, 1]
    assert len(asked) == 3
    assert judge_by_person(questions(), path).tolist() == [0.5, 0.5, 1, 1, 1] and len(asked) == 3


def test_a_half_written_last_line_is_dropped_with_a_note(tmp_path, monkeypatch, capsys):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["t", "t"])
    judge_by_person(questions(), str(path))
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) // 2 - 1):
        path.write_bytes(whole[:-cut])
        assert read_verdicts(str(path), questions()) == {0: "tie"}
        assert "half-written last line" in capsys.readouterr().out
        type_keys(monkeypatch, ["t"])
        assert len(judge_by_person(questions(), str(path))) == 2 and path.read_bytes() == whole
    path.write_bytes(whole[:10])
    assert read_verdicts(str(path), questions()) == {} and path.read_bytes() == b""


def test_another_setup_is_refused_and_named(tmp_path, monkeypatch):
    path = str(tmp_path / "human.jsonl")
    type_keys(monkeypatch, ["t"])
    judge_by_person(questions(), path)
    before = Path(path).read_bytes()
    changed = [{**row, "answer_b": "from other weights"} for row in questions()]
    with pytest.raises(ValueError, match="human.jsonl:1: .*answer_b changed"):
        judge_by_person(changed, path)
    with pytest.raises(ValueError, match="seed"):
        judge_by_person([{**row, "seed": 1} for row in questions()], path)
    with pytest.raises(ValueError, match="not among the 0 pairs"):
        judge_by_person([], path)
    assert Path(path).read_bytes() == before


@pytest.mark.parametrize("line", [b"", b"{}", b"[1]", b"\xff", b'{"pair": true, "verdict": "a"}',
                                  b'{"pair": 0, "verdict": ["a"]}', b'{"pair": -1, "verdict": "a"}',
                                  b'{"pair": 0, "verdict": "c"}', b"[" * 5000])
def test_a_bad_line_is_refused_by_number(tmp_path, line):
    path = tmp_path / "human.jsonl"
    good = json.dumps({**questions()[1], "verdict": "tie"}).encode("utf-8")
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="human.jsonl:2: "):
        read_verdicts(str(path), questions())
    path.write_bytes(good + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match="second verdict on pair 1"):
        read_verdicts(str(path), questions())


def test_equal_answers_are_a_tie_without_asking(tmp_path, monkeypatch):
    rows = [{**row, "answer_b": row["answer_a"]} for row in questions(2)]
    asked = type_keys(monkeypatch, [])
    assert judge_by_person(rows, str(tmp_path / "human.jsonl")).tolist() == [0.5, 0.5]
    assert asked == []


def test_other_keys_are_asked_again(monkeypatch, capsys):
    asked = type_keys(monkeypatch, ["", "3", "\x1b[A", " 2 "])
    question = questions()[0]
    assert ask(question, 0, 1) == ("b" if question["first"] == "a" else "a")
    assert len(asked) == 4 and "\x1b" not in capsys.readouterr().out


def test_what_a_person_sees_cannot_drive_the_terminal():
    assert shown("one\x1b[2J two", False) == "one\ufffd[2J two [cut off]"
    assert shown("line\nline\tÄ\u202e") == "line\nline\tÄ\ufffd"


# ---- through the command -------------------------------------------------------------------------

def config(folder) -> EvaluateConfig:
    """A comparison of two small random policies by a person."""
    a = save_folder(toy_model(0), os.path.join(folder, "a"))
    b = save_folder(toy_model(1), os.path.join(folder, "b"))
    return EvaluateConfig(a=a, b=b, ref=a, prompts="helpers:toy_prompts", prompt_count=6,
                          judge="person", max_new_tokens=6, out=os.path.join(folder, "out"))


def test_a_person_judges_through_a_pipe_and_resumes(tmp_path, monkeypatch):
    cfg = config(str(tmp_path))
    arguments = [f"--{name}={getattr(cfg, name)}" for name in
                 ("a", "b", "ref", "prompts", "prompt_count", "judge", "max_new_tokens", "out")]
    first = subprocess.run([sys.executable, "minirlhf/evaluate.py", *arguments], cwd=REPOSITORY,
                           input="1\nt\n", capture_output=True, encoding="utf-8", timeout=200,
                           env={**environment(), "PYTHONIOENCODING": "utf-8"})
    assert first.returncode == 0, first.stderr
    assert "2 of 6 pairs judged" in first.stdout and "Traceback" not in first.stderr
    asked = type_keys(monkeypatch, ["2"] * 4)
    result = quietly(main, cfg)
    lines = (tmp_path / "out" / "human.jsonl").read_text(encoding="utf-8").splitlines()
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    points = [{"a": 0, "tie": 0.5, "b": 1}[json.loads(line)["verdict"]] for line in lines]
    assert written["win_rate"]["mean"] == pytest.approx(sum(points) / 6)
    assert written["judged"] == result["judged"] == 6 and len(asked) == 4
    for name in "ab":
        assert {"kl_ref", "length", "distinct", "end_rate"} <= set(written[name])
    assert "kl_ref" in first.stdout and "kl_ref" not in first.stdout.split("pairs judged")[0]


def test_a_person_who_quits_at_once_gets_no_win_rate(tmp_path, monkeypatch):
    type_keys(monkeypatch, ["q"])
    result = quietly(main, config(str(tmp_path)))
    assert result["judged"] == 0 and "win_rate" not in result
