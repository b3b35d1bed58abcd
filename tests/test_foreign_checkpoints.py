"""Checkpoint folders as others write them, and ours as others read them."""

import gzip
import itertools
import json
import os
import pickle
import random
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fuzzing import Malicious
from helpers import (
    REPOSITORY,
    quietly,
    reward_folder,
    sft_config,
    sft_folder,
    toy_prompts,
    toy_tokenizer,
    weights_equal,
)
from networks import SMALL, padded, randomise, small_model, text_model

from minirlhf import ppo, reward_model, sft
from minirlhf.data import format_prompt
from minirlhf.engine.training import random_stream
from minirlhf.files.disk import open_regular, parse_json, read_json, write_json
from minirlhf.files.foreign import WEIGHTS, contents, other_weights
from minirlhf.files.hub import find_folder
from minirlhf.files.model_card import MARK, find_base, write_model_card
from minirlhf.files.pretrained import expected_shapes, load_network, save_folder, save_network
from minirlhf.files.tensors import (
    read_safetensors,
    read_weights,
    tensor_bytes,
    write_safetensors,
)
from minirlhf.generate import generate
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel, token_logprobs
from minirlhf.tokenizer import Tokenizer, load_tokenizer

WEIGHTS_NAME, BIN_NAME = "model.safetensors", "pytorch_model.bin"


@pytest.fixture
def saved(tmp_path) -> tuple[GPT2, Path]:
    """A small language model in float32 and the folder where it is saved."""
    model, folder = small_model().float(), tmp_path / "model"
    save_network(model, str(folder))
    return model, folder


def change_config(folder, **values) -> None:
    path = os.path.join(folder, "config.json")
    write_json(path, {**read_json(path), **values})


# ---- equal arithmetic ----------------------------------------------------------------------------

EQUAL = [{"n_inner": 48}, {"activation_function": "gelu_pytorch_tanh"},
         {"activation_function": "gelu_fast"}, {"activation_function": "gelu_accurate"},
         {"activation_function": "gelu_python_tanh"}, {"reorder_and_upcast_attn": True},
         {"layer_norm_epsilon": 0.00001}, {"attn_pdrop": 0.3, "use_cache": False}]


@pytest.mark.parametrize("values", EQUAL)
def test_a_config_that_says_the_same_in_other_words_is_accepted(saved, values):
    model, folder = saved
    change_config(folder, **values)
    assert weights_equal(load_network(GPT2, str(folder)), model)


@pytest.mark.parametrize("values", [
    {"n_inner": 47}, {"n_inner": 0}, {"activation_function": "gelu"},
    {"activation_function": "quick_gelu"}, {"activation_function": "gelu_10"},
    {"activation_function": "relu"}, {"reorder_and_upcast_attn": "yes"}])
def test_a_config_that_says_something_else_is_still_refused(saved, values):
    _, folder = saved
    change_config(folder, **values)
    with pytest.raises(ValueError, match=f"{list(values)[0]} is .*, minirlhf's GPT-2 has"):
        load_network(GPT2, str(folder))


@pytest.mark.parametrize("values", EQUAL)
def test_transformers_computes_the_same_with_these_words(saved, values):
    transformers = pytest.importorskip("transformers")
    model, folder = saved
    change_config(folder, **values)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), attn_implementation="eager").eval()
    ids = torch.tensor([[10, 3, 4, 5, 5, 9]])
    with torch.no_grad():
        assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)


# ---- names and parts -----------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", [
    "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "module.transformer.",
    "_orig_mod.transformer.", "module.module."])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_names_that_wrappers_of_pytorch_made_are_read(saved, prefix, form):
    model, folder = saved
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    (folder / WEIGHTS_NAME).unlink()
    if form == "bin":
        torch.save(tensors, folder / BIN_NAME)
    else:
        write_safetensors(str(folder / WEIGHTS_NAME), tensors)
    assert weights_equal(load_network(GPT2, str(folder)), model)


def test_a_reward_model_from_a_wrapper_is_read(tmp_path):
    scorer = ScalarModel(SMALL)
    save_network(scorer, str(tmp_path))
    path = str(tmp_path / WEIGHTS_NAME)
    tensors = {f"module.{name}": tensor.clone() for name, tensor in read_safetensors(path).items()}
    write_safetensors(path, tensors)
    assert weights_equal(load_network(ScalarModel, str(tmp_path)), scorer)


def test_checkpointing_and_fsdp_leave_names_inside(saved):
    model, folder = saved
    tensors = {name.replace(".attn.", "._checkpoint_wrapped_module.attn."): tensor
               for name, tensor in model.state_dict().items()}
    tensors = {name.replace("h.", "h.", 1): tensor for name, tensor in tensors.items()}
    write_safetensors(str(folder / WEIGHTS_NAME), {
        f"_fsdp_wrapped_module.{name}": tensor for name, tensor in tensors.items()})
    assert weights_equal(load_network(GPT2, str(folder)), model)


def test_one_tensor_under_two_names_is_refused(saved):
    model, folder = saved
    tensors = dict(model.state_dict())
    tensors["module.ln_f.bias"] = tensors["ln_f.bias"] + 1
    write_safetensors(str(folder / WEIGHTS_NAME), tensors)
    with pytest.raises(ValueError, match="ln_f.bias is there with and without prefix"):
        load_network(GPT2, str(folder))


