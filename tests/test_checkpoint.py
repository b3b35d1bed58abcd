"""checkpoint.py: a run that was stopped, killed or unlucky goes on to the same files, bit for bit.

MINIRLHF_RUN_KILLS=100 kills each trainer that often, in place of 4 times.
"""

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import ppo_config, quietly, reward_config, reward_folder, sft_config
from minirlhf import checkpoint, ppo, reward_model, sft, weights
from minirlhf.checkpoint import (RUN_FILE, STATE_FILE, RunFolder, read_state, unpack, write_state)
from minirlhf.common import Stopped, read_metrics
from minirlhf.gpt2 import GPT2, ScalarModel
from test_parallel import arguments_of, torchrun

REPOSITORY = Path(__file__).resolve().parents[1]
TRAINERS = {"sft": (sft, sft_config), "reward_model": (reward_model, reward_config),
            "ppo": (ppo, ppo_config)}
KILLS = int(os.environ.get("MINIRLHF_RUN_KILLS", "4"))


def options_of(name: str, **options) -> dict:
    """A short run of some steps, with a checkpoint after every second one."""
    short = {"sft": {"examples": 180, "held_out": 16, "epochs": 2, "eval_every": 5},
             "reward_model": {"comparisons": 260, "held_out": 40, "epochs": 2, "eval_every": 5,
                              "norm_samples": 20},
             "ppo": {"iterations": 8, "kl_target": 0.5, "kl_horizon": 20.0, "sample_every": 2}}
    found = {**short[name], "save_every": 2, **options}
    if name == "ppo":
        found["reward"] = reward_folder()
    return found


def files_of(folder: str) -> dict[str, bytes]:
    """All files that a finished run leaves, but for the options in run.json that may differ."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name not in (".lock", RUN_FILE):
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The files of uninterrupted runs, one by each trainer."""
    threads, found = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    for name, (module, config) in TRAINERS.items():
        folder = str(tmp_path_factory.mktemp("whole") / name)
        quietly(module.main, config(**options_of(name, out=folder)))
        found[name] = files_of(folder)
    torch.set_num_threads(threads)
    return found


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Interruption(Exception):
    """Stands for whatever may end a process at some point of it."""


def stop_after(monkeypatch, module, name: str, calls: int):
    """Make the `calls`-th call of a module's function fail."""
    original, count = getattr(module, name), 0

    def failing(*arguments, **options):
        nonlocal count
        count += 1
        if count == calls:
            raise Interruption
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, failing)


# ---- going on ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, function, calls", [
    ("sft", "train_step", 1), ("sft", "train_step", 8), ("sft", "evaluate", 3),
    ("sft", "save", 1), ("reward_model", "train_step", 13), ("reward_model", "normalise", 1),
    ("reward_model", "save", 1), ("ppo", "rollout", 1), ("ppo", "rollout", 6), ("ppo", "gae", 4),
    ("ppo", "train_step", 7), ("ppo", "token_table", 3), ("ppo", "save", 1)])
def test_a_run_that_failed_anywhere_goes_on_to_the_same_files(monkeypatch, tmp_path, whole, name,
                                                              function, calls):
    module, config = TRAINERS[name]
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_after(patch, module, function, calls)
        with pytest.raises(Interruption):
            quietly(module.main, config(**options_of(name, out=out)))
    quietly(module.main, config(**options_of(name, out=out, resume=True)))
    assert files_of(out) == whole[name]


