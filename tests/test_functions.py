"""functions.py: `module:function` on a command line becomes a function, its records are checked."""

import inspect
import os
import re
import sys

import pytest
import torch

from minirlhf import rewards
from minirlhf.data import read_records
from minirlhf.engine.functions import ScoreFunction, ask_for_records, load_function

# ---- functions for the tests below, named as a user names his own --------------------------------

def make_records(count, seed, model):
    return [{"prompt": f"{seed} {number} {model}", "response": "ok"} for number in range(count)]


def make_a_mistake(count, seed, model):
    return [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}]


def make_an_iterator(count, seed, model):
    return iter(make_records(count, seed, model))


def make_texts(count, seed, model):
    return [{"prompt": "a", "response": "b"}, "a"]


NOT_CALLABLE = "a value"


def ask(name: str, count: int = 2) -> list:
    return list(ask_for_records(f"{__name__}:{name}", count, 7, "m", "<{}>".format))


# ---- finding a function --------------------------------------------------------------------------

def test_a_function_is_named_by_module_and_name():
    assert load_function(f"{__name__}:make_records") is make_records
    assert load_function("minirlhf.rewards:load_gold") is rewards.load_gold
    assert load_function("os.path:join") is os.path.join


@pytest.mark.parametrize("spec, words", [
    ("nowhere:f", "nowhere:f: expected a module that Python finds, found none named 'nowhere'"),
    ("minirlhf.nowhere:f", "found none named 'minirlhf.nowhere'"),
    ("minirlhf.data.deep:f", "found none named 'minirlhf.data.deep'"),
    ("minirlhf.data:nothing", "module minirlhf.data has no function nothing"),
    ("minirlhf.data:TEMPLATE", "module minirlhf.data has no function TEMPLATE"),
    (f"{__name__}:NOT_CALLABLE", "has no function NOT_CALLABLE")])
def test_a_function_that_is_not_there_is_refused_by_name(spec, words):
    with pytest.raises(ValueError, match=words):
        load_function(spec)


@pytest.mark.parametrize("spec", ["a:b:c", "C:\\rows.jsonl", ":", "f", "", "a:", ":f", "a b:f",
                                  "a:f()", "os.system('x'):f", "../a:f", "a:f\n", "1:f"])
def test_what_is_no_name_of_a_function_is_refused_before_anything_is_imported(spec):
    before = set(sys.modules)
    with pytest.raises(ValueError, match="expected a file that exists or module:function, found"):
        load_function(spec)
    assert set(sys.modules) == before


