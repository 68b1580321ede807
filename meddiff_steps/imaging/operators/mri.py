"""Magnetic resonance imaging with several coils, of which only some lines of k-space are measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.operators.base import Operator, array

ENTRY = {
    "order": 1,
    "summary": "Undersampled k-space of several coils (SENSE)",
    "source": "Pruessmann et al. 1999, equation 1; variable-density sampling: Lustig et al. 2007",
    "measures": "M F S x + noise",
    "strengths": "accelerations",
}

#: Width of a coil's sensitivity, of half the field of view, and how far its centre lies from the middle.
COIL_WIDTH, COIL_DISTANCE = 0.9, 1.2
#: Largest phase of a simulated image, radians per polynomial term.
PHASE = 0.8
#: Power of the distance from the middle of k-space by which sampling thins out.
DENSITY_POWER = 3.0
#: How far the root sum of squares of given maps may be from 1, where it is not 0.
MAPS_TOLERANCE = 0.02
#: Times as much energy in the higher half of the frequencies along an axis as in the lower: their order is another.
MISPLACED = 2.0


class Mri(Operator):
    """A = M F S: sensitivities S (coils, *spatial), complex and with the image's phase in them; a unitary Fourier
    transform F; a mask M (*spatial) of what is measured.  Both the frequency 0 and the image's origin are at index 0,
    as in `numpy.fft`.

    Maps are scaled so that the sum of |S|^2 over coils is 1 wherever it is not 0; then no singular value is above 1.
    """

    is_complex = True

    def __init__(self, maps: np.ndarray, mask: np.ndarray, noise_std: float) -> None:
        self.image_shape, self.measured_shape = (1, *mask.shape), maps.shape
        power = np.sqrt((np.abs(maps) ** 2).sum(0))
        self._maps = torch.from_numpy((maps / np.where(power > 0, power, 1)).astype(np.complex64))
        self._mask = torch.from_numpy(mask.astype(bool))
        self._axes = tuple(range(2, 2 + mask.ndim))
        self.noise_std = noise_std

    def forward(self, images: Tensor) -> Tensor:
        return self._mask * torch.fft.fftn(self._maps * images, dim=self._axes, norm="ortho")

    def adjoint(self, measured: Tensor) -> Tensor:
        images = torch.fft.ifftn(self._mask * measured, dim=self._axes, norm="ortho")
        return (self._maps.conj() * images).real.sum(1, keepdim=True)

    def reached(self) -> Tensor:
        return self._mask.expand(self.measured_shape)

    def measure(self, image: Tensor, generator: np.random.Generator) -> tuple[Operator, Tensor]:
        """Noise on what is measured alone; the rest of k-space stays 0."""
        operator, measured = super().measure(image, generator)
        return operator, self._mask * measured

    def checked(self, measured: np.ndarray, origin: object) -> Tensor:
        """As of every operator; refuses k-space whose frequency 0 is in the middle, too."""
        found = super().checked(measured, origin)
        energy = (self._mask * found).abs().square()
        for axis in self._axes:
            high = torch.from_numpy(np.abs(np.fft.fftfreq(energy.shape[axis])) >= 0.25)
            along_axis = energy.movedim(axis, -1)
            if along_axis[..., high].sum() > MISPLACED * along_axis[..., ~high].sum():
                raise UserError(
                    f"{origin}: most of the energy of y lies at high frequencies along axis {axis - 1}, so that its"
                    " frequency 0 is in the middle, expected at index 0 (numpy.fft). Of fastMRI, BART and ISMRMRD, save"
                    " ifftshift(mask) and fftn(fftshift(ifftn(ifftshift(y)))), over the spatial axes, norm='ortho'."
                )
        return found

    @property
    def acceleration(self) -> float:
        """Lines of k-space, by those that are measured."""
        return self._mask.numel() / float(self._mask.sum())


def coil_maps(shape: tuple[int, ...], coils: int) -> np.ndarray:
    """Smooth complex sensitivities (coils, *shape), coils around the image in the plane of its first two axes.

    Gaussians of the distance to the coil, their phase the coil's angle plus half a turn across the image.
    """
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    found = []
    for coil in range(coils):
        angle = 2 * np.pi * coil / coils
        centre = [COIL_DISTANCE * np.cos(angle), COIL_DISTANCE * np.sin(angle)]
        if len(shape) == 3:
            centre.append(0.5 * (-1) ** coil)
        square = sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True))
        towards = sum(axis * c for axis, c in zip(grid, centre, strict=True)) / COIL_DISTANCE
        found.append(np.exp(-square / (2 * COIL_WIDTH**2) + 1j * (angle + np.pi / 2 * towards)))
    return np.stack(found)


def smooth_phase(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Phase of an image in radians: a polynomial of second order, as of a field that is not quite even."""
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    terms = [*grid, *(a * b for i, a in enumerate(grid) for b in grid[i:])]
    weights = generator.standard_normal(len(terms))
    return PHASE * np.tensordot(weights, np.stack(terms), axes=1)


