"""Text in: tokenizer, BPE training, templates, readers, padding and masks."""

import gzip
import hashlib
import json
import random
import time
import zlib

import pytest
import tiktoken
import torch
from fuzzing import FUZZ, MEBIBYTE, Tally, damage, peak_memory, put, reset_peak, write_hole
from helpers import quietly

from minirlhf import data
from minirlhf.data import (Tokenizer, encode_prompt, encode_response, fit_rows, format_prompt,
                           load_function, pad, read_records, response_mask, train_bpe)

STRANGE = ["", " ", "a", "\n\n\n  x \t\n", "don't I'LL we've", "naïve café — “quoted” 你好 🙂👍🏽",
           "\x00\x1c\x7f", "_a_b  __", "1234 5six", "<|endoftext|>", "e\u0301 ² ½ Ⅷ", "x" * 1000,
           "\u3000\u00a0\u200b"]


# ---- tokenizer and its training ------------------------------------------------------------------

def test_the_worked_example_of_training_holds():
    tokenizer = train_bpe(["ab ab abc"], 259)
    assert tokenizer.merges == [(b"a", b"b"), (b" ", b"ab")]
    assert tokenizer.encode("ab ab") == [256, 257]
    assert tokenizer.decode([256, 257, 258]) == "ab ab"
    assert (tokenizer.vocab_size, tokenizer.end_token) == (259, 258)


