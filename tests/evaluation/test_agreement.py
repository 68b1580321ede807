"""Published figures against implementations that others wrote: torchmetrics, prdc, scikit-image, SciPy.

Frechet distance, KID and precision to coverage are also compared with brute force beside their own tests, and DeLong's
test with published figures (tests/augmentation/test_comparison.py).
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from prdc import compute_prdc
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity as skimage_ssim
from sklearn.metrics import brier_score_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from meddiff_steps.config import Downstream
from meddiff_steps.core.random_streams import philox
from meddiff_steps.downstream.comparison import Resampling, calibration_error
from meddiff_steps.downstream.results import Scored, measure
from meddiff_steps.evaluation import diversity
from meddiff_steps.evaluation.image_quality import SsimSettings, structural_similarity
from meddiff_steps.evaluation.realism import frechet, kid
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.statistics.differences import holm
from meddiff_steps.statistics.measures import auc, auc_within, brier, mean_of, pearson


def points(label: str, n: int, dims: int = 8, shift: float = 0.0) -> np.ndarray:
    return philox("test", f"agreement {label}").normal(size=(n, dims)) + shift


# ------------------------------------------------------------------------------------ realism and diversity


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    a, b = points("a", 90), 1.3 * points("b", 70, shift=0.4)
    moments = [torch.from_numpy(m) for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet.frechet_distance(a, b) == pytest.approx(float(_compute_fid(*moments)), rel=1e-9)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_kid_is_that_of_torchmetrics(shift: float) -> None:
    a, b = points("a", 30), points("b", 30, shift=shift)  # torchmetrics takes samples of one size
    assert kid.kernel_distance(a, b) == pytest.approx(
        float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b))), rel=1e-9
    )


def test_the_p_value_of_kid_is_that_of_scipys_permutation_test() -> None:
    a, b = points("a", 14, 3), points("b", 18, 3, shift=0.35)
    draws = Draws(resamples=100, slow_resamples=100, permutations=1500, seed="", label="")
    found = kid.figure(Sample(a, np.arange(14)), Sample(b, np.arange(14, 32)), Scale.of(b, 14), draws)

    pooled = np.concatenate([a, b])

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return kid.kernel_distance(pooled[x.astype(int)], pooled[y.astype(int)])

    sides, rng = (np.arange(14), np.arange(14, 32)), np.random.default_rng(0)
    other = scipy.stats.permutation_test(
        sides,
        distance,
        permutation_type="independent",
        n_resamples=1500,
        vectorized=False,
        alternative="greater",
        rng=rng,
    )
    assert 0.005 < other.pvalue < 0.5
    assert found["p_value"] == pytest.approx(other.pvalue, abs=4 * math.sqrt(2 * other.pvalue / 1500))


@pytest.mark.parametrize(("real", "made", "k"), [(60, 45, 5), (25, 70, 3), (40, 40, 1)])
def test_precision_recall_density_and_coverage_are_those_of_prdc(real: int, made: int, k: int) -> None:
    a, b = points("real", real, 4), 1.2 * points("made", made, 4, shift=1.5)
    found = {name: float(values.mean()) for name, values in diversity.manifold_shares(a, b, k).items()}
    assert found == pytest.approx(compute_prdc(a, b, k), abs=1e-12)


def test_vendi_score_is_the_exponential_of_von_neumanns_entropy() -> None:
    """Friedman and Dieng 2023, equation 1, by a matrix logarithm instead of eigenvalues."""
    kernel = np.exp(-np.square(points("vendi", 30, 3)[:, None] - points("vendi", 30, 3)[None]).sum(2) / 4)
    shares = kernel / 30
    entropy = -np.trace(shares @ scipy.linalg.logm(shares)).real
    assert 1.5 < math.exp(entropy) < 29
    assert diversity.vendi_score(kernel) == pytest.approx(math.exp(entropy), rel=1e-8)


# ------------------------------------------------------------------------------------ structural similarity


def pictures(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Smooth images with values in [0, 1], and noisy copies: float32 (3, 1, *shape) each."""
    rng = philox("test", f"pictures {shape}")
    smooth = np.stack([gaussian_filter(rng.random(shape), 3) for _ in range(3)])
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    noisy = np.clip(
        smooth
        + rng.normal(
            0, [[[0.02]], [[0.1]], [[0.3]]] if len(shape) == 2 else [[[[0.02]]], [[[0.1]]], [[[0.3]]]], smooth.shape
        ),
        0,
        1,
    )
    return smooth[:, None].astype(np.float32), noisy[:, None].astype(np.float32)


