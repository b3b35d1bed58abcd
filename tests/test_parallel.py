"""parallel.py and the parts of a step: N processes, or N parts, give what one gives.

Two real processes with gloo are started by torchrun, as a user would do it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import (ppo_config, quietly, reward_config, reward_folder, sft_config, toy_model,
                     weights_equal)
from minirlhf import gpt2, parallel, ppo, reward_model, sft
from minirlhf.common import read_metrics
from minirlhf.gpt2 import GPT2, ScalarModel

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINERS = {"sft": (sft, sft_config), "reward_model": (reward_model, reward_config),
            "ppo": (ppo, ppo_config)}
SMALL = {"sft": {"examples": 120, "epochs": 1, "eval_every": 3, "save_every": 3},
         "reward_model": {"comparisons": 160, "epochs": 1, "eval_every": 2, "norm_samples": 70},
         "ppo": {"iterations": 3, "batch_size": 9, "minibatch_size": 4, "kl_target": 0.5,
                 "kl_horizon": 20.0, "reward": "REWARD"}}


def options_of(name: str, **options) -> dict:
    """Options under which every statistic over the whole batch matters, with uneven shares."""
    found = {**SMALL[name], **options}
    if found.get("reward") == "REWARD":
        found["reward"] = reward_folder()
    return found


def arguments_of(cfg) -> list[str]:
    """A config as a command line."""
    words = []
    for field in cfg.__dataclass_fields__:
        value = getattr(cfg, field)
        if isinstance(value, bool):
            words.append(f"--{field}" if value else f"--no-{field}")
        else:
            words += [f"--{field}", str(value)]
    return words


def torchrun(name: str, cfg, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a trainer in several processes; it must succeed."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         "--standalone", "-m", f"minirlhf.{name}", *arguments_of(cfg)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, text=True,
        capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def assert_close(one: str, other: str, model_class, tolerance: float) -> None:
    """Two runs' metrics and networks agree up to the order of float32 sums.

    The networks are compared by what they compute. Some weights have no gradient but rounding (the
    keys' biases, which softmax cancels), and Adam makes full steps of it.
    """
    first, second = read_metrics(one), read_metrics(other)
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a == pytest.approx(b, rel=1e-2, abs=tolerance), (a, b)
    ids = torch.randint(0, 300, (20, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [model_class.from_pretrained(folder)(ids) for folder in (one, other)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=10 * tolerance)


MODELS = {"sft": GPT2, "reward_model": ScalarModel, "ppo": GPT2}


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_give_what_one_gives(name, tmp_path):
    module, config = TRAINERS[name]
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    quietly(module.main, config(**options_of(name, out=one)))
    done = torchrun(name, config(**options_of(name, out=two)))
    assert_close(one, two, MODELS[name], 2e-3)
    assert done.stdout.count("held out" if name != "ppo" else "PPO: 3 iterations") >= 1
    lines = [line for line in done.stdout.split("\n") if "iteration   0" in line or "step    3" in
             line or "step    2" in line]
    assert len(lines) == 1, "more than one process prints"


@pytest.mark.parametrize("name, options", [
    ("sft", {"accumulation": 3}), ("sft", {"checkpointing": True}),
    ("reward_model", {"accumulation": 3}), ("reward_model", {"checkpointing": True}),
    ("ppo", {"accumulation": 2}), ("ppo", {"checkpointing": True}),
    ("ppo", {"accumulation": 5, "critic": "shared", "ent_coef": 0.01})])
def test_memory_saving_options_change_nothing_else(name, options, tmp_path):
    module, config = TRAINERS[name]
    plain, saving = str(tmp_path / "plain"), str(tmp_path / "saving")
    kept = {key: value for key, value in options.items()
            if key not in ("accumulation", "checkpointing")}
    quietly(module.main, config(**options_of(name, out=plain, **kept)))
    quietly(module.main, config(**options_of(name, out=saving, **options)))
    assert_close(plain, saving, MODELS[name], 2e-3)


def test_checkpointing_keeps_less_for_backward():
    ids = torch.randint(0, 300, (4, 30))
    sizes = []
    for checkpointing in (False, True):
        model = toy_model(n_layer=6)
        model.checkpointing = checkpointing
        kept = []

        def pack(tensor):
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.clone):
            model.hidden(ids).sum().backward()
        sizes.append(sum(kept))
    assert sizes[1] < 0.2 * sizes[0]


def test_a_share_covers_every_row_once(monkeypatch):
    for total in (0, 1, 5, 8):
        for count in (1, 2, 3, 7):
            monkeypatch.setattr(parallel, "processes", lambda: count)
            rows = []
            for number in range(count):
                monkeypatch.setattr(parallel, "rank", lambda: number)
                rows += list(range(total))[parallel.share(total)]
            assert rows == list(range(total))


@pytest.mark.parametrize("name", TRAINERS)
def test_bfloat16_computes_in_half_precision_and_keeps_float32_weights(name, tmp_path, monkeypatch):
    module, config = TRAINERS[name]
    seen = set()
    original = gpt2.MLP.forward

    def watched(self, x):
        y = original(self, x)
        seen.add((y.dtype, self.c_fc.weight.dtype))
        return y

    monkeypatch.setattr(gpt2.MLP, "forward", watched)
    out = str(tmp_path / "bf16")
    quietly(module.main, config(**options_of(name, out=out, dtype="bfloat16")))
    assert seen == {(torch.bfloat16, torch.float32)}
    whole = str(tmp_path / "f32")
    quietly(module.main, config(**options_of(name, out=whole)))
    last, expected = read_metrics(out)[-1], read_metrics(whole)[-1]
    key = {"sft": "held_out_loss", "reward_model": "held_out_loss", "ppo": "score"}[name]
    assert last[key] == pytest.approx(expected[key], abs=0.3)
    assert not weights_equal(MODELS[name].from_pretrained(out),
                             MODELS[name].from_pretrained(whole))


def test_statistics_stay_in_float32_under_bfloat16(monkeypatch):
    cfg = ppo_config(**options_of("ppo", dtype="bfloat16"))
    networks, ref_policy = ppo.make_networks(cfg)
    with parallel.precision(cfg):
        for critic in (networks, ppo.PolicyWithValue(networks.policy, None)):
            ids, mask = torch.randint(0, 300, (2, 6)), torch.ones(2, 5, dtype=torch.bool)
            assert {x.dtype for x in critic(ids, mask, 1.0)} == {torch.float32}
        cache = gpt2.KVCache(ref_policy.config, torch.tensor([3]), 5, ref_policy.wte.weight)
    assert cache.keys.dtype == torch.bfloat16            # as keys come: half of the memory


@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("name", TRAINERS)
def test_accumulation_computes_fewer_rows_at_a_time(name, accumulation, tmp_path, monkeypatch):
    rows, batch_rows = [], {"sft": 16, "reward_model": 32, "ppo": 5}[name]
    original = GPT2.hidden

    def counted(self, ids, cache=None):
        if torch.is_grad_enabled():                      # the passes that are trained through
            rows.append(len(ids))
        return original(self, ids, cache)

    monkeypatch.setattr(GPT2, "hidden", counted)
    module, config = TRAINERS[name]
    options = options_of(name, out=str(tmp_path), accumulation=accumulation)
    if name == "ppo":
        options["minibatch_size"] = 5
    quietly(module.main, config(**options))
    part = -(-batch_rows // (accumulation * (2 if name == "reward_model" else 1)))
    assert max(rows) == part * (2 if name == "reward_model" else 1)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_trained_network_obeys_checkpointing(critic, tmp_path, monkeypatch):
    networks, ref_policy = ppo.make_networks(ppo_config(critic=critic, checkpointing=True))
    trunks = [networks.policy] + ([networks.critic.transformer] if networks.critic else [])
    assert all(trunk.checkpointing for trunk in trunks)
    calls, original = [], gpt2.checkpoint

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(gpt2, "checkpoint", counted)
    for name in ("sft", "reward_model"):
        module, config = TRAINERS[name]
        calls.clear()
        quietly(module.main, config(**options_of(name, out=str(tmp_path / name),
                                                 checkpointing=True)))
        assert calls


@pytest.mark.parametrize("options, words", [
    ({"device": "tpu"}, "--device is 'tpu', expected one of cpu, cuda, mps"),
    ({"dtype": "float16"}, "--dtype is 'float16', expected one of float32, bfloat16"),
    ({"accumulation": 0}, "--accumulation is 0"), ({"save_every": 0}, "--save_every is 0")])
def test_bad_hardware_options_are_refused(options, words):
    for _, config in TRAINERS.values():
        with pytest.raises(ValueError, match=words):
            config(model="m", **({"reward": "r"} if config is ppo_config else {}), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named():
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no CUDA device"):
        sft_config(device="cuda")


