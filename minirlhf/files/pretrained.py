"""GPT-2 folders in Hugging Face format: config.json and weights, read and written.

What would change the arithmetic is refused by name, and so is a file that does not fit its config.
An embedding may have more rows than the tokenizer has tokens, filled up to a round number: these
rows are kept aside when a network is loaded, so that nothing samples or scores them, and written
after the others when it is saved.
The networks are those of `gpt2.py`; this file knows them only by the classes that it is given:

    policy = load_network(GPT2, "checkpoints/sft")
    reward_model = load_network(ScalarModel, "checkpoints/reward_model")
    save_folder(policy, tokenizer, "checkpoints/mine")
"""

import os
import re
from dataclasses import replace

import torch
import torch.nn as nn

from minirlhf.files.disk import read_json, write_json
from minirlhf.files.foreign import other_weights
from minirlhf.files.hub import PUBLISHED_NAMES, find_folder
from minirlhf.files.model_card import write_model_card
from minirlhf.files.tensors import read_weights, write_safetensors
from minirlhf.files.vocabulary import read_vocabulary

FIXED_CONFIG = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                "reorder_and_upcast_attn": False, "tie_word_embeddings": True, "n_inner": None}
# Other words for the same function, the tanh form of GELU, and settings that change no number.
SAME_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh", "gelu_accurate")
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# The single byte 0xff in GPT-2's vocabulary. It is part of no UTF-8 text, so a tokenizer never
# makes it. Another vocabulary may number it otherwise: `Tokenizer.pad_token`.
PAD_TOKEN = 187
TRUNK, HEAD = "transformer.", "score.weight"      # names in the files
OUR_HEAD = "score_head.weight"                    # of a ScalarModel
# Names that torch.compile, FSDP and activation checkpointing put into those of parameters, and DDP
# and DeepSpeed in front of them.
WRAPPERS, OUTER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."), "module."


# ---- whole networks ------------------------------------------------------------------------------

def load_network(kind: type, name_or_folder: str):
    """Load a `GPT2` or a `ScalarModel` (`kind`) from a folder in Hugging Face format.

    A published size is also known by its name and fetched once: load_network(GPT2, "gpt2").
    Raises: FileNotFoundError with what to do when files are missing; ValueError naming file and
    tensor when something is missing, extra or misshapen, or when the folder is of the other kind.
    """
    folder = find_folder(name_or_folder)
    config = read_config(folder, kind.config_class)
    scalar = kind.scalar
    tensors = our_names(read_weights(folder), scalar, folder)
    check_tensors(tensors, expected_shapes(config, scalar), folder)     # before memory is used
    used = min(config.vocab_size, count_tokens(folder, config.vocab_size))
    with torch.random.fork_rng(devices=[]):              # loading leaves the random state alone
        network = kind(replace(config, vocab_size=used))
    for name, target in network.state_dict().items():
        if tensors[name].shape[0] > target.shape[0]:     # the embedding, filled up
            check_finite_tensor(tensors[name][used:], name, folder)
            trunk_of(network).register_buffer("spare_rows", tensors[name][used:].float(),
                                              persistent=False)
        target.copy_(tensors[name][:target.shape[0]])    # converts to float32
        check_finite_tensor(target, name, folder)
    return network


class Pretrained:
    """transformers' names for `load_network` and `save_network`, as methods of both networks."""

    @classmethod
    def from_pretrained(cls, name_or_folder: str):
        """`load_network` of this class."""
        return load_network(cls, name_or_folder)

    def save_pretrained(self, folder: str, dtype: torch.dtype = torch.float32) -> None:
        """`save_network` of this network."""
        save_network(self, folder, dtype)


def trunk_of(network: nn.Module) -> nn.Module:
    """The GPT2 of a GPT2 or of a ScalarModel."""
    return getattr(network, "transformer", network)


def count_tokens(folder: str, default: int) -> int:
    """How many tokens the tokenizer of a folder has; `default` where there is none."""
    vocabulary = read_vocabulary(folder)
    return default if vocabulary is None else len(vocabulary.all_ids())


