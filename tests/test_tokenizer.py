"""GPT-2's byte-level BPE: ids and text, how it is learned, its files."""

import hashlib
import itertools
import json
import random
import time

import pytest
import tiktoken
from fuzzing import FUZZ, INSERTED, MEBIBYTE, Tally, damage, peak_memory, put, reset_peak
from networks import small_model, text_model

from minirlhf import tokenizer as bpe
from minirlhf.files import merges as merge_files
from minirlhf.files.formats import MAX_SPACE
from minirlhf.files.lines import MAX_LINE
from minirlhf.tokenizer import Tokenizer, load_tokenizer, train_bpe

STRANGE = ["", " ", "a", "\n\n\n  x \t\n", "don't I'LL we've", "naïve café — “quoted” 你好 🙂👍🏽",
           "\x00\x1c\x7f", "_a_b  __", "1234 5six", "<|endoftext|>", "e\u0301 ² ½ Ⅷ", "x" * 1000,
           "\u3000\u00a0\u200b"]


# ---- text to ids and back ------------------------------------------------------------------------

def test_the_first_ids_are_the_bytes_in_gpt2s_order(tiny_tokenizer):
    assert tiny_tokenizer.encode("!") == [0]
    assert sorted(bpe.BYTE_ORDER) == list(range(256))
    assert bpe.spell(b" the\n\xad") == "\u0120the\u010a\u0143"


def test_every_text_survives_encoding_and_decoding(tiny_tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.randrange(rng.choice([128, 0xd800]))) for _ in range(30))
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text
    for text in STRANGE:
        ids = tiny_tokenizer.encode(text)
        assert tiny_tokenizer.decode(ids) == text
        assert all(0 <= token < tiny_tokenizer.end_token for token in ids)


def test_the_end_token_is_never_encoded_from_text_and_is_left_out_of_decoded_text(tiny_tokenizer):
    end = tiny_tokenizer.end_token
    assert end not in tiny_tokenizer.encode("a<|endoftext|>b")
    ids = [end] + tiny_tokenizer.encode("hi") + [end]
    assert tiny_tokenizer.decode(ids) == "hi"
    assert tiny_tokenizer.decode(ids, skip_end=False) == "<|endoftext|>hi<|endoftext|>"


def test_half_a_character_decodes_to_a_replacement_and_a_wrong_id_is_refused(tiny_tokenizer):
    assert tiny_tokenizer.decode(tiny_tokenizer.encode("é")[:1]) == "\ufffd"
    for token in (-1, tiny_tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tiny_tokenizer.decode([token])


@pytest.mark.parametrize("space", [" ", "\n", "\t ", "\u3000"])
def test_a_million_white_spaces_do_not_kill_the_process(tiny_tokenizer, space):
    """tiktoken panics at them, and its panic is no `Exception`: no program expects it."""
    text = "a" + space * (1_000_000 // len(space)) + "b"
    with pytest.raises(ValueError, match="white space in a row, found 1000000"):
        tiny_tokenizer.encode(text)
    allowed = "a" + space * (MAX_SPACE // len(space)) + "b"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(allowed)) == allowed


@pytest.mark.parametrize("unit", ["a", "!", "1", "' ", "a'", " a", "\u0301", "\U0001f642", "\n!",
                                  "\0", "the"])
def test_the_longest_texts_of_a_row_are_encoded_in_seconds(tiny_tokenizer, unit):
    text = unit * (MAX_LINE // len(unit.encode()))
    start = time.process_time()
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text
    assert time.process_time() - start < 10


# ---- how it is learned ---------------------------------------------------------------------------

def test_the_worked_example_of_training_holds():
    tokenizer = train_bpe(["ab ab abc"], 259)
    assert tokenizer.merges == [(b"a", b"b"), (b" ", b"ab")]
    assert tokenizer.encode("ab ab") == [256, 257]
    assert tokenizer.decode([256, 257, 258]) == "ab ab"
    assert (tokenizer.vocab_size, tokenizer.end_token) == (259, 258)


def slow_merges(texts, count):
    """The obvious trainer: count all pairs anew for each merge."""
    words = [[bytes([byte]) for byte in word.encode()] for text in texts
             for word in bpe.TRAINING_PATTERN.findall(text)]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(bpe.BYTE_ORDER)}
    merges = []
    for _ in range(count):
        counts = {}
        for word in words:
            for pair in zip(word, word[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], ranks[pair[0]], ranks[pair[1]]))
        merges.append(best)
        ranks[best[0] + best[1]] = len(ranks)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at:at + 2] = [best[0] + best[1]]
                at += 1
    return merges


def test_training_equals_a_slow_reference_on_random_text():
    for seed in range(12):
        rng = random.Random(seed)
        texts = ["".join(rng.choice("aab c") for _ in range(120)) for _ in range(4)]
        assert train_bpe(texts, 257 + 25).merges == slow_merges(texts, 25)


def test_the_training_cut_equals_gpt2s_cut_on_ascii():
    regex = pytest.importorskip("regex")
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choice([chr(rng.randrange(128)), *"ab 1_'s\n\t"]) for _ in range(20))
        assert bpe.TRAINING_PATTERN.findall(text) == regex.findall(bpe.GPT2_PATTERN, text)


