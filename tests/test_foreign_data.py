"""Data as other people have it: their shapes, files and templates, and what is said of them."""

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import random
import re
import shlex
import subprocess
import sys
import time
import zipfile
from collections import Counter

import pytest
from fuzzing import FUZZ, MEBIBYTE, peak_memory, reset_peak
from helpers import (
    ppo_config,
    quietly,
    random_reward_folder,
    reward_config,
    sft_config,
    sft_folder,
    toy_tokenizer,
)
from networks import text_model

from minirlhf import data, evaluate, ppo, reward_model, rewards, sft
from minirlhf import generate as sampling
from minirlhf.data import encode_response, format_prompt, mix, read_prompts, read_records
from minirlhf.files.formats import trim
from minirlhf.files.notes import find_template, repeats
from minirlhf.files.pretrained import save_folder
from minirlhf.files.records import take_off_end
from minirlhf.files.refusals import KNOWN

EGG = {"prompt": "How do I boil an egg?", "response": "Seven minutes."}
ASKED = "Prompt: How do I boil an egg?\nResponse:"
HUMAN = "\n\nHuman: How do I boil an egg?\n\nAssistant:"
USER = {"role": "user", "content": "How do I boil an egg?"}
GOOD = {"role": "assistant", "content": "Seven minutes."}
BAD = {"role": "assistant", "content": "No."}