def test_the_unembedding_stands_for_the_embedding_that_it_is_tied_to(saved):
    """safetensors' save_model writes only one of two tensors that are the same, the first name."""
    model, folder = saved
    tensors = {"transformer." + name: tensor for name, tensor in model.state_dict().items()}
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    write_safetensors(str(folder / WEIGHTS_NAME), tensors)
    assert weights_equal(load_network(GPT2, str(folder)), model)


def test_a_transposed_weight_is_called_transposed(saved):
    model, folder = saved
    tensors = dict(model.state_dict())
    name = "h.1.mlp.c_fc.weight"
    write_safetensors(str(folder / WEIGHTS_NAME), {**tensors, name: tensors[name].T.contiguous()})
    with pytest.raises(ValueError, match="h.1.mlp.c_fc.weight has shape .* stored transposed"):
        load_network(GPT2, str(folder))


def split(folder: Path, form: str) -> Path:
    """Cut the weights of a folder into three files with an index; returns the index."""
    tensors = {name: tensor.clone()
               for name, tensor in read_safetensors(str(folder / WEIGHTS_NAME)).items()}
    (folder / WEIGHTS_NAME).unlink()
    stem, ending = (WEIGHTS_NAME if form == "safetensors" else BIN_NAME).split(".")
    parts = {}
    for number in range(3):
        part = dict(itertools.islice(tensors.items(), number, None, 3))
        name = f"{stem}-{number + 1:05d}-of-00003.{ending}"
        if form == "safetensors":
            write_safetensors(str(folder / name), part)
        else:
            torch.save(part, folder / name)
        parts.update(dict.fromkeys(part, name))
    index = folder / f"{stem}.{ending}.index.json"
    write_json(str(index), {"metadata": {"total_size": 1}, "weight_map": parts})
    return index


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_in_several_files_are_read(saved, form):
    model, folder = saved
    split(folder, form)
    assert weights_equal(load_network(GPT2, str(folder)), model)


@pytest.mark.parametrize("name", [
    "../model-00001-of-00003.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors",
    "C:x.safetensors", "", ".", "..", ".hidden.safetensors", "x.bin", "x.safetensors\0", "x\n",
    "model\u0301.safetensors", 3, None, ["x.safetensors"]])
def test_an_index_cannot_lead_out_of_its_folder(saved, name):
    _, folder = saved
    index = split(folder, "safetensors")
    values = read_json(str(index))
    values["weight_map"]["transformer.ln_f.bias"] = name
    index.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match="index.json: expected the name of a .safetensors file"):
        load_network(GPT2, str(folder))