@pytest.mark.parametrize("calls", range(1, 12))
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
        with contextlib.suppress(Interruption):
            quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
            pytest.skip("the result has fewer files")
    if os.path.exists(os.path.join(out, "config.json")):
        with pytest.raises(ValueError, match="stopped while it wrote its result"):
            GPT2.from_pretrained(out)
    quietly(ppo.main, ppo_config(**options_of("ppo", out=out, resume=True)))
    assert files_of(out) == whole["ppo"]
    GPT2.from_pretrained(out)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_finished_run_is_not_run_again(tmp_path, name, whole):
    module, config = TRAINERS[name]
    out = str(tmp_path / "run")
    row = quietly(module.main, config(**options_of(name, out=out)))
    assert not [file for file in os.listdir(out) if file.endswith((".part", ".tmp"))]
    assert not os.path.exists(os.path.join(out, STATE_FILE))
    text = io.StringIO()
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


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", TRAINERS)
def test_sigkill_at_any_moment_loses_nothing(tmp_path, whole, name):
    """Killed again and again at random moments, a run ends in the same files."""
    rng, out, kills = random.Random(name), str(tmp_path / "run"), 0
    rounds = 0
    while kills < KILLS:
        if not os.path.exists(os.path.join(out, STATE_FILE)) and rounds:
            shutil.rmtree(out, ignore_errors=True)       # finished: begin another run
        rounds += 1
        log = open(tmp_path / "log", "w", encoding="utf-8")
        run = subprocess.Popen(command(name, out, resume=True), env=environment(), stdout=log,
                               stderr=log)
        started = time.monotonic()
        begun = ("going on after step", "starting from the beginning", "finished run")
        while run.poll() is None and not any(
                words in (tmp_path / "log").read_text(encoding="utf-8") for words in begun):
            time.sleep(0.005)                            # a kill while it imports would show little
            assert time.monotonic() - started < 120
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(rng.uniform(0, 0.6))
        if run.poll() is None:
            run.kill()
            kills += 1
        code = run.wait()
        log.close()
        text = (tmp_path / "log").read_text(encoding="utf-8")
        assert code in (0, -signal.SIGKILL), text
        if code == 0:
            found = {file: data for file, data in files_of(out).items() if file in whole[name]}
            assert found == whole[name]
        elif os.path.exists(os.path.join(out, STATE_FILE)):
            read_state(os.path.join(out, STATE_FILE))    # whole, whatever happened
    module, config = TRAINERS[name]
    quietly(module.main, config(**options_of(name, out=out, resume=True)))
    found = {file: data for file, data in files_of(out).items() if not file.endswith(".tmp")}
    assert found == whole[name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_at_the_end_of_the_step(tmp_path, whole, number, monkeypatch,
                                                       capsys):
    out = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        original = ppo.gae

        def interrupted(*arguments):
            if not os.path.exists(os.path.join(out, STATE_FILE)):
                os.kill(os.getpid(), number)
            return original(*arguments)

        patch.setattr(ppo, "gae", interrupted)
        patch.setattr(checkpoint, "under_debugger", bool)            # coverage and pdb look alike
        with pytest.raises(Stopped, match=f"signal {int(number)} after step 1 of 8") as stop:
            ppo.main(ppo_config(**options_of("ppo", out=out, save_every=100)))
    assert stop.value.signal == number
    assert "stopping at the end of this step" in capsys.readouterr().err
    assert read_state(os.path.join(out, STATE_FILE))[0]["step"] == 1
    quietly(ppo.main, ppo_config(**options_of("ppo", out=out, save_every=100, resume=True)))
    assert files_of(out) == whole["ppo"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL        # handlers are put back


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_a_signal_stops_the_other_trainers_too(tmp_path, whole, name, monkeypatch):
    module, config = TRAINERS[name]
    out, original = str(tmp_path / "run"), module.clip_gradients

    def interrupted(*arguments):
        if not os.path.exists(os.path.join(out, STATE_FILE)):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "under_debugger", bool)
    with monkeypatch.context() as patch:
        patch.setattr(module, "clip_gradients", interrupted)
        with pytest.raises(Stopped, match="signal 15 after step 1 of"):
            quietly(module.main, config(**options_of(name, out=out)))
    quietly(module.main, config(**options_of(name, out=out, resume=True)))
    assert files_of(out) == whole[name]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    out = str(tmp_path / "run")

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(ppo, "gae", interrupted)
    monkeypatch.setattr(checkpoint, "under_debugger", bool)
    with pytest.raises(KeyboardInterrupt) as stop:
        quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
    assert not isinstance(stop.value, Stopped)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
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

def test_a_run_goes_on_with_another_number_of_processes(tmp_path, whole, monkeypatch):
    out, straight = str(tmp_path / "run"), str(tmp_path / "straight")
    with monkeypatch.context() as patch:
        stop_after(patch, ppo, "rollout", 5)             # after 4 iterations by one process
        with pytest.raises(Interruption):
            quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
    torchrun("ppo", ppo_config(**options_of("ppo", out=out, resume=True)))
    quietly(ppo.main, ppo_config(**options_of("ppo", out=straight)))
    first, second = read_metrics(out), read_metrics(straight)
    assert [row["iteration"] for row in first] == list(range(8))
    assert first[:4] == second[:4]
    for one, other in zip(first, second):
        assert one == pytest.approx(other, rel=1e-2, abs=5e-3)


# ---- what is refused -----------------------------------------------------------------------------

@pytest.fixture
def unfinished(tmp_path, monkeypatch) -> str:
    """The folder of a PPO run that was stopped after 4 of 8 iterations."""
    out = str(tmp_path / "unfinished")
    with monkeypatch.context() as patch:
        stop_after(patch, ppo, "rollout", 5)
        with pytest.raises(Interruption):
            quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
    return out


def go_on(out: str, **options) -> dict:
    return quietly(ppo.main, ppo_config(**options_of("ppo", out=out, resume=True, **options)))


def test_an_unfinished_run_is_not_overwritten(unfinished):
    before = {path: path.read_bytes() for path in Path(unfinished).iterdir()}
    with pytest.raises(ValueError, match="holds a run that is not finished; go on with it by "
                                         "--resume, or delete .*training_state.safetensors"):
        quietly(ppo.main, ppo_config(**options_of("ppo", out=unfinished)))
    assert {path: path.read_bytes() for path in Path(unfinished).iterdir()} == before


def test_changed_options_are_named_and_refused(unfinished):
    with pytest.raises(ValueError, match="--kl_coef was 0.02, is 0.5; --lr was 0.005, is 0.001"):
        go_on(unfinished, kl_coef=0.5, lr=0.001)
    moved = unfinished + "-moved"
    os.rename(unfinished, moved)
    go_on(moved, save_every=3)                           # these change nothing of the result


def test_a_finished_run_with_other_options_is_not_taken_for_this_one(tmp_path):
    out = str(tmp_path / "run")
    quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
    with pytest.raises(ValueError, match="--seed was 0, is 1"):
        go_on(out, seed=1)


def test_changed_inputs_are_named_and_refused(unfinished, monkeypatch):
    monkeypatch.setattr(ppo, "collect_prompts", lambda *_: [[309, 5 + i % 7] for i in range(100)])
    with pytest.raises(ValueError, match="--resume: --prompts changed since the run in .* began"):
        go_on(unfinished)


def test_a_changed_metrics_file_is_noticed(unfinished):
    path = Path(unfinished, "metrics.csv.part")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="metrics.csv.part has 100 bytes, at the last checkpoint"):
        go_on(unfinished)


