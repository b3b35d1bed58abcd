"""GPT-2 folders in Hugging Face format: ours, published ones, damaged ones."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzzing import FUZZ, Tally, damage, mutate, put, rewrite
from helpers import toy_model, weights_equal
from networks import SMALL, padded, randomise, small_model, text_model

from minirlhf import gpt2
from minirlhf.files.disk import read_json, write_json
from minirlhf.files.pretrained import (
    PAD_TOKEN,
    load_network,
    read_config,
    save_folder,
    save_network,
)
from minirlhf.files.tensors import read_safetensors, write_safetensors
from minirlhf.gpt2 import GPT2, GPT2Config, ScalarModel
from minirlhf.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def saved(tmp_path) -> tuple[GPT2, str]:
    """A small language model in float32 and the folder where it is saved."""
    model, folder = small_model().float(), str(tmp_path / "model")
    save_network(model, folder)
    return model, folder


def change(folder: str, **tensors) -> None:
    """Replace tensors of a saved model (dots of their names as __); None removes one."""
    path = os.path.join(folder, "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in read_safetensors(path).items()}
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        changed.pop(name, None)
        if tensor is not None:
            changed[name] = tensor
    write_safetensors(path, changed)


# ---- what is saved is loaded ---------------------------------------------------------------------

def test_a_saved_model_loads_as_it_was(saved):
    model, folder = saved
    loaded = load_network(GPT2, folder)
    assert weights_equal(model, loaded) and loaded.config == SMALL
    assert all(p.dtype == torch.float32 and p.requires_grad for p in loaded.parameters())


def test_a_saved_reward_model_loads_as_it_was(tmp_path):
    torch.manual_seed(0)
    scorer = ScalarModel(SMALL)
    save_network(scorer, str(tmp_path))
    assert weights_equal(scorer, load_network(ScalarModel, str(tmp_path)))


def test_a_saved_folder_has_the_network_its_tokenizer_and_its_context(tiny_tokenizer, tmp_path):
    model = text_model(tiny_tokenizer)
    save_folder(model, tiny_tokenizer, str(tmp_path))
    assert weights_equal(load_network(GPT2, str(tmp_path)), model)
    assert load_tokenizer(str(tmp_path), model).merges == tiny_tokenizer.merges
    settings = read_json(str(tmp_path / "tokenizer_config.json"))
    assert settings["model_max_length"] == model.config.n_positions


def test_loading_uses_no_random_numbers(saved):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load_network(GPT2, saved[1])
    assert torch.equal(torch.rand(2), expected)


def test_a_loaded_model_does_not_hold_its_file(saved):
    model, folder = saved
    loaded = load_network(GPT2, folder)
    with torch.no_grad():
        loaded.wte.weight.zero_()
    assert weights_equal(model, load_network(GPT2, folder))
    path = os.path.join(folder, "model.safetensors")
    with open(path, "r+b") as file:                  # a mapped page would show the new bytes
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    assert torch.equal(loaded.state_dict()["ln_f.bias"], model.state_dict()["ln_f.bias"])


def hub_style(model: GPT2) -> dict:
    """The keys of the published files: no prefix, with the causal mask as a buffer."""
    n, tensors = model.config.n_positions, dict(model.state_dict())
    for layer in range(model.config.n_layer):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def prefixed(model: GPT2) -> dict:
    return {"transformer." + name: tensor for name, tensor in model.state_dict().items()}


def with_head(model: GPT2) -> dict:
    return {**prefixed(model), "lm_head.weight": model.wte.weight.detach().clone()}


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("style", [hub_style, prefixed, with_head])
def test_every_published_style_of_file_loads(style, form, saved):
    model, folder = saved
    path = Path(folder) / "model.safetensors"
    if form == "safetensors":
        write_safetensors(str(path), style(model))
    else:
        path.unlink()
        torch.save(style(model), path.with_name("pytorch_model.bin"))
    assert weights_equal(load_network(GPT2, folder), model)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_into_float32(kind, saved):
    model, folder = saved
    save_network(model, folder, dtype=kind)
    for name, tensor in load_network(GPT2, folder).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].to(kind).float()), name


def test_the_published_config_of_gpt2_is_accepted(tmp_path):
    write_json(str(tmp_path / "config.json"), {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768,
        "n_head": 12, "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "vocab_size": 50257})
    assert read_config(str(tmp_path), GPT2Config) == GPT2Config()


def test_the_padding_id_of_reward_models_is_in_no_text(tiny_tokenizer):
    assert tiny_tokenizer.vocabulary()["\u00ff"] == PAD_TOKEN
    assert tiny_tokenizer.decode([PAD_TOKEN]) == "\ufffd"       # no UTF-8 text has that byte
    assert PAD_TOKEN not in tiny_tokenizer.encode("\u00ff \ufffd \U0001f600 plain text")


# ---- what does not fit is refused ----------------------------------------------------------------

@pytest.mark.parametrize("tensors, message", [
    ({"transformer__h__1__ln_1__bias": None}, r"tensor h.1.ln_1.bias is missing \(1 in all\)"),
    ({"transformer__h__2__ln_1__weight": None}, "tensor h.2.ln_1.weight is missing"),
    ({"transformer__wte__weight": None}, "tensor wte.weight is missing"),
    ({"transformer__h__3__ln_1__bias": torch.ones(12)}, "tensor h.3.ln_1.bias is not expected"),
    ({"transformer__ln_f__bias": torch.ones(13)}, r"ln_f.bias has shape \(13,\), expected \(12,\)"),
    ({"transformer__h__0__attn__c_attn__weight": torch.ones(36, 12)},
     r"h.0.attn.c_attn.weight has shape \(36, 12\), expected \(12, 36\)"),
    ({"transformer__ln_f__bias": torch.ones(12).long()}, "ln_f.bias has type torch.int64"),
    ({"transformer__ln_f__bias": torch.full((12,), math.nan)}, "tensor ln_f.bias holds nan or inf"),
    ({"ln_f__bias": torch.ones(12)}, "tensor ln_f.bias is there with and without prefix"),
    ({"lm_head__weight": torch.ones(11, 12)}, "lm_head.weight differs from wte.weight")])
def test_a_tensor_that_does_not_fit_is_named_with_its_folder(tensors, message, saved):
    _, folder = saved
    change(folder, **tensors)
    with pytest.raises(ValueError, match=message) as error:
        load_network(GPT2, folder)
    assert folder in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_config_cannot_ask_for_memory(saved, monkeypatch):
    original = gpt2.Block

    def without_memory(*arguments):
        assert torch.get_default_device().type == "meta", "built before its size was checked"
        return original(*arguments)

    _, folder = saved
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    monkeypatch.setattr(gpt2, "Block", without_memory)
    for name, value in (("n_embd", 30_000), ("n_layer", 1000), ("n_positions", 10**6),
                        ("vocab_size", 10**6)):
        write_json(path, {**values, name: value})
        with pytest.raises(ValueError, match="is missing|has shape"):
            load_network(GPT2, folder)


@pytest.mark.parametrize("values, message", [
    ({"activation_function": "gelu"}, "activation_function is 'gelu', minirlhf's GPT-2 has"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
    ({"scale_attn_weights": False}, "scale_attn_weights is False"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ({"n_inner": 99}, "n_inner is 99"), ({"model_type": "llama"}, "model_type is 'llama'"),
    ({"n_embd": "12"}, "n_embd is '12', expected an integer"),
    ({"n_head": 5}, "n_embd 12 must be a multiple of n_head 5"),
    ({"n_layer": 4}, "tensor h.3.attn.c_attn.bias, .* missing"),
    ({"n_layer": 2}, "tensor h.2.* is not expected"),
    ({"vocab_size": 12}, r"wte.weight has shape \(11, 12\), expected \(12, 12\)"),
    ({"n_embd": 999_999}, "has shape"), ({"n_layer": 10**12}, "n_layer is 1000000000000")])
def test_a_config_of_another_network_is_refused(values, message, saved):
    _, folder = saved
    path = os.path.join(folder, "config.json")
    write_json(path, {**read_json(path), **values})
    with pytest.raises(ValueError, match=message) as error:
        load_network(GPT2, folder)
    assert folder in str(error.value) and "\n" not in str(error.value)


def test_a_config_without_sizes_is_refused(saved):
    _, folder = saved
    write_json(os.path.join(folder, "config.json"), {"model_type": "gpt2", "n_embd": 12})
    with pytest.raises(ValueError, match="vocab_size, n_positions, n_layer, n_head missing"):
        load_network(GPT2, folder)


def test_a_reward_model_is_no_language_model_and_the_reverse(saved, tmp_path):
    with pytest.raises(ValueError, match="holds a language model .* expected a reward model"):
        load_network(ScalarModel, saved[1])
    folder = str(tmp_path / "reward")
    save_network(ScalarModel(SMALL), folder)
    with pytest.raises(ValueError, match="holds a reward model .* expected a language model"):
        load_network(GPT2, folder)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path):
    save_network(ScalarModel(SMALL), str(tmp_path))
    change(str(tmp_path), score__weight=torch.ones(2, 12))
    with pytest.raises(ValueError, match=r"score.weight has shape \(2, 12\), expected \(1, 12\)"):
        load_network(ScalarModel, str(tmp_path))


def test_missing_files_and_folders_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_network(GPT2, str(tmp_path / "nowhere"))
    _, folder = saved
    (Path(folder) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_network(GPT2, folder)


# ---- folders by the thousand ---------------------------------------------------------------------

NASTY_SIZES = [-1, 0, 1, 2, 3, 31, 33, 1000, 10 ** 6, 10 ** 7, 2 ** 31, 2 ** 63, 10 ** 25, 2.0, "2",
               True, None, [], {}]


def mutate_config(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.5:
        return damage(rng, content, [b"0", b"-", b"9" * 30, b"e9", b"\0", b"\xff", b"{", b"null"])
    values = json.loads(content)
    for _ in range(rng.randint(1, 2)):
        values[rng.choice(list(values))] = rng.choice(NASTY_SIZES)
    return json.dumps(values).encode()


def test_mutated_configs_end_in_the_sizes_they_state_or_a_value_error(tmp_path):
    save_network(toy_model(), str(tmp_path))
    path = tmp_path / "config.json"
    original, rng, tally = path.read_bytes(), random.Random(2), Tally("config.json")
    for _ in range(max(500, FUZZ // 4)):
        content = mutate_config(rng, original)
        put(path, content)
        config = tally.attempt(str(path), read_config, str(tmp_path), GPT2Config)
        if config is not None:
            stated = json.loads(content)
            for name, value in vars(config).items():
                assert type(value) is int and value == stated[name] and value is not True
    tally.finish()


def test_mutated_weights_end_in_a_model_of_these_weights_or_a_value_error(tmp_path):
    """Through the trainers' own entry: config and weights must fit each other, too."""
    save_network(toy_model(n_positions=8), str(tmp_path))
    path, rng, tally = tmp_path / "model.safetensors", random.Random(3), Tally("checkpoint folder")
    original = path.read_bytes()
    for _ in range(max(100, FUZZ // 50)):
        content = rewrite(rng, original) if rng.random() < 0.1 else mutate(rng, original)
        put(path, content)
        model = tally.attempt(str(tmp_path), load_network, GPT2, str(tmp_path))
        if model is not None:
            stated = read_safetensors(path)
            for name, tensor in model.state_dict().items():
                source = stated["transformer." + name]
                assert torch.equal(tensor, source.float()) and tensor.shape == source.shape
            del stated, source                       # or Windows keeps the mapped file
    tally.finish()


HUGE_CONFIG = """
import resource, sys
from minirlhf.files.pretrained import load_network
from minirlhf.gpt2 import GPT2
with open("/proc/self/statm") as file:
    limit = int(file.read().split()[0]) * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    load_network(GPT2, sys.argv[1])
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory")
def test_a_config_that_states_far_more_than_the_file_holds_costs_no_memory(tmp_path):
    """100 kB on the disk, 300 GB stated: only a few tensors are there, in the right sizes."""
    C, layers = 8192, 100
    sizes = {"vocab_size": 2, "n_positions": 2, "n_embd": C, "n_layer": layers, "n_head": 1}
    write_json(tmp_path / "config.json", {"model_type": "gpt2", **sizes})
    write_safetensors(tmp_path / "model.safetensors", {
        "wte.weight": torch.zeros(2, C), "wpe.weight": torch.zeros(2, C),
        f"h.{layers - 1}.ln_1.weight": torch.zeros(C)})
    done = subprocess.run([sys.executable, "-c", HUGE_CONFIG, str(tmp_path)], capture_output=True,
                          text=True, timeout=120, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.startswith("refused:") and str(tmp_path) in done.stdout, done.stderr[-500:]


# ---- transformers --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def texts() -> list[str]:
    return ["Prompt: What is the capital of France?\nResponse: Paris. It's  2+2",
            "na\u00efve \u00ff\u20ac \U0001f600\n\n  tabs\tand 12345", "<|endoftext|> as text"]


def close_in_float64(ours, theirs, ids: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.allclose(ours.double()(ids), theirs.double()(ids).logits, atol=1e-10)


def test_transformers_loads_a_saved_folder_as_it_is(transformers, tiny_tokenizer, texts, tmp_path):
    model = text_model(tiny_tokenizer)
    save_folder(model, tiny_tokenizer, str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in texts[:2]:
        ids = tiny_tokenizer.encode(text)
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
    ids = torch.tensor([tiny_tokenizer.encode(texts[0])])
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == tiny_tokenizer.end_token
    assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4)
    assert close_in_float64(model, theirs, ids)


def test_transformers_computes_in_float32_from_a_float16_file(transformers, tiny_tokenizer,
                                                              tmp_path):
    save_network(text_model(tiny_tokenizer), str(tmp_path), dtype=torch.float16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    assert theirs.dtype == torch.float32
    assert close_in_float64(load_network(GPT2, str(tmp_path)), theirs, torch.tensor([[5, 6, 7]]))


def test_transformers_scores_a_reward_model_the_same(transformers, tiny_tokenizer, texts, tmp_path):
    end = tiny_tokenizer.end_token
    torch.manual_seed(0)
    scorer = ScalarModel(text_model(tiny_tokenizer).config)
    randomise(scorer).float()
    save_network(scorer, str(tmp_path))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(str(tmp_path)).eval()
    rows = [[end] + tiny_tokenizer.encode(text) + [end] * ends for text in texts for ends in (0, 1)]
    with torch.no_grad():
        alone = torch.stack([theirs(torch.tensor([row])).logits for row in rows])[:, 0, 0]
        batch = theirs(padded(rows, theirs.config.pad_token_id)[0]).logits[:, 0]
        ours = scorer.score(*padded(rows, end))      # with lengths, any padding will do
    assert alone.shape == batch.shape == ours.shape == (6,)
    assert torch.allclose(ours, alone, atol=1e-4) and torch.allclose(ours, batch, atol=1e-4)
    assert (ours[0::2] - ours[1::2]).abs().min() > 1e-3      # a chosen end token counts


def test_folders_that_transformers_writes_load(transformers, tmp_path):
    config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=12, n_layer=2, n_head=2,
                                     bos_token_id=29, eos_token_id=29, num_labels=1)
    torch.manual_seed(0)
    language = transformers.GPT2LMHeadModel(config).eval()
    language.save_pretrained(str(tmp_path / "language"))
    scorer = transformers.GPT2ForSequenceClassification(config).eval()
    scorer.save_pretrained(str(tmp_path / "scorer"))
    ids = torch.tensor([[29, 3, 4, 5]])
    assert close_in_float64(load_network(GPT2, str(tmp_path / "language")), language, ids)
    ours = load_network(ScalarModel, str(tmp_path / "scorer"))
    with torch.no_grad():
        expected = scorer(ids).logits[:, 0]
        assert torch.allclose(ours.score(ids, torch.tensor([4])), expected, atol=1e-6)


@pytest.mark.parametrize("kind", [GPT2, ScalarModel])
def test_the_names_of_transformers_read_and_write_the_same_folder(tmp_path, kind):
    network = kind(SMALL)
    network.save_pretrained(str(tmp_path))
    again = kind.from_pretrained(str(tmp_path))
    assert type(again) is kind
    assert all(map(torch.equal, again.state_dict().values(), network.state_dict().values()))