def test_the_first_ids_are_the_bytes_in_gpt2s_order(tiny_tokenizer):
    assert tiny_tokenizer.encode("!") == [0]
    assert sorted(data.BYTE_ORDER) == list(range(256))
    assert data.spell(b" the\n\xad") == "\u0120the\u010a\u0143"


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
def test_a_million_white_spaces_do_not_kill_the_process(tiny_tokenizer, tmp_path, space):
    """tiktoken panics at them, and its panic is no `Exception`: no program expects it."""
    text = "a" + space * (1_000_000 // len(space)) + "b"
    with pytest.raises(ValueError, match="white space in a row, found 1000000"):
        tiny_tokenizer.encode(text)
    path = write(tmp_path, [PAIR, {**PAIR, "chosen": "a" + " " * 1_000_000 + "b"}])
    with pytest.raises(ValueError, match=":2: expected at most 100000 characters of white space"):
        read_records(path, "prompts")
    allowed = "a" + space * (data.MAX_SPACE // len(space)) + "b"
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(allowed)) == allowed


@pytest.mark.parametrize("unit", ["a", "!", "1", "' ", "a'", " a", "\u0301", "\U0001f642", "\n!",
                                  "\0", "the"])
def test_the_longest_texts_of_a_row_are_encoded_in_seconds(tiny_tokenizer, unit):
    text = unit * (data.MAX_LINE // len(unit.encode()))
    start = time.process_time()
    assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == text
    assert time.process_time() - start < 10


def slow_merges(texts, number):
    """The obvious trainer: count all pairs anew for each merge."""
    words = [[bytes([byte]) for byte in word.encode()] for text in texts
             for word in data.TRAINING_PATTERN.findall(text)]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(data.BYTE_ORDER)}
    merges = []
    for _ in range(number):
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
        assert data.TRAINING_PATTERN.findall(text) == regex.findall(data.GPT2_PATTERN, text)


def test_training_refuses_a_text_that_is_too_small_a_single_string_and_a_small_vocabulary():
    with pytest.raises(ValueError, match="ends at 259, expected 400"):
        train_bpe(["ab ab"], 400)
    with pytest.raises(ValueError, match="one string"):
        train_bpe("ab ab", 259)
    with pytest.raises(ValueError, match="at least 257"):
        train_bpe(["ab"], 256)
    assert train_bpe([], 257).encode("ab") == [64, 65]


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
    assert (tmp_path / "merges.txt").read_bytes() == files[data.GPT2_MERGES_SHA256]
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
    merges_path.write_bytes(b"a" * (data.MAX_MERGES_FILE + 1))
    refused("merges.txt: expected at most")


# ---- templates, rows, padding, masks -------------------------------------------------------------

def test_the_template_strips_and_refuses_an_empty_prompt():
    assert format_prompt(" Hi? ") == "Prompt: Hi?\nResponse:"
    assert format_prompt("{prompt}") == "Prompt: {prompt}\nResponse:"
    with pytest.raises(ValueError, match="empty"):
        format_prompt(" \n")


def test_a_sequence_is_end_token_prompt_space_response_end_token(tiny_tokenizer):
    end = tiny_tokenizer.end_token
    prompt = encode_prompt(tiny_tokenizer, format_prompt("Hi?"))
    response = encode_response(tiny_tokenizer, " Paris.\n")
    assert (prompt[0], response[-1]) == (end, end)
    whole = tiny_tokenizer.encode("Prompt: Hi?\nResponse: Paris.")
    assert prompt[1:] + response[:-1] == whole


def test_prompt_and_response_tokenized_apart_equal_the_whole(tiny_tokenizer):
    rng = random.Random(1)
    for _ in range(300):
        text = "".join(rng.choice("ab1.,'?\n é") for _ in range(rng.randrange(1, 12)))
        if text.strip():
            template = format_prompt(text)
            apart = encode_prompt(tiny_tokenizer, template) + encode_response(tiny_tokenizer, text)
            whole = tiny_tokenizer.encode(template + " " + text.strip())
            assert apart[1:-1] == whole


def test_rows_that_are_too_long_are_dropped_and_counted():
    assert fit_rows([[1, 2], [1, 2, 3]], 2) == ([[1, 2]], 1)
    assert fit_rows([], 2) == ([], 0)


def test_padding_follows_the_worked_example():
    ids, lengths = pad([[5, 6], [7]], 0)
    assert ids.tolist() == [[5, 6], [7, 0]] and lengths.tolist() == [2, 1]
    assert ids.dtype == lengths.dtype == torch.long
    for rows in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            pad(rows, 0)


def test_the_mask_follows_the_worked_example():
    mask = response_mask(torch.tensor([2]), torch.tensor([5]), 6)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [[0, 1, 1, 1, 0]]


def test_the_end_token_that_the_policy_chose_is_in_the_mask_and_its_padding_twin_is_not():
    end = 9
    ids, lengths = pad([[end, 1, 2, end], [end, 1, 3, 4, 5]], end)
    mask = response_mask(torch.tensor([2, 2]), lengths, ids.shape[1])
    actions = ids[:, 1:]
    assert actions[0][mask[0]].tolist() == [2, end]          # the padding is an end token too
    assert actions[1][mask[1]].tolist() == [3, 4, 5]


def test_the_mask_equals_a_slow_reference_on_random_lengths():
    rng = random.Random(2)
    for _ in range(300):
        width = rng.randrange(1, 9)
        lengths = [rng.randrange(1, width + 1) for _ in range(rng.randrange(1, 5))]
        prompt_lengths = [rng.randrange(1, length + 1) for length in lengths]
        mask = response_mask(torch.tensor(prompt_lengths), torch.tensor(lengths), width)
        assert mask.shape == (len(lengths), width - 1)
        for row in range(len(lengths)):
            for column in range(width - 1):
                action_is_response = prompt_lengths[row] <= column + 1 < lengths[row]
                assert mask[row, column].item() == action_is_response


def test_lengths_that_cannot_be_are_refused():
    for prompt_length, length, width in ((0, 3, 4), (4, 3, 5), (2, 6, 5)):
        with pytest.raises(ValueError, match="prompt length"):
            response_mask(torch.tensor([prompt_length]), torch.tensor([length]), width)


# ---- readers: our formats ------------------------------------------------------------------------

def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


PAIR = {"prompt": "Hi?", "chosen": "Yes.", "rejected": "No."}
HH = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
      "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"}
POST = {"id": "t3_1", "subreddit": "cats", "title": "Cat", "post": "It sat.",
        "summary": " Cat sat."}
