"""parallel.py and the parts of a step: N processes, or N parts, give what one gives.

Two real processes with gloo are started by torchrun, as a user would do it.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import (
    TRAINERS,
    environment,
    ppo_config,
    quietly,
    reward_folder,
    sft_config,
    torchrun,
    toy_model,
    toy_tokenizer,
)

from minirlhf import generate, gpt2, ppo
from minirlhf.engine import fast, parallel
from minirlhf.engine.metrics import read_metrics
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, ScalarModel

SMALL = {"sft": {"examples": 120, "epochs": 1, "eval_every": 3, "save_every": 3},
         "reward_model": {"comparisons": 160, "epochs": 1, "eval_every": 2, "norm_samples": 70},
         "ppo": {"iterations": 3, "batch_size": 9, "minibatch_size": 4, "kl_target": 0.5,
                 "kl_horizon": 20.0}}
MODELS = {"sft": GPT2, "reward_model": ScalarModel, "ppo": GPT2}


def options_of(name: str, **options) -> dict:
    """Options under which every statistic over the whole batch matters, with uneven shares."""
    reward = {"reward": reward_folder()} if name == "ppo" else {}
    return {**SMALL[name], **reward, **options}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run by one process in one part; each is run once, when first asked for."""
    folders = {}

    def run(name: str, **options) -> str:
        key = (name, *options.items())
        if key not in folders:
            folders[key] = str(tmp_path_factory.mktemp("plain"))
            module, config = TRAINERS[name]
            quietly(module.main, config(**options_of(name, out=folders[key], **options)))
        return folders[key]
    return run


# ---- whole runs ----------------------------------------------------------------------------------

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
        outputs = [load_network(model_class, folder)(ids) for folder in (one, other)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-2, atol=10 * tolerance)


@pytest.mark.parametrize("name", TRAINERS)
def test_two_processes_give_what_one_gives(name, tmp_path, plain):
    two = str(tmp_path / "two")
    done = torchrun(name, TRAINERS[name][1](**options_of(name, out=two)))
    assert_close(plain(name), two, MODELS[name], 2e-3)
    assert done.stdout.count("held out" if name != "ppo" else "PPO: 3 iterations") >= 1
    lines = [line for line in done.stdout.split("\n") if "iteration   0" in line or "step    3" in
             line or "step    2" in line]
    assert len(lines) == 1, "more than one process prints"


@pytest.mark.parametrize("name, options", [
    ("sft", {"accumulation": 3}), ("sft", {"checkpointing": True}),
    ("reward_model", {"accumulation": 3}), ("reward_model", {"checkpointing": True}),
    ("ppo", {"accumulation": 2}), ("ppo", {"checkpointing": True}),
    ("ppo", {"accumulation": 5, "critic": "shared", "ent_coef": 0.01})])
def test_memory_saving_options_change_nothing_else(name, options, tmp_path, plain):
    module, config = TRAINERS[name]
    kept = {key: value for key, value in options.items()
            if key not in ("accumulation", "checkpointing")}
    quietly(module.main, config(**options_of(name, out=str(tmp_path), **options)))
    assert_close(plain(name, **kept), str(tmp_path), MODELS[name], 2e-3)


def kept_for_backward(model, ids: torch.Tensor) -> int:
    """How many numbers a forward pass keeps for the backward pass."""
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.Tensor.clone):
        model.hidden(ids).sum().backward()
    return sum(kept)


def test_checkpointing_keeps_less_for_backward():
    ids, model = torch.randint(0, 300, (4, 30)), toy_model(n_layer=6)
    plain = kept_for_backward(model, ids)
    model.checkpointing = True
    assert kept_for_backward(model, ids) < 0.2 * plain


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_statistics_stay_in_float32_under_bfloat16(critic):
    networks, ref_policy = ppo.make_networks(ppo_config(**options_of("ppo", dtype="bfloat16",
                                                                     critic=critic)))
    ids, mask = torch.randint(0, 300, (2, 6)), torch.ones(2, 5, dtype=torch.bool)
    assert {x.dtype for x in networks.evaluate_actions(ids, mask, 1.0)} == {torch.float32}
    assert networks.policy(ids).dtype == networks.critic(ids).dtype == torch.float32
    with ref_policy.precision():                         # as keys come: half of the memory
        cache = generate.KVCache(ref_policy.config, torch.tensor([3]), 5, ref_policy.wte.weight)
    assert cache.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_network_of_ppo_has_the_precision_that_was_asked_for(critic):
    for dtype, expected in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        networks, ref_policy = ppo.make_networks(ppo_config(critic=critic, dtype=dtype))
        reward = ppo.load_reward(reward_folder(), "mean", toy_tokenizer(), dtype=dtype)
        for trunk in (networks.policy, networks.critic.transformer, ref_policy,
                      reward.models[0].transformer):
            with trunk.precision():
                assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize("accumulation", [1, 3, 4])
