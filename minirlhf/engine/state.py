"""The training state: one file from which a run goes on, bit for bit, after a kill at any moment.

A state holds weights, the optimiser's moments, the number of steps made, the last row of metrics,
and size and hash of the growing files. It holds no random states and no data order: every random
number of a trainer comes from a stream that is named by its place in the run
(`training.random_stream`). A state is read like any file of a stranger: nothing in it is executed,
and its checksum must be right.
"""

import hashlib
import json
import zlib

import torch
import torch.nn as nn

from minirlhf.engine.options import check
from minirlhf.files.disk import parse_json
from minirlhf.files.tensors import read_with_metadata, tensor_bytes, write_safetensors

STATE_FILE = "training_state.safetensors"
VERSION = 2                         # of what a state holds
STATE_KEYS = {"command": str, "config": dict, "step": int, "row": dict, "inputs": dict,
              "files": dict, "threads": int, "torch": str, "processes": int, "products": str}
GROWING = ("metrics.csv", "samples.txt")    # files that the state of every version names


def checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of the text and of every tensor's name, type, shape and bytes."""
    value = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        label = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        value = zlib.crc32(label.encode("utf-8", "surrogatepass"), value)
        value = zlib.crc32(tensor_bytes(tensor), value)
    return f"{value:08x}"


def named_weights(networks: nn.Module) -> dict[str, torch.Tensor]:
    """networks.<name> -> weights; a trunk that two networks share is in it once."""
    return {"networks." + name: weights.data for name, weights in networks.named_parameters()}


def pack(networks: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights and optimiser moments under names: networks.<name>, optimizer.<number>.<key>."""
    tensors = named_weights(networks)
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"optimizer.{number}.{key}"] = value
    return tensors


def unpack(tensors: dict[str, torch.Tensor], networks: nn.Module,
           optimizer: torch.optim.Optimizer, path: str) -> None:
    """Put the tensors of a state back; what does not fit is named, and then nothing is changed."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    targets = named_weights(networks)
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
    text = json.dumps({"version": VERSION, **state}, allow_nan=False)
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
    check(state.get("version") == VERSION, f"{path}: a training state of another version of "
          "minirlhf; finish the run with that version, or delete the file to start over")
    for key, kind in STATE_KEYS.items():
        check(type(state.get(key)) is kind, f"{path}: {key} is missing or no {kind.__name__}; "
              "delete the file to start over")
    marks = [*(state["files"].get(name) for name in GROWING), *state["files"].values()]
    ok = all(isinstance(mark, list) and len(mark) == 2 and type(mark[0]) is int and mark[0] >= 0
             and type(mark[1]) is str for mark in marks)
    numbers = all(value == "" or type(value) in (int, float) for value in state["row"].values())
    check(state["step"] > 0 and ok and numbers, f"{path}: expected a positive step, numbers in the "
          f"row, and size and hash of {' and '.join(GROWING)}; delete the file to start over")
    return state, tensors


def fingerprint(*things) -> str:
    """SHA-256 of networks' weights and of anything else's `repr`: what a run began with."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, nn.Module):
            for name, tensor in thing.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor_bytes(tensor))
        else:
            digest.update(repr(thing).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def run_inputs(policy: nn.Module, reward_function, prompts: list, gold_function) -> dict[str, str]:
    """What a run against a reward begins with, by the options that name it.

    A run that goes on must find the same.
    """
    return {"--model": fingerprint(policy), "--reward": reward_function.source,
            "--prompts": fingerprint([prompt.ids for prompt in prompts]),
            "--gold": gold_function.source if gold_function else ""}
