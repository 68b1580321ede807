"""What all uses of SimpleITK share: one thread, and images in one world."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import SimpleITK as sitk

from meddiff_steps.imaging.reading import Image


@contextmanager
def one_itk_thread() -> Iterator[None]:
    """Whatever ITK begins here, filters within filters included, adds in one order."""
    threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)


def itk_image(image: Image) -> sitk.Image:
    """An image whose axes lie along RAS+, for ITK; its world is RAS+, too, where files have LPS+."""
    assert image.affine is not None, "a volume has an affine"
    volume = sitk.GetImageFromArray(np.ascontiguousarray(image.array.T))  # ITK's first axis is NumPy's last
    volume.SetSpacing(np.diag(image.affine)[:3].tolist())
    volume.SetOrigin(image.affine[:3, 3].tolist())
    return volume
