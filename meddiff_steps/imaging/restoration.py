"""The way back: from the study's grid and [0, 1] to a scan's own grid and grey values.

What preprocessing did to a scan stands in its row of the quality table (`preprocessed/qc.parquet`); with it an image on
the study's grid (edited, translated, reconstructed) or a label map comes back onto the voxels of the scan's file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import Kind
from meddiff_steps.imaging.resampling import IndexMap, box_map, inside, locate, nearest_label, separable

Facts = Mapping[str, Any] | pd.Series


def restore(
    image: np.ndarray, facts: Facts, *, kind: Kind = "contrast", channel: str | None = None, order: int = 1
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring an image from the study's grid to the grid and grey values of a scan.

    The image is looked at in the centres of the scan's own voxels; nothing is smoothed, also where these are larger
    than those of the study's grid.  Beyond the study's grid, which may be smaller than the scan, stands what the value
    0 stands for: the grey level of the scan's lower percentile (so that no edge shows where the grid ends), or label 0.
    Grey levels that preprocessing clipped, and those that a brain mask removed, do not come back.

    Parameters
    ----------
    image
        (*shape) or (1, *shape) on the grid that the scan was brought to: values in [0, 1], or labels or a mask of whole
        numbers or booleans.
    facts
        The scan's row of the quality table.
    kind
        "contrast" for grey values; "labels" and "mask" are copied from the nearest voxel, without a scale.
    channel
        A contrast among the study's channels whose grey values are meant; the scan's own for None.
    order
        Of the spline that interpolates grey values, 0 to 5: 1 is linear.  What splines of a higher order overshoot is
        cut to the range of the image.

    Returns
    -------
    array
        Of the shape and axes of the scan's file (a volume's trailing axes of length 1 are dropped; a picture is
        upright, as EXIF has it): float32 grey values, or labels of the type of `image`.
    affine
        (4, 4) of the scan's file; None for pictures.

    Raises
    ------
    UserError
        The scan was left out, the table is from before there were these columns, there is no such contrast, or the
        image does not fit.
    """
    values = _on_grid(image, facts)
    if kind != "contrast":
        return _restored_labels(values, facts), _affine(facts)
    low, high = _range(facts, channel)
    shares = _restored_values(values, facts, order)
    return np.float32(low) + shares * np.float32(high - low), _affine(facts)


def restore_numbers(image: np.ndarray, facts: Facts) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring numbers that are no grey values, as of a statistical map, to a scan's grid; 0 beyond the study's grid.

    Parameters, returns and errors as of `restore`.
    """
    return _restored_values(_on_grid(image, facts), facts, 1), _affine(facts)


def restore_difference(
    image: np.ndarray, facts: Facts, *, channel: str | None = None, order: int = 1
) -> tuple[np.ndarray, np.ndarray | None]:
    """Bring a difference of two images of the study's grid, in [-1, 1], to a scan's grid: signed differences of its
    grey values, 0 beyond the study's grid.

    Parameters, results and errors as of `restore`.
    """
    low, high = _range(facts, channel)
    return _restored_values(_on_grid(image, facts), facts, order) * np.float32(high - low), _affine(facts)


# --------------------------------------------------------------------------------------------------- facts


def _fact(facts: Facts, name: str) -> Any:
    value = facts.get(name)
    return None if value is None or pd.isna(value) else value


def _numbers(facts: Facts, name: str) -> np.ndarray:
    """A column that is JSON."""
    value = _fact(facts, name)
    if value is None:
        raise UserError(
            f"scan {facts.get('scan_id')}: its row of the quality table has no {name}, which says how to bring an image"
            " back. Make preprocessed/qc.parquet again with this version."
        )
    return np.array(json.loads(value))


def _affine(facts: Facts) -> np.ndarray | None:
    """Of the scan's file; None for pictures."""
    return None if _fact(facts, "picture_box") is not None else _numbers(facts, "scan_affine").reshape(4, 4)


def _range(facts: Facts, channel: str | None) -> tuple[float, float]:
    """The grey levels that became 0 and 1."""
    before = "" if channel is None else f"channel_{channel}_"
    low, high = (_fact(facts, f"{before}percentile_{end}") for end in ("low", "high"))
    if low is None or high is None:
        what = "grey values" if channel is None else f"a contrast {channel}"
        raise UserError(
            f"scan {facts.get('scan_id')}: its row of the quality table knows no range of {what} (columns"
            f" {before}percentile_low and _high). Name a channel of kind contrast that this scan has, or give kind:"
            " labels or mask."
        )
    return float(low), float(high)