def put(tmp_path, rows, name="rows.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def put_bytes(tmp_path, content: bytes, name="rows.jsonl") -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


def printed(capsys, path: str, kind: str = "all", **options) -> str:
    """What reading a file prints, without the file's name before each line."""
    capsys.readouterr()
    read_records(path, kind, **options)
    return capsys.readouterr().out.replace(f"{path}: ", "")


# ---- published rows that cannot be used ----------------------------------------------------------

POST = {"subreddit": "cats", "title": "Cat", "post": "It sat."}
PAIR = {"info": POST, "summaries": [{"text": " Cat."}, {"text": " Sat cat."}], "choice": 1}
ARTICLE = {"id": "0f", "site": "cnn", "title": "A bridge opens", "article": "It was opened."}
EXPORTED = {"post": None, "subreddit": None, **ARTICLE}     # as datasets writes such a row


@pytest.mark.parametrize("row, reason", [
    ({**PAIR, "info": ARTICLE}, "a news article in place of a post"),
    ({**PAIR, "info": EXPORTED}, "a news article in place of a post"),
    ({**PAIR, "info": {**POST, "title": None, "article": None}}, "null as 'title'"),
    ({**PAIR, "info": None}, "null as 'info'"), ({**PAIR, "choice": None}, "null as 'choice'"),
    ({**PAIR, "summaries": None}, "null as 'summaries'"),
    ({**PAIR, "summaries": [{"text": None}, {"text": "a"}]}, "null as 'text'")])
def test_comparisons_without_a_post_are_dropped_counted_and_printed(tmp_path, capsys, row, reason):
    path = put(tmp_path, [{**PAIR, "info": {**POST, "article": None, "site": None}}, row, row])
    assert f"1 rows read, dropped 2 with {reason}\n" in printed(capsys, path, "comparisons")
    with pytest.raises(ValueError, match=f"found none; dropped 1 with {reason}"):
        read_records(put(tmp_path, [row]), "comparisons")


@pytest.mark.parametrize("good, key", [
    ({**POST, "summary": "Cat."}, "post"), ({**POST, "summary": "Cat."}, "summary"),
    ({"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, "chosen"),
    ({"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, "rejected"),
    ({"prompt": HUMAN, "response": "a"}, "response"),
    ({"instruction": "a", "input": "", "output": "b"}, "output"),
    ({"messages": [USER, GOOD]}, "messages"), ({"prompt": [USER], "chosen": [GOOD],
                                                "rejected": [BAD]}, "rejected")])
def test_null_in_a_published_row_drops_the_row_and_not_the_file(tmp_path, good, key):
    for null in (None, float("nan")):                    # pandas writes NaN for a missing text
        records = read_records(put(tmp_path, [good, {**good, key: null}, good]), "all")
        assert len(records) == 2 and records.dropped == {f"null as {key!r}": 1}


def test_null_in_a_users_own_file_is_his_mistake_and_named_by_line(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl:2: expected text as 'response', found None"):
        read_records(put(tmp_path, [EGG, {**EGG, "response": None}]), "all")


# ---- shapes that are read ------------------------------------------------------------------------

PLAIN = {"prompt": ASKED, "response": "Seven minutes."}
PAIRED = {"prompt": ASKED, "chosen": "Seven minutes.", "rejected": "No."}


@pytest.mark.parametrize("row, record", [
    ({"messages": [USER, GOOD]}, PLAIN),
    ({"messages": [USER, GOOD], "prompt": "x", "prompt_id": "7"}, PLAIN),
    ({"prompt": [USER]}, {"prompt": ASKED}),
    ({"prompt": [USER], "completion": [GOOD]}, PLAIN),
    ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, PAIRED),
    ({"prompt": [USER], "chosen": GOOD["content"], "rejected": "No."}, PAIRED),
    ({"prompt": USER["content"], "chosen": [GOOD], "rejected": [BAD]}, PAIRED),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, PAIRED),
    ({"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD],
      "messages": [USER, GOOD], "score_chosen": 8.0, "score_rejected": 2.0}, PAIRED),
    ({"instruction": EGG["prompt"], "input": "", "output": "Seven minutes."}, PLAIN),
    ({"instruction": EGG["prompt"], "input": None, "output": "Seven minutes."}, PLAIN),
    ({"instruction": EGG["prompt"], "output": "Seven minutes.", "text": "all"}, PLAIN),
    ({"instruction": EGG["prompt"], "input": "", "output": "Seven minutes.",
      "chosen": "Seven minutes.", "rejected": "No."}, {**PLAIN, **PAIRED}),
    ({"instruction": EGG["prompt"], "chosen": "Seven minutes.", "rejected": "No."}, PAIRED)])
def test_plain_shapes_become_records_in_our_template(tmp_path, row, record):
    assert read_records(put(tmp_path, [row]), "all") == [record]


def test_instruction_and_input_and_system_and_user_stand_a_blank_line_apart(tmp_path):
    row = {"instruction": "Add these.", "input": "1 and 2", "output": "3"}
    assert read_records(put(tmp_path, [row]), "prompts") == [
        {"prompt": "Prompt: Add these.\n\n1 and 2\nResponse:"}]
    row = {"messages": [{"role": "system", "content": "Be short."}, USER, GOOD]}
    assert read_records(put(tmp_path, [row]), "prompts") == [
        {"prompt": "Prompt: Be short.\n\nHow do I boil an egg?\nResponse:"}]


@pytest.mark.parametrize("row, record", [
    ({"prompt": HUMAN, "response": " a", "chosen": " b", "rejected": " c"},
     {"prompt": HUMAN, "response": " a", "chosen": " b", "rejected": " c"}),
    ({"prompt": HUMAN}, {"prompt": HUMAN}),
    ({"prompt": HUMAN.lstrip() + " ", "chosen": "b", "rejected": "c"},
     {"prompt": HUMAN, "chosen": "b", "rejected": "c"}),
    ({"prompt": HUMAN, "chosen": HUMAN + " b", "rejected": HUMAN + " c"},
     {"prompt": HUMAN, "chosen": " b", "rejected": " c"})])
def test_prompts_of_turns_are_read_as_they_are(tmp_path, row, record):
    assert read_records(put(tmp_path, [row]), "all") == [record]


def test_answers_that_are_whole_dialogues_are_cut_and_that_is_said(tmp_path, capsys):
    rows = [{"prompt": HUMAN, "chosen": HUMAN + " b", "rejected": HUMAN + " c"},
            {"prompt": HUMAN, "chosen": " b", "rejected": " c"}]
    assert "1 of 2 rows had the prompt again at the beginning of an answer: it was cut off" \
        in printed(capsys, put(tmp_path, rows))


@pytest.mark.parametrize("row, reason", [
    ({"messages": [USER]}, "no assistant's answer at the end"),
    ({"messages": []}, "no assistant's answer at the end"),
    ({"messages": [USER, GOOD, USER, BAD]}, "several assistant's answers"),
    ({"messages": [GOOD]}, "turns that are not those of one user and one assistant"),
    ({"messages": [USER, {"role": "tool", "content": "1"}, GOOD]},
     "turns that are not those of one user and one assistant"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "null as 'content'"),
    ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an empty response"),
    ({"messages": [{"role": "user", "content": ""}, GOOD]}, "an empty prompt"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "two equal responses"),
    ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "Why?"}, BAD]},
     "dialogues that part before the last answer"),
    ({"prompt": [USER], "completion": [GOOD], "label": False}, "a label that calls the answer bad"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "a text under 'history'"),
    ({"instruction": " ", "output": "b"}, "an empty prompt"),
    ({"prompt": HUMAN, "response": f" a{HUMAN} b"}, "a Human turn after the last answer")])
def test_rows_that_do_not_fit_their_shape_are_dropped_with_the_reason(tmp_path, row, reason):
    with pytest.raises(ValueError, match=re.escape(f"found none; dropped 1 with {reason}")):
        read_records(put(tmp_path, [row]), "all")


@pytest.mark.parametrize("row, words", [
    ({"messages": "a"}, "expected an object with prompt; or chosen, rejected; or messages"),
    ({"messages": [1]}, "expected messages, each with a role and a content, found"),
    ({"messages": [{"content": "a"}, GOOD]}, "each with a role and a content"),
    ({"messages": [USER, {"role": "assistant", "content": [1]}]}, "expected text as 'content'"),
    ({"messages": [{"role": "user"}, GOOD]}, "expected 'content', found only"),
    ({"instruction": 1, "output": "b"}, "expected text as 'instruction', found 1")])
def test_rows_of_the_wrong_type_are_refused_by_line(tmp_path, row, words):
    with pytest.raises(ValueError, match="rows.jsonl:1: .*" + words):
        read_records(put(tmp_path, [row]), "all")


