"""Figures, DeLong, Holm and the verdict: against published values, other libraries, brute force and simulation."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from meddiff_steps.config import Downstream
from meddiff_steps.core.random_streams import philox
from meddiff_steps.downstream.comparison import Draws, Resampling, calibration_error, verdict, verdict_text
from meddiff_steps.downstream.results import Scored, measure
from meddiff_steps.statistics.differences import delong, delong_difference, holm
from meddiff_steps.statistics.measures import auc, auc_within, average_precision, brier, one_versus_rest

#: Ratings of 109 CT images from 1 (definitely normal) to 5 (definitely abnormal): Hanley and McNeil 1982, table I.
NORMAL, ABNORMAL = (33, 6, 6, 11, 2), (3, 2, 2, 11, 33)


def ratings() -> tuple[np.ndarray, np.ndarray]:
    scores = np.concatenate([np.repeat(np.arange(1, 6), NORMAL), np.repeat(np.arange(1, 6), ABNORMAL)])
    return np.repeat([False, True], [58, 51]), scores.astype(float)


def test_delong_gives_the_published_figures_of_hanley_and_mcneils_ratings() -> None:
    """Area 0.8932, DeLong standard error 0.0307, interval 0.83295 to 0.95339: Stata's manual, `roctab` on the same
    data.
    """
    labels, scores = ratings()
    areas, covariance = delong(labels, scores[:, None], np.arange(109))
    error = math.sqrt(covariance[0, 0])
    assert areas[0] == pytest.approx(0.8932, abs=5e-5)
    assert error == pytest.approx(0.0307, abs=5e-5)
    assert [areas[0] - 1.959964 * error, areas[0] + 1.959964 * error] == pytest.approx([0.83295, 0.95339], abs=1e-5)


def test_delong_is_its_definition_term_by_term() -> None:
    """DeLong et al. 1988, equations 3 to 6, as sums over pairs."""
    rng = philox("test", "delong")
    labels = np.arange(23) < 9
    scores = np.round(rng.normal(size=(23, 3)) + labels[:, None], 1)  # with ties

    def kernel(x: float, y: float) -> float:
        return 1.0 if x > y else 0.5 if x == y else 0.0

    v10 = np.array(
        [
            [np.mean([kernel(scores[i, k], scores[j, k]) for j in np.flatnonzero(~labels)]) for k in range(3)]
            for i in np.flatnonzero(labels)
        ]
    )
    v01 = np.array(
        [
            [np.mean([kernel(scores[i, k], scores[j, k]) for i in np.flatnonzero(labels)]) for k in range(3)]
            for j in np.flatnonzero(~labels)
        ]
    )
    areas, covariance = delong(labels, scores, np.arange(23))
    np.testing.assert_allclose(areas, v10.mean(0))
    np.testing.assert_allclose(covariance, np.cov(v10.T) / 9 + np.cov(v01.T) / 14)


def test_copies_of_a_subjects_images_add_no_information() -> None:
    labels, scores = ratings()
    _, once = delong(labels, scores[:, None], np.arange(109))
    _, thrice = delong(np.repeat(labels, 3), np.repeat(scores, 3)[:, None], np.repeat(np.arange(109), 3))
    _, ignored = delong(np.repeat(labels, 3), np.repeat(scores, 3)[:, None], np.arange(327))
    np.testing.assert_allclose(thrice, once)
    assert ignored[0, 0] < 0.4 * once[0, 0]


def test_clustered_variance_is_that_of_repeated_studies() -> None:
    """Obuchowski's variance, with both classes within subjects, against the spread of AUC over simulated studies."""
    rng, areas, variances = philox("test", "obuchowski"), [], []
    for _ in range(300):
        effect = np.repeat(rng.normal(size=50), 3)
        labels = rng.random(150) < 1 / (1 + np.exp(-effect))
        value, covariance = delong(labels, (effect + rng.normal(size=150))[:, None], np.repeat(np.arange(50), 3))
        areas.append(value[0])
        variances.append(covariance[0, 0])
    assert np.mean(variances) == pytest.approx(np.var(areas), rel=0.25)


def test_delong_is_undefined_with_one_subject_on_a_side() -> None:
    found = delong_difference(
        np.array([True, True, False, False]), np.ones((4, 2)), np.ones((4, 2)), ["a", "a", "b", "c"]
    )
    assert found["difference"]["value"] is None
    assert found["p"] is None


