"""Simplex noise: smooth random fields of a known grain, keyed like all other noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Entries of the table of gradients; cells of the lattice that are so far apart may share one.
TABLE = 4096
#: Squared distance at which a corner's influence ends: so short that the field has no jumps in 2D and 3D.
REACH = 0.5


def simplex(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A smooth field of mean 0 at some points (Perlin 2001; a lattice of simplices whose corners have gradients).

    Parameters
    ----------
    points
        (n, d), in edges of the lattice.
    generator
        Of the gradients.

    Returns
    -------
    numpy.ndarray
        (n,), of no particular size.
    """
    count, dims = points.shape
    gradients = generator.standard_normal((TABLE, dims))
    gradients /= np.linalg.norm(gradients, axis=1, keepdims=True)
    factors = generator.integers(0, TABLE, (dims, TABLE))
    skew, back = ((dims + 1) ** 0.5 - 1) / dims, (1 - (dims + 1) ** -0.5) / dims
    cell = np.floor(points + points.sum(1, keepdims=True) * skew)
    inside = points - (cell - cell.sum(1, keepdims=True) * back)
    order = np.argsort(-inside, axis=1, kind="stable")
    corner, total = cell.astype(np.int64), np.zeros(count)
    offset = np.zeros_like(inside)
    for step in range(dims + 1):
        place = inside - offset + step * back
        hashed = np.zeros(count, np.int64)
        for axis in range(dims):
            hashed ^= factors[axis, (corner[:, axis] + hashed) % TABLE]
        weight = np.maximum(REACH - np.square(place).sum(1), 0.0) ** 4
        total += weight * (gradients[hashed] * place).sum(1)
        if step < dims:
            rows = np.arange(count)
            corner = corner.copy()
            corner[rows, order[:, step]] += 1
            offset[rows, order[:, step]] += 1
    return total


def simplex_noise(
    shape: Sequence[int], wavelength: float, generator: np.random.Generator, *, octaves: int, persistence: float
) -> np.ndarray:
    """Octaves of simplex noise on a grid, float32 of `shape`, of mean square 1.

    Each octave has twice the frequency of the one before, and `persistence` times its size (Wyatt et al. 2022, who take
    6 octaves, a persistence of 0.8, and a wavelength of 64 pixels on images of 256).

    Parameters
    ----------
    wavelength
        Of the first octave, in cells of the grid.
    """
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in shape), indexing="ij"), -1).reshape(-1, len(shape))
    total = np.zeros(len(grid))
    for octave in range(octaves):
        moved = grid * (2**octave / wavelength) + generator.uniform(0, TABLE, len(shape))
        field = simplex(moved, generator)
        total += persistence**octave * field / max(float(np.sqrt(np.square(field).mean())), 1e-12)
    total /= np.sqrt(np.square(total).mean())
    return total.reshape(tuple(shape)).astype(np.float32)