@pytest.mark.parametrize("name", TRAINERS)
def test_accumulation_computes_fewer_rows_at_a_time(name, accumulation, tmp_path, monkeypatch):
    rows, batch_rows = [], {"sft": 16, "reward_model": 32, "ppo": 5}[name]
    module, config = TRAINERS[name]
    options = {"minibatch_size": 5} if name == "ppo" else {}
    cfg = config(**options_of(name, out=str(tmp_path), accumulation=accumulation, **options))
    original = GPT2.hidden

    def counted(self, ids, cache=None):
        if torch.is_grad_enabled():                      # the passes that are trained through
            rows.append(len(ids))
        return original(self, ids, cache)

    monkeypatch.setattr(GPT2, "hidden", counted)
    monkeypatch.setattr(fast, "GROUP", 1000)             # no groups by length
    quietly(module.main, cfg)
    part = -(-batch_rows // (accumulation * (2 if name == "reward_model" else 1)))
    assert max(rows) == part * (2 if name == "reward_model" else 1)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_every_trained_network_of_ppo_obeys_checkpointing(critic):
    networks, _ = ppo.make_networks(ppo_config(critic=critic, checkpointing=True))
    assert networks.policy.checkpointing and networks.critic.transformer.checkpointing


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_the_trained_network_obeys_checkpointing(name, tmp_path, monkeypatch):
    module, config = TRAINERS[name]
    cfg = config(**options_of(name, out=str(tmp_path), checkpointing=True))
    calls, original = [], gpt2.checkpoint

    def counted(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(gpt2, "checkpoint", counted)
    quietly(module.main, cfg)
    assert calls


# ---- shares, parts, sums -------------------------------------------------------------------------

@pytest.fixture
def as_process(monkeypatch):
    """Let this process believe that it is number `rank` of `count`."""
    def pretend(rank: int, count: int) -> None:
        monkeypatch.setattr(parallel, "processes", lambda: count)
        monkeypatch.setattr(parallel, "rank", lambda: rank)
    return pretend


def test_a_share_of_the_docstring(as_process):
    as_process(1, 2)
    assert parallel.share(9) == slice(4, 9)


@pytest.mark.parametrize("total", [0, 1, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_and_their_parts_cover_every_row_once_in_order(as_process, total, count):
    for accumulation in (1, 2, 3, 20):
        shared, parted = [], []
        for rank in range(count):
            as_process(rank, count)
            rows = list(range(total))
            shared += rows[parallel.share(total)]
            parts = parallel.parts(rows, 8, accumulation)
            assert all(0 < len(part) <= -(-8 // accumulation) for part in parts)
            parted += [row for part in parts for row in part]
        assert shared == parted == list(range(total))


def test_parts_are_counted_by_the_batch_not_by_the_rows_that_are_left():
    """The last batch of an epoch is shorter; its parts are as long as those of the others."""
    assert parallel.parts(list(range(5)), 8, 2) == [[0, 1, 2, 3], [4]]
    assert parallel.parts(list(range(8)), 8, 3) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    parts = parallel.parts(torch.arange(5), 8, 2)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4]]


@dataclass
class Batch:
    """Rows of different widths, of four types."""
    ids: torch.Tensor               # (B, T)
    lengths: torch.Tensor           # (B,)
    mask: torch.Tensor              # (B, T-1) bool
    values: torch.Tensor            # (B, T-1)


def rows_of(first: int, last: int, width: int) -> Batch:
    """Rows `first` to `last`; each number names its row and column."""
    rows = torch.arange(first, last)[:, None]
    return Batch(100 * rows + torch.arange(width), rows[:, 0] + 1,
                 (rows + torch.arange(width - 1)) % 2 == 0,
                 rows / 3 + torch.arange(width - 1))


def test_one_process_gets_back_what_it_gives():
    batch, numbers = rows_of(0, 3, 4), [0.1, 2.0]
    layer = torch.nn.Linear(2, 1)
    assert parallel.gather(batch, ids=7) is batch
    assert parallel.gather_rows(batch.ids, 3) is batch.ids
    assert parallel.sums(numbers, torch.device("cpu")) is numbers
    assert parallel.largest_over_processes(0.1, torch.device("cpu")) == 0.1
    assert parallel.first_alone(len, "abc") == 3
    parallel.add_gradients(layer.parameters())
    assert layer.weight.grad is None and (parallel.rank(), parallel.processes()) == (0, 1)


def exercise_two_processes() -> None:
    """What each of two processes runs; row 0 of 3 is the first one's, rows 1 and 2 the other's."""
    parallel.start("cpu")
    rank, device = parallel.rank(), torch.device("cpu")
    assert parallel.processes() == 2
    mine = rows_of(0, 1, 3) if rank == 0 else rows_of(1, 3, 5)
    whole = parallel.gather(mine, ids=7)
    expected = rows_of(0, 3, 5)
    expected.ids[0, 3:], expected.mask[0, 2:], expected.values[0, 2:] = 7, False, 0.0
    for name in ("ids", "lengths", "mask", "values"):
        found = getattr(whole, name)
        assert found.dtype == getattr(expected, name).dtype, name
        assert torch.equal(found, getattr(expected, name)), (name, found)
    numbers = [sum([]), sum([])] if rank == 0 else [1.5, 2.0]    # two ints 0: it had no rows
    assert parallel.sums(numbers, device) == [1.5, 2.0]
    assert parallel.largest_over_processes(float(-rank), device) == 0.0
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(layer.parameters())     # it imports much of PyTorch
    if rank == 1:                                        # the other had no rows: it has no gradient
        layer.weight.grad, layer.bias.grad = torch.ones(1, 1), torch.full((1,), 2.0)
    parallel.add_gradients(layer.parameters())
    assert (layer.weight.grad.item(), layer.bias.grad.item()) == (1.0, 2.0)
    optimizer.step()
    order = []
    parallel.first_alone(order.append, rank)
    assert order == [rank]
    print(f"process {rank}")                             # only process 0 may be heard
    parallel.finish()
    assert not parallel.started()
    if sys.platform.startswith("linux"):                 # they could abort the process at its end
        threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in threads if "gloo" in name], threads


def test_two_processes_put_together_what_each_has(tmp_path):
    script = tmp_path / "two.py"
    script.write_text("import test_parallel\ntest_parallel.exercise_two_processes()\n",
                      encoding="utf-8")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", str(script)], env=environment(), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("process") == 1 and "process 0" in done.stdout


# ---- what is refused -----------------------------------------------------------------------------

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
