"""What a file is whose name promises something else: a pointer, an error page, an archive.

    contents(b"\\x1f\\x8b\\x08...") == "gzip data (unpack it: gunzip)"

Downloads go wrong in a few well-known ways. Every reader asks here before it says that a file is
damaged, and names the way to the right one. Imports nothing of ours.
"""

import fnmatch
import re

HEAD = 1024                 # bytes of a file that tell what it is
GET_AGAIN = "get the file again"

# Source: https://github.com/git-lfs/git-lfs/blob/v3.5.1/docs/spec.md (hawser: its first name)
POINTER = re.compile(rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/spec/")
PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|\?xml|head|body)\b", re.IGNORECASE)
MAGIC = {                   # the first bytes of a file -> what it is
    b"\x1f\x8b": "gzip data (unpack it: gunzip)",
    b"PK\x03\x04": "a zip archive (unpack it; PyTorch's own .bin, .pt and .pth are such archives, "
                   "and belong under the name pytorch_model.bin)",
    b"PK\x05\x06": "an empty zip archive",
    b"BZh": "bzip2 data (unpack it: bunzip2)",
    b"\xfd7zXZ": "xz data (unpack it: unxz)",
    b"\x28\xb5\x2f\xfd": "zstd data (unpack it: unzstd)",
    b"7z\xbc\xaf": "a 7-Zip archive (unpack it)",
    b"Rar!": "a RAR archive (unpack it)",
    b"\x80\x02": "a Python pickle, as PyTorch writes it for pytorch_model.bin",
    b"\x80\x03": "a Python pickle", b"\x80\x04": "a Python pickle", b"\x80\x05": "a Python pickle",
    b"\x89HDF": "HDF5, as of TensorFlow's tf_model.h5 (convert it with transformers: "
                "from_pretrained(folder, from_tf=True), then save_pretrained)",
    b"GGUF": "GGUF, llama.cpp's format (take the original weights from the Hub)",
    b"\x93NUMPY": "an array of NumPy",
    b"PAR1": "Parquet (convert it: pandas.read_parquet(name).to_json(new_name, orient='records', "
             "lines=True))",
    b"ARROW1": "Arrow (convert it with the datasets package: Dataset.from_file(name)"
               ".to_json(new_name))",
    b"%PDF": "a PDF",
    b"\xff\xfe": "text in UTF-16 (save it as UTF-8)",
    b"\xfe\xff": "text in UTF-16 (save it as UTF-8)",
    b"\xef\xbb\xbf": "text with a byte order mark (save it as UTF-8 without one)"}


def stand_in(head: bytes) -> str:
    """What stands in place of a file that was never fetched, by its first bytes; "" if nothing."""
    if POINTER.match(head):
        return ("a Git LFS pointer, a few lines that stand for the real file; fetch that: git lfs "
                "pull (after git lfs install), or download it from its web page")
    if PAGE.match(head):
        return ("a web page or a server's error message in place of the file; open its address in "
                f"a browser to see why, and {GET_AGAIN}")
    return ""


def contents(head: bytes) -> str:
    """What a file is by its first `HEAD` bytes, as far as these tell; "" if they do not.

    JSON is not named: who reads JSON knows better what is wrong with it.
    Example: contents(b"") == "an empty file; get the file again".
    """
    if not head:
        return f"an empty file; {GET_AGAIN}"
    if stand_in(head):
        return stand_in(head)
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return what
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27:
        return "a safetensors file (it belongs under the name model.safetensors)"
    if head[257:262] == b"ustar":
        return "a tar archive (unpack it: tar -xf)"
    if not head.strip(b"\0"):
        return f"zero bytes, as a broken download leaves them; {GET_AGAIN}"
    if head.lstrip()[:1] in (b"{", b"[", b'"', b""):
        return ""
    try:
        text = head[:60].decode("ascii")
    except UnicodeDecodeError:
        return ""
    if len(head) < HEAD and text.replace("\n", " ").isprintable():
        return f"the text {text!r}"
    return ""


# ---- weights in other formats --------------------------------------------------------------------

NANOGPT = ("nanoGPT's checkpoint, which is not read. To convert it: take torch.load(file, "
           "weights_only=True)['model']; remove '_orig_mod.' from the names and lm_head.weight; "
           "transpose each attn.c_attn.weight, attn.c_proj.weight, mlp.c_fc.weight and "
           "mlp.c_proj.weight, which nanoGPT stores (out, in) and GPT-2 (in, out); torch.save the "
           "dict as pytorch_model.bin beside a config.json with vocab_size, n_positions (its "
           "block_size), n_embd, n_layer and n_head from 'model_args'. It must have biases; its "
           "exact GELU becomes the tanh form, so logits differ by some thousandths")
WEIGHTS = {                 # names of files -> what they are and how to convert them
    "adapter_*": "an adapter of PEFT (LoRA): load it with peft's AutoPeftModelForCausalLM, call "
                 "merge_and_unload(), then save_pretrained",
    "ckpt.pt": NANOGPT,
    "*.gguf": "GGUF, llama.cpp's format: take the original weights from the Hub",
    "tf_model*.h5": "TensorFlow's: convert it with transformers 4, by "
                    "GPT2LMHeadModel.from_pretrained(folder, from_tf=True).save_pretrained(new)",
    "*.ckpt*.index": "TensorFlow's, as OpenAI published GPT-2: convert it with transformers 4, by "
                     "transformers.models.gpt2.convert_gpt2_original_tf_checkpoint_to_pytorch",
    "flax_model*.msgpack": "Flax's: convert it with transformers 4, by GPT2LMHeadModel."
                           "from_pretrained(folder, from_flax=True).save_pretrained(new)",
    "*.onnx": "ONNX, which is for inference only: take the original weights",
    "zero_to_fp32.py": "beside DeepSpeed's parts of a model: join them by: python zero_to_fp32.py "
                       ". pytorch_model.bin",
    "*.distcp": "parts of PyTorch's distributed checkpoint: join them by: python -m "
                "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin",
    "*.part": "a download that is not finished: start it again",
    "*.incomplete": "a download that is not finished: start it again",
    "*-of-*.safetensors": "a part of a model: fetch model.safetensors.index.json and all parts",
    "*-of-*.bin": "a part of a model: fetch pytorch_model.bin.index.json and all parts",
    "checkpoint-*": "a folder of transformers' Trainer, which has one for each step that it saved: "
                    "name one of these",
    "*.safetensors": "a safetensors file under another name: rename it model.safetensors",
    "*.pt": "a file of PyTorch under another name: if it is a dict of GPT-2's tensors, rename it "
            "pytorch_model.bin",
    "*.pth": "a file of PyTorch under another name: if it is a dict of GPT-2's tensors, rename it "
             "pytorch_model.bin"}


def other_weights(names: list[str]) -> str:
    """Of the files with these names the first that holds weights in another form, in words; or "".

    Example: other_weights(["a.txt", "x.gguf"]) == "'x.gguf' is GGUF, llama.cpp's format: take the
    original weights from the Hub".
    """
    for pattern, what in WEIGHTS.items():
        for name in sorted(names):
            if fnmatch.fnmatchcase(name.lower(), pattern):
                return f"{name[:80]!r} is {what}"
    return ""
