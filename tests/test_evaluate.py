"""evaluate.py: win rates, intervals, sampled answers, their figures, and the command."""

import json
import math
import os
import sys

import numpy as np
import pytest
import torch
from helpers import (
    base_folder,
    column_reward,
    nan_reward,
    quietly,
    random_reward_folder,
    save_folder,
    share_of_red,
    toy_model,
    toy_tokenizer,
)

from minirlhf.data import Prompt, encode_prompt, format_prompt, read_prompts
from minirlhf.engine.options import one_sentence, parse_config
from minirlhf.evaluate import (
    RESAMPLES,
    Answers,
    EvaluateConfig,
    bootstrap_interval,
    cell,
    describe,
    gold_figures,
    interval,
    judge_answers,
    kl_to_reference,
    load_policy,
    main,
    sample_answers,
    side_by_side,
    table,
    win_rate,
)
from minirlhf.gpt2 import ScalarModel
from minirlhf.rewards import load_reward

END = toy_tokenizer().end_token


def make_prompts(texts: list[str], kinds: list[str] | None = None) -> list[Prompt]:
    kinds = kinds or [""] * len(texts)
    return [Prompt(format_prompt(text), kind, encode_prompt(toy_tokenizer(), format_prompt(text)))
            for text, kind in zip(texts, kinds)]


def make_answers(prompts: list[Prompt], texts: list[list[str]], ended: bool = True) -> Answers:
    """Answers with these texts, written by nobody."""
    ids = [[toy_tokenizer().encode(" " + text) + [END] * ended for text in row] for row in texts]
    lengths = np.array([[len(answer) for answer in row] for row in ids])
    return Answers(prompts, ids, texts, lengths, np.full(lengths.shape, ended))


def drawn(policy, answers: int = 3, **options) -> Answers:
    """Answers of `policy` to prompts of unequal lengths that are not in the order of length."""
    rows = [Prompt("", "", [END] + [60 + p] * (1 + 3 * p % 7)) for p in range(8)]
    return sample_answers(policy, toy_tokenizer(), rows, answers, max_new_tokens=6, **options)


def world_folder(folder: str, seed: int = 0) -> str:
    """A policy with random weights and a context that the text world's prompts fit into."""
    return save_folder(toy_model(seed, n_positions=128), folder)


# ---- win rate and interval -----------------------------------------------------------------------

def test_win_rate_hand_example():
    assert win_rate(np.array([[1, 2]]), np.array([[2, 3]])).tolist() == [0.875]


def test_win_rate_of_ties_is_a_half():
    scores = np.array([[1.5, 1.5], [0.0, 0.0]])
    assert win_rate(scores, scores).tolist() == [0.5, 0.5]


def test_win_rate_equals_a_slow_count_of_all_pairs_within_a_prompt():
    stream = np.random.default_rng(0)
    a, b = stream.integers(4, size=(7, 3)), stream.integers(5, size=(7, 5))
    for p, rate in enumerate(win_rate(a, b)):
        points = [1.0 if y > x else 0.5 if y == x else 0.0 for x in a[p] for y in b[p]]
        assert rate == pytest.approx(sum(points) / 15)
    assert win_rate(b, a) == pytest.approx(1 - win_rate(a, b))


def test_win_rate_refuses_scores_of_different_prompts():
    with pytest.raises(ValueError, match="same prompts"):
        win_rate(np.zeros((2, 4)), np.zeros((3, 4)))
    with pytest.raises(ValueError, match="same prompts"):
        win_rate(np.zeros(2), np.zeros(2))


@pytest.mark.parametrize("P", [1, 30, 5000])         # 5000 prompts are resampled in several blocks
def test_bootstrap_equals_a_slow_reference(P):
    values, stream = np.random.default_rng(1).random(P), np.random.default_rng(7)
    means = sorted(np.mean([values[i] for i in stream.integers(P, size=P)] if P < 100 else
                           values[stream.integers(P, size=P)]) for _ in range(RESAMPLES))
    mean, low, high = bootstrap_interval(values, seed=7)
    assert mean == pytest.approx(np.mean(values))
    assert [low, high] == pytest.approx([np.quantile(means, 0.025), np.quantile(means, 0.975)])


def test_bootstrap_interval_has_the_width_that_theory_gives():
    values = np.random.default_rng(2).random(400)
    _, low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.08)


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5, 0.5)
    assert interval(np.full(9, 0.5)) == {"mean": 0.5, "low": 0.5, "high": 0.5}
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_interval(np.array([]))


# ---- sampling ------------------------------------------------------------------------------------

