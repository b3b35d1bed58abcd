"""What is measured in a fresh process, so that its time and its memory are its own."""

import json
import os
import subprocess
import sys
import threading


def run_apart(name: str, words: list[str], threads: int = 1) -> dict:
    """The figures that `python words` prints as JSON; what it prints beside goes to our output.

    Raises: ValueError, by `name`, with the last line that it printed, if it fails.
    """
    # the pipe to its input closes when this process ends, whatever ends it
    process = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               encoding="utf-8",
                               env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    printed = process.stdout.read().strip()
    print(printed)                                       # into the task's log
    lines = printed.split("\n")
    if process.wait() != 0:
        raise ValueError(f"{name} ended with code {process.returncode}: {lines[-1]}")
    return json.loads([line for line in lines if line.startswith("{")][-1])


def leave_with_the_parent() -> None:
    """In a process of `run_apart`: end when the one that started it has ended."""
    threading.Thread(target=read_until_the_end, daemon=True).start()


def read_until_the_end() -> None:
    """Wait for the end of the input, which is the end of the parent."""
    sys.stdin.read()
    os._exit(1)
