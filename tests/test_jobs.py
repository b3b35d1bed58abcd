"""jobs.py: independent jobs in processes of their own, with one thread each."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import environment

from minirlhf.engine import jobs
from minirlhf.engine.jobs import run_jobs
from minirlhf.engine.options import Stopped

posix = pytest.mark.skipif(sys.platform == "win32" or os.cpu_count() == 1,
                           reason="jobs run in turn here")


def describe(number: int) -> tuple[int, int, int]:
    print(f"number {number}")
    return number, torch.get_num_threads(), os.getpid()


def fail_or_wait(what: str) -> str:
    if what == "fail":
        raise ValueError("a sentence")
    if what == "die":
        os._exit(3)
    if what == "lock":
        return threading.Lock()                          # which no other process can have
    time.sleep(60)
    return what


def print_anything(number: int) -> None:
    print("caf\u00e9, not ended", end="")


def stop_when_asked(folder: str) -> None:
    """Says that it runs; a signal raises Stopped in it."""
    signal.signal(signal.SIGINT, jobs.stop)
    open(os.path.join(folder, f"{os.getpid()}"), "w").close()
    time.sleep(60)


@posix
def test_jobs_run_in_processes_of_their_own_with_one_thread_and_named_lines(capfd):
    found = run_jobs(describe, {"one": (1,), "two": (2,)})
    assert [number for number, _, _ in found] == [1, 2]
    assert [threads for _, threads, _ in found] == [1, 1]
    assert len({os.getpid(), *[process for _, _, process in found]}) == 3
    assert sorted(capfd.readouterr().out.split("\n"))[-2:] == ["one: number 1", "two: number 2"]


@pytest.mark.parametrize("names, cores", [(("one",), 2), (("one", "two"), 1)])
def test_one_job_or_one_core_needs_no_other_process(names, cores, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = run_jobs(describe, {name: (1,) for name in names})
        assert found == [(1, 1, os.getpid())] * len(names) and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@posix
@pytest.mark.parametrize("what, kind, sentence", [
    ("fail", ValueError, "a sentence"), ("die", ChildProcessError, "ended with code 3"),
    ("lock", TypeError, "cannot pickle")])
def test_the_error_of_a_job_ends_the_others_and_is_raised(what, kind, sentence):
    started = time.perf_counter()
    with pytest.raises(kind, match=sentence):
        run_jobs(fail_or_wait, {"one": ("wait",), "two": (what,)})
    assert time.perf_counter() - started < 50


@posix
def test_what_jobs_print_is_not_lost_and_no_console_stops_them(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    run_jobs(print_anything, {"one": (1,), "two": (2,)})
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines)[-2:] == ["one: caf?, not ended", "two: caf?, not ended"]


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_jobs_that_are_not_ready_yet(number, monkeypatch, capfd):
    collect = jobs.collect

    def collect_after_a_signal(*arguments):              # the others still import torch
        os.kill(os.getpid(), number)
        return collect(*arguments)

    monkeypatch.setattr(jobs, "collect", collect_after_a_signal)
    with pytest.raises(Stopped) as stop:
        run_jobs(fail_or_wait, {"one": ("wait",), "two": ("wait",)})
    assert stop.value.signal == number and "Traceback" not in capfd.readouterr().err


@posix
def test_a_signal_that_comes_too_late_for_the_jobs_is_not_lost(monkeypatch):
    collect = jobs.collect

    def collect_after_a_signal(workers, came):
        for process in workers.values():
            process.join()
        os.kill(os.getpid(), signal.SIGINT)
        return collect(workers, came)

    monkeypatch.setattr(jobs, "collect", collect_after_a_signal)
    with pytest.raises(Stopped):
        run_jobs(describe, {"one": (1,), "two": (2,)})


PROGRAM = """
import sys
import test_jobs
from minirlhf.engine.jobs import run_jobs
from minirlhf.engine.options import Stopped
if __name__ == "__main__":
    try:
        run_jobs(test_jobs.stop_when_asked, {"one": (sys.argv[1],), "two": (sys.argv[1],)})
    except Stopped as stop:
        print("stopped by", stop.signal)
"""


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, 9])    # 9: no SIGKILL on Windows
def test_signals_reach_the_jobs_and_none_outlives_its_parent(number, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    (tmp_path / "running").mkdir()
    process = subprocess.Popen([sys.executable, str(program), str(tmp_path / "running")],
                               env=environment(), stdout=subprocess.PIPE, text=True)
    until = time.time() + 120
    while len(os.listdir(tmp_path / "running")) < 2 and time.time() < until:
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=50)
    assert number == 9 or f"stopped by {number}" in output
    for name in os.listdir(tmp_path / "running"):
        until = time.time() + 20
        while os.path.exists(f"/proc/{name}") and time.time() < until:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{name}")


def test_a_stop_goes_from_one_process_to_another():
    import pickle
    stop = pickle.loads(pickle.dumps(Stopped("sentence", 2)))
    assert (str(stop), stop.signal) == ("sentence", 2)