def test_training_refuses_a_text_that_is_too_small_a_single_string_and_a_small_vocabulary():
    with pytest.raises(ValueError, match="ends at 259, expected 400"):
        train_bpe(["ab ab"], 400)
    with pytest.raises(ValueError, match="one string"):
        train_bpe("ab ab", 259)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["ab"], 256)
    assert train_bpe([], 257).encode("ab") == [64, 65]


# ---- its files -----------------------------------------------------------------------------------

def test_a_saved_tokenizer_loads_to_the_same_ids(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(str(tmp_path))
    loaded = Tokenizer.load(str(tmp_path))
    assert loaded.merges == tiny_tokenizer.merges
    for text in STRANGE:
        assert loaded.encode(text) == tiny_tokenizer.encode(text)
    merges = tmp_path / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))      # as git may check it out
    assert Tokenizer.load(str(tmp_path)).merges == tiny_tokenizer.merges


def test_transformers_gives_the_same_ids_from_the_saved_folder(tiny_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_tokenizer.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in STRANGE + ["The capital of France isn't Rome.\n\nIt's Paris!  "]:
        if text != "<|endoftext|>":          # transformers reads it as the end token, we never do
            assert theirs.encode(text) == tiny_tokenizer.encode(text), text
    assert len(theirs) == tiny_tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tiny_tokenizer.end_token
    assert theirs.model_max_length == 1024


def test_gpt2s_tokenizer_is_tiktokens_and_is_saved_as_published(gpt2_tokenizer, tiktoken_cache,
                                                                tmp_path):
    published = tiktoken.get_encoding("gpt2")
    for text in STRANGE:
        assert gpt2_tokenizer.encode(text) == published.encode_ordinary(text)
    known = gpt2_tokenizer.encode("Alan Turing theorized that computers would one day become")
    assert known == [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert (gpt2_tokenizer.vocab_size, gpt2_tokenizer.end_token) == (50257, 50256)
    gpt2_tokenizer.save(str(tmp_path))
    contents = [path.read_bytes() for path in tiktoken_cache.iterdir()]
    files = {hashlib.sha256(content).hexdigest(): content for content in contents}
    assert (tmp_path / "merges.txt").read_bytes() == files[bpe.GPT2_MERGES_SHA256]
    encoder = files["196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"]
    assert json.loads((tmp_path / "vocab.json").read_bytes()) == json.loads(encoder)


def test_a_folder_without_tokenizer_gets_gpt2s_if_its_config_has_that_size(gpt2_tokenizer,
                                                                           tmp_path):
    (tmp_path / "config.json").write_text('{"vocab_size": 50257}', encoding="utf-8")
    assert Tokenizer.load(str(tmp_path)).merges == gpt2_tokenizer.merges
    (tmp_path / "config.json").write_text('{"vocab_size": 50258}', encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="vocab.json does not exist"):
        Tokenizer.load(str(tmp_path))


def test_gpt2s_tokenizer_without_cache_and_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")       # nothing listens there
    with pytest.raises(FileNotFoundError, match="set TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


def test_tokenizer_files_that_contradict_each_other_are_refused_by_name(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(str(tmp_path))
    vocab_path, merges_path = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocab, merges = json.loads(vocab_path.read_text(encoding="utf-8")), merges_path.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(str(tmp_path))
        vocab_path.write_text(json.dumps(vocab), encoding="utf-8")
        merges_path.write_bytes(merges)

    for change in ({"!": 1}, {"new": 320}, {"<|endoftext|>": 5}, {"!": "0"}, {"!": None}):
        vocab_path.write_text(json.dumps({**vocab, **change}), encoding="utf-8")
        refused("vocab.json: expected token")
    for key in ("!", "<|endoftext|>"):
        less = {token: rank for token, rank in vocab.items() if token != key}
        vocab_path.write_text(json.dumps(less), encoding="utf-8")
        refused("vocab.json: expected token")
    merges_path.write_bytes(merges + b"zz z\n")
    refused("merges.txt: merge 64 joins .* two earlier tokens")
    merges_path.write_bytes(merges + merges.split(b"\n")[1] + b"\n")
    refused("merges.txt: merge 64 makes .* a second time")
    for line in (b"a b c", b"a", b"", "\u65e5 a".encode(), b"a  b"):
        merges_path.write_bytes(merges + line + b"\na b\n")
        refused("merges.txt:65: expected two tokens")
    merges_path.write_bytes(merges + b"\xff")
    refused("merges.txt: not UTF-8")
    merges_path.write_bytes(b"a" * (merge_files.MAX_MERGES_FILE + 1))
    refused("merges.txt: expected at most")


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save(str(tmp_path))
    assert load_tokenizer(str(tmp_path), text_model(tiny_tokenizer)).vocab_size == 320
    with pytest.raises(ValueError, match="the tokenizer has 320 tokens, config.json says 11") as e:
        load_tokenizer(str(tmp_path), small_model())
    assert str(tmp_path) in str(e.value)


# ---- files by the thousand -----------------------------------------------------------------------

def simple_merges(content: bytes) -> list[tuple[str, str]]:
    """The merges of a merges.txt as it stands there."""
    lines = content.decode().replace("\r\n", "\n").split("\n")
    if lines[0].startswith("#version"):
        lines = lines[1:]
    return [tuple(line.split(" ")) for line in lines if line]


def test_mutated_tokenizer_files_end_in_that_tokenizer_or_a_value_error(tiny_tokenizer, tmp_path):
    """Each file is checked against the other, so a change of one is never accepted silently."""
    tiny_tokenizer.save(str(tmp_path))
    paths = [tmp_path / "merges.txt", tmp_path / "vocab.json"]
    originals = [path.read_bytes() for path in paths]
    rng, tally = random.Random(4), Tally("merges.txt and vocab.json")
    for case in range(max(400, FUZZ // 8)):
        which = case % 2
        content = damage(rng, originals[which], INSERTED + [b"a b\n", b" ", b"\xc4\xa0"])
        put(paths[which], content)
        loaded = tally.attempt(str(tmp_path), Tokenizer.load, str(tmp_path))
        if loaded is not None:
            assert loaded.merges == tiny_tokenizer.merges
            if which == 0:
                spelled = [(bpe.spell(left), bpe.spell(right)) for left, right in loaded.merges]
                assert simple_merges(content) == spelled
            else:
                assert json.loads(content) == json.loads(originals[1])
        put(paths[which], originals[which])
    tally.finish()
    assert tally.refused > 10 * tally.read


def load_merges(content: bytes) -> Tokenizer:
    return Tokenizer(bpe.parse_merges(content, "merges.txt"), "merges.txt")


def test_mutated_merges_without_their_vocabulary_are_read_as_they_stand(tiny_tokenizer, tmp_path):
    """`parse_merges` and the tokenizer alone, where no second file would notice a slip."""
    tiny_tokenizer.save(str(tmp_path))
    original = (tmp_path / "merges.txt").read_bytes()
    rng, tally = random.Random(5), Tally("merges.txt alone")
    for _ in range(max(400, FUZZ // 4)):
        content = damage(rng, original, INSERTED + [b"a b\n", b" ", b"\xc4\xa0"])
        loaded = tally.attempt("merges.txt", load_merges, content)
        if loaded is not None:
            spelled = [(bpe.spell(left), bpe.spell(right)) for left, right in loaded.merges]
            assert simple_merges(content) == spelled
            assert loaded.vocab_size == 257 + len(spelled)
            text = "The capital of France!"
            assert loaded.decode(loaded.encode(text)) == text
    tally.finish()
    assert tally.read > 20


def test_the_largest_tokenizer_files_end_soon_in_bounded_memory(tmp_path):
    """The most merges that fit: 256 * 256 pairs of bytes, then triples; no vocab.json fits them."""
    names = list(merge_files.NAME_BYTE)
    pairs = (f"{a} {b}" for a in names for b in names)
    triples = (f"{a}{b} {c}" for c in names for a in names for b in names)
    lines = itertools.islice(itertools.chain(pairs, triples), merge_files.MAX_MERGES_FILE // 4)
    content = "\n".join(lines).encode()
    assert len(content) > merge_files.MAX_MERGES_FILE
    content = content[:merge_files.MAX_MERGES_FILE]
    (tmp_path / "merges.txt").write_bytes(content[:content.rindex(b"\n") + 1])
    (tmp_path / "vocab.json").write_bytes(b'{"a":[' + b"{}," * 1_390_000 + b"{}]}")
    before, start = reset_peak(), time.process_time()
    with pytest.raises(ValueError, match="vocab.json"):
        Tokenizer.load(str(tmp_path))
    assert time.process_time() - start < 20
    assert peak_memory() - before < 300 * MEBIBYTE
