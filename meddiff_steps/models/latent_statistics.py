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

#: Rows from which the directions of the readout are computed; more change them little and cost memory.
MAX_READOUT_ROWS = 1024

#: Ridge penalties of the readout that are tried, as shares of a latent's mean square.
READOUT_PENALTIES = (0.003, 0.03, 0.3, 3.0)

#: Parts for the held-out deviations.
FOLDS = 5

#: A direction of which less is left, beside the directions before it, is none.
SMALLEST_SHARE = 1e-3

#: Smallest variance of a covariate feature, of 1 for most: a level that nobody has would make the others' covariance
#: singular.
SMALLEST_VARIANCE = 1e-4


def fit_effects(
    draw: Callable[[int], np.ndarray], features: np.ndarray, known: np.ndarray, subjects: np.ndarray
) -> dict[str, np.ndarray]:
    """How latents depend on covariates, linearly; the state of `models.denoiser.effects.CovariateEffects` by name.

    Effects by ridge regression of latents on features less their means, 0 where unknown; directions of the readout by
    ridge regression of features on latents, and what is left along them in subjects that were held out.

    Parameters
    ----------
    draw
        draw(row) gives one standardised training latent, (c, *spatial); called for each row some times.
    features, known
        (rows, F) each, as of `models.denoiser.effects.covariate_features`.
    subjects
        Whose latent each row is, (rows,): rows of one subject are held out together.
    """
    count = np.maximum(known.sum(0), 1)
    mean = (features * known).sum(0) / count
    centred = np.where(known, features - mean, 0.0).astype(np.float64)
    pairs = np.maximum(known.T.astype(np.float64) @ known, 1.0)
    covariance = centred.T @ centred / pairs
    each = len(centred) / len(np.unique(subjects))
    products = np.zeros((centred.shape[1], draw(0).size))
    for row in range(len(centred)):
        products += np.outer(centred[row], draw(row).ravel())
    effects = _ridge(centred, products, each)
    square, shape = 0.0, draw(0).shape
    for row in range(len(centred)):
        square += float(np.square(draw(row).ravel() - centred[row] @ effects).mean())
    deviation = float(np.sqrt(square / len(centred)))
    chosen = np.unique(np.linspace(0, len(centred) - 1, min(len(centred), MAX_READOUT_ROWS)).astype(int))
    latents = np.stack([draw(int(row)).ravel() for row in chosen]).astype(np.float32)
    readout, deviations = _readout(latents, centred[chosen], subjects[chosen], each)
    return {
        "effects": effects.reshape(-1, *shape).astype(np.float32),
        "feature_mean": mean.astype(np.float32),
        "feature_covariance": _positive(covariance).astype(np.float32),
        "deviation": np.float32(deviation),
        "readout": readout.reshape(-1, *shape).astype(np.float32),
        "readout_deviations": deviations.astype(np.float32),
    }


def _ridge(features: np.ndarray, products: np.ndarray, each: float) -> np.ndarray:
    """(F, D) effects of features (rows, F) whose products with latents are (F, D); `each`: rows of one subject."""
    gram = features.T @ features + EFFECT_PENALTY * each * np.eye(features.shape[1])
    return np.linalg.solve(gram, products)


def _readout(
    latents: np.ndarray, features: np.ndarray, subjects: np.ndarray, each: float
) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal directions (F, D) that span where features (n, F) are read from latents (n, D), and the deviations
    (F,) of latents along them, less their effects, in subjects that were held out of all fits.

    A feature that does not vary, or that others give, has no direction of its own: a row of zeros, of deviation 1.
    """
    gram = (latents @ latents.T).astype(np.float64)
    folds = np.unique(subjects, return_inverse=True)[1] % FOLDS
    penalties = np.trace(gram) / len(gram) * np.array(READOUT_PENALTIES)
    errors = np.zeros(len(penalties))
    for fold in np.unique(folds):
        held, kept = folds == fold, folds != fold
        for i, penalty in enumerate(penalties):
            weights = _dual(gram[np.ix_(kept, kept)], features[kept], penalty)
            errors[i] += np.square(gram[np.ix_(held, kept)] @ weights - features[held]).sum()
    penalty = penalties[errors.argmin()]
    squares = np.zeros(features.shape[1])
    for fold in np.unique(folds):
        held, kept = folds == fold, folds != fold
        effects = _ridge(features[kept], features[kept].T @ latents[kept], each)
        rows = _orthonormal(_dual(gram[np.ix_(kept, kept)], features[kept], penalty).T @ latents[kept])
        squares += np.square((latents[held] - features[held] @ effects) @ rows.T).sum(0)
    rows = _orthonormal(_dual(gram, features, penalty).T @ latents)
    there = np.square(rows).sum(1) > 0.5
    return rows, np.where(there, np.sqrt(squares / len(latents)), 1.0)


def _dual(gram: np.ndarray, features: np.ndarray, penalty: float) -> np.ndarray:
    """Weights (n, F) of rows in the ridge regression of features (n, F) on what has products `gram` (n, n)."""
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), features)


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Gram-Schmidt, in order; rows that are (nearly) combinations of those before them become zeros."""
    found = np.zeros_like(rows, dtype=np.float64)
    for i, row in enumerate(rows.astype(np.float64)):
        rest = row - (found[:i] @ row) @ found[:i]
        rest = rest - (found[:i] @ rest) @ found[:i]
        size = np.linalg.norm(rest)
        if size > SMALLEST_SHARE * np.linalg.norm(row) and size > 0:
            found[i] = rest / size
    return found


def _positive(covariance: np.ndarray) -> np.ndarray:
    """The nearest covariance whose every direction has some variance: pairwise counts need not give one."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, SMALLEST_VARIANCE)) @ vectors.T
