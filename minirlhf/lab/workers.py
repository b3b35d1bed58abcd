"""Tasks at work: several processes, one thread each, every finished task on the disk at once."""

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import time
import traceback
from dataclasses import dataclass

import torch

from minirlhf.engine.options import Stopped, check, describe_error
from minirlhf.files.disk import open_own, read_json, write_json
from minirlhf.lab.experiment import load_experiment
from minirlhf.lab.shared import Task

EXPECTED = (ValueError, OSError, FloatingPointError, MemoryError)    # their text is a sentence


def result_path(task: Task) -> str:
    """The file of a finished task."""
    return os.path.join(task.out, task.experiment, "tasks", task.file_name + ".json")


def log_path(task: Task) -> str:
    """Where all that the trainers print goes."""
    return task.folder + ".log"


# ---- in a worker ---------------------------------------------------------------------------------

def core_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])                           # user and system, own and children's


def run_task(task: Task) -> dict:
    """Run a task and keep its figures; returns {"seconds", "figures"}, seconds of one core.

    Its folder begins empty and is deleted afterwards; the log stays beside it.
    """
    module = load_experiment(task.experiment)
    shutil.rmtree(task.folder, ignore_errors=True)
    os.makedirs(task.folder)
    started = core_seconds()
    with io.TextIOWrapper(open_own(log_path(task), "wb"), encoding="utf-8",
                          line_buffering=True) as log, \
            contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            figures = module.run(task)
        except BaseException:
            traceback.print_exc(file=log)
            raise
    for name, value in figures.items():
        check(isinstance(value, (int, float, list)), f"{task}: {name} is {value!r}, expected a "
              "number or a list of numbers")
    result = {"seconds": core_seconds() - started, "figures": figures}
    write_json(result_path(task), result)
    shutil.rmtree(task.folder, ignore_errors=True)
    return result


def work(connection) -> None:
    """A worker's life: take a task, send ("done", result) or ("failed", sentence), until told."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)         # the parent decides what Ctrl-C means
    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return                                       # the parent is gone
        if task is None:
            return
        try:
            answer = ("done", run_task(task))
        except BaseException as error:
            sentence = describe_error(error)
            if not isinstance(error, EXPECTED):
                sentence = f"{type(error).__name__}: {sentence}"
            connection.send(("failed", sentence))
            raise SystemExit(1) from None
        connection.send(answer)


# ---- in the parent -------------------------------------------------------------------------------

@dataclass
class Worker:
    """A process and our end of its pipe."""
    process: multiprocessing.Process
    connection: multiprocessing.connection.Connection
    task: Task | None = None


def start_worker() -> Worker:
    """A process of its own: it begins with a fresh Python, not with a copy of ours."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return Worker(process, ours)


def stop_workers(workers: list[Worker], gently: bool) -> None:
    """End the workers; not gently: now, in the middle of a task."""
    for worker in workers:
        if gently:
            with contextlib.suppress(OSError):           # it may have died by itself
                worker.connection.send(None)
        else:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(20)
        if worker.process.is_alive():
            worker.process.kill()
        worker.connection.close()


def on_sigterm(number: int, frame) -> None:
    """Signal handler: SIGTERM stops as Ctrl-C does."""
    raise Stopped("", number)


def receive(worker: Worker) -> tuple[str, dict | str]:
    """What a worker says of its task."""
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        return "failed", (f"its process ended with code {worker.process.exitcode} and without a "
                          "word; was the memory full?")


def run_tasks(tasks: list[Task], count: int, tell) -> dict[Task, str]:
    """Run all tasks, `count` at a time; returns the sentences of those that failed.

    `tell(task, result, done, seconds)` is called after each one that succeeded. When a task fails
    those of its experiment that have not begun are left out.
    """
    waiting, failed, done, started = list(tasks), {}, 0, time.perf_counter()
    before = signal.signal(signal.SIGTERM, on_sigterm)
    workers: list[Worker] = []
    finished = False
    try:
        while True:
            idle = [worker for worker in workers if worker.task is None]
            while waiting and (idle or len(workers) < count):
                if not idle:
                    workers.append(start_worker())
                    idle = [workers[-1]]
                worker = idle.pop()
                worker.task = waiting.pop(0)
                worker.connection.send(worker.task)
            busy = {worker.connection: worker for worker in workers if worker.task}
            if not busy:
                break
            for connection in multiprocessing.connection.wait(list(busy)):
                worker = busy[connection]
                word, answer = receive(worker)
                task, worker.task = worker.task, None
                if word == "done":
                    done += 1
                    tell(task, answer, done, time.perf_counter() - started)
                else:
                    failed[task] = answer
                    print(f"{task}: {answer} (all of it in {log_path(task)})", flush=True)
                    waiting = [one for one in waiting if one.experiment != task.experiment]
                    workers.remove(worker)
                    stop_workers([worker], gently=False)
        finished = True
    finally:
        signal.signal(signal.SIGTERM, before)
        stop_workers(workers, gently=finished)
    return failed


# ---- what is there already -----------------------------------------------------------------------

def read_result(task: Task) -> dict | None:
    """What a finished task kept, None if it is not finished.

    Raises: ValueError naming a file that no task wrote.
    """
    path = result_path(task)
    if not os.path.exists(path):
        return None
    result = read_json(path)
    ok = isinstance(result.get("figures"), dict) and isinstance(result.get("seconds"), float)
    check(ok, f"{path}: expected the figures of a task, found something else; delete it")
    return result
