"""Where a run may write.

THE RULE: a run writes into a new or an empty folder, or into one that holds a run of the same
command. It never writes into a folder that it reads, nor into one above or below such a folder.
"""

import contextlib
import os

from minirlhf.engine.options import check
from minirlhf.engine.state import STATE_FILE
from minirlhf.files.disk import LEFTOVER, lock, open_own, read_json

RUN_FILE = "run.json"               # of a finished run: its options and its last row of metrics
LOCK_FILE = ".lock"
PART_FILES = ("metrics.csv.part", "samples.txt.part", "kept.jsonl.part")


def command_of(cfg) -> str:
    """The name under which a run's folder remembers its command: "PPO" for a PPOConfig."""
    return type(cfg).__name__.removesuffix("Config")


def check_output(out: str, command: str, *inputs: str) -> None:
    """Refuse an output folder that breaks the rule above. `inputs` are the folders that are read.

    Raises: ValueError that says what the folder is or holds.
    """
    check(bool(out.strip()), "--out is empty, expected the name of a folder")
    place = os.path.realpath(out)
    for folder in inputs:
        other = os.path.realpath(folder)
        same = os.path.exists(out) and os.path.exists(folder) and os.path.samefile(out, folder)
        check(place != other and not same, f"--out {out} is the folder that this stage starts "
              "from; name another one")
        above, below = os.path.join(place, ""), os.path.join(other, "")
        nested = os.path.exists(other) and (other.startswith(above) or place.startswith(below))
        check(not nested, f"--out {out} lies above or below {folder}, which this stage reads; name "
              "another one")
    if not os.path.lexists(out):
        return
    check(os.path.isdir(out), f"--out {out} is a file, expected the name of a folder")
    names = [name for name in os.listdir(out)
             if name not in (LOCK_FILE, *PART_FILES) and not LEFTOVER.fullmatch(name)]
    if not names or STATE_FILE in names:                 # of a state the command is checked later
        return
    path = os.path.join(out, RUN_FILE)
    other_command = read_json(path).get("command") if os.path.exists(path) else None
    holds = f"a run of {other_command}" if other_command else f"{names[0]} and no run of minirlhf"
    check(other_command == command, f"--out {out} holds {holds}, expected a new or an empty folder "
          f"or one with a run of {command}; name another one")


def check_output_file(path: str, mark: bytes, kind: str) -> None:
    """Refuse to write over a file that is not of this kind: it has no `mark` near its beginning."""
    ours = not os.path.lexists(path)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            ours = mark in file.read(4096)
    check(ours, f"--out {path} is there and no {kind} of minirlhf; name another file")


def lock_folder(folder: str):
    """Lock `folder`, returning the open lock file; the system releases it however we end.

    Windows and file systems without locks are not protected from two runs in one folder.
    """
    file = open_own(os.path.join(folder, LOCK_FILE), "ab")
    try:
        lock(file)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another run is writing into this folder; wait for its end, or "
                         "name another folder by --out") from None
    except OSError:
        pass                                             # a file system without locks
    return file


@contextlib.contextmanager
def result_folder(out: str):
    """Make and lock the folder of a result before the work that the result takes; "" for none."""
    if not out:
        yield
        return
    os.makedirs(out, exist_ok=True)
    file = lock_folder(out)
    try:
        yield
    finally:
        file.close()
