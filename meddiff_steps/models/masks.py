"""The model of label maps: draws them from covariates, and tells the model of images what a label map shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.imaging.signed_distances import LABELS, from_distances, structures_of, to_distances
from meddiff_steps.models.trained import TrainedModel

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class MaskModel:
    """The two networks of label maps, which are those of images, trained on signed distances
    (`imaging.signed_distances`).

    What the model of images is told of a label map are the latents of its distances, on the grid of the image's own:
    the same for a map that was drawn and for one that somebody gives.

    Parameters
    ----------
    model
        Trained on label maps; its images are signed distances.
    """

    def __init__(self, model: TrainedModel) -> None:
        self.model, self.structures = model, structures_of(model.image_shape[0])

    @classmethod
    def load(cls, folder: Path, fabric: Fabric, compute: config.Compute | None = None) -> Self:
        """The model of a folder masks/ with autoencoder/ and diffusion/."""
        return cls(TrainedModel.load(folder / "autoencoder", folder / "diffusion", fabric, compute, toned=False))

    @classmethod
    def where_there_is(cls, folder: Path | None, fabric: Fabric, compute: config.Compute | None = None) -> Self | None:
        """The model of a folder; None without one."""
        return None if folder is None else cls.load(folder, fabric, compute)

    def condition(self, subjects: pd.DataFrame) -> Condition:
        """As of `TrainedModel.condition`."""
        return self.model.condition(subjects)

    @torch.no_grad()
    def draw(
        self, noise: np.ndarray, condition: Condition, settings: config.Generate, step_noise: Callable[[int], Tensor]
    ) -> np.ndarray:
        """Label maps, uint8 (b, *spatial), from noise (b, c, *spatial) of the shape of the model's latents."""
        latents = self.model.sample(noise, condition, settings, step_noise=step_noise)
        size = settings.decode_batch_size or len(latents)
        return np.concatenate([self.decoded(part) for part in latents.split(size)])

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> np.ndarray:
        """The label maps of standardised latents, uint8 (b, *spatial)."""
        return np.stack([from_distances(one) for one in self.model.decode(latents).cpu().numpy()])

    def maps(self, labels: np.ndarray) -> dict[str, Tensor]:
        """What a condition of the model of images holds of label maps (b, *spatial): {`LABELS`: (b, c, *latent)}."""
        # Half precision, as shards hold the distances that were learnt from.
        distances = np.stack([to_distances(one, self.structures) for one in labels]).astype(np.float16)
        return {LABELS: self.model.encode(distances.astype(np.float32))}
