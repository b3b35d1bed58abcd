"""reward_model.py: loss, statistics, split, padding, normalisation, a run that learns."""

import math
import random

import pytest
import torch
from helpers import (
    comparisons,
    grad_norm_of,
    metrics_without_time,
    quietly,
    reward_config,
    reward_folder,
    sft_folder,
    toy_model,
    toy_tokenizer,
    weights_equal,
)
from precision import EXPECTED_DTYPES, record_dtypes

from minirlhf import reward_model
from minirlhf.data import encode_prompt, encode_response, pad
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network, save_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, ScalarModel
from minirlhf.reward_model import (
    Comparison,
    accuracy,
    bradley_terry_loss,
    calibration_error,
    collect,
    fold_normalisation,
    held_out_scores,
    score_pairs,
    sft_scores,
    split_by_prompt,
    train_step,
)

END = toy_tokenizer().end_token


def toy_reward_model(seed: int = 0) -> ScalarModel:
    torch.manual_seed(seed)
    return ScalarModel(toy_model(seed).config)


def ragged_pairs(count: int = 7) -> list[Comparison]:
    tokenizer, pairs = toy_tokenizer(), []
    for i in range(count):
        pairs.append(Comparison(encode_prompt(tokenizer, f"Prompt: {'so ' * (i % 3)}?\nResponse:"),
                                encode_response(tokenizer, "red " * (1 + i % 4)),
                                encode_response(tokenizer, "blue " * (1 + i % 3))))
    return pairs


def held_out_margins(*arguments) -> torch.Tensor:
    scores = held_out_scores(*arguments)
    return scores[:, 0] - scores[:, 1]


def slow_score(model: ScalarModel, ids: list[int]) -> float:
    """The score of one row by itself: no padding anywhere."""
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].item()


# ---- the loss ------------------------------------------------------------------------------------

def test_bradley_terry_hand_example():
    loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert round(loss.item(), 4) == 0.3133


def test_equal_scores_cost_log_2():
    scores = torch.randn(9, dtype=torch.float64)
    assert bradley_terry_loss(scores, scores).item() == pytest.approx(math.log(2))


def test_the_loss_survives_large_margins():
    chosen = torch.tensor([1000.0, -1000.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2))
    loss.backward()
    assert loss.item() == 500 and chosen.grad.tolist() == [0.0, -0.5]


def test_bradley_terry_gradcheck():
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: bradley_terry_loss(x[0], x[1]), scores)


# ---- accuracy and calibration --------------------------------------------------------------------

def test_accuracy_hand_example_ties_count_half():
    assert accuracy(torch.tensor([2.0, -1.0, 0.0, 1.0])) == 0.625


def test_calibration_hand_example():
    margin = math.log(3)                                 # sigmoid(log 3) is 0.75
    assert calibration_error(torch.tensor([margin, margin, margin, -margin])) < 1e-7
    assert calibration_error(torch.tensor([margin] * 4)) == pytest.approx(0.25)


def test_a_calibrated_model_has_small_error_and_a_boastful_one_large():
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(20_000, generator=generator) * 1.5
    right = torch.rand(20_000, generator=generator) < torch.sigmoid(margins.abs())
    honest = torch.where(right, margins.abs(), -margins.abs())
    assert calibration_error(honest) < 0.02 < 0.1 < calibration_error(honest * 4)


# ---- collecting ----------------------------------------------------------------------------------

def test_no_prompt_is_on_both_sides_of_the_split():
    rng = random.Random(0)
    rows = [Comparison([END, rng.randrange(12)], [rng.randrange(200), END], [3, END])
            for _ in range(100)]
    train, test = split_by_prompt(rows, 20)
    assert 20 <= len(test) < 40 and len(train) + len(test) == 100
    assert not {tuple(row.prompt) for row in train} & {tuple(row.prompt) for row in test}
    assert sorted(map(repr, train + test)) == sorted(map(repr, rows))


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    rows = [Comparison([END, 1], [2, END], [3, END])] * 5
    with pytest.raises(ValueError, match="lower --held_out"):
        split_by_prompt(rows, 1)                         # one prompt cannot be on both sides


def test_both_responses_end_with_the_end_token():
    for row in collect(reward_config(comparisons=20), sft_folder(), toy_tokenizer(), 32):
        assert row.prompt[0] == row.chosen[-1] == row.rejected[-1] == END
        assert END not in row.prompt[1:] + row.chosen[:-1] + row.rejected[:-1]


