"""Run answers that a model wrote, each in a process of its own, under limits, killed as a whole.

    run_answers([("x + 3", (1, 10)), ("exit(0)", (1, 10))])

gives an `Outcome` for each. The process gets the answer and the inputs, never the right values: its
caller compares. It has 1 second of processor time, 256 MB and 64 kB of output, may create no
process and write no file, and opens none (`harness.py`).

**This is no sandbox.** The answer runs as you, on your machine. Whoever wants to get round an audit
hook can: Python's documentation says so. These limits keep a small model's accidents away from you,
and keep it from being paid for them. For answers of a model that knows more Python than ours, use a
container or a virtual machine without network, and a user without rights.

What is the answer's fault is an outcome; what is the machine's is an error that stops the run: a
process that cannot be started is not a wrong answer.
Lecture: lectures/09-what-came-after.md, "Rewards from execution".
"""

import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from minirlhf.engine.options import check

HARNESS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "harness.py")
COMMAND = (sys.executable, "-I", "-S", "-W", "ignore", HARNESS)
WALL_SECONDS = 10.0                 # for an answer that sleeps; processor time ends the others
MAX_OUTPUT = 1 << 16                # bytes
MAX_SOURCE = 1 << 12                # bytes of an answer; longer ones are not run
LIMITS = {                          # soft and hard: at the soft one the process is told, or ended
    "RLIMIT_CPU": (1, 2),                   # seconds of processor time
    "RLIMIT_AS": (256 << 20, 256 << 20),    # bytes of memory
    "RLIMIT_FSIZE": (0, 0),                 # bytes of a file that is written
    "RLIMIT_NPROC": (0, 0),                 # further processes; not enforced for root
    "RLIMIT_CORE": (0, 0)}                  # bytes of a core dump
NOT_ON_MACOS = ("RLIMIT_AS",)               # its kernel refuses to set it
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")    # some Pythons start only with these
SWEEP = "MINIRLHF_ANSWERS"          # variable of the environment, by which we know our processes
NO_FAULT = "that is no fault of the answer's, so the run stops"
MAX_CACHE = 200_000                 # outcomes that are remembered


@dataclass(frozen=True)
class Outcome:
    """What became of an answer.

    end: "ran" (all inputs were tried), "refused" (tried what it may not do), "time", "output" (over
    a limit), "died" (ended before its time: os._exit, a crash, out of memory), "long" (not run).
    results: {input: "value 7", "raised ValueError" or "gave object"}; empty unless "ran".
    why: of "refused" the event, such as "open".
    """
    end: str
    results: dict[int, str] = field(default_factory=dict)
    why: str = ""

    def passes(self, expected: dict[int, object]) -> bool:
        """Whether the answer gave exactly the right value for each of these inputs.

        Types count, too: 1, 1.0 and True are three values. What is compared is their text, so no
        `==` of the answer's is asked.

        Example: Outcome("ran", {1: "value 4", 2: "raised ZeroDivisionError"}).passes({1: 4}).
        """
        return all(self.results.get(x) == f"value {value!r}" for x, value in expected.items())


def check_system() -> None:
    """Refuse a system that cannot limit a process."""
    check(os.name == "posix", "answers are run under limits of processor time and memory, which "
          "Windows does not offer to Python; use Linux, macOS or WSL")


def start_harness(folder: str, environment: dict[str, str]) -> subprocess.Popen:
    """A process of its own session, and so of its own group, in the empty folder `folder`."""
    try:
        return subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, cwd=folder, start_new_session=True,
                                env=environment)
    except OSError as error:
        raise OSError(f"cannot start {COMMAND[0]} to run an answer: {error.strerror}; {NO_FAULT}"
                      ) from None


def read_until_end(process: subprocess.Popen) -> tuple[bytes, str]:
    """The process's output until it and its descendants have closed it: (bytes, "")...

    ... or, when a limit was passed before, what came until then and "time" or "output".
    """
    data, deadline, pipe = b"", time.monotonic() + WALL_SECONDS, process.stdout.fileno()
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            return data, "time"
        part = os.read(pipe, 1 << 14)
        if not part:
            return data, ""
        data += part
        if len(data) > MAX_OUTPUT:
            return data, "output"