TLDR_PAIR = {"info": {"id": "t3_1", "subreddit": "cats", "title": "Cat", "post": "It sat."},
             "summaries": [{"text": " Cat.", "policy": "ref", "note": None}, {"text": " Sat cat."}],
             "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {}}


def test_our_formats_come_back_templated(tmp_path):
    rows = [{"prompt": " Hi? ", "response": "Yes."}, {"prompt": "B", "response": "C"}]
    path = write(tmp_path, rows)
    assert read_records(path, "demonstrations") == [
        {"prompt": "Prompt: Hi?\nResponse:", "response": "Yes."},
        {"prompt": "Prompt: B\nResponse:", "response": "C"}]
    assert read_records(path, "prompts", count=1) == [{"prompt": "Prompt: Hi?\nResponse:"}]
    path = write(tmp_path, [PAIR])
    assert read_records(path, "comparisons") == [{**PAIR, "prompt": "Prompt: Hi?\nResponse:"}]
    assert read_records(path, "demonstrations")[0]["response"] == "Yes."


def test_a_gzipped_file_reads_like_a_plain_one_whatever_its_name(tmp_path):
    plain = write(tmp_path, [PAIR] * 3)
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress((tmp_path / "rows.jsonl").read_bytes()))
    assert read_records(str(packed), "comparisons") == read_records(plain, "comparisons")


@pytest.mark.parametrize("line, message", [
    (b"", "expected a JSON object, found a blank line"),
    (b"[1]", "expected a JSON object"),
    (b"{", "not valid JSON"),
    (b'{"prompt": "a\x00b"}', "not valid JSON"),
    (b'{"prompt": "a\xff"}', "not valid JSON"),
    (b'\xef\xbb\xbf{"prompt": "a"}', "byte order mark"),
    (b'{"prompt": "a", "prompt": "b"}', "appears twice"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": 3}', "expected text as 'prompt', found 3"),
    (b'{"prompt": " "}', "found an empty one"),
    (b'{"response": "a"}', "expected 'prompt'"),
    (b'{"prompt": "a", "respnse": "b"}', "found also .*respnse"),
    (b'{"prompt": "a", "response": ""}', "expected text as 'response', found an empty one"),
    (b'{"prompt": "a", "chosen": "b"}', "expected 'rejected'"),
    (b'{"prompt": "a", "chosen": "b", "rejected": "b "}', "two different responses"),
    (b'{"prompt": "' + b"a" * data.MAX_LINE + b'"}', "lines of at most"),
    (b"[" * 100_000, "not valid JSON"),
])
def test_a_bad_line_is_refused_with_file_line_and_reason(tmp_path, line, message):
    path = write(tmp_path, [{"prompt": "Hi?"}, line, {"prompt": "Hi?"}])
    with pytest.raises(ValueError, match=message) as caught:
        read_records(path, "prompts")
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(str(caught.value)) < len(path) + 300


def test_a_file_of_the_wrong_kind_or_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match=":1: expected response for demonstrations"):
        read_records(write(tmp_path, [{"prompt": "a"}]), "demonstrations")
    with pytest.raises(ValueError, match=":1: expected chosen and rejected for comparisons"):
        read_records(write(tmp_path, [{"prompt": "a", "response": "b"}]), "comparisons")
    with pytest.raises(ValueError, match=":1: expected an object with prompt; or chosen, rejected"):
        read_records(write(tmp_path, [{"text": "a"}]), "prompts")
    with pytest.raises(ValueError, match="kind is 'pairs'"):
        read_records(write(tmp_path, [PAIR]), "pairs")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty file"):
        read_records(str(tmp_path / "empty"), "prompts")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_records(str(tmp_path / "absent.jsonl"), "prompts")


def test_a_gzip_bomb_ends_at_the_line_limit_and_a_torn_file_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (64 << 20)))
    with pytest.raises(ValueError, match=":1: expected lines of at most"):
        read_records(str(path), "prompts")
    whole = gzip.compress(b'{"prompt": "a"}\n' * 1000)
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="expected whole gzip data"):
        read_records(str(path), "prompts")


def measured(reader, *arguments):
    """Seconds and growth of memory in MiB that a reader took to refuse its file."""
    before, start = reset_peak(), time.process_time()
    with pytest.raises(ValueError, match="rows.jsonl") as caught:
        reader(*arguments)
    assert len(str(caught.value)) < 1000
    return time.process_time() - start, (peak_memory() - before) / MEBIBYTE


