"""Few counts: a blurred image of which quanta are counted; their noise as Gaussian."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.imaging.operators.base import Operator, along, array, gaussian_matrix

ENTRY = {
    "order": 4,
    "summary": "Counted quanta of a blurred image, as in emission tomography, their noise taken as Gaussian",
    "source": "Fessler 1994 (weighted least squares, variances from the data)",
    "measures": "Poisson(counts * P x)",
    "strengths": "counts",
}

#: Counts below which a variance is not taken from the counts themselves.
LEAST_COUNTS = 1.0
#: Width (full, at half maximum, in voxels) over which counts are averaged before they are taken for their variance:
#: single ones scatter so much that low values would get high weights.
RATE_WIDTH = 3.0


class LowCount(Operator):
    """A = W P with a Gaussian point spread P and weights W = counts / sqrt(rate), so that all noise has variance 1.

    `rate` (1, *spatial) is how many quanta a voxel is expected to have, and so their variance, at least `LEAST_COUNTS`.
    A measurement is counts / sqrt(rate).
    """

    noise_std = 1.0

    def __init__(self, image_shape: tuple[int, ...], widths: tuple[float, ...], counts: float, rate: Tensor) -> None:
        self.image_shape = self.measured_shape = image_shape
        self.counts, self.widths, self.rate = counts, widths, rate.clamp(min=LEAST_COUNTS)
        self._raised = (rate.clamp(min=0) / self.rate).sqrt()
        self._weights = counts / self.rate.sqrt()
        self._spread = [gaussian_matrix(n, width) for n, width in zip(image_shape[1:], widths, strict=True)]
        self._back = [matrix.T for matrix in self._spread]

    def forward(self, images: Tensor) -> Tensor:
        return self._weights * along(images, self._spread)

    def adjoint(self, measured: Tensor) -> Tensor:
        return along(self._weights * measured, self._back)

    def first_look(self, measured: Tensor) -> Tensor:
        """The counts themselves, in grey values."""
        return measured / self._weights

    def measure(self, image: Tensor, generator: np.random.Generator) -> tuple[Operator, Tensor]:
        """Poisson counts, and the operator whose rate they say themselves."""
        mean = self.counts * along(image, self._spread).clamp(min=0)
        counts = torch.from_numpy(generator.poisson(mean.numpy()).astype(np.float32))
        known = self.of_counts(counts[0])
        return known, counts / known.rate.sqrt()

    def checked(self, measured: np.ndarray, origin: object) -> Tensor:
        """As of every operator; counts / sqrt(rate) with the rate as it was given become those with the least one."""
        return super().checked(measured, origin) * self._raised

    def of_counts(self, counts: Tensor) -> LowCount:
        """The operator whose rate are these counts (1, *spatial), averaged over `RATE_WIDTH`."""
        smooth = along(counts[None], [gaussian_matrix(n, RATE_WIDTH) for n in self.image_shape[1:]])[0]
        return LowCount(self.image_shape, self.widths, self.counts, smooth)


def build(
    settings: config.Reconstruction,
    strength: float,
    image_shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    generator: np.random.Generator,
    given: Mapping[str, np.ndarray] | None,
) -> Operator:
    rate = np.full(image_shape, strength) if given is None else array(given, "rate", image_shape)
    widths = tuple(settings.blur_mm / size for size in spacing_mm)
    return LowCount(image_shape, widths, strength, torch.from_numpy(rate.astype(np.float32)))
