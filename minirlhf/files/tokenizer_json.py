"""tokenizer.json, the one file that transformers 5 saves of a tokenizer: read if it is a byte-level
BPE as GPT-2 has it. What it asks for beyond that is refused by name.

Source: the format, https://github.com/huggingface/tokenizers/blob/v0.22.0/tokenizers/src/tokenizer/
serialization.rs, and models/bpe, pre_tokenizers/byte_level.rs, added_vocabulary.rs there.
"""

import re
from typing import NamedTuple

from minirlhf.files.disk import short
from minirlhf.files.merges import parse_pair

MAX_ID = 10**7
MAX_MERGES = 250_000            # GPT-2 has 50,000
SURROGATE = re.compile("[\ud800-\udfff]")         # half a pair is no text

# What each part may say; anything else changes ids or text. Where a value is missing it is the
# first one. `unk_token` stands for bytes that are not in the vocabulary, and all of them are.
FILE_KEYS = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
             "post_processor", "decoder", "model"}
MODEL = {"type": ("BPE",), "dropout": (None, 0), "continuing_subword_prefix": (None, ""),
         "end_of_word_suffix": (None, ""), "fuse_unk": (False, None),
         "byte_fallback": (False, None), "ignore_merges": (False, None)}
BYTE_LEVEL = {"type": ("ByteLevel",), "use_regex": (True,)}


class AddedToken(NamedTuple):
    """A token that stands for a whole string, and how it is found in text."""
    id: int
    special: bool = False
    lstrip: bool = False                # white space before it belongs to it
    rstrip: bool = False                # white space after it belongs to it
    single_word: bool = False           # not inside a word
    normalized: bool = False            # looked for after those that are not


class TokenizerFile(NamedTuple):
    """What a tokenizer.json says."""
    ids: dict[str, int]                 # of the model: bytes, products of merges, and others
    merges: list[tuple[bytes, bytes]]
    added: dict[str, AddedToken]
    prefix_space: bool                  # whether text gets a space in front
    before: list[str]                   # special tokens that are put in front of each text


def refuse(path: str, what: str) -> None:
    """Say what a file asks for that is not done here."""
    raise ValueError(f"{path}: {what}; minirlhf reads byte-level BPE as GPT-2 has it, and does not "
                     "do that")


def check_ids(ids, path: str) -> dict[str, int]:
    """A vocabulary: text -> id."""
    if not isinstance(ids, dict):
        raise ValueError(f"{path}: expected a vocabulary, found {short(ids)}")
    for token, number in ids.items():
        if not token or SURROGATE.search(token):
            raise ValueError(f"{path}: expected tokens of Unicode text, found {short(token)}")
        if type(number) is not int or not 0 <= number < MAX_ID:
            raise ValueError(f"{path}: expected token {short(token)} with an id from 0 to "
                             f"{MAX_ID - 1}, found {short(number)}")
    return ids


def parse_added(values, path: str, content: str | None = None,
                number: int | None = None) -> tuple[str, AddedToken]:
    """An added token, as tokenizer.json and tokenizer_config.json describe it."""
    values = values if isinstance(values, dict) else {}
    text, id = values.get("content", content), values.get("id", number)
    if not isinstance(text, str) or not text:
        raise ValueError(f"{path}: expected an added token with its text as content, found "
                         f"{short(values)}")
    check_ids({text: id}, path)
    flags = [values.get(name, False) for name in AddedToken._fields[1:]]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(f"{path}: added token {short(text)}: expected special, lstrip, rstrip, "
                         f"single_word and normalized true or false, found {short(values)}")
    return text, AddedToken(id, *flags)


def only(part, path: str, name: str, kinds: tuple[str, ...], inside: str) -> list[dict]:
    """The steps of a part of the pipeline, each of one of `kinds`; a Sequence is looked into."""
    steps = [part]
    if isinstance(part, dict) and part.get("type") == "Sequence":
        steps = part.get(inside)
    if not isinstance(steps, list):
        raise ValueError(f"{path}: {name}: expected a list of steps, found {short(steps)}")
    for step in steps:
        kind = step.get("type") if isinstance(step, dict) else step
        if kind not in kinds:
            refuse(path, f"{name} is {short(kind)}, expected {' or '.join(kinds)}")
    return steps