ROW = b'{"prompt": "Hi?"}\n'
GZIP_START = b"\x1f\x8b\x08\x08" + bytes(6)        # a file name follows, up to a NUL byte
DATA_BOMBS = {
    "gzip of blanks": gzip.compress(b" " * (64 << 20)),
    "gzip of one line": gzip.compress(b'{"prompt": "' + b"a" * (64 << 20) + b'"}'),
    "gzip in gzip": gzip.compress(gzip.compress(b" " * (64 << 20)) * 40),
    "gzip of NUL bytes": gzip.compress(ROW + bytes(64 << 20)),
    "rows, then a bomb": gzip.compress(ROW * 1000) + gzip.compress(b"a" * (64 << 20)),
    "empty parts of gzip": gzip.compress(b"") * 200_000,
    "a long gzip name": GZIP_START + b"n" * 5_000_000,
    "empty blocks of gzip": b"\x1f\x8b\x08\x00" + bytes(6) + b"\x00\x00\x00\xff\xff" * 10 ** 6,
    "a row of lists": b'{"prompt": "a", "margin": [' + b"[]," * 340_000 + b"[]]}\n",
    "a row of objects": b'{"prompt": "a", "kind": [' + b"{}," * 340_000 + b"{}]}\n",
    "a row of keys": b'{"prompt": "a"' + b"".join(b',"%x":0' % i for i in range(90_000)) + b"}\n",
    "an enormous number": b'{"prompt": ' + b"9" * 1_000_000 + b"}\n",
    "a deep row": b'{"prompt": ' + b"[" * 1_000_000,
    "NUL bytes": ROW + bytes(10 << 20),
    "one line without an end": b'{"prompt": "' + b"a" * (10 << 20),
    "blank lines": b"\n" * (10 << 20)}


@pytest.mark.parametrize("case", DATA_BOMBS)
def test_bombs_end_soon_in_bounded_memory(tmp_path, case):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(DATA_BOMBS[case])
    seconds, mebibytes = measured(read_records, str(path), "all")
    assert seconds < 10 and mebibytes < 64, (seconds, mebibytes)


def test_gzip_files_over_the_limit_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    """Their size bounds the time: empty parts and long names take time, but give no text."""
    path = tmp_path / "rows.jsonl"
    packed = gzip.compress(ROW * 100)
    path.write_bytes(packed)
    monkeypatch.setattr(data, "MAX_PACKED", len(packed))
    assert len(read_records(str(path), "prompts")) == 100
    monkeypatch.setattr(data, "MAX_PACKED", len(packed) - 1)
    with pytest.raises(ValueError, match="rows.jsonl: expected at most .* bytes of gzip"):
        read_records(str(path), "prompts")


def test_files_of_holes_are_refused_at_once(tmp_path):
    path = tmp_path / "rows.jsonl"
    for head in (b"", ROW, b"\x1f\x8b\x08\x08"):
        if not write_hole(path, head, 10 ** 12):
            pytest.skip("no files with holes here")
        seconds, mebibytes = measured(read_records, str(path), "prompts")
        assert seconds < 2 and mebibytes < 16, (head, seconds, mebibytes)


# ---- readers: published formats ------------------------------------------------------------------

def test_only_the_last_answer_of_a_dialogue_is_response(tmp_path, tiny_tokenizer):
    record = read_records(write(tmp_path, [HH]), "comparisons")[0]
    assert record == {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
                      "chosen": " d", "rejected": " e"}
    prompt = encode_prompt(tiny_tokenizer, record["prompt"])
    response = encode_response(tiny_tokenizer, record["chosen"])
    ids, lengths = pad([prompt + response], tiny_tokenizer.end_token)
    mask = response_mask(torch.tensor([len(prompt)]), lengths, ids.shape[1])
    masked = ids[:, 1:][mask].tolist()
    assert tiny_tokenizer.decode(masked, skip_end=False) == " d<|endoftext|>"


def test_unusable_rows_of_published_files_are_dropped_counted_and_printed(tmp_path, capsys):
    start = "\n\nHuman: a\n\nAssistant:"
    rows = [HH, {"chosen": start + " b", "rejected": start + "b "},
            {"chosen": start, "rejected": start},
            {"chosen": start + " b", "rejected": "\n\nHuman: z\n\nAssistant: b"},
            {"chosen": start + " b\n\nHuman: c", "rejected": start + " d"},
            {"chosen": "b", "rejected": "c"}]
    records = read_records(write(tmp_path, rows), "comparisons")
    assert len(records) == 1 and records.dropped.total() == 5
    assert records.dropped == {"two equal responses": 1, "an empty response": 1,
                               "dialogues that part before the last answer": 1,
                               "a Human turn after the last answer": 1,
                               "no Human and Assistant turns": 1}
    assert "1 rows read, dropped 1 with two equal responses" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected usable rows, found none"):
        read_records(write(tmp_path, rows[1:]), "comparisons")
    with pytest.raises(ValueError, match=":2: expected text as 'chosen'"):
        read_records(write(tmp_path, [HH, {"chosen": 1, "rejected": "a"}]), "comparisons")


