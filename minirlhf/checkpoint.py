"""A run's folder: a training state that survives a kill at any moment, and the finished files.

While a run is under way its folder holds
    training_state.safetensors      all that is needed to go on: one file, replaced as a whole
    metrics.csv.part, samples.txt.part
and when it is finished the model's files, metrics.csv, samples.txt and run.json. Until then the
files of an earlier finished run stay as they are.

A state holds weights, the optimiser's moments, the number of steps made, `kl_coef`, the last row of
metrics, and how long the growing files were. It holds no random states and no data order: every
random number of a trainer comes from a stream that is named by its place in the run
(`common.random_stream`). So a run that goes on is, bit for bit, the run that was not interrupted,
on one machine with one number of threads. A state is read like any file of a stranger: nothing in
it is executed, and its checksum must be right.
"""

import hashlib
import json
import math
import os
import signal
import sys
import threading
import zlib
from dataclasses import asdict

import torch
import torch.nn as nn

from minirlhf import parallel
from minirlhf.common import MetricsFile, PartFile, Stopped, check, check_range, under_debugger
from minirlhf.weights import (lock, parse_json, read_json, read_with_metadata, tensor_bytes,
                              write_atomically, write_json, write_safetensors)

STATE_FILE = "training_state.safetensors"
RUN_FILE = "run.json"               # of a finished run: its options and its last row of metrics
MAY_CHANGE = ("out", "resume", "save_every")    # every other option could change the result
STATE_KEYS = {"command": str, "config": dict, "step": int, "extra": dict, "row": dict,
              "inputs": dict, "sizes": dict, "threads": int, "torch": str, "processes": int}


# ---- the state as a file -------------------------------------------------------------------------

def checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of the text and of every tensor's name, type, shape and bytes."""
    value = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        label = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        value = zlib.crc32(label.encode("utf-8", "surrogatepass"), value)
        value = zlib.crc32(tensor_bytes(tensor), value)
    return f"{value:08x}"


