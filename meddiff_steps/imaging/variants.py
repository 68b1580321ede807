"""Variants of a training image: mirrorings, whole-voxel shifts, and contrast.  Nothing is interpolated, so nothing is
blurred.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from meddiff_steps.config import Variants


@dataclass(frozen=True)
class Variant:
    """One deterministic transform of an image: what was drawn can be recorded and replayed."""

    flip: bool
    shift: tuple[int, ...]
    contrast: float = 1.0

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(c, *spatial) in [0, 1] -> the same; what moves in from outside is 0."""
        if self.flip:
            image = image[:, ::-1] if image.ndim == 4 else image[:, :, ::-1]
        if any(self.shift):
            image = np.roll(image, self.shift, axis=tuple(range(1, image.ndim)))
            for axis, shift in enumerate(self.shift, start=1):
                if shift:
                    edge = [slice(None)] * image.ndim
                    edge[axis] = slice(None, shift) if shift > 0 else slice(shift, None)
                    image[tuple(edge)] = 0
        if self.contrast != 1.0:
            image = (image * np.float32(self.contrast)).clip(0.0, 1.0)
        return np.ascontiguousarray(image)

    def numbers(self, settings: Variants) -> np.ndarray:
        """What a network is told of it, float32 (2 + d,): mirrored or not, shift and contrast from -1 to 1; all 0 is
        the image itself.
        """
        shift = [step / max(settings.max_shift_voxels, 1) for step in self.shift]
        contrast = (self.contrast - 1.0) / (settings.max_contrast or 1.0)
        return np.array([float(self.flip), *shift, contrast], np.float32)


def untouched(spatial_dims: int) -> Variant:
    """The image itself."""
    return Variant(False, (0,) * spatial_dims)


def draw_variant(settings: Variants, spatial_dims: int, generator: np.random.Generator) -> Variant:
    """Draw a variant: mirrored left-right (first spatial axis in 3D, last in 2D) in half of the cases, shifted
    evenly, grey levels multiplied evenly about 1.
    """
    flip = bool(generator.integers(2)) and settings.flip
    limit = settings.max_shift_voxels
    shift = tuple(int(s) for s in generator.integers(-limit, limit + 1, spatial_dims))
    return Variant(flip, shift, 1.0 + settings.max_contrast * float(generator.uniform(-1.0, 1.0)))
