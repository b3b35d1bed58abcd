"""siblings/dpo.py: the losses by hand, by TRL where it is installed, the log-ratios; runs."""

import copy
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from helpers import torchrun, toy_model, toy_tokenizer
from sibling_runs import dpo_config, files_of, run, stop

from minirlhf.engine.metrics import read_metrics
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
from minirlhf.reward_model import Comparison
from minirlhf.siblings import dpo
from minirlhf.siblings.dpo import (
    both_log_ratios,
    check_first_loss,
    dpo_loss,
    estimate_z0,
    evaluate,
    first_loss,
    ipo_loss,
    kto_loss,
    losses,
    mismatched,
    train_step,
)

END = toy_tokenizer().end_token
LOSSES = ("dpo", "ipo", "ipo_mean", "kto")


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- the losses ----------------------------------------------------------------------------------

def test_dpo_hand_example():
    """log pi -3 and -5, log ref -4 and -4."""
    logprobs = double(-3.0).requires_grad_()
    loss = dpo_loss(logprobs - double(-4.0), double(-5.0) - double(-4.0), 0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.5981, abs=5e-5)
    assert logprobs.grad.item() == pytest.approx(-0.0450, abs=5e-5)


def test_ipo_hand_examples():
    assert ipo_loss(double(1.0), double(-1.0), 0.1).item() == pytest.approx(9.0)
    means = ipo_loss(double(1.0) / 2, double(-1.0) / 4, 0.1)
    assert means.item() == pytest.approx(18.0625)


def test_kto_hand_example():
    z0, far = double(0.3), double(1e4)                   # of an example that costs nothing
    assert 2 * kto_loss(double(1.0), -far, 0.1, z0).item() == pytest.approx(0.4825, abs=5e-5)
    assert 2 * kto_loss(far, double(-1.0), 0.1, z0).item() == pytest.approx(0.4675, abs=5e-5)
    assert kto_loss(double(1.0), double(-1.0), 0.1, z0).item() == pytest.approx(0.4750, abs=5e-5)


@pytest.mark.parametrize("loss, expected", [("dpo", math.log(2)), ("ipo", 25.0),
                                            ("ipo_mean", 25.0), ("kto", 0.5)])
def test_with_log_ratios_0_the_loss_is_the_first_loss(loss, expected):
    found = losses(dpo_config(loss=loss, beta=0.1), double(0.0), double(0.0), double(0.0))
    assert found.item() == pytest.approx(expected)
    assert first_loss(loss, 0.1) == pytest.approx(expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_gradcheck(loss):
    cfg = dpo_config(loss=loss, beta=0.3)
    pairs = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: losses(cfg, a, b, double(0.2)), pairs)


def test_dpo_pushes_without_end_and_ipo_up_to_its_target():
    for margin in (4.9, 5.1, 50.0):
        for loss in (dpo_loss, ipo_loss):
            chosen = double(margin).requires_grad_()
            loss(chosen, double(0.0), 0.1).backward()
            up = chosen.grad.item() < 0
            assert up == (loss is dpo_loss or margin < 5.0)


# ---- TRL -----------------------------------------------------------------------------------------