def kill_group(process: subprocess.Popen) -> int:
    """Kill the process and all of its group; returns its exit status.

    careful: kill before `wait`. Afterwards the system may give the number to somebody else.
    """
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):        # macOS says the latter of a dead group
        pass
    return process.wait()


def kill_marked(mark: str) -> int:
    """Kill all processes with our mark in their environment; returns how many there were.

    A descendant that left the group has it still. Linux only: elsewhere 0.
    """
    killed, needle = 0, f"{SWEEP}={mark}".encode()
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            try:
                with open(f"/proc/{name}/environ", "rb") as file:
                    if needle in file.read().split(b"\0"):
                        os.kill(int(name), signal.SIGKILL)
                        killed += 1
            except OSError:                              # it has ended, or belongs to another user
                pass
    return killed


def judge_output(mark: str, inputs: tuple[int, ...], data: bytes, limit: str,
                 status: int) -> Outcome:
    """The outcome, from what the process wrote and how it ended.

    Raises: OSError if the harness did not get ready: then the machine is at fault, not the answer.
    """
    text = data.decode("utf-8", "replace")
    lines = [line[len(mark) + 1:] for line in text.split("\n") if line.startswith(mark + " ")]
    if lines[:1] != ["ready"]:
        said = " ".join(text.split())[-300:] or "nothing"
        raise OSError(f"{COMMAND[0]} did not get ready to run an answer: exit status {status}, it "
                      f"said {said}; {NO_FAULT}")
    last = lines[-1]
    if last.startswith("refused "):
        return Outcome("refused", why=last[len("refused "):])
    if limit:
        return Outcome(limit)
    if status == -signal.SIGXCPU:
        return Outcome("time")
    if last != "end":
        return Outcome("died")
    return Outcome("ran", dict(zip(inputs, lines[1:-1])))


def run_answer(source: str, inputs: tuple, batch: str) -> Outcome:
    """Run one answer; `batch` marks its processes. Raises: OSError, as `judge_output`."""
    if len(source.encode("utf-8", "replace")) > MAX_SOURCE:
        return Outcome("long")
    mark = secrets.token_hex(16)
    limits = {name: value for name, value in LIMITS.items()
              if not (sys.platform == "darwin" and name in NOT_ON_MACOS)}
    seconds = math.ceil(WALL_SECONDS) + 1
    job = ascii((mark, source, inputs, limits, seconds)).encode("ascii")
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="minirlhf-answer-") as folder:
        process = start_harness(folder, {**environment, SWEEP: batch})
    # the folder is gone before the answer comes: no file is made in it, and no kill leaves it
    try:
        with process.stdin:
            process.stdin.write(job)
        data, limit = read_until_end(process)
    except BrokenPipeError:                              # it ended before it read its job
        data, limit = process.stdout.read(), ""
    finally:
        status = kill_group(process)
        process.stdout.close()
    return judge_output(mark, inputs, data, limit, status)


CACHE: dict[tuple[str, tuple], Outcome] = {}


def run_answers(jobs: list[tuple[str, tuple]]) -> list[Outcome]:
    """An outcome for each (source, inputs), a few at a time; the same pair is run only once.

    No process of the answers is left when it returns, or raises; without /proc, as on macOS, none
    of their groups is.

    Raises: OSError if the machine cannot run answers; ValueError on Windows.
    """
    check_system()
    if len(CACHE) > MAX_CACHE:
        CACHE.clear()
    batch = secrets.token_hex(16)
    todo = [job for job in dict.fromkeys(jobs) if job not in CACHE]
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            outcomes = pool.map(run_answer, *zip(*todo), [batch] * len(todo)) if todo else []
            CACHE.update(zip(todo, outcomes))
    finally:
        if todo:
            kill_marked(batch)
    return [CACHE[job] for job in jobs]
