"""What only a GPU can show: python -m pytest -m gpu

Parity with the CPU in float32, resume bit for bit on one card, nccl with one process, bfloat16.
Without a CUDA device these tests are skipped.
"""

import copy
import os

import pytest
import torch
from helpers import (
    TRAINERS,
    metrics_without_time,
    ppo_config,
    quietly,
    reward_folder,
    torchrun,
    toy_model,
    weights_equal,
)

from minirlhf import ppo
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.options import Stopped
from minirlhf.engine.run_folder import RunFolder
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, ScalarModel, token_logprobs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(),
                                                  reason="PyTorch finds no CUDA device")]
PROMPTS = [[5, 3, 9], [1], [7, 7, 2, 4, 8, 8], [30, 12]]
END = 300
SIZES = {"n_embd": 96, "n_layer": 3, "n_head": 3}
SMALL = {"sft": {"examples": 160, "epochs": 1, "eval_every": 3},
         "reward_model": {"comparisons": 160, "epochs": 1, "eval_every": 2, "norm_samples": 70},
         "ppo": {"iterations": 4}}
MODELS = {"sft": GPT2, "reward_model": ScalarModel, "ppo": GPT2}


def on_both(model) -> tuple:
    """The model, and a copy of it on the card."""
    return model, copy.deepcopy(model).to("cuda")


def samples(model) -> list:
    """Responses to PROMPTS: ids, lengths and log-probabilities, on the CPU."""
    made = generate(model, PROMPTS, 20, end_token=END, generator=random_stream(3))
    return [made.ids.cpu(), made.lengths.cpu(), made.logprobs.cpu()]


# ---- parity --------------------------------------------------------------------------------------

def test_the_card_samples_and_scores_what_the_cpu_does():
    model, there = on_both(toy_model(**SIZES))
    (ids, lengths, logprobs), found = samples(model), samples(there)
    assert torch.equal(ids, found[0]) and torch.equal(lengths, found[1])
    torch.testing.assert_close(logprobs, found[2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_losses_and_gradients_are_those_of_the_cpu(entropy_grad):
    results = []
    for model in on_both(toy_model(**SIZES)):
        device = model.wte.weight.device
        ids = torch.randint(0, 300, (5, 24), generator=random_stream(1)).to(device)
        mask = torch.rand(5, 23, generator=random_stream(2)).to(device) > 0.3
        logprobs, entropy = token_logprobs(model.hidden(ids), ids, mask, model.wte.weight, 0.7,
                                           entropy_grad)
        (logprobs.sum() + entropy_grad * entropy.sum()).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        results.append((logprobs.detach().cpu(), entropy.detach().cpu(), gradients.cpu()))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_run_on_the_card_gives_what_the_cpu_gives(name, tmp_path):
    module, config = TRAINERS[name]
    options = dict(SMALL[name])
    if name == "ppo":
        options["reward"] = reward_folder()
    for device in ("cpu", "cuda"):
        quietly(module.main, config(**options, device=device, out=str(tmp_path / device)))
    rows = [read_metrics(str(tmp_path / device)) for device in ("cpu", "cuda")]
    assert len(rows[0]) == len(rows[1])
    for ours, theirs in zip(*rows):
        assert ours == pytest.approx(theirs, rel=2e-2, abs=5e-3)
    ids = torch.randint(0, 300, (20, 16), generator=random_stream(0))
    with torch.no_grad():
        outputs = [load_network(MODELS[name], str(tmp_path / device))(ids)
                   for device in ("cpu", "cuda")]
    torch.testing.assert_close(*outputs, rtol=1e-2, atol=2e-2)


# ---- resume, processes, precision ----------------------------------------------------------------

@pytest.mark.parametrize("name, options", [("sft", {}), ("reward_model", {}), ("ppo", {}),
                                           ("ppo", {"critic": "shared", "ent_coef": 0.01}),
                                           ("ppo", {"dtype": "bfloat16"}),
                                           ("ppo", {"checkpointing": True, "accumulation": 2})])
def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(name, options, tmp_path,
                                                                monkeypatch):
    module, config = TRAINERS[name]
    options = {**SMALL[name], **options, "device": "cuda", "save_every": 1}
    if name == "ppo":
        options["reward"] = reward_folder()
    quietly(module.main, config(**options, out=str(tmp_path / "whole")))
    log = RunFolder.log

    def interrupt(run, row):
        log(run, row)
        if row.get("step", row.get("iteration")) == 2:
            raise Stopped("interrupted by the test", 2)

    again = config(**options, out=str(tmp_path / "again"), resume=True)
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(RunFolder, "log", interrupt)
        quietly(module.main, again)
    quietly(module.main, again)
    assert metrics_without_time(str(tmp_path / "whole")) == metrics_without_time(
        str(tmp_path / "again"))
    networks = [load_network(MODELS[name], str(tmp_path / run)) for run in ("whole", "again")]
    assert weights_equal(*networks)


def test_one_process_with_nccl_is_a_run_without_it(tmp_path):
    options = {"iterations": 3, "reward": reward_folder(), "device": "cuda"}
    quietly(ppo.main, ppo_config(**options, out=str(tmp_path / "plain")))
    torchrun("ppo", ppo_config(**options, out=str(tmp_path / "nccl")), processes=1)
    assert metrics_without_time(str(tmp_path / "plain")) == metrics_without_time(
        str(tmp_path / "nccl"))


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_bfloat16_samples_from_what_it_scores(critic, tmp_path):
    row = quietly(ppo.main, ppo_config(iterations=3, dtype="bfloat16", device="cuda",
                                       critic=critic, out=str(tmp_path)))
    assert row["ratio_first"] < 0.1 and os.path.exists(tmp_path / "model.safetensors")