def test_comparisons_that_do_not_fit_are_dropped_and_counted(capsys):
    rows = collect(reward_config(comparisons=50), sft_folder(), toy_tokenizer(), 14)
    assert 0 < len(rows) < 50 and max(len(row) for row in rows) <= 14
    assert f"({50 - len(rows)} longer ones dropped)" in capsys.readouterr().out


# ---- scores --------------------------------------------------------------------------------------

def test_a_score_does_not_depend_on_padding():
    model = toy_reward_model()
    rows = [row.prompt + row.chosen for row in ragged_pairs()]
    ids, lengths = pad(rows, END)
    expected = [slow_score(model, row) for row in rows]
    with torch.no_grad():
        assert model.score(ids, lengths).tolist() == pytest.approx(expected, abs=1e-5)
        other, _ = pad(rows, 5)
        wider = torch.cat([other, torch.full((len(rows), 3), 7)], dim=1)
        assert model.score(wider, lengths).tolist() == pytest.approx(expected, abs=1e-5)


def test_pairs_are_scored_in_order_chosen_first():
    model, pairs = toy_reward_model(), ragged_pairs()
    with torch.no_grad():
        chosen, rejected = score_pairs(model, pairs, END)
    assert chosen.tolist() == pytest.approx(
        [slow_score(model, row.prompt + row.chosen) for row in pairs], abs=1e-5)
    assert rejected.tolist() == pytest.approx(
        [slow_score(model, row.prompt + row.rejected) for row in pairs], abs=1e-5)
    margins = held_out_margins(model, pairs, reward_config(batch_size=3), END)     # 3 + 3 + 1 pairs
    torch.testing.assert_close(margins, chosen - rejected, atol=1e-5, rtol=0)


def test_samples_are_scored_at_their_own_last_token():
    policy, model, cfg = load_network(GPT2, sft_folder()), toy_reward_model(), reward_config()
    prompts = [row.prompt for row in ragged_pairs(9)]
    made = generate(policy, prompts, cfg.max_new_tokens, end_token=END,
                    generator=random_stream(cfg.seed, 2, 0))
    rows = [ids[:length].tolist() for ids, length in zip(made.ids, made.lengths)]
    assert len({len(row) for row in rows}) > 2
    assert sft_scores(model, policy, prompts, cfg, END).tolist() == pytest.approx(
        [slow_score(model, row) for row in rows], abs=1e-5)


def test_gradient_flows_through_the_end_token_position():
    model, (pair, *_) = toy_reward_model(), ragged_pairs()
    chosen, rejected = score_pairs(model, [pair], END)
    bradley_terry_loss(chosen, rejected).backward()
    assert model.transformer.wte.weight.grad[END].abs().sum() > 0
    assert model.transformer.wpe.weight.grad[len(pair):].abs().sum() == 0        # padding: none


@pytest.mark.parametrize("accumulation", [2, 4, 100])
def test_accumulation_changes_neither_metrics_nor_gradient(accumulation):
    pairs, whole, in_parts = ragged_pairs(7), toy_reward_model(), toy_reward_model()
    rows = []
    for model, parts in ((whole, 1), (in_parts, accumulation)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        cfg = reward_config(accumulation=parts, max_grad_norm=1e6, batch_size=7)
        rows.append(train_step(model, optimizer, pairs, cfg, END, "step 0"))
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    margins = held_out_margins(whole, pairs, reward_config(), END)
    assert rows[0]["accuracy"] == pytest.approx(accuracy(margins))
    for one, other in zip(whole.parameters(), in_parts.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_after_backward_head_included():
    model = toy_reward_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cfg = reward_config(max_grad_norm=0.01)
    norm = train_step(model, optimizer, ragged_pairs(), cfg, END, "step 0")["grad_norm"]
    assert norm > 0.02 and model.score_head.weight.grad.abs().sum() > 0
    assert grad_norm_of(model.parameters()) == pytest.approx(0.01, rel=1e-3)


def test_a_score_that_is_not_finite_stops_the_run():
    model = toy_reward_model()
    with torch.no_grad():
        model.score_head.weight[0, 0] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="chosen_scores is not finite at step 8"):
        train_step(model, optimizer, ragged_pairs(), reward_config(), END, "step 8")


# ---- normalisation -------------------------------------------------------------------------------

@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (3.5, 0.2), (-40.0, 7.0)])
def test_normalisation_is_exact_and_survives_saving(tmp_path, mean, std):
    model = toy_reward_model()
    ids, lengths = pad([row.prompt + row.chosen for row in ragged_pairs()], END)
    with torch.no_grad():
        before = model.score(ids, lengths)
        fold_normalisation(model, mean, std)
        after = model.score(ids, lengths)
        save_network(model, str(tmp_path))
        loaded = load_network(ScalarModel, str(tmp_path)).score(ids, lengths)
    torch.testing.assert_close(after, (before - mean) / std, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, loaded)