def test_the_real_hh_file_reads_with_nine_rows_dropped(shared_data, gpt2_tokenizer):
    path = str(shared_data / "hh-harmless-base-test.jsonl.gz")
    records = read_records(path, "comparisons")
    assert len(records) == 2303
    assert records.dropped == {"an empty response": 4,
                               "dialogues that part before the last answer": 5}
    for kind in ("demonstrations", "prompts"):
        assert len(read_records(path, kind)) == 2303
    originals = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            originals[row["chosen"]] = row["rejected"]
    for record in records:
        rejected = originals[record["prompt"] + record["chosen"]]
        assert rejected == record["prompt"] + record["rejected"]
    for record in records[:200]:
        ids = encode_prompt(gpt2_tokenizer, record["prompt"])
        ids += encode_response(gpt2_tokenizer, record["chosen"])
        whole = record["prompt"] + " " + record["chosen"].strip()
        assert gpt2_tokenizer.decode(ids) == whole
        assert ids[1:-1] == gpt2_tokenizer.encode(whole)


def test_tldr_posts_and_comparisons_read_as_published(tmp_path):
    prompt = "SUBREDDIT: r/cats\n\nTITLE: Cat\n\nPOST: It sat.\n\nTL;DR:"
    path = write(tmp_path, [POST, {**POST, "summary": " "}])
    assert read_records(path, "demonstrations") == [{"prompt": prompt, "response": " Cat sat."}]
    assert read_records(path, "prompts").dropped == {"an empty response": 1}
    same = {**TLDR_PAIR, "summaries": [{"text": "a"}, {"text": " a"}]}
    path = write(tmp_path, [TLDR_PAIR, {**TLDR_PAIR, "choice": 0}, same], "batch3.json")
    records = read_records(path, "comparisons")
    assert records == [{"prompt": prompt, "chosen": " Sat cat.", "rejected": " Cat."},
                       {"prompt": prompt, "chosen": " Cat.", "rejected": " Sat cat."}]
    assert records.dropped == {"two equal responses": 1}


@pytest.mark.parametrize("change", [
    {"choice": 2}, {"choice": True}, {"choice": None}, {"info": None}, {"info": {"article": "a"}},
    {"summaries": [{"text": "a"}]}, {"summaries": ["a", "b"]}, {"summaries": [{"text": 1}, {}]}])
def test_a_wrong_tldr_comparison_is_refused_by_line(tmp_path, change):
    path = write(tmp_path, [TLDR_PAIR, {**TLDR_PAIR, **change}])
    with pytest.raises(ValueError, match="rows.jsonl:2: expected"):
        read_records(path, "comparisons")


# ---- readers: functions --------------------------------------------------------------------------

def make_records(count, seed, model):
    """A source of records, named by the tests below."""
    return [{"prompt": f"{seed} {number} {model}", "response": "ok"} for number in range(count)]


