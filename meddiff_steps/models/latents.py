"""What is known of the latents before any network is trained: their scale, and the Gaussian that fits them best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from meddiff_steps.errors import UserError

#: Deviations at a position are not allowed below this share of the channel's: where training scans hardly differ (the
#: background), a new subject that does differ would otherwise lie dozens of deviations away.
FLOOR = 0.1


def standardisation(latents: Iterable[np.ndarray], kind: Literal["position", "channel"]) -> tuple[np.ndarray, np.ndarray]:
    """Offset and scale of the training latents, so that (z - offset) / scale has mean 0 and deviation 1; one pass.

    With one scale per channel, most of the variance of a centred cohort is what all subjects share: brain against
    background. A diffusion model then spends its noise levels on that, and small errors of the large values show as
    blocks. Standardised at every position, the latents are what makes subjects differ, and errors in the background
    are as small as its variation.

    Parameters
    ----------
    latents
        Posterior means, each (c, *spatial).
    kind
        `position`: statistics per channel and position.  `channel`: per channel only (Rombach et al. 2022 use one
        number).

    Returns
    -------
    offset, scale
        float32 (c, *spatial), scale > 0.

    Raises
    ------
    UserError
        There are no latents.
    """
    count = 0
    total = square = np.zeros(1)
    for latent in latents:
        z = latent.astype(np.float64)
        count, total, square = count + 1, total + z, square + z**2
    if count == 0:
        raise UserError("no training latent was found: the train split is empty after preprocessing. See preprocessed/qc.parquet.")
    mean, second = total / count, square / count
    axes = tuple(range(1, mean.ndim))
    if kind == "channel":
        channel_mean = mean.mean(axes, keepdims=True)
        deviation = np.sqrt(np.maximum(second.mean(axes, keepdims=True) - channel_mean**2, 1e-12))
        mean, deviation = np.broadcast_to(channel_mean, mean.shape), np.broadcast_to(deviation, mean.shape)
    else:
        variance = np.maximum(second - mean**2, 0.0)
        deviation = np.sqrt(variance + FLOOR**2 * np.maximum(variance.mean(axes, keepdims=True), 1e-12))
    return mean.astype(np.float32), deviation.astype(np.float32)


#: Training latents that the principal components are computed from; more change them little and cost memory.
MAX_COMPONENT_ROWS = 1024

#: Ridge penalty of the covariate effects, in rows: effects seen in few subjects are drawn towards 0.
EFFECT_PENALTY = 5.0


#: Smallest unexplained variance of a standardised latent.  Latents have heavier tails than a Gaussian, above all in the
#: background, where few heads reach; with 1e-4 the demo's training loss rose from 0.5 to 0.8, driven by such places.
SMALLEST_RESIDUAL = 0.05


@dataclass(frozen=True)
class LatentGaussian:
    """x | covariates ~ N(features @ effects, basis^T diag(variances) basis + diag(residual)), a factor analysis.

    x are standardised latents, flattened to D numbers.

    Attributes
    ----------
    effects
        (F, D): change of the mean per covariate feature (`covariate_features`).
    basis
        (R, D): orthonormal principal components of what covariates leave unexplained.
    variances
        (R,): variance along each.
    residual
        (D,): variance of each number that effects and components leave unexplained.
    """

    effects: np.ndarray
    basis: np.ndarray
    variances: np.ndarray
    residual: np.ndarray


def fit_gaussian(draw: Callable[[int], np.ndarray], features: np.ndarray, rank: int) -> LatentGaussian:
    """Fit the Gaussian by ridge regression on the features and principal components of the residuals.

    Parameters
    ----------
    draw
        draw(row) gives one standardised training latent; called for each row once or twice.
    features
        (rows, F) covariate features, 0 where unknown.
    rank
        Number of components; fewer if there are fewer rows than eight per component.
    """
    features = features.astype(np.float64)
    rows = len(features)
    products = sum(np.outer(features[row], draw(row).ravel()) for row in range(rows))
    gram = features.T @ features + EFFECT_PENALTY * np.eye(features.shape[1])
    effects = np.linalg.solve(gram, products)
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, MAX_COMPONENT_ROWS)).astype(int))
    rank = max(1, min(rank, len(chosen) // 8))
    residuals = np.stack([draw(int(row)).ravel() - features[row] @ effects for row in chosen]).astype(np.float32)
    # Components from the smaller of the two Gram matrices.
    eigenvalues, vectors = np.linalg.eigh((residuals @ residuals.T).astype(np.float64))
    order = np.argsort(eigenvalues)[::-1][:rank]
    basis = (vectors[:, order].T @ residuals) / np.sqrt(np.maximum(eigenvalues[order], 1e-12))[:, None]
    basis *= np.sign(basis[np.arange(rank), np.abs(basis).argmax(1)])[:, None]
    variances = eigenvalues[order] / len(chosen)
    unexplained = residuals - (residuals @ basis.T) @ basis
    freedom = max(len(chosen) - rank - features.shape[1], 1)
    residual = np.maximum(np.square(unexplained, dtype=np.float64).sum(0) / freedom, SMALLEST_RESIDUAL)
    return LatentGaussian(*(a.astype(np.float32) for a in (effects, basis, variances, residual)))


def covariate_features(encoded: np.ndarray, levels: list[int]) -> np.ndarray:
    """Linear features of encoded covariates: values as they are, levels as 0/1 columns minus their even share.

    Parameters
    ----------
    encoded
        (n, k), NaN where missing; a missing covariate contributes 0.
    levels
        Per covariate: the number of levels, or 0 for a continuous one.

    Returns
    -------
    ndarray
        float32 (n, F).
    """
    columns = []
    for value, count in zip(encoded.T, levels, strict=True):
        known = np.isfinite(value)
        if count == 0:
            columns.append(np.where(known, value, 0.0))
        else:
            columns += [np.where(known, (value == level) - 1.0 / count, 0.0) for level in range(count)]
    return np.stack(columns, 1).astype(np.float32)
