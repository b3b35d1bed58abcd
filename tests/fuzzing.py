"""What the tests of all readers of files from strangers share: a tally of many mutated files.

    MINIRLHF_FUZZ=100000 python -m pytest -s -k mutated

runs the full numbers and prints, for each reader, how many files it met, how many were still
valid, the time and the memory that they took. Without the variable a few thousand have to do.
"""

import os
import random
import sys
import time

FUZZ = int(os.environ.get("MINIRLHF_FUZZ", "6000"))      # mutated safetensors files; others: a part
MEBIBYTE = 1 << 20


class Tally:
    """Counts what a reader does with mutated files; anything but a `ValueError` passes through.

    Memory is the peak of this process since the tally began: exact on Linux, elsewhere not known.
    The time of a file is the processor's, so that a busy machine fails no test.
    """

    def __init__(self, what: str):
        self.what, self.read, self.refused, self.slowest = what, 0, 0, 0.0
        self.began, self.memory = time.perf_counter(), reset_peak()

    def attempt(self, name: str, reader, *arguments):
        """The reader's result, or None when it refused the file in a short error that names it."""
        started, found = time.process_time(), None
        try:
            found = reader(*arguments)
            self.read += 1
        except ValueError as error:
            message = str(error)
            assert name in message and len(message) < 1000, (name, message[:2000])
            self.refused += 1
        self.slowest = max(self.slowest, time.process_time() - started)
        return found

    def finish(self, seconds: float = 2.0, mebibytes: int = 64) -> None:
        """Print the tally; fail if one file took `seconds`, or all of them `mebibytes` of memory.

        Both limits are far above what is found, for slow machines.
        """
        grown = max(0, peak_memory() - self.memory) / MEBIBYTE
        print(f"\n{self.what}: {self.read + self.refused} files, {self.read} of them read, "
              f"{time.perf_counter() - self.began:.1f} s, slowest {1000 * self.slowest:.0f} ms, "
              f"memory +{grown:.0f} MiB")
        assert self.slowest < seconds, f"{self.what}: a file took {self.slowest:.1f} s"
        assert grown < mebibytes, f"{self.what}: memory grew by {grown:.0f} MiB"


def reset_peak() -> int:
    """Let the peak of memory begin anew, where the system can; the memory in use now, bytes."""
    if sys.platform.startswith("linux"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return peak_memory()


def peak_memory() -> int:
    """The most memory that this process held since `reset_peak`, bytes; 0 where nobody knows."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/status") as file:
        lines = [line for line in file if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024


def damage(rng: random.Random, content: bytes, inserted: list[bytes]) -> bytes:
    """Insert, overwrite, repeat, cut out or cut off at a random place, once or several times."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not content:
            break
        at = rng.randrange(len(content))
        end = at + rng.choice([1, 2, 20, len(content)])
        content = rng.choice([content[:at] + rng.choice(inserted) + content[at:],
                              content[:at] + bytes([rng.randrange(256)]) + content[at + 1:],
                              content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)])
                              + content[at + 1:],
                              content[:end] + content[at:],
                              content[:at] + content[end:],
                              content[:at]])
    return content


def write_hole(path, head: bytes, size: int) -> bool:
    """A file of `size` bytes that is all hole behind `head`; False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False                                 # others might fill the disk with it
    with open(path, "wb") as file:
        file.write(head)
        try:
            file.truncate(size)
        except OSError:
            return False
    return True


def put(path, content: bytes) -> None:
    """Write a file anew; many file systems wait for the disk when one is emptied and refilled."""
    if os.path.exists(path):
        os.unlink(path)
    with open(path, "xb") as file:
        file.write(content)
