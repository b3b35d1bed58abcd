"""Tokenizers as others save them: tokenizer.json, added tokens, ids of their own."""

import json
import os
import random
import time

import pytest
from fuzzing import FUZZ, INSERTED, MEBIBYTE, Tally, damage, peak_memory, put, reset_peak
from networks import text_model

from minirlhf.files.disk import read_json, write_json
from minirlhf.files.merges import MAX_MERGES_FILE, rank_tokens, spell
from minirlhf.files.pretrained import save_folder
from minirlhf.files.vocabulary import END_TEXT, MAX_TOKENIZER, read_vocabulary
from minirlhf.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["The capital of France is Paris.", " a<mask>b <|endoftext|>",
         "na\u00efve \U0001f642\n\n  x", "<BOS>Hi<BOS> <EOS> you<PAD><PAD>", "banana  <x>  ban",
         "", " ", "<s></s>"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}


def added(number: int, text: str, **flags) -> dict:
    """An added token as tokenizer.json lists it."""
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True, **flags}


def tokenizer_json(tokenizer: Tokenizer, **changes) -> dict:
    """What transformers 5 saves for a tokenizer; `changes` replace parts of it."""
    ids = tokenizer.vocabulary()
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [added(ids[END_TEXT], END_TEXT)], "normalizer": None,
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": {"type": "TemplateProcessing", "single": [
                {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}},
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False,
                      "byte_fallback": False, "ignore_merges": False, "vocab": ids,
                      "merges": [[spell(left), spell(right)] for left, right in tokenizer.merges]},
            **changes}


def in_model(tokenizer: Tokenizer, **changes) -> dict:
    """The same with other settings of its model."""
    values = tokenizer_json(tokenizer)
    return {**values, "model": {**values["model"], **changes}}


def write_files(folder, **files) -> str:
    """Write JSON files; "vocab" for vocab.json."""
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return str(folder)


def specials_first(tokenizer: Tokenizer) -> dict[str, int]:
    """The same vocabulary as a trainer numbers it: special tokens, bytes, products."""
    strings = ["<s>", "<pad>", "</s>"]
    tokens = strings + [token for token in tokenizer.vocabulary() if token != END_TEXT]
    return {token: number for number, token in enumerate(tokens)}


# ---- tokenizer.json ------------------------------------------------------------------------------

@pytest.mark.parametrize("merges_as_text", [True, False])
def test_tokenizer_json_alone_gives_the_ids_of_vocab_and_merges(tiny_tokenizer, tmp_path,
                                                                merges_as_text):
    values = tokenizer_json(tiny_tokenizer)
    if merges_as_text:                           # as transformers 4 writes them
        values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
        del values["model"]["type"]              # as in the file of the published GPT-2
    loaded = Tokenizer.load(write_files(tmp_path, tokenizer=values))
    assert loaded == tiny_tokenizer
    for text in TEXTS:
        assert loaded.encode(text) == tiny_tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_a_vocabulary_of_50257_rows_that_is_not_english_is_not_read_as_gpt2s(tiny_tokenizer,
                                                                            tmp_path):
    folder = write_files(tmp_path, tokenizer=tokenizer_json(tiny_tokenizer),
                         config={"vocab_size": 50257, "eos_token_id": 50256})
    assert Tokenizer.load(folder) == tiny_tokenizer


@pytest.mark.parametrize("name", [
    "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "merges.txt",
    "vocab.json", "tokenizer.model", "spiece.model", "vocab.txt", "encoder.json", "vocab.bpe",
    "meta.pkl"])
def test_any_file_of_a_tokenizer_shuts_out_gpt2s_english_vocabulary(tmp_path, name):
    write_json(str(tmp_path / "config.json"), {"vocab_size": 50257})
    (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="does not exist; expected a tokenizer") as error:
        Tokenizer.load(str(tmp_path))
    assert "OpenAI's name" in str(error.value) or name not in ("encoder.json", "vocab.bpe")


