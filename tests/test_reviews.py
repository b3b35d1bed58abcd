"""Real human judgements: reading, splitting, comparisons, the files, the whole run."""

import json
import random
from collections import Counter

import pytest
from helpers import quietly

from minirlhf.data import read_records
from minirlhf.engine.training import random_stream
from minirlhf.experiments import reviews
from minirlhf.experiments.review_figures import FREE, Sentence, whole

TINY = reviews.Sizes(vocab_size=320, n_embd=32, n_layer=1, context=48, pretrain_steps=20, pairs=2,
                     iterations=2, max_new_tokens=12, answers=20)
GOOD, BAD = ["great", "lovely", "fine"], ["dull", "awful", "poor"]


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def synthetic(count: int = 360, seed: int = 0) -> str:
    """Ratings as in the published file: openings that many share, and words that decide."""
    rng, lines = random.Random(seed), []
    for number in range(count):
        words = [rng.choice(rng.choice([GOOD, BAD])) for _ in range(4)]
        rating = sum(1 if word in GOOD else -1 for word in words) + rng.uniform(-0.5, 0.5)
        opening = rng.choice(["The film is", "A story", f"Number{number}"])
        text = f"{opening} {' '.join(words)} in scene {number}."
        lines.append(f"{number}\t{max(-4, min(4, rating))}\t{text}\n")
    return "".join(lines)


# ---- reading ------------------------------------------------------------------------------------

def test_a_header_windows_lines_entities_and_repeats_are_understood(tmp_path):
    text = ("id\tmean_rating\ttext\r\n1\t2.5\tLovely &amp; Amazing\r\n2\t-1\ta   dull\u00a0one\r\n"
            "3\t0\tlovely & amazing\r\n")
    expected = [Sentence("Lovely & Amazing", 2.5), Sentence("a dull one", -1.0)]
    assert reviews.read_ratings(write(tmp_path / "header.txt", text)) == expected
    without = text.split("\n", 1)[1].removesuffix("\r\n")
    assert reviews.read_ratings(write(tmp_path / "plain.txt", without)) == expected


@pytest.mark.parametrize("line, message", [
    ("2\t1.5", "found 2 fields"),
    ("2\t1.5\tgood\tfun", "found 4 fields"),
    ("", "found 1 fields"),
    ("2\tgood\tfun", "expected a mean rating from -4 to 4, found 'good'"),
    ("2\t4.5\tfun", "expected a mean rating from -4 to 4, found '4.5'"),
    ("2\tnan\tfun", "expected a mean rating from -4 to 4, found 'nan'"),
    ("2\t1.5\t \u00a0", "expected text, found none")])
def test_a_bad_line_is_refused_with_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.txt", f"1\t0\tfine\n{line}\n3\t0\tfine too\n")
    with pytest.raises(ValueError) as caught:
        reviews.read_ratings(path)
    assert str(caught.value).startswith(f"{path}:2: expected") and message in str(caught.value)


def test_a_missing_file_says_where_to_get_it_and_other_encodings_are_refused_by_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="hutto_ICWSM_2014.tar.gz"):
        reviews.read_ratings(str(tmp_path / "none.txt"))
    path = tmp_path / "latin.txt"
    path.write_bytes("1\t0\tfine\n2\t0\tclich\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt:2: expected UTF-8 text, found 0xe9"):
        reviews.read_ratings(str(path))


# ---- splitting and comparisons ------------------------------------------------------------------

def test_openings_follow_the_worked_example():
    assert reviews.beginnings("It is a joy!") == ["It is a", "It is", "It"]
    assert reviews.beginnings("Joy!") == reviews.beginnings("... a joy") == []
    texts = [f"It is fun {number}" for number in range(9)] + ["It was fun", "Joy"]
    assert reviews.find_openings(texts) == {"It"}
    assert reviews.find_openings(texts + ["It is all"]) == {"It", "It is"}
    sentence = reviews.cut(Sentence("It is a joy!", 1.0), {"It", "It is"})
    assert (sentence.opening, sentence.rest) == ("It is", "a joy!")
    assert reviews.cut(Sentence("It", 1.0), {"It"}).opening == FREE


def check_split(sentences: list[Sentence], parts: dict[str, list[Sentence]]) -> None:
    texts = [sentence.text for part in parts.values() for sentence in part]
    assert sorted(texts) == sorted(sentence.text for sentence in sentences)
    assert len(set(text.lower() for text in texts)) == len(texts)
    for part in parts.values():
        for sentence in part:
            assert whole(sentence.opening, sentence.rest) == sentence.text