def test_parts_that_do_not_fit_their_index_are_named(saved):
    _, folder = saved
    index = split(folder, "safetensors")
    values = read_json(str(index))
    first = str(folder / "model-00001-of-00003.safetensors")
    part = {name: tensor.clone() for name, tensor in read_safetensors(first).items()}
    name = min(part)
    write_safetensors(first, {key: part[key] for key in part if key != name})
    with pytest.raises(ValueError, match=f"00001.*tensor '{name}' is missing, by what .*index"):
        load_network(GPT2, str(folder))
    write_safetensors(first, {**part, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="00001.*tensor 'extra' is not expected"):
        load_network(GPT2, str(folder))
    os.unlink(first)
    with pytest.raises(FileNotFoundError, match="00001-of-00003.safetensors does not exist; .*index"
                                                ".json names it"):
        load_network(GPT2, str(folder))
    write_json(str(index), {**values, "weight_map": []})
    with pytest.raises(ValueError, match="index.json: expected weight_map"):
        load_network(GPT2, str(folder))


def test_a_part_that_is_a_pointer_of_git_lfs_is_named(saved):
    _, folder = saved
    split(folder, "safetensors")
    (folder / "model-00002-of-00003.safetensors").write_bytes(POINTER)
    with pytest.raises(ValueError, match="00002-of-00003.safetensors: .* Git LFS pointer"):
        load_network(GPT2, str(folder))


# ---- rows after the vocabulary -------------------------------------------------------------------

ROWS = 37                           # more than tokens


def add_rows(folder: str, rows: int = ROWS) -> torch.Tensor:
    """Fill the embedding of a saved folder up, as nanoGPT does; returns the rows that were added.

    They are large: whatever sampled or scored them would do so all the time.
    """
    path = os.path.join(folder, WEIGHTS_NAME)
    tensors = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    wte = tensors["transformer.wte.weight"]
    more = 100 * torch.randn(rows, wte.shape[1], generator=torch.Generator().manual_seed(0))
    tensors["transformer.wte.weight"] = torch.cat([wte, more.to(wte)])
    write_safetensors(path, tensors)
    change_config(folder, vocab_size=len(wte) + rows)
    return more


def rows_after(folder: str, tokens: int) -> torch.Tensor:
    """The rows after the vocabulary in a saved folder."""
    tensors = read_safetensors(os.path.join(folder, WEIGHTS_NAME))
    return tensors["transformer.wte.weight"][tokens:].clone()


def test_a_filled_up_embedding_samples_and_scores_as_the_plain_one(tiny_tokenizer, tmp_path,
                                                                   capsys):
    model = text_model(tiny_tokenizer)
    save_folder(model, tiny_tokenizer, str(tmp_path))
    add_rows(str(tmp_path))
    loaded = load_network(GPT2, str(tmp_path)).requires_grad_(False)
    tokenizer = load_tokenizer(str(tmp_path), loaded)
    assert f"{ROWS} rows more than the tokenizer's 320 tokens" in capsys.readouterr().out
    assert loaded.config == model.config and weights_equal(loaded, model)
    prompts = [[tokenizer.end_token, *tokenizer.encode(text)] for text in ("The", "A lion is")]
    options = {"max_new_tokens": 20, "end_token": tokenizer.end_token}
    ours, plain = [generate(network, prompts, generator=random_stream(0), **options)
                   for network in (loaded, model)]
    assert torch.equal(ours.ids, plain.ids) and torch.equal(ours.logprobs, plain.logprobs)
    mask = torch.ones(ours.ids[:, 1:].shape, dtype=torch.bool)
    for entropy_grad in (False, True):
        found, expected = [token_logprobs(network.hidden(ours.ids), ours.ids, mask,
                                          network.wte.weight, entropy_grad=entropy_grad)
                           for network in (loaded, model)]
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_the_rows_are_kept_as_they_are_through_all_stages(tmp_path):
    """Weight decay does not shrink them, and copies of the policy (reference, critic) have them."""
    tokens, base = toy_tokenizer().vocab_size, str(tmp_path / "base")
    torch.manual_seed(0)
    save_folder(GPT2(GPT2Config(tokens, 32, 32, 1, 2)), toy_tokenizer(), base)
    more = add_rows(base)
    folders = {name: str(tmp_path / name) for name in ("sft", "rm", "ppo", "shared")}
    quietly(sft.main, sft_config(model=base, out=folders["sft"], examples=80, epochs=1,
                                 weight_decay=0.5))
    quietly(reward_model.main, reward_model.RewardModelConfig(
        model=folders["sft"], data="helpers:comparisons", comparisons=60, held_out=20,
        batch_size=8, epochs=1, max_new_tokens=6, norm_samples=16, out=folders["rm"]))
    for name in ("ppo", "shared"):
        quietly(ppo.main, ppo.PPOConfig(
            model=folders["sft"], reward=folders["rm"], prompts="helpers:toy_prompts", gold="",
            prompt_count=20, iterations=1, batch_size=4, minibatch_size=4, max_new_tokens=5,
            critic="shared" if name == "shared" else "separate", out=folders[name]))
    for folder in [*folders.values(), os.path.join(folders["ppo"], "critic"),
                   os.path.join(folders["shared"], "critic")]:
        assert torch.equal(rows_after(folder, tokens), more), folder
        config = read_json(os.path.join(folder, "config.json"))
        assert config["vocab_size"] == tokens + ROWS and config["eos_token_id"] == tokens - 1
    assert not torch.equal(read_weights(folders["sft"])["transformer.wte.weight"],
                           read_weights(base)["transformer.wte.weight"])


def test_rows_that_are_not_finite_are_refused(tiny_tokenizer, tmp_path):
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path))
    more = add_rows(str(tmp_path), 3)
    tensors = {name: tensor.clone() for name, tensor in read_weights(str(tmp_path)).items()}
    tensors["transformer.wte.weight"][-1] = float("nan")
    write_safetensors(str(tmp_path / WEIGHTS_NAME), tensors)
    with pytest.raises(ValueError, match="wte.weight holds nan or inf"):
        load_network(GPT2, str(tmp_path))
    assert len(more) == 3


def test_added_tokens_without_rows_are_named_as_the_cause(tiny_tokenizer, tmp_path):
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path))
    write_json(str(tmp_path / "added_tokens.json"), {"[PAD]": 320})
    model = load_network(GPT2, str(tmp_path))
    with pytest.raises(ValueError, match=r"has 321 tokens, config.json says 320; .*no rows for the "
                                         r"added tokens \['\[PAD\]'\]: resize it"):
        load_tokenizer(str(tmp_path), model)


def test_a_fine_tune_with_added_tokens_and_a_round_number_of_rows_is_read(tiny_tokenizer,
                                                                         tmp_path):
    """As haoranhuang-mt/gpt_clm: <BOS>, <EOS>, <PAD> after GPT-2's vocabulary."""
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path))
    add_rows(str(tmp_path), 5)
    write_json(str(tmp_path / "added_tokens.json"), {"<BOS>": 320, "<EOS>": 321, "<PAD>": 322})
    write_json(str(tmp_path / "special_tokens_map.json"), {"eos_token": "<EOS>"})
    write_json(str(tmp_path / "tokenizer_config.json"), {"model_max_length": 80})
    model = load_network(GPT2, str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path), model)
    assert (model.config.vocab_size, tokenizer.end_token) == (323, 321)
    assert model.spare_rows.shape == (2, 24)
    save_folder(model, tokenizer, str(tmp_path / "again"))
    again = load_network(GPT2, str(tmp_path / "again"))
    assert load_tokenizer(str(tmp_path / "again"), again) == tokenizer
    assert weights_equal(again, model) and torch.equal(again.spare_rows, model.spare_rows)


def test_a_reward_model_whose_vocabulary_is_numbered_otherwise_pads_with_its_own_byte(tmp_path):
    tokenizer = toy_tokenizer()
    order = list(tokenizer.vocabulary())
    random.Random(0).shuffle(order)
    ids = {token: number for number, token in enumerate(order)}
    other = Tokenizer(tokenizer.merges, vocabulary=tokenizer.stated._replace(ids=ids))
    save_folder(ScalarModel(text_model(other).config), other, str(tmp_path))
    config = read_json(str(tmp_path / "config.json"))
    assert config["pad_token_id"] == ids["\u00ff"] != 187
    assert config["eos_token_id"] == ids["<|endoftext|>"]