# ---- shapes that are not read --------------------------------------------------------------------

def run_conversion(message: str, folder, name: str) -> str:
    """Run the command that an error names, as a user would; returns the file that it writes."""
    command = re.search(r'python (-c "[^"]+"|-m zipfile -e FILE \.)', message).group(1)
    words = [word.replace("FILE", name) for word in shlex.split(command)]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(folder / "converted.jsonl")


def refusal(path: str) -> str:
    with pytest.raises(ValueError) as caught:
        read_records(path, "all")
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    return str(caught.value)


STRANGERS = {
    "WebGPT": ({"question": {"full_text": "How?"}, "answer_0": "So.", "answer_1": "No.",
                "score_0": 1, "score_1": -1}, ("chosen", "So."), ("rejected", "No.")),
    "SHP": ({"history": "How?", "human_ref_A": "So.", "human_ref_B": "No.", "labels": 1},
            ("chosen", "So."), ("rejected", "No.")),
    "Stack Exchange": ({"question": "How?", "response_j": "So.", "response_k": "No.", "qid": 1},
                       ("chosen", "So."), ("rejected", "No.")),
    "UltraFeedback": ({"instruction": "How?", "completions": [
        {"response": "Eh.", "overall_score": 5.0}, {"response": "No.", "overall_score": 1.0},
        {"response": "So.", "overall_score": 7.5}]}, ("chosen", "So."), ("rejected", "No.")),
    "Dolly": ({"instruction": "How?", "context": "", "response": "So.", "category": "qa"},
              ("response", "So.")),
    "ShareGPT": ({"id": "1", "conversations": [{"from": "human", "value": "How?"},
                                               {"from": "gpt", "value": "So."}]},
                 ("response", "So.")),
    "PKU-SafeRLHF": ({"prompt": "How?", "response_0": "No.", "response_1": "So.",
                      "better_response_id": 1}, ("chosen", "So."), ("rejected", "No.")),
    "called good or bad": ({"prompt": "How?", "completion": "So.", "label": True},
                           ("response", "So.")),
    "Chatbot Arena": ({"conversation_a": [{"role": "user", "content": "How?"}, BAD],
                       "conversation_b": [{"role": "user", "content": "How?"}, GOOD],
                       "winner": "model_b"}, ("chosen", "Seven minutes."), ("rejected", "No.")),
    "all rows in one list": ({"rows": [{"prompt": "How?", "response": "So."}]},
                             ("response", "So.")),
    "a table by columns": ({"prompt": {"0": "How?"}, "response": {"0": "So."}},
                           ("response", "So.")),
    "table by columns;": ({"prompt": ["How?"], "response": ["So."]}, ("response", "So.")),
    "to use prompt, response ('completion')": ({"prompt": "How?", "completion": "So."},
                                               ("response", "So.")),
    "to use prompt ('question'), response ('answer')": ({"question": "How?", "answer": "So."},
                                                        ("response", "So.")),
    "to use prompt ('question'), chosen, rejected": (
        {"system": "", "question": "How?", "chosen": "So.", "rejected": "No."},
        ("chosen", "So."), ("rejected", "No.")),
    "to use prompt, response alone": ({"prompt": "How?", "response": "So.", "helpfulness": 3},
                                      ("response", "So."))}


@pytest.mark.parametrize("name", STRANGERS)
def test_other_shapes_are_refused_with_a_conversion_that_works(tmp_path, name):
    row, *fields = STRANGERS[name]
    message = refusal(put(tmp_path, [row]))
    assert name in message and "rows.jsonl:1: expected" in message
    assert read_records(run_conversion(message, tmp_path, "rows.jsonl"), "all") == [
        {"prompt": "Prompt: How?\nResponse:", **dict(fields)}]


def test_every_known_stranger_is_tried_above():
    assert all(any(name in known for name in STRANGERS) for _, known, _ in KNOWN)


def test_a_row_that_resembles_nothing_is_refused_without_a_conversion(tmp_path):
    message = refusal(put(tmp_path, [{"a": 1, "b": "c"}]))
    assert "found ['a', 'b']" in message and "python" not in message
    assert "minirlhf.pretrain" in refusal(put(tmp_path, [{"text": "a"}]))


def places_in(value) -> list[tuple]:
    """(container, key) of every value inside a value from JSON."""
    keys = list(value) if isinstance(value, dict) else []
    keys += range(len(value)) if isinstance(value, list) else []
    inner = [place for key in keys for place in places_in(value[key])]
    return [(value, key) for key in keys] + inner


ODD = [None, float("nan"), 3, -1, True, "", " ", "x", [], {}, [None], [[]], {"a": 1}, ["a"],
       [USER], [GOOD], [USER, GOOD, USER], HUMAN, HUMAN + " a", "<|endoftext|>", "\ud800", "    y"]