def test_rows_after_the_last_checkpoint_are_written_again_not_twice(unfinished, whole):
    with open(os.path.join(unfinished, "metrics.csv.part"), "a", encoding="utf-8") as file:
        file.write("4,0.1,half a ro")                    # as a kill in the middle of a write
    go_on(unfinished)
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
        quietly(sft.main, sft_config(**options_of("sft", out=unfinished, resume=True)))


def test_another_number_of_threads_is_mentioned(unfinished, capsys):
    torch.set_num_threads(2)
    ppo.main(ppo_config(**options_of("ppo", out=unfinished, resume=True)))
    assert "the run began with 1 processes, 1 threads" in capsys.readouterr().out


def test_a_run_that_goes_bad_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    out, original = str(tmp_path / "run"), ppo.shaped_rewards

    def spoiled(scores, kl_ref, mask, kl_coef):
        rewards = original(scores, kl_ref, mask, kl_coef)
        if os.path.exists(os.path.join(out, STATE_FILE)):
            rewards[3] = float("nan")
        return rewards

    monkeypatch.setattr(ppo, "shaped_rewards", spoiled)
    monkeypatch.setattr(ppo, "check_invariants", lambda *_: None)
    with pytest.raises(FloatingPointError, match="loss is not finite at iteration 2, step 0: nan.*"
                       "The last good checkpoint is .*training_state.safetensors, after step 2"):
        quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))


@pytest.mark.parametrize("lr", [1.0, 1e5])
def test_a_run_that_diverges_writes_no_figure_that_is_not_finite(tmp_path, lr):
    """Ratios round to 0 and reach the limit; either that is survived, or an error names it."""
    out = str(tmp_path / "run")
    with contextlib.suppress(FloatingPointError):
        quietly(ppo.main, ppo_config(**options_of("ppo", out=out, lr=lr, max_grad_norm=1e9,
                                                  warmup_iterations=0, iterations=10)))
    (path,) = Path(out).glob("metrics.csv*")
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") > 1 and "inf" not in text and "nan" not in text