def test_reward_model_and_policy_must_have_the_same_ids_not_only_the_same_merges(tmp_path):
    tokenizer = toy_tokenizer()
    ids = tokenizer.vocabulary()
    ids["!"], ids['"'] = ids['"'], ids["!"]
    other = Tokenizer(tokenizer.merges, vocabulary=tokenizer.stated._replace(ids=ids))
    folder = str(tmp_path / "rm")
    save_folder(ScalarModel(GPT2Config(tokenizer.vocab_size, 32, 32, 1, 2)), other, folder)
    with pytest.raises(ValueError, match="tokenizer is not the policy's"):
        quietly(ppo.main, ppo.PPOConfig(model=sft_folder(), reward=folder, gold="",
                                        prompts="helpers:toy_prompts", out=str(tmp_path / "out")))


# ---- files that are not what their name says -----------------------------------------------------

POINTER = (b"version https://git-lfs.github.com/spec/v1\noid sha256:248dfc3911869ec493c76e65"
           b"bf2fcf7f615828b0254c12b473182f0f81d3a707\nsize 548105171\n")
PAGE = b"<!DOCTYPE html>\n<html lang=\"en\"><head><title>404</title></head></html>"
STAND_INS = {
    "pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
    "old pointer": (POINTER.replace(b"git-lfs", b"hawser"), "Git LFS pointer"),
    "page": (PAGE, "web page"), "page in capitals": (b"\xef\xbb\xbf \n<HTML>\n", "web page"),
    "storage error": (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "web page"),
    "empty": (b"", "empty file"), "zeros": (bytes(5000), "zero bytes"),
    "gzip": (gzip.compress(b"{}"), "gzip data.*gunzip"), "bzip2": (b"BZh91AY&SY", "bunzip2"),
    "zstd": (b"\x28\xb5\x2f\xfd\0", "unzstd"), "xz": (b"\xfd7zXZ\0\0", "unxz"),
    "zip": (b"PK\x03\x04" + bytes(40), "zip archive"), "UTF-16": ("{}".encode("utf-16"), "UTF-16"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "HDF5"), "GGUF": (b"GGUF\3\0\0\0", "GGUF"),
    "server's word": (b"Entry not found", "the text 'Entry not found'"),
    "Unauthorised": (b"Invalid username or password.", "the text 'Invalid")}
READERS = {"config.json": read_json, "merges.txt": lambda path: Tokenizer.load(
               os.path.dirname(path)), "vocab.json": lambda path: Tokenizer.load(
                   os.path.dirname(path)),
           WEIGHTS_NAME: read_safetensors,
           BIN_NAME: lambda path: read_weights(os.path.dirname(path))}


@pytest.mark.parametrize("case", STAND_INS)
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_something_else_is_called_by_its_name(tiny_tokenizer, tmp_path, name, case):
    content, message = STAND_INS[case]
    if name in ("merges.txt", "vocab.json"):
        tiny_tokenizer.save(str(tmp_path))
        if name == "merges.txt" and case in ("server's word", "Unauthorised"):
            message = "merges.txt:1: expected two tokens, found"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        READERS[name](str(tmp_path / name))
    assert name in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("case", ["pointer", "page"])
def test_no_reader_takes_what_stands_in_for_a_file(tmp_path, case):
    """Whoever opens a file by `open_regular` is safe from them: data, merges, metrics."""
    content, message = STAND_INS[case]
    (tmp_path / "data.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_regular(str(tmp_path / "data.jsonl.gz"))
    with pytest.raises(ValueError, match=message):
        quietly(sft.main, sft_config(data=str(tmp_path / "data.jsonl.gz"), out=str(tmp_path / "o")))


def test_weights_under_the_other_ones_name_are_told_apart(saved):
    model, folder = saved
    os.rename(folder / WEIGHTS_NAME, folder / BIN_NAME)
    with pytest.raises(ValueError, match="found a safetensors file .*name model.safetensors"):
        load_network(GPT2, str(folder))
    torch.save(dict(model.state_dict()), folder / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="found a zip archive .*name pytorch_model.bin"):
        load_network(GPT2, str(folder))


def test_json_with_a_byte_order_mark_says_so(tmp_path):
    with pytest.raises(ValueError, match="x.json: not valid JSON: found text with a byte order"):
        parse_json(b"\xef\xbb\xbf{}", "x.json")
    assert contents(b'{"a": 1') == "" and contents(b"[1]") == ""     # JSON's own errors say more


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "ckpt.pt", "tf_model.h5",
                                  "model.ckpt.index", "flax_model.msgpack", "x.Q4_K_M.gguf",
                                  "model.onnx", "zero_to_fp32.py", "__0_0.distcp",
                                  "model-00001-of-00002.safetensors", "checkpoint-500",
                                  "model.safetensors.part", "weights.pth", "gpt2.pt"])
def test_a_folder_with_weights_in_another_form_says_how_to_convert_them(saved, name):
    _, folder = saved
    os.unlink(folder / WEIGHTS_NAME)
    (folder / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no weights: expected model.safetensors or "
                                                "pytorch_model.bin") as error:
        load_network(GPT2, str(folder))
    assert f"{name!r} is " in str(error.value) and "\n" not in str(error.value)


