"""lab/: the experiments about PPO's parts, details and cost: their arms, their rules, their own
functions, the exact KL against enumeration; slowly, an arm of each in its quick form.
"""

import itertools
import os
import struct

import numpy as np
import pytest
import torch
from helpers import (
    REPOSITORY,
    metrics_without_time,
    ppo_config,
    quietly,
    reward_folder,
    weights_equal,
)

from minirlhf import ppo
from minirlhf.data import response_mask
from minirlhf.engine import training
from minirlhf.files.disk import read_json
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel, token_logprobs
from minirlhf.lab import (
    collapse,
    credit,
    cures,
    details,
    epochs_of_the_reward_model,
    forgetting,
    gold,
    judges,
    kl_estimators,
    memory,
    stages,
)
from minirlhf.lab.experiment import REFUTED, SHOWN, Rows, verdict
from minirlhf.lab.shared import Task, reward_model_folder
from minirlhf.museum.short_runs import substituted
from minirlhf.ppo import PPOConfig, make_networks
from minirlhf.sft import SFTConfig

# ---- arms, rules and pictures --------------------------------------------------------------------

# what the claim says, as figures of the arms; 1.0 for all that is not named
CLAIMED = {
    collapse: {collapse.FREE: {"distinct": 0.3, "gold": -1.0},
               collapse.BONUS: {"distinct": 0.9, "gold": 2.2},
               collapse.KL: {"distinct": 0.8, "gold": 2.5}},
    judges: {judges.FREE: {"win_rate": 0.2, "by_other": 0.3}},
    stages: {stages.NO_SFT: {"gold": -1.0}, stages.SFT: {"gold": 0.5}, stages.GOLD: {"gold": 2.5},
             stages.NO_REFERENCE: {"gold": 0.0}},
    credit: {"lam 0": {"gold": 0.5}, "lam 1": {"gold": 0.5}, credit.COLD: {"gold_early": 0.5},
             credit.WARM: {"gold_early": 1.5}, credit.AT_END: {"gold_early": 0.2}},
    details: {"value clip off": {"gold": 1.2}},
    forgetting: {"lr 3e-3, 2 epochs": {"fully_right_entity": 0.2, "fully_right_combination": 2.0},
                 "lr 3e-4, 4 epochs": {"fully_right_entity": 0.5, "fully_right_combination": 1.5},
                 "lr 3e-3, 4 epochs": {"fully_right_entity": 0.1, "fully_right_combination": 2.0}},
    epochs_of_the_reward_model: {
        arm: {"held_out_loss": 2.0, "held_out_accuracy": 0.5, "calibration_error": 2.0, "gold": 0.5}
        for arm in ("2 epochs", "4 epochs")},
    kl_estimators: {arm: {"error_k1": 0.01, "error_k3": -0.01, "size_of_error_k2": 0.4,
                          "deviation_k3": 0.5} for arm in kl_estimators.ARMS},
    memory: {"accumulation 4": {"memory": 0.7}, "checkpointing": {"memory": 0.6, "seconds": 1.4},
             "shared critic": {"memory": 0.5}, "bfloat16": {"memory": 0.8}}}
REFUTING = {
    collapse: {collapse.FREE: {"distinct": 0.9, "gold": 1.0},
               collapse.BONUS: {"distinct": 0.5, "gold": 0.0},
               collapse.KL: {"distinct": 0.3, "gold": 2.0}},
    judges: {judges.FREE: {"win_rate": 1.5, "by_other": 1.5}},
    stages: {stages.NO_SFT: {"gold": 2.0}, stages.SFT: {"gold": 2.0}, stages.GOLD: {"gold": 0.0},
             stages.NO_REFERENCE: {"gold": 2.0}},
    credit: {"lam 0": {"gold": 2.0}, "lam 1": {"gold": 2.0}, credit.COLD: {"gold_early": 2.0},
             credit.WARM: {"gold_early": 0.0}, credit.AT_END: {"gold_early": 2.0}},
    details: {arm: {"gold": 1.8} for arm in details.ARMS if arm != details.CONTROL},
    forgetting: {arm: {"fully_right_entity": 2.0, "fully_right_combination": 0.5}
                 for arm in CLAIMED[forgetting]},
    epochs_of_the_reward_model: {
        arm: {"held_out_loss": 0.5, "held_out_accuracy": 2.0, "calibration_error": 0.5, "gold": 2.0}
        for arm in ("2 epochs", "4 epochs")},
    kl_estimators: {arm: {"error_k1": 0.5, "error_k3": -0.5, "size_of_error_k2": 0.02,
                          "deviation_k3": 3.0} for arm in kl_estimators.ARMS},
    memory: {arm: {"memory": 2.0, "seconds": 0.5} for arm in CLAIMED[memory]}}
