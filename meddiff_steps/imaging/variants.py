"""Variants of a training image.  Only mirrorings and whole-voxel shifts: nothing is interpolated, so nothing is
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

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(c, *spatial) -> the same shape; what moves in from outside is 0."""
        if self.flip:
            image = image[:, ::-1] if image.ndim == 4 else image[:, :, ::-1]
        if any(self.shift):
            image = np.roll(image, self.shift, axis=tuple(range(1, image.ndim)))
            for axis, shift in enumerate(self.shift, start=1):
                if shift:
                    edge = [slice(None)] * image.ndim
                    edge[axis] = slice(None, shift) if shift > 0 else slice(shift, None)
                    image[tuple(edge)] = 0
        return np.ascontiguousarray(image)


def draw_variant(settings: Variants, spatial_dims: int, generator: np.random.Generator) -> Variant:
    """Draw a variant: mirrored left-right (first spatial axis in 3D, last in 2D) in half of the cases, shifted
    evenly.
    """
    flip = bool(generator.integers(2)) and settings.flip
    limit = settings.max_shift_voxels
    return Variant(flip, tuple(int(s) for s in generator.integers(-limit, limit + 1, spatial_dims)))
