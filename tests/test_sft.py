"""sft.py: the loss, what it sees, accumulation, and a run that learns."""

import copy
import math
import os

import pytest
import torch
from helpers import (
    base_folder,
    demonstrations,
    grad_norm_of,
    metrics_without_time,
    quietly,
    sft_config,
    sft_folder,
    toy_model,
    toy_tokenizer,
    weights_equal,
)
from precision import EXPECTED_DTYPES, record_dtypes

from minirlhf import sft
from minirlhf.data import encode_prompt, encode_response
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.training import learning_rate
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, token_logprobs
from minirlhf.sft import Demonstration, batch_loss, evaluate, make_batch, sft_loss, train_step
from minirlhf.tokenizer import Tokenizer

END = toy_tokenizer().end_token


def ragged_rows(count: int = 7) -> list[Demonstration]:
    tokenizer = toy_tokenizer()
    return [Demonstration(encode_prompt(tokenizer, f"Prompt: {'so ' * (i % 3)}?\nResponse:"),
                          encode_response(tokenizer, "red blue " * (1 + i % 4)))
            for i in range(count)]


def slow_log_probability(model: GPT2, row: Demonstration) -> float:
    """Sum of the response's log-probabilities, one token at a time, each from its own prefix."""
    total, ids = 0.0, list(row.prompt)
    for token in row.response:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        total += logits.double().log_softmax(0)[token].item()
        ids.append(token)
    return total


# ---- the loss ------------------------------------------------------------------------------------

def test_sft_loss_hand_example():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]])
    assert sft_loss(logprobs, torch.tensor([[True, True, False]]), 2).item() == 1.5


def test_sft_loss_gradcheck():
    logprobs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 5) > 0.4
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, mask, 4), logprobs)


# ---- what it sees --------------------------------------------------------------------------------

def test_the_mask_holds_the_response_and_its_end_token_only():
    rows = ragged_rows()
    ids, mask = make_batch(rows, END)
    for row, row_ids, row_mask in zip(rows, ids, mask):
        actions = row_ids[1:][row_mask].tolist()
        assert actions == row.response and actions[-1] == END


def test_batch_loss_equals_one_token_at_a_time():
    model, rows = toy_model(), ragged_rows()
    count = sum(len(row.response) for row in rows)
    expected = -sum(slow_log_probability(model, row) for row in rows) / count
    whole = batch_loss(model, *make_batch(rows, END), count).item()
    assert whole == pytest.approx(expected, rel=1e-5)
    in_parts = evaluate(model, rows, sft_config(batch_size=3), END)     # 3 + 3 + 1 rows
    assert in_parts == pytest.approx(expected, rel=1e-5)


def test_the_end_token_gets_gradient_and_prompt_and_padding_get_none():
    rows = [Demonstration([END, 5, 6], [7, END]), Demonstration([END, 5], [END])]
    ids, mask = make_batch(rows, END)                                               # (2, 5)
    V = toy_tokenizer().vocab_size
    logits = torch.zeros(2, 5, V, requires_grad=True)    # as hidden states, unembedded by identity
    logprobs, _ = token_logprobs(logits, ids, mask, torch.eye(V))
    sft_loss(logprobs, mask, 3).backward()
    touched = logits.grad.abs().sum(dim=2) > 0                                      # (2, 5)
    assert touched.tolist() == [[False, False, True, True, False],
                                [False, True, False, False, False]]
    assert logits.grad[0, 3, END] < 0 and logits.grad[1, 1, END] < 0     # descent raises its logit


# ---- a step --------------------------------------------------------------------------------------

