"""Bootstrap figures: known values, coverage, units, undefined cases."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import roc_auc_score

from meddiff_steps.core.random_streams import philox
from meddiff_steps.statistics.bootstrap import LEAST, Bootstrap, Side, figure, newcombe, rounded, wilson
from meddiff_steps.statistics.measures import auc, macro, mean_of, pearson, slope, smaller_side


def test_statistics_agree_with_their_definitions_for_any_weights() -> None:
    rng = philox("test", "definitions")
    x, y = rng.normal(100, 2, 40), rng.normal(-50, 3, 40)
    y += x
    counts = rng.integers(0, 4, 40)
    weights = np.stack([np.ones(40), counts]).astype(float)
    rx, ry = np.repeat(x, counts), np.repeat(y, counts)
    np.testing.assert_allclose(mean_of(x)(weights), [x.mean(), rx.mean()])
    np.testing.assert_allclose(pearson(x, y)(weights), [np.corrcoef(x, y)[0, 1], np.corrcoef(rx, ry)[0, 1]])
    np.testing.assert_allclose(slope(x, y)(weights), [np.polyfit(x, y, 1)[0], np.polyfit(rx, ry, 1)[0]])


def test_auc_counts_ties_half() -> None:
    rng = philox("test", "auc")
    labels, scores = rng.integers(0, 2, 60).astype(bool), rng.integers(0, 6, 60) / 6
    counts = rng.integers(0, 3, 60)
    expected = [roc_auc_score(labels, scores), roc_auc_score(np.repeat(labels, counts), np.repeat(scores, counts))]
    np.testing.assert_allclose(auc(labels, scores)(np.stack([np.ones(60), counts])), expected)


def test_undefined_statistics_are_null() -> None:
    constant, rising = np.ones(8), np.arange(8.0)
    boot = Bootstrap(range(8), 200, "seed")
    assert boot.figure(pearson(constant, rising)) == {"value": None, "low": None, "high": None, "n": 8}
    assert boot.figure(auc(np.ones(8, bool), rising))["value"] is None
    assert Bootstrap([], 200, "seed").figure(mean_of(np.empty(0))) == {"value": None, "low": None, "high": None, "n": 0}
    assert rounded(math.inf) is None
    only = Bootstrap(["a"], 200, "seed").figure(mean_of(np.array([3.0])))
    assert only == {"value": 3.0, "low": None, "high": None, "n": 1}  # one subject tells nothing about the spread


def test_macro_averages_what_is_defined() -> None:
    weights = np.ones((1, 4))
    assert macro([mean_of(np.full(4, 1.0)), mean_of(np.full(4, np.nan)), mean_of(np.full(4, 3.0))])(
        weights
    ) == pytest.approx(2.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = philox("test", "coverage")
    hits = 0
    for trial in range(200):
        values = rng.normal(5.0, 2.0, 60)
        measured = Bootstrap(range(60), 400, f"trial {trial}").figure(mean_of(values))
        hits += measured["low"] <= 5.0 <= measured["high"]
    assert 0.89 <= hits / 200 <= 0.985


def test_rows_of_one_subject_stay_together() -> None:
    values = np.repeat(philox("test", "units").normal(size=20), 10)  # ten equal scans of each of 20 subjects
    by_row = Bootstrap(range(200), 500, "s").figure(mean_of(values))
    by_subject = Bootstrap(np.repeat(np.arange(20), 10), 500, "s").figure(mean_of(values))
    assert by_subject["n"] == 20
    assert by_subject["high"] - by_subject["low"] > 2.5 * (by_row["high"] - by_row["low"])


def test_draws_depend_on_seed_and_label_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(50.0)
    whole = Bootstrap(range(50), 300, "a").draws(mean_of(values))[1]
    monkeypatch.setattr("meddiff_steps.statistics.bootstrap.CHUNK", 50 * 7)
    np.testing.assert_allclose(Bootstrap(range(50), 300, "a").draws(mean_of(values))[1], whole)
    assert not np.allclose(Bootstrap(range(50), 300, "b").draws(mean_of(values))[1], whole)


def test_figures_are_rounded() -> None:
    found = figure(1 / 3, np.array([1 / 3, 2 / 3] * 50), 5)
    assert found == {"value": 0.333333, "low": 0.333333, "high": 0.666667, "n": 5}


@pytest.mark.parametrize("few", [5, 8, 20])
def test_few_units_that_are_told_apart_perfectly_have_no_interval_of_width_0(few: int) -> None:
    labels = np.arange(2 * few) < few
    for value, scores in ((1.0, labels.astype(float)), (0.0, -labels.astype(float)), (0.5, np.zeros(2 * few))):
        found = Bootstrap(range(2 * few), 200, "s").figure(auc(labels, scores), smaller_side(labels, range(2 * few)))
        assert found["value"] == value and found["high"] - found["low"] > min(0.7, 2 / few)
        assert 0 <= found["low"] <= value <= found["high"] <= 1


def test_what_is_no_share_has_no_interval_where_no_resample_differs() -> None:
    found = Bootstrap(range(9), 200, "s").figure(mean_of(np.full(9, 3.25)))
    assert found == {"value": 3.25, "low": None, "high": None, "n": 9}
    assert figure(1.0, np.full(200, 1.0), 9, share_of=9)["low"] == pytest.approx(wilson(1.0, 9)[0], abs=1e-6)


@pytest.mark.parametrize(("hits", "n"), [(0, 3), (0, 50), (7, 20), (20, 20), (1, 1), (3, 4), (1000, 1000)])
def test_the_interval_of_a_share_is_wilsons_and_no_narrower_than_the_rule_of_three(hits: int, n: int) -> None:
    low, high = wilson(hits / n, n)
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    assert low <= interval.low + 1e-12 and interval.high <= high + 1e-12
    if 0 < hits < n:
        assert (low, high) == pytest.approx((interval.low, interval.high))
    assert hits or high >= min(1, 3 / n)
    assert hits < n or low <= max(0, 1 - 3 / n)


def test_the_smaller_side_is_counted_in_units() -> None:
    assert smaller_side(np.array([True, True, True, False]), ["a", "a", "b", "c"]) == Side(1, 2)
    assert smaller_side(np.array([True, True, False, False, False]), ["a", "b", "c", "d", "e"]) == Side(2, 3)
    assert smaller_side(np.array([True, False, True, False, False]), ["a", "a", "b", "b", "c"]) == Side(2, 0), "pairs"


def test_pairs_have_the_interval_of_resampled_pairs() -> None:
    """A reconstruction differs little from its scan: what both share moves no AUC of them."""
    rng = np.random.default_rng(0)
    scans, units = rng.normal(size=60), [*range(60), *range(60)]
    labels = np.repeat([False, True], 60)
    scores = np.concatenate([scans, scans + rng.normal(0, 0.2, 60)])
    boot = Bootstrap(units, 300, "s")
    found = boot.figure(auc(labels, scores), smaller_side(labels, units))
    low, high = newcombe(found["value"], Side(60, 60))
    assert found["high"] - found["low"] < 0.6 * (high - low)


@pytest.mark.parametrize("area", [0.0, 0.03, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("side", [Side(1, 1), Side(5, 30), Side(100, 100)])
def test_the_ends_of_an_auc_lie_its_standard_errors_away(area: float, side: Side) -> None:
    def errors(true: float) -> float:
        size = (sum(side) - 2) / 2  # Newcombe's: as if both sides were of the mean size
        spread = true * (1 - true) + size * (true / (2 - true) - true**2) + size * (2 * true**2 / (1 + true) - true**2)
        return abs(area - true) / math.sqrt(spread / math.prod(side))

    low, high = newcombe(area, side)
    assert 0.0 <= low <= area <= high <= 1.0
    assert low == 0.0 or errors(low) == pytest.approx(1.96, abs=1e-3)
    assert high == 1.0 or errors(high) == pytest.approx(1.96, abs=1e-3)


@pytest.mark.parametrize("few", [5, 7, 10, 15, 30])
@pytest.mark.parametrize(("distance", "spread"), [(0.0, 1.0), (2.2, 1.0), (1.2, 0.4)])
def test_the_interval_of_an_auc_of_few_units_holds_the_truth(few: int, distance: float, spread: float) -> None:
    rng, labels = philox("test", f"few {few} {distance}"), np.arange(30 + few) < 30
    true, hits = norm.cdf(distance / math.hypot(1.0, spread)), 0
    for trial in range(300):
        scores = np.where(labels, rng.normal(distance, spread, len(labels)), rng.normal(size=len(labels)))
        boot = Bootstrap(range(len(labels)), 200, f"trial {trial}")
        found = boot.figure(auc(labels, scores), smaller_side(labels, range(len(labels))))
        hits += found["low"] <= true <= found["high"]
    assert hits / 300 >= 0.93


@pytest.mark.parametrize("few", range(1, LEAST))
def test_an_auc_of_too_few_units_has_no_interval_and_says_so(few: int) -> None:
    labels = np.arange(30 + few) < 30
    for scores in (philox("test", "too few").normal(size=30 + few), labels * 1.0):
        found = Bootstrap(range(30 + few), 200, "s").figure(auc(labels, scores), smaller_side(labels, range(30 + few)))
        assert found["value"] is not None and found["too_few"] == few
        assert found["low"] is None and found["high"] is None