every_experiment = pytest.mark.parametrize("module", CLAIMED, ids=lambda x: x.ABOUT.name)
SERIES = ("gold", "entropy", "explained_var", "exact", "k1", "k2", "k3")


def rows_of(module, of_arms: dict[str, dict], seeds: int = 4) -> Rows:
    """Figures of all arms that differ a little from seed to seed."""
    names = [*module.ABOUT.figures, *module.ABOUT.units, "gold", "win_rate", "score", "kl_ref",
             *{name for figures in of_arms.values() for name in figures}]
    rows = {}
    for number, arm in enumerate(module.ARMS):
        rows[arm] = []
        for seed in range(seeds):
            off = 0.01 * ((7 * number + 3 * seed) % 5)   # other noise in each arm
            row = {name: of_arms.get(arm, {}).get(name, 1.0) + off for name in names}
            rows[arm].append({**row, **{f"{name}_by_step": [off, 1.0, 2.0] for name in SERIES}})
    return rows


@every_experiment
def test_a_claim_is_shown_when_the_figures_are_as_it_says(module):
    claimed = CLAIMED[module]
    assert set(claimed) <= set(module.ARMS)
    found = module.findings(rows_of(module, claimed))
    assert verdict(found) == SHOWN, [str(finding) for finding in found]
    assert verdict(module.findings(rows_of(module, claimed, seeds=3))) != SHOWN


@every_experiment
def test_every_part_of_a_claim_can_be_refuted(module):
    words = [finding.word for finding in module.findings(rows_of(module, REFUTING[module]))]
    assert words == [REFUTED] * len(words)


@every_experiment
def test_a_picture_is_drawn_of_all_arms(module, tmp_path):
    path = str(tmp_path / "picture.png")
    module.picture(rows_of(module, CLAIMED[module]), path)
    with open(path, "rb") as file:
        data = file.read()
    width, height = struct.unpack(">II", data[16:24])
    assert data[:4] == b"\x89PNG" and width == 1200 and height >= 360 and len(data) > 10_000


@every_experiment
def test_every_figure_has_a_unit_and_the_text_names_rule_and_source(module):
    about = module.ABOUT
    assert about.name == module.__name__.split(".")[-1]
    assert about.rule.startswith("Shown if") and " Refuted if " in about.rule and about.source
    for name in about.figures:
        assert name in about.units or name in UNITS_OF_MEASURE, name


UNITS_OF_MEASURE = ("gold", "score", "win_rate", "kl_ref", "length", "distinct", "fully_right",
                    "end_rate")


def test_all_arms_are_options_that_the_trainers_accept():
    for module in (collapse, stages, credit, kl_estimators):
        for options in module.ARMS.values():
            PPOConfig(**options)
    for options, replacements in details.ARMS.values():
        PPOConfig(**options)
        for owner, name, _ in replacements:
            assert hasattr(owner, name)
    for options in memory.ARMS.values():
        PPOConfig(batch_size=16, minibatch_size=16, **options)
    for options in forgetting.ARMS.values():
        SFTConfig(**options)
    default = SFTConfig()
    assert forgetting.ARMS[forgetting.CONTROL] == {"lr": default.lr, "epochs": default.epochs}
    assert len(forgetting.ARMS) == 9