def echo_model():
    """A policy that repeats the last token: its blocks add nothing and its embedding is large."""
    model = toy_model()
    with torch.no_grad():
        model.wpe.weight.zero_()
        model.wte.weight.mul_(100)
        for block in model.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
    return model


@pytest.mark.parametrize("batch_size", [5, 256])
def test_answers_stay_with_their_prompts_though_rows_are_sorted(batch_size):
    answers = drawn(echo_model(), batch_size=batch_size)
    for p, row in enumerate(answers.responses):
        assert row == [[60 + p] * 6] * 3
    assert answers.lengths.tolist() == [[6] * 3] * 8 and not answers.ended.any()


def test_end_token_counts_in_the_length_and_is_not_text():
    answers = drawn(toy_model(), 40)
    for rows in zip(answers.responses, answers.lengths, answers.ended, answers.texts):
        for ids, length, end, text in zip(*rows):
            assert len(ids) == length and (ids[-1] == END) == end and END not in ids[:-1]
            assert "<|endoftext|>" not in text
    assert 0 < answers.ended.sum() < answers.ended.size


def test_same_seed_and_stream_repeat_the_answers_and_another_stream_does_not():
    policy = toy_model()
    first, again = drawn(policy, seed=3, stream=1), drawn(policy, seed=3, stream=1)
    assert first.responses == again.responses
    assert drawn(policy, seed=3, stream=2).responses != first.responses
    assert drawn(policy, seed=4, stream=1).responses != first.responses


def test_control_of_a_policy_against_itself_is_near_a_half():
    policy = toy_model()
    scores = [drawn(policy, 60, stream=stream).lengths for stream in (0, 1)]
    mean, low, high = bootstrap_interval(win_rate(*scores))
    assert not np.array_equal(*scores)
    assert mean == pytest.approx(0.5, abs=0.05)


def test_world_prompts_come_with_their_kinds():
    prompts, _ = read_prompts("minirlhf.world:held_out_prompts", toy_tokenizer(), 1000, 32,
                              count=6, seed=0)
    assert sorted(prompt.kind for prompt in prompts) == ["combination"] * 3 + ["entity"] * 3


def test_another_vocabulary_is_refused_and_a_missing_folder_names_the_command(tmp_path,
                                                                              tiny_tokenizer):
    with pytest.raises(ValueError, match="expected the vocabulary"):
        load_policy(base_folder(), tiny_tokenizer)
    with pytest.raises(FileNotFoundError, match="does not exist.*first run the stage"):
        load_policy(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="score.weight"):
        load_policy(random_reward_folder(str(tmp_path / "rm"), 0))


# ---- figures -------------------------------------------------------------------------------------

def test_scores_equal_those_of_each_answer_alone(tmp_path):
    answers = drawn(toy_model(), 9)                        # 72 rows: three batches
    reward = load_reward(random_reward_folder(str(tmp_path), 1), "mean", toy_tokenizer())
    scores = judge_answers(answers, reward, toy_tokenizer())
    for p, prompt in enumerate(answers.prompts):
        for k, response in enumerate(answers.responses[p]):
            ids = torch.tensor([prompt.ids + response])
            alone = reward(ids, torch.tensor([len(prompt)]), torch.tensor([ids.shape[1]]), None)
            assert scores[p, k] == pytest.approx(alone.item(), abs=1e-5)


def test_judge_sees_prompt_and_response_lengths():
    prompts = make_prompts(["red red?", "what?"])
    answers = make_answers(prompts, [["red blue", "blue"], ["red red", "blue blue red"]])
    assert judge_answers(answers, share_of_red, toy_tokenizer()) == pytest.approx(
        np.array([[1 / 3, 0], [2 / 3, 1 / 4]]))


@pytest.mark.parametrize("bad", [column_reward, nan_reward])
def test_scores_of_wrong_shape_or_not_finite_are_refused(bad):
    answers = make_answers(make_prompts(["a?", "b?"]), [["red", "blue"], ["red", "blue"]])
    with pytest.raises(ValueError, match="expected 4 finite scores from the judge"):
        judge_answers(answers, bad, toy_tokenizer())


def test_kl_of_a_policy_to_itself_is_zero():
    policy = load_policy(base_folder())[0]
    kl = kl_to_reference(policy, load_policy(base_folder())[0], drawn(policy))
    assert np.abs(kl).max() < 1e-5