SHAPED = [{"messages": [USER, GOOD]}, {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
          {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, {"prompt": [USER]}, PAIR, EGG,
          {"prompt": HUMAN, "response": "a", "chosen": "b", "rejected": "c"},
          {"chosen": HUMAN + " a", "rejected": HUMAN + " b"}, {**POST, "summary": "Cat."},
          {"instruction": "a", "input": "b", "output": "c", "chosen": "d", "rejected": "e"},
          *[row for row, *_ in STRANGERS.values()]]


def test_odd_values_end_in_the_rows_that_are_left_or_a_value_error(tmp_path):
    rng, read = random.Random(5), Counter()
    for _ in range(FUZZ // 3):
        row = rng.choice(SHAPED)
        rows = [json.loads(json.dumps(row)) for _ in range(3)]
        for _ in range(rng.choice([1, 1, 2, 3])):
            container, key = rng.choice(places_in(rng.choice(rows)) or [(rows[0], "prompt")])
            container[key] = copy.deepcopy(rng.choice(ODD))
        path, kind = put(tmp_path, rows), rng.choice(["all", "comparisons", "demonstrations"])
        try:
            records = quietly(read_records, path, kind)
        except ValueError as error:
            assert str(error).startswith(path) and len(str(error)) < 1200
            read["refused"] += 1
            continue
        read["read"] += 1
        assert len(records) + records.dropped.total() == 3
        for record in records:
            assert all(isinstance(record[field], str) and record[field].strip()
                       for field in ("prompt", "response", "chosen", "rejected") if field in record)
    assert min(read.values()) > 100


# ---- files that are not JSON lines ---------------------------------------------------------------

LINE = json.dumps(EGG).encode() + b"\n"


def table(separator: str, encoding: str = "utf-8") -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=separator)
    writer.writerows([["prompt", "response"], list(EGG.values())])
    return file.getvalue().encode(encoding)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("converted.jsonl", LINE)
    return file.getvalue()


ARRAY = json.dumps([EGG, EGG], indent=2).encode()
FILES = {                   # what an error says -> a file with the row EGG once or twice
    "found an array": ARRAY, "found an array;": json.dumps([EGG]).encode(),
    "an array": b"[\n" + LINE + b"]\n", "found an array; convert": b"[" + LINE * 9000,
    "an object over several lines": (json.dumps(EGG, indent=1) + "\n").encode() * 2,
    "a comma after the object": LINE.replace(b"}", b"},") + LINE,
    r"lines that end in \r alone": LINE.replace(b"\n", b"\r") * 2,
    "Python's notation": repr(EGG).encode() + b"\n", "UTF-16 text": LINE.decode().encode("utf-16"),
    "found UTF-16 text": LINE.decode().encode("utf-16-be"),
    "UTF-16 text;": LINE.decode().encode("utf-16-le"),
    "UTF-32 text": LINE.decode().encode("utf-32"), "bzip2 data": bz2.compress(LINE),
    "xz data": lzma.compress(LINE), "gzip data": gzip.compress(gzip.compress(LINE)),
    "zip archive": zipped(), "a CSV table with the columns ['prompt', 'response']": table(","),
    "CSV table with": table(";"), "CSV table": table(",", "utf-8-sig"), "TSV table": table("\t")}


@pytest.mark.parametrize("words", FILES)
def test_another_kind_of_file_is_named_with_a_conversion_that_works(tmp_path, words):
    path = put_bytes(tmp_path, FILES[words], "my file.dat")
    message = refusal(path)
    assert words in message and message.startswith(f"{path}:1: expected one JSON object per line")
    if "[" + LINE.decode() in FILES[words].decode("latin-1"):
        return                                           # a long array that is not whole
    name = "my file.dat"
    if words == "gzip data":                             # unpacked once, it is read
        (tmp_path / name).write_bytes(gzip.decompress(FILES[words]))
    records = read_records(run_conversion(message, tmp_path, name), "all")
    assert records in ([PLAIN], [PLAIN, PLAIN])


def test_a_conversion_never_writes_over_a_file(tmp_path):
    (tmp_path / "converted.jsonl").write_text("mine")
    message = refusal(put_bytes(tmp_path, ARRAY, "rows.json"))
    with pytest.raises(AssertionError, match="FileExistsError"):
        run_conversion(message, tmp_path, "rows.json")
    assert (tmp_path / "converted.jsonl").read_text() == "mine"


@pytest.mark.parametrize("content, words", [
    (b"PAR1\x15\x04" + bytes(40), "found a Parquet file; convert it by: python -c \"import pandas"),
    (b"ARROW1\0\0" + bytes(40), "found an Arrow file"),
    (b"\xff\xff\xff\xff\x10\x01" + bytes(40), "an Arrow stream, as datasets keeps it"),
    (b"\x28\xb5\x2f\xfd\x04" + bytes(40), "found Zstandard data"),
    (b"SQLite format 3\0" + bytes(40), "an SQLite database"),
    (b"\x80\x04\x95" + bytes(40), "a Python pickle"),
    (b"\x01\x02\x03" + bytes(40), "binary data that begin with"),
    (b"rows.jsonl" + bytes(247) + b"ustar\x00", "a tar archive"),
    (gzip.compress(table(",")), "a CSV table .* inside gzip data; unpack those first"),
    (b"How do I boil an egg?\nWhy?\n", "found text, 'How do I boil an egg\\?'; if every line is a"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "a Git LFS pointer"),
    (b"<!doctype html>\n<html></html>\n", "a web page"),
    (b'{"prompt": "Caf\xe9?"}\n', "not valid JSON: 0xe9 at byte 16 is no UTF-8; if it is Windows"),
    (LINE + b'{"prompt": "a", "response": "b",}\n', ":2: not valid JSON: .* at character 3[0-9]")])
def test_what_cannot_be_converted_here_is_named(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        read_records(put_bytes(tmp_path, content), "all")


def test_windows_text_and_lines_of_prompts_are_converted(tmp_path):
    content = json.dumps({**EGG, "response": "Sehr gut f\u00fcr 3 \u20ac."}, ensure_ascii=False)
    message = refusal(put_bytes(tmp_path, content.encode("cp1252")))
    records = read_records(run_conversion(message, tmp_path, "rows.jsonl"), "all")
    assert records[0]["response"] == "Sehr gut f\u00fcr 3 \u20ac."
    (tmp_path / "converted.jsonl").unlink()
    message = refusal(put_bytes(tmp_path, b"How do I boil an egg?\n\nWhy?\n"))
    assert read_records(run_conversion(message, tmp_path, "rows.jsonl"), "prompts") == [
        {"prompt": ASKED}, {"prompt": "Prompt: Why?\nResponse:"}]


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbf" + LINE, LINE.replace(b"\n", b"\r\n"), LINE + b"\n", LINE + b" \n\t\n\n",
    LINE[:-1], gzip.compress(b"\xef\xbb\xbf" + LINE), b"  " + LINE])
def test_what_has_one_meaning_is_read(tmp_path, content):
    assert read_records(put_bytes(tmp_path, content), "all") == [PLAIN]


def test_nan_in_a_field_that_nobody_reads_is_no_fault(tmp_path):
    path = put(tmp_path, [{**POST, "summary": "Cat.", "score": float("nan")}])
    assert "NaN" in (tmp_path / "rows.jsonl").read_text() and len(read_records(path, "all")) == 1
    with pytest.raises(ValueError, match=":1: expected text as 'prompt', found nan"):
        read_records(put(tmp_path, [{"prompt": float("nan")}]), "all")


def test_a_blank_line_between_rows_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl:2: expected .*, found a blank line before"):
        read_records(put_bytes(tmp_path, LINE + b"\n\n" + LINE), "all")


def test_half_of_a_surrogate_pair_is_an_error_where_it_is_read_and_a_whole_pair_is_text(tmp_path):
    with pytest.raises(ValueError, match=":1: expected Unicode text as 'prompt', found half of a"):
        read_records(put_bytes(tmp_path, b'{"prompt": "a \\ud83d b", "response": "c"}\n'), "all")
    path = put_bytes(tmp_path, b'{"prompt": "a \\ud83d\\ude00", "response": "c"}\n')
    assert read_records(path, "all")[0]["prompt"] == "Prompt: a \U0001f600\nResponse:"


# ---- templates, marks, margins -------------------------------------------------------------------

@pytest.mark.parametrize("prompt, words", [
    ("Prompt: How?\nResponse:", "end in 'Response:'"), ("Q: How?\nA:", "end in 'A:'"),
    ("Human: How?\n\nAssistant:", "end in 'Assistant:'"), ("USER: How? ASSISTANT:", "ASSISTANT:"),
    ("POST: I lost my keys.\n\nTL;DR:", "end in 'TL;DR:'"), ("Question: How?\nAnswer:", "Answer:"),
    ("Human: How?", "begin with 'Human:'"), ("<s>[INST] How? [/INST]", "hold '<s>'"),
    ("How?\nUser: So?\nBot: no", "hold turns such as 'User:'"), ("[INST] How? [/INST]", "'[INST]'"),
    ("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n", "hold '<|im_start|>'"),
    ("<start_of_turn>user\nHow?", "<start_of_turn>"), ("<\uff5cUser\uff5c>How?", "User"),
    ("<|start_header_id|>user<|end_header_id|>How?", "hold '<|start_header_id|>'"),
    ("Below is an instruction that describes a task.", "begin with 'Below is an instruction"),
    ("### Instruction:\nHow?\n\n### Response:", "hold '### Instruction'")])
def test_a_prompt_that_has_a_template_already_is_said_with_counts(tmp_path, capsys, prompt, words):
    assert words in find_template(prompt)
    path = put(tmp_path, [EGG, {**EGG, "prompt": prompt}, {**EGG, "prompt": prompt}])
    out = printed(capsys, path)
    assert f"2 of 3 prompts {find_template(prompt)}: they look templated already" in out


@pytest.mark.parametrize("prompt", [
    "How do I boil an egg?", "Give me the answer: 2 + 2", "Translate: hello", "Is 2 < 3 or 3 > 2?",
    "Write a summary of this:\nA cat sat.", "What does C# mean?", "Name an assistant."])
def test_plain_prompts_are_not_suspected(prompt):
    assert find_template(prompt) == ""


def test_the_text_worlds_records_give_no_note():
    for name in ("demonstrations", "prompts", "held_out_prompts"):
        records = read_records(f"minirlhf.world:{name}", "all", count=400, seed=0)
        assert not records.tally.notes and len(records) > 0


def templated_records(count, seed, model):
    """A user's function whose prompts are in our template already."""
    return [{"prompt": ASKED, "response": "Seven.<|endoftext|>", "kind": "x"}] * count


def test_a_functions_records_are_looked_at_too(capsys):
    records = read_records(f"{__name__}:templated_records", "demonstrations", count=3)
    out = capsys.readouterr().out
    assert records[0]["response"] == "Seven."
    assert "3 of 3 prompts end in 'Response:'" in out and "3 of 3 rows had '<|endoftext|>'" in out


def test_an_answer_that_begins_with_its_prompt_again_is_said(tmp_path, capsys):
    repeated = {**EGG, "response": EGG["prompt"] + " Seven minutes."}
    assert "1 of 2 rows have an answer that begins with its prompt again" \
        in printed(capsys, put(tmp_path, [EGG, repeated]))
    assert repeats("What is 2+2?", "What is 2+2? 4") and not repeats("Hello!", "Hello! I am here.")


def test_margins_and_other_keys_that_are_not_used_are_named(tmp_path, capsys, tiny_tokenizer):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = put(tmp_path, [pair, {**pair, "margin": 3.0}, {**pair, "margin": 0}])
    words = "2 of 3 rows have a margin: it is not used, every comparison counts alike"
    assert words in printed(capsys, path, "comparisons")
    rows = [{"chosen": [USER, GOOD], "rejected": [USER, BAD], "margin": 2.0, "score_chosen": 8.0}]
    assert "1 of 1 rows have a margin" in printed(capsys, put(tmp_path, rows), "comparisons")
    tiny_tokenizer.save(str(tmp_path / "tokenizer"))
    data.main(data.DataConfig(data=put(tmp_path, rows), tokenizer=str(tmp_path / "tokenizer")))
    assert "shape: role and content messages (OpenAI, TRL); not read: 'margin', 'score_chosen'" \
        in capsys.readouterr().out


# ---- end texts -----------------------------------------------------------------------------------

@pytest.mark.parametrize("text, bare", [
    ("Hello.<|endoftext|>", "Hello."), ("Hello. <|endoftext|>\n<|endoftext|> ", "Hello."),
    ("<|endoftext|>", "<|endoftext|>"), ("a<|endoftext|>b", "a<|endoftext|>b"), ("a", "a"),
    ("    x<|endoftext|>", "    x"), (" ", " ")])
def test_an_end_text_at_the_end_of_an_answer_is_taken_off(text, bare):
    assert take_off_end(text) == bare


def test_taking_off_ends_takes_time_in_proportion_to_the_text():
    started = time.process_time()
    assert take_off_end("a" + "<|endoftext|>  " * 70_000) == "a"
    assert time.process_time() - started < 2


def test_end_texts_are_counted_where_they_stand(tmp_path, capsys):
    rows = [{**EGG, "response": "Seven.<|endoftext|>"}, {**EGG, "response": "a<|endoftext|>b"},
            {**EGG, "prompt": "Hi<|endoftext|>Hello<|endoftext|>"}, {**EGG, "response": "x</s>"}]
    path = put(tmp_path, rows)
    out = printed(capsys, path)
    for words in ("1 of 4 rows had '<|endoftext|>' spelled out at the end of an answer: it was",
                  "1 of 4 rows have '<|endoftext|>' inside an answer: it is read as letters",
                  "1 of 4 prompts hold '<|endoftext|>': it is read as letters",
                  "1 of 4 rows have an answer with '</s>': it is read as letters"):
        assert words in out
    assert [record["response"] for record in read_records(path, "all")][:2] == [
        "Seven.", "a<|endoftext|>b"]


def test_a_pair_that_differs_in_its_end_text_alone_is_no_comparison(tmp_path):
    pair = {"chosen": HUMAN + " a<|endoftext|>", "rejected": HUMAN + " a"}
    other = {"chosen": HUMAN + " a<|endoftext|>", "rejected": HUMAN + " b<|endoftext|>"}
    records = read_records(put(tmp_path, [pair, other]), "comparisons")
    assert records.dropped == {"two equal responses": 1}
    assert records == [{"prompt": HUMAN, "chosen": " a", "rejected": " b"}]
    ours = {"prompt": "q", "chosen": "a<|endoftext|>", "rejected": "a"}
    with pytest.raises(ValueError, match=":1: expected two different responses, found two equal"):
        read_records(put(tmp_path, [ours]), "comparisons")


# ---- indentation ---------------------------------------------------------------------------------

@pytest.mark.parametrize("text, kept", [
    ("    return x + 1", "    return x + 1"), ("\n\n  a = 1\n  b = 2\n", "  a = 1\n  b = 2"),
    ("\tgoto end;", "\tgoto end;"), (" Seven.", "Seven."), ("\n Seven. ", "Seven."),
    ("Seven.", "Seven."), (" \n \n", ""), ("   ", ""), ("\u00a0\u00a0x", "x"), (" \tx", " \tx")])
def test_the_first_lines_indentation_stays_and_other_white_space_goes(text, kept):
    assert trim(text) == kept


def test_indented_code_comes_back_from_its_ids_and_ordinary_ids_stay(tiny_tokenizer):
    code = "    return x + 1"
    assert tiny_tokenizer.decode(encode_response(tiny_tokenizer, code))[1:] == code
    assert format_prompt("    x = 1\nWhat is x?") == "Prompt:     x = 1\nWhat is x?\nResponse:"
    plain = tiny_tokenizer.encode(" Paris.") + [tiny_tokenizer.end_token]
    for text in ("Paris.", " Paris.", "\n Paris. \n", "Paris.\n\n"):
        assert encode_response(tiny_tokenizer, text) == plain


def test_answers_that_differ_in_indentation_alone_are_two(tmp_path):
    pair = {"prompt": "q", "chosen": "    x", "rejected": "x"}
    assert len(read_records(put(tmp_path, [pair]), "comparisons")) == 1


# ---- rows that are not read, rows that are held out ----------------------------------------------

@pytest.mark.parametrize("kind, option", [("demonstrations", "--examples"),
                                          ("comparisons", "--comparisons"),
                                          ("prompts", "--prompt_count"), ("all", "--prompt_count")])
def test_rows_that_are_not_read_are_mentioned(tmp_path, capsys, kind, option):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(5)]
    path = put(tmp_path, rows)
    assert f"3 of 5 rows read: {option} 3; 0 reads all\n" in printed(capsys, path, kind, count=3)
    for count in (0, 5, 9):
        assert printed(capsys, path, kind, count=count) == ""
    packed = put_bytes(tmp_path, gzip.compress((tmp_path / "rows.jsonl").read_bytes())[:-9])
    assert "2 of more than" in printed(capsys, packed, kind, count=2)     # a file that is torn


