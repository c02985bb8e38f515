"""Intervals against their formulas and against simulation, tests against what they must find."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stripedrag.eval.statistics import difference, effective_length, estimate, holm, wilson


def test_wilson_is_as_published():
    # Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for hits, samples, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(hits / samples, samples) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_nothing_is_nan_and_never_zero():
    found = estimate([], [])
    assert math.isnan(found.mean) and math.isnan(found.low) and math.isnan(found.high) and not found.is_known
    assert math.isnan(difference([], [], []).p)


def test_one_cluster_says_nothing_of_others():
    found = estimate([1.0, 0.0, 1.0], ["a"] * 3)
    assert (found.low, found.high, found.clusters) == (0.0, 1.0, 1)


def test_copies_of_a_cluster_add_no_certainty():
    scores = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    alone = estimate(scores, range(8))
    tenfold = estimate(np.repeat(scores, 10), np.repeat(range(8), 10))
    assert (tenfold.mean, tenfold.low, tenfold.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert (tenfold.samples, tenfold.clusters) == (80, 8)


def test_all_right_is_not_certain():
    found = estimate([1.0] * 40, list(range(10)) * 4)
    assert found.high == 1.0 and 0.6 < found.low < 0.75  # ten clusters, not forty samples


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("alike", [0.0, 0.5])
def test_intervals_cover_the_truth(share, alike):
    rng, covered, trials = np.random.default_rng(0), 0, 600
    clusters = np.repeat(np.arange(25), 6)
    for _ in range(trials):
        own = rng.random(25) < share
        copies = rng.random(150) < alike
        scores = np.where(copies, own[clusters], rng.random(150) < share)
        found = estimate(scores.astype(float), clusters.tolist())
        covered += found.low <= share <= found.high
    assert covered / trials > 0.92


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3, 0.37, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("count", [2, 3, 6, 7, 10, 12])
def test_equal_scores_are_as_sure_as_their_clusters_are_many(value, count):
    found = estimate([value] * count, range(count))
    assert found.mean == value
    assert found.high - found.low > 0.8 / count
    assert math.isnan(estimate([value] * count, range(count), bounded=False).low)


@pytest.mark.parametrize("mean", [0.15, 0.5])
def test_intervals_of_fractions_cover_the_truth_and_are_as_narrow_as_they_vary(mean):
    rng, covered, widths = np.random.default_rng(0), 0, []
    for _ in range(400):
        values = rng.beta(20 * mean, 20 * (1 - mean), size=12)  # as ROUGE-L varies from story to story
        found = estimate(values.tolist(), range(12))
        covered += found.low <= mean <= found.high
        widths.append(found.high - found.low)
    spread = (mean * (1 - mean) / 21 / 12) ** 0.5
    assert 0.92 < covered / 400 < 0.98
    assert np.mean(widths) == pytest.approx(2 * 2.2 * spread, rel=0.1)  # Student's, of 11 degrees of freedom


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=40))
def test_an_interval_holds_its_mean_and_stays_in_range(rows):
    found = estimate([score for score, _ in rows], [cluster for _, cluster in rows])
    assert 0 <= found.low <= found.mean + 1e-9 and found.mean - 1e-9 <= found.high <= 1


@pytest.mark.parametrize("scores", [[0.5, 1.2], [-0.1], [math.nan]])
def test_a_score_out_of_range_is_refused(scores):
    with pytest.raises(ValueError, match=r"bounded ones lie in \[0, 1\]"):
        estimate(scores, range(len(scores)))


def test_scores_without_their_clusters_are_refused():
    with pytest.raises(ValueError, match="2 scores and 1 clusters"):
        estimate([0.0, 1.0], ["a"])


def test_a_difference_is_exact_where_clusters_are_few():
    # Five clusters that all point one way: 2 of 32 sign patterns are as far from zero.
    found = difference([1.0] * 5, [0.0] * 5, range(5))
    assert (found.mean, found.p) == (1.0, 2 / 32)


def test_equal_systems_differ_by_nothing():
    found = difference([0.3, 0.9, 0.1] * 10, [0.3, 0.9, 0.1] * 10, list(range(30)))
    assert (found.mean, found.p) == (0.0, 1.0)


def test_the_test_keeps_its_level_and_finds_what_is_there():
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(20), 5).tolist()

    def p(shift):
        shared = np.repeat(rng.normal(0, 0.3, 20), 5)
        return difference(shared + shift + rng.normal(0, 0.3, 100), np.zeros(100), clusters).p

    assert np.mean([p(0.0) < 0.05 for _ in range(200)]) < 0.09
    assert np.mean([p(0.5) < 0.05 for _ in range(50)]) > 0.9


def test_a_difference_depends_on_the_seed_alone():
    rng = np.random.default_rng(2)
    ours, theirs = rng.random(60), rng.random(60)
    assert difference(ours, theirs, range(60), seed=3) == difference(ours, theirs, range(60), seed=3)


def test_holm_as_worked_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    adjusted = holm({"a": 0.5, "missing": math.nan})
    assert adjusted["a"] == 0.5 and math.isnan(adjusted["missing"])


def test_an_effective_length_ends_at_the_first_shortfall():
    scores = {1024: 0.9, 2048: 0.87, 4096: 0.5, 8192: 0.95}
    assert effective_length(scores, 0.856) == 2048
    assert effective_length({1024: 0.5}, 0.856) is None
    assert effective_length({1024: 0.9, 2048: math.nan, 4096: 0.9}, 0.856) == 1024
