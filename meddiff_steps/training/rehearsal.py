"""A level that a handful of scans have, learnt beside what the base draws: DreamBooth (Ruiz et al. 2023)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.compute.device import to_device
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.core.registries import SAMPLERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.effects import feature_count
from meddiff_steps.training.latent_data import Batch, LatentData
from meddiff_steps.training.loop import batch_rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: How the base draws: a sampler of all processes, without guidance, as the base's own images are where nothing is asked
#: for more strongly than in its training.
SAMPLER, BATCH = "dpmpp", 16


class Rehearsal:
    """Batches in which the rare level has its share, whatever its share of the scans is.

    The others are the cohort's other scans and latents that the base drew before it was changed, of the covariates of
    the cohort's scans but for the rare level, in whose place is another: what the paper calls the prior-preservation
    loss (equation 2), with the weight that the share gives.

    Parameters
    ----------
    settings
        `diffusion.rare`.
    data
        Latents of the cohort.
    encoding
        How covariates became the numbers in `data`.
    base
        The network before it is trained.
    root
        Of all that is drawn.

    Raises
    ------
    UserError
        No training scan has the level, or nothing is left beside it.
    """

    def __init__(
        self,
        settings: config.Rare,
        data: LatentData,
        encoding: CovariateEncoding,
        base: Denoiser,
        root: str,
        fabric: Fabric,
    ) -> None:
        self.settings, self.data, self.root = settings, data, f"{root}/rare"
        self.column = encoding.names.index(settings.covariate)
        level = encoding.levels[settings.covariate].index(settings.level)
        rare = data.covariates[data.train_rows, self.column] == level
        self.rare, self.others = data.train_rows[rare], data.train_rows[~rare]
        if not len(self.rare):
            raise UserError(
                f"diffusion.rare: no training scan has {settings.covariate} {settings.level}. Look at the splits of the"
                " cohort, or correct the level."
            )
        if not len(self.others) and not settings.preserved:
            raise UserError(
                "diffusion.rare.preserved: all training scans have the rare level, so that nothing keeps what the base"
                " knows. Let it draw some: 200."
            )
        self.known = self._covariates(base, level, encoding.level_counts)
        self.drawn = self._draw(base, fabric)

    def _covariates(self, base: Denoiser, level: int, counts: list[int]) -> np.ndarray:
        """Of scans of the cohort; the rare level makes room for another, as often as the base met it."""
        generator = step_generator(self.root, "covariates", 0)
        rows = self.data.train_rows[generator.integers(len(self.data.train_rows), size=self.settings.preserved)]
        found = self.data.covariates[rows].copy()
        first, count = feature_count(counts[: self.column]), counts[self.column]
        met = base.effects.feature_mean[first : first + count].clamp_min(0.0).double().cpu().numpy()
        met[level] = 0.0
        if not met.any():
            met = np.where(np.arange(count) == level, 0.0, 1.0)
        others = generator.choice(count, size=len(found), p=met / met.sum())
        found[:, self.column] = np.where(found[:, self.column] == level, others, found[:, self.column])
        return found.astype(np.float32)

    @torch.no_grad()
    def _draw(self, base: Denoiser, fabric: Fabric) -> np.ndarray:
        SAMPLERS.load("dpmpp")  # so that its code counts whatever the study's sampler is
        shape = self.data.shards.shape("mean")
        drawn = np.empty((len(self.known), *shape), np.float32)

        def denoise(x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
            with fabric.autocast():
                return base(x, timesteps, condition)

        starts = range(0, len(drawn), BATCH)
        for start in tqdm(starts, desc="drawing what the base knows", mininterval=5, file=sys.stderr):
            part = slice(start, min(start + BATCH, len(drawn)))
            noise = np.stack(
                [
                    step_generator(self.root, "noise", row).standard_normal(shape, dtype=np.float32)
                    for row in range(part.start, part.stop)
                ]
            )
            told = Condition(to_device(self.known[part], fabric))
            drawn[part] = sample(denoise, to_device(noise, fabric), told, base.process, SAMPLER).float().cpu().numpy()
        return drawn

    def batch(self, step: int, size: int, generator: np.random.Generator) -> Batch:
        """The batch of a step: scans of the rare level first."""
        rare = min(size - 1, max(1, round(self.settings.share * size)))
        rows = self.rare[batch_rows(f"{self.root}/scans", step, rare, len(self.rare))]
        rest = batch_rows(f"{self.root}/others", step, size - rare, len(self.others) + len(self.drawn))
        rows = np.concatenate([rows, self.others[rest[rest < len(self.others)]]])
        kept = rest[rest >= len(self.others)] - len(self.others)
        scans = self.data.batch(rows, generator)
        return Batch(
            np.concatenate([scans.latents, self.drawn[kept]]),
            np.concatenate([scans.covariates, self.known[kept]]),
            np.concatenate([scans.variants, np.zeros((len(kept), self.data.variant_numbers), np.float32)]),
        )
