"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest
import torch

from minirlhf.tokenizer import Tokenizer, train_bpe

# One thread computes the tests' small networks as fast as several, and on a busy machine many times
# faster. OMP_NUM_THREADS sets another number, here and in the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

SENTENCES = ["The capital of France is Paris. A lion lives in the grassland.",
             "Prompt: What is the capital of France?\nResponse: The capital of France is Paris.",
             "A banana is yellow, and a lemon is yellow too; I'd like three of them, thanks!",
             "The opposite of hot is cold. It's 2 plus 2, and that's 4."]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A BPE of 320 tokens, learned from four sentences."""
    return train_bpe(SENTENCES, 320)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data files: MINIRLHF_TEST_DATA, or shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MINIRLHF_TEST_DATA", beside))
    if not (folder / "hh-harmless-base-test.jsonl.gz").exists():
        pytest.skip("no folder with hh-harmless-base-test.jsonl.gz; name one by MINIRLHF_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiktoken_cache(shared_data: Path) -> Path:
    """tiktoken's cache with GPT-2's two files, so that no test needs the network."""
    folder = shared_data.parent / "tiktoken-cache"
    if not folder.is_dir():
        pytest.skip("no folder tiktoken-cache beside the test data")
    return folder


@pytest.fixture
def gpt2_tokenizer(tiktoken_cache: Path, monkeypatch) -> Tokenizer:
    """GPT-2's own tokenizer."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tiktoken_cache))
    return Tokenizer.gpt2()