def save_network(network: nn.Module, folder: str, dtype: torch.dtype = torch.float32,
                 end_token: int | None = None, pad_token: int = PAD_TOKEN) -> None:
    """Write config.json and model.safetensors as transformers expects them.

    A `GPT2` is read there by GPT2LMHeadModel, a `ScalarModel` by GPT2ForSequenceClassification with
    one label. With dtype float16 the file is half as large. config.json says float32 all the same,
    so that transformers computes in float32, as we do. The end token is by default the last id.

    careful: GPT2ForSequenceClassification knows no lengths. It reads a row's score at the last id
    that is not `pad_token_id`; with the end token as padding it would overlook the end token that
    the policy chose. So config.json names an id that is in no text (PAD_TOKEN); whoever scores a
    batch with transformers fills the rows up with that one.
    """
    weights, extra = network.state_dict(), {"architectures": ["GPT2LMHeadModel"]}
    if OUR_HEAD in weights:
        extra = {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "SCORE"},
                 "label2id": {"SCORE": 0}}
        if network.config.vocab_size > 256:              # a vocabulary that has all bytes
            extra["pad_token_id"] = pad_token
    tensors = {file_name(name): tensor.to(dtype) for name, tensor in weights.items()}
    end = network.config.vocab_size - 1 if end_token is None else end_token
    spare = getattr(trunk_of(network), "spare_rows", None)
    if spare is not None:
        wte = TRUNK + "wte.weight"
        tensors[wte] = torch.cat([tensors[wte], spare.to(tensors[wte])])
    rows = tensors[TRUNK + "wte.weight"].shape[0]
    write_config(folder, replace(network.config, vocab_size=rows), end, extra)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors, {"format": "pt"})


def save_folder(network: nn.Module, tokenizer, folder: str, run: dict | None = None,
                dtype: torch.dtype = torch.float32) -> None:
    """Write a network, its tokenizer and a model card, so that every stage and transformers can
    start from it. `run` is what run.json says of the run that made it."""
    tokenizer.save(folder, network.config.n_positions)
    save_network(network, folder, dtype, tokenizer.end_token, tokenizer.pad_token)
    write_model_card(folder, run, network.config.vocab_size)


# ---- config.json ---------------------------------------------------------------------------------

def read_config(folder: str, config_class: type):
    """Read config.json; anything that would change the arithmetic is refused by name.

    A folder is refused, too, while a run writes its result there or after it was killed in that.
    """
    run_file = os.path.join(folder, "run.json")
    if os.path.exists(run_file) and read_json(run_file).get("finished") is not True:
        raise ValueError(f"{folder}: the run that wrote here was stopped while it wrote its "
                         "result; finish it by its command with --resume")
    path = os.path.join(folder, "config.json")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path} does not exist; {describe_missing(folder)}")
    values = read_json(path)
    n_embd = values.get("n_embd")
    equal = {"activation_function": SAME_GELU, "reorder_and_upcast_attn": (True, False),
             "n_inner": (None, 4 * n_embd if type(n_embd) is int else None)}
    for name, expected in FIXED_CONFIG.items():
        value = values.get(name, expected)
        if value != expected and value not in equal.get(name, ()):
            raise ValueError(f"{path}: {name} is {value!r}, minirlhf's GPT-2 has {expected!r}")
    missing = [name for name in SIZES if name not in values]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing; expected the config of a GPT-2")
    try:
        return config_class(**{name: values[name] for name in SIZES})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def describe_missing(name: str) -> str:
    """What to do about a folder that is not there; or is a file."""
    if os.path.isfile(name):
        what = other_weights([os.path.basename(name)])
        return (f"{name} is a file, expected a folder with config.json, weights and a tokenizer"
                + f" ({what})" * bool(what))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return (f"expected a file there: check the name, or first run the stage that writes that "
                f"folder. Of the Hub's models {', '.join(PUBLISHED_NAMES)} are fetched by name; "
                f"fetch another one by: hf download {name} --local-dir {name}")
    return ("expected a file there: check the name, or first run the stage that writes that "
            "folder")