def test_dropped_rows_count_as_read(tmp_path, capsys):
    good = {"chosen": HUMAN + " a", "rejected": HUMAN + " b"}
    path = put(tmp_path, [{"chosen": "x", "rejected": "y"}, good, good, good])
    out = printed(capsys, path, "comparisons", count=2)
    assert "3 of 4 rows read: --comparisons 2" in out and "2 rows read, dropped 1 with no" in out


def test_every_stage_mentions_them(tmp_path, capsys):
    tokenizer = toy_tokenizer()
    rows = [{"prompt": f"q{i}", "response": "c", "chosen": "a", "rejected": "b"} for i in range(9)]
    path = put(tmp_path, rows)
    sft.collect(sft.SFTConfig(data=path, examples=6, held_out=1), "", tokenizer, 64)
    assert "6 of 9 rows read: --examples 6" in capsys.readouterr().out
    cfg = reward_model.RewardModelConfig(data=path, comparisons=6)
    reward_model.collect(cfg, "", tokenizer, 64)
    assert "6 of 9 rows read: --comparisons 6" in capsys.readouterr().out
    read_prompts(path, tokenizer, 64, 4, count=6, seed=0)
    assert "6 of 9 rows read: --prompt_count 6" in capsys.readouterr().out


def test_held_out_rows_of_a_file_are_drawn_by_seed_and_a_functions_are_not(tmp_path):
    path, rows = put(tmp_path, [EGG]), list(range(100))
    mixed = mix(rows, path, 0, False)
    assert mixed != rows and sorted(mixed) == rows
    assert mixed == mix(rows, path, 0, False) != mix(rows, path, 1, False)
    assert min(mixed[:20]) < 30 and max(mixed[:20]) > 70         # of a sorted file, not one end
    assert mix(rows, path, 0, True) == rows
    assert mix(rows, "minirlhf.world:demonstrations", 0, False) == rows


