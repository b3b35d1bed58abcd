"""siblings/rejection.py: which response is kept, what is trained on, runs."""

import math

import pytest
import torch
from helpers import quietly, toy_tokenizer
from rollouts import ragged_prompts
from sibling_runs import (
    files_of,
    rejection_config,
    run,
    stop,
    with_reward_model,
)

from minirlhf import sft
from minirlhf.engine import parallel
from minirlhf.engine.functions import ScoreFunction
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.training import learning_rate, random_stream
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
from minirlhf.siblings import rejection
from minirlhf.siblings.rejection import Samples, choose, collect, kept_rows, measure

END = toy_tokenizer().end_token


# ---- which one is kept ---------------------------------------------------------------------------

def test_choose_hand_example():
    scores, allowed = torch.tensor([[0.2, 0.9, 0.5]] * 3), torch.ones(3, 3) > 0
    allowed[1, 1], allowed[2] = False, False
    assert choose(scores, allowed, "best").tolist() == [1, 2, -1]


def test_the_control_takes_each_allowed_response_alike():
    allowed = torch.tensor([[True, False, True, True]]).expand(6000, 4)
    scores = torch.tensor([[0.0, 9.0, 1.0, 2.0]]).expand(6000, 4)
    choices = choose(scores, allowed, "random", random_stream(0))
    shares = [(choices == number).float().mean().item() for number in range(4)]
    assert shares[1] == 0 and shares[0] == pytest.approx(1 / 3, abs=0.03)
    assert shares[2] == pytest.approx(1 / 3, abs=0.03)


def some_samples() -> Samples:
    """Two prompts with k = 3; of the second one only one response ended."""
    responses = [[7, END], [8, END], [9, 9, END], [7, 7, 7], [8, END], [9, 9, 9]]
    ended = torch.tensor([response[-1] == END for response in responses])
    return Samples(responses, ended, torch.tensor([0.0, 2.0, 1.0, 9.0, -1.0, 8.0]),
                   torch.tensor([1.0, 3.0, 2.0, 0.0, 4.0, 0.0]))


def test_the_best_that_ended_is_kept_and_its_figures_are_told():
    samples, cfg = some_samples(), rejection_config(k=3)
    kept = kept_rows(samples, cfg, 0)
    assert kept == [1, 4]
    row = measure(samples, kept, cfg, sampled=100)
    assert row["score"] == pytest.approx(19 / 6) and row["score_kept"] == pytest.approx(0.5)
    assert row["gold"] == pytest.approx(10 / 6) and row["gold_kept"] == pytest.approx(3.5)
    assert (row["kept"], row["dropped"], row["sampled_tokens"]) == (2, 0, 100 + 15)
    assert row["end_rate"] == pytest.approx(4 / 6) and row["response_len"] == pytest.approx(15 / 6)


def test_a_prompt_none_of_whose_responses_ended_is_left_out_and_counted():
    samples, cfg = some_samples(), rejection_config(k=3)
    samples.ended[4] = False
    kept = kept_rows(samples, cfg, 0)
    assert kept == [1] and measure(samples, kept, cfg, 0)["dropped"] == 1
    samples.ended[:] = False
    with pytest.raises(ValueError, match="round 7: none of 6 responses ended within 6 tokens"):
        kept_rows(samples, cfg, 7)


def test_samples_are_scored_row_by_row_also_in_several_batches(monkeypatch):
    cfg = rejection_config(k=4, missing_end_penalty=2.0)
    policy, prompts = load_network(GPT2, cfg.model), ragged_prompts(6)
    monkeypatch.setattr(rejection, "SAMPLED_ROWS", 10)
    reward = ScoreFunction("--reward", cfg.reward)
    samples = collect(policy, reward, None, toy_tokenizer(), prompts, cfg, 0)
    assert len(samples.responses) == 24 == len(samples.scores) and samples.gold is None
    (red,) = toy_tokenizer().encode(" red")
    for response, ended, score in zip(samples.responses, samples.ended, samples.scores):
        assert (response[-1] == END) == bool(ended) and END not in response[:-1]
        expected = response.count(red) / len(response) - 2.0 * (not ended)
        assert score.item() == pytest.approx(expected)
    assert len({tuple(response) for response in samples.responses}) > 10


