"""Frechet distance, KID and the classifier against other ways to compute them."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import scipy.linalg

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.likeness import measured
from meddiff_steps.evaluation.realism import classifier_auc, frechet, kid
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale, resampled, shared_units
from meddiff_steps.evaluation.realism.measure import measure
from meddiff_steps.statistics.bootstrap import Figure


def draw(label: str, n: int, d: int = 6, shift: float = 0.0) -> np.ndarray:
    rng = philox("test", f"realism {label}")
    mixing = philox("test", "mixing").normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mixing + shift


def sample(label: str, n: int, d: int = 6, shift: float = 0.0) -> Sample:
    return Sample(draw(label, n, d, shift), np.array([f"{label}{i}" for i in range(n)]))


def kid_of(a: Sample, b: Sample, *, resamples: int, permutations: int, seed: str, label: str) -> Figure:
    return kid.figure(a, b, Scale.of(b.features, len(b)), Draws(100, resamples, permutations, seed, label))


def auc_of(a: Sample, b: Sample, *, resamples: int, seed: str, label: str) -> Figure:
    return classifier_auc.figure(a, b, Scale.of(b.features, len(b)), Draws(resamples, 100, 100, seed, label))


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    for n, m, d in ((50, 80, 6), (9, 7, 12)):  # the second pair has singular covariances
        a, b = draw("a", n, d), 1.5 * draw("b", m, d, 0.3)
        covariances = [np.cov(x, rowvar=False) for x in (a, b)]
        root = np.real(scipy.linalg.sqrtm(covariances[0] @ covariances[1]))
        expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
        assert frechet.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6 if n > d else 1e-4)


def test_frechet_distance_of_known_gaussians() -> None:
    """With diagonal covariances it is the sum of squared differences of means and of standard deviations."""
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, -1).T  # mean 0, exactly uncorrelated
    unit = signs * np.sqrt((len(signs) - 1) / len(signs))  # sample variance exactly 1
    a, b = unit * [1.0, 2.0, 3.0] + [0.0, 1.0, 0.0], unit * [2.0, 2.0, 1.0] + [3.0, 1.0, -1.0]
    assert frechet.frechet_distance(a, b) == pytest.approx(3**2 + 0 + 1 + (1 - 2) ** 2 + 0 + (3 - 1) ** 2, abs=1e-9)
    assert frechet.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_weighted_moments_are_those_of_repeated_rows() -> None:
    rows = draw("weights", 12, 4)
    weights = philox("test", "counts").integers(0, 4, size=(5, 12))
    means, covariances = frechet._moments(rows, weights.astype(float))
    for w, mean, covariance in zip(weights, means, covariances, strict=True):
        repeated = rows.repeat(w, axis=0)
        np.testing.assert_allclose(mean, repeated.mean(0))
        np.testing.assert_allclose(covariance, np.cov(repeated, rowvar=False))


def test_frechet_floor_shrinks_with_the_number_of_images() -> None:
    values = [frechet.frechet_distance(draw("few", n), draw("others", n)) for n in (30, 120, 2000)]
    assert values[0] > 2 * values[1] > 4 * values[2]


def test_kernel_distance_agrees_with_a_double_loop() -> None:
    a, b = draw("a", 9, 3), draw("b", 7, 3, 0.5)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    within = [
        sum(k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j) / (len(x) * (len(x) - 1))
        for x in (a, b)
    ]
    between = sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
    assert kid.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * between, rel=1e-10)


def test_kid_is_unbiased_and_its_test_keeps_its_level() -> None:
    values, p_values = [], []
    for i in range(60):
        found = kid_of(
            sample(f"x{i}", 20, 3), sample(f"y{i}", 30, 3), resamples=100, permutations=100, seed=str(i), label=""
        )
        values.append(found["value"])
        p_values.append(found["p_value"])
    assert abs(np.mean(values)) < 2 * np.std(values) / np.sqrt(60)
    assert 0.3 < np.mean(p_values) < 0.7
    assert np.mean(np.array(p_values) < 0.1) < 0.25


def test_kid_is_unbiased_where_a_person_has_several_scans() -> None:
    values = []
    for i in range(40):
        rng = philox("test", f"scans {i}")
        faces = np.sqrt(0.9) * rng.standard_normal((30, 1, 6)) + np.sqrt(0.1) * rng.standard_normal((30, 4, 6))
        people = Sample(faces.reshape(-1, 6), np.repeat([f"sub-{k}" for k in range(30)], 4))
        images = Sample(rng.standard_normal((120, 6)), np.arange(120).astype(str))
        values.append(kid_of(images, people, resamples=20, permutations=20, seed=str(i), label="")["value"])
    assert abs(np.mean(values)) < 2.5 * np.std(values) / np.sqrt(40)


def test_kid_sees_a_difference() -> None:
    found = kid_of(sample("p", 40, shift=3.0), sample("q", 40), resamples=200, permutations=199, seed="", label="")
    assert found["p_value"] == pytest.approx(1 / 200)
    assert found["low"] > 0
    assert found["low"] < found["value"] < found["high"]


def test_permutations_keep_subjects_whole() -> None:
    units = np.array(["a", "a", "b", "c", "c", "c", "d"])
    chosen = kid._permuted(units, np.isin(units, ["a", "b"]), 50, philox("test", "permutations"))
    for unit in "abcd":
        part = chosen[:, units == unit]
        assert (part == part[:, :1]).all()
    assert all(len(set(units[row])) == 2 for row in chosen)


def test_classifier_is_at_chance_on_equals_and_perfect_on_others() -> None:
    same = auc_of(sample("m", 60), sample("n", 60), resamples=200, seed="", label="")
    assert same["low"] < 0.55
    assert same["high"] > 0.4
    other = auc_of(sample("m", 60), sample("n", 60, shift=8.0), resamples=200, seed="", label="")
    assert other["value"] > 0.99
    assert other["n"] == 120


def test_classifier_does_not_learn_subjects_by_heart() -> None:
    """Six near copies of each of 20 subjects on either side: judged on subjects it knows, the classifier would be
    perfect.
    """
    rng = philox("test", "repeats")
    sides = []
    for side in "ab":
        people = rng.normal(size=(20, 150)).repeat(6, axis=0)
        sides.append(
            Sample(people + 0.01 * rng.normal(size=people.shape), np.array([f"{side}{i // 6}" for i in range(120)]))
        )
    assert auc_of(*sides, resamples=100, seed="", label="")["value"] < 0.75
    careless = [
        Sample(s.features, np.array([f"{side}{i}" for i in range(120)])) for side, s in zip("ab", sides, strict=True)
    ]
    assert auc_of(*careless, resamples=100, seed="", label="")["value"] > 0.95


def test_too_few_images_have_no_classifier() -> None:
    assert auc_of(sample("m", 1), sample("n", 5), resamples=100, seed="", label="")["value"] is None


def test_scale_standardises_and_survives_constant_features() -> None:
    training = np.column_stack([draw("scale", 40, 3) * [1, 10, 100], np.full(40, 7.0)])
    scale = Scale.of(training, 40)
    standard = scale.standard(training)
    np.testing.assert_allclose(standard.std(0), [1, 1, 1, 0], atol=1e-12)
    assert scale.basis.shape == (4, 4)
    assert Scale.of(training, 15).basis.shape == (4, 3)
    reduced = scale.components(standard)
    np.testing.assert_allclose(np.cov(reduced, rowvar=False) * (1 - np.eye(4)), 0, atol=1e-10)
    assert scale.explained.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(scale.standard(np.full((1, 4), 8.0))[0, 3], 1.0)  # its own unit: nothing to divide by


class Given:
    """Images of which the features are known."""

    def __init__(self, features: np.ndarray) -> None:
        self.known, self.images = features, SimpleNamespace(units=np.arange(len(features)))

    def __len__(self) -> int:
        return len(self.known)

    def features(self, *told: Any) -> dict[str, np.ndarray]:
        return {"any": self.known}


def test_the_floor_is_what_a_perfect_generator_gets() -> None:
    """Many features that hardly go together: the directions of one sample are not those of another."""
    found = []
    for number in range(6):
        kinds = {kind: Given(draw(f"{kind} {number}", 50, 300)) for kind in ("synthetic", "training", "held_out")}
        (one,) = measured(cast(Any, [SimpleNamespace(name="any")]), cast(Any, kinds))
        parts = {kind: one.scale.components(sample.features) for kind, sample in one.samples.items()}
        found.append([frechet.frechet_distance(parts[kind], parts["held_out"]) for kind in ("training", "synthetic")])
    floor, ideal = np.mean(found, 0)
    assert floor == pytest.approx(ideal, rel=0.1)


@pytest.mark.parametrize("names", [["kid"], ["classifier_auc", "frechet"], ["frechet", "kid", "classifier_auc"]])
def test_chosen_metrics_have_the_numbers_of_all_of_them(names: list[str]) -> None:
    samples = {kind: sample(kind, n, 4) for kind, n in (("synthetic", 20), ("training", 20), ("held_out", 30))}
    scale = Scale.of(samples["training"].features, 20)
    settings = {"resamples": 100, "slow_resamples": 100, "permutations": 100, "seed": "s"}
    every = measure(samples, scale, **settings)
    assert list(every) == ["frechet", "kid", "classifier_auc"]
    assert measure(samples, scale, names, **settings) == {name: every[name] for name in every if name in names}


# ---------------------------------------------------------------------------------- a scan and its reconstruction


def paired(label: str, n: int, difference: float) -> tuple[Sample, Sample]:
    """Subjects in both samples, whose rows differ by little."""
    rows = draw(label, n)
    units = np.array([f"sub-{i}" for i in range(n)])
    return Sample(rows + difference * draw(f"{label} other", n), units), Sample(rows, units)


def test_units_are_shared_where_they_have_one_name() -> None:
    a = Sample(np.zeros((3, 1)), np.array(["x", "y", "x"]))
    b = Sample(np.zeros((2, 1)), np.array(["y", "z"]))
    assert shared_units(a, b).tolist() == ["a:x", "c:y", "a:x", "c:y", "b:z"]
    weights = resampled(a, b, Draws(10, 50, 10, "", ""), "test")
    assert [w.shape for w in weights] == [(50, 3), (50, 2)]
    assert (weights[0][:, 1] == weights[1][:, 0]).all()  # one subject
    assert (weights[0][:, 0] == weights[0][:, 2]).all()
    other = Sample(b.features, np.array(["u", "v"]))
    apart = resampled(a, other, Draws(10, 50, 10, "", ""), "test")
    assert not (apart[0][:, 1] == apart[1][:, 0]).all()


def test_the_classifier_learns_nothing_from_the_same_subject_on_the_other_side() -> None:
    a, b = paired("classifier", 60, 1e-3)
    assert auc_of(a, b, resamples=100, seed="", label="")["value"] == pytest.approx(0.5, abs=0.12)
    shifted = Sample(b.features + 2.0, b.units)
    assert auc_of(shifted, b, resamples=100, seed="", label="")["value"] > 0.95


def test_kid_of_equals_is_unbiased_though_all_subjects_are_shared() -> None:
    found = [
        kid_of(*paired(f"kid {i}", 30, 0.0), resamples=20, permutations=50, seed=str(i), label="") for i in range(20)
    ]
    assert [f["value"] for f in found] == pytest.approx([0.0] * 20, abs=1e-9)
    a, b = paired("kid", 30, 0.1)
    moved = Sample(a.features + 1.0, a.units)
    different = kid_of(moved, b, resamples=20, permutations=199, seed="", label="")
    assert different["p_value"] < 0.05


def test_permutations_swap_shared_subjects_and_share_out_the_rest() -> None:
    units = np.array([0, 1, 2, 3, 4, 5, 2, 3, 6, 7, 8])
    first = np.arange(11) < 6
    chosen = kid._permuted(units, first, 200, philox("test", "swaps"))
    for unit in (2, 3):
        rows = chosen[:, units == unit]
        assert (rows.sum(1) == 1).all()
        assert 0.35 < rows[:, 0].mean() < 0.65
    assert (chosen.sum(1) == 6).all()
