"""What all measurement operators share: y = A x + noise, with A linear and its adjoint."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import OPERATORS


class Operator(ABC):
    """A linear map from real images to what is measured, of independent Gaussian noise.

    Measurements are scaled so that every value has the same noise.  They may be complex; the inner product of
    measurements is then the real part of the sum of conj(a) * b, and `noise_std` that of the real and the imaginary
    part each.

    Attributes
    ----------
    image_shape
        (1, *spatial).
    measured_shape
        Of the measurement of one image.
    noise_std
        Standard deviation of the noise of every value.
    is_complex
        Whether measurements are complex.
    """

    image_shape: tuple[int, ...]
    measured_shape: tuple[int, ...]
    noise_std: float
    is_complex: bool = False

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """A x: (b, *measured_shape) of images (b, *image_shape)."""

    @abstractmethod
    def adjoint(self, measured: Tensor) -> Tensor:
        """A* y: (b, *image_shape) of measurements (b, *measured_shape)."""

    def first_look(self, measured: Tensor) -> Tensor:
        """What one sees without any prior, in the grey values of the image (b, *image_shape)."""
        return self.adjoint(measured)

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on a device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
            elif isinstance(value, list):
                setattr(moved, name, [v.to(device) if isinstance(v, Tensor) else v for v in value])
        return moved

    def reached(self) -> Tensor:
        """Which values are measured at all, bool (*measured_shape); the others are 0."""
        return torch.ones(self.measured_shape, dtype=torch.bool)

    def measure(self, image: Tensor, generator: np.random.Generator) -> tuple[Operator, Tensor]:
        """Simulate a measurement of one image (1, *image_shape): A x and noise, with the operator that a reconstruction
        may know.
        """
        clean = self.forward(image)
        drawn = generator.standard_normal((*clean.shape, 2) if self.is_complex else clean.shape, dtype=np.float32)
        noise = torch.from_numpy(drawn).to(clean.device)
        return self, clean + self.noise_std * (torch.view_as_complex(noise) if self.is_complex else noise)

    def checked(self, measured: np.ndarray, origin: object) -> Tensor:
        """A measurement from a file, (1, *measured_shape).

        Raises
        ------
        UserError
            It is of another operator, or has values that are not finite.
        """
        if measured.shape != self.measured_shape:
            raise UserError(
                f"{origin}: y has the shape {measured.shape}, expected {self.measured_shape}, which the operator makes"
                f" of an image {self.image_shape}. Correct reconstruction.operators, or bring the measurement to the"
                " study's grid."
            )
        if np.iscomplexobj(measured) != self.is_complex:
            kinds = ["real", "complex"]
            raise UserError(
                f"{origin}: y is {kinds[np.iscomplexobj(measured)]}, expected {kinds[self.is_complex]} numbers. It is"
                " of another operator; correct reconstruction.operators."
            )
        if not np.isfinite(measured).all():
            raise UserError(f"{origin}: y has values that are not finite. Measure again, or leave the scan out.")
        return torch.from_numpy(measured.astype(np.complex64 if self.is_complex else np.float32))[None]


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each pair, real, (b,)."""
    product = (a.conj() * b).real if a.is_complex() else a * b
    return product.flatten(1).sum(1)


def array(given: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array that came with a measurement.

    Raises
    ------
    UserError
        It is not there, or is of another shape.
    """
    if name not in given:
        raise UserError(
            f"reconstruction.measured: has no array {name!r}, only {sorted(given)}, expected one of shape {shape}: what"
            " was measured is not known without it. Save it beside y (docs/applications/reconstruction.md)."
        )
    if given[name].shape != shape:
        raise UserError(
            f"reconstruction.measured: {name} has the shape {given[name].shape}, expected {shape}. Bring it to the"
            " study's grid (preprocess.shape)."
        )
    return given[name]


def along(images: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Images (b, 1, *spatial) with a matrix applied along every spatial axis; None leaves an axis as it is."""
    for axis, matrix in enumerate(matrices, 2):
        if matrix is not None:
            images = torch.movedim(torch.tensordot(images, matrix, dims=([axis], [1])), -1, axis)
    return images


def gaussian_matrix(n: int, fwhm: float, factor: int = 1) -> Tensor:
    """(n / factor, n): a Gaussian of this width (voxels), and every `factor`-th of its values; rows sum to 1.

    Centres are those of blocks of `factor` voxels.
    """
    sigma = max(fwhm / (8 * np.log(2)) ** 0.5, 1e-3)
    centres = (np.arange(n // factor) + 0.5) * factor - 0.5
    matrix = np.exp(-0.5 * ((np.arange(n) - centres[:, None]) / sigma) ** 2)
    return torch.from_numpy((matrix / matrix.sum(1, keepdims=True)).astype(np.float32))


def build(
    name: str,
    strength: float,
    settings: config.Reconstruction,
    image_shape: Sequence[int],
    spacing_mm: Sequence[float],
    generator: np.random.Generator,
    given: Mapping[str, np.ndarray] | None = None,
) -> Operator:
    """The operator of this name.

    Parameters
    ----------
    strength
        One of the values of the key that the operator's entry names.
    image_shape, spacing_mm
        (1, *spatial), and voxel sizes along these axes.
    generator
        Of what is drawn: sampling masks.
    given
        Arrays of a measured scan, which must have all that the operator needs; None where they are to be simulated.

    Raises
    ------
    UserError
        An array is missing, or does not fit the grid.
    """
    made: Operator = OPERATORS.load(name).build(
        settings, strength, tuple(image_shape), tuple(spacing_mm), generator, given
    )
    return made
