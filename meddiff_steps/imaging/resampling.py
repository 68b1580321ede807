"""An image on another grid: grey levels interpolated after a Gaussian, labels by majority.

Grids are related by index maps.  Along an axis on which two grids coincide the map snaps to whole voxels, so that
values are copied and not interpolated.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import nibabel as nib
import numpy as np
from PIL import Image as PilImage
from scipy import ndimage, sparse

from meddiff_steps.imaging.reading import Image

#: As of the setting `preprocess.interpolation`: `auto` leaves a map as `place` and `locate` make it.
Interpolation = Literal["auto", "linear", "cubic", "nearest"]
_ORDERS = {"nearest": 0, "linear": 1, "cubic": 3}
_PICTURE_FILTERS = {
    "auto": PilImage.Resampling.BILINEAR,
    "linear": PilImage.Resampling.BILINEAR,
    "cubic": PilImage.Resampling.BICUBIC,
    "nearest": PilImage.Resampling.NEAREST,
}
#: Displacement (voxels of the scan) anywhere in the target grid below which two grids count as the same.
SNAP_TOLERANCE = 0.05
#: A voxel belongs to a grid when its centre is within the grid's outer voxel faces; rounding must not decide.
_FACE = 0.5 + 1e-3
#: Added before rounding down: a half goes down, whatever the rounding of the header; or up.
_HALVES = _HALF_DOWN, _HALF_UP = 0.5 - 1e-3, 0.5 + 1e-3
#: Multiples of these (powers of the root of x^4 = x + 1) mod 1, added over a voxel's index, are below a half for every
#: other voxel of a grid, and of any regular part of it.
_SPREAD = 0.8191725133961645 ** np.arange(1, 4)
#: Excess (square of a ratio less 1) below which two spacings count as the same; a Gaussian of it would change nothing.
_SAME_WIDTH = 1e-3
#: Places that `majority` looks at in one go; bounds its memory (a few times as many bytes per label).
_PLACES = 2**22


@dataclass(frozen=True)
class IndexMap:
    """How the voxels of a grid lie in an image.

    Attributes
    ----------
    matrix
        (n + 1, n + 1) from an index (fractional) of the grid to one of the image.
    sigmas
        (n,) Gaussian that comes before linear interpolation, in voxels of the image along each of its axes; 0 for none.
    aligned
        Axis k of the grid lies along axis k of the image: `matrix` is diagonal but for its last column.
    order
        Of the spline that interpolates: 0 takes the nearest voxel, 1 is linear, 3 cubic.
    """

    matrix: np.ndarray
    sigmas: np.ndarray
    aligned: bool
    order: int = 1

    @property
    def starts(self) -> np.ndarray:
        """(n,) where the first voxel of the grid lies."""
        return self.matrix[:-1, -1]

    @property
    def steps(self) -> np.ndarray:
        """(n,) voxels of the image from one voxel of the grid to the next, of an aligned map."""
        return np.diag(self.matrix)[:-1]

    @property
    def copies(self) -> bool:
        """Every voxel of the grid is one of the image: nothing is interpolated."""
        whole = np.array_equal(self.starts, np.rint(self.starts)) and bool((self.steps == 1).all())
        return self.aligned and whole and not self.sigmas.any()

    def by(self, interpolation: Interpolation) -> IndexMap:
        """The map with another interpolation; the nearest voxel is taken of what was not smoothed."""
        if interpolation == "auto":
            return self
        order = _ORDERS[interpolation]
        return replace(self, order=order, sigmas=self.sigmas if order else np.zeros_like(self.sigmas))

    def back(self) -> np.ndarray:
        """(n + 1, n + 1) from an index of the image to one of the grid; diagonal to the last bit where this is."""
        return aligned_matrix(-self.starts / self.steps, 1 / self.steps) if self.aligned else np.linalg.inv(self.matrix)


def aligned_matrix(starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """(n + 1, n + 1) index map of axes that coincide: start + step * index along each."""
    matrix = np.diag([*steps, 1.0])
    matrix[:-1, -1] = starts
    return matrix


# ---------------------------------------------------------------------------------------------- index maps


@dataclass(frozen=True)
class Placement:
    """Where the study's grid lies on a scan, so that other images of the scan can be brought to the same place.

    Attributes
    ----------
    shape
        Of the grid.
    target
        (4, 4) affine of the grid in mm, RAS+; None for pictures.
    box
        Of pictures: top, left, bottom and right edge of the grid in pixels of the picture, from 0 at its upper left
        corner.
    scan_shape
        Of the scan or picture.
    scan_affine
        (4, 4) of the scan, its axes along RAS+; None for pictures.
    scan_map
        How the grid lies in the scan.
    registered
        The grid lies along the axes of a template, in the scan's world at any angle.
    interpolation
        Of grey values.
    """

    shape: tuple[int, ...]
    target: np.ndarray | None
    box: tuple[float, float, float, float] | None
    scan_shape: tuple[int, ...]
    scan_affine: np.ndarray | None
    scan_map: IndexMap
    registered: bool = False
    interpolation: Interpolation = "auto"

    def map_to(self, affine: np.ndarray | None) -> IndexMap:
        """How the grid lies in a volume with this affine (4, 4; axes along RAS+), or in the picture for None.

        An image on the scan's own voxels gets the scan's own map, to the last bit.
        """
        if affine is None or self.scan_affine is None or self.target is None:
            return self.scan_map
        if np.allclose(np.linalg.inv(self.scan_affine) @ affine, np.eye(4), atol=1e-4):
            return self.scan_map
        return locate(affine, self.target, self.shape, sharp=self.registered).by(self.interpolation)


def canonical(image: Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A volume with its axes in the order and direction of RAS+: array, affine (4, 4), and the orientation (3, 2), as
    of nibabel, that was applied.
    """
    assert image.affine is not None, "a volume has an affine"
    to_ras = nib.orientations.io_orientation(image.affine)
    affine = image.affine @ nib.orientations.inv_ornt_aff(to_ras, image.array.shape)
    return nib.orientations.apply_orientation(image.array, to_ras), affine, to_ras