# ---- whole runs ----------------------------------------------------------------------------------

def test_the_reward_model_separates_held_out_comparisons():
    last = read_metrics(reward_folder())[-1]
    assert last["held_out_accuracy"] > 0.95 and last["held_out_loss"] < 0.3
    tokenizer, fresh = toy_tokenizer(), []
    for row in comparisons(100, seed=77):
        fresh.append(Comparison(encode_prompt(tokenizer, f"Prompt: {row['prompt']}\nResponse:"),
                                encode_response(tokenizer, row["chosen"]),
                                encode_response(tokenizer, row["rejected"])))
    margins = held_out_margins(load_network(ScalarModel, reward_folder()), fresh, reward_config(),
                               END)
    assert accuracy(margins) > 0.95


def test_the_held_out_figures_are_those_of_the_saved_model():
    cfg = reward_config()
    rows = quietly(collect, cfg, sft_folder(), toy_tokenizer(), 32)
    _, test = split_by_prompt(rows, cfg.held_out)
    margins = held_out_margins(load_network(ScalarModel, reward_folder()), test,
                               reward_config(batch_size=7), END)
    last = read_metrics(reward_folder())[-1]
    assert last["held_out_accuracy"] == pytest.approx(accuracy(margins))


def test_scores_of_sft_samples_have_mean_0_and_deviation_1():
    model, policy = load_network(ScalarModel, reward_folder()), load_network(GPT2, sft_folder())
    rows = quietly(collect, reward_config(), sft_folder(), toy_tokenizer(), 32)
    prompts = [row.prompt for row in rows[:256]]
    scores = sft_scores(model, policy, prompts, reward_config(seed=5), END)      # other samples
    assert abs(scores.mean().item()) < 0.25 and 0.8 < scores.std().item() < 1.2


def test_the_same_seed_gives_the_same_run_and_another_seed_another_member(tmp_path):
    folders = [str(tmp_path / name) for name in "abc"]
    results = [quietly(reward_model.main, reward_config(out=folder, seed=seed, comparisons=60,
                                                        held_out=10, norm_samples=8))
               for folder, seed in zip(folders, (3, 3, 4))]
    models = [load_network(ScalarModel, folder) for folder in folders]
    assert results[0] == results[1] != results[2]
    assert metrics_without_time(folders[0]) == metrics_without_time(folders[1])
    assert weights_equal(models[0], models[1]) and not weights_equal(models[0], models[2])


def test_the_sft_folder_is_left_as_it_was(tmp_path):
    before = load_network(GPT2, sft_folder())
    result = quietly(reward_model.main, reward_config(out=str(tmp_path), comparisons=30, held_out=5,
                                                      norm_samples=2, batch_size=1, warmup_steps=0))
    assert weights_equal(before, load_network(GPT2, sft_folder()))
    assert result == pytest.approx(read_metrics(str(tmp_path))[-1], rel=1e-6)


def test_prompts_without_room_for_samples_are_refused_before_the_training(tmp_path):
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        quietly(reward_model.main, reward_config(out=str(tmp_path), comparisons=30, held_out=5,
                                                 max_new_tokens=31))
    assert not list(tmp_path.iterdir())


# ---- half precision ------------------------------------------------------------------------------

def test_bfloat16_is_of_the_layers_products_alone(tmp_path, monkeypatch):
    """In training, on held-out comparisons and in the SFT model's samples."""
    cfg = reward_config(dtype="bfloat16", out=str(tmp_path), comparisons=60, held_out=10,
                        norm_samples=8)
    dtypes = record_dtypes(monkeypatch)
    quietly(reward_model.main, cfg)
    expected = {name: kinds for name, kinds in EXPECTED_DTYPES.items()
                if name != "log-probabilities"}          # this stage needs none
    assert dtypes == expected


def test_scores_in_bfloat16_are_near_those_in_float32():
    model, pairs = load_network(ScalarModel, reward_folder()), ragged_pairs()
    expected = held_out_margins(model, pairs, reward_config(), END)
    model.transformer.dtype = "bfloat16"
    rounded = held_out_margins(model, pairs, reward_config(), END)
    assert not torch.equal(rounded, expected)
    torch.testing.assert_close(rounded, expected, rtol=0.05, atol=0.05)