@pytest.mark.parametrize("in_order", [False, True])
def test_a_sorted_file_is_held_out_by_seed_unless_told(tmp_path, in_order):
    """At one end of the file all is the other way round, so a model that never saw it is wrong."""
    swapped = [i < 40 for i in range(200)]
    rows = [{"prompt": f"Colours for {i}?", "response": "blue blue" if odd else "red red"}
            for i, odd in enumerate(swapped)]
    last = quietly(sft.main, sft_config(
        data=put(tmp_path, rows), examples=0, held_out=40, in_order=in_order, epochs=4,
        out=str(tmp_path / "sft")))
    assert (last["held_out_loss"] > 2) == in_order
    rows = [{"prompt": f"Colours for {i}?", "chosen": "blue" if odd else "red",
             "rejected": "red" if odd else "blue"} for i, odd in reversed([*enumerate(swapped)])]
    last = quietly(reward_model.main, reward_config(
        data=put(tmp_path, rows), comparisons=0, held_out=40, in_order=in_order, norm_samples=8,
        out=str(tmp_path / "reward_model")))
    assert (last["held_out_accuracy"] < 0.5) == in_order


# ---- the command ---------------------------------------------------------------------------------

def test_the_command_names_the_shape_and_shows_a_row_as_the_model_reads_it(tmp_path, capsys,
                                                                           tiny_tokenizer):
    tiny_tokenizer.save(str(tmp_path / "tokenizer"))
    path = put(tmp_path, [{"instruction": "Boil an egg.", "input": "", "output": "Done.", "id": 3}])
    cfg = data.DataConfig(data=path, tokenizer=str(tmp_path / "tokenizer"), show=0)
    assert len(data.main(cfg)) == 1
    out = capsys.readouterr().out
    assert f"{path}: 1 rows, shape: Alpaca: instruction, input and answers; not read: 'id'" in out
    assert r"'<|endoftext|>Prompt: Boil an egg.\nResponse: Done.<|endoftext|>'" in out
    assert "position" not in out
    data.main(data.DataConfig(data=put(tmp_path, [{"prompt": "Hi?"}]),
                              tokenizer=str(tmp_path / "tokenizer")))
    assert r"reads it: '<|endoftext|>Prompt: Hi?\nResponse:'" in capsys.readouterr().out


