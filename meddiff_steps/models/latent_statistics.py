"""What is known of the latents before any network is trained: their scale, and effects of covariates."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.compute.device import full_float32
from meddiff_steps.core.errors import UserError
from meddiff_steps.models.first_stage.base import halved

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
EFFECT_PENALTY = 1.0

#: Rows from which the directions of the readout are computed, and numbers in them, of 4 bytes; more change them little
#: and cost memory.
MAX_READOUT_ROWS, MAX_READOUT_NUMBERS = 1024, 2**29

#: Ridge penalties of the readout that are tried, as shares of the mean square of what is read.
READOUT_PENALTIES = (0.0003, 0.003, 0.03, 0.3, 3.0)

#: Covariates are read twice: from latents, and from images.
READERS = 2

#: Parts for the held-out deviations.
FOLDS = 25

#: A direction of which less is left, beside the directions before it, is none.
SMALLEST_SHARE = 1e-3

#: Smallest variance of a covariate feature, of 1 for most: a level that nobody has would make the others' covariance
#: singular.
SMALLEST_VARIANCE = 1e-4


@full_float32()
def fit_effects(
    draw: Callable[[int], np.ndarray],
    features: np.ndarray,
    known: np.ndarray,
    subjects: np.ndarray,
    image: Callable[[int], np.ndarray],
    decode: Callable[[Tensor], Tensor],
) -> dict[str, np.ndarray]:
    """How latents depend on features of covariates, linearly; the state of `models.denoiser.effects.CovariateEffects`.

    Effects by ridge regression of latents on features less their means, 0 where unknown; directions of the readout by
    ridge regression of features on latents and, through the decoder, on images; and what is left along them in subjects
    that were held out.  Rows of which nothing is known take no part: taken to be typical, they would weaken the
    readout, and what covariates explain would count as left.

    Parameters
    ----------
    draw
        draw(row) gives one standardised training latent, (c, *spatial); called for each row some times.
    features, known
        (rows, F) each, as of `models.denoiser.effects.covariate_features`.
    subjects
        Whose latent each row is, (rows,): rows of one subject are held out together.
    image
        image(row) gives its scan, (1, *spatial) float32 in [0, 1]; called for each row at most once.
    decode
        Standardised latents, float32 (b, c, *spatial), to images (b, 1, *spatial); differentiable.
    """
    labelled = [int(row) for row in np.flatnonzero(known.any(1))]
    features, known, subjects = features[labelled], known[labelled], subjects[labelled]
    count = np.maximum(known.sum(0), 1)
    mean = (features * known).sum(0) / count
    centred = np.where(known, features - mean, 0.0).astype(np.float64)
    pairs = np.maximum(known.T.astype(np.float64) @ known, 1.0)
    covariance = centred.T @ centred / pairs
    each = len(centred) / len(np.unique(subjects))
    shape = draw(labelled[0]).shape
    products = np.zeros((centred.shape[1], math.prod(shape)))
    for row, values in zip(labelled, centred, strict=True):
        products += np.outer(values, draw(row).ravel())
    effects = _ridge(centred, products, each)
    square = 0.0
    for row, values in zip(labelled, centred, strict=True):
        square += float(np.square(draw(row).ravel() - values @ effects).mean())
    deviation = float(np.sqrt(square / len(centred)))
    middle = torch.zeros(1, *shape, requires_grad=True)
    decoded = _visible(decode(middle))
    most = min(len(centred), MAX_READOUT_ROWS, MAX_READOUT_NUMBERS // max(products.shape[1], len(decoded)))
    chosen = [int(row) for row in np.unique(np.linspace(0, len(centred) - 1, most).astype(int))]
    latents = np.stack([draw(labelled[row]).ravel() for row in chosen]).astype(np.float32)
    images = np.stack([_visible(torch.from_numpy(image(labelled[row])[None])).numpy() for row in chosen])
    images -= images.mean(0)

    def pulled_back(weights: np.ndarray) -> np.ndarray:
        """Weights (k, V) of voxels, as weights (k, D) of latents: the decoder is taken to be linear about the mean."""
        rows = torch.from_numpy(weights.astype(np.float32))
        return np.stack(
            [torch.autograd.grad(decoded, middle, row, retain_graph=True)[0].flatten().numpy() for row in rows]
        )

    readers = [(latents, lambda weights: weights), (images, pulled_back)]
    readout, deviations = _readout(latents, readers, centred[chosen], subjects[chosen], each)
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
    latents: np.ndarray,
    readers: Sequence[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]],
    features: np.ndarray,
    subjects: np.ndarray,
    each: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal directions (k, D) that span where features (n, F) are read from latents (n, D), k = F times READERS,
    and the deviations of latents along them, less their effects, in subjects held out of all fits.

    A reader is what features are read from, (n, V), and how its weights (F, V) become weights (F, D) of latents.  The
    directions are those along which what is left is uncorrelated: one covariate may be read well from the difference of
    two directions along each of which much varies.  A feature that does not vary, or that others give, has no direction
    of its own: a row of zeros, of deviation 1.
    """
    folds = np.unique(subjects, return_inverse=True)[1] % FOLDS
    parts = [(folds == fold, folds != fold) for fold in np.unique(folds)]
    grams = [(rows @ rows.T).astype(np.float64) for rows, _ in readers]
    penalties = [_penalty(gram, features, parts) for gram in grams]

    def readings(kept: np.ndarray) -> np.ndarray:
        """Weights (k, D) by which latents give features, in units of these, so that folds can be compared."""
        found = []
        for (rows, pull_back), gram, penalty in zip(readers, grams, penalties, strict=True):
            weights = _dual(gram[np.ix_(kept, kept)], features[kept], penalty)
            found.append(pull_back(weights.T @ rows[kept]))
        return np.concatenate(found)

    left = np.zeros((len(readers) * features.shape[1],) * 2)
    for held, kept in tqdm(parts, desc="held-out deviations", mininterval=5, file=sys.stderr):
        effects = _ridge(features[kept], features[kept].T @ latents[kept], each)
        along = (latents[held] - features[held] @ effects) @ readings(kept).T
        left += along.T @ along / len(latents)
    read = readings(np.ones(len(latents), bool))
    directions = _orthonormal(read)
    there = np.square(directions).sum(1) > 0.5
    back = np.linalg.inv(read[there] @ directions[there].T)  # from readings to directions
    values, turn = np.linalg.eigh(back @ left[np.ix_(there, there)] @ back.T)
    directions[there] = turn.T @ directions[there]
    deviations = np.ones(len(directions))
    deviations[there] = np.sqrt(np.maximum(values, SMALLEST_SHARE * values.mean()))
    return directions, deviations


def _visible(images: Tensor) -> Tensor:
    """All numbers of images at half their resolution, which is enough to read covariates from."""
    return halved(images).flatten().float().cpu()


def _penalty(gram: np.ndarray, features: np.ndarray, parts: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The ridge penalty that predicts features of (held, kept) parts best."""
    tried = np.trace(gram) / len(gram) * np.array(READOUT_PENALTIES)
    errors = np.zeros(len(tried))
    for held, kept in parts:
        for i, penalty in enumerate(tried):
            weights = _dual(gram[np.ix_(kept, kept)], features[kept], penalty)
            errors[i] += np.square(gram[np.ix_(held, kept)] @ weights - features[held]).sum()
    return float(tried[errors.argmin()])


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