def test_a_module_that_lacks_a_package_itself_keeps_its_own_error(tmp_path, monkeypatch):
    """The user's module is there: to say that it is not would send him looking in vain."""
    (tmp_path / "users_module.py").write_text("import not_installed", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed"):
        load_function("users_module:reward")


# ---- records of a function -----------------------------------------------------------------------

def test_a_function_is_asked_by_count_seed_and_model_and_its_prompts_are_templated():
    assert ask("make_records") == [
        (f"{__name__}:make_records: record {number + 1}",
         {"prompt": f"<7 {number} m>", "response": "ok"}) for number in (0, 1)]
    records = read_records(f"{__name__}:make_records", "prompts", count=2, seed=7, model="m")
    assert records == [{"prompt": f"Prompt: 7 {number} m\nResponse:"} for number in (0, 1)]


@pytest.mark.parametrize("name, words", [
    ("make_a_mistake", "make_a_mistake: record 2: expected text as 'response', found an empty one"),
    ("make_texts", "make_texts: record 2: expected a dict, found 'a'"),
    ("make_an_iterator", "make_an_iterator: expected a list of records, found <list_iterato")])
def test_a_function_that_gives_something_else_is_named_with_the_record(name, words):
    with pytest.raises(ValueError, match=words):
        ask(name)


def test_a_function_cannot_be_asked_for_all_records():
    with pytest.raises(ValueError, match="0, which means all, is for files only"):
        ask("make_records", 0)


# ---- score functions -----------------------------------------------------------------------------

IDS = torch.tensor([[9, 5, 6, 9], [9, 7, 9, 9]])         # (2, 4): two prompts of one token
PROMPT_LENGTHS, LENGTHS = torch.tensor([1, 1]), torch.tensor([4, 3])


def right(ids, prompt_lengths, lengths, tokenizer):
    return lengths - prompt_lengths                      # whole numbers are numbers, too


def a_scalar(ids, prompt_lengths, lengths, tokenizer):
    return torch.tensor(1.0)


def a_column(ids, prompt_lengths, lengths, tokenizer):
    return torch.zeros(len(ids), 1)


def a_list(ids, prompt_lengths, lengths, tokenizer):
    return [1.0] * len(ids)


def nothing(ids, prompt_lengths, lengths, tokenizer):
    return None


def one_too_many(ids, prompt_lengths, lengths, tokenizer):
    return torch.zeros(len(ids) + 1)


def two_arguments(ids, lengths):
    return lengths.float()


def blanks_the_prompt(ids, prompt_lengths, lengths, tokenizer):
    ids[:, 0] = 0
    lengths += 5
    return lengths.float()


def no_number(ids, prompt_lengths, lengths, tokenizer):
    return torch.tensor([float(int("Perhaps")) for _ in ids])


def score(name: str) -> torch.Tensor:
    return ScoreFunction("--reward", f"{__name__}:{name}")(IDS, PROMPT_LENGTHS, LENGTHS, None)


def test_scores_become_float32_one_for_each_row():
    assert score("right").tolist() == [3.0, 2.0] and score("right").dtype == torch.float32


def a_score_per_token(ids, prompt_lengths, lengths, tokenizer):
    return ids[:, 1:].clone()


def test_a_score_per_token_is_for_whoever_allows_it():
    spec, arguments = f"{__name__}:a_score_per_token", (IDS, PROMPT_LENGTHS, LENGTHS, None)
    assert ScoreFunction("--reward", spec, per_token=True)(*arguments).tolist() == [
        [5, 6, 9], [7, 9, 9]]
    words = r"--judge .*ed \(2, 3\), expected a tensor of shape \(2,\): one score per response$"
    with pytest.raises(ValueError, match=words):
        ScoreFunction("--judge", spec)(*arguments)
    words = r"returned \(2, 1\), .* \(2,\): one score per response, or \(2, 3\): one per token$"
    with pytest.raises(ValueError, match=words):
        ScoreFunction("--reward", f"{__name__}:a_column", per_token=True)(*arguments)


@pytest.mark.parametrize("name, found", [
    ("a_scalar", r"returned \(\)"), ("a_column", r"returned \(2, 1\)"), ("a_list", "returned list"),
    ("nothing", "returned NoneType"), ("one_too_many", r"returned \(3,\)")])
def test_scores_of_another_shape_are_refused_by_the_options_name(name, found):
    with pytest.raises(ValueError, match=f"--reward {__name__}:{name} {found}, expected a tensor"):
        score(name)


def test_a_function_of_other_arguments_is_refused_before_it_is_called():
    with pytest.raises(ValueError, match=r"expected a function of \(ids, prompt_lengths, lengths, "
                                         r"tokenizer\), found \(ids, lengths\)"):
        ScoreFunction("--gold", f"{__name__}:two_arguments")


def test_what_a_function_changes_in_place_is_its_own_copy():
    before = IDS.clone(), LENGTHS.clone()
    score("blanks_the_prompt")
    assert torch.equal(IDS, before[0]) and torch.equal(LENGTHS, before[1])


def test_an_error_in_a_function_is_told_with_the_users_file_and_line():
    line = inspect.getsourcelines(no_number)[1] + 1
    with pytest.raises(ValueError, match=rf"no_number failed: ValueError: invalid literal .*"
                                         rf"\({re.escape(__file__)}, line {line}\)"):
        score("no_number")


def test_the_source_of_a_function_is_its_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "a_reward_that_changes.py"
    path.write_text("def f(ids, prompt_lengths, lengths, tokenizer): return lengths * 1.0\n")
    before = ScoreFunction("--reward", "a_reward_that_changes:f").source
    assert ScoreFunction("--gold", "a_reward_that_changes:f").source == before
    path.write_text("def f(ids, prompt_lengths, lengths, tokenizer): return lengths * 2.0\n")
    assert ScoreFunction("--reward", "a_reward_that_changes:f").source != before


@pytest.mark.parametrize("spec, advice", [("my_reward.py:f", "write my_reward:f"),
                                          ("rewards/mine.py:f", "write rewards.mine:f"),
                                          ("rewards/mine:f", "write rewards.mine:f")])
def test_a_file_in_place_of_a_module_is_answered_by_the_modules_name(spec, advice):
    with pytest.raises(ValueError, match=advice):
        load_function(spec)
