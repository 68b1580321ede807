"""What is known of the latents before any network is trained: their scale, and the Gaussian that fits them best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

import numpy as np
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from meddiff_steps.core.errors import UserError

T = TypeVar("T", np.ndarray, Tensor)


@dataclass(frozen=True)
class Standardisation(Generic[T]):
    """Between the first stage's latents and what the diffusion model works on: mean 0 at every place, unit spread.

    The offset is the mean at every position, since most of the variance of a centred cohort is what all subjects share:
    brain against background.  A diffusion model would spend its noise levels on that.  The scale is one number per
    channel, the deviation about the offset (Rombach et al. 2022 use one for all), so that errors keep their visible
    size: small where subjects hardly differ.

    Attributes
    ----------
    offset, scale
        float32 (1, c, *spatial) and (1, c, 1, ...), scale > 0.
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
    variance = np.maximum(square / count - mean**2, 0.0).mean(tuple(range(1, mean.ndim)), keepdims=True)
    scale = np.sqrt(np.maximum(variance, 1e-12))
    return Standardisation(mean[None].astype(np.float32), scale[None].astype(np.float32))


#: Training latents that the principal components are computed from; more change them little and cost memory.
MAX_COMPONENT_ROWS = 1024

#: Ridge penalty of the covariate effects, in rows: effects seen in few subjects are drawn towards 0.
EFFECT_PENALTY = 5.0


#: Smallest unexplained variance of a standardised latent.  Latents have heavier tails than a Gaussian, above all in the
#: background, where few heads reach.
SMALLEST_RESIDUAL = 0.003

#: Training subjects per principal component, at least.  More components describe held-out subjects little better and
#: training subjects much: on 767 simulated brains 64, 96, 128 and 256 components denoise held-out latents with an error
#: of 0.373, 0.365, 0.361 and 0.350, and tell who was trained on with an AUC of 0.64, 0.73, 0.82 and 0.98; on 125 of IXI
#: 16 and 62 make 0.423 and 0.419, with 0.84 and 1.00.
SUBJECTS_PER_COMPONENT = 8

#: Parts for the cross-validated variances.
FOLDS = 5


@dataclass(frozen=True)
class GaussianFit:
    """x | covariates ~ N(features @ effects, basis^T diag(variances) basis + local), a factor analysis.

    x are standardised latents (c, *spatial), flattened to D numbers.  `local` connects the channels at one position and
    nothing else.

    Attributes
    ----------
    effects
        (F, D): change of the mean per covariate feature (`covariate_features`).
    basis
        (R, D): orthonormal principal components of what covariates leave unexplained.
    variances
        (R,): variance along each.
    local_basis, local_variances
        (P, c, c) and (P, c): eigenvectors, in columns, and eigenvalues of the covariance of the c channels at each of
        the P positions, of what effects and components leave unexplained.
    """

    effects: np.ndarray
    basis: np.ndarray
    variances: np.ndarray
    local_basis: np.ndarray
    local_variances: np.ndarray


def fit_gaussian(
    draw: Callable[[int], np.ndarray], features: np.ndarray, rank: int, subjects: np.ndarray
) -> GaussianFit:
    """Fit the Gaussian by ridge regression on the features and principal components of the residuals.

    Parameters
    ----------
    draw
        draw(row) gives one standardised training latent; called for each row once or twice.
    features
        (rows, F) covariate features, 0 where unknown.
    rank
        Number of components; at most an eighth as many as there are subjects (`SUBJECTS_PER_COMPONENT`), and at least
        one.
    subjects
        Whose latent each row is, (rows,): several rows of one subject are held out together.
    """
    features = features.astype(np.float64)
    rows = len(features)
    products = sum(np.outer(features[row], draw(row).ravel()) for row in range(rows))
    gram = features.T @ features + EFFECT_PENALTY * np.eye(features.shape[1])
    effects = np.linalg.solve(gram, products)
    chosen = np.unique(np.linspace(0, rows - 1, min(rows, MAX_COMPONENT_ROWS)).astype(int))
    subjects = np.unique(subjects[chosen], return_inverse=True)[1]
    rank = max(1, min(rank, (subjects.max() + 1) // SUBJECTS_PER_COMPONENT))
    residuals = np.stack([draw(int(row)).ravel() - features[row] @ effects for row in chosen]).astype(np.float32)
    # Components from the smaller of the two Gram matrices.
    gram = (residuals @ residuals.T).astype(np.float64)
    basis = _components(gram, residuals, rank)
    basis *= np.sign(basis[np.arange(rank), np.abs(basis).argmax(1)])[:, None]
    variances, rest = _held_out(gram, residuals, rank, subjects % FOLDS)
    local_basis, local_variances = _local(rest.reshape(len(rest), draw(0).shape[0], -1))
    return GaussianFit(*(a.astype(np.float32) for a in (effects, basis, variances, local_basis, local_variances)))


def _components(gram: np.ndarray, residuals: np.ndarray, rank: int) -> np.ndarray:
    """The leading `rank` principal components of `residuals` (n, D), whose products are `gram` (n, n); float32 (rank,
    D).
    """
    eigenvalues, vectors = np.linalg.eigh(gram)
    weights = vectors[:, ::-1][:, :rank] / np.sqrt(np.maximum(eigenvalues[::-1][:rank], 1e-12))
    return weights.T.astype(np.float32) @ residuals


def _held_out(gram: np.ndarray, residuals: np.ndarray, rank: int, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance along components (rank,), and what they leave unexplained (n, D), of subjects that they were not
    computed from.

    Components fit their own subjects too well: on the demo's 767 training subjects, the leading 256 would explain 0.89
    of the variance of the training subjects and 0.73 of that of others.
    """
    squares, rest = np.zeros(rank), residuals.copy()
    for fold in np.unique(folds):
        held, kept = folds == fold, folds != fold
        components = _components(gram[np.ix_(kept, kept)], residuals[kept], rank)
        coefficients = residuals[held] @ components.T
        squares += np.square(coefficients, dtype=np.float64).sum(0)
        rest[held] -= coefficients @ components
    return np.maximum(squares / len(gram), 1e-6), rest


def _local(rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvectors and eigenvalues of the covariance of the channels at each position, for (n, c, P).

    Correlations are shrunk towards none as far as Ledoit & Wolf (2004) find best for so many subjects; variances are
    not.
    """
    vectors, values = [], []
    for position in np.moveaxis(rest, 2, 0).astype(np.float64):
        deviations = np.sqrt(np.maximum(np.square(position).mean(0), SMALLEST_RESIDUAL))
        correlations, _ = ledoit_wolf(position / deviations, assume_centered=True)
        eigenvalues, eigenvectors = np.linalg.eigh(correlations * np.outer(deviations, deviations))
        values.append(np.maximum(eigenvalues, SMALLEST_RESIDUAL))
        vectors.append(eigenvectors)
    return np.stack(vectors), np.stack(values)


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


def gaussian_tensors(
    draw: Callable[[int], np.ndarray], encoded: np.ndarray, levels: list[int], rank: int, subjects: np.ndarray
) -> dict[str, np.ndarray]:
    """`fit_gaussian` under the names that its tensors have in a denoiser.

    Parameters
    ----------
    draw, rank, subjects
        As of `fit_gaussian`.
    encoded, levels
        As of `covariate_features`.
    """
    fitted = fit_gaussian(draw, covariate_features(encoded, levels), rank, subjects)
    return {f"prior.{name}": value for name, value in asdict(fitted).items()}
