"""The benchmark: its baseline is right, its arithmetic counts right, and how much work is done.

Nothing here is timed. What costs time is counted: passes through the network, and rows of logits.
"""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import quietly
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minirlhf import ppo
from minirlhf.benchmark import __main__ as benchmark
from minirlhf.benchmark import machine, naive, report
from minirlhf.benchmark.iterations import (
    PROMPT_TOKENS,
    Iterations,
    even_tokens,
    forward_flops,
    limits,
    random_model,
)
from minirlhf.engine import fast
from minirlhf.engine.training import random_stream
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import read_config
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue, ScalarModel
from minirlhf.ppo import PPOConfig

ROOT = Path(__file__).resolve().parents[1]
V = 23                              # a size that nothing else in these networks has
SMALL = GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2)
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]
END = SimpleNamespace(end_token=V - 1)


def networks_and_reference() -> tuple[PolicyWithValue, GPT2]:
    """A policy with a value head that says something, and a reference that is another network."""
    torch.manual_seed(0)
    policy, ref_policy = GPT2(SMALL), GPT2(SMALL)
    networks = PolicyWithValue(policy, ScalarModel(SMALL, trunk=policy))
    torch.nn.init.normal_(networks.critic.score_head.weight)
    return networks, ref_policy


def ppo_config(**options) -> PPOConfig:
    return PPOConfig(**{"model": "", "reward": "even_tokens", "gold": "", "critic": "shared",
                        "batch_size": 4, "minibatch_size": 4, "max_new_tokens": 20, "lr": 1e-3,
                        "critic_lr": 1e-3, **options})


# ---- the baseline --------------------------------------------------------------------------------

def test_the_baseline_samples_and_scores_as_ppo_does():
    (networks, ref_policy), cfg = networks_and_reference(), ppo_config()
    iteration = 1                   # in iteration 0 ppo insists that the reference is the policy
    batch = ppo.rollout(networks, ref_policy, even_tokens, END, PROMPTS, cfg, 0.2, iteration)
    assert batch.ended.any() and not batch.ended.all()      # both kinds of response are compared
    uniforms = torch.rand(4, 20, generator=random_stream(cfg.seed, 1, iteration),
                          dtype=torch.float64)
    responses = naive.rollout(networks, ref_policy, even_tokens, END, PROMPTS, uniforms, cfg, 0.2)
    for row, response in enumerate(responses):
        length, mask = batch.lengths[row], batch.response_mask[row]
        assert response.ids.tolist() == [batch.ids[row, :length].tolist()]
        logprobs, ref_logprobs, values = response.columns
        for name, theirs in (("old_logprobs", logprobs), ("old_values", values),
                             ("ref_logprobs", ref_logprobs), ("returns", response.returns),
                             ("advantages", response.advantages)):
            torch.testing.assert_close(theirs, getattr(batch, name)[row, mask], atol=1e-4,
                                       rtol=1e-4, msg=name)


def test_one_step_of_the_baseline_is_one_step_of_ppo():
    cfg = ppo_config(batch_size=1, minibatch_size=1, epochs=1)
    networks, ref_policy = networks_and_reference()
    batch = ppo.rollout(networks, ref_policy, even_tokens, END, PROMPTS[:1], cfg, 0.2, 1)
    ppo.update(networks, torch.optim.SGD(networks.parameters(), lr=0.1), batch, cfg, 1)
    other, ref_policy = networks_and_reference()
    uniforms = torch.rand(1, 20, generator=random_stream(cfg.seed, 1, 1), dtype=torch.float64)
    responses = naive.rollout(other, ref_policy, even_tokens, END, PROMPTS[:1], uniforms, cfg, 0.2)
    naive.update(other, torch.optim.SGD(other.parameters(), lr=0.1), responses, cfg)
    start, _ = networks_and_reference()
    for mine, theirs, before in zip(networks.parameters(), other.parameters(), start.parameters()):
        assert not torch.equal(mine, before)
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


# ---- work, counted -------------------------------------------------------------------------------