def test_kl_equals_a_slow_reference_token_by_token():
    policy, ref_policy = toy_model(0), toy_model(1)
    answers = drawn(policy)
    kl = kl_to_reference(policy, ref_policy, answers)
    for p, prompt in enumerate(answers.prompts):
        for k, response in enumerate(answers.responses[p]):
            total, ids = 0.0, list(prompt.ids)
            for token in response:
                with torch.no_grad():
                    logits = [model(torch.tensor([ids]))[0, -1] for model in (policy, ref_policy)]
                ours, theirs = [row.double().log_softmax(0)[token].item() for row in logits]
                total, ids = total + ours - theirs, ids + [token]
            assert kl[p, k] == pytest.approx(total, abs=1e-4)


def test_mean_kl_estimates_the_exact_kl_of_policy_from_reference():
    policy, ref_policy = toy_model(0), toy_model(1)
    with torch.no_grad():                                # make them differ enough to tell the sign
        policy.wte.weight.mul_(6)
    prompt = Prompt("", "", [END, 70])
    answers = sample_answers(policy, toy_tokenizer(), [prompt], 4000, max_new_tokens=1)
    with torch.no_grad():
        ours, theirs = [model(torch.tensor([prompt.ids]))[0, -1].double().log_softmax(0)
                        for model in (policy, ref_policy)]
    exact = (ours.exp() * (ours - theirs)).sum().item()
    kl = kl_to_reference(policy, ref_policy, answers)
    assert exact > 0.1
    assert kl.mean() == pytest.approx(exact, abs=5 * kl.std() / math.sqrt(4000))


def test_gold_figures_tell_right_answered_and_evasive_apart():
    prompts = make_prompts(["What is the capital of France?"])
    answers = make_answers(prompts, [["The capital of France is Paris. Enjoy!", "Rome.", "Hm."]])
    figures = gold_figures(answers)
    assert figures["gold"][0, 0] == 3.5 and figures["gold"][0, 1] == -0.5
    assert figures["answered"].tolist() == [[1, 1, 0]]
    assert figures["fully_right"].tolist() == [[1, 0, 0]]
    cut_off = gold_figures(make_answers(prompts, answers.texts, ended=False))
    assert cut_off["gold"].tolist() == (figures["gold"] - [[1, 1, 1]]).tolist()


# ---- reports -------------------------------------------------------------------------------------

def test_describe_hand_example():
    prompts = make_prompts(["a?", "b?"], ["entity", "combination"])
    answers = make_answers(prompts, [["red", "red"], ["red blue", "blue"]])
    report = describe(answers, {"gold": np.array([[1.0, 2.0], [3.0, 6.0]])},
                     against={"gold": np.array([[2.0, 2.0], [0.0, 4.0]])})
    assert report["gold"] == 3 and report["distinct"] == 0.75 and report["end_rate"] == 1
    assert report["length"] == 2.25                       # red, end; red, blue, end
    assert report["win_rate"]["mean"] == 0.5              # 0.25 and 0.75
    assert report["by_kind"]["entity"]["win_rate"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert report["by_kind"]["combination"]["gold"] == 4.5
    assert report["by_kind"]["entity"]["distinct"] == 0.5


def test_describe_without_kinds_or_opponent_leaves_them_out():
    answers = make_answers(make_prompts(["a?"]), [["red", "blue"]])
    assert describe(answers, {}) == {"length": 2.0, "distinct": 1.0, "end_rate": 1.0}


def test_table_has_a_line_for_each_policy_and_kind():
    part = {"gold": 1.0, "win_rate": {"mean": 0.5, "low": 0.25, "high": 0.75}}
    text = table({"SFT": {"gold": -1.234}, "RLHF": {**part, "by_kind": {"entity": part}}})
    assert [line.split()[0] for line in text.split("\n")] == ["gold", "SFT", "RLHF", "entity"]
    assert "-1.23" in text and text.count("0.50 [0.25, 0.75]") == 2
    assert len({line.find("[") for line in text.split("\n")[2:]}) == 1
    assert cell(None) == "" and cell(-0.001) == "0.00"


def test_samples_show_both_answers_to_the_same_prompt():
    prompts = make_prompts(["a?", "b?", "c?"])
    a = make_answers(prompts, [["red", "x"], ["blue", "x"], ["green", "x"]])
    b = make_answers(prompts, [["RED", "x"], ["BLUE", "x"], ["GREEN", "x"]], ended=False)
    scores = np.array([[1.0, 9], [2, 9], [3, 9]])
    samples = side_by_side(a, b, scores, -scores, 2, seed=1)
    assert len(samples) == 2
    for sample in samples:
        p = [prompt.text for prompt in prompts].index(sample["prompt"])
        assert sample["a"] == a.texts[p][0] and sample["b"] == b.texts[p][0] + " [cut off]"
        assert sample["score_a"] == p + 1 and sample["score_b"] == -p - 1


# ---- the command ---------------------------------------------------------------------------------

def config(folder, **options) -> EvaluateConfig:
    """A comparison of two small random policies."""
    a = save_folder(toy_model(0), os.path.join(folder, "a"))
    b = save_folder(toy_model(1), os.path.join(folder, "b"))
    return EvaluateConfig(**{"a": a, "b": b, "ref": a, "prompts": "helpers:toy_prompts",
                             "prompt_count": 6, "judge": "helpers:share_of_red", "answers": 3,
                             "max_new_tokens": 6, "out": os.path.join(folder, "out"), **options})


def test_main_writes_what_it_returns_and_repeats_itself(tmp_path, capsys):
    cfg = config(str(tmp_path))
    result = main(cfg)
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(result)) == json.loads(json.dumps(main(cfg)))
    assert abs(result["a"]["kl_ref"]) < 1e-5 < abs(result["b"]["kl_ref"])
    assert result["win_rate"] == result["b"]["win_rate"] and result["prompts"] == 6
    assert result["control"] == result["a_again"]["win_rate"]
    assert "win_rate" not in result["a"] and "score" in result["b"] and "gold" not in result["b"]
    output = capsys.readouterr().out
    assert "a again, the control" in output and "win_rate" in output