def _on_grid(image: np.ndarray, facts: Facts) -> np.ndarray:
    """The image without its channel axis, after checks."""
    if _fact(facts, "status") != "ok":
        raise UserError(
            f"scan {facts.get('scan_id')}: was left out by preprocessing ({facts.get('reason')}), so nothing says where"
            " its grid lies. Choose a scan with status ok."
        )
    axes = len(_numbers(facts, "shape"))
    values = np.asarray(image)
    if values.ndim == axes + 1 and values.shape[0] == 1:
        values = values[0]
    if values.ndim != axes:
        raise UserError(
            f"scan {facts.get('scan_id')}: an image of shape {np.shape(image)}, expected {axes} axes, as the scan has,"
            " or one of length 1 before them. Give one image and one channel at a time."
        )
    return values


@dataclass(frozen=True)
class _Geometry:
    """How the study's grid lies in a scan, for `grid_shape` of the image that is brought back.

    Attributes
    ----------
    index_map
        From the grid to the scan, its axes along RAS+.
    grid_shape, shape
        Of the grid, and of the scan in these axes.
    orientation
        As of nibabel, from these axes to those of the file; None for pictures.
    """

    index_map: IndexMap
    grid_shape: tuple[int, ...]
    shape: tuple[int, ...]
    orientation: np.ndarray | None

    @classmethod
    def of(cls, facts: Facts, grid_shape: tuple[int, ...]) -> Self:
        shape = tuple(int(n) for n in _numbers(facts, "shape"))
        affine = _affine(facts)
        if affine is None:
            return cls(box_map(_numbers(facts, "picture_box").tolist(), grid_shape), grid_shape, shape, None)
        to_ras = nib.orientations.io_orientation(affine)
        ras_affine = affine @ nib.orientations.inv_ornt_aff(to_ras, shape)
        ras_shape = tuple(shape[int(axis)] for axis in np.argsort(to_ras[:, 0]))
        target = _numbers(facts, "target_affine").reshape(4, 4)
        to_file = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), to_ras)
        return cls(locate(ras_affine, target, grid_shape), grid_shape, ras_shape, to_file)

    def extended(self, values: np.ndarray) -> np.ndarray:
        """The image with padding, where there was no scan, replaced by its nearest voxel that was in the scan: padding
        must not darken the edges of the scan.
        """
        covered = np.broadcast_to(inside(self.index_map.matrix, self.grid_shape, self.shape), self.grid_shape)
        if covered.all():
            return values
        if self.index_map.aligned:
            others = [tuple(o for o in range(values.ndim) if o != axis) for axis in range(values.ndim)]
            within = [np.flatnonzero(covered.any(axis=other)) for other in others]
            return values[
                np.ix_(*[np.clip(np.arange(n), w[0], w[-1]) for n, w in zip(values.shape, within, strict=True)])
            ]
        index = ndimage.distance_transform_edt(~covered, return_distances=False, return_indices=True)
        return values[tuple(index)]

    def in_file(self, array: np.ndarray) -> np.ndarray:
        """An array in the scan's axes along RAS+, in those of its file."""
        oriented = array if self.orientation is None else nib.orientations.apply_orientation(array, self.orientation)
        return np.ascontiguousarray(oriented)


# -------------------------------------------------------------------------------------------------- values


def _restored_values(values: np.ndarray, facts: Facts, order: int) -> np.ndarray:
    """Interpolated on the scan's grid, 0 beyond the study's; float32."""
    geometry = _Geometry.of(facts, values.shape)
    values = np.ascontiguousarray(geometry.extended(values), dtype=np.float32)
    matrix, axes = geometry.index_map.back(), values.ndim
    if order == 1 and geometry.index_map.aligned and min(values.shape) > 1:
        # Along axes that coincide the weights are exactly 0 and 1: values are copied.
        found = separable(values, matrix[:axes, axes], np.diag(matrix)[:axes], np.zeros(axes), geometry.shape)
    else:
        found = ndimage.affine_transform(
            values, matrix[:axes, :axes], matrix[:axes, axes], output_shape=geometry.shape, order=order, mode="nearest"
        )
        found = np.clip(found, values.min(), values.max())
        found = np.where(inside(matrix, geometry.shape, values.shape), found, np.float32(0))
    return geometry.in_file(found)


def _restored_labels(values: np.ndarray, facts: Facts) -> np.ndarray:
    """Of the nearest voxel on the scan's grid, 0 beyond the study's; of the type that they have."""
    if values.dtype.kind not in "iub":
        raise UserError(
            f"scan {facts.get('scan_id')}: labels of type {values.dtype}, expected whole numbers or booleans. Round"
            " them, or take the class of the largest share, before they are brought back."
        )
    geometry = _Geometry.of(facts, values.shape)
    stored = geometry.extended(values.astype(np.uint8) if values.dtype == bool else values)
    return geometry.in_file(nearest_label(stored, geometry.index_map.back(), geometry.shape).astype(values.dtype))