REFUSED = {
    "another model": ({"type": "WordPiece"}, "type is 'WordPiece'"),
    "Unigram": ({"type": "Unigram"}, "type is 'Unigram'"),
    "dropout": ({"dropout": 0.1}, "dropout is 0.1"),
    "prefix": ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'"),
    "suffix": ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
    "byte fallback": ({"byte_fallback": True}, "byte_fallback is True"),
    "fused unknown tokens": ({"fuse_unk": True}, "fuse_unk is True"),
    "whole words first": ({"ignore_merges": True}, "ignore_merges is True"),
    "a new setting": ({"magic": 1}, "magic"),
    "no merges": ({"merges": None}, "expected lists of merges"),
    "no vocabulary": ({"vocab": [1]}, "expected a vocabulary"),
    "a merge of three": ({"merges": ["a b c"]}, "merge 1: expected two tokens"),
    "a merge with a space": ({"merges": [["a", " b"]]}, "merge 1: expected two tokens"),
    "a merge of numbers": ({"merges": [[1, 2]]}, "merge 1: expected two tokens"),
    "text as id": ({"vocab": {"a": "0"}}, "expected token 'a' with an id"),
    "half a character": ({"vocab": {"\ud800": 0}}, "Unicode")}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_asks_for_more_is_refused_by_name(tiny_tokenizer, tmp_path, case):
    changes, message = REFUSED[case]
    folder = write_files(tmp_path, tokenizer=in_model(tiny_tokenizer, **changes))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(folder)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