def trl_trainer(name: str):
    """A class of TRL with the method that computes its loss, or the test is skipped."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: our losses are not compared "
                                            "with its ones")
    trainer = getattr(trl, name)
    if not hasattr(trainer, "_compute_loss"):
        pytest.skip(f"TRL {trl.__version__} has no {name}._compute_loss to compare with")
    return trainer


class Shell(SimpleNamespace):
    """Stands for a trainer of TRL: each of its options that is not named is off."""

    def __getattr__(self, name: str):
        return False


class Outputs:
    """Stands for what a model gives to TRL: log-probabilities, zeros for what is only logged."""

    def __init__(self, log_probs: torch.Tensor):
        self.log_probs = log_probs

    def __getattr__(self, name: str) -> torch.Tensor:
        zeros = torch.zeros_like(self.log_probs)
        return zeros.bool() if name.startswith("is_") else zeros


def trl_loss(name: str, model_logprobs, mask, inputs: dict, **settings) -> float:
    """The loss that a trainer of TRL computes from log-probabilities (N, T-1) that are given.

    Its method runs as it is. What stands around it, the accelerator for one, does nothing here.
    """
    shell = Shell(
        model=torch.nn.Linear(1, 1), precompute_ref_logps=True, _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                                    gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)), **settings)
    ids = torch.zeros(mask.shape[0], mask.shape[1] + 1, dtype=torch.long)
    whole_mask = torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1).long()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
             "completion_mask": whole_mask, **inputs}
    loss = trl_trainer(name)._compute_loss(shell, lambda **_: Outputs(model_logprobs), batch, False)
    return loss.item()


def some_logprobs():
    """Log-probabilities of 3 chosen and 3 rejected responses by two models, and their mask."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(6) < torch.tensor([[2], [6], [3], [4], [1], [5]])           # (6, 6)
    policy, reference = [torch.where(mask, -3 * torch.rand(6, 6, generator=generator), 0.0)
                         for _ in range(2)]
    return policy, reference, mask


@pytest.mark.parametrize("loss, name", [("dpo", "sigmoid"), ("ipo_mean", "ipo")])
def test_dpo_and_ipo_equal_trls(loss, name):
    policy, reference, mask = some_logprobs()
    sums = reference.sum(dim=1)
    expected = trl_loss("DPOTrainer", policy, mask, {
        "ref_chosen_logps": sums[:3], "ref_rejected_logps": sums[3:]}, beta=0.1, ld_alpha=None,
        f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0])
    ratios = (policy - reference).sum(dim=1)
    ratios = ratios / mask.sum(dim=1) if loss == "ipo_mean" else ratios
    found = losses(dpo_config(loss=loss, beta=0.1), ratios[:3], ratios[3:], None)
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)


def test_kto_equals_trls():
    policy, reference, mask = some_logprobs()
    strangers = torch.tensor([0.2, 0.9, -0.1, 0.4, 0.0, 0.6])    # log-ratios of mismatched pairs
    expected = trl_loss("KTOTrainer", policy, mask, {
        "label": torch.tensor([True] * 3 + [False] * 3), "ref_logps": reference.sum(dim=1),
        "ref_KL_logps": torch.zeros(6)}, beta=0.1, loss_type="kto", calculate_KL=True,
        desirable_weight=1.0, undesirable_weight=1.0, _compute_kl_logps=lambda *_: strangers)
    ratios = (policy - reference).sum(dim=1)
    found = kto_loss(ratios[:3], ratios[3:], 0.1, strangers.mean())
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)


# ---- log-ratios ----------------------------------------------------------------------------------

ROWS = [Comparison([END, 5, 6], [7, 8, END], [9, END]), Comparison([END, 4], [END], [7, 7, 7, END]),
        Comparison([END, 5, 5, 5], [8, END], [8, 9, END])]


def slow_log_probability(model: GPT2, prompt: list[int], response: list[int]) -> float:
    """Sum of the response's log-probabilities, one token at a time, each from its own prefix."""
    total, ids = 0.0, list(prompt)
    for token in response:
        with torch.no_grad():
            total += model(torch.tensor([ids]))[0, -1].double().log_softmax(0)[token].item()
        ids.append(token)
    return total


@pytest.mark.parametrize("per_token", [False, True])
def test_log_ratios_are_sums_over_the_response_with_its_end_and_without_its_prompt(per_token):
    policy, ref_policy = toy_model(1), toy_model(2)
    found = both_log_ratios(policy, ref_policy, ROWS, END, per_token)
    for which, ratios in zip(("chosen", "rejected"), found):
        for row, ratio in zip(ROWS, ratios.tolist()):
            response = getattr(row, which)
            expected = (slow_log_probability(policy, row.prompt, response)
                        - slow_log_probability(ref_policy, row.prompt, response))
            expected = expected / len(response) if per_token else expected
            assert ratio == pytest.approx(expected, abs=1e-5)


