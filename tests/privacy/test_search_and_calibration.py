import numpy as np
import pytest
from scipy.stats import binom

from meddiff_steps.core.errors import UserError
from meddiff_steps.privacy import search
from meddiff_steps.privacy.attacks import excess_risk
from meddiff_steps.privacy.calibration import Thresholds, calibrate, conformal_threshold
from meddiff_steps.privacy.reference import nearest_of_subject, one_scan_of_each
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.privacy.size import subjects_needed


def test_unit_rows_multiply_to_pearson():
    x = np.random.default_rng(0).normal(size=(5, 40)) + 3
    rows = unit_rows(x)
    assert np.allclose(rows @ rows.T, np.corrcoef(x), atol=1e-5)


def test_a_constant_image_is_similar_to_nothing_and_nan_is_refused():
    rows = unit_rows(np.stack([np.full(10, 0.7), np.arange(10.0)]))
    assert np.all(rows[0] == 0)
    with pytest.raises(UserError, match="1 of 2 vectors are not finite, the first in row 1"):
        unit_rows(np.array([[1.0, 2.0], [np.nan, 0.0]]))


@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_search_is_exact_whatever_the_blocks(monkeypatch, k):
    rng = np.random.default_rng(1)
    queries, references = unit_rows(rng.normal(size=(37, 8))), unit_rows(rng.normal(size=(29, 8)))
    monkeypatch.setattr(search, "QUERIES", 5)
    monkeypatch.setattr(search, "REFERENCES", 28)
    monkeypatch.setattr(search, "GROUP", 4)
    similarity, index = nearest(queries, references, k)
    expected = np.sort(queries @ references.T, axis=1)[:, ::-1][:, :k]
    assert similarity.shape == (37, min(k, 29))
    assert np.allclose(similarity, expected, atol=1e-6)
    assert np.allclose(np.take_along_axis(queries @ references.T, index, 1), similarity, atol=1e-6)


def test_no_reference_and_wrong_width_are_refused():
    with pytest.raises(ValueError, match="no reference"):
        nearest(np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32))
    with pytest.raises(ValueError, match="queries have 3"):
        nearest(np.zeros((2, 3), np.float32), np.zeros((1, 4), np.float32))


def test_the_conformal_threshold_is_the_rank_of_the_definition():
    scores = np.arange(1, 100) / 100.0  # n = 99
    assert conformal_threshold(scores, 0.05) == 0.95
    assert conformal_threshold(scores, 0.01) == 0.99
    assert conformal_threshold(scores, 0.005) is None
    assert conformal_threshold(np.zeros(0), 0.05) is None
    with pytest.raises(ValueError, match="not finite"):
        conformal_threshold(np.array([0.1, np.nan]), 0.5)


@pytest.mark.parametrize(("level", "detectors"), [(0.05, 1), (0.05, 3), (0.01, 2)])
def test_subjects_needed_is_where_a_threshold_begins_to_exist(level, detectors):
    n = subjects_needed(level, detectors)
    assert conformal_threshold(np.arange(n, dtype=float), level / detectors) is not None
    assert conformal_threshold(np.arange(n - 1, dtype=float), level / detectors) is None


def test_unseen_subjects_are_flagged_at_most_at_the_level():
    """Over many calibrations; detectors are dependent, so Bonferroni is conservative but not by much."""
    rng = np.random.default_rng(0)
    flagged = total = 0
    for _ in range(200):
        base = rng.normal(size=(159 + 50, 1))
        scores = base + rng.normal(size=(209, 2))
        thresholds = calibrate({"a": scores[:159, 0], "b": scores[:159, 1]}, np.zeros(159), 0.1)
        flags = thresholds.flags({"a": scores[159:, 0], "b": scores[159:, 1]}, np.zeros(50))
        flagged, total = flagged + int((flags["a"] | flags["b"]).sum()), total + 50
    assert binom.cdf(flagged, total, 0.1) < 0.999
    assert flagged / total > 0.06


def test_groups_get_their_own_threshold_only_where_they_are_large_enough():
    scores = np.concatenate([np.linspace(0.1, 0.5, 40), np.linspace(0.5, 0.9, 40), np.full(3, 0.99)])
    groups = np.array(["F"] * 40 + ["M"] * 40 + ["X"] * 3)
    thresholds = calibrate({"d": scores}, groups, 0.05)
    assert set(thresholds.groups) == {"F", "M"}
    assert thresholds.groups["F"]["d"] <= 0.5 < thresholds.groups["M"]["d"]
    flags = thresholds.flags({"d": np.array([0.6, 0.6, 0.6])}, np.array(["F", "M", "X"]))["d"]
    assert flags.tolist() == [True, False, False]


def test_too_few_subjects_are_not_calibrated():
    assert calibrate({"a": np.arange(10.0), "b": np.arange(10.0)}, np.zeros(10), 0.05) is None
    assert isinstance(calibrate({"a": np.arange(19.0)}, np.zeros(19), 0.05), Thresholds)


def test_excess_copies_compare_an_image_with_one_scan_of_a_stranger():
    """Thresholds are of people's nearest of four scans; an image is like one scan."""
    rng = np.random.default_rng(0)
    subjects = np.repeat([f"{number:04d}" for number in range(400)], 4)
    rows = one_scan_of_each(subjects[::-1])
    assert subjects[::-1][rows].tolist() == np.unique(subjects).tolist()
    assert len({row % 4 for row in rows}) == 4, "not always the first"
    scores = {"x": rng.random(1600)}
    limit = conformal_threshold(nearest_of_subject(scores, subjects)[0]["x"], 0.05)
    others = rng.random(1600)
    by_person = nearest_of_subject({"x": others}, subjects)[0]["x"] > limit
    by_one = others[one_scan_of_each(subjects)] > limit
    images = (rng.random(4000) > limit) | (rng.random(4000) < 0.1)
    assert excess_risk(images, by_person)["high"] < 0.1 < excess_risk(images, by_one)["high"]
    assert len(one_scan_of_each(np.zeros(0, str))) == 0
