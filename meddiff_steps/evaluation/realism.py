"""Realism: how far the distribution of synthetic images is from that of real ones, in a feature space.

Every figure compares synthetic images with held-out real scans.  Its floor is the same figure with as many training
scans in place of the synthetic images: what a generator as good as reality would get with these numbers of images.
Figures of different feature spaces or numbers of images cannot be compared; a figure and its floor can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from meddiff_steps.core.random_streams import philox
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, centred, figure, rounded
from meddiff_steps.statistics.measures import auc

#: Principal components kept at most.  A covariance of d components has d^2 / 2 numbers: fewer than five images per
#: component leave it mostly noise.
MAX_COMPONENTS, IMAGES_PER_COMPONENT = 64, 5
#: Fewer images than this, of any kind, say nothing about a distribution.
MIN_IMAGES = 10
#: Inverse penalty and folds of the classifier.
CLASSIFIER_C, FOLDS = 0.1, 5


@dataclass(frozen=True)
class Sample:
    """Features of some images.

    Attributes
    ----------
    features
        float64 (n, d).
    units
        What is resampled: the subject of each real scan, the noise of each synthetic image.
    """

    features: np.ndarray
    units: np.ndarray

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Scale:
    """Units of a feature space: standard deviations over training scans, and the main directions of their variation.

    Attributes
    ----------
    mean, spread
        (d,); a feature that is constant over training scans keeps its own unit.
    basis
        Principal components, orthonormal (d, k).
    explained
        Share of the variance of training scans along each, (k,).
    """

    mean: np.ndarray
    spread: np.ndarray
    basis: np.ndarray
    explained: np.ndarray

    @classmethod
    def of(cls, training: np.ndarray, images: int) -> Self:
        """Learn from training features (n, d); `images` is the size of the smallest sample that will be measured."""
        features = np.asarray(training, dtype=np.float64)
        mean, spread = features.mean(0), features.std(0)
        spread = np.where(spread > 1e-6 * np.maximum(np.abs(mean), 1e-3), spread, 1.0)
        _, singular, directions = np.linalg.svd((features - mean) / spread, full_matrices=False)
        count = max(2, min(MAX_COMPONENTS, images // IMAGES_PER_COMPONENT, len(directions)))
        directions = (
            directions[:count]
            * np.where(np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1) < 0, -1.0, 1.0)[:count]
        )
        power = np.square(singular)
        return cls(mean, spread, directions.T, power[:count] / max(power.sum(), 1e-300))

    def standard(self, features: np.ndarray) -> np.ndarray:
        """Features in standard deviations of training scans, float64 (n, d)."""
        return (np.asarray(features, dtype=np.float64) - self.mean) / self.spread

    def components(self, standard: np.ndarray) -> np.ndarray:
        """Standardised features along the principal components, (n, k)."""
        return standard @ self.basis


# ------------------------------------------------------------------------------------------------- Frechet


def _moments(features: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (b, k) and covariance (b, k, k) of rows drawn as often as the weights (b, n) say."""
    centre = features.mean(0)
    rows = features - centre
    total = weights.sum(1)
    mean = weights @ rows / total[:, None]
    products = (weights @ (rows[:, :, None] * rows[:, None, :]).reshape(len(rows), -1)).reshape(
        len(weights), *(rows.shape[1],) * 2
    )
    covariance = (products - total[:, None, None] * mean[:, :, None] * mean[:, None, :]) / np.maximum(total - 1.0, 1.0)[
        :, None, None
    ]
    return mean + centre, covariance