def test_no_sentence_is_in_two_parts_and_nothing_is_lost(tmp_path):
    sentences = reviews.read_ratings(write(tmp_path / "ratings.txt", synthetic()))
    parts = reviews.split_sentences(sentences, seed=3)
    check_split(sentences, parts)
    assert [len(part) for part in parts.values()] == [162, 144, 54]
    assert parts == reviews.split_sentences(sentences, seed=3)
    assert parts != reviews.split_sentences(sentences, seed=4)


def test_pairs_share_an_opening_differ_by_the_margin_and_come_once():
    sentences = [Sentence(f"{opening} {i}", i / 4, opening, str(i)) for opening in ("A", "It is")
                 for i in range(12)]
    pairs = reviews.make_pairs(sentences + [Sentence("Alone", 4.0, "...", "Alone")], 3,
                               random_stream(0))
    assert all(pair.better.opening == pair.worse.opening for pair in pairs)
    assert all(pair.better.rating - pair.worse.rating >= reviews.MARGIN for pair in pairs)
    assert len(set(pairs)) == len(pairs)
    uses = Counter(sentence for pair in pairs for sentence in (pair.better, pair.worse))
    assert set(uses) == set(sentences) and min(uses.values()) >= 3
    with pytest.raises(ValueError, match="expected more sentences"):
        reviews.make_pairs(sentences[:3], 3, random_stream(0))


def test_the_real_file_reads_splits_and_makes_pairs(shared_data):
    path = shared_data / "movie-review-ratings.tsv"
    if not path.exists():
        pytest.skip("no movie-review-ratings.tsv in the folder of test data")
    sentences = reviews.read_ratings(str(path))
    assert len(sentences) == 10_603                      # 10,605 less two that come twice
    parts = reviews.split_sentences(sentences, seed=0)
    check_split(sentences, parts)
    share = Counter(sentence.opening for sentence in parts["test"])
    assert share["The"] > 50 and share[FREE] < 0.5 * len(parts["test"])
    pairs = reviews.make_pairs(parts["test"], 4, random_stream(0))
    assert len(pairs) > 4000


# ---- the whole run ------------------------------------------------------------------------------

def test_the_run_goes_through_all_stages_and_repeats_from_its_seed(tmp_path, capsys):
    data = write(tmp_path / "ratings.txt", synthetic())
    reports = []
    for name in ("one", "two"):
        cfg = reviews.ReviewsConfig(data=data, out=str(tmp_path / name))
        reports.append(reviews.main(cfg, TINY))
    printed = capsys.readouterr().out
    assert "reward model A" in printed and "after PPO" in printed
    saved = json.loads((tmp_path / "one" / "report.json").read_text(encoding="utf-8"))
    for report in (saved, *reports):
        assert set(report.pop("seconds")) >= {"pretrain", "sft", "PPO"}
    assert saved == reports[0] == reports[1]
    assert saved["accuracy"]["words A"]["mean"] > 0.8
    assert abs(saved["policies"]["sft"]["kl_ref"]["mean"]) < 1e-5
    assert len(saved["policies"]["ppo"]["texts"]) == 20


def test_the_files_serve_the_ordinary_readers_and_parts_do_not_leak(tmp_path):
    data = write(tmp_path / "ratings.txt", synthetic())
    cfg = reviews.ReviewsConfig(data=data, out=str(tmp_path / "out"))
    parts = reviews.split_sentences(reviews.read_ratings(data), cfg.seed)
    pairs = reviews.write_files(parts, cfg, TINY)

    def rests(name: str, kind: str, fields: tuple) -> set:
        records = quietly(read_records, str(tmp_path / "out" / name), kind)
        return {(record["prompt"], record[field]) for record in records for field in fields}

    demonstrations = rests("demonstrations.jsonl", "demonstrations", ("response",))
    a, b, test = (rests(f"comparisons_{name}.jsonl", "comparisons", ("chosen", "rejected"))
                  for name in ("a", "b", "test"))
    assert a | b <= demonstrations and not a & b and not test & demonstrations
    assert len(test) == len({sentence for pair in pairs for sentence in (pair.better, pair.worse)})
    text = (tmp_path / "out" / "text.txt").read_text(encoding="utf-8").split("\n\n")
    assert sorted(text) == sorted(s.text for name in ("a", "b") for s in parts[name])
    prompts = rests("held_out_prompts.jsonl", "prompts", ("prompt",))
    assert prompts <= rests("prompts.jsonl", "prompts", ("prompt",))
