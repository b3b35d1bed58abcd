"""Devices and several processes: torch.distributed in a few plain functions.

    torchrun --nproc_per_node=2 -m minirlhf.ppo        # and sft, reward_model

Every process holds all the networks and computes its share of the rows, in parts that fit into
memory (`parts`). The shares are put together (`gather`), so that whitening, metrics and KL control
see the whole batch, and gradients are added up (`add_gradients`). All random numbers are named by
their place in the run, not by a process: N processes draw the samples and the minibatches that one
would draw. With one process every function here gives back what it was given.

Only process 0 writes files, and from `start` on only it prints. Ctrl-C reaches all processes;
torchrun kills those that take longer than 30 seconds to come to the end of their step (its option
--shutdown_timeout, where it has it). Imports nothing of ours but the checks.
"""

import dataclasses
import importlib
import math
import os
import sys

import torch
import torch.distributed as dist

from minirlhf.engine.options import check


def check_hardware(config) -> None:
    """Check that the device of the field `device` is there, before anything is loaded."""
    check(config.device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch finds no "
          "CUDA device; use --device cpu, or install a PyTorch that is built for your GPU")
    check(config.device != "mps" or torch.backends.mps.is_available(), "--device mps: PyTorch "
          "finds no Apple GPU; use --device cpu")


def start(device: str) -> None:
    """Join the processes that torchrun started, if it did."""
    if "WORLD_SIZE" in os.environ and not started():
        check(device != "mps", "--device mps: there is no torch.distributed for it; start one "
              "process, without torchrun")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # careful: imported later, by the first optimiser, it would keep the group as the default of
        # arguments; the group's threads would then outlive `finish` and could abort the process
        importlib.import_module("torch.distributed.nn.functional")
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if rank() > 0:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")


def started() -> bool:
    """Whether there is a group of processes; some builds of PyTorch know none."""
    return dist.is_available() and dist.is_initialized()


def finish() -> None:
    """Wait for the others, so that no process leaves while another still writes; then leave."""
    if started():
        dist.barrier()
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if started() else 0


def processes() -> int:
    """How many processes there are."""
    return dist.get_world_size() if started() else 1


def first_alone(function, *arguments):
    """Call a function that may download or write in process 0 first, then in the others."""
    if rank() > 0:
        dist.barrier()
    result = function(*arguments)
    if rank() == 0 and processes() > 1:
        dist.barrier()
    return result


def share(total: int) -> slice:
    """This process's part of `total` rows; the parts are contiguous and differ by at most one row.

    Example: process 1 of 2 has rows 4 to 8 of 9.
    """
    return slice(total * rank() // processes(), total * (rank() + 1) // processes())


def parts(rows, batch_size: int, accumulation: int) -> list:
    """This process's share of `rows` (a list or a tensor), cut into parts that fit into memory.

    A batch of `batch_size` rows is computed in `accumulation` parts. With one process and
    accumulation 1 the only part is `rows` itself.
    """
    mine, most = rows[share(len(rows))], math.ceil(batch_size / accumulation)
    return [mine[first:first + most] for first in range(0, len(mine), most)]


def add_gradients(parameters) -> None:
    """Replace every gradient by its sum over the processes.

    Each process's loss is its rows' part of the whole batch's mean, so the sum is the gradient of
    the whole batch's loss: the division is already in the losses.
    """
    if processes() == 1:
        return
    for parameter in parameters:
        if not parameter.requires_grad:                  # not trained now; the others skip it too
            continue
        if parameter.grad is None:                       # this process had no rows
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def sum_tensor(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over the processes."""
    if processes() > 1:
        dist.all_reduce(values)
    return values


def sums(numbers: list[float], device: torch.device) -> list[float]:
    """Each number's sum over the processes."""
    if processes() == 1:
        return numbers
    # careful: Python's sum of nothing is an int, in a process that had no rows of this step
    return sum_tensor(torch.tensor(numbers, dtype=torch.float32, device=device)).tolist()


def largest_over_processes(value: float, device: torch.device) -> float:
    """The largest of the processes' values."""
    if processes() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def gather_rows(part: torch.Tensor, total: int, fill: int = 0) -> torch.Tensor:
    """The rows of all processes, in order: (total, ...), from this one's `share(total)` of them.

    Rows (b, T) of processes whose T differ are filled up with `fill` to the longest.
    """
    if processes() == 1:
        return part
    numbers = part.to(torch.uint8) if part.dtype == torch.bool else part
    if part.dim() == 2:
        width = largest_over_processes(part.shape[1], part.device)
        numbers = torch.nn.functional.pad(numbers, (0, width - part.shape[1]), value=fill)
    whole = torch.zeros(total, *numbers.shape[1:], dtype=numbers.dtype, device=part.device)
    whole[share(total)] = numbers
    return sum_tensor(whole).to(part.dtype)              # every other process has zeros there


def gather(batch, **fills: int):
    """A dataclass of tensors with the rows of all processes, from the rows of this one.

    `fills` says, by a field's name, what rows (b, T) are filled up with; 0 otherwise.
    """
    if processes() == 1:
        return batch
    tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    first = next(iter(tensors.values()))
    total = round(sums([float(len(first))], first.device)[0])
    return type(batch)(**{name: gather_rows(tensor, total, fills.get(name, 0))
                          for name, tensor in tensors.items()})
