"""run_folder.py: a run that was stopped, killed or unlucky goes on to the same files, bit for bit.

MINIRLHF_RUN_KILLS=100 kills each trainer that often, in place of 12 times.
"""

import bdb
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from fuzzing import FUZZ, Tally, damage, mutate, put, rewrite
from helpers import (
    TRAINERS,
    arguments_of,
    base_folder,
    environment,
    ppo_config,
    quietly,
    reward_folder,
    save_folder,
    sft_config,
    torchrun,
    toy_model,
    toy_prompts,
)

from minirlhf import ppo, ppo_report, reward_model, sft
from minirlhf.engine import parallel, run_folder, training
from minirlhf.engine.metrics import read_kept, read_metrics
from minirlhf.engine.options import Stopped
from minirlhf.engine.output import PART_FILES, RUN_FILE
from minirlhf.engine.run_folder import RunFolder, begin
from minirlhf.engine.state import STATE_FILE, read_state, write_state
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2

KILLS = int(os.environ.get("MINIRLHF_RUN_KILLS", "12"))
SHORT = {"sft": {"examples": 180, "held_out": 16, "epochs": 2, "eval_every": 5},
         "reward_model": {"comparisons": 260, "held_out": 40, "epochs": 2, "eval_every": 5,
                          "norm_samples": 20},
         "ppo": {"iterations": 8, "kl_target": 0.5, "kl_horizon": 20.0, "sample_every": 2}}
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def options_of(name: str, **options) -> dict:
    """A short run of some steps, with a checkpoint after every second one."""
    reward = {"reward": reward_folder()} if name == "ppo" else {}
    return {**SHORT[name], "save_every": 2, **reward, **options}


def train(name: str, out: str, **options) -> dict:
    """Run a trainer quietly to its end, or to whatever stops it."""
    module, config = TRAINERS[name]
    return quietly(module.main, config(**options_of(name, out=out, **options)))


def files_of(folder: str) -> dict[str, bytes]:
    """All files that a finished run leaves, but for the options in run.json that may differ."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name not in (".lock", RUN_FILE)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are added in the same order, and a fork has no threads to lose."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of uninterrupted runs, one by each trainer."""
    files = {}
    for name in TRAINERS:
        folder = str(tmp_path_factory.mktemp("whole") / name)
        train(name, folder)
        files[name] = files_of(folder)
    return files


class Interruption(Exception):
    """Stands for whatever may end a process at some point of it."""


def stop_after(monkeypatch, owner, name: str, calls: int):
    """Make the `calls`-th call of a module's function fail."""
    original, count = getattr(owner, name), 0

    def failing(*arguments, **options):
        nonlocal count
        count += 1
        if count == calls:
            raise Interruption
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, failing)


def stop_train(name: str, out: str, owner, function: str, calls: int, **options) -> None:
    """Run a trainer until the `calls`-th call of a function fails."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, owner, function, calls)
        with pytest.raises(Interruption):
            train(name, out, **options)


# ---- before the run ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TRAINERS)
def test_no_trainer_writes_into_a_folder_that_it_reads(name, tmp_path):
    folder = str(tmp_path / "model")
    shutil.copytree(base_folder(), folder)
    before = files_of(folder)
    with pytest.raises(ValueError, match="the folder that this stage starts from"):
        train(name, folder, model=folder)
    if name == "ppo":
        with pytest.raises(ValueError, match="the folder that this stage starts from"):
            train(name, folder, reward=f"{reward_folder()},{folder}")
    assert files_of(folder) == before


@pytest.mark.parametrize("name, options, rows", [
    ("sft", {"batch_size": 4}, 4), ("reward_model", {"batch_size": 4}, 4),
    ("ppo", {"batch_size": 9, "minibatch_size": 4}, 4)])
def test_a_step_of_fewer_rows_than_processes_is_refused_before_anything_is_loaded(
        monkeypatch, name, options, rows):
    cfg = TRAINERS[name][1](**options_of(name, out="nowhere", **options))
    monkeypatch.setattr(parallel, "processes", lambda: 5)
    with pytest.raises(ValueError, match=f"a step has {rows} rows, fewer than the 5 processes"):
        begin(cfg, "no-such-folder")
    monkeypatch.setattr(parallel, "processes", lambda: 4)
    monkeypatch.setattr(parallel, "first_alone", lambda function, *words: function(*words))
    assert begin(cfg, "no-such-folder") == "no-such-folder"


# ---- a run of a toy trainer ----------------------------------------------------------------------

def toy_run(cfg, folder_seen: list, steps: int = 5, stop_at: int = 99,
            error: type[Exception] = Interruption) -> dict:
    """A trainer in small: each step moves the only weight and notes what the folder holds."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    with RunFolder(cfg, steps, ["step", "weight", "note"], {"--data": "1"}, layer,
                   optimizer) as run:
        for step in run.steps():
            path = os.path.join(cfg.out, STATE_FILE)
            folder_seen.append((step, read_state(path)[0]["step"] if os.path.exists(path) else 0))
            if step == stop_at:
                raise error
            layer.weight.grad = torch.ones(1, 1)
            optimizer.step()
            run.sample(f"sample {step}")
            run.keep({"step": step, "weight": layer.weight.item()})
            run.log({"weight": layer.weight.item(), "step": step + 1})
    return run.row