def make_bad_records(count, seed, model):
    """A source with a mistake in its second record."""
    return [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": " "}]


def test_a_function_is_named_by_module_and_name():
    assert load_function(f"{__name__}:make_records") is make_records
    records = read_records(f"{__name__}:make_records", "prompts", count=2, seed=7, model="m")
    assert records == [{"prompt": f"Prompt: 7 {number} m\nResponse:"} for number in (0, 1)]
    with pytest.raises(ValueError, match="make_bad_records: record 2: expected text as 'response'"):
        read_records(f"{__name__}:make_bad_records", "demonstrations", count=2)
    with pytest.raises(ValueError, match="0, which means all, is for files only"):
        read_records(f"{__name__}:make_records", "demonstrations", count=0)


@pytest.mark.parametrize("spec", [
    "nowhere:f", "minirlhf.nowhere:f", "minirlhf.data:nothing", "minirlhf.data:TEMPLATE", "a:b:c",
    "C:\\rows.jsonl", ":", "os.system('x'):f"])
def test_a_function_that_is_not_there_is_refused_by_name(spec):
    with pytest.raises(ValueError):
        read_records(spec, "prompts")


# ---- bad files by the thousand -------------------------------------------------------------------

INSERTED = [b"\n", b"\x00", b"\xff", b'"', b"{", b"[", b"null", b"1e999", b"\\ud800", b"\r",
            b"\\u0000", b"\xef\xbb\xbf", b',"prompt": "b"', b"\xc0\x80", b"\xed\xa0\x80",
            b"\x1f\x8b\x08"]
ORIGINALS = [[PAIR, PAIR], [{"prompt": "a", "response": "b"}] * 3,
             [{"prompt": "\u00e9\U0001f642"}] * 2, [HH, HH], [POST, POST],
             [TLDR_PAIR, {**TLDR_PAIR, "choice": 0}]]


def plain_gzip(content: bytes) -> tuple[bytes, bytes]:
    """The text of the first part of a gzip file, and what follows it. Source: RFC 1952."""
    flags, at = content[3], 10
    if flags & 4:
        at += 2 + int.from_bytes(content[at:at + 2], "little")
    for flag in (8, 16):                             # a file name, a comment
        if flags & flag:
            at = content.index(b"\0", at) + 1
    at += 2 if flags & 2 else 0
    part = zlib.decompressobj(-15)
    text = part.decompress(content[at:])
    assert part.eof and zlib.crc32(text) == int.from_bytes(part.unused_data[:4], "little")
    return text, part.unused_data[8:].lstrip(b"\0")


def plain_reading(content: bytes) -> list[dict]:
    """What a file holds, by the standard library alone and without any check."""
    text = b""
    while content[:2] == b"\x1f\x8b":                # a gzip file may have several parts
        unpacked, content = plain_gzip(content)
        text += unpacked
    lines = (text + content).decode().split("\n")
    return [json.loads(line) for line in lines if line]


def odd_row(rng: random.Random, row: dict) -> dict:
    """The row with one of its texts changed: other letters in it, or something else entirely."""
    row = json.loads(json.dumps(row))
    owner = rng.choice([row, row, row.get("info", row), *row.get("summaries", [])])
    keys = [key for key, value in owner.items() if isinstance(value, str)]
    if keys and rng.random() < 0.5:
        odd = rng.choice(["\0", "\u2028", "\x85", "\r", "\U0010ffff", " ", "{}", "\n\nHuman:",
                          "\n\nAssistant:", "", "\ufeff"])
        key = rng.choice(keys)
        at = rng.randint(0, len(owner[key]))
        owner[key] = rng.choice([owner[key][:at] + odd + owner[key][at:], odd, owner[key][at:]])
    return row


def texts_in(value) -> list[str]:
    """All texts inside a value from JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for item in value for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def check_records(records, content: bytes, kind: str) -> None:
    """Every row became one record or was dropped, and no text is there that the row has not."""
    rows = plain_reading(content)
    assert len(records) + records.dropped.total() == len(rows)
    if not records.dropped:
        for record, row in zip(records, rows):
            assert set(record) == set(data.FIELDS[kind])
            texts = texts_in(row)
            for text in [text for key, text in record.items() if key != "prompt"]:
                assert any(text and text in whole for whole in texts), (text, row)
            if "info" not in row and "post" not in row:
                core = record["prompt"].removeprefix("Prompt: ").removesuffix("\nResponse:")
                assert any(core.strip() in whole for whole in texts), (core, row)


def test_mutated_data_files_end_in_the_rows_they_hold_or_a_value_error(tmp_path):
    rng, path, tally = random.Random(3), tmp_path / "rows.jsonl", Tally("JSONL, plain and gzipped")
    for case in range(max(1500, FUZZ)):
        rows = [odd_row(rng, row) for row in rng.choice(ORIGINALS)]
        ascii_only = rng.random() < 0.5
        content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()
        if case % 4 == 0:                            # damage inside sound gzip
            content = gzip.compress(damage(rng, content, INSERTED), compresslevel=1)
        if case % 4 == 1:                            # damage to the gzip
            content = damage(rng, gzip.compress(content, rng.choice([0, 6])), INSERTED)
        if case % 4 == 2:
            content = damage(rng, content, INSERTED)
        put(path, content)
        kind = rng.choice(["prompts", "prompts", "demonstrations", "comparisons"])
        records = quietly(tally.attempt, str(path), read_records, str(path), kind)
        if records is not None:
            check_records(records, content, kind)
    tally.finish()
    assert min(tally.read, tally.refused) > 0.1 * (tally.read + tally.refused)


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
        found = tally.attempt(str(tmp_path), Tokenizer.load, str(tmp_path))
        if found is not None:
            assert found.merges == tiny_tokenizer.merges
            if which == 0:
                spelled = [(data.spell(left), data.spell(right)) for left, right in found.merges]
                assert simple_merges(content) == spelled
            else:
                assert json.loads(content) == json.loads(originals[1])
        put(paths[which], originals[which])
    tally.finish()
    assert tally.refused > 10 * tally.read


def test_mutated_merges_without_their_vocabulary_are_read_as_they_stand(tiny_tokenizer, tmp_path):
    """`parse_merges` and the tokenizer alone, where no second file would notice a slip."""
    tiny_tokenizer.save(str(tmp_path))
    original = (tmp_path / "merges.txt").read_bytes()
    rng, tally = random.Random(5), Tally("merges.txt alone")
    for _ in range(max(400, FUZZ // 4)):
        content = damage(rng, original, INSERTED + [b"a b\n", b" ", b"\xc4\xa0"])
        found = tally.attempt("merges.txt", load_merges, content)
        if found is not None:
            spelled = [(data.spell(left), data.spell(right)) for left, right in found.merges]
            assert simple_merges(content) == spelled
            assert found.vocab_size == 257 + len(spelled)
            assert found.decode(found.encode("The capital of France!")) == "The capital of France!"
    tally.finish()
    assert tally.read > 20


def load_merges(content: bytes) -> Tokenizer:
    return Tokenizer(data.parse_merges(content, "merges.txt"), "merges.txt")


def test_the_largest_tokenizer_files_end_soon_in_bounded_memory(tmp_path):
    """The most merges that fit: 256 * 256 pairs of bytes, then triples; no vocab.json fits them."""
    names = list(data.NAME_BYTE)
    lines = [f"{a} {b}" for a in names for b in names]
    lines += [f"{a}{b} {c}" for c in names for a in names for b in names]
    content = "\n".join(lines).encode()[:data.MAX_MERGES_FILE]
    (tmp_path / "merges.txt").write_bytes(content[:content.rindex(b"\n") + 1])
    (tmp_path / "vocab.json").write_bytes(b'{"a":[' + b"{}," * 1_390_000 + b"{}]}")
    before, start = reset_peak(), time.process_time()
    with pytest.raises(ValueError, match="vocab.json"):
        Tokenizer.load(str(tmp_path))
    assert time.process_time() - start < 20
    assert peak_memory() - before < 300 * MEBIBYTE


# ---- what a file holds ---------------------------------------------------------------------------

def test_the_label_table_marks_the_response_and_its_end_token(tiny_tokenizer):
    prompt = encode_prompt(tiny_tokenizer, format_prompt("Hi?"))
    table = data.label_table(tiny_tokenizer, prompt, encode_response(tiny_tokenizer, "is"))
    marked = [line.split("  ")[-1] for line in table.split("\n") if " yes " in line]
    assert marked == ["' is'", "'<|endoftext|>'"]


def test_the_command_shows_counts_drops_lengths_and_labels(tmp_path, tiny_tokenizer, capsys):
    tiny_tokenizer.save(str(tmp_path / "tokenizer"))
    same = {key: HH["chosen"] for key in HH}
    path = write(tmp_path, [HH, same])
    cfg = data.DataConfig(data=path, kind="all", tokenizer=str(tmp_path / "tokenizer"), show=1)
    records = data.main(cfg)
    out = capsys.readouterr().out
    assert len(records) == 1
    for text in ("dropped 1 with two equal responses", "1 rows", "tokens in prompt: shortest",
                 "tokens in rejected: shortest 3, median 3", "chosen:\nposition"):
        assert text in out
    for wrong in ({"kind": "pairs"}, {"show": -1}):
        with pytest.raises(ValueError):
            data.DataConfig(**wrong)
