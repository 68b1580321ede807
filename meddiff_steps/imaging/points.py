"""Shapes as points on their surface: reading, defects, and the way back to a mask."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.npz import read_npz

#: Beyond these, mm, lengths were probably given in another unit.
SMALLEST_MM, LARGEST_MM = 1.0, 1000.0


@dataclass(frozen=True)
class Shapes:
    """Surfaces with a defect.

    Attributes
    ----------
    points
        mm, float32 (n, p, 3).
    missing
        bool (n, p); as many of each.
    ids
        Of the shapes.
    """

    points: np.ndarray
    missing: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def gap(self) -> int:
        """Points that are missing of each shape."""
        return int(self.missing[0].sum())

    def left(self, i: int) -> np.ndarray:
        """What is left of a shape, (p - gap, 3)."""
        found: np.ndarray = self.points[i][~self.missing[i]]
        return found

    def gone(self, i: int) -> np.ndarray:
        """What is missing of it, (gap, 3)."""
        found: np.ndarray = self.points[i][self.missing[i]]
        return found


def read_shapes(path: Path) -> Shapes:
    """Shapes of a file.

    Raises
    ------
    UserError
        It is not readable, lacks an array, or they do not fit to each other.
    """
    arrays = read_npz(path, ("points_mm", "missing", "ids"), "Give points_mm, missing and ids.")
    points, missing = arrays["points_mm"].astype(np.float32), arrays["missing"]
    ids = [str(name) for name in arrays["ids"]]
    if points.ndim != 3 or points.shape[2] != 3 or missing.shape != points.shape[:2] or len(ids) != len(points):
        raise UserError(
            f"{path}: points_mm {points.shape}, missing {missing.shape} and {len(ids)} ids, expected (n, p, 3), (n, p)"
            " and n."
        )
    if missing.dtype != bool or len(set(missing.sum(1).tolist())) != 1 or not 0 < missing[0].sum() < points.shape[1]:
        raise UserError(
            f"{path}: missing is of type {missing.dtype} with {sorted(set(missing.sum(1).tolist()))[:5]} points per"
            " shape, expected truth values, as many in each shape, neither none nor all."
        )
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise UserError(f"{path}: {twice[0]} is there twice among ids. Each shape needs a name of its own.")
    if not np.isfinite(points).all():
        broken = ids[int(np.argwhere(~np.isfinite(points))[0, 0])]
        raise UserError(f"{path}: points_mm of {broken} has values that are not finite. Leave the shape out.")
    size = float(np.ptp(points, axis=1).max())
    if not SMALLEST_MM <= size <= LARGEST_MM:
        raise UserError(f"{path}: the largest shape is {size:g} long, expected mm, {SMALLEST_MM:g} to {LARGEST_MM:g}.")
    return Shapes(points, missing, ids)


def defect(points: np.ndarray, centre: int, count: int) -> np.ndarray:
    """Which points (p, 3) are missing, bool (p,): the `count` nearest to one of them."""
    distances = np.square(points - points[centre]).sum(1)
    found = np.zeros(len(points), bool)
    found[np.argpartition(distances, count - 1)[:count]] = True
    return found


def patch_like(library: np.ndarray, left: np.ndarray, count: int) -> tuple[int, np.ndarray]:
    """What the nearest of some shapes (n, p, 3) has where one has a defect: its number, and points (count, 3).

    The nearest is the one whose surface what is left (k, 3) lies nearest to on average.  Of it those points are taken
    that are next to each other and farthest from what is left.
    """
    nearest = int(np.argmin([cKDTree(shape).query(left)[0].mean() for shape in library]))
    return nearest, patch_of(library[nearest], left, count)


def patch_of(shape: np.ndarray, left: np.ndarray, count: int) -> np.ndarray:
    """The `count` points of a shape (p, 3) next to each other that are farthest from what is left of another."""
    away, neighbours = cKDTree(left).query(shape)[0], cKDTree(shape).query(shape, count)[1]
    found: np.ndarray = shape[neighbours[away[neighbours].mean(1).argmax()]]
    return found


def mask_of(
    points: np.ndarray, origin: np.ndarray, shape: tuple[int, ...], voxel_mm: float, closing_mm: float
) -> np.ndarray:
    """The solid whose surface points (p, 3) in mm lie on; bool (*shape), True inside.

    Gaps of up to `closing_mm` between points are closed by a shell that thick, what it encloses is filled, and the
    shell is taken off again.

    Parameters
    ----------
    origin
        (3,) mm, the middle of the first voxel.
    """
    index = np.rint((points - origin) / voxel_mm).astype(int)
    index = index[((index >= 0) & (index < shape)).all(1)]
    away = np.ones(shape, bool)
    away[tuple(index.T)] = False
    thickness = closing_mm / 2
    # Distances between voxels first; exact ones, to the points themselves, where they decide
    distance = ndimage.distance_transform_edt(away, sampling=voxel_mm)
    near = distance <= thickness + 2 * voxel_mm
    distance[near] = cKDTree(points).query(np.argwhere(near) * voxel_mm + origin)[0]
    solid = ndimage.binary_fill_holes(distance <= thickness)
    found: np.ndarray = ndimage.distance_transform_edt(solid, sampling=voxel_mm) > thickness
    return found


def grid_around(points: np.ndarray, voxel_mm: float, margin_mm: float) -> tuple[np.ndarray, tuple[int, ...]]:
    """Origin (3,) mm and shape of a grid that holds all points (..., 3) and a margin."""
    flat = points.reshape(-1, 3)
    low, high = flat.min(0) - margin_mm, flat.max(0) + margin_mm
    return low, tuple(int(n) for n in np.ceil((high - low) / voxel_mm) + 1)
