"""The training state as a file from a stranger: the same state, or a ValueError that names it."""

import json
import os
import pickle
import random
import time

import pytest
import torch
from fuzzing import FUZZ, MEBIBYTE, Tally, damage, peak_memory, put, reset_peak
from helpers import base_folder, quietly, sft_config, weights_equal
from test_weights import Malicious, file_bytes, mutate, nested, rewrite, same

from minirlhf import sft
from minirlhf.checkpoint import STATE_FILE, checksum, pack, read_state, unpack, write_state
from minirlhf.gpt2 import GPT2, GPT2Config
from minirlhf.weights import write_safetensors

STATE = {"command": "SFT", "config": {"lr": 0.01, "model": "a\u00e9b", "resume": False}, "step": 7,
         "extra": {"kl_coef": 0.2}, "row": {"step": 7, "loss": 1.5, "held_out_loss": ""},
         "inputs": {"--data": "0123"}, "sizes": {"metrics.csv": 100, "samples.txt": 0},
         "threads": 1, "torch": "2.0", "processes": 1}


def make_networks(seed: int = 0):
    """A network of two channels and its optimiser after one step."""
    torch.manual_seed(seed)
    model = GPT2(GPT2Config(vocab_size=5, n_positions=4, n_embd=2, n_layer=1, n_head=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.tensor([[0, 1, 2]])).square().sum().backward()
    optimizer.step()
    return model, optimizer


def write_example(folder) -> str:
    path = os.path.join(folder, STATE_FILE)
    write_state(path, STATE, pack(*make_networks()))
    return path


def file_content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def equal_tensors(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(same(one[name], other[name]) for name in one)


# ---- damage --------------------------------------------------------------------------------------

def test_a_state_comes_back_as_it_was_written(tmp_path):
    path = write_example(tmp_path)
    state, tensors = read_state(path)
    model, optimizer = make_networks()
    assert state == STATE and equal_tensors(tensors, pack(model, optimizer))
    other, other_optimizer = make_networks(seed=1)
    unpack(tensors, other, other_optimizer, path)
    assert weights_equal(model, other)
    assert equal_tensors(pack(other, other_optimizer), tensors)


def test_a_state_cut_off_at_any_byte_is_refused(tmp_path):
    path = write_example(tmp_path)
    content = file_content(path)
    for length in range(0, len(content), 3):
        put(path, content[:length])
        with pytest.raises(ValueError, match=STATE_FILE):
            read_state(path)


def test_every_mutated_state_is_the_same_state_or_a_value_error(tmp_path):
    path = write_example(tmp_path)
    original, expected = file_content(path), pack(*make_networks())
    rng, tally = random.Random(0), Tally("training state")
    for _ in range(max(1000, FUZZ // 4)):
        content = rewrite(rng, original) if rng.random() < 0.1 else mutate(rng, original)
        put(path, content)
        found = tally.attempt(path, read_state, path)
        if found is not None:
            assert found[0] == STATE and equal_tensors(found[1], expected)
            found = None                             # or Windows keeps the mapped file
    tally.finish()


@pytest.mark.parametrize("name, text", [("networks.\ud800", "{}"), ("a", "\udfff")])
def test_half_a_character_in_a_state_is_refused_by_name(tmp_path, name, text):
    path = os.path.join(tmp_path, STATE_FILE)
    write_safetensors(path, {name: torch.zeros(2)}, {"state": text, "crc32": "0"})
    with pytest.raises(ValueError, match=STATE_FILE):
        read_state(path)


def test_every_flipped_bit_of_the_data_is_found(tmp_path):
    """The numbers have no structure that would give damage away: only the checksum does."""
    path, rng = write_example(tmp_path), random.Random(1)
    original = file_content(path)
    start = 8 + int.from_bytes(original[:8], "little")
    for _ in range(300):
        changed = bytearray(original)
        changed[rng.randrange(start, len(original))] ^= 1 << rng.randrange(8)
        put(path, bytes(changed))
        with pytest.raises(ValueError, match="checksum is wrong"):
            read_state(path)


def test_nothing_in_a_state_is_executed(tmp_path):
    path, trap = os.path.join(tmp_path, STATE_FILE), tmp_path / "executed"
    put(path, pickle.dumps(Malicious(str(trap))))
    with pytest.raises(ValueError, match=STATE_FILE):
        read_state(path)
    torch.save({"networks.w": Malicious(str(trap))}, path)
    with pytest.raises(ValueError, match=STATE_FILE):
        read_state(path)
    code = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    state = {**STATE, "command": code, "extra": {"kl_coef": code}, "row": {code: code}}
    write_state(path, state, pack(*make_networks()))
    assert read_state(path)[0] == state
    assert not trap.exists()


def test_the_largest_states_end_soon_in_bounded_memory(tmp_path):
    """JSON inside JSON: both are parsed, of at most 4 MiB together."""
    path = os.path.join(tmp_path, STATE_FILE)
    for text in ("[" * 1_900_000, '{"a":[' + "[]," * 600_000 + "[]]}", json.dumps(nested(7, 7)),
                 '{"step":' + "9" * 2_000_000 + "}", '{"a":0,"a":1}', '{"step": NaN}'):
        metadata = {"state": text, "crc32": checksum(text, {})}
        put(path, file_bytes({"__metadata__": metadata}, b""))
        before, start = reset_peak(), time.process_time()
        with pytest.raises(ValueError, match=STATE_FILE) as caught:
            read_state(path)
        assert len(str(caught.value)) < 1000
        assert time.process_time() - start < 5 and peak_memory() - before < 200 * MEBIBYTE


# ---- states with a right checksum that no trainer wrote ------------------------------------------

NASTY = [None, True, -1, 0, 1, 2 ** 62, 10 ** 19, 1.5, 1e308, "", "x", [], [1], {}, {"a": []}]


def change_state(rng: random.Random) -> dict:
    """The state with one value exchanged, left out or added, in it or one level below."""
    state = json.loads(json.dumps(STATE))
    owner = rng.choice([state, state, *[value for value in state.values()
                                        if isinstance(value, dict)]])
    key, kind = rng.choice([*owner, "new"]), rng.randrange(4)
    if kind == 0:
        owner.pop(key, None)
    else:
        owner[key] = rng.choice(NASTY)
    return state


def test_a_changed_state_with_a_right_checksum_is_what_it_says_or_a_value_error(tmp_path):
    path, tensors = os.path.join(tmp_path, STATE_FILE), pack(*make_networks())
    rng, tally = random.Random(2), Tally("training state, checksum made right")
    for _ in range(max(300, FUZZ // 20)):
        state = change_state(rng)
        if os.path.exists(path):
            os.unlink(path)
        write_state(path, state, tensors)
        found = tally.attempt(path, read_state, path)
        if found is not None:
            assert found[0] == state and type(found[0]["step"]) is int and found[0]["step"] > 0
            assert all(type(size) is int for size in found[0]["sizes"].values())
            found = None
    tally.finish()
    assert tally.refused > 50


def change_tensors(rng: random.Random, tensors: dict) -> dict:
    """Tensors of another name, shape or type, or one that is missing or too many."""
    changed, name = dict(tensors), rng.choice(list(tensors))
    kind = rng.randrange(6)
    tensor = changed.pop(name)
    if kind == 1:
        changed[name + rng.choice([".", "x", ".step"])] = tensor
    elif kind == 2:
        changed[name] = tensor.flatten()[None]
    elif kind == 3:
        kinds = [torch.long, torch.float16, torch.float64, torch.bool]
        changed[name] = tensor.to(rng.choice(kinds))
    elif kind == 4:
        changed.update({name: tensor, rng.choice(["optimizer.99.exp_avg", "optimizer.x.step",
                                                  "optimizer.-1.step", "optimizer", "networks.h",
                                                  "optimizer.0.exp_avg.x"]): torch.zeros(2)})
    elif kind == 5:
        changed[name] = torch.zeros(2, 2, 2)
    return changed


def test_changed_tensors_with_a_right_checksum_are_refused_or_go_on(tmp_path):
    """What is accepted fits: the next step of the optimiser works, and nothing is half changed."""
    path, tensors = os.path.join(tmp_path, STATE_FILE), pack(*make_networks())
    rng, tally = random.Random(3), Tally("tensors of a state, checksum made right")
    for _ in range(max(300, FUZZ // 20)):
        if os.path.exists(path):
            os.unlink(path)
        write_state(path, STATE, change_tensors(rng, tensors))
        _, found = read_state(path)
        model, optimizer = make_networks(seed=1)
        before = {name: tensor.clone() for name, tensor in pack(model, optimizer).items()}
        done = tally.attempt(path, unpack_and_say, found, model, optimizer, path)
        if done is None:
            assert equal_tensors(pack(model, optimizer), before)
        else:
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, found["networks." + name].to(tensor.dtype))
            model(torch.tensor([[0, 1, 2]])).square().sum().backward()
            optimizer.step()
        found = None
    tally.finish()


def unpack_and_say(*arguments) -> bool:
    unpack(*arguments)
    return True


# ---- through a trainer ---------------------------------------------------------------------------

def toy_options(folder) -> dict:
    return {"out": str(folder), "examples": 60, "held_out": 4, "epochs": 1, "batch_size": 8,
            "save_every": 1, "model": base_folder()}


class Enough(Exception):
    """Raised in the middle of a run, as a stand-in for a kill."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The files of a run that was stopped after a few steps, and the weights it would have had."""
    folder = tmp_path_factory.mktemp("run")
    quietly(sft.main, sft_config(**toy_options(folder / "whole")))
    step, calls = sft.train_step, []

    def stopping_step(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise Enough
        return step(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "train_step", stopping_step)
        with pytest.raises(Enough):
            quietly(sft.main, sft_config(**toy_options(folder / "stopped")))
    files = {path.name: path.read_bytes() for path in (folder / "stopped").iterdir()}
    assert STATE_FILE in files
    return files, (folder / "whole" / "model.safetensors").read_bytes()


def test_a_run_resumed_from_a_damaged_folder_is_the_same_or_a_value_error(interrupted, tmp_path):
    """All its files, one at a time: the state, the growing metrics and samples."""
    files, expected = interrupted
    rng, tally = random.Random(4), Tally("resumed runs of SFT")
    for case in range(max(20, FUZZ // 500)):
        folder = tmp_path / str(case)
        folder.mkdir()
        for name, content in files.items():
            put(folder / name, content)
        name = rng.choice([STATE_FILE, STATE_FILE, "metrics.csv.part", "samples.txt.part"])
        content = files[name]
        if name == STATE_FILE and rng.random() < 0.8:
            content = rewrite(rng, content) if rng.random() < 0.2 else mutate(rng, content)
        elif name != STATE_FILE:
            content = damage(rng, content, [b"\n", b"\0", b"1,2,3\n"])
        put(folder / name, content)
        cfg = sft_config(**toy_options(folder), resume=True)
        row = tally.attempt(str(folder), quietly, sft.main, cfg)
        if row is not None:
            assert (folder / "model.safetensors").read_bytes() == expected
    tally.finish(seconds=60, mebibytes=128)
    assert tally.read > 0 and tally.refused > 0


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b'{"command": "SFT", "finished": true}', b"\0", b'{"command": "SFT"}',
    b'{"command": "SFT", "finished": true, "config": 3, "row": {}}',
    b'{"command": "SFT", "finished": 1, "config": {}, "row": {}}',
    b'{"command": "SFT", "finished": true, "config": {}, "row": 3}', b'{"a": ' + b"[" * 100_000])
def test_a_damaged_run_file_is_refused_or_the_run_begins_anew(tmp_path, content):
    put(tmp_path / "run.json", content)
    cfg = sft_config(**toy_options(tmp_path), resume=True)
    try:
        quietly(sft.main, cfg)
        model = GPT2.from_pretrained(str(tmp_path))
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    except ValueError as error:
        assert str(tmp_path) in str(error) and len(str(error)) < 2000