def sampling_mask(
    shape: tuple[int, ...], acceleration: float, centre: float, generator: np.random.Generator
) -> np.ndarray:
    """Which of k-space is measured, bool: whole lines along the first axis (the readout); of the other axes a middle
    part and, thinning outwards, lines drawn at random.

    Parameters
    ----------
    acceleration
        All lines, by those that are measured.
    centre
        Share of each axis, in the middle, that is measured wholly.

    Raises
    ------
    UserError
        The middle part alone is more than that.
    """
    sides = shape[1:]
    frequencies = np.meshgrid(*[np.abs(np.fft.fftfreq(n)) * 2 for n in sides], indexing="ij")
    middle = np.all([f <= centre for f in frequencies], axis=0)
    wanted = round(middle.size / acceleration)
    if middle.sum() > wanted:
        raise UserError(
            f"reconstruction.calibration_share: {centre:g} measures {middle.sum()} of {middle.size} lines wholly, more"
            f" than the {wanted} of acceleration {acceleration:g}. Lower one of the two."
        )
    distance = np.sqrt(sum(f**2 for f in frequencies) / len(sides))
    density = np.where(middle, 0, (1 - distance.clip(0, 1) + 1e-3) ** DENSITY_POWER).ravel()
    drawn = generator.choice(density.size, wanted - int(middle.sum()), replace=False, p=density / density.sum())
    chosen = middle.ravel().copy()
    chosen[drawn] = True
    return np.broadcast_to(chosen.reshape(sides), shape).copy()


def build(
    settings: config.Reconstruction,
    strength: float,
    image_shape: tuple[int, ...],
    spacing_mm: tuple[float, ...],
    generator: np.random.Generator,
    given: Mapping[str, np.ndarray] | None,
) -> Operator:
    shape = image_shape[1:]
    if given is not None:
        coils = given["maps"].shape[0] if given.get("maps", np.empty(0)).ndim == len(image_shape) else settings.coils
        mask, maps = array(given, "mask", shape) > 0, array(given, "maps", (coils, *shape))
        if not mask.any():
            raise UserError("reconstruction.measured: mask is empty, so nothing was measured. Check the file.")
        power = np.sqrt((np.abs(maps) ** 2).sum(0))
        power = power[power > 0]
        if power.size and np.abs(power - 1).max() > MAPS_TOLERANCE:
            raise UserError(
                "reconstruction.measured: the root sum of squares of maps over the coils is"
                f" {power.min():.3g} to {power.max():.3g} where it is not 0, expected 1: y would be in another scale"
                " than the image. Divide maps by it, and y by what then makes the image's white 1."
            )
        return Mri(maps, mask, settings.noise_std)
    mask = sampling_mask(shape, strength, settings.calibration_share, generator)
    maps = coil_maps(shape, settings.coils) * np.exp(1j * smooth_phase(shape, generator))
    return Mri(maps, mask, settings.noise_std)
