"""The tokenizer of a folder, read from the files in which others keep it.

    vocab.json, merges.txt      the vocabulary and how it is merged, as GPT-2 was published
    tokenizer.json              both in one file, all that transformers 5 saves
    added_tokens.json           tokens that were added later: whole strings
    tokenizer_config.json, special_tokens_map.json      names of special tokens, and settings
    config.json                 its eos_token_id, where no other file names the end token

What several files state must agree. What would change ids or text and is not done here is refused
by name. Ids are those of the files: special tokens may come first or last.
"""

import os
from typing import NamedTuple

from minirlhf.files.disk import open_regular, read_json, short
from minirlhf.files.foreign import HEAD, contents
from minirlhf.files.merges import BYTE_ORDER, MAX_MERGES_FILE, parse_merges, rank_tokens, spell
from minirlhf.files.tokenizer_json import (
    AddedToken,
    TokenizerFile,
    check_ids,
    parse_added,
    parse_tokenizer,
    refuse,
)

END_TEXT = "<|endoftext|>"          # GPT-2's only special token
MAX_TOKENIZER = 10 << 20            # bytes of a tokenizer.json; one of GPT-2's size has 4 million
BASES = ("tokenizer.json", "vocab.json", "merges.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
OTHERS = {"encoder.json": "OpenAI's name of vocab.json; rename it",
          "vocab.bpe": "OpenAI's name of merges.txt; rename it",
          "vocab.txt": "a WordPiece vocabulary", "tokenizer.model": "a SentencePiece model",
          "spiece.model": "a SentencePiece model", "tekken.json": "a vocabulary of Mistral's",
          "sentencepiece.bpe.model": "a SentencePiece model",
          "meta.pkl": "nanoGPT's vocabulary of single characters",
          "tokenizer.pkl": "nanochat's tokenizer, a pickle"}

# Settings of tokenizer_config.json that change ids or text, and what GPT-2's BPE does.
CONFIG = {"errors": (None, "replace"), "add_eos_token": (None, False),
          "split_special_tokens": (None, False), "do_lower_case": (None, False),
          "lowercase": (None, False), "unicode_normalizer": (None,), "dropout": (None, 0)}
# Classes whose vocab.json and merges.txt mean what GPT-2's mean.
CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast",
           "TokenizersBackend", "CodeGenTokenizer", "CodeGenTokenizerFast")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
           "mask_token")
SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")


class Vocabulary(NamedTuple):
    """A byte-level BPE with the ids that its files give it."""
    merges: list[tuple[bytes, bytes]]
    ranks: dict[bytes, int]             # the order in which tokens are made; not all have a rank
    ids: dict[str, int]                 # as vocab.json spells tokens
    added: dict[str, AddedToken]        # whole strings, in `ids` or not
    end: str                            # the end token, in `ids` or in `added`
    prefix_space: bool = False          # whether text gets a space in front

    def all_ids(self) -> dict[str, int]:
        """Every token's id; whole strings as they are, the others as vocab.json spells them."""
        return {**self.ids, **{text: token.id for text, token in self.added.items()}}


def number_tokens(merges: list[tuple[bytes, bytes]], source: str = "merges") -> Vocabulary:
    """The ids of GPT-2: the bytes, the product of each merge, `<|endoftext|>`."""
    tokens = [bytes([byte]) for byte in BYTE_ORDER] + [left + right for left, right in merges]
    ids = {spell(token): number for number, token in enumerate(tokens)}
    ids[END_TEXT] = len(ids)
    return Vocabulary(merges, rank_tokens(merges, source), ids, {}, END_TEXT)


