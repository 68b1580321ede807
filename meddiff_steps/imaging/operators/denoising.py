"""An image with noise on it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.imaging.operators.base import Operator

ENTRY = {
    "order": 3,
    "summary": "The image itself, with Gaussian noise",
    "source": "Rician noise is nearly so where the signal is above it: Gudbjartsson and Patz 1995",
    "measures": "x + noise",
    "strengths": "noise_stds",
}


class Denoising(Operator):
    """A = 1."""

    def __init__(self, image_shape: tuple[int, ...], noise_std: float) -> None:
        self.image_shape = self.measured_shape = image_shape
        self.noise_std = noise_std

    def forward(self, images: Tensor) -> Tensor:
        return images

    def adjoint(self, measured: Tensor) -> Tensor:
        return measured


def build(
    settings: config.Reconstruction,
    strength: float,
    image_shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    generator: np.random.Generator,
    given: Mapping[str, np.ndarray] | None,
) -> Operator:
    return Denoising(image_shape, strength)