@pytest.mark.parametrize("accumulation", [2, 4, 100])
def test_accumulation_changes_neither_loss_nor_gradient(accumulation):
    rows, first, second = ragged_rows(7), toy_model(), toy_model()
    results = []
    for model, parts in ((first, 1), (second, accumulation)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        cfg = sft_config(accumulation=parts, max_grad_norm=1e6, batch_size=7)
        results.append(train_step(model, optimizer, rows, cfg, END, "step 0"))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    held_out = evaluate(first, rows, sft_config(batch_size=7), END)
    assert results[0][0] == pytest.approx(held_out, rel=1e-5)
    for one, other in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_after_backward():
    model = toy_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    cfg = sft_config(max_grad_norm=0.01)
    _, norm = train_step(model, optimizer, ragged_rows(), cfg, END, "step 0")
    assert norm > 0.1                                    # what is reported is the norm before
    assert grad_norm_of(model.parameters()) == pytest.approx(0.01, rel=1e-3)


def test_a_step_forgets_the_gradient_of_the_step_before():
    fresh, used = toy_model(), toy_model()
    cfg = sft_config(max_grad_norm=1e6)
    for model, steps in ((fresh, 1), (used, 3)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(steps):
            train_step(model, optimizer, ragged_rows(), cfg, END, "step 0")
    norms = [grad_norm_of(model.parameters()) for model in (fresh, used)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    model = toy_model()
    with torch.no_grad():
        model.ln_f.bias[0] = math.inf
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.h.state_dict())
    with pytest.raises(FloatingPointError, match="loss is not finite at step 3"):
        train_step(model, optimizer, ragged_rows(), sft_config(), END, "step 3")
    assert all(torch.equal(value, before[name]) for name, value in model.h.state_dict().items())


# ---- whole runs ----------------------------------------------------------------------------------

def test_sft_learns_the_demonstrations():
    folder = sft_folder()
    model, tokenizer = load_network(GPT2, folder), Tokenizer.load(folder)
    rows = [Demonstration(encode_prompt(tokenizer, f"Prompt: {row['prompt']}\nResponse:"),
                          encode_response(tokenizer, row["response"]))
            for row in demonstrations(50, seed=99)]
    before = evaluate(load_network(GPT2, base_folder()), rows, sft_config(), END)
    after = evaluate(model, rows, sft_config(), END)
    assert before > 5 and after < 1.6                    # log 3 for a colour, some for the length


def test_metrics_have_a_row_per_step_with_warm_up_and_cosine():
    rows = read_metrics(sft_folder())
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == 2 * math.ceil((1200 - 48) / 16)  # epochs, examples, held_out, batch_size
    expected = [learning_rate(step, len(rows), 1e-2, 5, "cosine") for step in range(len(rows))]
    assert [row["lr"] for row in rows] == pytest.approx(expected, rel=1e-5)
    measured = [row["step"] for row in rows if "held_out_loss" in row]
    assert measured == [50, 100, len(rows)]
    assert rows[-1]["held_out_loss"] < 1.6


def test_the_held_out_loss_is_that_of_the_saved_model():
    rows = demonstrations(1200, seed=0)[:48]
    tokenizer = toy_tokenizer()
    rows = [Demonstration(encode_prompt(tokenizer, f"Prompt: {row['prompt']}\nResponse:"),
                          encode_response(tokenizer, row["response"])) for row in rows]
    loss = evaluate(load_network(GPT2, sft_folder()), rows, sft_config(batch_size=5), END)
    assert read_metrics(sft_folder())[-1]["held_out_loss"] == pytest.approx(loss, rel=1e-4)


def test_samples_are_written_at_every_evaluation():
    with open(os.path.join(sft_folder(), "samples.txt"), encoding="utf-8") as file:
        text = file.read()
    assert [line for line in text.split("\n") if line.startswith("step ")] == [
        "step 50", "step 100", "step 144"]
    assert text.count("Prompt: Colours for") == 12


SHORT = {"examples": 80, "held_out": 16, "epochs": 1}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    folders = [str(tmp_path / name) for name in "abc"]
    results = [quietly(sft.main, sft_config(out=folder, seed=seed, **SHORT))
               for folder, seed in zip(folders, (3, 3, 4))]
    models = [load_network(GPT2, folder) for folder in folders]
    assert results[0] == results[1] != results[2]
    assert metrics_without_time(folders[0]) == metrics_without_time(folders[1])
    assert weights_equal(models[0], models[1]) and not weights_equal(models[0], models[2])


def test_main_returns_the_last_row_of_metrics(tmp_path):
    result = quietly(sft.main, sft_config(out=str(tmp_path), **SHORT))
    assert result == pytest.approx(read_metrics(str(tmp_path))[-1], rel=1e-6)


def test_a_batch_of_one_and_responses_with_no_room_for_samples_run(tmp_path):
    result = quietly(sft.main, sft_config(out=str(tmp_path), examples=6, held_out=2, epochs=1,
                                          batch_size=1, max_new_tokens=1000, warmup_steps=0))
    assert result["step"] == 4 and math.isfinite(result["held_out_loss"])


def test_the_last_samples_are_printed_whole(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "one step at a time", "response": "red"}\n' * 6, encoding="utf-8")
    cfg = sft_config(data=str(data), out=str(tmp_path / "out"), examples=0, held_out=4, epochs=1)
    sft.main(cfg)
    lines = capsys.readouterr().out.split("\n")
    assert "step 1" in lines and sum(" | Response:" in line for line in lines) == 4


def test_holding_out_all_demonstrations_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lower --held_out"):
        quietly(sft.main, sft_config(out=str(tmp_path), examples=10, held_out=10))


# ---- half precision ------------------------------------------------------------------------------

def test_bfloat16_is_of_the_layers_products_alone(tmp_path, monkeypatch):
    cfg = sft_config(dtype="bfloat16", out=str(tmp_path), **SHORT)
    dtypes = record_dtypes(monkeypatch)
    quietly(sft.main, cfg)
    expected = {name: kinds for name, kinds in EXPECTED_DTYPES.items()
                if name != "scores and values"}          # there is no scalar head in this stage
    assert dtypes == expected
    weight = load_network(GPT2, cfg.out).wte.weight
    assert not torch.equal(weight, weight.bfloat16().float())        # no step was rounded away


def test_a_loss_in_bfloat16_is_near_that_in_float32():
    model, rows = load_network(GPT2, sft_folder()), ragged_rows()
    expected = evaluate(model, rows, sft_config(), END)
    model.dtype = "bfloat16"
    rounded = evaluate(model, rows, sft_config(), END)
    assert rounded != expected and rounded == pytest.approx(expected, rel=0.02)
