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
        (b, 1, *spatial) -> (b, d).
    references
        Directions of the training scans, (m, d).
    """

    def __init__(self, name: str, encode: torch.nn.Module, references: np.ndarray | None = None) -> None:
        self.name, self.encode = name, encode
        self.references = np.zeros((0, 0), np.float32) if references is None else references

    @torch.no_grad()
    def vectors(self, images: Tensor) -> np.ndarray:
        parts = images.split(batch_size(images.shape[1:]))
        return np.concatenate([unit_rows(self.encode(part).flatten(1).numpy()) for part in parts])

    def similarity(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        best, index = zip(*(nearest(self.vectors(x), self.references) for x in (images, flip(images))), strict=True)
        mirrored = best[1][:, 0] > best[0][:, 0]
        return np.maximum(best[0][:, 0], best[1][:, 0]), np.where(mirrored, index[1][:, 0], index[0][:, 0])
