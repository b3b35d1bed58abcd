"""Independent jobs at the same time, each in a process of its own that computes with one thread.

Networks as small as the text world's gain little from threads: two of them side by side are ready
long before one after the other. A job computes with one thread also where there is one process
only, so that the digits of its result do not depend on how many run at a time.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from multiprocessing.reduction import ForkingPickler

import torch

from minirlhf.engine.options import Stopped, under_debugger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_jobs(function, jobs: dict) -> list:
    """[function(*arguments) for arguments in jobs.values()], all at the same time.

    `jobs` has a name for each job, which begins every line that it prints. In turn, in this
    process, where there is one core or one job, on Windows, or under a debugger. Ctrl-C and SIGTERM
    reach the jobs, and what they raise is raised here when the last one has ended.
    Raises: what a job raised, ChildProcessError for one that died; the others are then asked to
    stop.
    """
    if len(jobs) < 2 or os.cpu_count() == 1 or sys.platform == "win32" or under_debugger():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return [function(*arguments) for arguments in jobs.values()]
        finally:
            torch.set_num_threads(threads)
    context, workers = multiprocessing.get_context("spawn"), {}
    with pass_on_signals(workers.values()) as came:
        with blocked_signals():                          # here, and in a worker until it is ready
            for name, arguments in jobs.items():
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(theirs, name, function, arguments))
                process.start()
                theirs.close()
                workers[ours] = process
        return collect(workers, came)


def collect(workers: dict, came: list[int]) -> list:
    """The results of all workers, in order; raises the first error when all have ended.

    Signals that `came` when there was nothing left to stop are raised, too.
    """
    results, errors, waiting = {}, [], list(workers)
    while waiting:
        # careful: a signal that another thread of ours receives does not end the waiting
        for connection in multiprocessing.connection.wait(waiting, timeout=1):
            waiting.remove(connection)
            try:
                results[connection], error = connection.recv()
            except EOFError:
                workers[connection].join()
                error = ChildProcessError("a process ended with code "
                                          f"{workers[connection].exitcode} and without a word; "
                                          "was the memory full?")
            errors += [error] if error is not None else []
            if error is not None and not came:           # otherwise they know it already
                for other in waiting:
                    workers[other].terminate()
    for process in workers.values():
        process.join()
    errors += [Stopped("stopped", number) for number in came]
    if errors:
        raise errors[0]
    return [results[connection] for connection in workers]


@contextlib.contextmanager
def pass_on_signals(processes):
    """Within it Ctrl-C and SIGTERM go to the processes, and not to this one; yields those."""
    came: list[int] = []

    def pass_on(number, frame):
        """Signal handler: note the signal, and send it to those that still run."""
        came.append(number)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in SIGNALS if main}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def blocked_signals():
    """Within it Ctrl-C and SIGTERM wait, also for processes that are started in it."""
    multiprocessing.resource_tracker.ensure_running()    # careful: its start unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in the other process ------------------------------------------------------------------------

class Named:
    """Standard output, each line of which begins with a name."""

    def __init__(self, stream, name: str):
        self.stream, self.name, self.line = stream, name, ""

    def write(self, text: str) -> None:
        """Write the lines that are complete."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.stream.write(f"{self.name}: {line}\n" if line else "\n")

    def flush(self) -> None:
        """Write what waits in the stream; an incomplete line waits on."""
        self.stream.flush()


def work(connection, name: str, function, arguments: tuple) -> None:
    """A worker's life: compute, send (result, None) or (None, error)."""
    os.setpgrp()                        # Ctrl-C goes to the parent, which passes it on
    for number in SIGNALS:
        signal.signal(number, stop)
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="replace")             # as `one_sentence` does in the parent
    sys.stdout = Named(sys.stdout, name)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)    # now they can be told of
        answer = ForkingPickler.dumps((function(*arguments), None))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)      # the answer is sent as a whole
    except BaseException as error:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        send(connection, ForkingPickler.dumps((None, error)))
        raise SystemExit(1) from None   # the parent raises the error
    send(connection, answer)


def send(connection, answer: bytes) -> None:
    """Send a worker's answer, after all that it printed."""
    with contextlib.suppress(OSError):                   # the reader may have left
        print(end="\n" if sys.stdout.line else "", flush=True)
    connection.send_bytes(answer)


def stop(number: int, frame) -> None:
    """Signal handler, where a run has none of its own."""
    raise Stopped("stopped", number)


def end_with_the_parent() -> None:
    """Ask this process to stop when its parent is gone."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)    # the main thread shall receive them
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
