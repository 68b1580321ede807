"""The picture in README.md: the first synthetic subjects of a dataset, by number, whatever they look like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meddiff_steps.config.base import per_axis
from meddiff_steps.imaging.encoding import PICTURE_SCALE, VOLUME_SCALE, Grid, decode, encode_picture

#: Subjects of a row, and rows of 2D images.
COLUMNS, ROWS = 6, 2
MOST = COLUMNS * ROWS
#: Pixels of the longest side of an image.
SIDE = 128
#: What the picture's own mark calls it.
NAME = "preview"


def chosen(paths: Sequence[str], spatial_dims: int) -> list[str]:
    """Images that are shown, of those of a dataset in the order of their subjects."""
    return list(paths[: COLUMNS if spatial_dims == 3 else MOST])


def pixels(release: Path, paths: Sequence[str], grid: Grid) -> np.ndarray:
    """The picture, uint8 (rows, columns): of volumes the middle slices, axial, coronal and sagittal, below each other.

    Raises
    ------
    Undecodable
        An image cannot be read.
    """
    images = [decode(release / path, grid).stored for path in paths]
    if len(grid.shape) == 3:
        spacing = per_axis(grid.spacing_mm or 1.0)
        largest = max(n * mm for n, mm in zip(grid.shape, spacing, strict=True))
        rows = [[_slice(image, axis, spacing, largest) for image in images] for axis in (2, 1, 0)]
        return np.concatenate([np.concatenate(row, axis=1) for row in rows])
    tiles = [_tile(image, image.shape, max(image.shape)) for image in images]
    empty = np.zeros_like(tiles[0])
    columns = min(COLUMNS, len(tiles))
    tiles += [empty] * (-len(tiles) % columns)
    return np.concatenate(
        [np.concatenate(tiles[start : start + columns], axis=1) for start in range(0, len(tiles), columns)]
    )


def picture(release: Path, paths: Sequence[str], grid: Grid, study: str) -> bytes:
    """The picture as a PNG that says that it is synthetic."""
    return encode_picture(pixels(release, paths, grid) / PICTURE_SCALE, NAME, study)[0]


def _slice(image: np.ndarray, axis: int, spacing: Sequence[float], largest: float) -> np.ndarray:
    """The middle slice across an axis, with the nose or the crown up."""
    shown = np.take(image, image.shape[axis] // 2, axis=axis).T[::-1]
    across, up = (one for one in range(3) if one != axis)
    grey = np.rint(shown * (PICTURE_SCALE / VOLUME_SCALE)).astype(np.uint8)
    extent = (image.shape[up] * spacing[up], image.shape[across] * spacing[across])
    tile = _tile(grey, extent, largest)
    whole = np.zeros((tile.shape[0], SIDE), np.uint8)  # all slices of a column are as wide
    left = (SIDE - tile.shape[1]) // 2
    whole[:, left : left + tile.shape[1]] = tile
    return whole


def _tile(grey: np.ndarray, extent: Sequence[float], largest: float) -> np.ndarray:
    """Nearest pixels of an image, so many that `largest` is `SIDE` pixels."""
    size = [max(1, min(SIDE, round(SIDE * length / largest))) for length in extent]
    rows, columns = ((np.arange(out) * 2 + 1) * n // (2 * out) for out, n in zip(size, grey.shape, strict=True))
    return grey[np.ix_(rows, columns)]