def pack(networks: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and optimiser moments under names: networks.<name>, optimizer.<number>.<key>."""
    tensors = {"networks." + name: tensor for name, tensor in networks.state_dict().items()}
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimizer.{number}.{key}"] = value
    return tensors


def unpack(tensors: dict[str, torch.Tensor], networks: nn.Module,
           optimizer: torch.optim.Optimizer, path: str) -> None:
    """Put the tensors of a state back; what does not fit is named, and then nothing is changed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets = {"networks." + name: tensor for name, tensor in networks.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in targets.items()}
    for number, parameter in enumerate(parameters):
        shapes[f"optimizer.{number}.step"] = torch.Size([])
        shapes[f"optimizer.{number}.exp_avg"] = parameter.shape
        shapes[f"optimizer.{number}.exp_avg_sq"] = parameter.shape
    missing = sorted(set(targets) - set(tensors))
    check(not missing, f"{path}: tensor {', '.join(missing[:3])} is missing; the state is of "
          "another model")
    for name, tensor in tensors.items():
        expected = shapes.get(name)
        check(tensor.shape == expected and tensor.is_floating_point(), f"{path}: tensor {name} is "
              f"{tensor.dtype} {tuple(tensor.shape)}, expected "
              f"{tuple(expected) if expected is not None else 'no such tensor'}")
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in targets:
            _, number, key = name.split(".")
            moments.setdefault(int(number), {})[key] = tensor.clone()
    partly = [number for number, values in moments.items() if len(values) < 3]
    check(not partly, f"{path}: of optimizer.{partly[:1]} a part is missing")
    for name, target in targets.items():
        target.copy_(tensors[name])
    optimizer.load_state_dict({"state": moments,
                               "param_groups": optimizer.state_dict()["param_groups"]})


def write_state(path: str, state: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a state atomically: whoever looks, also after a kill, finds the old one or this one."""
    text = json.dumps(state, allow_nan=False)
    write_safetensors(path, tensors, {"state": text, "crc32": checksum(text, tensors)})


def read_state(path: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Read what `write_state` wrote.

    Raises: `ValueError` naming the file for damage of any kind, found by the checksum.
    """
    tensors, metadata = read_with_metadata(path)
    text = metadata.get("state", "")
    check(metadata.get("crc32") == checksum(text, tensors), f"{path}: the checksum is wrong: the "
          "file is damaged, or no training state; delete it to start over")
    state = parse_json(text.encode("utf-8", "surrogatepass"), path)
    for key, kind in STATE_KEYS.items():
        check(type(state.get(key)) is kind, f"{path}: {key} is missing or no {kind.__name__}; "
              "delete the file to start over")
    sizes = state["sizes"].values()
    check(state["step"] > 0 and all(type(size) is int and size >= 0 for size in sizes),
          f"{path}: expected positive counts; delete the file to start over")
    return state, tensors


def fingerprint(*things) -> str:
    """SHA-256 of networks' weights and of anything else's `repr`: what a run began with."""
    found = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            for name, tensor in thing.state_dict().items():
                found.update(name.encode())
                found.update(tensor_bytes(tensor))
        else:
            found.update(repr(thing).encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def lock_folder(folder: str):
    """An open file by which this process holds `folder`; the system lets go of it at any end.

    Windows and file systems without locks are not protected from two runs in one folder.
    """
    file = open(os.path.join(folder, ".lock"), "a", encoding="utf-8")
    try:
        lock(file)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{folder}: another run is writing into this folder; wait for its end, or "
                         "name another folder by --out") from None
    except OSError:
        pass                                             # a file system without locks
    return file


# ---- the folder of one run -----------------------------------------------------------------------

class RunFolder:
    """The folder `cfg.out` of a trainer's run of `total` steps (of PPO: iterations).

        with RunFolder(cfg, total, fields, inputs) as run:
            if run.finished: return run.row              # --resume of a run that is finished
            run.restore(networks, optimizer)             # with --resume, where there is a state
            for step in range(run.step, total):
                ...
                run.end_step(step + 1, row, networks, optimizer)
            run.publish(save, networks, cfg)
        return run.row

    `fields` are the columns of metrics.csv; `inputs` are fingerprints of what the run begins with.
    Within the block Ctrl-C and SIGTERM are obeyed at the end of the step, after a checkpoint.
    With several processes only process 0 writes.
    """

    def __init__(self, cfg, total: int, fields: list[str], inputs: dict[str, str]):
        self.cfg, self.folder, self.total, self.fields = cfg, cfg.out, total, fields
        self.inputs = inputs
        self.command = type(cfg).__name__.removesuffix("Config")
        self.path = os.path.join(cfg.out, STATE_FILE)
        self.step, self.extra, self.row, self.tensors = 0, {}, {}, {}
        self.finished, self.signal, self.lock, self.handlers = False, 0, None, {}
        self.saved = 0                                   # steps in the last state that was written
        self.writer, self.device = parallel.rank() == 0, torch.device(cfg.device)

    def __enter__(self) -> "RunFolder":
        if self.writer:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = lock_folder(self.folder)
        try:
            sizes = self.find_state()
            self.check_agreement()
            if self.writer and not self.finished:
                self.metrics = MetricsFile(self.folder, self.fields, sizes.get("metrics.csv", 0))
                self.samples = PartFile(self.folder, "samples.txt", sizes.get("samples.txt", 0))
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
        if error is None or isinstance(error, Stopped):
            parallel.finish()
        if isinstance(error, FloatingPointError):
            error.args = (f"{error}. The last good checkpoint is {self.last_good()}",)
        if error is None and self.signal:
            raise Stopped(f"stopped by signal {self.signal}; {self.folder} is finished",
                          self.signal)

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

    def find_state(self) -> dict[str, int]:
        """Look for a state or a finished run; returns the sizes of the growing files, or {}."""
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
        check(state["step"] <= self.total, f"{self.path}: {state['step']} steps of {self.total}")
        if state["step"] == self.total and self.is_published(state):
            self.row, self.finished, self.tensors = state["row"], True, {}
            self.clean_up()                              # all that the kill left to do
            print(f"{self.folder} holds the finished run: nothing to do")
            return {}
        here = (parallel.processes(), torch.get_num_threads(), torch.__version__)
        there = (state["processes"], state["threads"], state["torch"])
        if there != here:
            print(f"the run began with {there[0]} processes, {there[1]} threads and PyTorch "
                  f"{there[2]}, here are {here[0]}, {here[1]} and {here[2]}: the last digits may "
                  "differ from an uninterrupted run's")
        self.step, self.row, self.extra = state["step"], state["row"], state["extra"]
        self.saved = self.step
        print(f"going on after step {self.step} of {self.total} ({self.path})", flush=True)
        return state["sizes"]

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
            for name in ("metrics.csv.part", "samples.txt.part", STATE_FILE):
                path = os.path.join(self.folder, name)
                if os.path.exists(path):
                    os.unlink(path)

    def check_agreement(self) -> None:
        """Refuse processes that begin at other steps or with other inputs than this one."""
        text = repr((self.step, self.finished, sorted(self.inputs.items())))
        number = zlib.crc32(text.encode()) % (1 << 20)   # exact in float32
        highest = parallel.largest_over_processes(number, self.device)
        lowest = -parallel.largest_over_processes(-number, self.device)
        check(highest == lowest, f"the processes see different contents of {self.folder}, or "
              "different weights or data; they need one file system, or equal copies")

    def find_finished(self) -> None:
        """Take the result of a finished run, if the folder holds one and no later run began."""
        path = os.path.join(self.folder, RUN_FILE)
        later = os.path.exists(os.path.join(self.folder, "metrics.csv.part"))
        found = {} if later else self.read_run()
        if found.get("command") != self.command or found.get("finished") is not True:
            print(f"{self.folder} holds nothing to resume: starting from the beginning")
            return
        self.check_config(found.get("config"), path)
        self.check_inputs(found.get("inputs"))
        check(isinstance(found.get("row"), dict), f"{path}: expected a row of metrics")
        self.row, self.finished = found["row"], True
        print(f"{self.folder} holds the finished run: nothing to do")

    def check_config(self, saved, path: str) -> None:
        """Refuse other options than the run began with: the result would be neither run's."""
        check(isinstance(saved, dict), f"{path}: expected the options of a run")
        now = asdict(self.cfg)
        differing = [f"--{name} was {saved.get(name)!r}, is {now.get(name)!r}"
                     for name in sorted({**saved, **now})
                     if name not in MAY_CHANGE and saved.get(name) != now.get(name)]
        check(not differing, f"--resume: {'; '.join(differing)}. Go on with the options that the "
              f"run in {self.folder} began with (others would change the result, some of them only "
              "in the last digits), or name another folder by --out")

    def check_inputs(self, saved) -> None:
        """Refuse other weights or data than the run began with."""
        saved = saved if isinstance(saved, dict) else {}
        changed = [name for name in self.inputs if saved.get(name) != self.inputs[name]]
        check(not changed, f"--resume: {', '.join(changed)} changed since the run in {self.folder} "
              "began; put it back, or start over in another folder")

    def restore(self, networks: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the state's weights and moments back, if there is a state."""
        if self.step > 0:
            unpack(self.tensors, networks, optimizer, self.path)
            self.tensors = {}

    def sample(self, text: str) -> None:
        """Append to samples.txt and print."""
        print(text, flush=True)
        if self.writer:
            self.samples.append(text + "\n")

    def end_step(self, step: int, row: dict, networks: nn.Module,
                 optimizer: torch.optim.Optimizer, **extra) -> None:
        """Log a step, of which `step` are done; save if it is time or a signal asks for it.

        `extra` are the trainer's own numbers that change from step to step, as `kl_coef`.
        """
        bad = [name for name, value in row.items() if value != "" and not math.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad[0]} is {row[bad[0]]} in step {step}; look at the data "
                                     "and the reward, or lower the learning rate")
        self.step, self.row, self.extra = step, row, extra
        if self.writer:
            self.metrics.write(row)
        stop = parallel.largest_over_processes(self.signal, self.device)
        if stop or step % self.cfg.save_every == 0 or step == self.total:
            if self.writer:
                self.save(networks, optimizer)
            self.saved = step
        if stop:
            raise Stopped(f"stopped by signal {stop} after step {step} of {self.total}; go on "
                          "with the same command and --resume", stop)

    def save(self, networks: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Write the state; first the growing files must be on the disk as far as it counts."""
        sizes = {"metrics.csv": self.metrics.sync(), "samples.txt": self.samples.sync()}
        state = {"command": self.command, "config": asdict(self.cfg), "step": self.step,
                 "extra": self.extra, "row": self.row, "inputs": self.inputs, "sizes": sizes,
                 "threads": torch.get_num_threads(), "torch": torch.__version__,
                 "processes": parallel.processes()}
        write_state(self.path, state, pack(networks, optimizer))

    def publish(self, save, *arguments) -> None:
        """Write the finished files: `save(*arguments)`, the growing files, run.json.

        While they are being written run.json says so, and `from_pretrained` refuses the folder: it
        could hold files of two runs. The state goes last: after a kill `--resume` does the rest.
        """
        if not self.writer:
            return
        run = {"command": self.command, "finished": False, "config": asdict(self.cfg),
               "inputs": self.inputs, "row": self.row}
        write_json(os.path.join(self.folder, RUN_FILE), run)
        save(*arguments)
        for file in (self.metrics, self.samples):
            with open(file.path, "rb") as growing:
                write_atomically(file.path.removesuffix(".part"), growing.read())
        write_json(os.path.join(self.folder, RUN_FILE), {**run, "finished": True})
        self.clean_up()

    def ask_to_stop(self, number: int, frame) -> None:
        """Signal handler: the first signal waits for the end of the step, a second Ctrl-C not."""
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self.writer:
            print("\nstopping at the end of this step, with a checkpoint (Ctrl-C again: now, "
                  "without)", file=sys.stderr, flush=True)


def check_run_options(cfg) -> None:
    """Check the options that every trainer has: where it computes, in what parts, when it saves."""
    parallel.check_hardware(cfg)
    for name in ("accumulation", "save_every"):
        check_range(cfg, name, 1, 10**9)
