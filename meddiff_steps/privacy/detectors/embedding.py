"""Detectors that compare the directions which a network gives; `learned` and `latent` are two of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.imaging.perturbations import flip
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.privacy.size import batch_size


class Embedding:
    """Cosine of the directions that `encode` gives, of the image and of its mirror image.

    Parameters
    ----------
    encode
        (b, 1, *spatial) -> (b, d), on `device`.
    references
        Directions of the training scans, (m, d).
    mirrors
        Whether the mirror image is looked at.
    """

    def __init__(
        self,
        name: str,
        encode: torch.nn.Module,
        references: np.ndarray | None = None,
        device: torch.device | str = "cpu",
        mirrors: bool = True,
    ) -> None:
        self.name, self.encode, self.device, self.mirrors = name, encode, device, mirrors
        #: A GPU holds them once, and is not given them again for every search.
        self.references: np.ndarray | Tensor = (
            np.zeros((0, 0), np.float32) if references is None else torch.from_numpy(references).to(device)
        )

    @torch.no_grad()
    def vectors(self, images: Tensor) -> np.ndarray:
        parts = images.split(batch_size(images.shape[1:]))
        return np.concatenate(
            [unit_rows(self.encode(part.to(self.device)).flatten(1).float().cpu().numpy()) for part in parts]
        )

    def similarity(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        images = images.to(self.device)
        similarity, index = (found[:, 0] for found in nearest(self.vectors(images), self.references))
        if not self.mirrors:
            return similarity, index
        other, place = (found[:, 0] for found in nearest(self.vectors(flip(images)), self.references))
        return np.maximum(similarity, other), np.where(other > similarity, place, index)