def test_states_are_written_between_the_steps_when_it_is_time(tmp_path, capsys):
    cfg, seen = sft_config(out=str(tmp_path), save_every=2), []
    row = toy_run(cfg, seen)
    assert seen == [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4)]
    state, _ = read_state(str(tmp_path / STATE_FILE))
    assert state["step"] == 5 and state["row"] == row and list(row) == ["step", "weight", "note"]
    assert row["note"] == ""                             # not every step has every figure
    assert (tmp_path / "samples.txt.part").read_text() == "".join(f"sample {i}\n" for i in range(5))
    assert "sample 4\n" in capsys.readouterr().out


def test_a_run_goes_on_with_the_steps_after_the_last_state(tmp_path):
    whole, again, seen = tmp_path / "whole", tmp_path / "again", []
    row = quietly(toy_run, sft_config(out=str(whole), save_every=2), [])
    with pytest.raises(Interruption):
        quietly(toy_run, sft_config(out=str(again), save_every=2), [], 5, 3)
    resumed = quietly(toy_run, sft_config(out=str(again), save_every=2, resume=True), seen)
    assert [step for step, _ in seen] == [2, 3, 4] and resumed == row
    for name in PART_FILES:
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_of_a_version_that_kept_nothing_goes_on(tmp_path):
    """Its state names two growing files and not the third."""
    with pytest.raises(Interruption):
        quietly(toy_run, sft_config(out=str(tmp_path), save_every=2), [], 5, 3)
    path = str(tmp_path / STATE_FILE)
    state, tensors = read_state(path)
    del state["files"]["kept.jsonl"]
    write_state(path, state, tensors)
    os.unlink(tmp_path / "kept.jsonl.part")
    quietly(toy_run, sft_config(out=str(tmp_path), save_every=2, resume=True), [])
    assert [record["step"] for record in read_kept(str(tmp_path))] == [2, 3, 4]


def test_a_figure_of_a_name_that_the_run_does_not_have_is_a_mistake(tmp_path):
    with RunFolder(sft_config(out=str(tmp_path)), 5, ["step", "loss"], {}) as run:
        with pytest.raises(AssertionError, match="los"):
            run.log({"step": 1, "los": 0.5})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_stops_the_run(tmp_path, value):
    with pytest.raises(FloatingPointError, match=f"gold is {value} in step 1.* The last good "
                                                 "checkpoint is what the stage started from"):
        with RunFolder(sft_config(out=str(tmp_path)), 8, ["score", "gold"], {}) as run:
            run.log({"score": 1.0, "gold": value})
    assert (tmp_path / "metrics.csv.part").read_bytes() == b"score,gold\n"


def test_a_tour_in_the_debugger_that_is_quit_leaves_nothing(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(bdb.BdbQuit):
        with RunFolder(sft_config(out=str(out), save_every=1), 5, ["step"], {},
                       torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)])) as run:
            for step in run.steps():
                run.log({"step": step})
                if step == 2:
                    raise bdb.BdbQuit
    assert not out.exists()


def test_a_tour_of_a_run_that_went_on_leaves_its_state(tmp_path):
    cfg = sft_config(out=str(tmp_path), save_every=2)
    with pytest.raises(Interruption):
        quietly(toy_run, cfg, [], 5, 3)
    before = (tmp_path / STATE_FILE).read_bytes()
    with pytest.raises(bdb.BdbQuit):
        quietly(toy_run, sft_config(out=str(tmp_path), save_every=2, resume=True), [], 5, 2,
                bdb.BdbQuit)
    assert (tmp_path / STATE_FILE).read_bytes() == before
    assert len(quietly(toy_run, sft_config(out=str(tmp_path), save_every=2, resume=True), [])) == 3