# ---- functions of the experiments ----------------------------------------------------------------

def test_distinct_answers_are_counted_prompt_by_prompt():
    assert collapse.distinct_per_prompt([list("aabc"), list("aaaa")]) == 0.5
    assert collapse.distinct_per_prompt([list("ab"), list("ab")]) == 1.0     # not over all of them


def test_early_gold_is_that_of_the_second_fifth():
    assert credit.early(list(range(10))) == 2.5
    assert credit.early([1.0, 2.0, 3.0]) == 1.0


def test_a_cold_critic_is_the_sft_model_with_a_head_of_zeros():
    cfg = ppo_config(reward=reward_folder())
    rewarding, _ = make_networks(cfg)
    networks, ref_policy = credit.networks_with_a_cold_critic(cfg)
    assert not weights_equal(rewarding.critic.transformer, networks.policy)
    assert weights_equal(networks.critic.transformer, networks.policy)
    assert weights_equal(ref_policy, networks.policy)
    assert networks.critic.transformer.wte.weight is not networks.policy.wte.weight
    assert (networks.critic.score_head.weight == 0).all()


def test_a_warm_critic_is_all_that_a_run_before_leaves_to_the_next(tmp_path):
    before = str(tmp_path / "before")
    quietly(ppo.main, ppo_config(out=before, iterations=2, critic_warmup=2, seed=1000))
    cfg = ppo_config(out=str(tmp_path / "ppo"), reward=reward_folder())
    assert weights_equal(load_network(GPT2, before), make_networks(cfg)[0].policy)
    networks, ref_policy = credit.networks_with_the_critic_of(before)(cfg)
    assert weights_equal(networks.critic, load_network(ScalarModel, os.path.join(before, "critic")))
    assert (networks.critic.score_head.weight != 0).any()
    assert weights_equal(networks.policy, make_networks(cfg)[0].policy)
    assert weights_equal(ref_policy, networks.policy)


def test_an_early_stop_is_the_longer_run_stopped(tmp_path):
    """Row by row, but for the clock; without the longer run's rates it would not be."""
    whole, stopped, shorter = (str(tmp_path / name) for name in ("whole", "stopped", "shorter"))
    quietly(ppo.main, ppo_config(out=whole, iterations=6, warmup_iterations=1))
    quietly(ppo.main, ppo_config(out=shorter, iterations=3, warmup_iterations=1))
    with substituted([(training, "set_learning_rate", cures.rates_of_a_run_of(6))]):
        quietly(ppo.main, ppo_config(out=stopped, iterations=3, warmup_iterations=1))
    rows = metrics_without_time(whole)
    assert metrics_without_time(stopped) == rows[:3] != metrics_without_time(shorter)
    assert cures.stop_after(25) == 7 and cures.stop_after(1) == 1


def test_gold_is_scaled_as_a_reward_model_is(monkeypatch):
    scores = torch.tensor([1.0, 4.0])
    monkeypatch.setattr(gold.ScoreFunction, "__call__", lambda self, *arguments: scores)
    assert gold.ScaledGold(1.0, 1.5)(None).tolist() == [0.0, 2.0]


def test_k3_in_the_reward_is_never_a_gift_and_has_the_mean_of_k1():
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = details.rewards_with_k3(torch.tensor([1.0]), torch.tensor([[0.5, -0.5]]), mask, 0.1)
    assert rewards.tolist() == [pytest.approx([-0.01065, 1 - 0.01487], abs=1e-5)]
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    costs = details.rewards_with_k3(torch.zeros(2), (p / q).log()[:, None], mask.view(2, 1), 1.0)
    assert (costs <= 0).all()
    assert -(p * costs[:, 0]).sum().item() == pytest.approx(0.1438, abs=1e-4)