@pytest.mark.parametrize(("shape", "kernel", "scales"), [((180, 200), 11, 5), ((32, 40, 32), 7, 3)])
def test_ms_ssim_is_its_definition(shape: tuple[int, ...], kernel: int, scales: int) -> None:
    """Wang, Simoncelli and Bovik 2003, equation 7: contrast and structure at every scale, luminance at the coarsest
    alone.
    """
    smooth, noisy = pictures(shape)
    settings = SsimSettings.for_shape(shape)
    assert (settings.kernel_size, len(settings.weights)) == (kernel, scales)
    half = kernel // 2

    def local(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, radius=half)[(slice(half, -half),) * len(shape)]

    def halved(x: np.ndarray) -> np.ndarray:
        for axis in range(x.ndim):
            even = x.take(range(x.shape[axis] // 2 * 2), axis)
            x = (even.take(range(0, even.shape[axis], 2), axis) + even.take(range(1, even.shape[axis], 2), axis)) / 2
        return x

    found = structural_similarity(smooth, noisy, settings)
    for i, (a, b) in enumerate(zip(smooth[:, 0].astype(float), noisy[:, 0].astype(float), strict=True)):
        product = 1.0
        for scale, weight in enumerate(settings.weights):
            ma, mb = local(a), local(b)
            contrast = (2 * (local(a * b) - ma * mb) + 0.03**2) / (
                local(a * a) - ma**2 + local(b * b) - mb**2 + 0.03**2
            )
            luminance = (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2)
            last = scale == scales - 1
            product *= max(0.0, float((contrast * luminance if last else contrast).mean())) ** weight
            a, b = halved(a), halved(b)
        assert found[i] == pytest.approx(product, abs=5e-5)


def test_ms_ssim_is_nearly_that_of_torchmetrics() -> None:
    """Nearly: torchmetrics reflects images at their edges and counts the contrast there, too, which the definition does
    not.
    """
    smooth, noisy = pictures((180, 200))
    settings = SsimSettings.for_shape(
        (180, 200)
    )  # the window of 11 pixels that torchmetrics always takes with sigma 1.5
    expected = multiscale_structural_similarity_index_measure(
        torch.from_numpy(noisy), torch.from_numpy(smooth), data_range=1.0, betas=settings.weights, reduction="none"
    )
    assert 0.2 < float(expected.min()) < float(expected.max()) < 1.0
    np.testing.assert_allclose(structural_similarity(smooth, noisy, settings), expected.numpy(), atol=2e-3)


def test_ssim_is_that_of_scikit_image_in_3d() -> None:
    smooth, noisy = pictures((20, 24, 22))
    options = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }  # scikit-image's window is 11 voxels, then
    expected = [skimage_ssim(a[0], b[0], data_range=1.0, **options) for a, b in zip(smooth, noisy, strict=True)]
    np.testing.assert_allclose(structural_similarity(smooth, noisy, SsimSettings(11, (1.0,))), expected, atol=1e-4)


# ---------------------------------------------------------------------------------- augmentation and intervals


def test_calibration_error_and_brier_score_are_those_of_torchmetrics_and_scikit_learn() -> None:
    rng = philox("test", "calibration")
    scores = rng.random(400)
    labels = rng.random(400) < scores**2
    everyone = np.ones((1, 400))
    expected = binary_calibration_error(torch.from_numpy(scores), torch.from_numpy(labels).long(), n_bins=10, norm="l1")
    assert calibration_error(labels, scores)(everyone)[0] == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) > 0.1
    assert brier(labels, scores)(everyone)[0] == pytest.approx(brier_score_loss(labels, scores))


