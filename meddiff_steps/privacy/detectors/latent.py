"""The detector `latent`: cosine of the codes of the generator's own first stage."""

from __future__ import annotations

import torch
from torch import Tensor

from meddiff_steps.models.first_stage.base import FirstStage
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.privacy.detectors.base import Context, Detector
from meddiff_steps.privacy.detectors.embedding import Embedding

ENTRY = {
    "order": 3,
    "summary": "The codes of the generator's own autoencoder.",
    "source": "standardised posterior means of the first stage (Rombach et al. 2022)",
    "misses": "whatever the autoencoder did not keep, and copies that were moved, rotated or re-contrasted.",
}


class LatentEncoder(torch.nn.Module):
    """Standardised most probable latents of a first stage, (b, c, *spatial)."""

    def __init__(self, first_stage: FirstStage, standardise: Standardisation[Tensor]) -> None:
        super().__init__()
        self.first_stage, self.standardise = first_stage, standardise

    def forward(self, images: Tensor) -> Tensor:
        return self.standardise(self.first_stage.encode(images).mode())


def build(context: Context) -> Detector:
    """`Embedding` by `LatentEncoder`."""
    encoder = LatentEncoder(context.first_stage(), context.standardisation())
    return Embedding("latent", encoder, context.directions.get("latent"))
