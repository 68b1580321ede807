"""The metric `frechet`: squared distance between the Gaussians fitted to both sets, along the main directions."""

from __future__ import annotations

import numpy as np

from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale, resampled
from meddiff_steps.statistics.bootstrap import Figure, centred
from meddiff_steps.statistics.bootstrap import figure as with_interval

ENTRY = {
    "order": 1,
    "title": "Frechet distance",
    "summary": (
        "Squared distance between the Gaussians fitted to both sets, along the main directions in which real scans"
        " vary (as FID, in another feature space)."
    ),
    "source": "Dowson and Landau 1982, equation 4; Heusel et al. 2017",
    "blind_to": (
        "whatever leaves mean and covariance alone: noise of the right spectrum, several modes, copies of training"
        " scans; and directions beyond the components kept. Too large with few images: read it beside its floor."
    ),
}


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

    |mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) with covariances A and B (Dowson and Landau 1982, equation
    4; Heusel et al. 2017).  The trace comes from the eigenvalues of the symmetric product, which are real and not
    negative, so that no matrix root of a product that is not symmetric is needed (`scipy.linalg.sqrtm` may fail or turn
    complex).  monai.metrics.FIDMetric does that, in the precision it is given, and does not run with scipy from 1.18
    on.

    With few images it comes out too large, by about a constant over the number of images: compare only with a floor
    from equal numbers of images.
    """
    moments = [_moments(np.asarray(x, dtype=np.float64), np.ones((1, len(x)))) for x in (a, b)]
    return max(0.0, float(_frechet(*moments)[0]))


def figure(synthetic: Sample, reference: Sample, scale: Scale, draws: Draws) -> Figure:
    """`frechet_distance` along the principal components, with its interval from `draws.slow_resamples`."""
    a, b = (Sample(scale.components(sample.features), sample.units) for sample in (synthetic, reference))
    found = _frechet(
        *(
            _moments(sample.features, weights)
            for sample, weights in zip((a, b), resampled(a, b, draws, "frechet"), strict=True)
        )
    )
    value = frechet_distance(a.features, b.features)
    return with_interval(value, centred(value, found, 0.0), len(np.unique(a.units)))
