"""The field of the receiving coil: the smooth factor that brightens one part of an MR scan and darkens another.

N4ITK (Tustison et al. 2010) through SimpleITK.  The field is estimated on a coarse copy,
for it is smooth, and the scan's own voxels are divided by it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from meddiff_steps.imaging.itk import one_itk_thread
from meddiff_steps.imaging.reading import Image, ScanError

#: Edge (mm) that voxels of the copy have, about; a shrink factor of 4 at 1 mm is what N4's authors took.
COARSE_MM = 4.0
#: Fewest voxels of the copy along an axis: its B-splines need some.
LEAST_VOXELS = 8
#: At most so many iterations on each of N4's levels, from coarse control points to fine ones.
ITERATIONS = (50, 50, 50, 50)

#: Columns of the quality table: the 1st and 99th percentile of the field that the scan was divided by, over what counts
#: of it, as shares of its mean there; null where the study does not correct.
BIAS_FIELD_COLUMNS = {"bias_field_low": "float64", "bias_field_high": "float64"}


def corrected(path: Path, scan: Image, foreground: np.ndarray) -> tuple[Image, dict[str, Any]]:
    """A volume divided by its bias field.  The same bits on any number of threads; no number is drawn.

    Parameters
    ----------
    path
        Of the scan, for messages.
    scan
        A volume; grey values of 0 and above.
    foreground
        Bool, True where the scan counts; a single True where all does.

    Returns
    -------
    image
        The scan with the mean of its field, over what counts, as 1: grey values keep their size.
    facts
        The columns of `BIAS_FIELD_COLUMNS`.

    Raises
    ------
    ScanError
        Values below 0, which no factor can have made, nothing above 0, or N4 found no field.
    """
    assert scan.affine is not None, "a volume has an affine"
    if scan.array.min() < 0:
        raise ScanError(
            path,
            "no bias field: values below 0",
            f"grey values from {scan.array.min():g} on, expected MR magnitudes of 0 and above: a z-score or a"
            " difference has no field that it could be divided by. Give the scan as it was, or leave"
            " preprocess.bias_field out.",
        )
    counts = np.broadcast_to(foreground, scan.array.shape) & (scan.array > 0)
    if not counts.any():
        raise ScanError(path, "no foreground", "nothing of it is above 0. Look at the scan.")
    spacing = nib.affines.voxel_sizes(scan.affine)
    # The axes of the file, at any angle to the world: the field is smooth along them as along any.
    whole, where = (sitk.GetImageFromArray(np.ascontiguousarray(a.T)) for a in (scan.array, counts.astype(np.uint8)))
    for volume in (whole, where):
        volume.SetSpacing([float(mm) for mm in spacing])
    shrink = [
        int(max(1, min(round(COARSE_MM / mm), size // LEAST_VOXELS)))
        for mm, size in zip(spacing, scan.array.shape, strict=True)
    ]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(ITERATIONS)
    try:
        with one_itk_thread():
            n4.Execute(sitk.Shrink(whole, shrink), sitk.Shrink(where, shrink))
            field = np.exp(sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(whole))).T
    except RuntimeError as error:  # ITK's only way to say that a mask is empty, or an image too small
        why = str(error).splitlines()[-1]
        raise ScanError(
            path,
            "bias field failed",
            f"N4 found no field ({why}). Look at the scan, or leave preprocess.bias_field out.",
        ) from None
    field /= np.float32(field[counts].mean(dtype=np.float64))
    low, high = np.percentile(field[counts], (1, 99))
    divided = np.where(counts, scan.array / field, scan.array).astype(np.float32)
    return replace(scan, array=divided), {"bias_field_low": float(low), "bias_field_high": float(high)}
