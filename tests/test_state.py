"""state.py: a training state comes back bit for bit; what is damaged or foreign is refused by name.

The file is read like one from a stranger: the same state, or a ValueError that names it.
"""

import json
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import torch
from fuzzing import (
    FUZZ,
    MEBIBYTE,
    Malicious,
    Tally,
    file_bytes,
    mutate,
    nested,
    peak_memory,
    put,
    reset_peak,
    rewrite,
    same,
)
from helpers import weights_equal

from minirlhf.engine.state import (
    GROWING,
    STATE_FILE,
    STATE_KEYS,
    VERSION,
    checksum,
    fingerprint,
    pack,
    read_state,
    unpack,
    write_state,
)
from minirlhf.files.tensors import write_safetensors
from minirlhf.gpt2 import GPT2, GPT2Config, PolicyWithValue, ScalarModel

SIZES = GPT2Config(vocab_size=5, n_positions=4, n_embd=2, n_layer=1, n_head=1)

STATE = {"version": VERSION, "command": "SFT",
         "config": {"lr": 0.01, "model": "a\u00e9b", "resume": False}, "step": 7,
         "row": {"step": 7, "loss": 1.5, "held_out_loss": ""}, "inputs": {"--data": "0123"},
         "files": {"metrics.csv": [100, "0a"], "samples.txt": [0, "0b"]}, "threads": 1,
         "torch": "2.0", "processes": 1, "products": "plain"}


def make_networks(seed: int = 0):
    """A network of two channels and its optimiser after one step."""
    torch.manual_seed(seed)
    model = GPT2(SIZES)
    return model, optimiser_after_one_step(model, model)


def make_ppo_networks(critic: str, seed: int = 0):
    """What PPO trains, with a shared or a separate critic, and its optimiser after one step."""
    torch.manual_seed(seed)
    policy = GPT2(SIZES)
    trunk = policy if critic == "shared" else GPT2(SIZES)
    networks = PolicyWithValue(policy, ScalarModel(SIZES, trunk=trunk))
    return networks, optimiser_after_one_step(networks, networks.critic)


def optimiser_after_one_step(networks, forward) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.01)
    forward(torch.tensor([[0, 1, 2]])).square().sum().backward()
    for parameter in networks.parameters():
        if parameter.grad is None:                       # a separate critic leaves the policy alone
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def write_example(folder) -> str:
    path = os.path.join(folder, STATE_FILE)
    write_state(path, STATE, pack(*make_networks()))
    return path


