"""Pretraining: documents as one stream, windows, learning, and models with random weights."""

import shutil

import numpy as np
import pytest
import torch
from helpers import REPOSITORY

from minirlhf import pretrain
from minirlhf.engine.metrics import read_metrics
from minirlhf.engine.training import random_stream
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
from minirlhf.pretrain import PretrainConfig
from minirlhf.tokenizer import Tokenizer


def config(tmp_path, **options) -> PretrainConfig:
    sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 1, "n_head": 2, "context": 16,
             "batch_size": 8, "steps": 40, "save_every": 20, "warmup_steps": 5, "lr": 1e-2}
    return PretrainConfig(**{**sizes, "text": write_text(tmp_path), "out": str(tmp_path / "base"),
                             **options})


def write_text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    documents = [f"The number {number} comes after the number {number - 1}."
                 for number in range(60)]
    path.write_text("\n\n".join(documents), encoding="utf-8")
    return str(path)


def test_documents_become_one_stream_as_in_the_worked_example():
    tokenizer = Tokenizer([])
    (a,), (b, c) = tokenizer.encode("a"), tokenizer.encode("bc")
    stream, starts = pretrain.pack(["a", "bc"], tokenizer)
    assert stream.tolist() == [tokenizer.end_token, a, tokenizer.end_token, b, c]
    assert starts.tolist() == [0, 2]


def test_windows_are_cut_from_the_stream_and_most_begin_where_a_document_does():
    stream, starts = np.arange(1000, dtype=np.uint16), np.arange(0, 1000, 50)
    windows = pretrain.draw_windows(stream, starts, 400, 10, random_stream(0))
    assert windows.shape == (400, 11) and windows.dtype == torch.long
    assert torch.equal(windows - windows[:, :1], torch.arange(11).expand(400, -1))
    at_start = (windows[:, 0] % 50 == 0).float().mean().item()
    assert 0.65 < at_start < 0.85


def test_it_learns_the_text_saves_a_loadable_folder_and_repeats_from_its_seed(tmp_path):
    row = pretrain.main(config(tmp_path))
    first = read_metrics(str(tmp_path / "base"))
    assert row["held_out_loss"] < 0.8 * np.log(300) and first[-1]["loss"] < first[0]["loss"]
    assert load_network(GPT2, str(tmp_path / "base")).config.vocab_size == 300
    again = pretrain.main(config(tmp_path, out=str(tmp_path / "again")))
    assert again["held_out_loss"] == row["held_out_loss"]


def test_no_steps_save_the_random_weights_of_the_seed(tmp_path):
    folder = str(tmp_path / "base")
    assert pretrain.main(config(tmp_path, steps=0, seed=7)) == {}
    torch.manual_seed(7)
    model = load_network(GPT2, folder)
    expected = GPT2(model.config).wte.weight.half().float()
    assert torch.equal(model.wte.weight, expected)
    assert Tokenizer.load(folder).vocab_size == 300


def test_gpt2s_tokenizer_needs_no_text_and_no_network(tmp_path, gpt2_tokenizer):
    folder = str(tmp_path / "base")
    pretrain.main(config(tmp_path, text=str(tmp_path / "none.txt"), tokenizer="gpt2", steps=0,
                         n_embd=4, n_head=1))
    assert Tokenizer.load(folder).merges == gpt2_tokenizer.merges
    assert load_network(GPT2, folder).config.vocab_size == 50257


@pytest.mark.parametrize("options, message", [
    ({"tokenizer": "bert"}, "--tokenizer"), ({"steps": -1}, "--steps"),
    ({"vocab_size": 256}, "--vocab_size"),
    ({"context": 4}, "--context")])
def test_an_option_out_of_range_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_text_that_is_too_small_is_refused(tmp_path):
    (tmp_path / "small.txt").write_text("one\n\ntwo", encoding="utf-8")
    with pytest.raises(ValueError, match="expected at least 20"):
        pretrain.main(config(tmp_path, text=str(tmp_path / "small.txt")))
    with pytest.raises(ValueError, match="too few for --context"):
        pretrain.main(config(tmp_path, context=500))


def test_a_text_does_not_replace_the_shipped_base(tmp_path):
    shutil.copytree(REPOSITORY / "checkpoints" / "tiny", tmp_path / "tiny")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    with pytest.raises(ValueError, match="tiny holds .*, expected a new or an empty folder"):
        pretrain.main(config(tmp_path, out=str(tmp_path / "tiny")))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    pretrain.main(config(tmp_path, out=str(tmp_path / "tiny"), replace=True, steps=0))
    assert load_network(GPT2, str(tmp_path / "tiny")).config.vocab_size == 300