def test_every_other_form_of_weights_is_met_by_a_test():
    names = ["adapter_config.json", "ckpt.pt", "a.gguf", "tf_model.h5", "model.ckpt.index",
             "flax_model.msgpack", "a.onnx", "zero_to_fp32.py", "a.distcp", "a.part",
             "a.incomplete", "m-1-of-2.safetensors", "m-1-of-2.bin", "checkpoint-9",
             "a.safetensors", "a.pt", "a.pth"]
    assert [other_weights([name]).split(" is ", 1)[1] for name in names] == list(WEIGHTS.values())
    assert other_weights(["README.md", "config.json"]) == ""


def as_nanogpt(model: GPT2) -> dict:
    """The checkpoint of nanoGPT that holds these weights: linear layers the other way round."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    state = {f"_orig_mod.transformer.{name}": (tensor.T.contiguous() if name.endswith(turned)
                                               else tensor)
             for name, tensor in model.state_dict().items()}
    state["_orig_mod.lm_head.weight"] = model.wte.weight.detach()
    return {"model": state, "model_args": {"n_layer": 3}, "iter_num": 5, "config": {}}


def test_nanogpts_checkpoint_is_named_and_its_conversion_works(saved):
    model, folder = saved
    os.unlink(folder / WEIGHTS_NAME)
    torch.save(as_nanogpt(model), folder / BIN_NAME)
    with pytest.raises(ValueError, match="nanoGPT's checkpoint.*transpose.*block_size.*exact GELU"):
        load_network(GPT2, str(folder))
    os.rename(folder / BIN_NAME, folder / "ckpt.pt")
    with pytest.raises(FileNotFoundError, match="is a file, expected a folder .*nanoGPT's"):
        load_network(GPT2, str(folder / "ckpt.pt"))
    state = torch.load(folder / "ckpt.pt", weights_only=True)["model"]      # as the message says
    converted = {}
    for name, tensor in state.items():
        name = name.removeprefix("_orig_mod.")
        if name != "lm_head.weight":
            turned = name.endswith(("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight",
                                    "mlp.c_proj.weight"))
            converted[name] = tensor.T if turned else tensor
    torch.save(converted, folder / BIN_NAME)
    assert weights_equal(load_network(GPT2, str(folder)), model)


def test_weights_inside_another_dict_are_pointed_at(saved):
    model, folder = saved
    os.unlink(folder / WEIGHTS_NAME)
    torch.save({"state_dict": dict(model.state_dict()), "epoch": 3}, folder / BIN_NAME)
    with pytest.raises(ValueError, match="'state_dict': expected a tensor.*torch.save this dict"):
        load_network(GPT2, str(folder))


# ---- code in a file ------------------------------------------------------------------------------

class Whole(torch.nn.Module):
    """A module that somebody pickles as a whole, with its class."""


@pytest.mark.filterwarnings("error")         # warnings of PyTorch's loader reach the user, too
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["call", "module", "function", "bare"])
def test_a_file_with_code_is_not_loaded_and_no_advice_to_do_so_is_passed_on(tmp_path, kind, zipped):
    trap = tmp_path / "executed"
    content = {"call": {"w": Malicious(str(trap))}, "module": Whole(), "function": {"w": os.system},
               "bare": Malicious(str(trap))}[kind]
    if kind == "bare":
        (tmp_path / BIN_NAME).write_bytes(pickle.dumps(content, protocol=4 if zipped else 2))
    else:
        torch.save(content, tmp_path / BIN_NAME, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"the file holds code.*; do not load it: ask its maker "
                                         "for model.safetensors") as error:
        read_weights(str(tmp_path))
    assert kind == "bare" or re.search(r"code \([\w.]+\), not only tensors", str(error.value))
    assert_no_advice(str(error.value))
    assert not trap.exists()


def assert_no_advice(message: str) -> None:
    for words in ("weights_only", "weights only", "torch.load", "safe_globals", "allowlist"):
        assert words not in message.lower(), message
    assert "\n" not in message


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_code(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / BIN_NAME)
    with pytest.raises(ValueError, match="holds code .TorchScript.") as error:
        read_weights(str(tmp_path))
    assert_no_advice(str(error.value))


def test_a_zip_of_something_else_is_to_be_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / BIN_NAME, "w") as archive:
        archive.writestr("gpt2/model.safetensors", b"x")
    with pytest.raises(ValueError, match="a zip archive, but none of PyTorch's: unpack it"):
        read_weights(str(tmp_path))


def test_no_damage_makes_pytorchs_advice_reach_a_user(tmp_path):
    """Every byte of the pickle inside a file, changed in several ways."""
    torch.save({"a": torch.rand(3)}, tmp_path / "good")
    with zipfile.ZipFile(tmp_path / "good") as archive:
        items = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in items if name.endswith("data.pkl")]
    messages = set()
    for at, change in itertools.product(range(len(items[pickled])), (1, 64, 255)):
        content = bytearray(items[pickled])
        content[at] ^= change
        with zipfile.ZipFile(tmp_path / BIN_NAME, "w") as archive:
            for name, data in {**items, pickled: bytes(content)}.items():
                archive.writestr(name, data)
        try:
            read_weights(str(tmp_path))
        except ValueError as error:
            assert_no_advice(str(error))
            messages.add(str(error))
    assert len(messages) > 10


# ---- the header of safetensors -------------------------------------------------------------------

NAMES = ["plain", "\u00e9\u00df", "\u4f60\u597d", "\U0001f642", "\u2028", "\x00\x1f\x7f\"\\/",
         "\uffff", "e\u0301", "\x80", "transformer.h.0", "Z", "\ue000", "\U00010000"]


def test_names_of_any_alphabet_are_written_as_the_package_writes_them(tmp_path):
    tensors = {name: torch.tensor([float(number)]) for number, name in enumerate(NAMES)}
    write_safetensors(str(tmp_path / "ours"), tensors)
    assert {name: tensor.item() for name, tensor in read_safetensors(str(tmp_path / "ours")).items()
            } == {name: float(number) for number, name in enumerate(NAMES)}
    content = (tmp_path / "ours").read_bytes()
    assert "\u4f60\u597d".encode() in content and b"\\u4f60" not in content
    package = pytest.importorskip("safetensors.torch")
    package.save_file(tensors, str(tmp_path / "theirs"), metadata={"format": "pt"})
    assert content == (tmp_path / "theirs").read_bytes()
    assert set(package.load_file(str(tmp_path / "ours"))) == set(NAMES)


def header_file(path, header: bytes, data: bytes) -> str:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return str(path)


@pytest.mark.parametrize("header, message", [
    (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', "expected data_offsets"),
    (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', "expected a shape"),
    (rb'{"\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "half of a surrogate pair"),
    (rb'{"__metadata__":{"a":"\udfff"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
     "half of a surrogate pair"),
    (rb'{"__metadata__":{"\udfff":"a"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
     "half of a surrogate pair")])
def test_what_the_package_refuses_in_a_header_is_refused(tmp_path, header, message):
    data = bytes(4) if b"[1]" in header else b""
    path = header_file(tmp_path / "a.safetensors", header, data)
    with pytest.raises(ValueError, match=message):
        read_safetensors(path)
    package = pytest.importorskip("safetensors")
    with pytest.raises(Exception, match="header|JSON|invalid|surrogate|hex"):
        package.deserialize(Path(path).read_bytes())


def test_a_whole_surrogate_pair_is_a_letter(tmp_path):
    header = rb'{"\ud83d\ude42":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = header_file(tmp_path / "a.safetensors", header, bytes(4))
    assert list(read_safetensors(path)) == ["\U0001f642"]


@pytest.mark.parametrize("name, make, message", [
    ("a", lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ("a", lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr"),
    ("a", lambda: torch.empty(3, device="meta"), "on device meta"),
    ("a\ud800", lambda: torch.zeros(1), "half of a surrogate pair"),
    ("\udfff", lambda: torch.zeros(1), "half of a surrogate pair")])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_what_a_file_cannot_hold_is_refused_clearly(tmp_path, name, make, message):
    tensor = make()
    with pytest.raises(ValueError, match=message) as error:
        write_safetensors(str(tmp_path / "a.safetensors"), {name: tensor})
    assert "a.safetensors" in str(error.value) and os.listdir(tmp_path) == []


def test_a_tensor_that_is_only_marked_as_negative_is_written_by_value(tmp_path):
    numbers = torch.tensor([1.0 + 2.0j, -3.0j]).conj().imag
    assert numbers.is_neg()
    write_safetensors(str(tmp_path / "a"), {"a": numbers})
    assert read_safetensors(str(tmp_path / "a"))["a"].tolist() == [-2.0, 3.0]
    assert bytes(tensor_bytes(numbers)) == bytes(tensor_bytes(torch.tensor([-2.0, 3.0])))


def test_a_config_of_a_thousand_layers_is_refused_at_once(saved):
    _, folder = saved
    change_config(folder, n_layer=1000)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"is missing \(11964 in all\)"):
        load_network(GPT2, str(folder))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("kind", [GPT2, ScalarModel])
def test_the_expected_tensors_are_those_of_the_network(kind):
    config = replace(SMALL, n_layer=12)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    found = expected_shapes(config, kind.scalar)
    assert found == shapes


# ---- names of the Hub ----------------------------------------------------------------------------

def test_the_hubs_name_of_a_published_model_is_known(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minirlhf.files.hub.download_published",
                        lambda name, folder: asked.append((name, folder)))
    for name in ("gpt2", "gpt2-medium"):
        folder = os.path.join("checkpoints", name)
        assert find_folder(f"openai-community/{name}") == find_folder(name) == folder
        assert asked[-2:] == [(name, folder)] * 2
    os.makedirs("openai-community/gpt2")
    assert find_folder("openai-community/gpt2") == "openai-community/gpt2"
    assert find_folder("somebody/gpt2") == "somebody/gpt2" and len(asked) == 4


def test_another_name_of_the_hub_says_how_to_fetch_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="hf download some/model --local-dir some/model"):
        load_network(GPT2, "some/model")


# ---- the model card ------------------------------------------------------------------------------

def card(folder) -> tuple[list[str], str]:
    """The lines of a card's header, and the text after it."""
    text = (Path(folder) / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    assert text.startswith("---\n") and body.startswith(MARK)
    return header.splitlines(), body


RUN = {"command": "SFT", "config": {"model": "gpt2", "data": "my data.jsonl", "lr": 2e-5,
                                    "resume": False, "checkpointing": True},
       "row": {"step": 120_000, "loss": 1.23456, "held_out_loss": ""}}


def test_a_saved_folder_has_a_card_with_base_data_command_and_metrics(tiny_tokenizer, tmp_path):
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path / "mine"), RUN)
    header, body = card(tmp_path / "mine")
    assert header == ["library_name: transformers", "pipeline_tag: text-generation",
                      "base_model: openai-community/gpt2", "tags:", "- gpt2", "- rlhf",
                      "- minirlhf", "- sft"]
    for words in ("# minirlhf sft", "320 tokens", "supervised fine-tuning", "- base: `gpt2`",
                  "- data: `my data.jsonl`", "`python -m minirlhf.sft --model gpt2 --data "
                  "'my data.jsonl' --lr 2e-05 --checkpointing`",
                  "| step | 120000 |", "| loss | 1.235 |", "license", "AutoModelForCausalLM"):
        assert words in body, words
    assert "held_out_loss" not in body and "suppress_tokens" not in body


