"""The detector `latent`: cosine of the codes of the generator's own first stage."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.compute.device import channels_last
from meddiff_steps.models.first_stage.base import FirstStage
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.privacy.detectors.base import Context, Detector
from meddiff_steps.privacy.detectors.embedding import Embedding
from meddiff_steps.privacy.search import unit_rows

ENTRY = {
    "order": 3,
    "summary": "The codes of the generator's own autoencoder.",
    "source": "standardised posterior means of the first stage (Rombach et al. 2022)",
    "misses": (
        "whatever the autoencoder did not keep, and copies that were moved by a voxel or rotated by 8 degrees; mirrored"
        " ones, where the study mirrors no training scan (`variants.flip`) and another detector sees them."
    ),
}


class LatentEncoder(torch.nn.Module):
    """Standardised most probable latents of a first stage, (b, c, *spatial).

    As the step `latents` makes them, so that directions of training scans can be taken from there (`known`).
    """

    def __init__(
        self,
        first_stage: FirstStage,
        standardise: Standardisation[Tensor],
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        super().__init__()
        self.first_stage, self.standardise, self.autocast = first_stage, standardise, autocast

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast():
            posterior = self.first_stage.encode(images.contiguous(memory_format=channels_last(images.ndim - 2)))
        return self.standardise(posterior.mode())


def known(context: Context) -> np.ndarray | None:
    """Directions of the training scans from their latents, (m, d); None where these were not kept."""
    if context.latents is None:
        return None
    standardisation = context.standardisation()
    standardise = Standardisation(standardisation.offset.cpu().numpy(), standardisation.scale.cpu().numpy())
    directions = np.zeros((0, 0), np.float32)
    for row, latent in enumerate(context.latents()):
        direction = unit_rows(standardise(latent[None].astype(np.float32)))
        if row == 0:
            directions = np.empty((len(context.training), direction.shape[1]), np.float32)
        directions[row] = direction[0]
    return directions


def build(context: Context) -> Detector:
    """`Embedding` by `LatentEncoder`."""
    encoder = LatentEncoder(context.first_stage(), context.standardisation(), context.autocast)
    return Embedding("latent", encoder, context.directions.get("latent"), context.device, context.mirrors)
