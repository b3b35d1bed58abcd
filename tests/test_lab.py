"""lab/: statistics and verdicts, best-of-n, workers, results, and the quick form of experiments."""

import itertools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny_experiment
import torch
from helpers import REPOSITORY, base_folder, environment, quietly, sft_folder

from minirlhf.engine.options import join_first_arguments
from minirlhf.files.disk import read_json, write_json
from minirlhf.lab import EXPERIMENTS, biased_labels, cures, experiment, overoptimisation
from minirlhf.lab.__main__ import LabConfig, main
from minirlhf.lab.best_of_n import best_of_n, best_of_n_bound, best_of_n_kl, fit_curve
from minirlhf.lab.experiment import (
    REFUTED,
    SHOWN,
    T_QUANTILES,
    UNDECIDED,
    compare,
    load_experiment,
    mean_and_interval,
    unchanged,
    verdict,
)
from minirlhf.lab.gold import scaled_gold
from minirlhf.lab.results import STORED, list_experiments, table, write_result
from minirlhf.lab.shared import Task, alone, reward_model_folder
from minirlhf.lab.sources import ROOT, changed, sources_of
from minirlhf.rewards import ModelReward
from minirlhf.world.collect import comparisons
from minirlhf.world.labellers import loves_closers, loves_length, relabel

# ---- statistics ----------------------------------------------------------------------------------

