"""Label maps that lie beside scans: where they are, and how they lie on the study's grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.reading import Image, read_image
from meddiff_steps.imaging.resampling import nearest_label


def read_labels(path: Path, key: str = "segmentation.labels") -> Image:
    """A label map: a volume of whole numbers, int32, 0 outside all structures.

    Raises
    ------
    ScanError
        The file cannot be read.
    UserError
        It is no label map.
    """
    labels = read_image(path, allow_constant=True)
    if labels.affine is None:
        raise UserError(f"{path}: a picture, expected a label map, NIfTI with three axes. Correct {key}.")
    whole = np.rint(labels.array).astype(np.int32)
    if not np.array_equal(whole, labels.array):
        raise UserError(
            f"{path}: values between whole numbers, expected labels. Give label maps that were not interpolated."
        )
    return Image(whole, labels.affine)


def labels_on_grid(labels: Image, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The label of the nearest voxel at each place of a grid with this affine (4, 4), int32 (*shape); 0 beyond the
    label map.
    """
    assert labels.affine is not None, "a volume has an affine"
    return nearest_label(labels.array, np.linalg.inv(labels.affine) @ affine, tuple(shape))