def _frechet(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]) @ vectors.transpose(0, 2, 1)
    inner = np.linalg.eigvalsh(root @ cov_b @ root)
    trace = np.trace(cov_a, axis1=1, axis2=2) + np.trace(cov_b, axis1=1, axis2=2)
    return np.square(mean_a - mean_b).sum(1) + trace - 2.0 * np.sqrt(np.maximum(inner, 0.0)).sum(1)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to features, (n, d) and (m, d), float64.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with covariances A and B (Dowson and Landau 1982, equation 4; Heusel et
    al. 2017).  The trace comes from the eigenvalues of the symmetric product, which are real and not negative, so that no matrix root
    of a product that is not symmetric is needed (`scipy.linalg.sqrtm` may fail or turn complex).  monai.metrics.FIDMetric does
    that, in the precision it is given, and does not run with scipy from 1.18 on.

    With few images it comes out too large, by about a constant over the number of images: compare only with a floor
    from equal numbers of images.
    """
    moments = [_moments(np.asarray(x, dtype=np.float64), np.ones((1, len(x)))) for x in (a, b)]
    return max(0.0, float(_frechet(*moments)[0]))


# ------------------------------------------------------------------------------------------------- KID


def polynomial_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(x.y / d + 1)^3 of all rows (n, d) and (m, d), float64 (n, m); Binkowski et al. 2018, section 4."""
    return (a @ b.T / a.shape[1] + 1.0) ** 3


def _mmd(kernel: np.ndarray, first: np.ndarray, second: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD between rows drawn as the weights `first` and `second` say, (b, n) each, of one pooled
    kernel (n, n).

    Rows of one unit are not compared within a sample: scans of a person, or a row that was drawn twice, are alike for
    another reason.
    """
    same = np.equal.outer(units, units)
    compared = np.where(same, 0.0, kernel)
    within = []
    for weights in (first, second):
        pairs = weights.sum(1) ** 2 - ((weights @ same) * weights).sum(1)
        within.append(((weights @ compared) * weights).sum(1) / np.maximum(pairs, 1.0))
    between = ((first @ kernel) * second).sum(1) / (first.sum(1) * second.sum(1))
    return within[0] + within[1] - 2.0 * between


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel inception distance (KID): unbiased squared MMD with `polynomial_kernel` of features (n, d) and (m, d).

    Gretton et al. 2012, equation 3.  Its expectation does not depend on the number of images, so samples of one
    distribution give about 0, above or below.  monai.metrics.MMDMetric has a linear kernel, which compares means only.
    """
    pooled = np.concatenate([a, b]).astype(np.float64)
    first = np.arange(len(pooled)) < len(a)
    return float(
        _mmd(polynomial_kernel(pooled, pooled), first[None] * 1.0, ~first[None] * 1.0, np.arange(len(pooled)))[0]
    )


def _permuted(units: np.ndarray, firsts: int, permutations: int, rng: np.random.Generator) -> np.ndarray:
    """Rows (permutations, n), true for those of `firsts` units chosen at random: a subject is never divided."""
    names, unit_of_row = np.unique(units, return_inverse=True)
    order = rng.random((permutations, len(names))).argsort(axis=1)
    return (order < firsts)[:, unit_of_row]


def kernel_figure(a: Sample, b: Sample, *, resamples: int, permutations: int, seed: str, label: str) -> Figure:
    """KID of two samples with its interval and the p-value of a permutation test of equal distributions.

    Returns
    -------
    dict
        A figure with `p_value`, (1 + permutations at least as far apart) / (1 + permutations).
    """
    pooled = np.concatenate([a.features, b.features])
    kernel = polynomial_kernel(pooled, pooled)
    first = np.arange(len(pooled)) < len(a)
    names = np.concatenate([np.char.add("a:", a.units.astype(str)), np.char.add("b:", b.units.astype(str))])
    units = np.unique(names, return_inverse=True)[1]
    value = float(_mmd(kernel, first[None] * 1.0, ~first[None] * 1.0, units)[0])
    boots = [
        Bootstrap(sample.units, resamples, seed, f"kid {label} {side}")
        for side, sample in zip("ab", (a, b), strict=True)
    ]
    weights = [np.zeros((resamples, len(pooled))) for _ in boots]
    weights[0][:, first], weights[1][:, ~first] = (boot.all_weights() for boot in boots)
    draws = _mmd(kernel, weights[0], weights[1], units)
    chosen = _permuted(units, boots[0].n, permutations, philox(seed, f"kid permutations {label}"))
    shuffled = _mmd(kernel, chosen * 1.0, ~chosen * 1.0, units)
    p_value = (1 + int((shuffled >= value).sum())) / (1 + permutations)
    return figure(value, centred(value, draws), boots[0].n) | {"p_value": rounded(p_value)}


# ------------------------------------------------------------------------------------------- classifier


def classifier_figure(a: Sample, b: Sample, *, resamples: int, seed: str, label: str) -> Figure:
    """AUC of a classifier that is to tell `a` from `b`: 0.5 if it cannot, 1 if it always can (Lopez-Paz and Oquab
    2017).

    Logistic regression on standardised features, judged on images of units it has not learnt from (five folds).  The
    AUC over all folds together is slightly below 0.5 where there is nothing to tell.
    """
    features = np.concatenate([a.features, b.features])
    labels = np.concatenate([np.ones(len(a), bool), np.zeros(len(b), bool)])
    units = np.concatenate([np.char.add("a:", a.units.astype(str)), np.char.add("b:", b.units.astype(str))])
    folds = min(FOLDS, len(np.unique(a.units)), len(np.unique(b.units)))
    boot = Bootstrap(units, resamples, seed, f"classifier {label}")
    if folds < 2:
        return figure(np.nan, np.full(resamples, np.nan), boot.n)
    scores = np.empty(len(features))
    state = int(philox(seed, f"classifier folds {label}").integers(2**31))
    for fit, check in StratifiedGroupKFold(folds, shuffle=True, random_state=state).split(features, labels, units):
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=CLASSIFIER_C, max_iter=1000, class_weight="balanced")
        ).fit(features[fit], labels[fit])
        scores[check] = model.decision_function(features[check])
    return boot.figure(auc(labels, scores))