def test_the_command_reads_a_large_file_in_bounded_memory(tmp_path, tiny_tokenizer):
    """Its rows would take some 150 MiB as dicts."""
    tiny_tokenizer.save(str(tmp_path / "tokenizer"))
    path = put_bytes(tmp_path, LINE * 200_000)
    cfg = data.DataConfig(data=path, tokenizer=str(tmp_path / "tokenizer"))
    quietly(data.main, data.DataConfig(data=put(tmp_path, [EGG], "one.jsonl"),
                                       tokenizer=cfg.tokenizer))
    before = reset_peak()
    assert len(quietly(data.main, cfg)) == 1
    assert (peak_memory() - before) / MEBIBYTE < 24


# ---- folders with a comma in their names ---------------------------------------------------------

def test_a_comma_in_a_folders_name_does_not_split_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "c", "d,e,f", "x:y"):
        (tmp_path / name).mkdir()
    assert rewards.reward_folders("a,b") == ["a,b"]
    assert rewards.reward_folders("a,b,c") == ["a,b", "c"]
    assert rewards.reward_folders("c,a,b,d,e,f") == ["c", "a,b", "d,e,f"]
    assert rewards.reward_folders("nowhere,c") == ["nowhere", "c"]
    assert rewards.reward_folders("x:y,c") == ["x:y", "c"]
    assert rewards.reward_folders("module:function") == []
    assert rewards.is_function("module:function") and not rewards.is_function("a,b")