def test_the_card_of_a_reward_model_says_how_to_batch_it(tiny_tokenizer, tmp_path):
    model = ScalarModel(text_model(tiny_tokenizer).config)
    run = {"command": "RewardModel", "config": {"model": "checkpoints/sft"}, "row": {}}
    save_folder(model, tiny_tokenizer, str(tmp_path), run)
    header, body = card(tmp_path)
    assert "pipeline_tag: text-classification" in header and "- reward-model" in header
    assert not [line for line in header if line.startswith("base_model")]    # unknown to the Hub
    assert "padding_value=model.config.pad_token_id" in body and "Not with the end token" in body


def test_the_card_of_a_filled_up_embedding_keeps_others_from_sampling_it(tiny_tokenizer, tmp_path):
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path))
    add_rows(str(tmp_path))
    save_folder(load_network(GPT2, str(tmp_path)), tiny_tokenizer, str(tmp_path))
    _, body = card(tmp_path)
    assert "suppress_tokens=list(range(320, 357))" in body and "Rows 320 to 356" in body


def test_a_card_depends_on_what_was_done_and_not_on_where(tiny_tokenizer, tmp_path):
    """A run that was stopped and went on ends with the same bytes."""
    model = text_model(tiny_tokenizer)
    for name, where in (("a", {}), ("b", {"out": "elsewhere", "resume": True, "save_every": 7})):
        run = {**RUN, "config": {**RUN["config"], **where}}
        save_folder(model, tiny_tokenizer, str(tmp_path / name), run)
    first, second = [(tmp_path / name / "README.md").read_bytes() for name in "ab"]
    assert first == second


