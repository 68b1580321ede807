"""Registration without a network finds known transforms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from meddiff_steps.imaging import pairwise

SHAPE = (32, 40, 36)


def body() -> np.ndarray:
    """A lopsided, structured body in air."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), 2.0)
    x, y, z = (np.linspace(-1, 1, n) for n in SHAPE)
    inside = (x[:, None, None] / 0.6) ** 2 + (y[None, :, None] / 0.7) ** 2 + (z[None, None] / 0.5) ** 2 < 1
    return ndimage.gaussian_filter(inside * (0.6 + noise / noise.std() * 0.15), 0.7).astype(np.float32)


@pytest.mark.parametrize(("way", "most"), [(pairwise.affine, 0.4), (pairwise.demons, 0.7)])
def test_a_known_affine_transform_is_found(way: Callable[[np.ndarray, np.ndarray], np.ndarray], most: float) -> None:
    fixed = body()
    matrix, offset = np.array([[1.05, 0.04, 0], [-0.04, 0.98, 0], [0, 0, 1.0]]), np.array([-1.0, 1.5, 0.5])
    # The moving image has at M x + o what the fixed one has at x, so the displacement is M x + o - x
    inverse = np.linalg.inv(matrix)
    moving = ndimage.affine_transform(fixed, inverse, -inverse @ offset, order=1)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    known = np.tensordot(matrix, grid, 1) + offset[:, None, None, None] - grid
    inside = fixed > 0.3
    before = np.linalg.norm(known, axis=0)[inside].mean()
    found = way(fixed, moving)
    assert found.shape == (3, *SHAPE) and found.dtype == np.float32
    assert np.linalg.norm(found - known, axis=0)[inside].mean() < most < before
