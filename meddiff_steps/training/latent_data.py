"""Cached latents as the second stage trains on them."""

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
        Columns `mean` and, where the first stage has one, `log_variance`, float16 (c, *spatial); `numbers`, float32
        (v,), which describe the variant.
    prior
        `offset` (1, c, *spatial) and `scale` (), float32: the network sees (z - offset) / scale; and `effects.*`, the
        state of `models.denoiser.effects.CovariateEffects`.
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
        z = self.shards.tensors("mean", rows)
        if "log_variance" in self.shards.schema.names:
            deviation = np.exp(0.5 * self.shards.tensors("log_variance", rows))
            z = z + deviation * generator.standard_normal(z.shape, dtype=np.float32)
        return self.standardise(z)

    @property
    def variant_numbers(self) -> int:
        """How many numbers describe a variant."""
        return self.shards.shape("numbers")[0]

    @property
    def standardise(self) -> Standardisation[np.ndarray]:
        return Standardisation(self.prior["offset"].numpy(), self.prior["scale"].numpy())


def drop(covariates: np.ndarray, each: float, together: float, generator: np.random.Generator) -> np.ndarray:
    """Replace covariates by NaN (the learnt null): each on its own with one probability, all of a row with another."""
    gone = (generator.random(covariates.shape) < each) | (generator.random((len(covariates), 1)) < together)
    return np.where(gone, np.float32("nan"), covariates)