class LogitRows(TorchDispatchMode):
    """Counts the rows that matrix products of (rows, C) with the unembedding make."""

    PRODUCTS = ("aten.mm", "aten.addmm", "aten.bmm", "mkldnn._linear_pointwise")

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if str(function).startswith(self.PRODUCTS) and result.shape[-1] == V:
            self.rows += result.numel() // V
        return result


class Passes:
    """Notes the rows and the columns of every forward pass through a network."""

    def __init__(self, model: GPT2):
        self.seen: list[tuple[int, int]] = []
        model.h[0].register_forward_hook(self.note)

    def note(self, module, inputs, output) -> None:
        self.seen.append(tuple(output.shape[:2]))


def test_generation_takes_one_pass_for_the_prompts_and_one_for_each_later_token():
    model = random_model(SMALL, 0)
    passes = Passes(model)
    with LogitRows() as logits:
        generate(model, PROMPTS, 6, end_token=V - 1, generator=random_stream(0))
    assert passes.seen == [(4, 5)] + 5 * [(4, 1)]
    assert logits.rows == 4 * 6


def test_rows_that_ended_are_not_computed_for_ever():
    torch.manual_seed(0)
    model = GPT2(SMALL)
    passes = Passes(model)
    with LogitRows() as logits:
        made = generate(model, PROMPTS * 8, 26, end_token=V - 1, generator=random_stream(0))
    tokens = made.lengths - made.prompt_lengths                                     # (B,)
    assert len(passes.seen) == tokens.max()             # no pass after the last response ended
    for step, (computed, _) in enumerate(passes.seen):
        live = int((tokens > step).sum())               # responses that have a token at this step
        assert 0.75 * computed < live <= computed
    assert logits.rows == sum(computed for computed, _ in passes.seen) < 32 * tokens.max()


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_an_iteration_makes_logits_for_response_positions_only(critic):
    cfg = ppo_config(max_new_tokens=6, epochs=3, critic=critic)
    iterations, positions = Iterations(SMALL, cfg), 4 * 6
    with LogitRows() as logits:
        batch = ppo.rollout(*iterations.inputs, cfg, 0.2, 0)
    assert logits.rows == positions + 2 * positions         # sampling; then policy and reference
    with LogitRows() as logits:
        ppo.update(iterations.networks, iterations.optimizer, batch, cfg, 0)
    assert logits.rows == 3 * positions


def test_the_baseline_makes_logits_for_every_position():
    cfg = ppo_config(batch_size=2, minibatch_size=2, max_new_tokens=3, epochs=2)
    iterations, T = Iterations(SMALL, cfg), PROMPT_TOKENS
    uniforms = torch.rand(2, 3, dtype=torch.float64)
    with LogitRows() as logits:
        responses = naive.rollout(*iterations.inputs, uniforms, cfg, 0.2)
    assert logits.rows == 2 * 2 * (T + T + 1 + T + 2)       # two networks, two rows
    with LogitRows() as logits:
        naive.update(iterations.networks, iterations.optimizer, responses, cfg)
    assert logits.rows == 2 * 2 * (T + 3)                   # two epochs, two rows


def test_an_iteration_takes_no_more_passes_than_it_needs():
    cfg = ppo_config(max_new_tokens=6, epochs=3, critic="separate")
    iterations = Iterations(SMALL, cfg)
    policy, reference, critic = (Passes(iterations.networks.policy), Passes(iterations.inputs[1]),
                                 Passes(iterations.networks.critic.transformer))
    batch = ppo.rollout(*iterations.inputs, cfg, 0.2, 0)
    ppo.update(iterations.networks, iterations.optimizer, batch, cfg, 0)
    whole = (4, PROMPT_TOKENS + 6)
    assert policy.seen == [(4, PROMPT_TOKENS)] + 5 * [(4, 1)] + [whole] + 3 * [whole]
    assert reference.seen == [whole]
    assert critic.seen == [whole] + 3 * [whole]