def equal_tensors(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(same(one[name], other[name]) for name in one)


def replace_state(path: str, state: dict, tensors: dict) -> None:
    """`write_state` without its wait for the disk to forget the old file."""
    if os.path.exists(path):
        os.unlink(path)
    write_state(path, state, tensors)


# ---- there and back ------------------------------------------------------------------------------

def test_a_state_comes_back_as_it_was_written(tmp_path):
    path = write_example(tmp_path)
    state, tensors = read_state(path)
    model, optimizer = make_networks()
    assert state == STATE and equal_tensors(tensors, pack(model, optimizer))
    write_state(path + "2", state, tensors)
    assert Path(path + "2").read_bytes() == Path(path).read_bytes()
    other, other_optimizer = make_networks(seed=1)
    unpack(tensors, other, other_optimizer, path)
    assert weights_equal(model, other)
    assert equal_tensors(pack(other, other_optimizer), tensors)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_state_of_ppo_comes_back_with_the_moments_of_all_that_is_trained(tmp_path, critic):
    path, networks = os.path.join(tmp_path, STATE_FILE), make_ppo_networks(critic)
    write_state(path, STATE, pack(*networks))
    others = make_ppo_networks(critic, seed=1)
    assert not equal_tensors(pack(*others), pack(*networks))
    unpack(read_state(path)[1], *others, path)
    assert equal_tensors(pack(*others), pack(*networks))


def test_a_trunk_that_policy_and_critic_share_is_stored_once():
    networks, optimizer = make_ppo_networks("shared")
    names = {name for name in pack(networks, optimizer) if name.startswith("networks.")}
    trunk = {f"networks.policy.{name}" for name in networks.policy.state_dict()}
    assert names == trunk | {"networks.critic.score_head.weight"}
    separate = pack(*make_ppo_networks("separate"))
    assert {name for name in separate if name.startswith("networks.")} == names | {
        f"networks.critic.transformer.{name}" for name in networks.policy.state_dict()}


def test_a_state_of_another_version_is_refused_by_a_sentence(tmp_path):
    """So did commit 0e43caf write it, for a shared critic."""
    path, tensors = os.path.join(tmp_path, STATE_FILE), pack(*make_ppo_networks("shared"))
    head = tensors.pop("networks.critic.score_head.weight")
    old = {"command": "PPO", "config": {"lr": 0.01}, "step": 4, "extra": {"kl_coef": 0.2},
           "row": {"iteration": 3}, "inputs": {"--prompts": "0123"},
           "sizes": {"metrics.csv": 100, "samples.txt": 0}, "threads": 1, "torch": "2.0",
           "processes": 1}
    write_text(path, json.dumps(old), {**tensors, "networks.value_head.weight": head})
    with pytest.raises(ValueError, match="training_state.safetensors: a training state of another "
                                         "version of minirlhf; finish the run with that version"):
        read_state(path)
    for version in (VERSION - 1, VERSION + 1, str(VERSION), None):
        write_text(path, json.dumps({**STATE, "version": version}), tensors)
        with pytest.raises(ValueError, match="another version"):
            read_state(path)


def write_text(path: str, text: str, tensors: dict) -> None:
    """Write a state file with this text and a right checksum."""
    write_safetensors(path, tensors, {"state": text, "crc32": checksum(text, tensors)})


def test_a_state_of_another_kind_of_critic_is_refused(tmp_path):
    for there, here, words in (("shared", "separate", "networks.critic.transformer.h.0.* missing"),
                               ("separate", "shared", "networks.critic.trans.* no such tensor")):
        networks = make_ppo_networks(here)
        before = {name: tensor.clone() for name, tensor in pack(*networks).items()}
        with pytest.raises(ValueError, match=f"here: tensor {words}"):
            unpack(pack(*make_ppo_networks(there, seed=1)), *networks, "here")
        assert equal_tensors(pack(*networks), before)


@pytest.mark.parametrize("key", STATE_KEYS)
def test_a_state_needs_every_entry_in_its_type(tmp_path, key):
    path, tensors = os.path.join(tmp_path, STATE_FILE), pack(*make_networks())
    for state in ({k: v for k, v in STATE.items() if k != key}, {**STATE, key: None},
                  {**STATE, key: [STATE[key]]}):
        replace_state(path, state, tensors)
        with pytest.raises(ValueError, match=f"{STATE_FILE}: {key} is missing or no "):
            read_state(path)


@pytest.mark.parametrize("change", [
    {"step": 0}, {"step": -1}, {"row": {"loss": "1.5"}}, {"row": {"loss": None}},
    {"row": {"loss": True}}, {"files": {}}, {"files": {"metrics.csv": [100, "0a"]}},
    {"files": {**STATE["files"], "samples.txt": [-1, "0b"]}},
    {"files": {**STATE["files"], "samples.txt": [1.0, "0b"]}},
    {"files": {**STATE["files"], "samples.txt": [0]}},
    {"files": {**STATE["files"], "samples.txt": [0, 1]}},
    {"files": {**STATE["files"], "samples.txt": 0}},
    {"files": {**STATE["files"], "kept.jsonl": [-1, "0c"]}}])
def test_a_state_needs_numbers_in_its_row_and_size_and_hash_of_the_growing_files(tmp_path, change):
    path = os.path.join(tmp_path, STATE_FILE)
    write_state(path, {**STATE, **change}, pack(*make_networks()))
    with pytest.raises(ValueError, match=f"{STATE_FILE}: expected a positive step, numbers in the"):
        read_state(path)


def test_a_fingerprint_depends_on_every_weight_and_on_every_other_thing():
    model, _ = make_networks()
    before = fingerprint(model, [[1, 2], [3]])
    assert fingerprint(make_networks()[0], [[1, 2], [3]]) == before
    assert fingerprint(model, [[1, 2, 3]]) != before != fingerprint(model, [[1], [2, 3]])
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        changed = fingerprint(model, [[1, 2], [3]])
        assert changed != before
        before = changed


# ---- damage --------------------------------------------------------------------------------------

def test_a_state_cut_off_at_any_byte_is_refused(tmp_path):
    path = write_example(tmp_path)
    content = Path(path).read_bytes()
    for length in range(0, len(content), 3):
        put(path, content[:length])
        with pytest.raises(ValueError, match=STATE_FILE):
            read_state(path)


def test_every_mutated_state_is_the_same_state_or_a_value_error(tmp_path):
    path = write_example(tmp_path)
    original, expected = Path(path).read_bytes(), pack(*make_networks())
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
    header = {"__metadata__": {"state": text, "crc32": "0"},
              name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    put(path, file_bytes(header, bytes(8)))
    with pytest.raises(ValueError, match=STATE_FILE):
        read_state(path)


def test_every_flipped_bit_is_found(tmp_path):
    """The numbers have no structure that would give damage away: only the checksum does."""
    path, rng = write_example(tmp_path), random.Random(1)
    original = Path(path).read_bytes()
    start = 8 + int.from_bytes(original[:8], "little")
    for first, words in [(start, "checksum is wrong")] * 300 + [(0, STATE_FILE)] * 200:
        changed = bytearray(original)
        changed[rng.randrange(first, len(original))] ^= 1 << rng.randrange(8)
        put(path, bytes(changed))
        with pytest.raises(ValueError, match=words):
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
    state = {**STATE, "command": code, "row": {code: 1}, "inputs": {"--data": code}}
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
        replace_state(path, state, tensors)
        found = tally.attempt(path, read_state, path)
        if found is not None:
            assert found[0] == {"version": VERSION, **state}
            assert type(found[0]["step"]) is int and found[0]["step"] > 0
            assert all(type(size) is int and size >= 0 and type(digest) is str
                       for size, digest in (found[0]["files"][name] for name in GROWING))
            assert all(value == "" or type(value) in (int, float)
                       for value in found[0]["row"].values())
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
        replace_state(path, STATE, change_tensors(rng, tensors))
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