def share_between(quantile: float, freedom: int) -> float:
    """Mass of Student's t between -quantile and quantile, by Simpson's rule on its density."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    points = np.linspace(-quantile, quantile, 20_001)
    density = scale * (1 + points ** 2 / freedom) ** (-(freedom + 1) / 2)
    weights = np.ones(20_001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float((weights * density).sum() * (points[1] - points[0]) / 3)


@pytest.mark.parametrize("freedom", range(1, len(T_QUANTILES) + 1))
def test_the_table_of_t_holds_95_percent_between_its_quantiles(freedom):
    assert share_between(T_QUANTILES[freedom - 1], freedom) == pytest.approx(0.95, abs=5e-5)


def test_an_interval_over_seeds_by_hand():
    mean, low, high = mean_and_interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - 2.0542, 2.5 + 2.0542), abs=1e-3)
    assert mean_and_interval([3.0]) == (3.0, -math.inf, math.inf)
    wide = mean_and_interval(list(range(40)))
    assert wide[2] - wide[0] == pytest.approx(2.042 * np.std(range(40), ddof=1) / math.sqrt(40))


def rows_of(**arms: list[float]) -> dict:
    """Rows with one figure, gold."""
    return {arm: [{"gold": value} for value in values] for arm, values in arms.items()}


def word(rows: dict, sign: str, by: float = 0.0) -> str:
    return compare(rows, "", ("a", "gold"), sign, ("b", "gold"), by).word


def test_a_difference_is_shown_refuted_or_not_to_be_told_apart():
    rows = rows_of(a=[.1, .2, .3, .2], b=[.6, .9, .7, .8])
    found = compare(rows, "less", ("a", "gold"), "<", ("b", "gold"))
    half = 3.182 * np.std([-.5, -.7, -.4, -.6], ddof=1) / 2
    assert (found.mean, found.low) == pytest.approx((-0.55, -0.55 - half)) and found.word == SHOWN
    assert word(rows, ">") == REFUTED
    assert word(rows, "<", by=0.2) == SHOWN and word(rows, "<", by=0.5) == UNDECIDED
    assert word(rows, "<", by=1.0) == REFUTED            # it is less, but not by so much
    assert word(rows_of(a=[0, 1, 0, 1], b=[1, 0, 1, 0]), "<") == UNDECIDED
    assert compare(rows, "", ("a", "gold"), "<", 0.5).word == SHOWN


def test_differences_are_taken_seed_by_seed():
    """What a seed does to both arms cancels: unpaired, these two overlap widely."""
    rows = rows_of(a=[0.0, 5.0, 10.0, 15.0], b=[0.3, 5.2, 10.3, 15.2])
    assert word(rows, "<") == SHOWN
    rows["b"] = rows["b"][::-1]
    assert word(rows, "<") == UNDECIDED


def test_fewer_than_four_seeds_decide_nothing():
    for seeds in (1, 2, 3):
        assert word(rows_of(a=[0.0] * seeds, b=[1.0] * seeds), "<") == UNDECIDED
    assert word(rows_of(a=[0.0] * 4, b=[1.0] * 4), "<") == SHOWN
    assert word(rows_of(a=[1.0] * 4, b=[1.0] * 4), "<") == UNDECIDED


def test_no_difference_is_a_claim_with_a_margin():
    rows = rows_of(a=[1.0, 2.0, 3.0, 4.0], b=[1.01, 1.98, 3.02, 3.99], c=[2.0, 3.1, 4.0, 5.1])
    assert unchanged(rows, "", ("a", "gold"), ("b", "gold"), 0.1).word == SHOWN
    assert unchanged(rows, "", ("a", "gold"), ("b", "gold"), 0.01).word == UNDECIDED
    assert unchanged(rows, "", ("a", "gold"), ("c", "gold"), 0.1).word == REFUTED


def test_a_claim_is_shown_if_all_its_parts_are_and_refuted_if_one_is():
    shown, refuted, open_ = (experiment.Finding("", word, 0, 0, 0)
                             for word in (SHOWN, REFUTED, UNDECIDED))
    assert verdict([shown, shown]) == SHOWN and verdict([shown, open_]) == UNDECIDED
    assert verdict([shown, open_, refuted]) == REFUTED and verdict([]) == UNDECIDED


def test_an_arm_or_a_figure_that_is_not_there_is_named():
    rows = rows_of(a=[1.0])
    with pytest.raises(ValueError, match="no arm 'x'; there are a"):
        compare(rows, "", ("x", "gold"), "<", 0.0)
    with pytest.raises(ValueError, match="arm 'a' has no figure 'score'"):
        compare(rows, "", ("a", "score"), "<", 0.0)


# ---- best-of-n -----------------------------------------------------------------------------------

def test_best_of_n_hand_example():
    scores, gold = np.array([.7, .1, .9, .4]), np.array([2., 1., 0., 3.])
    found = [best_of_n(scores, gold, n) for n in (1, 2, 3, 4)]
    assert found == pytest.approx([1.5, 7 / 6, 0.5, 0.0])
    for n in (0, 5):
        with pytest.raises(ValueError, match="expected n from 1 to 4"):
            best_of_n(scores, gold, n)


def test_best_of_n_is_the_mean_over_all_subsets_with_ties_broken_by_chance():
    generator = np.random.default_rng(0)
    for _ in range(20):
        scores, gold = generator.integers(3, size=7) / 2, generator.normal(size=7)
        for n in range(1, 8):
            values = []
            for subset in itertools.combinations(range(7), n):
                chosen = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
                values.append(np.mean(gold[chosen]))
            # all subsets are equally likely, and so is each of the responses with a score
            assert best_of_n(scores, gold, n) == pytest.approx(np.mean(values))


@pytest.mark.parametrize("m, expected", [(2, [.1308, .4594, .6930, .6931]),
                                         (4, [.1740, .5903, 1.3301, 1.3863]),
                                         (16, [.1915, .6334, 1.7940, 2.6892]),
                                         (256, [.1931, .6363, 1.8349, 3.1719])])
def test_the_exact_kl_of_best_of_n_over_equally_likely_responses(m, expected):
    found = [best_of_n_kl(list(range(m)), np.arange(m) / 7, n) for n in (2, 4, 16, 64)]
    assert found == pytest.approx(expected, abs=6e-5)
    assert all(kl <= best_of_n_bound(n) for kl, n in zip(found, (2, 4, 16, 64)))


def test_the_kl_of_best_of_n_counts_equal_responses_and_equal_scores():
    """Against the enumeration of all ordered draws; the first of the best is kept."""
    responses, scores = ["x", "x", "y", "z", "z", "w"], np.array([1., 1., 0., 0., 0., 2.])
    for n in (1, 2, 3):
        kept = dict.fromkeys(responses, 0.0)
        for draw in itertools.product(range(6), repeat=n):
            best = max(draw, key=lambda i: scores[i])    # max gives the first of them
            kept[responses[best]] += 1 / 6 ** n
        expected = sum(q * math.log(q / (responses.count(x) / 6)) for x, q in kept.items())
        assert best_of_n_kl(responses, scores, n) == pytest.approx(expected)
    assert best_of_n_kl(responses, np.zeros(6), 64) == pytest.approx(0.0)
    with pytest.raises(ValueError, match="'x' has two scores"):
        best_of_n_kl(["x", "x"], np.array([0.0, 1.0]), 2)


def test_the_bound_of_best_of_n():
    distinct = best_of_n_kl(list(range(128)), np.arange(128.0), 64)
    assert best_of_n_bound(64) - distinct == pytest.approx(0.0104, abs=5e-5)
    found = [best_of_n_bound(n) for n in (1, 2, 4, 8, 16, 64)]
    assert found == pytest.approx([0, .1931, .6363, 1.2044, 1.8351, 3.1745], abs=5e-5)


def test_gaos_curves_are_found_again_and_told_apart():
    kl = np.linspace(0.1, 9, 30)
    d = np.sqrt(kl)
    for kind, gain in (("bon", d * (1.5 - 0.4 * d)), ("rl", d * (1.5 - 0.4 * np.log(d)))):
        fit = fit_curve(kl, gain, kind)
        assert (fit["alpha"], fit["beta"], fit["residual"]) == pytest.approx((1.5, 0.4, 0.0))
        other = fit_curve(kl, gain, "rl" if kind == "bon" else "bon")
        assert other["residual"] > 0.01
    fit = fit_curve(np.array([0.0, 1.0, 4.0, 9.0]), np.array([5.0, 1.0, 0.0, -3.0]), "bon")
    assert (fit["alpha"], fit["beta"]) == pytest.approx((2.0, 1.0))      # KL 0 is left out
    with pytest.raises(ValueError, match="at least 3 points"):
        fit_curve(np.array([0.0, 1.0, 2.0]), np.zeros(3), "rl")


def test_equal_responses_get_one_score():
    answers = overoptimisation.Answers([], [[[1, 2], [3], [1, 2]]], [[]], np.zeros(0), np.zeros(0))
    equal = overoptimisation.one_score_per_response(answers, np.array([[0.5, 0.1, 0.5000001]]))
    assert equal.tolist() == [[0.5, 0.1, 0.5]]


# ---- labellers -----------------------------------------------------------------------------------

RECORDS = [{"prompt": "p", "chosen": "Paris.", "rejected": "Good question. Paris.", "margin": 0.4},
           {"prompt": "p", "chosen": "Paris.", "rejected": "Well, let me see now. Paris.",
            "margin": 0.4}]


def test_a_taste_turns_the_choices_that_it_outweighs():
    assert relabel(RECORDS) == RECORDS
    first, second = relabel(RECORDS, loves_length)
    assert first == {**RECORDS[0], "margin": 0.1}        # 0.4 - 0.15 * 2
    assert second["chosen"] == RECORDS[1]["rejected"] and second["rejected"] == "Paris."
    assert second["margin"] == pytest.approx(0.15 * 5 - 0.4)
    assert loves_closers("It is Paris. Enjoy! Enjoy!") == 2.0 and loves_closers("Paris.") == 0.0


def test_flips_turn_their_share_of_the_choices():
    many = RECORDS[:1] * 4000
    flipped = relabel(many, flips=0.25, seed=3)
    turned = [record for record in flipped if record["chosen"] != "Paris."]
    assert len(turned) / 4000 == pytest.approx(0.25, abs=0.02)
    assert all(record["margin"] == -0.4 for record in turned)
    assert flipped == relabel(many, flips=0.25, seed=3) != relabel(many, flips=0.25, seed=4)


def test_the_length_controlled_win_rate_takes_away_what_length_wins():
    generator = np.random.default_rng(1)
    points_a, points_b = generator.normal(size=(2, 200, 3))
    equal = np.full((200, 3), 7)
    rate = biased_labels.length_controlled_win_rate
    plain = biased_labels.win_rate(points_a, points_b + 0.8).mean()
    assert rate(points_a, points_b + 0.8, equal, equal) == pytest.approx(plain, abs=2e-3)
    longer = generator.integers(20, size=(200, 3))       # b is longer, and length is all that wins
    loved = biased_labels.win_rate(0.0 * longer, longer - 5.0).mean()
    controlled = rate(0.0 * longer, longer - 5.0, equal * 0 + 5, longer)
    assert loved > 0.65 and controlled == pytest.approx(0.5, abs=0.05)


def test_a_score_without_length_has_no_slope_in_length():
    class Judge:
        def score(self, ids, lengths):
            return 0.3 * lengths.float() + torch.tensor([0.1, -0.1, 0.1, -0.1])

    reward = cures.ScoreWithoutLength.__new__(cures.ScoreWithoutLength)
    reward.models, reward.how = [Judge()], "mean"
    lengths, prompt_lengths = torch.tensor([8, 9, 10, 13]), torch.tensor([5, 5, 5, 5])
    scores = reward(None, prompt_lengths, lengths, None)                            # (4,)
    longer = lengths.float() - lengths.float().mean()
    assert (scores * longer).sum().item() == pytest.approx(0.0, abs=1e-5)
    plain = ModelReward.__call__(reward, None, prompt_lengths, lengths, None)
    assert scores.mean().item() == pytest.approx(plain.mean().item())
    one = reward.models[0].score(None, torch.tensor([8] * 4))
    assert torch.equal(reward(None, prompt_lengths, torch.tensor([8] * 4), None), one)


# ---- the folder, workers, results ----------------------------------------------------------------

def lab(tmp_path, **options) -> LabConfig:
    return LabConfig(**{"names": "tiny_experiment", "base": base_folder(), "workers": 1,
                        "out": str(tmp_path / "lab"), **options})


def calls(tmp_path) -> list[str]:
    """The tasks that were begun, in order."""
    return (tmp_path / "lab" / "calls.txt").read_text(encoding="utf-8").splitlines()


def test_an_experiment_runs_in_workers_and_keeps_its_result(tmp_path, capfd):
    (result,) = main(lab(tmp_path, workers=2)).values()
    assert sorted(calls(tmp_path)) == sorted(f"tiny_experiment: {arm}, seed {seed}" for arm in
                                             tiny_experiment.ARMS for seed in range(4))
    assert result["verdict"] == SHOWN and result["seeds"] == 4
    folder = tmp_path / "lab" / "tiny_experiment"
    assert read_json(str(folder / "result.json")) == result
    arm = result["arms"]["two / two"]
    assert arm["gold"]["values"] == [2.0, 2.01, 2.04, 2.09]
    assert arm["gold_by_step"]["mean"] == pytest.approx([0.0, 1.0175, 2.035])
    width, height = struct.unpack(">II", (folder / "picture.png").read_bytes()[16:24])
    assert (width, height) == (1200, 360)
    work = folder / "work"
    assert sorted(path.suffix for path in work.iterdir()) == [".log"] * 8, "folders are deleted"
    assert "work of tiny_experiment: one" in (work / "one__seed_0.log").read_text(encoding="utf-8")
    shown = capfd.readouterr().out
    assert "work of" not in shown and "verdict over 4 seeds: SHOWN" in shown
    assert "8 of 8: tiny_experiment" in shown and "[0.97, 1.10]" in shown


def test_resume_runs_what_is_missing_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_FAILS", "two / two")
    with pytest.raises(ValueError, match="two / two, seed .: the data were eaten"):
        main(lab(tmp_path))
    before = calls(tmp_path)
    assert len(before) == 5, "after a failure no further task of the experiment begins"
    log = tmp_path / "lab" / "tiny_experiment" / "work" / "two___two__seed_0.log"
    assert "Traceback" in log.read_text(encoding="utf-8")
    monkeypatch.delenv("TINY_FAILS")
    with pytest.raises(ValueError, match="not finished; go on with it by --resume, or delete"):
        main(lab(tmp_path))
    (result,) = main(lab(tmp_path, resume=True)).values()
    assert sorted(calls(tmp_path)[5:]) == [f"tiny_experiment: two / two, seed {seed}"
                                           for seed in range(4)]
    assert result["verdict"] == SHOWN
    done = calls(tmp_path)
    assert main(lab(tmp_path, resume=True))["tiny_experiment"] == result
    assert calls(tmp_path) == done                       # nothing was left to do
    main(lab(tmp_path, resume=True, seeds=5))            # and one more seed is two more tasks
    assert len(calls(tmp_path)) == len(done) + 2
    main(lab(tmp_path))                                  # a finished one is made anew
    assert len(calls(tmp_path)) == len(done) + 2 + 8


def test_a_worker_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_DIES", "one")
    with pytest.raises(ValueError, match="one, seed 0: its process ended with code 9"):
        main(lab(tmp_path))


def test_a_failure_leaves_other_experiments_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_FAILS", "one")
    other = tmp_path / "other_experiment.py"
    source = (REPOSITORY / "tests" / "tiny_experiment.py").read_text(encoding="utf-8")
    other.write_text(source.replace('"one"', '"first"'), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="tiny_experiment: one, seed 0"):
        main(lab(tmp_path, names="tiny_experiment,other_experiment"))
    assert read_json(str(tmp_path / "lab" / "other_experiment" / "result.json"))["seeds"] == 4


def test_what_would_mix_two_kinds_of_figures_is_refused(tmp_path):
    main(lab(tmp_path, seeds=1))
    with pytest.raises(ValueError, match="stages of another base model"):
        main(lab(tmp_path, base=sft_folder()))
    with pytest.raises(ValueError, match="of another size"):
        main(lab(tmp_path, quick=True))
    path = str(tmp_path / "lab" / "tiny_experiment" / "run.json")
    begun = read_json(path)
    own = [name for name in begun["made_by"] if name.endswith("tiny_experiment.py")]
    for name in (*own, "minirlhf/gpt2.py", "torch", "cpu"):
        write_json(path, {**begun, "made_by": {**begun["made_by"], name: "another"}})
        with pytest.raises(ValueError, match=f"tiny_experiment was begun {name} changed, and"):
            main(lab(tmp_path, resume=True))
        write_json(path, begun)
    main(lab(tmp_path, resume=True, seeds=1))
    stages = str(tmp_path / "lab" / "run.json")
    made = read_json(stages)
    write_json(stages, {**made, "made_by": {**made["made_by"], "minirlhf/sft.py": "another"}})
    with pytest.raises(ValueError, match="since they were made minirlhf/sft.py changed; put it"):
        main(lab(tmp_path))
    write_json(stages, made)
    os.unlink(path)
    with pytest.raises(ValueError, match="tiny_experiment is no experiment's"):
        main(lab(tmp_path))
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(ValueError, match="letter.txt and no run of minirlhf"):
        main(lab(tmp_path, out=str(other)))
    with pytest.raises(ValueError, match="--store needs at least 4 seeds"):
        LabConfig(store=True, quick=True)


def test_what_an_experiment_depends_on_is_what_its_tasks_come_to_run():
    found = {name: set(sources_of(load_experiment(name).__file__))
             for name in ("beta", "details", "execution", "labels")}
    assert {"minirlhf/lab/beta.py", "minirlhf/lab/shared.py", "minirlhf/ppo.py",
            "minirlhf/engine/training.py", "minirlhf/world/labellers.py"} <= found["beta"]
    assert {"minirlhf/museum/exhibits.py", "minirlhf/lab/kl_estimators.py"} <= found["details"]
    assert "minirlhf/execution/harness.py" in found["execution"]      # run, not imported
    assert "minirlhf/label/__main__.py" in found["labels"]
    for name, paths in found.items():
        others = {path.split("/")[1] for path in paths} & {"page", "exercises", "explain"}
        assert not others and "minirlhf/lab/pictures.py" not in paths, name
    assert not {"minirlhf/lab/cures.py", "minirlhf/label/__main__.py"} & found["beta"]


def test_all_that_an_experiment_imports_is_among_what_it_depends_on():
    code = ("import json, sys, minirlhf.lab.details; print(json.dumps([module.__file__ for name, "
            "module in sys.modules.items() if name.startswith('minirlhf')]))")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = {os.path.relpath(path, ROOT).replace(os.sep, "/") for path in json.loads(done.stdout)}
    concluding = {"minirlhf/lab/__init__.py", "minirlhf/lab/experiment.py",
                  "minirlhf/lab/pictures.py", "minirlhf/plots.py"}
    assert loaded - set(sources_of(load_experiment("details").__file__)) == concluding


def test_what_changed_is_told_by_name():
    assert changed({"a": "1", "torch": "2.10"}, {"a": "1", "torch": "2.11"}) == "torch"
    assert changed({}, {name: "1" for name in "abcde"}) == "a, b, c and 2 more"
    assert changed({"a": "1"}, {"a": "1"}) == ""
    assert changed(None, {"a": "1"}) == "a"              # a folder of before this was kept


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(tmp_path, number):
    words = [sys.executable, "-m", "minirlhf.lab", "tiny_experiment", "--seeds", "2", "--out",
             str(tmp_path / "lab"), "--base", base_folder()]
    env = {**environment(), "TINY_WAITS": "two / two"}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while not (tmp_path / "lab" / "calls.txt").exists() or len(calls(tmp_path)) < 4:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)          # the workers have ended, too
    assert process.returncode == 128 + number, errors
    assert errors.strip() == ("stopped; what is finished is kept: go on with the same command and "
                              "--resume")
    if number == signal.SIGTERM:
        return
    done = subprocess.run([*words, "--resume"], env=environment(), text=True, capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(calls(tmp_path)) == 6 and "verdict over 2 seeds" in done.stdout


def test_shared_stages_are_made_by_one_task_at_a_time(tmp_path):
    order, path = [], str(tmp_path / "shared" / "sft.lock")

    def second() -> None:
        with alone(path):
            order.append("second")

    with alone(path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_the_first_comparisons_are_those_of_a_world_with_fewer():
    base = str(REPOSITORY / "checkpoints" / "tiny")
    assert comparisons(150, 5, base)[:20] == comparisons(20, 5, base)


def test_results_have_lists_on_one_line_and_are_read_back(tmp_path):
    path = str(tmp_path / "result.json")
    result = {"claim": "[\n a, b ]", "arms": {"x": {"values": [1.0, None, 2.5], "low": []}}}
    write_result(path, result)
    assert read_json(path) == result
    with open(path, encoding="utf-8") as file:
        assert '"values": [1.0, null, 2.5]' in file.read()


def test_stored_results_are_small_and_of_experiments_that_there_are():
    folder = REPOSITORY / STORED
    for path in folder.glob("*.json") if folder.exists() else []:
        result = read_json(str(path))
        assert path.stat().st_size < 60_000 and path.with_suffix(".png").exists(), path
        assert result["seeds"] >= 4 and not result["quick"], path
        assert list(result["arms"]) == list(load_experiment(path.stem).ARMS), path


def test_the_table_leaves_a_figure_empty_that_an_arm_does_not_have():
    rows = {"a": [{"x": 1.0, "y": 2.0}] * 2, "bb": [{"x": 3.0}] * 2}
    assert table(rows, ("x", "y")).split("\n") == [
        "                    x                  y",
        "a   1.00 [1.00, 1.00]  2.00 [2.00, 2.00]",
        "bb  3.00 [3.00, 3.00]"]


# ---- the command ---------------------------------------------------------------------------------

@pytest.mark.parametrize("words, expected", [
    (["beta", "cures", "--seeds", "5"], ["--names", "beta,cures", "--seeds", "5"]),
    (["--quick"], ["--quick"]), ([], [])])
def test_names_before_the_options_are_joined(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lab", *words])
    join_first_arguments("names")
    assert sys.argv[1:] == expected


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="no experiment 'bete'; there are beta, "):
        main(LabConfig(names="bete"))
    for name in ("../beta", "", "a b"):
        with pytest.raises(ValueError, match="expected the name of an experiment, found"):
            load_experiment(name)
    with pytest.raises(ValueError, match="json is no experiment: it has no ABOUT, ARMS, "):
        main(LabConfig(names="json"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_states_claim_and_rule_and_has_a_control(name):
    module = load_experiment(name)
    about = module.ABOUT
    assert about.name == name and about.claim.endswith(".") and about.source
    assert "hown" in about.rule and "efuted" in about.rule and len(module.ARMS) >= 2
    assert Task(name, "a / b", 0, "out").file_name == "a___b__seed_0"
    assert about.claim in list_experiments() and about.source in list_experiments()


# ---- real ones, in their quick form --------------------------------------------------------------

@pytest.fixture(scope="module")
def quick_out(tmp_path_factory) -> str:
    """A folder whose shared stages the tests below use together."""
    return str(tmp_path_factory.mktemp("lab"))


QUICK_ARMS = [("beta", "kl_coef 0.0"), ("overoptimisation", "8000 comparisons"),
              ("overoptimisation", overoptimisation.CONTROL),
              ("cures", f"{cures.NEW}, kl_coef 0.0"),
              ("cures", "score without length, kl_coef 0.0"),
              ("cures", "mean - variance of 3, kl_coef 0.05"),
              ("cures", f"{cures.STOP}, kl_coef 0.0"),
              ("biased_labels", biased_labels.LENGTH)]


@pytest.mark.slow
@pytest.mark.parametrize("name, arm", QUICK_ARMS)
def test_an_arm_of_every_kind_runs_in_its_quick_form(quick_out, name, arm):
    task = Task(name, arm, 0, quick_out, str(REPOSITORY / "checkpoints" / "tiny"), quick=True)
    os.makedirs(task.folder)
    figures = quietly(load_experiment(name).run, task)
    assert {"gold", "win_rate", "kl_ref"} <= set(figures)
    for figure, value in figures.items():
        assert np.isfinite(value).all(), figure
    assert 0 < figures["win_rate"] < 1 and figures["kl_ref"] != 0
    if arm == overoptimisation.CONTROL:                  # the critic starts as in the arm of 2000
        config = read_json(os.path.join(task.folder, "ppo", "run.json"))["config"]
        assert config["reward"] == reward_model_folder(task, comparisons=2000)
        assert figures["score"] == scaled_gold(task).scaled(figures["gold"])
