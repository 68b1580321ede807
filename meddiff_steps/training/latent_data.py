"""Cached latents as both parts of the second stage train on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.latent_statistics import Standardisation


@dataclass(frozen=True)
class LatentData:
    """Cached posteriors and who they belong to.

    Attributes
    ----------
    shards
        Columns `mean` and `log_variance`, float16 (c, *spatial).
    prior
        `offset` (1, c, *spatial) and `scale` (1, c, 1, ...), float32: the network sees (z - offset) / scale; with a
        Gaussian also `prior.*`, the state of `models.denoiser.latent_gaussian.LatentGaussian`.
    covariates
        Encoded covariates per row of `shards`, float32 (rows, k), NaN where missing.
    train_rows, val_rows
        Rows of `shards`; validation uses unaugmented ones.
    """

    shards: Shards
    prior: dict[str, Tensor]
    covariates: np.ndarray
    train_rows: np.ndarray
    val_rows: np.ndarray

    def draw(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Samples of the posteriors of `rows`, standardised, float32 (len(rows), c, *spatial)."""
        mean = self.shards.tensors("mean", rows)
        deviation = np.exp(0.5 * self.shards.tensors("log_variance", rows))
        z = mean + deviation * generator.standard_normal(mean.shape, dtype=np.float32)
        return self.standardise(z)

    @property
    def standardise(self) -> Standardisation[np.ndarray]:
        return Standardisation(self.prior["offset"].numpy(), self.prior["scale"].numpy())

    def coefficients(self, rows: np.ndarray) -> np.ndarray:
        """Of the posterior means of `rows`, standardised, on the components of the Gaussian, float32 (len(rows), R)."""
        basis = self.prior["prior.basis"].numpy()
        parts = [
            self.standardise(self.shards.tensors("mean", rows[i : i + 64])).reshape(-1, basis.shape[1]) @ basis.T
            for i in range(0, len(rows), 64)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, len(basis)), np.float32)


def drop(covariates: np.ndarray, each: float, together: float, generator: np.random.Generator) -> np.ndarray:
    """Replace covariates by NaN (the learnt null): each on its own with one probability, all of a row with another."""
    gone = (generator.random(covariates.shape) < each) | (generator.random((len(covariates), 1)) < together)
    return np.where(gone, np.float32("nan"), covariates)
