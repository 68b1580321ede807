"""Which voxels of an image count, and its grey levels on [0, 1]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import ndimage

from meddiff_steps.config import Preprocess
from meddiff_steps.imaging.reading import Image, ScanError


def apply_mask(path: Path, scan: Image, mask: Image, mask_path: Path) -> Image:
    """The scan with 0 where the mask (above 0 is inside; any grid of the same world space) is not.

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
            inside = (
                ndimage.affine_transform(
                    inside.astype(np.uint8), to_mask[:3, :3], to_mask[:3, 3], output_shape=scan.array.shape, order=0
                )
                > 0
            )
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
    return Image(np.where(inside, scan.array, np.float32(0)), scan.affine)


def foreground_of(path: Path, array: np.ndarray, config: Preprocess) -> np.ndarray:
    """Bool array, True where the scan counts; a single True that broadcasts when everything does.

    Raises
    ------
    ScanError
        Nothing counts.
    """
    if config.foreground == "all":
        return np.ones((1,) * array.ndim, dtype=bool)
    foreground = array != 0
    if not foreground.any():
        raise ScanError(
            path, "no foreground", "every voxel is 0 inside the mask. Check that the mask belongs to this scan."
        )
    return foreground


def dark_background(scan: Image, foreground: np.ndarray) -> Image:
    """An image around 0, for example of z-scores, with its darkest value as background, which would else be grey."""
    if foreground.size > 1 and scan.array.min() < 0:
        return Image(np.where(foreground, scan.array, scan.array.min()), scan.affine)
    return scan


def normalise(
    path: Path, image: np.ndarray, inside: np.ndarray, counted: np.ndarray, config: Preprocess
) -> tuple[np.ndarray, float, float]:
    """Percentiles over `counted` on the target grid to 0 and 1, clipped; what is not `inside` (padding) to 0.

    Returns
    -------
    image
        float32, in [0, 1].
    low, high
        The grey levels that became 0 and 1.

    Raises
    ------
    ScanError
        Nothing is counted, or both percentiles are the same.
    """
    values = image[np.broadcast_to(counted, image.shape)]
    if not values.size:
        raise ScanError(
            path,
            "no foreground",
            "nothing of the scan lies in the target grid. Set preprocess.center: foreground, or enlarge"
            " preprocess.shape.",
        )
    low, high = (float(v) for v in np.percentile(values, config.percentiles))
    if not low < high:
        found = (
            f"percentiles {config.percentiles[0]:g} and {config.percentiles[1]:g} of the foreground are both {low:g}"
        )
        raise ScanError(
            path,
            "no contrast",
            f"{found}, expected a range of grey values. Check the scan, or widen preprocess.percentiles.",
        )
    scaled = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.where(inside, scaled, np.float32(0)).astype(np.float32), low, high