# ---- going on ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, owner, function, calls", [
    ("sft", sft, "train_step", 1), ("sft", sft, "train_step", 8), ("sft", sft, "evaluate", 3),
    ("sft", run_folder, "save_folder", 1),
    ("reward_model", training, "optimiser_step", 13),
    ("reward_model", reward_model, "normalise", 1), ("reward_model", run_folder, "save_folder", 1),
    ("ppo", ppo, "rollout", 1), ("ppo", ppo, "rollout", 6), ("ppo", ppo, "gae", 4),
    ("ppo", training, "optimiser_step", 7), ("ppo", ppo_report, "token_table", 3),
    ("ppo", run_folder, "save_folder", 1)])
def test_a_run_that_failed_anywhere_goes_on_to_the_same_files(tmp_path, whole, name, owner,
                                                              function, calls):
    out = str(tmp_path / "run")
    stop_train(name, out, owner, function, calls)
    train(name, out, resume=True)
    assert files_of(out) == whole[name]


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("options", [
    {"dtype": "bfloat16"}, {"ent_coef": 0.01, "kl_old_stop": 0.01}, {"accumulation": 2},
    {"checkpointing": True, "reward": "helpers:share_of_red", "gold": "helpers:share_of_red"}])
def test_ppo_goes_on_to_the_same_files_under_every_option(tmp_path, critic, options):
    straight, out = str(tmp_path / "straight"), str(tmp_path / "run")
    options = {**options, "critic": critic, "iterations": 4}
    train("ppo", straight, **options)
    stop_train("ppo", out, ppo, "rollout", 4, **options)
    train("ppo", out, resume=True, **options)
    assert files_of(out) == files_of(straight)


def test_an_adapted_kl_coef_is_gone_on_with(tmp_path, whole):
    """It comes from the last row of metrics, unrounded."""
    out = str(tmp_path / "run")
    stop_train("ppo", out, ppo, "rollout", 6)
    train("ppo", out, resume=True)
    assert files_of(out) == whole["ppo"]
    assert len({row["kl_coef"] for row in read_metrics(out)}) == 8       # another at every step


@pytest.mark.parametrize("calls", range(1, 14))
def test_a_failure_at_any_file_of_the_result_is_made_good(monkeypatch, tmp_path, whole, calls):
    """Between the files of a result the folder is refused; --resume writes all of them again."""
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        original, count = os.replace, 0

        def failing(source, target):
            nonlocal count
            count += os.path.exists(os.path.join(out, RUN_FILE))
            if count == calls:
                raise Interruption
            original(source, target)

        patch.setattr(os, "replace", failing)
        with pytest.raises(Interruption):
            train("ppo", out)
    if os.path.exists(os.path.join(out, "config.json")):
        with pytest.raises(ValueError, match="stopped while it wrote its result"):
            load_network(GPT2, out)
    train("ppo", out, resume=True)
    assert files_of(out) == whole["ppo"]
    load_network(GPT2, out)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_finished_run_is_not_run_again(tmp_path, name, whole):
    out = str(tmp_path / "run")
    row = train(name, out)
    assert not [file for file in os.listdir(out) if file.endswith((".part", ".tmp"))]
    assert not os.path.exists(os.path.join(out, STATE_FILE))
    text, (module, config) = io.StringIO(), TRAINERS[name]
    with contextlib.redirect_stdout(text):
        again = module.main(config(**options_of(name, out=out, resume=True)))
    assert again == row and "holds the finished run" in text.getvalue()
    assert files_of(out) == whole[name]
    assert read_metrics(out)[-1] == pytest.approx({k: v for k, v in row.items() if v != ""})


def test_resume_without_a_state_begins_at_the_beginning(tmp_path, whole, capsys):
    out = str(tmp_path / "run")
    sft.main(sft_config(**options_of("sft", out=out, resume=True)))
    assert "nothing to resume: starting from the beginning" in capsys.readouterr().out
    assert files_of(out) == whole["sft"]


# ---- signals and kills ---------------------------------------------------------------------------

