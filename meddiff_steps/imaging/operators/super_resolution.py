"""Thick slices or large voxels: blur, and every n-th value along the last axis."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.operators.base import Operator, along, gaussian_matrix

ENTRY = {
    "order": 2,
    "summary": "Thick slices: a Gaussian as wide as a slice, and every n-th value, along the last axis",
    "source": "slice profile as in Greenspan 2009",
    "measures": "S G x + noise",
    "strengths": "slice_factors",
}


class SuperResolution(Operator):
    """Blur and subsampling along the last axis by `factor`."""

    def __init__(self, image_shape: tuple[int, ...], factor: int, noise_std: float) -> None:
        n = image_shape[-1]
        if n % factor or factor < 2:
            raise UserError(
                f"reconstruction.slice_factors: {factor} does not divide the {n} voxels of the grid's last axis. Take"
                " a divisor of 2 or more."
            )
        self.image_shape, self.noise_std, self.factor = image_shape, noise_std, factor
        self.measured_shape = (*image_shape[:-1], n // factor)
        others: list[Tensor | None] = [None] * (len(image_shape) - 2)
        matrix = gaussian_matrix(n, factor, factor)
        self._blur, self._back = [*others, matrix], [*others, matrix.T]

    def forward(self, images: Tensor) -> Tensor:
        return along(images, self._blur)

    def adjoint(self, measured: Tensor) -> Tensor:
        return along(measured, self._back)

    def first_look(self, measured: Tensor) -> Tensor:
        """Linear interpolation between slices, the nearest beyond the outermost."""
        n, slices = self.image_shape[-1], self.measured_shape[-1]
        places = ((torch.arange(n) + 0.5) / self.factor - 0.5).clamp(0, slices - 1)
        weights = (1 - (places[:, None] - torch.arange(slices)).abs()).clamp(min=0)
        return along(measured, [*self._blur[:-1], weights.to(measured)])


def build(
    settings: config.Reconstruction,
    strength: float,
    image_shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    generator: np.random.Generator,
    given: Mapping[str, np.ndarray] | None,
) -> Operator:
    return SuperResolution(image_shape, round(strength), settings.noise_std)