def read_vocabulary(folder: str) -> Vocabulary | None:
    """The vocabulary of a folder; None if it has no file of any tokenizer.

    Raises: FileNotFoundError for an incomplete set of files; ValueError that names a damaged file,
    two that contradict each other, or what is not done here.
    """
    def there(name: str) -> bool:
        return os.path.exists(os.path.join(folder, name))

    if not any(map(there, (*BASES, *SETTINGS, "added_tokens.json", *OTHERS))):
        return None
    base, path, source = read_base(folder, there)
    ranks = rank_tokens(base.merges, source)
    added, named, settings = dict(base.added), {}, {}
    for name in filter(there, SETTINGS):
        read_settings(os.path.join(folder, name), added, named, settings)
    if there("added_tokens.json"):
        read_added(os.path.join(folder, "added_tokens.json"), added)
    if not there("tokenizer.json") and settings.get("tokenizer_class") not in CLASSES:
        refuse(os.path.join(folder, SETTINGS[0]), "tokenizer_class is "
               f"{short(settings['tokenizer_class'])}, expected GPT2Tokenizer")
    made = {spell(bytes([byte])) for byte in BYTE_ORDER}
    first = min((base.ids[token] for token in made if token in base.ids), default=0)
    made.update(spell(left + right) for left, right in base.merges)
    end = find_end(folder, path, base, added, named, made)
    for name, (text, flags, place) in named.items():
        number = added[text].id if text in added else base.ids.get(text)
        if number is None:
            raise ValueError(f"{path}: expected token {short(text)}, the {name} of {place}; give "
                             "it an id in added_tokens.json, or delete that entry")
        added.setdefault(text, flags._replace(id=number, special=True))
    # trainers put special tokens first, and not all of them are named anywhere else
    strings = {text for text, number in base.ids.items() if number < first}
    strings.update((END_TEXT, end, *added))
    check_complete(base.ids, added, made, strings, path)
    prefix_space = settings.get("add_prefix_space")
    if there("tokenizer.json") and prefix_space not in (None, base.prefix_space):
        raise ValueError(f"{os.path.join(folder, SETTINGS[0])}: expected add_prefix_space "
                         f"{base.prefix_space}, as tokenizer.json has it, found {prefix_space}")
    before = base.before
    if settings.get("add_bos_token"):
        before = [named["bos_token"][0] if "bos_token" in named else "no bos_token"]
    if before not in ([], [end]):                        # every row begins with the end token
        refuse(path, f"text gets {short(before)} in front (add_bos_token or post_processor), and "
               f"the end token is {short(end)}")
    return Vocabulary(base.merges, ranks, base.ids, added, end,
                      bool(base.prefix_space or prefix_space))


# ---- vocabulary and merges -----------------------------------------------------------------------

def read_base(folder: str, there) -> tuple[TokenizerFile, str, str]:
    """Ids and merges, with the path of the file that has the ids, and of that with the merges."""
    one_path, vocab_path, merges_path = (os.path.join(folder, name) for name in BASES)
    one = vocab = merges = None
    if there("tokenizer.json"):
        one = parse_tokenizer(read_json(one_path, MAX_TOKENIZER), one_path)
    else:
        for name in ("vocab.json", "merges.txt"):
            if not there(name):
                raise FileNotFoundError(f"{os.path.join(folder, name)} does not exist; expected a "
                                        "tokenizer, vocab.json and merges.txt, as every stage "
                                        f"writes it, or tokenizer.json{name_others(folder)}")
    if there("vocab.json"):
        vocab = check_ids(read_json(vocab_path), vocab_path)
    if there("merges.txt"):
        merges = read_merges(merges_path)
    if one is None:
        return TokenizerFile(vocab, merges, {}, False, []), vocab_path, merges_path
    if vocab is not None:
        check_equal(vocab, one, vocab_path)
    if merges is not None and merges != one.merges:
        count = next((count for count, pair in enumerate(zip(merges, one.merges), start=1)
                      if pair[0] != pair[1]), min(len(merges), len(one.merges)) + 1)
        raise ValueError(f"{merges_path}: merge {count} is not that of tokenizer.json; the folder "
                         "mixes two tokenizers: delete the file of the wrong one")
    return one, one_path, one_path


def name_others(folder: str) -> str:
    """What else lies in the folder that may be meant, as the end of a sentence."""
    for name, what in OTHERS.items():
        if os.path.exists(os.path.join(folder, name)):
            return f" ({name} is {what})"
    return ""


def read_merges(path: str) -> list[tuple[bytes, bytes]]:
    """A merges.txt."""
    with open_regular(path) as file:
        data = file.read(MAX_MERGES_FILE + 1)
    if len(data) > MAX_MERGES_FILE:
        raise ValueError(f"{path}: expected at most {MAX_MERGES_FILE} bytes, found more")
    found = contents(data[:HEAD])
    if found and not found.startswith("the text"):
        raise ValueError(f"{path}: expected a list of merges, found {found}")
    return parse_merges(data, path)


def check_equal(ids: dict[str, int], one: TokenizerFile, path: str) -> None:
    """vocab.json must have the ids of tokenizer.json; either may leave out added tokens."""
    added = {text: token.id for text, token in one.added.items()}
    for token in [*one.ids, *ids]:
        first = ids.get(token, added.get(token))
        second = one.ids.get(token, added.get(token))
        if first != second:
            raise ValueError(f"{path}: expected token {short(token)} with id {short(second)}, as "
                             f"tokenizer.json has it, found {short(first)} (None: not there)")