SPLIT = {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}
STEPS = {
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "normalizer is 'Lowercase'"),
    "NFC": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
            "normalizer is 'Sequence'"),
    "Metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer is 'Metaspace'"),
    "a cut of its own": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        SPLIT, {**BYTE_LEVEL, "use_regex": False}]}}, "pre_tokenizer is 'Split'"),
    "digits": ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}}, "pre_tokenizer is 'Digits'"),
    "no cut": ({"pre_tokenizer": {**BYTE_LEVEL, "use_regex": False}}, "use_regex is False"),
    "no pre-tokenizer": ({"pre_tokenizer": None}, "pre_tokenizer is None"),
    "no decoder": ({"decoder": None}, "decoder is None"),
    "another decoder": ({"decoder": {"type": "WordPiece"}}, "decoder is 'WordPiece'"),
    "Roberta": ({"post_processor": {"type": "RobertaProcessing"}},
                "post_processor is 'RobertaProcessing'"),
    "tokens after the text": ({"post_processor": {"type": "TemplateProcessing", "single": [
        {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": END_TEXT}}]}}, "template"),
    "another token before it": ({"post_processor": {"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}}, "gets .*<s>.* in front"),
    "a new part": ({"magic": {"type": "x"}}, "magic")}


@pytest.mark.parametrize("case", STEPS)
def test_a_pipeline_that_is_not_gpt2s_is_refused_by_name(tiny_tokenizer, tmp_path, case):
    changes, message = STEPS[case]
    folder = write_files(tmp_path, tokenizer=tokenizer_json(tiny_tokenizer, **changes))
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(folder)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [
    {"truncation": {"max_length": 8}, "padding": {"strategy": "BatchLongest"}},   # of a batch
    {"normalizer": {"type": "Sequence", "normalizers": []}},
    {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}},
    {"post_processor": None}, {"post_processor": BYTE_LEVEL},
    {"post_processor": {"type": "TemplateProcessing", "single": [       # as every row begins here
        {"SpecialToken": {"id": END_TEXT}}, {"Sequence": {"id": "A"}}]}}])
def test_settings_that_change_no_id_are_accepted(tiny_tokenizer, tmp_path, changes):
    folder = write_files(tmp_path, tokenizer=tokenizer_json(tiny_tokenizer, **changes))
    assert Tokenizer.load(folder) == tiny_tokenizer


def test_tokenizer_json_and_the_two_files_must_agree(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(str(tmp_path))
    good = tokenizer_json(tiny_tokenizer)
    assert Tokenizer.load(write_files(tmp_path, tokenizer=good)) == tiny_tokenizer
    ids = {**tiny_tokenizer.vocabulary(), "!": 1, '"': 0}
    write_files(tmp_path, tokenizer=in_model(tiny_tokenizer, vocab=ids))
    with pytest.raises(ValueError, match="vocab.json: expected token '!' with id 1, as tokenizer"):
        Tokenizer.load(str(tmp_path))
    merges = good["model"]["merges"]
    write_files(tmp_path, tokenizer=in_model(tiny_tokenizer, merges=[merges[1], merges[0],
                                                                     *merges[2:]]))
    with pytest.raises(ValueError, match="merges.txt: merge 1 is not that of tokenizer.json"):
        Tokenizer.load(str(tmp_path))
    write_files(tmp_path, tokenizer=in_model(tiny_tokenizer, merges=merges[:-1]))
    with pytest.raises(ValueError, match="merges.txt: merge 63 is not that of tokenizer.json"):
        Tokenizer.load(str(tmp_path))


# ---- ids of its own ------------------------------------------------------------------------------

def test_ids_are_those_of_the_file_wherever_special_tokens_stand(tiny_tokenizer, tmp_path):
    ids = specials_first(tiny_tokenizer)
    tokens = [added(number, text) for number, text in enumerate(["<s>", "<pad>", "</s>"])]
    values = in_model(tiny_tokenizer, vocab=ids)
    folder = write_files(tmp_path, tokenizer={**values, "added_tokens": tokens},
                         tokenizer_config={"eos_token": "</s>"})
    loaded = Tokenizer.load(folder)
    assert (loaded.vocab_size, loaded.end_token) == (len(ids), 2)
    plain = tiny_tokenizer.encode("The capital")
    assert loaded.encode("The capital") == [token + 3 for token in plain]
    assert loaded.encode("<s>The") == [0] + [token + 3 for token in tiny_tokenizer.encode("The")]
    assert loaded.encode("</s>") == [token + 3 for token in tiny_tokenizer.encode("</s>")]
    assert loaded.decode([0, 1, 2] + loaded.encode(" Paris")) == "<s><pad> Paris"
    assert loaded.decode([2], skip_end=False) == "</s>"


def test_ids_in_any_order_are_read_and_saved(tiny_tokenizer, tmp_path):
    names = list(tiny_tokenizer.vocabulary())
    shuffled = random.Random(0).sample(names, len(names))
    ids = {token: number for number, token in enumerate(shuffled)}
    loaded = Tokenizer.load(write_files(tmp_path, tokenizer={
        **in_model(tiny_tokenizer, vocab=ids), "added_tokens": [added(ids[END_TEXT], END_TEXT)]}))
    for text in TEXTS:
        expected = [ids[names[number]] for number in tiny_tokenizer.encode(text)]
        assert loaded.encode(text) == expected and loaded.decode(expected) == text
    loaded.save(str(tmp_path / "again"))
    assert Tokenizer.load(str(tmp_path / "again")) == loaded


@pytest.mark.parametrize("stated", [2, [2], [9999, 2]])
def test_the_end_token_is_taken_from_the_id_in_config_json(tiny_tokenizer, tmp_path, stated):
    """As the tokenizers package's `save_model` leaves a folder: vocab.json and merges.txt alone."""
    tiny_tokenizer.save(str(tmp_path))
    os.unlink(tmp_path / "tokenizer_config.json")
    write_files(tmp_path, vocab=specials_first(tiny_tokenizer), config={"eos_token_id": stated})
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.end_token == 2 and loaded.stated.end == "</s>"
    assert loaded.encode("<s>") == [token + 3 for token in tiny_tokenizer.encode("<s>")]


@pytest.mark.parametrize("config", [{}, {"eos_token_id": 3}, {"eos_token_id": 9999},
                                    {"eos_token_id": None}, {"eos_token_id": True}])
def test_a_vocabulary_without_an_end_token_is_refused_with_what_to_do(tiny_tokenizer, tmp_path,
                                                                      config):
    """Id 3 is a letter; 9999, GPT-2's default in config.json, is no token of this vocabulary."""
    values = in_model(tiny_tokenizer, vocab=specials_first(tiny_tokenizer))
    folder = write_files(tmp_path, tokenizer={**values, "added_tokens": []}, config=config)
    with pytest.raises(ValueError, match=r"tokenizer.json: .*'<\|endoftext\|>', which ends a text"
                                         r".*'<s>', '<pad>', '</s>'.*eos_token") as error:
        Tokenizer.load(folder)
    assert "\n" not in str(error.value)


BAD_IDS = {
    "a byte without an id": ({"!": None}, "expected token '!' with an id"),
    "a product without an id": ({"he": None}, "expected token 'he' with an id"),
    "one id twice": ({"!": 1}, "with an id of its own, found 1"),
    "a gap": ({END_TEXT: 400}, "without a gap, found none with id 319"),
    "a token that nothing makes": ({"new": 320}, "expected token 'new' to be made by a merge")}


@pytest.mark.parametrize("case", BAD_IDS)
def test_ids_that_are_not_one_for_each_token_are_refused(tiny_tokenizer, tmp_path, case):
    changes, message = BAD_IDS[case]
    ids = {**tiny_tokenizer.vocabulary(), **changes}
    ids = {token: number for token, number in ids.items() if number is not None}
    values = in_model(tiny_tokenizer, vocab=ids)
    folder = write_files(tmp_path, tokenizer={**values, "added_tokens": []})
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(folder)
    assert "tokenizer.json" in str(error.value)


# ---- added tokens and settings -------------------------------------------------------------------

GPT_CLM = {"<BOS>": 320, "<EOS>": 321, "<PAD>": 322}


@pytest.mark.parametrize("way", ["added_tokens", "tokenizer_config", "tokenizer"])
def test_added_tokens_are_whole_strings(tiny_tokenizer, tmp_path, way):
    """As a fine-tune of GPT-2 has them, in each of the three files that can say so."""
    tiny_tokenizer.save(str(tmp_path))
    config = {"bos_token": "<BOS>", "eos_token": "<EOS>", "pad_token": "<PAD>"}
    tokens = [added(number, text) for text, number in GPT_CLM.items()]
    if way == "added_tokens":
        write_files(tmp_path, added_tokens=GPT_CLM, special_tokens_map=config, tokenizer_config={})
    elif way == "tokenizer_config":
        write_files(tmp_path, tokenizer_config={**config, "added_tokens_decoder": {
            str(token.pop("id")): token for token in tokens}})
    else:
        write_files(tmp_path, tokenizer_config=config,
                    tokenizer={**tokenizer_json(tiny_tokenizer), "added_tokens": tokens})
    loaded = Tokenizer.load(str(tmp_path))
    assert (loaded.vocab_size, loaded.end_token) == (323, 321)
    hi = tiny_tokenizer.encode("Hi")
    assert loaded.encode("<BOS>Hi<PAD><PAD>") == [320, *hi, 322, 322]
    assert loaded.encode("<EOS>") == tiny_tokenizer.encode("<EOS>")        # never from text
    assert loaded.decode([320, *hi, 321]) == "<BOS>Hi"
    loaded.save(str(tmp_path / "again"))
    assert Tokenizer.load(str(tmp_path / "again")) == loaded


def test_the_longest_added_token_wins_and_flags_are_obeyed(tiny_tokenizer, tmp_path):
    tokens = [added(320, "<a>"), added(321, "<a><b>"), added(322, "<l>", lstrip=True),
              added(323, "<r>", rstrip=True), added(324, "dog", single_word=True)]
    loaded = Tokenizer.load(write_files(tmp_path, tokenizer={
        **tokenizer_json(tiny_tokenizer), "added_tokens": tokens}))

    def plain(text):
        return tiny_tokenizer.encode(text)

    assert loaded.encode("<a><b>x<a>") == [321, *plain("x"), 320]
    assert loaded.encode("a \u3000<l> b") == [*plain("a"), 322, *plain(" b")]
    assert loaded.encode("a <r> \n b") == [*plain("a "), 323, *plain("b")]
    assert loaded.encode("dog dogs _dog") == [324, *plain(" dogs _dog")]
    assert loaded.encode("<l>  <r>  <l>") == [322, *plain("  "), 323, 322]


def test_many_added_tokens_in_a_long_text_take_seconds(tiny_tokenizer, tmp_path):
    tokens = [added(320, "<r>", rstrip=True, lstrip=True), added(321, "<a>", normalized=True)]
    loaded = Tokenizer.load(write_files(tmp_path, tokenizer={
        **tokenizer_json(tiny_tokenizer), "added_tokens": tokens}))
    assert loaded.encode("<r> <a>" * 150_000) == [320, 321] * 150_000


def test_a_space_in_front_is_added_where_the_files_ask_for_it(tiny_tokenizer, tmp_path):
    before = {**BYTE_LEVEL, "add_prefix_space": True}
    folder = write_files(tmp_path, tokenizer=tokenizer_json(tiny_tokenizer, pre_tokenizer=before))
    loaded = Tokenizer.load(folder)
    for text in ("The capital", " The capital"):
        assert loaded.encode(text) == tiny_tokenizer.encode(" The capital")
    assert loaded.encode("\nx") == tiny_tokenizer.encode(" \nx") and loaded.encode("") == []
    assert loaded != tiny_tokenizer
    loaded.save(str(tmp_path / "again"))
    assert read_json(str(tmp_path / "again" / "tokenizer_config.json"))["add_prefix_space"] is True
    assert Tokenizer.load(str(tmp_path / "again")) == loaded
    write_files(tmp_path, tokenizer_config={"add_prefix_space": False})
    with pytest.raises(ValueError, match="tokenizer_config.json: expected add_prefix_space True"):
        Tokenizer.load(folder)


BAD_CONFIGS = {
    "errors": ({"errors": "strict"}, "errors is 'strict', expected 'replace'"),
    "end added": ({"add_eos_token": True}, "add_eos_token is True"),
    "another beginning": ({"add_bos_token": True, "bos_token": "!"}, "gets .*'!'.* in front"),
    "split": ({"split_special_tokens": True}, "split_special_tokens is True"),
    "lower case": ({"do_lower_case": True}, "do_lower_case is True"),
    "class": ({"tokenizer_class": "Qwen2Tokenizer"}, "tokenizer_class is 'Qwen2Tokenizer'"),
    "prefix no truth": ({"add_prefix_space": "yes"}, "add_prefix_space is 'yes'"),
    "unknown pad": ({"pad_token": "<PAD>"}, "expected token '<PAD>', the pad_token of"),
    "unknown end": ({"eos_token": "</s>"}, "expected token '</s>', the eos_token of"),
    "unknown extra": ({"additional_special_tokens": ["<x>"]}, "expected token '<x>'"),
    "extra no list": ({"extra_special_tokens": "<x>"}, "extra_special_tokens as a list"),
    "another id": ({"added_tokens_decoder": {"5": {"content": END_TEXT}}}, "with id 5"),
    "no id": ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "with an id from 0"),
    "no text": ({"added_tokens_decoder": {"320": {}}}, "expected an added token with its text"),
    "a flag no truth": ({"added_tokens_decoder": {"320": {"content": "<x>", "lstrip": 1}}},
                        "lstrip"),
    "text no text": ({"eos_token": 3}, "expected an added token with its text")}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_settings_are_done_or_refused_by_name_and_never_passed_over(tiny_tokenizer, tmp_path, case):
    changes, message = BAD_CONFIGS[case]
    tiny_tokenizer.save(str(tmp_path))
    config = read_json(str(tmp_path / "tokenizer_config.json"))
    write_files(tmp_path, tokenizer_config={**config, **changes})
    with pytest.raises(ValueError, match=message) as error:
        Tokenizer.load(str(tmp_path))
    assert ".json" in str(error.value) and "\n" not in str(error.value)


def test_two_files_that_name_another_end_token_are_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(str(tmp_path))
    write_files(tmp_path, added_tokens=GPT_CLM, special_tokens_map={"eos_token": "<EOS>"})
    with pytest.raises(ValueError, match=r"special_tokens_map.json: eos_token is '<EOS>', in "
                                         r".*tokenizer_config.json it is '<\|endoftext\|>'"):
        Tokenizer.load(str(tmp_path))
    write_files(tmp_path, added_tokens={"<BOS>": 320}, special_tokens_map={},
                tokenizer={**tokenizer_json(tiny_tokenizer), "added_tokens": [added(321, "<BOS>"),
                                                                              added(320, "<x>")]})
    with pytest.raises(ValueError, match="added_tokens.json: added token '<BOS>' is"):
        Tokenizer.load(str(tmp_path))


def test_clean_up_of_spaces_and_lengths_are_no_matter_of_ids(tiny_tokenizer, tmp_path):
    """What transformers 4 writes by default; its clean-up changes shown text only."""
    tiny_tokenizer.save(str(tmp_path))
    config = read_json(str(tmp_path / "tokenizer_config.json"))
    write_files(tmp_path, tokenizer_config={
        **config, "clean_up_tokenization_spaces": True, "model_max_length": 10**20 // 3,
        "padding_side": "left", "truncation_side": "right", "extra_special_tokens": {},
        "tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True})
    assert Tokenizer.load(str(tmp_path)) == tiny_tokenizer


# ---- merges --------------------------------------------------------------------------------------

def slow_bpe(text: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """As the definition says: join the leftmost pair of the earliest merge, again and again."""
    parts = [bytes([byte]) for byte in text]
    for pair in iter(lambda: min(set(zip(parts, parts[1:])) & set(merges), key=merges.index,
                                 default=None), None):
        at = list(zip(parts, parts[1:])).index(pair)
        parts[at:at + 2] = [pair[0] + pair[1]]
    return parts


def test_any_list_of_merges_is_obeyed_also_one_that_no_training_makes():
    """By pairs, as the list has them; tiktoken goes by products alone."""
    rng, dead = random.Random(0), 0
    for _ in range(1500):
        tokens, merges = [b"a", b"b", b"c"][:rng.randint(1, 3)], []
        letters = list(tokens)
        for _ in range(rng.randint(1, 10)):
            pair = rng.choice(tokens), rng.choice(tokens)
            if pair[0] + pair[1] not in tokens and len(pair[0] + pair[1]) < 12:
                merges.append(pair)
                tokens.append(pair[0] + pair[1])
        tokenizer = Tokenizer(merges)
        dead += len(merges) + 256 - len(rank_tokens(merges, "merges"))
        for _ in range(5):
            text = b"".join(rng.choice(letters) for _ in range(rng.randint(1, 20)))
            found = [tokenizer.text_of_id[token] for token in tokenizer.encode(text.decode())]
            assert found == slow_bpe(text, merges), (merges, text)
    assert dead > 1000


def test_a_product_that_never_happens_keeps_its_id(tmp_path):
    """(a, bc) comes after (a, b), which takes the a away: abc is a token that no text makes."""
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")]
    tokenizer = Tokenizer(merges)
    assert tokenizer.encode("abc") == [256, *tokenizer.encode("c")] and tokenizer.vocab_size == 260
    assert tokenizer.decode([258]) == "abc"
    tokenizer.save(str(tmp_path))
    assert Tokenizer.load(str(tmp_path)) == tokenizer


def test_the_merges_of_another_alphabet_fit(tmp_path):
    """Each of its letters takes four bytes in merges.txt: 1.3 million bytes for 50,000 merges."""
    letters = [chr(code).encode() for code in range(0x400, 0x500)]
    halves = [(letter[:1], letter[1:]) for letter in letters]
    pairs = [(one, other) for one in letters for other in letters]
    words = [(one + other, one) for one, other in pairs]
    tokenizer = Tokenizer([*halves, *pairs, *words])
    tokenizer.save(str(tmp_path))
    assert 1_400_000 < (tmp_path / "merges.txt").stat().st_size < MAX_MERGES_FILE
    assert Tokenizer.load(str(tmp_path)) == tokenizer


def test_the_model_and_its_added_tokens_make_the_round_trip(tiny_tokenizer, tmp_path):
    values = in_model(tiny_tokenizer, vocab=specials_first(tiny_tokenizer))
    tokens = [added(number, text) for number, text in enumerate(["<s>", "<pad>", "</s>"])]
    folder = write_files(tmp_path, tokenizer={**values, "added_tokens": tokens},
                         tokenizer_config={"eos_token": "</s>"})
    loaded = Tokenizer.load(folder)
    model = text_model(loaded)
    save_folder(model, loaded, str(tmp_path / "saved"))
    assert load_tokenizer(str(tmp_path / "saved"), model) == loaded
    config = read_json(str(tmp_path / "saved" / "config.json"))
    assert config["eos_token_id"] == config["bos_token_id"] == 2


# ---- files by the thousand -----------------------------------------------------------------------

def test_mutated_tokenizer_json_ends_in_what_it_states_or_a_value_error(tiny_tokenizer, tmp_path):
    values = in_model(tiny_tokenizer, vocab=specials_first(tiny_tokenizer))
    tokens = [added(number, text) for number, text in enumerate(["<s>", "<pad>", "</s>"])]
    write_files(tmp_path, tokenizer={**values, "added_tokens": tokens},
                tokenizer_config={"eos_token": "</s>", "add_prefix_space": False,
                                  "added_tokens_decoder": {"0": added(0, "<s>")}})
    paths = [tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"]
    originals = [path.read_bytes() for path in paths]
    rng, tally = random.Random(6), Tally("tokenizer.json and tokenizer_config.json")
    inserted = INSERTED + [b"null", b"true", b"{}", b"[]", b"1e9", b'"a"', b'{"type":"Sequence"}']
    for case in range(max(600, FUZZ // 8)):
        which = case % 2
        if rng.random() < 0.5:
            content = damage(rng, originals[which], inserted)
        else:
            content = json.dumps(change_value(rng, json.loads(originals[which]))).encode()
        put(paths[which], content)
        loaded = tally.attempt("tokenizer", Tokenizer.load, str(tmp_path))
        if loaded is not None:
            stated = json.loads(paths[0].read_bytes())["model"]["vocab"]
            assert all(loaded.vocabulary()[token] == number for token, number in stated.items())
            text = "The capital of France!"
            assert loaded.decode(loaded.encode(text)).lstrip(" ") == text
        put(paths[which], originals[which])
    tally.finish()
    assert tally.refused > 100


HEAD = b'{"version":"1.0","pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false},' \
       b'"decoder":{"type":"ByteLevel"},'
BOMBS = {
    "lists": b'{"model":[' + b"[]," * 3_400_000 + b"[]]}",
    "objects": b'{"model":[' + b"{}," * 3_400_000 + b"{}]}",
    "merges": HEAD + b'"model":{"vocab":{},"merges":[' + b'"a b",' * 1_600_000 + b'"a b"]}}',
    "ids": HEAD + b'"model":{"merges":[],"vocab":{'
           + b",".join(b'"%x":%d' % (i, i) for i in range(600_000)) + b"}}}",
    "added tokens": HEAD + b'"model":{"merges":[],"vocab":{}},"added_tokens":['
                    + b",".join(b'{"id":%d,"content":"%x"}' % (i, i) for i in range(300_000))
                    + b"]}",
    "more than is read": HEAD + b" " * MAX_TOKENIZER + b'"model":{}}'}


@pytest.mark.parametrize("case", BOMBS)
def test_the_largest_tokenizer_json_ends_soon_in_bounded_memory(tmp_path, case):
    assert case == "more than is read" or 0.8 < len(BOMBS[case]) / MAX_TOKENIZER <= 1
    (tmp_path / "tokenizer.json").write_bytes(BOMBS[case])
    before, start = reset_peak(), time.process_time()
    with pytest.raises(ValueError, match="tokenizer.json"):
        Tokenizer.load(str(tmp_path))
    assert time.process_time() - start < 20
    assert peak_memory() - before < 400 * MEBIBYTE


def change_value(rng: random.Random, values):
    """Replace one value somewhere in a JSON object by another."""
    if not isinstance(values, (dict, list)) or not values or rng.random() < 0.1:
        return rng.choice([None, True, False, 0, 1, -1, 320, 1.5, "", "x", "<s>", [], {}, [[]],
                           {"type": "ByteLevel"}, {"content": "<s>"}, 10**30])
    changed = values.copy()
    key = rng.choice(list(values)) if isinstance(values, dict) else rng.randrange(len(values))
    changed[key] = change_value(rng, values[key])
    return changed


# ---- transformers and tokenizers -----------------------------------------------------------------

WORDS = ["the", "of", "Norge", "aaa", "banana", "na\u00efve", "\u20acuro", "\u4f60\u597d", "<x>",
         "</s>", "123", "don't", "I'll\n", "\n\n", "tabs\t\u00a0", "<s>", "<pad>", "[SEP]", ""]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", "  "])
                   for _ in range(rng.randrange(20)))


def trained_by_others(rng: random.Random, prefix_space: bool):
    """A tokenizer of the tokenizers package with special and added tokens."""
    theirs = pytest.importorskip("tokenizers")
    level = theirs.pre_tokenizers.ByteLevel
    tokenizer = theirs.Tokenizer(theirs.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=prefix_space)
    tokenizer.decoder = theirs.decoders.ByteLevel()
    special = rng.sample(["<s>", "<pad>", "</s>", "<unk>", END_TEXT, "[SEP]"], rng.randint(1, 5))
    tokenizer.train_from_iterator(
        [random_text(rng) for _ in range(80)], theirs.trainers.BpeTrainer(
            vocab_size=rng.randint(260, 500), special_tokens=special, show_progress=False,
            initial_alphabet=level.alphabet()))
    for text in rng.sample(["<BOS>", "<a>", "<a><b>", "ban", " new"], rng.randint(0, 4)):
        flags = {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "single_word")}
        tokenizer.add_tokens([theirs.AddedToken(text, normalized=rng.random() < 0.5, **flags)])
    return tokenizer, rng.choice(special)


def test_ids_and_text_are_those_of_the_tokenizers_package(tmp_path):
    rng, compared = random.Random(0), 0
    for case in range(30):
        prefix_space = rng.random() < 0.3
        theirs, end = trained_by_others(rng, prefix_space)
        folder = tmp_path / str(case)
        folder.mkdir()
        theirs.save(str(folder / "tokenizer.json"), pretty=rng.random() < 0.5)
        write_files(folder, tokenizer_config={"eos_token": end, "add_prefix_space": prefix_space})
        ours = Tokenizer.load(str(folder))
        assert ours.vocab_size == theirs.get_vocab_size()
        for _ in range(40):
            text = random_text(rng)
            if end not in text:
                encoded = theirs.encode(text, add_special_tokens=False)
                assert ours.encode(text) == encoded.ids, text
                assert ours.decode(encoded.ids) == theirs.decode(encoded.ids,
                                                                 skip_special_tokens=False)
                compared += 1
    assert compared > 500


def test_transformers_reads_a_saved_vocabulary_with_added_tokens_as_we_do(tmp_path):
    transformers = pytest.importorskip("transformers")
    rng = random.Random(1)
    for case in range(10):
        theirs, end = trained_by_others(rng, prefix_space=case % 3 == 0)
        folder = tmp_path / str(case)
        folder.mkdir()
        theirs.save(str(folder / "tokenizer.json"))
        write_files(folder, tokenizer_config={"eos_token": end})
        ours = Tokenizer.load(str(folder))
        ours.save(str(folder / "ours"))
        again = transformers.AutoTokenizer.from_pretrained(str(folder / "ours"))
        assert len(again) == ours.vocab_size and again.eos_token_id == ours.end_token
        for _ in range(40):
            text = random_text(rng)
            if end not in text:
                assert again.encode(text, add_special_tokens=False) == ours.encode(text), text
        again.save_pretrained(str(folder / "theirs"))
        back = Tokenizer.load(str(folder / "theirs"))
        assert back.vocabulary() == ours.vocabulary() and back.end_token == ours.end_token
        for _ in range(40):
            text = random_text(rng)
            assert back.encode(text) == ours.encode(text)


def test_transformers_saves_of_our_tokenizer_are_read_back(tiny_tokenizer, tmp_path):
    """transformers 4 writes seven files, transformers 5 only tokenizer.json and a config."""
    transformers = pytest.importorskip("transformers")
    tiny_tokenizer.save(str(tmp_path / "ours"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "again"))
    assert Tokenizer.load(str(tmp_path / "again")) == tiny_tokenizer
    theirs.add_special_tokens({"pad_token": "<PAD>"})
    theirs.save_pretrained(str(tmp_path / "padded"))
    padded = Tokenizer.load(str(tmp_path / "padded"))
    assert padded.vocab_size == 321 and padded.encode("a<PAD>") == [*padded.encode("a"), 320]


def test_gpt2s_tokenizer_json_is_read_whole(gpt2_tokenizer, tmp_path):
    """3.5 million bytes, as transformers 5 writes them."""
    values = tokenizer_json(gpt2_tokenizer)
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    assert len(text.encode()) > 3_000_000
    assert Tokenizer.load(str(tmp_path)) == gpt2_tokenizer


def test_a_folder_without_any_tokenizer_has_no_vocabulary(tmp_path):
    write_json(str(tmp_path / "config.json"), {"vocab_size": 50257})
    assert read_vocabulary(str(tmp_path)) is None