def place(affine: np.ndarray, target: np.ndarray, shape: Sequence[int]) -> tuple[IndexMap, np.ndarray]:
    """Move a grid by up to half a voxel onto the voxels of a scan, along axes on which both have the same spacing.

    Parameters
    ----------
    affine
        (4, 4) of the scan, its axes in the order and direction of RAS+.
    target
        (4, 4) of the grid: its axes along RAS+.
    shape
        Of the grid.

    Returns
    -------
    index_map
        How the grid lies in the scan.
    target
        Affine of the grid after it was moved.
    """
    matrix, sigmas, tilt, same = _relation(affine, target, shape)
    target = target.copy()
    if tilt >= SNAP_TOLERANCE:
        return IndexMap(matrix, sigmas, False), target
    starts, steps = matrix[:3, 3].copy(), np.diag(matrix)[:3].copy()
    steps[same], sigmas[same] = 1, 0
    starts[same] = np.floor(starts[same] + _HALF_DOWN)
    target[:3, 3] = nib.affines.apply_affine(affine, starts)
    return IndexMap(aligned_matrix(starts, steps), sigmas, True), target


def locate(affine: np.ndarray, target: np.ndarray, shape: Sequence[int], sharp: bool = False) -> IndexMap:
    """How a grid that stays where it is lies in a volume; parameters as of `place`, but that `target` may be any.

    Axes that coincide within `SNAP_TOLERANCE` snap, so that an image whose voxels are those of the grid is copied.

    `sharp`: where the grid is as fine as the volume along any axis, so that nothing is smoothed there, a tilted one is
    interpolated by cubic splines.  Linearly, half of what a volume has of the finest detail would be lost (by power, in
    the outer half of the band, on a grid of its own spacing; cubic splines keep five sixths).
    """
    matrix, sigmas, tilt, same = _relation(affine, target, shape)
    if tilt >= SNAP_TOLERANCE:
        return IndexMap(matrix, sigmas, False, 3 if sharp and sigmas.min() == 0 else 1)
    starts, steps = matrix[:3, 3].copy(), np.diag(matrix)[:3].copy()
    whole = same & (np.abs(starts - np.rint(starts)) < SNAP_TOLERANCE)
    starts[whole], steps[whole] = np.rint(starts[whole]), 1
    sigmas[same] = 0
    return IndexMap(aligned_matrix(starts, steps), sigmas, True)