def command(name: str, out: str, **options) -> list[str]:
    """A trainer's command line."""
    _, config = TRAINERS[name]
    return [sys.executable, "-u", "-m", f"minirlhf.{name}",
            *arguments_of(config(**options_of(name, out=out, **options)))]


def start_train(name: str, out: str, log: Path) -> int:
    """Run a trainer with --resume in a copy of this process (no time for imports); its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(name, out, resume=True)
            code = 0
        except BaseException:
            log.write_text(traceback.format_exc(), encoding="utf-8")
        finally:
            os._exit(code)                               # and nothing of pytest's
    return child


@posix
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_sigkill_at_any_moment_loses_nothing(tmp_path, whole, name):
    """Killed again and again at random moments, a run ends in the same files."""
    rng, out, log = random.Random(name), str(tmp_path / "run"), tmp_path / "log"
    kills = finished = 0
    while kills < KILLS:
        child = start_train(name, out, log)
        time.sleep(rng.uniform(0, 0.5))
        os.kill(child, signal.SIGKILL)                   # until it is waited for it is there
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            if os.path.exists(os.path.join(out, STATE_FILE)):
                read_state(os.path.join(out, STATE_FILE))    # whole, whatever happened
        else:
            assert os.WEXITSTATUS(status) == 0, log.read_text(encoding="utf-8")
            found = {file: data for file, data in files_of(out).items() if file in whole[name]}
            assert found == whole[name]
            shutil.rmtree(out)                           # begin another run
            finished += 1
    print(f"\n{name}: {kills} kills, {finished} runs finished before one")
    train(name, out, resume=True)
    found = {file: data for file, data in files_of(out).items() if not file.endswith(".tmp")}
    assert found == whole[name]


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_at_the_end_of_the_step(tmp_path, whole, number, monkeypatch,
                                                       capsys):
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        original = ppo.update                            # once per iteration

        def interrupted(*arguments):
            if not os.path.exists(os.path.join(out, STATE_FILE)):
                os.kill(os.getpid(), number)
            return original(*arguments)

        patch.setattr(ppo, "update", interrupted)
        patch.setattr(run_folder, "under_debugger", bool)            # coverage and pdb look alike
        with pytest.raises(Stopped, match=f"signal {int(number)} after step 1 of 8") as stop:
            ppo.main(ppo_config(**options_of("ppo", out=out, save_every=100)))
    assert stop.value.signal == number
    assert "stopping at the end of this step" in capsys.readouterr().err
    assert read_state(os.path.join(out, STATE_FILE))[0]["step"] == 1
    train("ppo", out, save_every=100, resume=True)
    assert files_of(out) == whole["ppo"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL        # handlers are put back


@posix
@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_a_signal_stops_the_other_trainers_too(tmp_path, whole, name, monkeypatch):
    out, original = str(tmp_path / "run"), training.clip_gradients

    def interrupted(*arguments):
        if not os.path.exists(os.path.join(out, STATE_FILE)):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(run_folder, "under_debugger", bool)
    with monkeypatch.context() as patch:
        patch.setattr(training, "clip_gradients", interrupted)
        with pytest.raises(Stopped, match="signal 15 after step 1 of"):
            train(name, out)
    train(name, out, resume=True)
    assert files_of(out) == whole[name]


@posix
def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    out = str(tmp_path / "run")

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(ppo, "gae", interrupted)
    monkeypatch.setattr(run_folder, "under_debugger", bool)
    with pytest.raises(KeyboardInterrupt) as stop:
        train("ppo", out)
    assert not isinstance(stop.value, Stopped)


@posix
def test_the_command_says_how_to_go_on_and_exits_by_the_signals_number(tmp_path):
    out = str(tmp_path / "run")
    run = subprocess.Popen(command("ppo", out, iterations=5000), env=environment(),
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not os.path.exists(os.path.join(out, "metrics.csv.part")):
        time.sleep(0.05)
    time.sleep(0.5)
    run.send_signal(signal.SIGTERM)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 143 and "go on with the same command and --resume" in error
    assert os.path.exists(os.path.join(out, STATE_FILE))


# ---- several processes ---------------------------------------------------------------------------

def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    out, straight = str(tmp_path / "run"), str(tmp_path / "straight")
    stop_train("ppo", out, ppo, "update", 5)             # after 4 iterations by one process
    torchrun("ppo", ppo_config(**options_of("ppo", out=out, resume=True)))
    train("ppo", straight)
    first, second = read_metrics(out), read_metrics(straight)
    assert [row["iteration"] for row in first] == list(range(8))
    assert first[:4] == second[:4]
    for one, other in zip(first, second):
        assert one == pytest.approx(other, rel=1e-2, abs=5e-3)
    kept = [[(one["iteration"], one["asked_again"], one["prompt"]) for one in read_kept(folder)]
            for folder in (out, straight)]
    assert kept[0] == kept[1] and len(kept[0]) == 5 * 4    # iterations 0, 2, 4, 6 and 7


# ---- what is refused -----------------------------------------------------------------------------

@pytest.fixture
def unfinished(tmp_path) -> str:
    """The folder of a PPO run that was stopped after 4 of 8 iterations."""
    out = str(tmp_path / "unfinished")
    stop_train("ppo", out, ppo, "update", 5)
    return out


def test_an_unfinished_run_is_not_overwritten(unfinished):
    before = {path: path.read_bytes() for path in Path(unfinished).iterdir()}
    with pytest.raises(ValueError, match="holds a run that is not finished; go on with it by "
                                         "--resume, or delete .*training_state.safetensors"):
        train("ppo", unfinished)
    assert {path: path.read_bytes() for path in Path(unfinished).iterdir()} == before


def test_changed_options_are_named_and_refused(unfinished):
    with pytest.raises(ValueError, match="--kl_coef was 0.02, is 0.5; --lr was 0.005, is 0.001"):
        train("ppo", unfinished, resume=True, kl_coef=0.5, lr=0.001)
    moved = unfinished + "-moved"
    os.rename(unfinished, moved)
    train("ppo", moved, resume=True, save_every=3)       # these change nothing of the result


def test_a_finished_run_with_other_options_is_not_taken_for_this_one(tmp_path):
    out = str(tmp_path / "run")
    train("ppo", out)
    with pytest.raises(ValueError, match="--seed was 0, is 1"):
        train("ppo", out, resume=True, seed=1)


def test_changed_prompts_are_named_and_refused(tmp_path):
    out, prompts = str(tmp_path / "run"), tmp_path / "prompts.jsonl"
    lines = [json.dumps(row) for row in toy_prompts(20, 0)]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    stop_train("ppo", out, ppo, "rollout", 5, prompts=str(prompts))
    prompts.write_text("\n".join(lines[1:] + lines[:1]), encoding="utf-8")
    with pytest.raises(ValueError, match="--resume: --prompts changed since the run in .* began"):
        train("ppo", out, resume=True, prompts=str(prompts))
    prompts.write_text("\n".join(lines), encoding="utf-8")
    train("ppo", out, resume=True, prompts=str(prompts))


def demonstrations_file(path: str) -> str:
    """A file of 40 demonstrations."""
    rows = [json.dumps({**row, "response": "red"}) + "\n" for row in toy_prompts(40, 0)]
    Path(path).write_text("".join(rows), encoding="utf-8")
    return path


def test_a_run_goes_on_after_the_project_was_moved(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    options = {"examples": 40, "held_out": 8, "epochs": 3}
    shutil.copytree(base_folder(), one / "base")
    demonstrations_file(str(one / "d.jsonl"))
    train("sft", str(one / "whole"), model=str(one / "base"), data=str(one / "d.jsonl"), **options)
    stop_train("sft", str(one / "out"), sft, "train_step", 4, model=str(one / "base"),
               data=str(one / "d.jsonl"), **options)
    one.rename(other)
    train("sft", str(other / "out"), model=str(other / "." / "base") + os.sep,
          data=str(other / "d.jsonl"), resume=True, **options)
    again, first = files_of(str(other / "out")), files_of(str(other / "whole"))
    again.pop("README.md"), first.pop("README.md")       # they name the data's place
    assert again == first


@posix
def test_names_with_bytes_that_are_not_utf_8_lose_no_run(tmp_path):
    data = demonstrations_file(os.path.join(tmp_path, os.fsdecode(b"donn\xe9es.jsonl")))
    out = os.path.join(tmp_path, os.fsdecode(b"sorti\xe9"))
    row = train("sft", out, data=data, examples=40, held_out=8, epochs=1)
    assert train("sft", out, data=data, examples=40, held_out=8, epochs=1, resume=True) == row
    load_network(GPT2, out)


def test_a_changed_model_is_named_and_refused(tmp_path):
    out, model = str(tmp_path / "run"), str(tmp_path / "model")
    save_folder(toy_model(0), model)
    stop_train("ppo", out, ppo, "rollout", 5, model=model)
    save_folder(toy_model(1), model)
    with pytest.raises(ValueError, match="--resume: --model changed since the run in .* began"):
        train("ppo", out, resume=True, model=model)


REWARD = "import helpers\n\n\ndef reward(*arguments):\n    return helpers.share_of_red(*arguments)"


def test_an_edited_reward_function_is_named_and_refused(tmp_path, monkeypatch):
    out, file = str(tmp_path / "run"), tmp_path / "users_reward.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    file.write_text(REWARD, encoding="utf-8")
    stop_train("ppo", out, ppo, "rollout", 5, reward="users_reward:reward")
    file.write_text(REWARD + " - 1", encoding="utf-8")
    monkeypatch.delitem(sys.modules, "users_reward")
    with pytest.raises(ValueError, match="--resume: --reward changed since the run in .* began"):
        train("ppo", out, resume=True, reward="users_reward:reward")
    file.write_text(REWARD, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "users_reward")
    train("ppo", out, resume=True, reward="users_reward:reward")


def test_a_changed_metrics_file_is_noticed(unfinished):
    path = Path(unfinished, "metrics.csv.part")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="metrics.csv.part is not what it was at the last check"):
        train("ppo", unfinished, resume=True)


def test_rows_after_the_last_checkpoint_are_written_again_not_twice(unfinished, whole):
    with open(os.path.join(unfinished, "metrics.csv.part"), "a", encoding="utf-8") as file:
        file.write("4,0.1,half a ro")                    # as a kill in the middle of a write
    train("ppo", unfinished, resume=True)
    assert files_of(unfinished) == whole["ppo"]


def test_two_runs_do_not_share_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    cfg = ppo_config(**options_of("ppo", out=str(tmp_path)))
    with RunFolder(cfg, 8, ["iteration"], {}):
        with pytest.raises(ValueError, match="another run is writing into this folder"):
            quietly(ppo.main, cfg)
    quietly(ppo.main, cfg)                               # it is free again


def test_a_state_of_another_trainer_is_refused(unfinished):
    with pytest.raises(ValueError, match="is of a run of PPO, expected one of SFT"):
        train("sft", unfinished, resume=True)


def test_another_number_of_threads_is_mentioned(tmp_path, capsys):
    with pytest.raises(Interruption):
        toy_run(sft_config(out=str(tmp_path), save_every=2), [], stop_at=3)
    torch.set_num_threads(2)
    try:
        toy_run(sft_config(out=str(tmp_path), save_every=2, resume=True), [])
    finally:
        torch.set_num_threads(1)
    assert "the run began with threads 1, here it is 2" in capsys.readouterr().out


def test_a_run_that_goes_bad_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    out, original = str(tmp_path / "run"), ppo.shaped_rewards

    def spoiled(scores, kl_ref, mask, kl_coef):
        rewards = original(scores, kl_ref, mask, kl_coef)
        if os.path.exists(os.path.join(out, STATE_FILE)):
            rewards[3] = float("nan")
        return rewards

    monkeypatch.setattr(ppo, "shaped_rewards", spoiled)
    monkeypatch.setattr(ppo_report, "check_rollout", lambda *_: None)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 2, step 0: nan.*"
                       "The last good checkpoint is .*training_state.safetensors, after step 2"):
        train("ppo", out)


@pytest.mark.parametrize("lr", [1.0, 1e5])
def test_a_run_that_diverges_writes_no_figure_that_is_not_finite(tmp_path, lr):
    """Ratios round to 0 and reach the limit; either that is survived, or an error names it."""
    out = str(tmp_path / "run")
    with contextlib.suppress(FloatingPointError):
        train("ppo", out, lr=lr, max_grad_norm=1e6, warmup_iterations=0, iterations=10)
    (path,) = Path(out).glob("metrics.csv*")
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") > 1 and "inf" not in text and "nan" not in text


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_kill_while_it_cleans_up_loses_nothing(tmp_path, whole, calls, monkeypatch):
    out, original, count = str(tmp_path / "run"), os.unlink, 0

    def failing(path, *arguments, **options):
        nonlocal count
        count += str(path).startswith(out) and not str(path).endswith(".tmp")
        if count == calls:
            raise Interruption
        original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", failing)
        with pytest.raises(Interruption):
            train("ppo", out)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        ppo.main(ppo_config(**options_of("ppo", out=out, resume=True)))
    assert "holds the finished run" in text.getvalue() or "going on after step 8" in text.getvalue()
    assert files_of(out) == whole["ppo"]


def test_a_run_killed_before_its_first_checkpoint_is_not_taken_for_an_older_one(tmp_path):
    out = str(tmp_path / "run")
    train("ppo", out)
    Path(out, "metrics.csv.part").write_text("iteration", encoding="utf-8")    # a new run began
    before = Path(out, "model.safetensors").read_bytes()
    train("ppo", out, resume=True, seed=5)               # with other options, which is no mistake
    assert Path(out, "model.safetensors").read_bytes() != before


# ---- disks ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("failing_write", [1, 2, 3, 4])
def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(tmp_path, whole, failing_write):
    """Whatever write fails first, the run can go on when there is space again."""
    out, original, count = str(tmp_path / "run"), os.fsync, 0

    def full(number):
        nonlocal count
        count += 1
        if count >= failing_write:
            raise OSError(28, "No space left on device")
        original(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            train("ppo", out)
    train("ppo", out, resume=True)
    assert files_of(out) == whole["ppo"]


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", int)() == 0, reason="root may write")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    os.chmod(tmp_path, 0o500)
    with pytest.raises(PermissionError, match="run"):
        train("ppo", str(tmp_path / "run"))


# ---- damaged folders -----------------------------------------------------------------------------

def toy_options(folder) -> dict:
    return {"out": str(folder), "examples": 60, "held_out": 4, "epochs": 1, "batch_size": 8,
            "save_every": 1, "model": base_folder()}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The files of a run that was stopped after a few steps, and the weights it would have had."""
    folder = tmp_path_factory.mktemp("run")
    quietly(sft.main, sft_config(**toy_options(folder / "whole")))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, sft, "train_step", 4)
        with pytest.raises(Interruption):
            quietly(sft.main, sft_config(**toy_options(folder / "stopped")))
    files = {path.name: path.read_bytes() for path in (folder / "stopped").iterdir()}
    assert STATE_FILE in files
    return files, (folder / "whole" / "model.safetensors").read_bytes()