# ------------------------------------------------------------------------------------------------ together


def frechet_figure(a: Sample, b: Sample, *, resamples: int, seed: str, label: str) -> Figure:
    """`frechet_distance` of two samples with its interval."""
    boots = [
        Bootstrap(sample.units, resamples, seed, f"frechet {label} {side}")
        for side, sample in zip("ab", (a, b), strict=True)
    ]
    draws = _frechet(
        *(_moments(sample.features, boot.all_weights()) for sample, boot in zip((a, b), boots, strict=True))
    )
    value = frechet_distance(a.features, b.features)
    return figure(value, centred(value, draws, 0.0), boots[0].n)


def realism(
    samples: Mapping[str, Sample], scale: Scale, *, resamples: int, slow_resamples: int, permutations: int, seed: str
) -> dict[str, Any]:
    """Realism of one feature space.

    Parameters
    ----------
    samples
        `synthetic`, `training` (as many) and `held_out`, in standard deviations (`Scale.standard`); at least `MIN_IMAGES` each.
    scale
        Of the space.
    resamples, slow_resamples, permutations, seed
        Of the classifier's bootstrap, of the other bootstraps, of the permutation test.

    Returns
    -------
    dict
        `frechet` (squared, on principal components), `kid` and `classifier_auc` (on all features), each a figure with a `floor`.
    """
    reference = samples["held_out"]
    out: dict[str, Any] = {}
    for kind in ("synthetic", "training"):
        sample = samples[kind]
        reduced = [Sample(scale.components(s.features), s.units) for s in (sample, reference)]
        found = {
            "frechet": frechet_figure(*reduced, resamples=slow_resamples, seed=seed, label=kind),
            "kid": kernel_figure(
                sample, reference, resamples=slow_resamples, permutations=permutations, seed=seed, label=kind
            ),
            "classifier_auc": classifier_figure(sample, reference, resamples=resamples, seed=seed, label=kind),
        }
        out = found if not out else {name: out[name] | {"floor": found[name]} for name in found}
    return out