def write_config(folder: str, config, end: int, extra: dict) -> None:
    """Write config.json; `end` is the id of the end token."""
    values = {"vocab_size": config.vocab_size, "n_positions": config.n_positions,
              "n_ctx": config.n_positions, "n_embd": config.n_embd, "n_layer": config.n_layer,
              "n_head": config.n_head, "bos_token_id": end, "eos_token_id": end,
              "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "torch_dtype": "float32"}
    write_json(os.path.join(folder, "config.json"), {**FIXED_CONFIG, **values, **extra})


# ---- tensors -------------------------------------------------------------------------------------

def file_name(name: str) -> str:
    """Our name of a tensor as the file has it, for "wpe.weight" "transformer.wpe.weight"."""
    return HEAD if name == OUR_HEAD else TRUNK + name.removeprefix(TRUNK)


def expected_shapes(config, scalar: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of a network of these sizes by our names, `scalar` of a ScalarModel.

    Written out, so that sizes which no file holds are refused before anything of that size exists.
    """
    C = config.n_embd
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.n_positions, C),
              "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for layer in range(config.n_layer):
        for name, n_in, n_out in (("attn.c_attn", C, 3 * C), ("attn.c_proj", C, C),
                                  ("mlp.c_fc", C, 4 * C), ("mlp.c_proj", 4 * C, C)):
            shapes[f"h.{layer}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{layer}.{name}.bias"] = (n_out,)
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
            shapes[f"h.{layer}.{name}"] = (C,)
    if not scalar:
        return shapes
    return {**{TRUNK + name: shape for name, shape in shapes.items()}, OUR_HEAD: (1, C)}


def unwrapped(name: str) -> str:
    """A name without what PyTorch's wrappers put into it: unwrapped("module.wte") == "wte"."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith(OUTER):
        name = name.removeprefix(OUTER)
    return name


def our_names(tensors: dict[str, torch.Tensor], scalar: bool,
              folder: str) -> dict[str, torch.Tensor]:
    """Bring the published names to ours: with or without prefix, no mask buffers, one embedding.

    Raises: ValueError when `scalar` asks for a scalar head and there is none, or the reverse.
    """
    wrapped, tensors = tensors, {}
    for name, tensor in wrapped.items():
        if unwrapped(name) in tensors:
            raise ValueError(f"{folder}: tensor {unwrapped(name)} is there with and without "
                             "prefix")
        tensors[unwrapped(name)] = tensor
    if scalar and HEAD not in tensors:
        raise ValueError(f"{folder} holds a language model (it has no tensor {HEAD}), expected a "
                         "reward model; make one with: python -m minirlhf.reward_model")
    if not scalar and HEAD in tensors:
        raise ValueError(f"{folder} holds a reward model (it has a tensor {HEAD}), expected a "
                         "language model: a base, SFT or PPO folder")
    trunk = {}
    for name, tensor in tensors.items():
        short_name = name.removeprefix(TRUNK)
        if short_name.endswith((".attn.bias", ".attn.masked_bias")) or name == HEAD:
            continue                                     # the causal mask, stored by older writers
        if short_name in trunk:
            raise ValueError(f"{folder}: tensor {short_name} is there with and without prefix")
        trunk[short_name] = tensor
    unembedding = trunk.pop("lm_head.weight", None)
    if unembedding is not None and "wte.weight" in trunk:
        if not torch.equal(unembedding.float(), trunk["wte.weight"].float()):
            raise ValueError(f"{folder}: lm_head.weight differs from wte.weight, expected tied "
                             "embeddings")
    elif unembedding is not None:                        # one of the two was written
        trunk["wte.weight"] = unembedding
    if not scalar:
        return trunk
    return {**{TRUNK + name: tensor for name, tensor in trunk.items()}, OUR_HEAD: tensors[HEAD]}


def check_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, tuple],
                  folder: str) -> None:
    """Refuse by name tensors that are missing, extra, of another shape, or no real numbers."""
    for problem, names in (("is missing", set(expected) - set(tensors)),
                           ("is not expected", set(tensors) - set(expected))):
        if names:
            few = ", ".join(name.removeprefix(TRUNK) for name in sorted(names)[:3])
            raise ValueError(f"{folder}: tensor {few} {problem} ({len(names)} in all); is this a "
                             "GPT-2 checkpoint of the size that config.json states?")
    for name, tensor in tensors.items():
        shape = expected[name]
        if tuple(tensor.shape) != shape:
            turned = "; it is stored transposed, as nn.Linear has it: GPT-2's Conv1D is (in, out)"
            turned = turned if tuple(tensor.shape[::-1]) == shape else ""
            raise ValueError(f"{folder}: tensor {file_name(name).removeprefix(TRUNK)} has shape "
                             f"{tuple(tensor.shape)}, expected {shape} for the sizes in "
                             f"config.json{turned}")
        if not tensor.is_floating_point():
            raise ValueError(f"{folder}: tensor {file_name(name).removeprefix(TRUNK)} has type "
                             f"{tensor.dtype}, expected floating-point numbers")


def check_finite_tensor(tensor: torch.Tensor, name: str, folder: str) -> None:
    """Refuse NaN and infinity."""
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{folder}: tensor {name} holds nan or inf; the file is damaged, or the "
                         "run that wrote it diverged")