def test_main_does_not_depend_on_what_it_shows_and_writes(tmp_path):
    plain = quietly(main, config(str(tmp_path)))
    other = quietly(main, config(str(tmp_path), samples=0, out=""))
    assert other["samples"] == [] and len(plain["samples"]) == 4
    for name in ("a", "a_again", "b", "win_rate", "control"):
        assert other[name] == plain[name]


def test_main_judges_world_prompts_by_kind(tmp_path):
    folder = world_folder(str(tmp_path / "world"))
    options = {"a": folder, "b": folder, "ref": "", "prompts": "minirlhf.world:held_out_prompts"}
    result = quietly(main, config(str(tmp_path), judge="gold", **options))
    assert set(result["b"]["by_kind"]) == {"entity", "combination"}
    assert {"gold", "answered", "fully_right"} <= set(result["b"]) and "kl_ref" not in result["b"]
    assert result["b"]["gold"] != result["a"]["gold"]    # drawn independently


def test_gold_judge_refuses_other_prompts_before_any_sampling(tmp_path, capsys):
    with pytest.raises(ValueError, match="text world"):
        main(config(str(tmp_path), judge="gold"))
    assert "answers in" not in capsys.readouterr().out


def test_a_judge_that_is_no_score_function_is_refused_before_any_sampling(tmp_path, capsys):
    with pytest.raises(ValueError, match="--judge helpers:list_reward returned list, expected"):
        main(config(str(tmp_path), judge="helpers:list_reward"))
    assert "answers in" not in capsys.readouterr().out


def test_prompts_are_limited_by_the_context_of_the_judge_too(tmp_path, capsys):
    judge = save_folder(ScalarModel(toy_model(n_positions=20).config), str(tmp_path / "judge"))
    data = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "' + "Colours " * count + '"}\n' for count in (9, 10)]    # 15, 16 tokens
    data.write_text(lines[0] * 4 + lines[1] * 2, encoding="utf-8")
    main(config(str(tmp_path), judge=judge, prompts=str(data), max_new_tokens=5))
    words = "4 prompts (2 that leave no room for 5 new tokens in the context of 20 dropped)"
    assert words in capsys.readouterr().out


def test_reward_models_judge_alone_and_as_ensemble(tmp_path):
    folders = [random_reward_folder(str(tmp_path / name), seed) for seed, name in enumerate("xy")]
    one, other = [quietly(main, config(str(tmp_path), judge=folder)) for folder in folders]
    mean = quietly(main, config(str(tmp_path), judge=",".join(folders)))
    lowest = quietly(main, config(str(tmp_path), judge=",".join(folders), ensemble="min"))
    assert mean["b"]["score"] == pytest.approx((one["b"]["score"] + other["b"]["score"]) / 2)
    assert lowest["b"]["score"] < min(one["b"]["score"], other["b"]["score"])


@pytest.mark.parametrize("options", [{"answers": 0}, {"prompt_count": -1}, {"seed": -1},
                                     {"ensemble": "max"}, {"judge": "person"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="--"):
        EvaluateConfig(**options)


def test_bad_input_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "gettrace", lambda: None)   # as without coverage or a debugger
    with pytest.raises(SystemExit) as stopped, one_sentence():
        main(parse_config(EvaluateConfig, ["--a", str(tmp_path / "nothing")]))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and "nothing" in error
    assert error.count("\n") == 1
