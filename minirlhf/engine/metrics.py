"""The text files that grow during a run: metrics.csv, samples.txt and kept.jsonl."""

import csv
import hashlib
import os

from minirlhf.engine.options import check
from minirlhf.files.disk import advice, open_own, open_regular, parse_json

MAX_KEPT = 16 << 20                 # bytes of kept.jsonl that are read


class PartFile:
    """A text file that grows during a run, called <name>.part until the run is finished.

    So a run that was stopped does not leave its metrics beside the weights of an earlier one.
    `keep` is the size in bytes of an interrupted run's file at its last checkpoint, and the SHA-256
    of those bytes; what came after them will be written again.
    """

    def __init__(self, folder: str, name: str, keep: tuple[int, str] = (0, "")):
        os.makedirs(folder, exist_ok=True)
        self.path, self.digest = os.path.join(folder, name + ".part"), hashlib.sha256()
        size, expected = keep
        if size == 0:
            open_own(self.path, "wb").close()
            return
        if not os.path.exists(self.path):
            open_own(self.path, "wb").close()
        with open_own(self.path, "rb+") as file:
            self.digest.update(file.read(size))
            check(self.digest.hexdigest() == expected, f"{self.path} is not what it was at the "
                  "last checkpoint; put it back, or start over in another folder")
            file.truncate(size)

    def append(self, text: str) -> None:
        """Append `text`; it is in the file when this returns."""
        data = text.encode("utf-8")
        try:
            with open_own(self.path, "ab") as file:
                file.write(data)
        except OSError as error:
            raise self.not_written(error) from None
        self.digest.update(data)

    def sync(self) -> tuple[int, str]:
        """Wait until the disk has all of it; returns the file's size in bytes and its SHA-256."""
        try:
            with open_own(self.path, "rb+") as file:
                os.fsync(file.fileno())
                return os.fstat(file.fileno()).st_size, self.digest.hexdigest()
        except OSError as error:
            raise self.not_written(error) from None

    def not_written(self, error: OSError) -> OSError:
        """The error as a sentence that names the file."""
        return OSError(error.errno, f"{self.path} could not be written ({error.strerror}): "
                       f"{advice(error)}, then go on from the last checkpoint")

    def finish(self) -> None:
        """Give the file its name; nothing is written after it."""
        os.replace(self.path, self.path.removesuffix(".part"))


class MetricsFile(PartFile):
    """`metrics.csv` of a run: one row per step, on disk as soon as it is written.

    Example: file = MetricsFile(folder, ["step", "loss"]); file.write({"step": 1, "loss": 0.5}).
    """

    def __init__(self, folder: str, fields: list[str], keep: tuple[int, str] = (0, "")):
        super().__init__(folder, "metrics.csv", keep)
        self.fields = fields
        if keep[0] == 0:
            self.append(",".join(fields) + "\n")

    def write(self, row: dict) -> None:
        """Append one row; the keys must be exactly the fields, a value "" is an empty cell."""
        assert list(row) == self.fields, (list(row), self.fields)
        self.append(",".join(format_number(value) for value in row.values()) + "\n")


def format_number(value) -> str:
    """Seven significant digits for a float, other values as they are."""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def whole_or_part(folder: str, name: str) -> str:
    """Where a run's file is: under its name, or as <name>.part while the run is not finished."""
    path = os.path.join(folder, name)
    part = path + ".part"
    return part if os.path.exists(part) and not os.path.exists(path) else path


def read_metrics(folder: str) -> list[dict[str, float]]:
    """The rows of a run's `metrics.csv` as numbers; empty cells are left out.

    Of a run that is not finished and follows no other, those of `metrics.csv.part`.
    Raises: FileNotFoundError without the file; ValueError naming it for anything but numbers under
    the names of the first line.
    """
    path = whole_or_part(folder, "metrics.csv")
    with open_regular(path) as file:
        text = file.read().decode("utf-8", "replace")
    try:
        rows = list(csv.DictReader(text.splitlines(), strict=True))
        return [{key: float(cell) for key, cell in row.items() if cell} for row in rows]
    except (TypeError, ValueError, csv.Error):
        raise ValueError(f"{path}: expected a number in every cell, under the names of the first "
                         "line") from None


def read_kept(folder: str) -> list[dict]:
    """The records of a run's `kept.jsonl`; none if there is no such file, as of older versions.

    Raises: ValueError naming file and line for what is no JSON object, or for more than 16 MB.
    """
    path = whole_or_part(folder, "kept.jsonl")
    if not os.path.exists(path):
        return []
    with open_regular(path) as file:
        data = file.read(MAX_KEPT + 1)
    check(len(data) <= MAX_KEPT, f"{path}: expected at most {MAX_KEPT} bytes; is it of a run?")
    complete = data.split(b"\n")[:-1]                    # the rest is still being written
    return [parse_json(line, f"{path}:{i}") for i, line in enumerate(complete, start=1)]