def check_settings(values: dict, allowed: dict, path: str, name: str) -> None:
    """Refuse by name a setting that changes ids or text."""
    for key, choices in allowed.items():
        value = values.get(key, choices[0])
        if not any(value == choice and type(value) is not bool or value is choice
                   for choice in choices):
            refuse(path, f"{name}: {key} is {short(value)}, expected {short(choices[0])}")


def tokens_before(processor, path: str) -> list[str]:
    """The special tokens that a post-processor puts in front of each text."""
    if processor is None:
        return []
    found = []
    for step in only(processor, path, "post_processor", ("ByteLevel", "TemplateProcessing"),
                     "processors"):
        if step["type"] == "TemplateProcessing":
            single = step.get("single")
            pieces = single if isinstance(single, list) else [single]
            names = [list(piece) for piece in pieces if isinstance(piece, dict)]
            if names != [["SpecialToken"]] * (len(pieces) - 1) + [["Sequence"]]:
                refuse(path, f"post_processor: the template {short(single)} puts tokens after the "
                       "text")
            tokens = [piece["SpecialToken"] for piece in pieces[:-1]]
            found += [short(token.get("id") if isinstance(token, dict) else token).strip("'\"")
                      for token in tokens]
    return found


def parse_tokenizer(values: dict, path: str) -> TokenizerFile:
    """Check and take apart a tokenizer.json.

    `truncation` and `padding` are passed over: they are the last batch's, and ours are cut and
    padded by data.py.
    Raises: ValueError that names the file and what is not done here.
    """
    model = values.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path}: expected a model, found {short(model)}")
    check_settings(model, MODEL, path, "model")
    for extra in (set(values) - FILE_KEYS, set(model) - {*MODEL, "vocab", "merges", "unk_token"}):
        if extra:
            refuse(path, f"it has {short(sorted(extra))}")
    normalizer = values.get("normalizer")
    if normalizer is not None and normalizer != {"type": "Sequence", "normalizers": []}:
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        refuse(path, f"normalizer is {short(kind)}, expected none")
    steps = only(values.get("pre_tokenizer"), path, "pre_tokenizer", ("ByteLevel",),
                 "pretokenizers")
    decoders = only(values.get("decoder"), path, "decoder", ("ByteLevel",), "decoders")
    if len(steps) != 1 or len(decoders) != 1:
        refuse(path, "pre_tokenizer or decoder has several steps or none, expected one ByteLevel")
    check_settings(steps[0], BYTE_LEVEL, path, "pre_tokenizer")
    prefix_space = steps[0].get("add_prefix_space")
    if not isinstance(prefix_space, bool):
        raise ValueError(f"{path}: pre_tokenizer: expected add_prefix_space true or false, found "
                         f"{short(prefix_space)}")
    merges, added = model.get("merges"), values.get("added_tokens") or []
    if not isinstance(merges, list) or not isinstance(added, list):
        raise ValueError(f"{path}: expected lists of merges and of added tokens, found "
                         f"{short(merges)}, {short(added)}")
    if len(merges) > MAX_MERGES:
        raise ValueError(f"{path}: expected at most {MAX_MERGES} merges, found {len(merges)}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    pairs = [parse_pair(pair if isinstance(pair, list) else [pair], f"{path}: merge {number}")
             for number, pair in enumerate(pairs, start=1)]
    tokens: dict[str, AddedToken] = {}
    for value in added:
        text, token = parse_added(value, path)
        if tokens.setdefault(text, token) != token:
            raise ValueError(f"{path}: added token {short(text)} is there twice")
    return TokenizerFile(check_ids(model.get("vocab"), path), pairs, tokens, prefix_space,
                         tokens_before(values.get("post_processor"), path))