def test_holms_adjustment_is_its_definition() -> None:
    """Holm 1979: the largest of (m - rank + 1) p over the p values that are not larger; the example is his idea with
    numbers.
    """
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    p = philox("test", "holm").random(12) ** 3
    ranked = np.sort(p)
    expected = [min(1.0, max((12 - j) * ranked[j] for j in range(12) if ranked[j] <= value)) for value in p]
    assert holm(list(p)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["mean", "pearson", "auc"])
def test_intervals_are_those_of_scipys_bootstrap(name: str) -> None:
    rng = philox("test", "bootstrap")
    x = rng.normal(size=80)
    y = 0.6 * x + rng.normal(size=80)
    labels = y > 0
    ours = {"mean": mean_of(x), "pearson": pearson(x, y), "auc": auc(labels, x)}[name]
    theirs: dict[str, tuple[tuple[np.ndarray, ...], Callable[..., float]]] = {
        "mean": ((x,), lambda a: float(np.mean(a))),
        "pearson": ((x, y), lambda a, b: float(np.corrcoef(a, b)[0, 1])),
        "auc": ((labels, x), lambda a, b: float(roc_auc_score(a, b))),
    }
    data, statistic = theirs[name]
    draws = 4000 if name != "auc" else 1500
    other = scipy.stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=draws,
        rng=np.random.default_rng(1),
    )
    found = Bootstrap(range(80), 4000, "").figure(ours)
    # Ends of an interval from some thousand resamples scatter by about 2.7 standard errors over the root of their
    # number.
    slack = 4 * 2.7 * other.standard_error * math.sqrt(1 / 4000 + 1 / draws)
    interval = other.confidence_interval
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=slack)
    assert slack < 0.25 * (interval.high - interval.low)


def test_intervals_over_subjects_with_several_scans_are_those_of_scipys_bootstrap() -> None:
    """A subject as one row of sums is what scipy can resample; ours resamples its rows."""
    rng = philox("test", "clusters")
    scans = rng.integers(1, 6, 50)
    units = np.repeat(np.arange(50), scans)
    values = np.repeat(rng.normal(size=50), scans) + rng.normal(size=len(units))
    sums = np.bincount(units, values)
    other = scipy.stats.bootstrap(
        (sums, scans),
        lambda s, n: s.sum() / n.sum(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(2),
    )
    found = Bootstrap(units, 4000, "").figure(mean_of(values))
    interval = other.confidence_interval
    assert (found["low"], found["high"]) == pytest.approx(
        (interval.low, interval.high), abs=0.25 * other.standard_error
    )


def test_worst_group_and_gap_are_those_of_the_groups_one_by_one() -> None:
    """fairlearn's MetricFrame (`group_min`, `difference`) applies a metric to each group; so does this, with
    scikit-learn's AUC.
    """
    rng = philox("test", "groups")
    groups, levels = np.array(["F", "M", "X"])[rng.integers(0, 3, 150)], rng.integers(0, 2, 150)
    scores = 1 / (1 + np.exp(-rng.normal(size=150) - 0.8 * levels))
    probability = np.stack([1 - scores, scores], axis=1)[None, None].repeat(2, axis=1)  # one generator, two classifiers
    settings = Downstream.model_validate({"target": "t", "bootstrap": 200})
    entry = measure(Scored(np.arange(150).astype(str), levels, groups, {"real": probability}), settings, "", "")[0][
        "real"
    ]
    each = [float(roc_auc_score(levels[groups == g], scores[groups == g])) for g in ("F", "M", "X")]
    assert [entry["groups"][g]["value"] for g in ("F", "M", "X")] == pytest.approx(each, abs=1e-5)
    assert entry["worst_group_auc"]["value"] == pytest.approx(min(each), abs=1e-5)
    assert entry["gap"]["value"] == pytest.approx(max(each) - min(each), abs=1e-5)
    assert auc_within(levels, probability[0, 0], groups == "X")(np.ones((1, 150)))[0] == pytest.approx(each[2])
    assert Resampling(range(150), 2, 200, "", "").subjects.n == 150