def _relation(
    affine: np.ndarray, target: np.ndarray, shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Index map (4, 4), sigmas (3,), largest displacement by axes that do not coincide, and along which axes (3,) the
    spacing is the same.
    """
    matrix = np.linalg.inv(affine) @ target
    reach = np.array(shape) - 1
    steps = np.diag(matrix)[:3]
    tilt = np.abs(matrix[:3, :3] - np.diag(steps)) @ reach
    # Width of the target voxel's point spread beyond the scan's own (Cardoso et al. 2015, scale factor point spread
    # function matching).
    # Its width along an axis of the scan is the length of that row of the map.
    excess = np.linalg.norm(matrix[:3, :3], axis=1) ** 2 - 1
    excess[excess < _SAME_WIDTH] = 0
    sigmas = np.sqrt(excess / (8 * np.log(2)))
    return matrix, sigmas, float(tilt.max()), np.abs(steps - 1) * reach < SNAP_TOLERANCE


def box_map(box: Sequence[float], shape: Sequence[int]) -> IndexMap:
    """How a grid lies in the picture that it was scaled from; `box` as of `Placement`."""
    start, stop = np.array(box[:2]), np.array(box[2:])
    steps = (stop - start) / np.array(shape)
    return IndexMap(aligned_matrix(start + steps / 2 - 0.5, steps), np.zeros(2), True)


def inside(matrix: np.ndarray, source: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
    """Which voxels of grid `source` fall into grid `target` under the index map `matrix` (n + 1, n + 1); bool,
    broadcasts to `source`.
    """
    alone = (1,) * len(source)
    result = np.ones(alone, dtype=bool)
    index = np.ogrid[tuple(slice(n) for n in source)]
    for row, size in zip(matrix[:-1], target, strict=True):
        position: np.ndarray = np.full(alone, row[-1], dtype=np.float32)
        for slope, axis in zip(row[:-1], index, strict=True):
            if abs(slope) > 1e-9:  # an axis that does not matter stays of length 1: aligned grids cost nothing
                position = position + np.float32(slope) * axis.astype(np.float32)
        result = result & (position >= -_FACE) & (position <= size - 1 + _FACE)
    return result


# --------------------------------------------------------------------------------------------- grey levels


def interpolated(array: np.ndarray, index_map: IndexMap, shape: tuple[int, ...]) -> np.ndarray:
    """A volume (x, y, z) on a grid: the map's Gaussian, then linear interpolation or splines; float32 (*shape).

    Beyond the volume: 0 where the map is aligned and linear or takes the nearest voxel, else its outermost values.
    What splines overshoot is cut to the volume's range, and background stays what it is: where linear interpolation
    meets nothing else, so do splines.
    """
    sigmas, matrix = index_map.sigmas, index_map.matrix
    if index_map.order == 0:
        return _nearest_label(array, matrix, shape, half_up=False).astype(np.float32, copy=False)
    if index_map.aligned and (index_map.order == 1 or index_map.copies):
        return separable(array, index_map.starts, index_map.steps, index_map.sigmas, shape)
    smooth = ndimage.gaussian_filter(array, sigmas, mode="nearest") if sigmas.max() > 0 else array
    at: dict[str, Any] = {"offset": matrix[:3, 3], "output_shape": shape, "mode": "nearest", "output": np.float32}
    straight = ndimage.affine_transform(smooth, matrix[:3, :3], order=1, **at)
    if index_map.order == 1:
        return straight
    low, high = array.min(), array.max()
    curved = ndimage.affine_transform(smooth, matrix[:3, :3], order=index_map.order, **at)
    return np.where(straight > low, np.clip(curved, low, high), straight)


def separable(
    array: np.ndarray, starts: np.ndarray, steps: np.ndarray, sigmas: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Smooth, interpolate linearly and crop axis by axis, at start + step * index; the same operator as the oblique
    case, 10 x faster.  0 beyond the outer faces.
    """
    for axis in range(array.ndim):
        operator = _axis_operator(array.shape[axis], starts[axis] + steps[axis] * np.arange(shape[axis]), sigmas[axis])
        front = np.moveaxis(array, axis, 0)
        # A sparse product adds in one fixed order; BLAS does not, and its result would depend on the number of threads.
        result = operator @ front.reshape(front.shape[0], -1)
        array = np.moveaxis(result.reshape(-1, *front.shape[1:]), 0, axis)
    return array


def _axis_operator(size: int, positions: np.ndarray, sigma: float) -> sparse.csr_array:
    """Matrix (len(positions), size), float32: a Gaussian of `sigma` voxels, then linear interpolation; rows of 0
    outside the scan.
    """
    within = (positions >= -_FACE) & (positions <= size - 1 + _FACE)
    clipped = np.clip(positions, 0, size - 1)
    lower = np.minimum(clipped.astype(np.int64), size - 2)
    weight = clipped - lower
    rows = np.arange(len(positions))
    values = np.concatenate([(1 - weight) * within, weight * within])
    operator = sparse.csr_array(
        (values, (np.concatenate([rows, rows]), np.concatenate([lower, lower + 1]))), shape=(len(positions), size)
    )
    if sigma > 0:
        operator = sparse.csr_array(operator @ ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, mode="nearest"))
    operator.eliminate_zeros()
    return operator.astype(np.float32)