def test_somebody_elses_readme_is_kept_and_ours_is_written_anew(tiny_tokenizer, tmp_path):
    model, path = text_model(tiny_tokenizer), tmp_path / "README.md"
    save_folder(model, tiny_tokenizer, str(tmp_path))
    first = path.read_bytes()
    save_folder(model, tiny_tokenizer, str(tmp_path), RUN)
    assert path.read_bytes() != first and MARK.encode() in path.read_bytes()
    for content in (b"# My model\n", b"", first.replace(MARK.encode(), b"")):
        path.write_bytes(content)
        save_folder(model, tiny_tokenizer, str(tmp_path), RUN)
        assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="links")
def test_a_card_is_not_written_through_a_link(tiny_tokenizer, tmp_path):
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path / "a"))
    (tmp_path / "other.md").write_text(f"{MARK}\nmine", encoding="utf-8")
    (tmp_path / "a" / "README.md").unlink()
    os.symlink(tmp_path / "other.md", tmp_path / "a" / "README.md")
    write_model_card(str(tmp_path / "a"), RUN, 320)
    assert (tmp_path / "other.md").read_text(encoding="utf-8") == f"{MARK}\nmine"


def test_no_name_or_option_breaks_out_of_the_card(tiny_tokenizer, tmp_path):
    evil = "x`y```\n---\nlicense: mit\x1b[31m| <script>"
    run = {**RUN, "config": {"model": evil, "data": evil, "a": evil}, "row": {evil: 1.0}}
    save_folder(text_model(tiny_tokenizer), tiny_tokenizer, str(tmp_path), run)
    header, body = card(tmp_path)
    assert "license: mit" not in header and "\x1b" not in body
    assert "\nlicense: mit" not in body
    table = [line for line in body.splitlines() if line.startswith("| x")]
    assert len(table) == 1 and table[0].count(" | ") == 1


def test_the_base_is_found_through_a_chain_of_stages(tmp_path):
    folder = "gpt2-medium"
    for name in ("sft", "rm", "ppo"):
        (tmp_path / name).mkdir()
        write_json(str(tmp_path / name / "run.json"), {"config": {"model": folder}})
        folder = str(tmp_path / name)
    assert find_base(folder) == "openai-community/gpt2-medium"
    write_json(str(tmp_path / "sft" / "run.json"), {"config": {"model": folder}})    # a circle
    assert find_base(folder) == ""
    for content in ("{", '{"config": 3}', '{"config": {"model": 3}}', "{}"):
        (tmp_path / "sft" / "run.json").write_text(content, encoding="utf-8")
        assert find_base(folder) == ""


