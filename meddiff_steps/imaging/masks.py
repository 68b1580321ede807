"""Masks and label maps on a scan, and whether they lie on its head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from meddiff_steps.imaging.reading import Image, ScanError
from meddiff_steps.imaging.resampling import nearest_label

#: Share of a mask or label map that lies on the head (of the head in it, where it is larger than the head) below which
#: it belongs to another place or scan, and below which it is worth a warning.
OFF_HEAD, NOTEWORTHY_OFF_HEAD = 0.5, 0.9
#: For a structure of less than this share of the head, a voxel around it counts, too: it may lie at the surface.
SMALL = 0.1
#: A mask of less than the one or more than the other times the cohort's median volume is worth a warning.
NOTEWORTHY_VOLUME = (0.5, 2.0)

#: Columns of the quality table for `preprocess.brain_mask`: its volume in mL (null for pictures), and as of `on_head`.
MASK_COLUMNS = {"mask_ml": "float64", "mask_on_head": "float64"}


def mask_on(path: Path, scan: Image, mask: Image, mask_path: Path) -> np.ndarray:
    """A mask (above 0 is inside; any grid of the same world space) on the voxels of a scan: bool, of the scan's shape.

    Raises
    ------
    ScanError
        The mask has another size than a picture, or covers nothing of the scan.
    """
    if mask.array.ndim != scan.array.ndim:
        raise ScanError(
            path,
            "mask does not fit",
            f"the mask {mask_path} is {mask.array.ndim}D, the scan {scan.array.ndim}D. Correct preprocess.brain_mask.",
        )
    inside = mask.array > 0
    if scan.affine is not None and mask.affine is not None:
        to_mask = np.linalg.inv(mask.affine) @ scan.affine
        if inside.shape != scan.array.shape or not np.allclose(to_mask, np.eye(4), atol=1e-3):
            inside = nearest_label(inside.astype(np.uint8), to_mask, scan.array.shape) > 0
    elif inside.shape != scan.array.shape:
        found, expected = ("x".join(map(str, a.shape)) for a in (inside, scan.array))
        raise ScanError(
            path,
            "mask does not fit",
            f"the mask {mask_path} has {found} pixels, the scan {expected}. Correct preprocess.brain_mask.",
        )
    if not inside.any():
        raise ScanError(
            path,
            "empty mask",
            f"the mask {mask_path} covers no voxel of the scan. Make it again, or check that both lie in the same"
            " space.",
        )
    return inside


def on_head(path: Path, head: Image | None, mask: Image, mask_path: Path) -> float | None:
    """Share of a mask or label map that lies on the head, or of the head that lies in it where it is the larger; None
    where there is none or it is empty.

    Parameters
    ----------
    path, mask, mask_path
        As of `mask_on`.
    head
        As of `background.head_of`.

    Raises
    ------
    ScanError
        It is less than `OFF_HEAD`.
    """
    if head is None or not (mask.array > 0).any():
        return None
    inside = mask_on(path, head, mask, mask_path)
    volume = float(np.count_nonzero(mask.array > 0))  # what lies beyond the scan is not on the head
    if head.affine is not None and mask.affine is not None:
        volume *= _voxel_mm3(mask.affine) / _voxel_mm3(head.affine)
    size = float(np.count_nonzero(head.array))
    place = ndimage.binary_dilation(head.array) if volume < SMALL * size else head.array
    share = float(min(1.0, np.count_nonzero(inside & place) / max(1.0, min(volume, size))))
    if share < OFF_HEAD:
        raise ScanError(
            path,
            "lies beside the head",
            f"{share:.0%} of {mask_path} lies on the head, expected at least {OFF_HEAD:.0%}: it is of another scan or"
            " space, or one of the two headers is wrong. Look at both, one over the other.",
        )
    return share


def millilitres(mask: Image) -> float | None:
    """Volume of a mask; None of a picture."""
    if mask.affine is None:
        return None
    return float(np.count_nonzero(mask.array > 0) * _voxel_mm3(mask.affine) / 1000)


def _voxel_mm3(affine: np.ndarray) -> float:
    return float(abs(np.linalg.det(affine[:3, :3])))


def misplaced(quality: pd.DataFrame) -> str | None:
    """How many scans of a quality table have a mask or label map that lies partly beside the head, or a mask of an
    unusual volume, in words; None if none has.
    """
    told = []
    for column in (c for c in quality.columns if c.endswith("_on_head")):
        beside = quality[quality[column] < NOTEWORTHY_OFF_HEAD]
        if len(beside):
            worst = beside.loc[beside[column].idxmin()]
            told.append(
                f"{column}: below {NOTEWORTHY_OFF_HEAD:g} in {len(beside)} scans, least in {worst['scan_id']}"
                f" ({worst[column]:.2f})"
            )
    volumes = quality["mask_ml"].dropna()
    usual = volumes.median() if len(volumes) else 0.0
    low, high = (times * usual for times in NOTEWORTHY_VOLUME)
    unusual = quality.loc[volumes.index[(volumes < low) | (volumes > high)]]
    if len(unusual):
        first = unusual.iloc[0]
        told.append(
            f"mask_ml: {len(unusual)} masks of less than half or more than twice the median of {usual:.0f} mL,"
            f" {first['scan_id']} first ({first['mask_ml']:.0f} mL)"
        )
    return "; ".join(told) or None
