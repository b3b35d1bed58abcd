"""A toy world for the trainers' tests: questions for colours, answered by colour words.

It is small enough that a one-layer GPT-2 learns it in a second. The functions below are named on
trainers' command lines as "helpers:demonstrations" and so on, as a user would name his own.
"""

import atexit
import contextlib
import functools
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from minirlhf import ppo, reward_model, sft
from minirlhf.engine.metrics import read_metrics
from minirlhf.files import pretrained
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel
from minirlhf.tokenizer import Tokenizer, train_bpe

NAMES = [first + middle + last for first in "bdklmt" for middle in "aeo" for last in ("na", "ro")]
COLOURS = ["red", "green", "blue"]
CONTEXT = 32                        # n_positions of the toy models
REPOSITORY = Path(__file__).resolve().parents[1]


# ---- data ----------------------------------------------------------------------------------------

def colour_words(rng: random.Random, colours: list[str]) -> str:
    return " ".join(rng.choice(colours) for _ in range(rng.randint(1, 6)))


def toy_prompts(count: int, seed: int, model: str = "") -> list[dict]:
    rng = random.Random(seed)
    return [{"prompt": f"Colours for {rng.choice(NAMES)}?"} for _ in range(count)]


def equal_prompts(count: int, seed: int, model: str = "") -> list[dict]:
    return [{"prompt": "Colours for bana?"}] * count


def demonstrations(count: int, seed: int, model: str = "") -> list[dict]:
    rng = random.Random(seed)
    return [{**row, "response": colour_words(rng, COLOURS)} for row in toy_prompts(count, seed)]


def comparisons(count: int, seed: int, model: str = "") -> list[dict]:
    """The chosen answer is rather red, the rejected one rather blue; both have green words."""
    rng = random.Random(seed)
    return [{**row, "chosen": "red " + colour_words(rng, ["red", "green"]),
             "rejected": "blue " + colour_words(rng, ["blue", "green"])}
            for row in toy_prompts(count, seed)]


# ---- rewards -------------------------------------------------------------------------------------

def responses_of(ids, prompt_lengths, lengths) -> list[list[int]]:
    return [ids[row, prompt_lengths[row]:lengths[row]].tolist() for row in range(len(ids))]


def share_of_red(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """Share of the response's tokens that are the word red: a rule in place of a reward model."""
    (red,) = tokenizer.encode(" red")
    rows = responses_of(ids, prompt_lengths, lengths)
    return torch.tensor([row.count(red) / len(row) for row in rows])


def constant_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    return torch.full((len(ids),), 0.5)


def nan_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    return torch.tensor([0.0] * (len(ids) - 1) + [float("nan")])


def column_reward(ids, prompt_lengths, lengths, tokenizer) -> torch.Tensor:
    """A natural mistake of a user: (B, 1), which would broadcast to (B, B)."""
    return torch.zeros(len(ids), 1)


def list_reward(ids, prompt_lengths, lengths, tokenizer) -> list[float]:
    return [0.0] * len(ids)


# ---- checkpoints ---------------------------------------------------------------------------------

@functools.cache
def scratch_folder() -> str:
    """One temporary folder for checkpoints that several test files start from."""
    folder = tempfile.mkdtemp(prefix="minirlhf-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def toy_tokenizer() -> Tokenizer:
    texts = [f"Prompt: Colours for {name}?\nResponse: red green blue" for name in NAMES]
    return train_bpe(texts, 310)


def toy_model(seed: int = 0, **sizes) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(GPT2Config(**{"vocab_size": toy_tokenizer().vocab_size, "n_positions": CONTEXT,
                              "n_embd": 32, "n_layer": 1, "n_head": 2, **sizes}))


def save_folder(model, folder: str) -> str:
    """Write a toy model with the toy tokenizer; returns the folder."""
    pretrained.save_folder(model, toy_tokenizer(), folder)
    return folder


@functools.cache
def base_folder() -> str:
    """A base model with random weights."""
    return save_folder(toy_model(), os.path.join(scratch_folder(), "base"))


def quietly(function, *arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments)


def sft_config(**options) -> sft.SFTConfig:
    return sft.SFTConfig(**{"model": base_folder(), "data": "helpers:demonstrations",
                            "examples": 1200, "held_out": 48, "batch_size": 16, "lr": 1e-2,
                            "warmup_steps": 5, "max_new_tokens": 8, **options})


@functools.cache
def sft_folder() -> str:
    """The base model after SFT: it answers with one to six colour words of any colour."""
    folder = os.path.join(scratch_folder(), "sft")
    quietly(sft.main, sft_config(out=folder))
    return folder


def reward_config(**options) -> reward_model.RewardModelConfig:
    return reward_model.RewardModelConfig(**{
        "model": sft_folder(), "data": "helpers:comparisons", "comparisons": 600, "held_out": 100,
        "batch_size": 16, "epochs": 2, "lr": 1e-2, "warmup_steps": 5, "max_new_tokens": 8,
        "norm_samples": 128, **options})


@functools.cache
def reward_folder() -> str:
    """A reward model that likes red."""
    folder = os.path.join(scratch_folder(), "reward_model")
    quietly(reward_model.main, reward_config(out=folder))
    return folder


def random_reward_folder(folder: str, seed: int) -> str:
    """A reward model with random weights."""
    torch.manual_seed(seed)
    return save_folder(ScalarModel(toy_model(seed).config), folder)


def ppo_config(**options) -> ppo.PPOConfig:
    return ppo.PPOConfig(**{
        "model": sft_folder(), "reward": "helpers:share_of_red", "prompts": "helpers:toy_prompts",
        "prompt_count": 100, "gold": "", "iterations": 2, "batch_size": 8, "minibatch_size": 4,
        "max_new_tokens": 5, "lr": 5e-3, "critic_lr": 5e-3, "kl_coef": 0.02, "sample_every": 100,
        **options})


TRAINERS = {"sft": (sft, sft_config), "reward_model": (reward_model, reward_config),
            "ppo": (ppo, ppo_config)}


# ---- commands, as a user starts them -------------------------------------------------------------

def arguments_of(cfg) -> list[str]:
    """A config as a command line."""
    words = []
    for field in cfg.__dataclass_fields__:
        value = getattr(cfg, field)
        if isinstance(value, bool):
            words.append(f"--{field}" if value else f"--no-{field}")
        else:
            words += [f"--{field}", str(value)]
    return words


def environment() -> dict[str, str]:
    """Of a process that computes with one thread and can import this file."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def torchrun(name: str, cfg, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a trainer in several processes; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
         "--standalone", "-m", f"minirlhf.{name}", *arguments_of(cfg)],
        env=environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


# ---- the machine ---------------------------------------------------------------------------------

@contextlib.contextmanager
def limited_file_size(limit: int):
    """Inside, no file may grow beyond `limit` bytes, as on a full disk."""
    resource = pytest.importorskip("resource", reason="limits of file size are POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- looking at results --------------------------------------------------------------------------

def weights_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[k], second[k]) for k in first)


def metrics_without_time(folder: str) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"}
            for row in read_metrics(folder)]


def grad_norm_of(parameters) -> float:
    """Norm of all gradients that are there now."""
    squares = [p.grad.double().pow(2).sum() for p in parameters if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()