class FastProducts(TorchDispatchMode):
    """Counts the products that are not PyTorch's stock ones."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += str(function).startswith("mkldnn._linear_pointwise")
        return function(*args, **(kwargs or {}))


def test_the_baseline_uses_stock_products_and_leaves_ours_as_they_were(monkeypatch):
    if not fast.ONEDNN:
        pytest.skip("this build of PyTorch has stock products only")
    monkeypatch.setattr(fast, "PRODUCTS", "onednn")
    wide = GPT2Config(vocab_size=V, n_positions=32, n_embd=256, n_layer=1, n_head=2)
    iterations = Iterations(wide, ppo_config(max_new_tokens=2, epochs=1))
    for run, some in ((iterations.run, True), (iterations.run_naively, False),
                      (iterations.run, True)):
        with FastProducts() as products:
            run()
        assert (products.calls > 0) == some, run


# ---- arithmetic ----------------------------------------------------------------------------------

def test_operations_of_a_tiny_network_are_those_worked_out_by_hand():
    config = GPT2Config(vocab_size=5, n_positions=8, n_embd=2, n_layer=1, n_head=1)
    assert forward_flops(config, 1, 3, 2) == 2 * 48 * 3 + 4 * 2 * (1 + 2 + 3) + 40 == 376
    assert forward_flops(GPT2Config(), 1, 1, 0) == 2 * 84_934_656 + 4 * 768 * 12


def test_operations_are_those_that_pytorch_counts():
    model, ids = GPT2(SMALL), torch.ones(3, 7, dtype=torch.long)
    products = torch.ops.aten.mm, torch.ops.aten.addmm      # attention is counted below
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
        forward = sum(counter.get_flop_counts()["Global"][name] for name in products)
        logits.sum().backward()
        both = sum(counter.get_flop_counts()["Global"][name] for name in products)
    assert both == 3 * forward                              # as `limits` counts an update
    pairs = 3 * 2 * (7 * 8 // 2)                            # rows, layers, pairs of tokens
    assert forward_flops(SMALL, 3, 7, 21) == forward + pairs * 4 * 16


def test_limits_of_the_comparison_are_a_teraflop_for_its_update_and_reading_for_each_new_token():
    full, cfg = GPT2Config(), benchmark.ppo_config()
    slow, quick = {"float32": 1e9, "bfloat16": 1e9}, {"float32": 1e30, "bfloat16": 1e30}
    by_arithmetic = limits(full, cfg, {"gemm": slow, "bandwidth": 1e30})
    assert by_arithmetic["update"] == pytest.approx(1030, rel=0.02)
    assert by_arithmetic["score"] == pytest.approx(2 / 12 * by_arithmetic["update"])
    separate = limits(full, benchmark.ppo_config(critic="separate"), {"gemm": slow,
                                                                      "bandwidth": 1e30})
    assert separate["update"] > 1.7 * by_arithmetic["update"]
    by_reading = limits(full, cfg, {"gemm": quick, "bandwidth": 1e9})
    assert by_reading["sample"] == pytest.approx(31 * 4 * (84_934_656 + 50257 * 768) / 1e9)
    assert by_reading["iteration"] == pytest.approx(by_reading["sample"])
    config = GPT2Config(vocab_size=5, n_positions=64, n_embd=2, n_layer=1, n_head=1)
    two = limits(config, benchmark.ppo_config(batch_size=1, max_new_tokens=2),
                 {"gemm": {"float32": 1}, "bandwidth": 1e30})
    step = 2 * 48 + 4 * 2 * 17 + 2 * 10                     # one token that sees 17
    assert two["sample"] == forward_flops(config, 1, PROMPT_TOKENS, 1) + step
    half = limits(full, benchmark.ppo_config(dtype="bfloat16"),
                  {"gemm": {"float32": 1e9, "bfloat16": 2e9}, "bandwidth": 1e30})
    logits = 2 * 8 * 32 * 768 * 50257 / 1e9                 # of one pass, in float32
    whole = by_arithmetic["score"] / 2
    assert half["score"] == pytest.approx(2 * (logits + (whole - logits) / 2))


# ---- what is measured ----------------------------------------------------------------------------

def test_responses_of_the_random_network_never_end():
    model = random_model(SMALL, 0)
    prompts = torch.randint(V - 1, (64, PROMPT_TOKENS), generator=random_stream(0)).tolist()
    made = generate(model, prompts, 16, end_token=V - 1, generator=random_stream(0))
    assert not made.ended.any()
    assert (model(made.ids)[..., V - 1] < -50).all()


def test_the_tiny_network_is_the_shipped_one():
    assert read_config(str(ROOT / "checkpoints" / "tiny"), GPT2Config) == benchmark.TINY


def test_figures_carry_their_lowest_and_highest():
    assert machine.figure([3, 1, 2]) == {"median": 2, "low": 1, "high": 3, "runs": 3}
    above, below = machine.figure([8, 6, 9]), machine.figure([2, 2, 3])
    assert machine.ratio(above, below) == {"median": 4, "low": 2, "high": 4.5, "runs": 3}
    assert report.show(machine.figure([3, 1, 2]), "s") == "2.0 s (1.0..3.0)"
    assert report.show(machine.figure([2]), "ms", 1000, 0) == "2,000 ms"


def test_only_the_laboratory_imports_the_benchmark():
    for path in (ROOT / "minirlhf").rglob("*.py"):
        if path.parent.name not in ("benchmark", "lab"):
            names = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text("utf-8")))
                     if isinstance(node, (ast.Import, ast.ImportFrom))]
            assert not [name for name in names if "benchmark" in name], path


def test_the_quick_benchmark_writes_every_table(tmp_path):
    out = tmp_path / "new" / "figures.json"
    result = quietly(benchmark.main, benchmark.BenchmarkConfig(quick=True, runs=1, naive_runs=1,
                                                               out=str(out)))
    assert json.loads(out.read_text("utf-8")) == json.loads(json.dumps(result))
    text = out.with_suffix(".md").read_text("utf-8")
    assert text.count("## ") == 4 and result["machine"]["cpu"] in text
    assert min(result["limits"]["gemm"].values()) > 0 and result["limits"]["bandwidth"] > 0
    first, other = result["variants"].values()
    assert set(first["naive"]) == set(report.ROWS) and not other["naive"]
    for variant in (first, other):
        seconds = {phase: figure["median"] for phase, figure in variant["seconds"].items()}
        assert min(seconds.values()) > 0
        assert seconds["iteration"] == pytest.approx(
            seconds["sample"] + seconds["score"] + seconds["update"])
        assert variant["memory"] is None or 1e7 < variant["memory"] < 1e10


    for steps in result["decoding"].values():
        assert min(figure["median"] for name in ("stock", "ours") for figure in
                   steps[name].values()) > 0


def fake_interpreter(folder: Path, program: str) -> str:
    """A file that is started like an interpreter that has TRL."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{program}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a POSIX script")
