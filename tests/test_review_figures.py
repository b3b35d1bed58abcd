"""What is measured on real human judgements: the word baseline, accuracies and their intervals."""

import math
import random

import numpy as np
import pytest

from minirlhf.experiments.review_figures import (
    Pair,
    Sentence,
    outcomes,
    pair_figures,
    word_ratings,
    word_score,
)


def test_the_word_baseline_follows_the_worked_example():
    sentences = [Sentence("good fun", 3.0), Sentence("Good, good grief!", -1.0)]
    assert word_ratings(sentences, pull=0) == {"good": 1.0, "fun": 3.0, "grief": -1.0}
    assert word_ratings(sentences, pull=2)["good"] == 0.5
    table = {"good": 1.0, "fun": 3.0}
    assert math.isclose(word_score(table, "Good, good fun"), 5 / 3)
    assert word_score(table, "Good new one") == 1 / 3
    assert word_score(table, "...") == 0.0


def test_the_higher_score_wins_and_a_tie_counts_half():
    right = outcomes(np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0]))
    assert right.tolist() == [1.0, 0.0, 0.5]


def half_width(figures: dict[str, float]) -> float:
    return (figures["high"] - figures["low"]) / 2


def test_the_interval_of_an_accuracy_is_over_sentences():
    rng = random.Random(0)
    right = np.array([float(rng.random() < 0.8) for _ in range(200)])
    apart = [Pair(Sentence(f"b{i}", 4.0), Sentence(f"w{i}", 0.0)) for i in range(200)]
    figures = pair_figures(right, apart, seed=0)
    assert figures["mean"] == right.mean() and figures == pair_figures(right, apart, seed=0)
    expected = 1.96 * math.sqrt(0.8 * 0.2 / 200)
    # a pair of sentences is drawn together less evenly than a pair is drawn: about sqrt(3) wider
    assert expected < half_width(figures) < 2 * expected


def test_pairs_that_share_a_sentence_are_no_independent_draws():
    """Ten sentences decide two hundred pairs: the interval is as wide as that of ten draws."""
    pairs = [Pair(Sentence(f"b{i % 10}", 4.0), Sentence(f"w{i}", 0.0)) for i in range(200)]
    right = np.array([float(i % 10 < 8) for i in range(200)])
    figures = pair_figures(right, pairs, seed=0)
    assert half_width(figures) == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 10), rel=0.3)