def test_the_code_of_the_cards_runs_and_scores_as_we_do(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    tiny = str(REPOSITORY / "checkpoints" / "tiny")
    model, tokenizer = load_network(GPT2, tiny), Tokenizer.load(tiny)
    scorer = ScalarModel(model.config, trunk=model)
    save_folder(model, tokenizer, "sft")
    save_folder(scorer, tokenizer, "rm")
    for folder in ("sft", "rm"):
        monkeypatch.chdir(tmp_path / folder)             # the card says "."
        code = card(".")[1].split("```python\n")[1].split("```")[0]
        capsys.readouterr()
        exec(compile(code, folder, "exec"), {})
        shown = capsys.readouterr().out
        assert shown.strip()
    prompt = [tokenizer.end_token, *tokenizer.encode(format_prompt("What is the capital of France?"
                                                                   ))]
    rows = [[*prompt, *tokenizer.encode(" " + text), tokenizer.end_token]
            for text in ("Paris.", "It is Rome, I think.")]
    with torch.no_grad():
        ours = scorer.score(*padded(rows, 0))
    found = [float(word.strip("tensor([]),")) for word in shown.split() if any(
        letter.isdigit() for letter in word) and "grad" not in word]
    assert torch.allclose(torch.tensor(found), ours, atol=1e-3)


# ---- transformers and TRL ------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["language", "reward"])
def test_what_transformers_saves_again_is_what_we_saved(tmp_path, kind):
    """transformers 5 leaves out vocab.json and merges.txt."""
    transformers = pytest.importorskip("transformers")
    tokenizer = toy_tokenizer()
    model = text_model(tokenizer)
    theirs = transformers.AutoModelForCausalLM
    if kind == "reward":
        model = randomise(ScalarModel(model.config)).float()
        theirs = transformers.AutoModelForSequenceClassification
    save_folder(model, tokenizer, str(tmp_path / "ours"))
    theirs.from_pretrained(str(tmp_path / "ours")).save_pretrained(str(tmp_path / "again"))
    transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours")).save_pretrained(
        str(tmp_path / "again"))
    again = load_network(type(model), str(tmp_path / "again"))
    assert weights_equal(again, model)
    assert load_tokenizer(str(tmp_path / "again"), again) == tokenizer


def test_shards_of_transformers_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=16, n_embd=32, n_layer=3, n_head=2)).eval()
    theirs.save_pretrained(str(tmp_path), max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.allclose(load_network(GPT2, str(tmp_path))(ids), theirs(ids).logits, atol=1e-5)


def test_transformers_samples_no_row_after_the_vocabulary_if_told_as_the_card_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = toy_tokenizer()
    save_folder(text_model(tokenizer), tokenizer, str(tmp_path))
    add_rows(str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    tokens, ids = tokenizer.vocab_size, torch.tensor([[tokenizer.end_token, 5, 6]])
    options = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": tokenizer.end_token}
    assert theirs.generate(ids, **options).max() >= tokens
    suppressed = theirs.generate(ids, suppress_tokens=list(range(tokens, tokens + ROWS)), **options)
    assert suppressed.max() < tokens


def test_trl_goes_on_from_an_exported_policy_and_reward_model(tmp_path):
    """The way up: a step of TRL's RLOO on our folders, with our prompts and our template.

    TRL hands a reward function the ids of a response, its end token included; it is scored as our
    PPO scores it. What TRL trained is then a folder that our stages start from.
    """
    trl = pytest.importorskip("trl")
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(sft_folder())
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(reward_folder()).eval()
    ours, own, seen = load_network(ScalarModel, reward_folder()), toy_tokenizer(), []

    def reward(prompts, completion_ids, **rest):
        rows = [tokenizer(prompt, add_special_tokens=False).input_ids + list(ids)
                for prompt, ids in zip(prompts, completion_ids)]
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True,
            padding_value=scorer.config.pad_token_id)
        with torch.no_grad():
            scores = scorer(ids).logits[:, 0]
        seen.append((rows, scores))
        return scores.tolist()

    prompts = [{"prompt": tokenizer.eos_token + format_prompt(row["prompt"])}
               for row in toy_prompts(16, seed=0)]
    args = trl.RLOOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, max_steps=1, learning_rate=1e-3, beta=0.05, use_cpu=True,
        report_to=[], logging_steps=1, save_strategy="no", bf16=False, seed=0, disable_tqdm=True)
    trainer = trl.RLOOTrainer(model=sft_folder(), reward_funcs=[reward], args=args,
                              train_dataset=datasets.Dataset.from_list(prompts),
                              processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 1 and seen
    for rows, scores in seen:
        with torch.no_grad():
            assert torch.allclose(ours.score(*padded(rows, 0)), scores, atol=1e-5)
        for row in rows:
            text = own.decode(row)
            prompt = own.encode(text[:text.index("Response:") + len("Response:")])
            assert row[:len(prompt) + 1] == [own.end_token, *prompt]
    assert any(row[-1] == own.end_token for rows, _ in seen for row in rows)
    trainer.save_model(str(tmp_path / "out"))
    tokenizer.save_pretrained(str(tmp_path / "out"))
    trained = load_network(GPT2, str(tmp_path / "out"))
    assert load_tokenizer(str(tmp_path / "out"), trained).vocab_size == own.vocab_size
    assert not weights_equal(trained, load_network(GPT2, sft_folder()))
    ids = torch.tensor([seen[0][0][0]])
    with torch.no_grad():
        assert torch.allclose(trained(ids), trainer.model(ids).logits.float(), atol=1e-4)