def test_a_reward_per_token_counts_with_its_sum():
    def per_token(ids, prompt_lengths, lengths, tokenizer):
        return 1.0 * (torch.arange(ids.shape[1] - 1) >= 0).expand(len(ids), -1)

    cfg = rejection_config(missing_end_penalty=2.0)
    samples = collect(load_network(GPT2, cfg.model), per_token, None, toy_tokenizer(),
                      ragged_prompts(6), cfg, 0)
    expected = [len(response) - 2.0 * (not ended)
                for response, ended in zip(samples.responses, samples.ended)]
    assert samples.scores.tolist() == expected


def test_all_kept_responses_are_passed_equally_often_when_some_prompts_were_dropped(monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "train_step", lambda policy, optimizer, rows, *rest:
                        (seen.extend(rows), (0.0, 0.0))[1])
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)], "peak": 1e-3}])
    cfg = rejection_config(epochs=2, batch_size=4, prompts_per_round=16)
    rejection.train(None, optimizer, list(range(12)), cfg, END, number=1)    # 3 batches, not 4
    assert sorted(seen) == sorted(2 * list(range(12)))


# ---- whole runs ----------------------------------------------------------------------------------

def test_the_best_raise_the_score_and_the_control_does_not(tmp_path):
    gains = {}
    for keep in ("best", "random"):
        run("rejection", tmp_path / keep, keep=keep, rounds=5, prompts_per_round=40)
        rows = read_metrics(str(tmp_path / keep))
        assert [row["round"] for row in rows] == list(range(5))
        gains[keep] = rows[-1]["score"] - rows[0]["score"]
        # the first samples are those of the same policy
        assert rows[0]["score_kept"] - rows[0]["score"] > (0.15 if keep == "best" else -0.1)
    assert gains["best"] > 0.3 and abs(gains["random"]) < 0.15


def test_what_is_trained_on_are_the_kept_responses_after_their_prompts(tmp_path, monkeypatch):
    seen, original = [], sft.train_step

    def noted(policy, optimizer, rows, *rest):
        seen.append(([(row.prompt, row.response) for row in rows],
                     optimizer.param_groups[0]["lr"]))
        return original(policy, optimizer, rows, *rest)

    monkeypatch.setattr(sft, "train_step", noted)
    run("rejection", tmp_path, rounds=2, prompts_per_round=8, batch_size=4, epochs=3,
        warmup_steps=2, max_new_tokens=8)
    rows = read_metrics(str(tmp_path))
    assert [row["kept"] for row in rows] == [8, 8] and len(seen) == 2 * 3 * 2
    expected = [learning_rate(step, 12, 5e-3, 2, "linear") for step in range(12)]
    assert [lr for _, lr in seen] == pytest.approx(expected)
    epochs = [sorted(seen[first][0] + seen[first + 1][0]) for first in range(0, 12, 2)]
    assert epochs[0] == epochs[1] == epochs[2] != epochs[3] == epochs[4] == epochs[5]
    for prompt, response in epochs[0] + epochs[3]:
        assert prompt[0] == END and response[-1] == END and len(response) <= 8
    assert len(epochs[0]) == len(epochs[3]) == 8


def test_a_run_is_published_like_the_others_with_its_columns(tmp_path):
    row = run("rejection", tmp_path, rounds=1, **with_reward_model())
    assert list(row) == rejection.METRICS and math.isfinite(row["loss"])
    assert read_json(str(tmp_path / "run.json"))["command"] == "Rejection"
    start = load_network(GPT2, rejection_config().model)
    assert load_network(GPT2, str(tmp_path)).config == start.config
    assert b"round 0, kept" in files_of(tmp_path)["samples.txt"]


def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run("rejection", whole)
    stop("rejection", stopped, rejection, "train", 3)
    run("rejection", stopped, resume=True)
    assert files_of(stopped) == files_of(whole)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"k": 1}, "--k is 1, expected at least 2: of one response there is no best"),
    ({"keep": "worst"}, "--keep is 'worst', expected one of best, random"),
    ({"rounds": 0}, "--rounds is 0, expected a value from 1")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rejection_config(**options)


def test_more_prompts_per_round_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="100 prompts that leave room for a response, expected at "
                                         "least 101"):
        run("rejection", tmp_path, prompts_per_round=101)


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel, "first_alone", lambda function, *words: function(*words))
    with pytest.raises(ValueError, match="runs in one process; start it without torchrun"):
        quietly(rejection.main, rejection_config(out=str(tmp_path)))


def test_a_reward_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="scores is not finite at round 0"):
        run("rejection", tmp_path, reward="helpers:nan_reward")