def test_a_metric_that_is_not_finite_stops_the_run(tmp_path):
    cfg = ppo_config(**options_of("ppo", out=str(tmp_path)))
    layer = torch.nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="gold is nan in step 1.* The last good checkpoint "
                                                 "is what the stage started from"):
        with RunFolder(cfg, 8, ["score", "gold"], {}) as run:
            run.end_step(1, {"score": 1.0, "gold": float("nan")}, layer,
                         torch.optim.Adam(layer.parameters()))


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
        patch.setattr(checkpoint.os, "unlink", failing)
        with pytest.raises(Interruption):
            quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        ppo.main(ppo_config(**options_of("ppo", out=out, resume=True)))
    assert "holds the finished run" in text.getvalue() or "going on after step 8" in text.getvalue()
    assert files_of(out) == whole["ppo"]


def test_a_run_killed_before_its_first_checkpoint_is_not_taken_for_an_older_one(tmp_path):
    out = str(tmp_path / "run")
    quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
    Path(out, "metrics.csv.part").write_text("iteration", encoding="utf-8")    # a new run began
    before = Path(out, "model.safetensors").read_bytes()
    go_on(out, seed=5)                                   # with other options, which is no mistake
    assert Path(out, "model.safetensors").read_bytes() != before


# ---- disks ---------------------------------------------------------------------------------------

def test_a_full_disk_ends_in_one_sentence_and_loses_nothing(tmp_path, monkeypatch, whole):
    """Whatever write fails first, the run can go on when there is space again."""
    for failing_write in (1, 2, 3, 4):
        out = str(tmp_path / f"run{failing_write}")
        with monkeypatch.context() as patch:
            original, count = weights.os.fsync, 0

            def full(number):
                nonlocal count
                count += 1
                if count >= failing_write:
                    raise OSError(28, "No space left on device")
                original(number)

            patch.setattr(weights.os, "fsync", full)
            with pytest.raises(OSError, match="No space left on device"):
                quietly(ppo.main, ppo_config(**options_of("ppo", out=out)))
        go_on(out)
        assert files_of(out) == whole["ppo"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_metrics_on_a_full_disk_name_the_file(tmp_path):
    cfg = ppo_config(**options_of("ppo", out=str(tmp_path)))
    with RunFolder(cfg, 8, ["iteration"], {}) as run:
        run.metrics.path = "/dev/full"
        with pytest.raises(OSError, match="/dev/full could not be written .No space left"):
            run.metrics.write({"iteration": 0})


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", int)() == 0, reason="root may write")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    os.chmod(tmp_path, 0o500)
    with pytest.raises(PermissionError, match="run"):
        quietly(ppo.main, ppo_config(**options_of("ppo", out=str(tmp_path / "run"))))


def test_an_out_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(OSError, match="run"):
        quietly(ppo.main, ppo_config(**options_of("ppo", out=str(tmp_path / "run"))))
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


# ---- the state as a file -------------------------------------------------------------------------

def test_a_state_comes_back_bit_for_bit(unfinished):
    path = os.path.join(unfinished, STATE_FILE)
    state, tensors = read_state(path)
    write_state(path + "2", state, tensors)
    assert Path(path).read_bytes() == Path(path + "2").read_bytes()
    assert state["step"] == 4 and state["extra"]["kl_coef"] != 0.02
    networks, _ = ppo.make_networks(ppo_config(**options_of("ppo")))
    optimizer = ppo.make_optimizer(networks, ppo_config())
    unpack(tensors, networks, optimizer, path)
    again = checkpoint.pack(networks, optimizer)
    assert set(again) == set(tensors) and all(torch.equal(again[k], tensors[k]) for k in tensors)


def test_a_state_of_another_model_is_refused_before_anything_changes(unfinished):
    path = os.path.join(unfinished, STATE_FILE)
    _, tensors = read_state(path)
    model = ScalarModel(GPT2.from_pretrained(sft_config().model).config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="tensor networks.score_head.weight.* is missing"):
        unpack({k: v for k, v in tensors.items() if "score_head" not in k}, model, optimizer, path)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_flipped_bit_anywhere_in_a_state_is_found(unfinished):
    path = Path(unfinished, STATE_FILE)
    data = path.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        position = rng.randrange(len(data))
        path.write_bytes(data[:position] + bytes([data[position] ^ (1 << rng.randrange(8))])
                         + data[position + 1:])
        with pytest.raises(ValueError, match="training_state.safetensors"):
            read_state(str(path))
    path.write_bytes(data)
    read_state(str(path))