def test_holm_steps_down_and_leaves_out_what_is_undefined() -> None:
    assert holm([0.01, math.nan, 0.04, 0.03]) == [
        0.03,
        None,
        0.06,
        0.06,
    ]  # 3 x 0.01, 2 x 0.03, and no smaller than before
    assert holm([math.nan]) == [None]


def test_figures_agree_with_scikit_learn_for_any_weights() -> None:
    rng = philox("test", "figures")
    labels, scores = rng.random(80) < 0.3, np.round(rng.random(80), 2)
    counts = rng.integers(0, 4, 80)
    weights = np.stack([np.ones(80), counts]).astype(float)
    many = np.repeat(labels, counts), np.repeat(scores, counts)
    np.testing.assert_allclose(
        average_precision(labels, scores)(weights),
        [average_precision_score(labels, scores), average_precision_score(*many)],
    )
    np.testing.assert_allclose(
        brier(labels, scores)(weights), [brier_score_loss(labels, scores), brier_score_loss(*many)]
    )
    probability = rng.dirichlet(np.ones(3), 80)
    levels = rng.integers(0, 3, 80)
    assert one_versus_rest(auc, levels, probability)(np.ones((1, 80)))[0] == pytest.approx(
        roc_auc_score(levels, probability, multi_class="ovr")
    )
    half = np.arange(80) < 40
    two = np.stack([1 - scores, scores], axis=1)
    assert auc_within(labels.astype(int), two, half)(np.ones((1, 80)))[0] == pytest.approx(
        roc_auc_score(labels[half], scores[half])
    )


def test_calibration_error_of_known_bins() -> None:
    # Bin 0.2 to 0.3: mean 0.25, none of 2 positive. Bin 0.9 to 1: mean 0.95, 1 of 2 positive.
    labels, scores = np.array([0, 0, 1, 0]), np.array([0.2, 0.3 - 1e-9, 0.9, 1.0])
    assert calibration_error(labels, scores)(np.ones((1, 4)))[0] == pytest.approx(0.5 * 0.25 + 0.5 * 0.45)


def test_the_interval_of_the_calibration_error_lies_about_its_value() -> None:
    """Of classifiers that are calibrated: resamples repeat images, which alone looks like an error of calibration."""
    rng = philox("test", "calibrated")
    scores = rng.random(200)
    probability = np.broadcast_to(np.stack([1 - scores, scores], axis=1), (1, 3, 200, 2))
    data = Scored(np.arange(200), (rng.random(200) < scores).astype(int), np.full(200, None), {"real": probability})
    found = measure(data, Downstream(target="x"), "root", "test")[0]["real"]["ece"]
    assert found["low"] < found["value"] < found["high"]
    assert (found["low"] + found["high"]) / 2 == pytest.approx(found["value"], rel=0.2)


# ------------------------------------------------------------------------------------- intervals and verdict