def test_trls_trainer_is_asked_for_the_same_sizes_and_its_failure_is_a_sentence(tmp_path):
    answer = ("import json, sys\nprint('a word before')\no = json.loads(sys.argv[2])\n"
              "print(json.dumps({'iteration': [o['batch_size'], 2], 'sample': [o['epochs']] * 2}))")
    cfg = benchmark.BenchmarkConfig(trl=fake_interpreter(tmp_path, answer))
    options = benchmark.ppo_config(critic="separate")
    found = benchmark.measure_trl(cfg, SMALL, options)
    assert found["iteration"]["high"] == options.batch_size
    assert found["sample"]["median"] == options.epochs
    cfg = benchmark.BenchmarkConfig(trl=fake_interpreter(tmp_path, "raise KeyError('trl')"))
    with pytest.raises(ValueError, match="TRL's trainer failed: KeyError: 'trl'"):
        benchmark.measure_trl(cfg, SMALL, options)


def test_the_committed_result_makes_every_table_and_its_limits_are_those_of_today():
    result = read_json(str(ROOT / "lectures" / "results" / "benchmark.json"))
    text = report.markdown(result)
    assert text.count("\n## ") == 4 and all(f"| {name} |" in text for name in result["variants"])
    first = result["variants"]["124M parameters, shared critic"]
    expected = limits(GPT2Config(), benchmark.ppo_config(), result["limits"])
    assert first["limits"] == pytest.approx(expected)