def test_a_rows_log_ratio_does_not_depend_on_its_neighbours():
    policy, ref_policy = toy_model(1), toy_model(2)
    together = both_log_ratios(policy, ref_policy, ROWS, END)
    for row in range(3):
        alone = both_log_ratios(policy, ref_policy, ROWS[row:row + 1], END)
        for one, all_of_them in zip(alone, together):
            assert one.item() == pytest.approx(all_of_them[row].item(), abs=1e-5)


def test_strangers_are_both_responses_of_the_next_row_also_in_an_odd_batch():
    pairs = mismatched(ROWS, 32)
    assert pairs == [(ROWS[0].prompt, ROWS[1].chosen), (ROWS[0].prompt, ROWS[1].rejected),
                     (ROWS[1].prompt, ROWS[2].chosen), (ROWS[1].prompt, ROWS[2].rejected),
                     (ROWS[2].prompt, ROWS[0].chosen), (ROWS[2].prompt, ROWS[0].rejected)]


def test_a_pair_with_its_own_prompt_or_too_long_is_no_stranger():
    twin = Comparison(ROWS[0].prompt, [7, END], [8, END])
    assert mismatched([ROWS[0], twin, ROWS[1]], 32) == [
        (twin.prompt, ROWS[1].chosen), (twin.prompt, ROWS[1].rejected),
        (ROWS[1].prompt, ROWS[0].chosen), (ROWS[1].prompt, ROWS[0].rejected)]
    assert mismatched([ROWS[0], ROWS[1]], 4) == [
        (ROWS[0].prompt, ROWS[1].chosen), (ROWS[1].prompt, ROWS[0].rejected)]
    for rows in ([ROWS[0]], [ROWS[0], twin]):
        with pytest.raises(ValueError, match="no response of a batch of . comparisons can be "):
            mismatched(rows, 32)


def test_z0_is_the_mean_over_strangers_but_not_below_0_and_has_no_gradient():
    policy, ref_policy = toy_model(1), toy_model(2)
    ratios = [slow_log_probability(policy, *pair) - slow_log_probability(ref_policy, *pair)
              for pair in mismatched(ROWS, 32)]
    mean = sum(ratios) / len(ratios)
    for accumulation in (1, 2):
        cfg = dpo_config(loss="kto", batch_size=3, accumulation=accumulation)
        one = estimate_z0(policy, ref_policy, ROWS, cfg, END)
        other = estimate_z0(ref_policy, policy, ROWS, cfg, END)
        assert not one.requires_grad and abs(mean) > 1e-3
        assert one.item() == pytest.approx(max(0.0, mean), abs=1e-5)
        assert other.item() == pytest.approx(max(0.0, -mean), abs=1e-5)


# ---- a step --------------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", LOSSES)
def test_accumulation_changes_neither_metrics_nor_gradient(loss):
    ref_policy, results, models = toy_model(2).requires_grad_(False), [], []
    for accumulation in (1, 3):
        policy = toy_model(1)
        cfg = dpo_config(loss=loss, batch_size=3, accumulation=accumulation, max_grad_norm=1e6)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        row = train_step(policy, ref_policy, optimizer, ROWS, cfg, END, "step 0")
        results.append({name: value or 0.0 for name, value in row.items()})     # "" of z0
        models.append(policy)
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    for one, other in zip(*[model.parameters() for model in models]):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_on_the_mean_loss_and_held_out_figures_are_the_same_quantities(loss):
    policy, ref_policy = toy_model(1), toy_model(2).requires_grad_(False)
    cfg = dpo_config(loss=loss, batch_size=3, max_grad_norm=1e6)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    row = train_step(policy, ref_policy, optimizer, ROWS, cfg, END, "step 0")
    chosen, rejected = both_log_ratios(policy, ref_policy, ROWS, END, loss == "ipo_mean")
    expected = losses(cfg, chosen, rejected, torch.tensor(row["z0"] or 0.0)).mean()
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(expected, list(policy.parameters()))
    for weights, gradient in zip(policy.parameters(), gradients):
        torch.testing.assert_close(weights.grad, gradient, rtol=1e-3, atol=1e-6)
    held_out = evaluate(policy, ref_policy, ROWS, cfg, END, row["z0"] or 0.0)
    for name in ("loss", "accuracy", "chosen_logratio", "rejected_logratio"):
        assert held_out[f"held_out_{name}"] == pytest.approx(row[name], rel=1e-4)
    assert (row["z0"] == "") == (loss != "kto")