def simulate(
    rng: np.random.Generator, gain: float, noise: float = 0.5, luck: float = 0.2, subjects: int = 80, seeds: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and scores (seeds, rows) of two arms that see the same subjects; `gain` shifts the first arm's positives,
    `noise` is of single predictions, `luck` of whole classifiers."""
    labels = np.arange(subjects) < subjects // 3
    shared = rng.normal(size=subjects) + labels
    both = [
        shared
        + shift * labels
        + noise * rng.normal(size=(seeds, subjects))
        + luck * rng.normal(size=(seeds, 1)) * labels
        for shift in (gain, 0.0)
    ]
    return labels, both[0], both[1]


def difference(labels: np.ndarray, first: np.ndarray, second: np.ndarray, label: str, resamples: int = 300) -> Draws:
    draws = Resampling(np.arange(len(labels)), len(first), resamples, "seed", label).draws(
        {"first": [auc(labels, s) for s in first], "second": [auc(labels, s) for s in second]}
    )
    return draws["first"].minus(draws["second"])


@pytest.mark.parametrize(("gain", "word"), [(1.5, "helps"), (-1.5, "harms"), (0.0, "no evidence")])
def test_the_verdict_follows_the_truth(gain: float, word: str) -> None:
    found = difference(*simulate(philox("test", "verdict"), gain), "verdict").figure()
    assert verdict(found, 0.05)[0] == word


@pytest.mark.parametrize(("noise", "luck"), [(0.7, 0.2), (0.3, 0.2), (0.5, 0.5)])
def test_without_a_difference_the_verdict_is_wrong_no_more_often_than_it_says(noise: float, luck: float) -> None:
    rng, wrong, small = philox("test", "type one"), 0, 0
    for trial in range(300):
        drawn = difference(*simulate(rng, 0.0, noise, luck), f"trial {trial}", 200)
        wrong += verdict(drawn.figure(), 0.05)[0] != "no evidence"
        small += drawn.p_value() < 0.05
    assert 0.005 <= wrong / 300 <= 0.075  # nominal 0.05, which 300 trials show as up to 0.075 by chance alone
    assert abs(small - wrong) <= 6  # p value and interval say the same


def test_seeds_widen_the_interval() -> None:
    """Arms whose classifiers scatter are compared less surely than such that do not, on the same subjects."""
    rng = philox("test", "seeds")
    labels = np.arange(60) < 20
    steady = np.tile(rng.normal(size=60) + labels, (5, 1))
    shaken = steady + np.linspace(-1.2, 1.2, 5)[:, None] * labels
    same, other = (difference(labels, arm, steady, "same") for arm in (steady, shaken))
    assert same.figure() == {"value": 0.0, "low": None, "high": None, "n": 60}, "no resample differs"
    assert same.p_value() == 1
    assert other.figure()["high"] - other.figure()["low"] > 0.1


def test_classifiers_that_never_err_on_few_subjects_say_nothing_certain() -> None:
    labels = np.arange(6) < 3
    right, wrong = np.tile(labels.astype(float), (5, 1)), np.tile(-labels.astype(float), (5, 1))
    found = difference(labels, right, wrong, "few")
    assert found.value == 1 and found.figure()["low"] is None and np.isnan(found.p_value())
    exact = delong_difference(labels, right.T, wrong.T, np.arange(6))
    assert exact["difference"]["value"] == 1 and exact["difference"]["low"] is None and exact["p"] is None
    assert verdict(found.figure(), 0.02) == ("not evaluated", None)


# ------------------------------------------------------------------------------------------ generator seeds


def simulate_generators(
    rng: np.random.Generator, gain: float, luck: float, generators: int = 2, noise: float = 0.4, seed_luck: float = 0.15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores of an arm (generators, seeds, rows) whose generators differ by `luck`, and of a real arm (seeds,
    rows).
    """
    labels, first, second = simulate(rng, gain, noise, seed_luck)
    shifts = luck * rng.normal(size=(generators, 1, 1)) * labels
    return labels, first[None] + shifts + noise * rng.normal(size=(generators, *first.shape)) / 2, second


def crossed(labels: np.ndarray, first: np.ndarray, second: np.ndarray, label: str, resamples: int = 300) -> Draws:
    statistics = {
        "first": [auc(labels, s) for generator in first for s in generator],
        "second": [auc(labels, s) for s in second],
    }
    draws = Resampling(np.arange(len(labels)), len(second), resamples, "seed", label, len(first)).draws(statistics)
    return draws["first"].minus(draws["second"])


def test_the_figure_is_the_mean_over_generators_and_seeds() -> None:
    labels, first, second = simulate_generators(philox("test", "crossed"), 0.5, 0.4, generators=3)
    found = crossed(labels, first, second, "mean")
    by_generator = [np.mean([roc_auc_score(labels, s) for s in generator]) for generator in first]
    plain = np.mean([roc_auc_score(labels, s) for s in second])
    assert found.value == pytest.approx(np.mean(by_generator) - plain)
    np.testing.assert_allclose(found.by_generator, np.array(by_generator) - plain)
    # What the draws add for generators has the variance of a mean of three.
    assert np.std(found.deviations) == pytest.approx(np.std(by_generator, ddof=1) / math.sqrt(3), rel=0.15)


def test_one_generator_changes_nothing() -> None:
    labels, first, second = simulate_generators(philox("test", "one"), 0.3, 0.4, generators=1)
    np.testing.assert_array_equal(
        crossed(labels, first, second, "one").widened(), difference(labels, first[0], second, "one").draws
    )


def test_generators_that_scatter_widen_the_interval_and_equal_ones_do_not() -> None:
    labels, first, second = simulate_generators(philox("test", "scatter"), 0.3, 0.0)
    alike = np.repeat(first[:1], 2, axis=0)
    apart = alike + np.array([0.5, -0.5])[:, None, None] * labels
    widths = [
        (lambda f: f["high"] - f["low"])(crossed(labels, arm, second, "width").figure())
        for arm in (first[:1], alike, apart)
    ]
    assert widths[1] == pytest.approx(widths[0])
    assert widths[2] > 1.5 * widths[0]


@pytest.mark.parametrize(
    ("luck", "generators", "limit"), [(0.0, 2, 0.075), (0.15, 2, 0.075), (0.3, 2, 0.12), (0.5, 4, 0.12)]
)
def test_the_verdict_is_hardly_wrong_more_often_when_generators_differ(
    luck: float, generators: int, limit: float
) -> None:
    """Generators that differ, with no difference on average.  The spread of two is little known: the rest is in
    docs/downstream.md.
    """
    rng, wrong, ignored = philox("test", f"generators {luck} {generators}"), 0, 0
    for trial in range(150):
        labels, first, second = simulate_generators(rng, 0.0, luck, generators)
        found = crossed(labels, first, second, f"trial {trial}", 200)
        wrong += verdict(found.figure(), 0.05)[0] != "no evidence"
        ignored += verdict(Draws(found.value, found.draws, found.n).figure(), 0.05)[0] != "no evidence"
    assert wrong / 150 <= limit
    assert luck < 0.3 or ignored > 2 * wrong


def test_a_gain_is_seen_with_two_generators() -> None:
    rng = philox("test", "power")
    words = [verdict(crossed(*simulate_generators(rng, 1.2, 0.15), f"power {i}").figure(), 0.05)[0] for i in range(30)]
    assert words.count("helps") >= 27


def test_verdict_and_margin() -> None:
    def figure(low: float | None, high: float | None) -> dict:
        return {"value": 0.0, "low": low, "high": high, "n": 9}

    assert verdict(figure(0.01, 0.1), 0.03) == ("helps", True)
    assert verdict(figure(-0.02, 0.1), 0.03) == ("no evidence", True)
    assert verdict(figure(-0.05, 0.1), 0.03) == ("no evidence", False)
    assert verdict(figure(-0.02, -0.01), 0.03) == ("harms", True)
    assert verdict(figure(-0.2, -0.1), 0.03) == ("harms", False)
    assert verdict(figure(None, None), 0.03) == ("not evaluated", None)
    assert "cannot be excluded" in verdict_text("no evidence", False, "a", "b", 0.03)
    assert "is excluded" in verdict_text("no evidence", True, "a", "b", 0.03)
    assert "worse than b" in verdict_text("harms", False, "a", "b", 0.03)
    assert verdict_text("helps", True, "a", "b", 0.03) == "Arm a tells the classes apart better than b."
    assert "scans that they were not given" in verdict_text("helps", True, "a", "b", 0.03, share=0.25)


def test_too_few_of_a_class_give_no_interval_of_an_auc_or_of_a_difference() -> None:
    rng = philox("test", "too few")
    levels = (np.arange(60) < 4).astype(int)
    score = {name: rng.random((1, 2, 60)) * 0.5 + 0.5 * (name == "better") * levels for name in ("real", "better")}
    probability = {name: np.stack([1 - one, one], axis=-1) for name, one in score.items()}
    data = Scored(np.arange(60), levels, np.full(60, None), probability)
    entries, draws = measure(data, Downstream(target="x"), "root", "test")
    for arm in entries.values():
        assert arm["auc"]["value"] is not None and arm["auc"]["too_few"] == 4
        assert arm["auc"]["low"] is None and arm["auprc"]["low"] is None and arm["brier"]["low"] is not None
    lead = draws["better"].minus(draws["real"])
    assert lead.value > 0 and verdict(lead.figure(), 0.05) == ("not evaluated", None) and math.isnan(lead.p_value())


def test_one_class_in_the_test_split_is_not_evaluated() -> None:
    labels = np.ones(10, bool)
    found = difference(labels, np.ones((2, 10)), np.ones((2, 10)), "one")
    assert verdict(found.figure(), 0.05)[0] == "not evaluated"
    assert math.isnan(found.p_value())