def check_complete(ids: dict[str, int], added: dict[str, AddedToken], made: set[str],
                   strings: set[str], path: str) -> None:
    """The ids must be those of what is made (bytes, merges) and of known strings, without a gap."""
    missing = [token for token in made if token not in ids]
    if missing:
        raise ValueError(f"{path}: expected token {short(min(missing))} with an id, a byte or the "
                         f"product of a merge, found none ({len(missing)} such in all)")
    owners: dict[int, str] = {}
    for token, number in ids.items():
        if token not in made and token not in strings:
            raise ValueError(f"{path}: expected token {short(token)} to be made by a merge or "
                             "named as an added token, found neither; the folder mixes files of "
                             "two models")
        if token in added and added[token].id != number:
            raise ValueError(f"{path}: expected token {short(token)} with id {added[token].id}, "
                             f"as an added token has it, found {number}")
        if owners.setdefault(number, token) != token:
            raise ValueError(f"{path}: expected token {short(token)} with an id of its own, found "
                             f"{number}, that of {short(owners[number])}")
    for token, (number, *_) in added.items():
        if owners.setdefault(number, token) != token:
            raise ValueError(f"{path}: expected token {short(owners[number])} with an id of its "
                             f"own, found {number}, that of the added token {short(token)}")
    gap = next((number for number in range(len(owners)) if number not in owners), None)
    if gap is not None:
        raise ValueError(f"{path}: expected token ids from 0 on without a gap, found none with id "
                         f"{gap} and {len(owners)} in all")


# ---- added and special tokens --------------------------------------------------------------------

def add_token(added: dict[str, AddedToken], text: str, token: AddedToken, path: str) -> None:
    """Note an added token; another file may not say something else of it."""
    if added.setdefault(text, token) != token:
        raise ValueError(f"{path}: added token {short(text)} is {tuple(token)}, in another file "
                         f"{tuple(added[text])}")


def read_added(path: str, added: dict[str, AddedToken]) -> None:
    """added_tokens.json: text -> id; other files may say more of the same tokens."""
    for text, number in check_ids(read_json(path), path).items():
        add_token(added, *parse_added({"content": text, "id": number}, path)
                  if text not in added else (text, added[text]._replace(id=number)), path)


def read_settings(path: str, added: dict[str, AddedToken], named: dict, settings: dict) -> None:
    """tokenizer_config.json or special_tokens_map.json, into the three dicts."""
    values = read_json(path)
    for name, allowed in CONFIG.items():
        value = values.get(name)
        if value not in allowed:
            refuse(path, f"{name} is {short(value)}, expected {short(allowed[-1])}")
    for name in ("add_prefix_space", "add_bos_token", "tokenizer_class"):
        value = values.get(name)
        if value is not None and type(value) is not (str if name == "tokenizer_class" else bool):
            raise ValueError(f"{path}: {name} is {short(value)}, expected true or false, or a name")
        if value is not None:
            settings[name] = value
    decoder = values.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: expected added_tokens_decoder with ids, found {short(decoder)}")
    for number, value in decoder.items():
        number = int(number) if number.isdecimal() and len(number) < 10 else -1
        text, token = parse_added({**value, "id": number} if isinstance(value, dict) else value,
                                  path)
        if text not in added or added[text].id != token.id:
            add_token(added, text, token, path)
        added[text] = token                              # transformers, too, believes this file
    for name in SPECIAL:
        if values.get(name) not in (None, ""):
            name_token(values[name], name, path, named)
    for name in SPECIAL_LISTS:
        tokens = values.get(name) or []
        tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
        if not isinstance(tokens, list):
            raise ValueError(f"{path}: expected {name} as a list, found {short(tokens)}")
        for count, token in enumerate(tokens, start=1):
            name_token(token, f"{name} {count}", path, named)


def name_token(value, name: str, path: str, named: dict) -> None:
    """Note the text of a special token, such as eos_token; another file may not name another."""
    values = value if isinstance(value, dict) else {"content": value}
    text, flags = parse_added({**values, "id": 0}, path)
    if name in named and named[name][0] != text:
        raise ValueError(f"{path}: {name} is {short(text)}, in {named[name][2]} it is "
                         f"{short(named[name][0])}")
    named.setdefault(name, (text, flags, path))


def find_end(folder: str, path: str, base: TokenizerFile, added: dict[str, AddedToken],
             named: dict, made: set[str]) -> str:
    """The text of the end token: as it is named, or by the id in config.json, or GPT-2's."""
    if "eos_token" in named:
        return named["eos_token"][0]
    whole = {text: number for text, number in base.ids.items() if text not in made}
    whole.update((text, token.id) for text, token in added.items())
    config_path = os.path.join(folder, "config.json")
    stated = read_json(config_path).get("eos_token_id") if os.path.exists(config_path) else None
    stated = stated if isinstance(stated, list) else [stated]        # several, in chat models
    for text, number in whole.items():
        if any(type(one) is int and one == number for one in stated):
            return text
    if END_TEXT in whole:
        return END_TEXT
    raise ValueError(f"{path}: expected token {END_TEXT!r}, which ends a text, or another that is "
                     f"named as eos_token in tokenizer_config.json; found only {short(list(whole))}"
                     " beside the vocabulary. Name the one that the model was trained with, as by "
                     '{"eos_token": "</s>"}')
