"""A run's folder: it survives a kill at any moment, and holds whole files or none.

While a run is under way its folder holds
    training_state.safetensors      all that is needed to go on: one file, replaced as a whole
    metrics.csv.part, samples.txt.part
    kept.jsonl.part                 what pages and pictures need beside: few, small JSON lines
and when the run is finished the model's files, metrics.csv, samples.txt, kept.jsonl and run.json.
Until then the files of an earlier finished run stay as they are. A run that goes on is, bit for
bit, the run that was not interrupted, on one CPU with one number of threads.
"""

import bdb
import json
import math
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict

import torch
import torch.nn as nn

from minirlhf.engine import fast, parallel
from minirlhf.engine.fields import check_fields
from minirlhf.engine.metrics import MetricsFile, PartFile
from minirlhf.engine.options import Stopped, check, printable, under_debugger
from minirlhf.engine.output import (
    LOCK_FILE,
    PART_FILES,
    RUN_FILE,
    check_output,
    command_of,
    lock_folder,
)
from minirlhf.engine.state import STATE_FILE, pack, read_state, unpack, write_state
from minirlhf.files.disk import read_json, remove_leftovers, write_atomically, write_json
from minirlhf.files.hub import find_folder
from minirlhf.files.pretrained import save_folder

MAY_CHANGE = ("out", "resume", "save_every")    # every other option could change the result


# ---- before the run ------------------------------------------------------------------------------

def check_run_options(cfg) -> None:
    """Check all fields of a trainer's config, and that its device is there."""
    check_fields(cfg)
    parallel.check_hardware(cfg)


def begin(cfg, model: str, *others: str) -> str:
    """Join the processes of torchrun, fetch the model if need be, refuse an --out that is read.

    `others` are further folders that the stage starts from. Returns the model's folder.
    """
    parallel.start(cfg.device)
    rows = getattr(cfg, "minibatch_size", cfg.batch_size)
    check(rows >= parallel.processes(), f"a step has {rows} rows, fewer than the "
          f"{parallel.processes()} processes; start fewer, or make the batch larger")
    folder = parallel.first_alone(find_folder, model)
    check_output(cfg.out, command_of(cfg), folder, *filter(os.path.exists, others))
    return folder


# ---- the folder of one run -----------------------------------------------------------------------