def test_a_reference_that_is_not_the_start_stops_the_run():
    for loss in LOSSES:
        cfg = dpo_config(loss=loss)
        expected = first_loss(loss, cfg.beta)
        check_first_loss(expected + 1e-6, cfg)
        with pytest.raises(ValueError, match=f"the first loss is .*, expected {expected:.5g}"):
            check_first_loss(expected + 0.05, cfg)


# ---- whole runs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_learns_the_comparisons(tmp_path, loss):
    row = run("dpo", tmp_path, loss=loss, comparisons=240, held_out=60, epochs=2)
    rows = read_metrics(str(tmp_path))
    assert rows[0]["loss"] == pytest.approx(first_loss(loss, 0.1), abs=1e-4)
    assert rows[0]["accuracy"] == pytest.approx(0.5, abs=0.5)        # margins are rounding
    assert abs(rows[0]["chosen_logratio"]) < 1e-4 and abs(rows[0]["rejected_logratio"]) < 1e-4
    assert row["held_out_accuracy"] > 0.9 and row["held_out_loss"] < first_loss(loss, 0.1)
    assert row["held_out_chosen_logratio"] > row["held_out_rejected_logratio"]
    assert list(row) == dpo.METRICS and ("z0" in rows[-1]) == (loss == "kto")


def test_a_run_is_published_like_the_others(tmp_path):
    run("dpo", tmp_path)
    assert read_json(str(tmp_path / "run.json"))["command"] == "DPO"
    start = load_network(GPT2, dpo_config().model)
    assert load_network(GPT2, str(tmp_path)).config == start.config
    assert {"model.safetensors", "config.json", "metrics.csv"} <= set(files_of(tmp_path))


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(tmp_path, loss):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"loss": loss, "save_every": 2}
    run("dpo", whole, **options)
    stop("dpo", stopped, dpo, "train_step", 6, **options)
    run("dpo", stopped, resume=True, **options)
    assert files_of(stopped) == files_of(whole)


def test_two_processes_give_what_one_gives(tmp_path):
    run("dpo", tmp_path / "one", loss="kto")
    torchrun("siblings.dpo", dpo_config(out=str(tmp_path / "two"), loss="kto"))
    for one, two in zip(*[read_metrics(str(tmp_path / name)) for name in ("one", "two")]):
        assert one == pytest.approx(two, rel=1e-2, abs=5e-3)


def test_the_reference_never_gets_a_gradient():
    policy = toy_model(1)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    before = copy.deepcopy(ref_policy.state_dict())
    train_step(policy, ref_policy, optimizer, ROWS, dpo_config(batch_size=3), END, "step 0")
    assert all(weights.grad is None for weights in ref_policy.parameters())
    assert all(torch.equal(value, before[name]) for name, value in ref_policy.state_dict().items())
    assert not torch.equal(policy.wte.weight, ref_policy.wte.weight)


# ---- bad input -----------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    ({"loss": "kto", "batch_size": 1}, "--batch_size is 1, expected at least 2: KTO pairs"),
    ({"loss": "orpo"}, "--loss is 'orpo', expected one of dpo, ipo, ipo_mean, kto"),
    ({"beta": 0.0}, "--beta is 0.0, expected a value from 1e-06")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dpo_config(**options)


def test_a_batch_that_is_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="are left to train on, expected at least the --batch_size "
                                         "of 500"):
        run("dpo", tmp_path, batch_size=500)


def test_a_batch_of_one_is_no_matter_for_dpo(tmp_path):
    assert run("dpo", tmp_path, batch_size=1, comparisons=40, held_out=8)["step"] >= 20