def nearest(foreground: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The foreground (bool) of a volume on a grid by nearest neighbour, outermost values beyond it; a single True stays
    one.

    Smoothing makes neighbours of the foreground nonzero, which must not count.
    """
    if foreground.size == 1:
        return foreground
    steps, starts = np.diag(matrix)[:3], matrix[:3, 3]
    if np.array_equal(matrix[:3, :3], np.diag(steps)):
        index = [
            np.clip(np.rint(starts[k] + steps[k] * np.arange(shape[k])).astype(np.int64), 0, foreground.shape[k] - 1)
            for k in range(3)
        ]
        return foreground[np.ix_(*index)]
    return (
        ndimage.affine_transform(
            foreground.astype(np.uint8), matrix[:3, :3], starts, output_shape=shape, order=0, mode="nearest"
        )
        > 0
    )


def scaled_picture(
    array: np.ndarray,
    foreground: np.ndarray,
    box: tuple[float, float, float, float],
    shape: tuple[int, ...],
    interpolation: Interpolation = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """A box (as of `Placement`) of a picture (rows, columns) on a grid, by a filter as wide as a target pixel (a
    triangle, or a cubic one), float32; and the foreground by nearest neighbour, bool.
    """
    left_first, to = (box[1], box[0], box[3], box[2]), (int(shape[1]), int(shape[0]))
    picture = PilImage.fromarray(np.ascontiguousarray(array))
    image = np.asarray(picture.resize(to, _PICTURE_FILTERS[interpolation], box=left_first), dtype=np.float32)
    if foreground.size == 1:
        return image, foreground
    counted = PilImage.fromarray(foreground.astype(np.uint8)).resize(to, PilImage.Resampling.NEAREST, box=left_first)
    return image, np.asarray(counted) > 0


# -------------------------------------------------------------------------------------------------- labels


def majority(labels: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The label that fills most of each voxel of a grid.

    A voxel of the grid is looked at in evenly spaced places, about one per voxel of the label map that it covers, and
    twice, so that places between two voxels of the label map count for both and structures stay where they are; where
    it covers one or less this is `nearest_label`.  When two labels fill the same part the one at the voxel's centre
    wins, as of `nearest_label`, else the smaller.  (A fixed rule for ties, such as "outside", would shrink every
    structure whose surface lies in the middle of the grid's voxels; halving the resolution makes that the usual case.)
    What is thinner than half a voxel of the grid vanishes.

    Parameters
    ----------
    labels
        Whole numbers, n axes.
    matrix
        (n + 1, n + 1) index map from the grid.
    shape
        Of the grid.

    Returns
    -------
    numpy.ndarray
        (*shape), of the type of `labels`; 0 outside of the label map.
    """
    axes, places = labels.ndim, int(places_of(matrix)[0].prod())
    centre = nearest_label(labels, matrix, shape)
    if places == 1:
        return centre
    found = np.empty(shape, labels.dtype)
    rows = max(1, _PLACES // (2 * places * int(np.prod(shape[1:]))))
    for first in range(0, shape[0], rows):
        slab = found[first : first + rows]
        moved = matrix.copy()
        moved[:axes, axes] += first * matrix[:axes, 0]
        samples = np.concatenate(list(sampled_labels(labels, moved, slab.shape)), axis=axes).reshape(-1, 2 * places)
        slab[...] = _commonest(samples, centre[first : first + rows].ravel()).reshape(slab.shape)
    return found


def sampled_labels(labels: np.ndarray, matrix: np.ndarray, shape: Sequence[int]) -> Iterator[np.ndarray]:
    """Labels at the places of each voxel of a grid (`places_of`), (*shape, places), twice: where a place lies between
    two voxels of the label map, of the one before, then of the one behind, so that together both count.

    Parameters as of `majority`.
    """
    axes, (parts, finer) = labels.ndim, places_of(matrix)
    fine_shape = tuple(int(n) for n in np.array(shape) * parts)
    for half_up in (False, True):
        fine = _nearest_label(labels, matrix @ finer, fine_shape, half_up)
        blocks = fine.reshape([n for pair in zip(shape, parts, strict=True) for n in pair])
        yield np.moveaxis(blocks, range(1, 2 * axes, 2), range(axes, 2 * axes)).reshape(*shape, -1)


def places_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In how many places along each axis (n,) a voxel of a grid is looked at under the index map `matrix` (n + 1,
    n + 1), about one per voxel of the label map that it covers; and the map (n + 1, n + 1) from them to the grid.
    """
    axes = len(matrix) - 1
    parts = np.maximum(1, np.ceil(np.linalg.norm(matrix[:axes, :axes], axis=0) - 0.01).astype(int))
    finer = np.diag([*(1 / parts), 1.0])
    finer[:axes, axes] = (1 / parts - 1) / 2
    return parts, finer


def _commonest(samples: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The commonest of each row of `samples` (n, k); among equals the one in `centre` (n,), else the smallest; (n,)."""
    found = samples[:, 0].copy()
    mixed = (samples != samples[:, :1]).any(axis=1)
    ordered = np.sort(samples[mixed], axis=1)
    place = np.arange(ordered.shape[1], dtype=np.float32)
    begins = np.zeros(ordered.shape, dtype=np.float32)
    begins[:, 1:] = np.where(ordered[:, 1:] != ordered[:, :-1], place[1:], 0)
    length = place - np.maximum.accumulate(begins, axis=1)  # of the run of equal labels so far
    length += 0.5 * (ordered == centre[mixed, np.newaxis])
    found[mixed] = np.take_along_axis(ordered, length.argmax(axis=1)[:, np.newaxis], axis=1)[:, 0]
    return found


def nearest_label(labels: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels on a grid by nearest neighbour, 0 outside of the label map; parameters as of `majority`.

    In the middle between several voxels it is the label that most of them have.  Where that is a draw, every other
    place of the grid takes the first of them and the rest the last: structures neither move nor grow nor shrink.
    """
    before, behind = (_nearest_label(labels, matrix, shape, half_up) for half_up in (False, True))
    unsure = np.nonzero(before != behind)
    if not len(unsure[0]):
        return before
    index = np.stack(unsure, axis=1)
    positions = index @ matrix[:-1, :-1].T + matrix[:-1, -1]
    beyond = ((positions < -_FACE) | (positions > np.array(labels.shape) - 1 + _FACE)).any(axis=1)
    ends = [np.clip(np.floor(positions + half).astype(np.int64), 0, np.array(labels.shape) - 1) for half in _HALVES]
    corners = [
        labels[tuple(ends[end][:, axis] for axis, end in enumerate(corner))]
        for corner in itertools.product((0, 1), repeat=labels.ndim)
    ]
    samples = np.where(beyond[:, np.newaxis], labels.dtype.type(0), np.stack(corners, axis=1))
    last = index @ _SPREAD[: labels.ndim] % 1 < 0.5
    before[unsure] = _commonest(samples, np.where(last, samples[:, -1], samples[:, 0]))
    return before


def _nearest_label(labels: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], half_up: bool) -> np.ndarray:
    """As `nearest_label`, but that in the middle it is the voxel before along each axis, or with `half_up` behind."""
    axes, half = labels.ndim, _HALVES[half_up]
    starts, steps = matrix[:axes, axes], np.diag(matrix)[:axes]
    if not np.array_equal(matrix[:axes, :axes], np.diag(steps)):
        down = starts + (half - 0.5)
        return ndimage.affine_transform(
            labels, matrix[:axes, :axes], down, output_shape=shape, order=0, mode="grid-constant", cval=0
        )
    index, outside = [], []
    for start, step, count, size in zip(starts, steps, shape, labels.shape, strict=True):
        positions = start + step * np.arange(count)
        outside.append((positions < -_FACE) | (positions > size - 1 + _FACE))
        index.append(np.clip(np.floor(positions + half).astype(np.int64), 0, size - 1))
    found = labels[np.ix_(*index)]
    for axis, beyond in enumerate(outside):
        found[(slice(None),) * axis + (beyond,)] = 0
    return found