class RunFolder:
    """The folder `cfg.out` of a trainer's run of `total` steps (of PPO: iterations).

        with RunFolder(cfg, total, fields, inputs, networks, optimizer) as run:
            for step in run.steps():                     # those that are left, after --resume
                ...
                run.log(row)
            run.publish(tokenizer, network)
        return run.row

    `fields` are the columns of metrics.csv; `inputs` are fingerprints of what the run begins with.
    Within the block Ctrl-C and SIGTERM are obeyed at the end of the step, after a checkpoint.
    With several processes only process 0 writes. A run that is finished has no steps left, and
    there is nothing to publish.
    """

    def __init__(self, cfg, total: int, fields: list[str], inputs: dict[str, str],
                 networks: nn.Module | None = None,
                 optimizer: torch.optim.Optimizer | None = None):
        self.cfg, self.folder, self.total, self.fields = cfg, cfg.out, total, fields
        self.inputs, self.networks, self.optimizer = inputs, networks, optimizer
        self.command = command_of(cfg)
        self.path = os.path.join(cfg.out, STATE_FILE)
        self.step, self.row, self.tensors = 0, {}, {}
        self.finished, self.signal, self.lock, self.handlers = False, 0, None, {}
        self.began = self.saved = 0                      # steps at the start, in the last state
        self.writer, self.device = parallel.rank() == 0, torch.device(cfg.device)

    def __enter__(self) -> "RunFolder":
        if self.writer:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = lock_folder(self.folder)
        try:
            if self.writer:
                remove_leftovers(self.folder, seconds=0)     # nobody else writes here now
            files = self.find_state()
            self.check_agreement()
            if self.writer and not self.finished:
                self.metrics = MetricsFile(self.folder, self.fields,
                                           files.get("metrics.csv", (0, "")))
                self.samples = PartFile(self.folder, "samples.txt",
                                        files.get("samples.txt", (0, "")))
                self.kept = PartFile(self.folder, "kept.jsonl", files.get("kept.jsonl", (0, "")))
            if self.tensors:
                unpack(self.tensors, self.networks, self.optimizer, self.path)
                self.tensors = {}
            if self.networks is not None:
                print(fast.describe_products(self.networks), end="", flush=True)
        except BaseException:
            self.unlock()
            raise
        if threading.current_thread() is threading.main_thread() and not under_debugger():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.ask_to_stop)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.unlock()
        if isinstance(error, bdb.BdbQuit) and self.began == 0:
            self.clean_up()                              # a tour in the debugger leaves nothing
            self.leave_no_empty_folder()
        if error is None or isinstance(error, Stopped):
            parallel.finish()
        if isinstance(error, FloatingPointError):
            error.args = (f"{error}. The last good checkpoint is {self.last_good()}",)
        if error is None and self.signal:
            raise Stopped(f"stopped by signal {self.signal}; {self.folder} is finished",
                          self.signal)

    def leave_no_empty_folder(self) -> None:
        """Remove the run's folder if it holds nothing but the lock."""
        if self.writer and os.listdir(self.folder) == [LOCK_FILE]:
            os.unlink(os.path.join(self.folder, LOCK_FILE))
            os.rmdir(self.folder)

    def unlock(self) -> None:
        """Let another process use the folder."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def last_good(self) -> str:
        """Where an interrupted or failed run can be taken up, in words."""
        if self.saved > 0:
            return f"{self.path}, after step {self.saved} of {self.total}"
        return "what the stage started from, which is unchanged"

    def find_state(self) -> dict[str, list]:
        """Look for a state or a finished run; returns size and hash of the growing files, or {}."""
        if not os.path.exists(self.path):
            if self.cfg.resume:
                self.find_finished()
            return {}
        check(self.cfg.resume, f"{self.folder} holds a run that is not finished; go on with it by "
              f"--resume, or delete {self.path} to start over")
        state, self.tensors = read_state(self.path)
        check(state["command"] == self.command, f"{self.path} is of a run of {state['command']}, "
              f"expected one of {self.command}; name another folder by --out")
        self.check_config(state["config"], self.path)
        self.check_inputs(state["inputs"])
        check(state["step"] <= self.total and list(state["row"]) == self.fields, f"{self.path}: "
              f"{state['step']} steps of {self.total}, columns {', '.join(state['row'])}; delete "
              "the file to start over")
        if state["step"] == self.total and self.is_published(state):
            self.row, self.finished, self.tensors = state["row"], True, {}
            self.step = self.total
            self.clean_up()                              # all that the kill left to do
            print(f"{self.folder} holds the finished run: nothing to do")
            return {}
        for name, value in self.machine().items():
            if state[name] != value:
                print(f"the run began with {name} {state[name]}, here it is {value}: the last "
                      "digits may differ from an uninterrupted run's")
        self.step, self.row = state["step"], state["row"]
        self.began = self.saved = self.step
        print(f"going on after step {self.step} of {self.total} ({self.path})", flush=True)
        return state["files"]

    def read_run(self) -> dict:
        """What run.json says of the last run that published here; {} without one."""
        path = os.path.join(self.folder, RUN_FILE)
        return read_json(path) if os.path.exists(path) else {}

    def is_published(self, state: dict) -> bool:
        """Whether the folder holds this run's result already: it was killed after writing it."""
        run = self.read_run()
        return run.get("finished") is True and all(run.get(name) == state[name]
                                                   for name in ("command", "inputs", "row"))

    def clean_up(self) -> None:
        """Remove what only an unfinished run needs; the state goes last."""
        if self.writer:
            for name in (*PART_FILES, STATE_FILE):
                path = os.path.join(self.folder, name)
                if os.path.exists(path):
                    os.unlink(path)

    def check_agreement(self) -> None:
        """Refuse processes that begin at other steps or with other inputs than this one."""
        text = repr((self.step, self.finished, sorted(self.inputs.items())))
        digest = zlib.crc32(text.encode())
        highest = parallel.largest_over_processes(digest, self.device)
        lowest = -parallel.largest_over_processes(-digest, self.device)
        check(highest == lowest, f"the processes see different contents of {self.folder}, or "
              "different weights or data; they need one file system, or equal copies")

    def find_finished(self) -> None:
        """Take the result of a finished run, if the folder holds one and no later run began."""
        path = os.path.join(self.folder, RUN_FILE)
        later = os.path.exists(os.path.join(self.folder, PART_FILES[0]))
        run = {} if later else self.read_run()
        if run.get("command") != self.command or run.get("finished") is not True:
            print(f"{self.folder} holds nothing to resume: starting from the beginning")
            return
        self.check_config(run.get("config"), path)
        self.check_inputs(run.get("inputs"))
        check(isinstance(run.get("row"), dict), f"{path}: expected a row of metrics")
        self.row, self.finished, self.step = run["row"], True, self.total
        print(f"{self.folder} holds the finished run: nothing to do")

    def check_config(self, saved, path: str) -> None:
        """Refuse other options than the run began with: the result would be neither run's."""
        check(isinstance(saved, dict), f"{path}: expected the options of a run")
        now = asdict(self.cfg)
        by_content = [name.removeprefix("--") for name in self.inputs]     # as `check_inputs` does
        differing = [f"--{name} was {saved.get(name)!r}, is {now.get(name)!r}"
                     for name in sorted({**saved, **now})
                     if name not in (*MAY_CHANGE, *by_content) and saved.get(name) != now.get(name)]
        check(not differing, f"--resume: {'; '.join(differing)}. Go on with the options that the "
              f"run in {self.folder} began with (others would change the result, some of them only "
              "in the last digits), or name another folder by --out")

    def check_inputs(self, saved) -> None:
        """Refuse other weights or data than the run began with."""
        saved = saved if isinstance(saved, dict) else {}
        changed = [name for name in self.inputs if saved.get(name) != self.inputs[name]]
        check(not changed, f"--resume: {', '.join(changed)} changed since the run in {self.folder} "
              "began; put it back, or start over in another folder")

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left; after the loop's body the step is complete."""
        for step in range(self.step, self.total):
            self.started = time.perf_counter()
            yield step
            self.end_step(step + 1)

    def seconds(self) -> float:
        """Seconds since the present step began."""
        return time.perf_counter() - self.started

    def sample(self, text: str) -> None:
        """Append `text` to samples.txt and print it, without what could drive the terminal."""
        text = printable(text)
        print(text, flush=True)
        if self.writer:
            self.samples.append(text + "\n")

    def keep(self, record: dict) -> None:
        """Append one JSON line to kept.jsonl; the caller keeps the lines few and small."""
        if self.writer:
            self.kept.append(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")

    def log(self, row: dict) -> None:
        """Append the step's row to metrics.csv; a number that is not finite stops the run."""
        assert set(row) <= set(self.fields), (list(row), self.fields)
        row = {name: row.get(name, "") for name in self.fields}
        bad = [name for name, value in row.items() if value != "" and not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad[0]} is {row[bad[0]]} in step {self.step + 1}; look at "
                                     "the data and the reward, or lower the learning rate")
        self.row = row
        if self.writer:
            self.metrics.write(row)

    def end_step(self, step: int) -> None:
        """Of `total` steps `step` are done; save if it is time or a signal asks for it."""
        self.step = step
        stop = parallel.largest_over_processes(self.signal, self.device)
        if stop or step % self.cfg.save_every == 0 or step == self.total:
            if self.writer:
                self.save()
            self.saved = step
        if stop:
            raise Stopped(f"stopped by signal {stop} after step {step} of {self.total}; go on "
                          "with the same command and --resume", stop)

    def machine(self) -> dict:
        """What the last digits of a result depend on beside the options."""
        return {"processes": parallel.processes(), "threads": torch.get_num_threads(),
                "torch": torch.__version__, "products": fast.PRODUCTS}

    def save(self) -> None:
        """Write the state; first the growing files must be on the disk as far as it counts."""
        files = {"metrics.csv": self.metrics.sync(), "samples.txt": self.samples.sync(),
                 "kept.jsonl": self.kept.sync()}
        state = {"command": self.command, "config": asdict(self.cfg), "step": self.step,
                 "row": self.row, "inputs": self.inputs, "files": files, **self.machine()}
        write_state(self.path, state, pack(self.networks, self.optimizer))

    def publish(self, tokenizer, network: nn.Module, **beside: nn.Module) -> None:
        """Write the finished files: the network, others beside it in folders of their names, the
        growing files, run.json.

        While they are being written run.json says so, and `load_network` refuses the folder: it
        could hold files of two runs. The state goes last: after a kill `--resume` does the rest.
        """
        if self.finished or not self.writer:
            return
        run = {"command": self.command, "finished": False, "config": asdict(self.cfg),
               "inputs": self.inputs, "row": self.row, **self.machine()}
        write_json(os.path.join(self.folder, RUN_FILE), run)
        for name, other in beside.items():
            check(not os.path.islink(os.path.join(self.folder, name)), f"{self.folder}/{name} is a "
                  "link; remove it")                     # a write must not leave the folder
            save_folder(other, tokenizer, os.path.join(self.folder, name), run)
        save_folder(network, tokenizer, self.folder, run)
        for file in (self.metrics, self.samples, self.kept):
            with open(file.path, "rb") as growing:
                write_atomically(file.path.removesuffix(".part"), growing.read())
        write_json(os.path.join(self.folder, RUN_FILE), {**run, "finished": True})
        self.clean_up()

    def ask_to_stop(self, number: int, frame) -> None:
        """Signal handler: the first signal waits for the step's end, a second Ctrl-C does not."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.writer:
            print("\nstopping at the end of this step, with a checkpoint (Ctrl-C again: now, "
                  "without)", file=sys.stderr, flush=True)
