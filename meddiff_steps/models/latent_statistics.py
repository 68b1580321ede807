"""What is known of the latents before any network is trained: their scale, and linear effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from meddiff_steps.core.errors import UserError

T = TypeVar("T", np.ndarray, Tensor)


@dataclass(frozen=True)
class Standardisation(Generic[T]):
    """Between the first stage's latents and what the diffusion model works on: mean 0 at every place, unit spread.

    The offset is the mean at every position, since most of the variance of a centred cohort is what all subjects share:
    brain against background.  A diffusion model would spend its noise levels on that.  The scale is one number for all
    channels, the deviation about the offset (Rombach et al. 2022), so that errors keep their visible size: small where
    subjects hardly differ, and in channels that hardly matter.

    Attributes
    ----------
    offset, scale
        float32 (1, c, *spatial) and (), scale > 0.
    """

    offset: T
    scale: T

    def __call__(self, latents: T) -> T:
        """Standardised latents, (b, c, *spatial)."""
        return (latents - self.offset) / self.scale

    def inverse(self, standardised: T) -> T:
        """The first stage's latents, (b, c, *spatial)."""
        return standardised * self.scale + self.offset


def measure_standardisation(latents: Iterable[np.ndarray]) -> Standardisation[np.ndarray]:
    """The standardisation of training latents, in one pass.

    Parameters
    ----------
    latents
        Posterior means, each (c, *spatial).

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
        raise UserError(
            "no training latent was found: the train split is empty after preprocessing. See preprocessed/qc.parquet."
        )
    mean = total / count
    variance = float(np.maximum(square / count - mean**2, 0.0).mean())
    return Standardisation(mean[None].astype(np.float32), np.array(max(variance, 1e-12) ** 0.5, np.float32))


#: Ridge penalty of the covariate effects, in scans: effects seen in few are drawn towards 0.
EFFECT_PENALTY = 5.0

#: Smallest variance of a covariate feature, of 1 for most: a level that nobody has would make the others' covariance
#: singular.
SMALLEST_VARIANCE = 1e-4


def fit_effects(
    draw: Callable[[int], np.ndarray], features: np.ndarray, known: np.ndarray, variants: int = 1
) -> dict[str, np.ndarray]:
    """How latents depend on covariates, linearly; the state of `models.denoiser.effects.CovariateEffects` by name.

    Ridge regression on features less their means, 0 where unknown, in two passes.

    Parameters
    ----------
    draw
        draw(row) gives one standardised training latent, (c, *spatial); called for each row twice.
    features, known
        (rows, F) each, as of `models.denoiser.effects.covariate_features`.
    variants
        Rows of one scan, so that the penalty is the same however many there are.
    """
    count = np.maximum(known.sum(0), 1)
    mean = (features * known).sum(0) / count
    centred = np.where(known, features - mean, 0.0).astype(np.float64)
    pairs = np.maximum(known.T.astype(np.float64) @ known, 1.0)
    covariance = centred.T @ centred / pairs
    products = sum(np.outer(centred[row], draw(row).ravel()) for row in range(len(centred)))
    gram = centred.T @ centred + EFFECT_PENALTY * variants * np.eye(centred.shape[1])
    effects = np.linalg.solve(gram, products)
    square, shape = 0.0, draw(0).shape
    for row in range(len(centred)):
        square += float(np.square(draw(row).ravel() - centred[row] @ effects).mean())
    return {
        "effects": effects.reshape(-1, *shape).astype(np.float32),
        "feature_mean": mean.astype(np.float32),
        "feature_covariance": _positive(covariance).astype(np.float32),
        "deviation": np.float32(np.sqrt(square / len(centred))),
    }


def _positive(covariance: np.ndarray) -> np.ndarray:
    """The nearest covariance whose every direction has some variance: pairwise counts need not give one."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, SMALLEST_VARIANCE)) @ vectors.T