def test_a_run_resumed_from_a_damaged_folder_is_the_same_or_a_value_error(interrupted, tmp_path):
    """All its files, one at a time: the state, the growing metrics and samples."""
    files, expected = interrupted
    rng, tally = random.Random(4), Tally("resumed runs of SFT")
    for case in range(max(20, FUZZ // 500)):
        folder = tmp_path / str(case)
        folder.mkdir()
        for name, content in files.items():
            put(folder / name, content)
        name = rng.choice([STATE_FILE, STATE_FILE, *PART_FILES])
        content = files[name]
        if name == STATE_FILE and rng.random() < 0.8:
            content = rewrite(rng, content) if rng.random() < 0.2 else mutate(rng, content)
        elif name != STATE_FILE:
            content = damage(rng, content, [b"\n", b"\0", b"1,2,3\n"])
        put(folder / name, content)
        cfg = sft_config(**toy_options(folder), resume=True)
        row = tally.attempt(str(folder), quietly, sft.main, cfg)
        if row is not None:
            assert (folder / "model.safetensors").read_bytes() == expected
    tally.finish(seconds=60, mebibytes=128)
    assert tally.read > 0 and tally.refused > 0


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b'{"command": "SFT", "finished": true}', b"\0", b'{"command": "SFT"}',
    b'{"command": "SFT", "finished": true, "config": 3, "row": {}}',
    b'{"command": "SFT", "finished": 1, "config": {}, "row": {}}',
    b'{"command": "SFT", "finished": true, "config": {}, "row": 3}', b'{"a": ' + b"[" * 100_000])
def test_a_damaged_run_file_is_refused_or_the_run_begins_anew(tmp_path, content):
    put(tmp_path / "run.json", content)
    cfg = sft_config(**toy_options(tmp_path), resume=True)
    try:
        quietly(sft.main, cfg)
        model = load_network(GPT2, str(tmp_path))
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    except ValueError as error:
        assert str(tmp_path) in str(error) and len(str(error)) < 2000