def test_the_checks_of_a_run_notice_k3_and_not_the_missing_whitening(tmp_path):
    for arm, stops in (("k3 in the reward", True), ("whitening off", False)):
        _, replacements = details.ARMS[arm]
        cfg = ppo_config(out=str(tmp_path / arm), iterations=3, kl_coef=0.5)
        with substituted(replacements):
            if stops:
                with pytest.raises(ValueError, match="the rewards of a response do not add up"):
                    quietly(ppo.main, cfg)
            else:
                quietly(ppo.main, cfg)
    advantages, mask = torch.tensor([[1.0, 5.0]]), torch.tensor([[True, False]])
    assert details.keep_advantages(advantages, mask).tolist() == [[1.0, 0.0]]


# ---- the exact KL --------------------------------------------------------------------------------

def three_token_model(seed: int) -> GPT2:
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=1))
    with torch.no_grad():
        model.wte.weight.mul_(12)
        model.wpe.weight.mul_(12)
    return model.double().requires_grad_(False)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_kl_in_the_visited_states_has_that_of_whole_responses_as_its_mean(temperature):
    """All responses of at most three tokens, the end token is 2; both directions."""
    responses = [(*head, last) for length in (1, 2, 3) for head in
                 itertools.product((0, 1), repeat=length - 1)
                 for last in ((0, 1, 2) if length == 3 else (2,))]
    ids = torch.tensor([[2, 0, *row] + [2] * (3 - len(row)) for row in responses])  # (B, 5)
    lengths = torch.tensor([2 + len(row) for row in responses])
    mask = response_mask(torch.full_like(lengths, 2), lengths, 5)                   # (B, 4)
    policy, ref_policy = three_token_model(0), three_token_model(1)
    one, other = [token_logprobs(model.hidden(ids), ids, mask, model.wte.weight, temperature)[0]
                  .sum(dim=1) for model in (policy, ref_policy)]                    # (B,) each
    assert one.exp().sum().item() == pytest.approx(1)
    exact, reverse = kl_estimators.exact_kls(policy, ref_policy, ids, mask, temperature)
    kl, back = (one.exp() * (one - other)).sum(), (other.exp() * (other - one)).sum()
    assert kl > 0.05 and abs(kl - back) > 0.01
    assert (one.exp() * exact.sum(dim=1)).sum().item() == pytest.approx(kl.item(), rel=1e-5)
    assert (other.exp() * reverse.sum(dim=1)).sum().item() == pytest.approx(back.item(), rel=1e-5)
    assert (exact >= 0).all() and (exact[~mask] == 0).all() and exact.shape == mask.shape


def test_estimates_of_one_token_have_the_means_that_are_claimed():
    values = kl_estimators.estimates(torch.tensor([0.5]))
    assert [values[name].item() for name in ("k1", "k2", "k3")] == pytest.approx(
        [0.5, 0.125, 0.1065], abs=1e-4)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    means = {name: (p * value).sum().item()
             for name, value in kl_estimators.estimates((p / q).log()).items()}
    assert means["k1"] == pytest.approx(0.1438, abs=1e-4)
    assert means["k3"] == pytest.approx(0.1438, abs=1e-4)
    assert means["k2"] == pytest.approx(0.1612, abs=1e-4)


def test_watching_the_kl_changes_nothing_in_the_run_and_agrees_with_what_it_logs(tmp_path):
    folders = [str(tmp_path / name) for name in ("watched", "plain")]
    options = {"iterations": 4, "batch_size": 16, "minibatch_size": 8, "sample_every": 2}
    watcher = kl_estimators.Watcher()
    with substituted([(ppo, "rollout", watcher)]):
        quietly(ppo.main, ppo_config(out=folders[0], **options))
    quietly(ppo.main, ppo_config(out=folders[1], **options))
    rows = metrics_without_time(folders[0])
    assert rows == metrics_without_time(folders[1])
    assert [note["k1"].mean().item() for note in watcher.notes] == pytest.approx(
        [row["kl_ref"] for row in rows], abs=1e-5)
    first, *later = [note["exact"] for note in watcher.notes]
    assert len(later) == 3 and first.abs().max() < 1e-5
    assert all((exact >= 0).all() and exact.mean() > 1e-3 for exact in later)


