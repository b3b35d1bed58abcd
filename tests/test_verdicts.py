"""people/verdicts.py: a person at the keys, blinded, who may stop at any time and take back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY, environment, quietly, save_folder, toy_model

from minirlhf import reward_model
from minirlhf.data import read_records
from minirlhf.evaluate import EvaluateConfig, main
from minirlhf.people.verdicts import (
    POINTS,
    VerdictFile,
    ask,
    check_setup,
    judge_by_person,
    make_questions,
    shown,
)


def questions(count: int = 5, seed: int = 0) -> list[dict]:
    pairs = [{"prompt": f"Prompt: {p}?\nResponse:", "answer_a": f"a{p}", "answer_b": f"b{p}",
              "ended_a": True, "ended_b": True} for p in range(count)]
    return make_questions(pairs, {"a": "A", "b": "B", "seed": seed})


def judge(rows: list[dict], path) -> list[str]:
    return judge_by_person(rows, VerdictFile(str(path)))


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


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


# ---- blinding ------------------------------------------------------------------------------------

def test_verdicts_follow_the_answer_and_not_its_place(tmp_path, monkeypatch, capsys):
    rows = questions(40)
    assert 10 < sum(row["first"] == "a" for row in rows) < 30
    keys = [key_for(row, "b") for row in rows[:-3]] + [key_for(rows[-3], "a"), "T", "s"]
    type_keys(monkeypatch, keys)
    assert judge(rows, tmp_path / "human.jsonl") == ["b"] * 37 + ["a", "tie", "skip"]
    output = capsys.readouterr().out                     # blinded: in the order drawn, no names
    for row in rows:
        first, second = ("a", "b") if row["first"] == "a" else ("b", "a")
        assert f"1: {row['answer_' + first]}\n\n2: {row['answer_' + second]}\n" in output


def test_each_answer_shows_first_half_of_the_time():
    """4000 coins: the deviation of their share is 0.008."""
    first = [row["first"] for row in questions(4000)]
    assert abs(first.count("a") / 4000 - 0.5) < 0.04
    runs = sum(one != other for one, other in zip(first, first[1:]))
    assert abs(runs / 3999 - 0.5) < 0.04                 # a pair says nothing of the next
    assert first != [row["first"] for row in questions(4000, seed=1)]


def test_what_a_person_sees_cannot_drive_the_terminal(monkeypatch, capsys):
    assert shown("one\x1b[2J two", False) == "one\ufffd[2J two [cut off]"
    assert shown("line\nline\tÄ\u202e") == "line\nline\tÄ\ufffd"
    type_keys(monkeypatch, ["t"])
    hostile = {**questions()[0], "prompt": "\x1b]0;title\x07Who?", "answer_a": "\x1b[31mred\r",
               "answer_b": "\x9b2Jclear\u2066", "ended_b": False}
    ask(hostile, 0, 1)
    output = capsys.readouterr().out
    assert not set(output) & set("\x1b\x07\r\x9b\u2066")
    assert "red" in output and "clear\ufffd [cut off]" in output


def test_other_keys_are_asked_again(monkeypatch, capsys):
    asked = type_keys(monkeypatch, ["", "3", "\x1b[A", " 2 "])
    question = questions()[0]
    assert ask(question, 0, 1) == ("b" if question["first"] == "a" else "a")
    assert len(asked) == 4 and "\x1b" not in capsys.readouterr().out


# ---- the file ------------------------------------------------------------------------------------

def test_each_line_holds_all_that_the_verdict_depends_on(tmp_path, monkeypatch):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["1", "q"])
    judge(questions(), path)
    (line,), row = rows_of(path), questions()[0]
    assert line.pop("when").endswith("+00:00")
    assert line == {**row, "verdict": row["first"]}
    assert {"a", "b", "seed", "pair", "prompt", "answer_a", "answer_b", "first"} <= set(row)


def test_a_session_goes_on_where_it_stopped(tmp_path, monkeypatch):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["t", "t"])                   # then the input ends
    assert judge(questions(), path) == ["tie", "tie", "", "", ""]
    asked = type_keys(monkeypatch, [key_for(row, "b") for row in questions()[2:]])
    assert judge(questions(), path) == ["tie", "tie", "b", "b", "b"]
    assert len(asked) == 3
    assert judge(questions(), path) == ["tie", "tie", "b", "b", "b"] and len(asked) == 3


def test_a_verdict_is_on_the_disk_before_the_next_pair_shows(tmp_path, monkeypatch):
    path, seen = tmp_path / "human.jsonl", []

    def typed(text=""):
        seen.append(len(rows_of(path)) if path.exists() else 0)
        return "1"

    monkeypatch.setattr("builtins.input", typed)
    judge(questions(), path)
    assert seen == [0, 1, 2, 3, 4]


def test_a_half_written_last_line_is_dropped_with_a_note(tmp_path, monkeypatch, capsys):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["t", "t"])
    judge(questions(), path)
    whole = path.read_bytes()
    first = whole.split(b"\n")[0] + b"\n"
    for cut in (1, 20, len(whole) - len(first) - 1):
        path.write_bytes(whole[:-cut])
        assert [row["pair"] for row in VerdictFile(str(path)).rows] == [0]
        assert "half-written last line" in capsys.readouterr().out and path.read_bytes() == first
        type_keys(monkeypatch, ["t"])
        assert judge(questions(), path)[:3] == ["tie", "tie", ""]
    path.write_bytes(whole[:10])
    assert VerdictFile(str(path)).rows == [] and path.read_bytes() == b""


@pytest.mark.parametrize("line", [b"", b"{}", b"[1]", b"\xff", b'{"pair": true, "verdict": "a"}',
                                  b'{"pair": 0, "verdict": ["a"]}', b'{"pair": -1, "verdict": "a"}',
                                  b'{"prompt": "p", "answer_a": "1", "answer_b": "2", '
                                  b'"verdict": "c"}', b"[" * 5000])
def test_a_bad_line_is_refused_by_number_and_stays(tmp_path, line):
    path = tmp_path / "human.jsonl"
    good = json.dumps({**questions()[1], "verdict": "tie"}).encode("utf-8")
    path.write_bytes(good + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match="human.jsonl:2: "):
        VerdictFile(str(path))
    assert path.read_bytes() == good + b"\n" + line + b"\n"
    path.write_bytes(good + b"\n" + good + b"\n")
    with pytest.raises(ValueError, match="human.jsonl:2: a second verdict"):
        judge(questions(), path)


@pytest.mark.parametrize("content", [b"my notes", b"my notes\n", b'{"prompt": "Hi?"}\n', b'{"a": 1',
                                     b'{"verdict": "tie", "prompt": "'])
def test_a_strangers_file_is_refused_and_not_touched(tmp_path, content):
    path = tmp_path / "human.jsonl"
    path.write_bytes(content)
    if content.startswith(b'{"verdict"'):                # the beginning of a line of ours
        assert VerdictFile(str(path)).rows == []
        return
    with pytest.raises(ValueError, match="human.jsonl:1: "):
        VerdictFile(str(path))
    assert path.read_bytes() == content


def test_a_link_is_never_written_through(tmp_path, monkeypatch):
    other = tmp_path / "other.jsonl"
    other.write_bytes(b"")
    (tmp_path / "human.jsonl").symlink_to(other)
    type_keys(monkeypatch, ["1"])
    with pytest.raises(ValueError, match="found a link"):
        judge(questions(), tmp_path / "human.jsonl")
    assert other.read_bytes() == b""


def test_verdicts_of_another_setup_are_refused_where_a_win_rate_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["t"])
    judge(questions(), path)
    before, file = path.read_bytes(), VerdictFile(str(path))
    check_setup(file, questions())
    changed = [{**row, "answer_b": "from other weights"} for row in questions()]
    with pytest.raises(ValueError, match="human.jsonl:1: .*answer_b changed"):
        check_setup(file, changed)
    with pytest.raises(ValueError, match="seed"):
        check_setup(file, [{**row, "seed": 1} for row in questions()])
    with pytest.raises(ValueError, match="not among the 0 pairs"):
        check_setup(file, [])
    assert path.read_bytes() == before


def test_names_with_bytes_that_are_no_utf_8_are_kept(tmp_path):
    file = VerdictFile(str(tmp_path / "human.jsonl"))
    file.add({**questions()[0], "a": "caf\udce9"}, "tie")
    assert VerdictFile(file.path).rows == file.rows


# ---- undo ----------------------------------------------------------------------------------------

def test_undo_takes_the_last_verdict_back_and_asks_that_pair_again(tmp_path, monkeypatch):
    path, rows = tmp_path / "human.jsonl", questions()
    keys = [key_for(rows[0], "a"), key_for(rows[1], "a"), "u", key_for(rows[1], "b"), "q"]
    type_keys(monkeypatch, keys)
    assert judge(rows, path) == ["a", "b", "", "", ""]
    assert [row["verdict"] for row in rows_of(path)] == ["a", "b"]
    type_keys(monkeypatch, ["u", "u", "u", "t", "q"])    # in a later session; the third finds none
    assert judge(rows, path) == ["tie", "", "", "", ""]
    assert [row["verdict"] for row in rows_of(path)] == ["tie"]


def test_undo_passes_over_ties_that_nobody_was_asked_for(tmp_path, monkeypatch):
    rows, path = questions(), tmp_path / "human.jsonl"
    rows[1] = {**rows[1], "answer_b": rows[1]["answer_a"]}
    type_keys(monkeypatch, [key_for(rows[0], "a"), "u", key_for(rows[0], "b"), "q"])
    assert judge(rows, path) == ["b", "tie", "", "", ""]


def test_undo_leaves_what_is_not_of_today(tmp_path, monkeypatch):
    path = tmp_path / "human.jsonl"
    type_keys(monkeypatch, ["t", "t", "q"])
    judge(questions(), path)
    before = path.read_bytes()
    type_keys(monkeypatch, ["u", "q"])
    judge([{**row, "answer_a": "other"} for row in questions()], path)
    assert path.read_bytes() == before


def test_undo_refuses_a_file_that_somebody_else_changed(tmp_path, monkeypatch):
    path = tmp_path / "human.jsonl"
    file = VerdictFile(str(path))
    file.add(questions()[0], "a")
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(ValueError, match="changed by somebody else"):
        file.undo()


# ---- as comparisons ------------------------------------------------------------------------------

def test_verdicts_are_comparisons_and_ties_skips_and_repeats_are_counted(tmp_path, capsys):
    file, rows = VerdictFile(str(tmp_path / "human.jsonl")), questions(6)
    file.add(rows[0], "a")
    file.add(rows[1], "b")
    file.add(rows[2], "tie")
    file.add(rows[3], "skip")
    file.add({**rows[0], "again": True}, "b")
    file.add({**rows[4], "answer_a": "<|endoftext|> "}, "b")
    records = read_records(file.path, "comparisons")
    assert list(records)[:2] == [
        {"prompt": "Prompt: 0?\nResponse:", "chosen": "a0", "rejected": "b0"},
        {"prompt": "Prompt: 1?\nResponse:", "chosen": "b1", "rejected": "a1"}]
    assert records.dropped == {"a tie": 1, "a skip": 1, "a pair that was shown again": 1}
    assert "dropped 1 with a tie, 1 with a skip, 1 with a pair" in capsys.readouterr().out
    prompts = read_records(file.path, "prompts")         # and prompts for PPO
    assert prompts[0] == {"prompt": "Prompt: 0?\nResponse:"}


def test_verdicts_on_dialogues_are_not_taken_for_prompts(tmp_path):
    file = VerdictFile(str(tmp_path / "human.jsonl"))
    file.add({**questions()[0], "prompt": "\n\nHuman: Hi?\n\nAssistant:"}, "b")
    assert list(read_records(file.path, "comparisons")) == [
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": "b0", "rejected": "a0"}]


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
                           input=b"\xff\n1\nt\n", capture_output=True, timeout=200,
                           env={**environment(), "PYTHONIOENCODING": "utf-8"})
    output, errors = first.stdout.decode("utf-8"), first.stderr.decode("utf-8")
    assert first.returncode == 0, errors
    assert "2 of 6 pairs judged" in output and "Traceback" not in errors
    asked = type_keys(monkeypatch, ["2"] * 3 + ["s"])
    result = quietly(main, cfg)
    path = tmp_path / "out" / "human.jsonl"
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    verdicts = [row["verdict"] for row in rows_of(path)]
    assert verdicts.count("skip") == 1
    points = [POINTS[verdict] for verdict in verdicts if verdict != "skip"]
    assert written["win_rate"]["mean"] == pytest.approx(sum(points) / 5)
    assert written["judged"] == result["judged"] == 5 and len(asked) == 4
    for name in "ab":
        assert {"kl_ref", "length", "distinct", "end_rate"} <= set(written[name])
    assert "kl_ref" in output and "kl_ref" not in output.split("pairs judged")[0]
    trained = quietly(reward_model.main, reward_model.RewardModelConfig(
        model=cfg.a, data=str(path), held_out=1, norm_samples=8, max_new_tokens=6,
        out=str(tmp_path / "reward_model")))
    assert 0 <= trained["held_out_accuracy"] <= 1


def test_a_person_who_quits_at_once_gets_no_win_rate(tmp_path, monkeypatch):
    type_keys(monkeypatch, ["q"])
    result = quietly(main, config(str(tmp_path)))
    assert result["judged"] == 0 and "win_rate" not in result