def test_ppo_and_evaluate_read_reward_models_with_a_comma_in_their_names(tmp_path):
    one, other = [random_reward_folder(str(tmp_path / name), seed)
                  for seed, name in enumerate(("a,b", "a,c"))]
    assert len(rewards.load_reward(f"{one},{other}", "min", toy_tokenizer()).models) == 2
    quietly(ppo.main, ppo_config(reward=f"{one},{other}", iterations=1, out=str(tmp_path / "ppo")))
    cfg = evaluate.EvaluateConfig(
        a=sft_folder(), b=str(tmp_path / "ppo"), ref="", prompts="helpers:toy_prompts", judge=one,
        prompt_count=4, answers=1, max_new_tokens=4, samples=0)
    assert quietly(evaluate.main, cfg)["prompts"] == 4


# ---- the prompt of a sample ----------------------------------------------------------------------

@pytest.fixture
def shown(tmp_path, tiny_tokenizer, capsys):
    """What `minirlhf.generate` prints of a prompt, and what it warns of."""
    folder = str(tmp_path / "model")
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, folder)

    def run(prompt: str) -> tuple[str, str]:
        capsys.readouterr()
        cfg = sampling.SampleConfig(model=folder, prompt=prompt, max_new_tokens=1)
        text = sampling.main(cfg)
        captured = capsys.readouterr()
        return captured.out[:len(captured.out) - len(text) - 1], captured.err
    return run


def test_backslash_n_is_a_new_line_and_a_second_backslash_takes_that_back(shown):
    assert shown(r"a\nb") == ("a\nb", "")
    assert shown(r"$\\nabla f$ in C:\\new") == (r"$\nabla f$ in C:\new", "")
    assert shown(r"\alpha \\ \t") == (r"\alpha \\ \t", "")
    assert shown("a\nb") == ("a\nb", "")


@pytest.mark.parametrize("prompt", ["Response: ", r"Response:\n", "Response:\t", "a \n", " "])
def test_white_space_at_the_end_of_a_prompt_is_warned_of(shown, prompt):
    _, warning = shown(prompt)
    assert warning == ("the prompt ends in white space, which GPT-2 writes in front of the next "
                       "word\n")


def test_a_prompt_without_it_is_not(shown):
    assert shown("Response:")[1] == "" and shown("")[1] == ""