# ---- an arm of each, in its quick form -----------------------------------------------------------

def quick_task(out: str, name: str, arm: str) -> Task:
    task = Task(name, arm, 0, out, str(REPOSITORY / "checkpoints" / "tiny"), quick=True)
    os.makedirs(task.folder, exist_ok=True)
    return task


@pytest.fixture(scope="module")
def quick_out(tmp_path_factory) -> str:
    """A folder whose shared stages the tests below use together."""
    return str(tmp_path_factory.mktemp("lab"))


QUICK_ARMS = [(collapse, collapse.BONUS), (judges, judges.FREE), (stages, stages.NO_SFT),
              (stages, stages.GOLD),
              (credit, credit.WARM), (credit, credit.COLD), (credit, credit.PER_TOKEN),
              (details, details.RAW), (details, "dropout in the update"),
              (forgetting, "lr 3e-3, 1 epoch"), (epochs_of_the_reward_model, "2 epochs"),
              (kl_estimators, kl_estimators.NEAR)]


@pytest.mark.slow
@pytest.mark.parametrize("module, arm", QUICK_ARMS, ids=lambda x: getattr(x, "__name__", x))
def test_an_arm_runs_in_its_quick_form(quick_out, module, arm):
    task = quick_task(quick_out, module.ABOUT.name, arm)
    figures = quietly(module.run, task)
    assert set(module.ABOUT.figures) - {"score"} <= set(figures)
    assert all(np.isfinite(value).all() for value in figures.values()), figures
    config = {}
    if os.path.exists(os.path.join(task.folder, "ppo", "run.json")):
        config = read_json(os.path.join(task.folder, "ppo", "run.json"))["config"]
    if arm == stages.NO_SFT:
        assert config["model"] == task.base
        assert figures["gold"] < 0                       # it was not taught to answer
    if arm == stages.GOLD:
        scaled = gold.scaled_gold(task)
        assert -4 < scaled.mean < 4 and 0.5 < scaled.deviation < 4
        assert config["reward"] == reward_model_folder(task)          # the critic starts from it
    if arm == credit.WARM:
        before = read_json(os.path.join(task.folder, "before", "run.json"))["config"]
        assert (before["iterations"], before["critic_warmup"]) == (5, 5)
        assert (config["iterations"], config["critic_warmup"]) == (3, 0)
    if module is details:
        assert figures["stopped"] == (1.0 if arm == "dropout in the update" else 0.0)
    if module is epochs_of_the_reward_model:
        assert figures["spread"] > 0.1 and 0.4 < figures["held_out_accuracy"] < 1


@pytest.mark.slow
def test_a_reward_model_that_is_normalised_afterwards_is_the_one_that_its_trainer_normalised(
        quick_out):
    task = quick_task(quick_out, "epochs_of_the_reward_model", "1 epoch")
    raw = quietly(epochs_of_the_reward_model.raw_reward_model, task)
    folder, spread = quietly(epochs_of_the_reward_model.normalised, task, raw)
    before, after, shipped = [load_network(ScalarModel, one) for one in
                              (raw, folder, quietly(reward_model_folder, task))]
    assert weights_equal(after, shipped) and not weights_equal(before, shipped)
    ids, lengths = torch.randint(before.config.vocab_size, (20, 9)), torch.full((20,), 9)
    with torch.no_grad():
        raw_scores, scores = before.score(ids, lengths), after.score(ids, lengths)
    torch.testing.assert_close((raw_scores - raw_scores.mean()) / spread, scores - scores.mean(),
                               rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(quick_out):
    one, two = [memory.measure_apart(arm, quick=True) for arm in (memory.CONTROL, memory.TWO)]
    assert one["seconds"] == pytest.approx(one["rollout"] + one["update"])
    assert 0.1 < one["memory"] < 2 and 1.5 < two["memory"] / one["memory"] < 2.5
