"""One scan brought onto another without a network, through SimpleITK: an affine transform, and demons.

Displacements are as those of `imaging.deformation`: voxels, (3, *spatial); the moved scan has at x what the moving one
has at x + u(x).  No number is drawn, and one thread adds.
"""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk

from meddiff_steps.imaging.itk import itk_image, one_itk_thread
from meddiff_steps.imaging.reading import Image

#: Of the affine transform: shrink factors and Gaussians (voxels) of its levels, steps of each, first and last step.
AFFINE_LEVELS, AFFINE_STEPS, FIRST_STEP, LAST_STEP = ((4, 2.0), (2, 1.0)), 100, 0.5, 1e-3
#: Of diffeomorphic demons: shrink factors and iterations of its levels, and the Gaussian (voxels) that keeps the
#: displacement smooth.
DEMONS_LEVELS, DEMONS_SMOOTH = ((4, 60), (2, 60), (1, 40)), 1.5
#: Grey levels that histograms are matched by, and places at which.
HISTOGRAM_LEVELS, HISTOGRAM_POINTS = 128, 15


def _volume(image: np.ndarray) -> sitk.Image:
    return itk_image(Image(image.astype(np.float32), np.eye(4)))


def _voxels(field: sitk.Image) -> np.ndarray:
    """A displacement field of ITK, whose voxels here are of 1 mm along the axes of the array."""
    return np.moveaxis(sitk.GetArrayFromImage(field), -1, 0).transpose(0, 3, 2, 1).astype(np.float32)


def affine(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Displacement of the affine transform that makes grey values of two scans (*spatial) correlate best."""
    with one_itk_thread():
        target, source = _volume(fixed), _volume(moving)
        centre = [(n - 1) / 2 for n in fixed.shape]
        transform = sitk.AffineTransform(3)
        transform.SetCenter(centre)
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsCorrelation()
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(
            FIRST_STEP, LAST_STEP, AFFINE_STEPS, gradientMagnitudeTolerance=1e-6
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([shrink for shrink, _ in AFFINE_LEVELS])
        method.SetSmoothingSigmasPerLevel([sigma for _, sigma in AFFINE_LEVELS])
        method.SetInitialTransform(transform, inPlace=True)
        method.Execute(target, source)
        return _voxels(sitk.TransformToDisplacementField(transform, sitk.sitkVectorFloat64, target.GetSize()))


def demons(fixed: np.ndarray, moving: np.ndarray) -> np.ndarray:
    """Displacement by diffeomorphic demons (Vercauteren et al. 2009), from coarse to fine, after grey levels were
    matched.
    """
    with one_itk_thread():
        target, source = _volume(fixed), _volume(moving)
        source = sitk.HistogramMatching(source, target, HISTOGRAM_LEVELS, HISTOGRAM_POINTS, True)
        field: sitk.Image | None = None
        for shrink, iterations in DEMONS_LEVELS:
            near, far = (_coarser(image, shrink) for image in (target, source))
            method = sitk.DiffeomorphicDemonsRegistrationFilter()
            method.SetNumberOfIterations(iterations)
            method.SetSmoothDisplacementField(True)
            method.SetStandardDeviations(DEMONS_SMOOTH)
            if field is None:
                field = method.Execute(near, far)
            else:
                field = method.Execute(near, far, sitk.Resample(field, near))
        assert field is not None, "there is a level"
        return _voxels(field)


def _coarser(image: sitk.Image, shrink: int) -> sitk.Image:
    if shrink == 1:
        return image
    return sitk.Shrink(sitk.SmoothingRecursiveGaussian(image, shrink / 2), [shrink] * image.GetDimension())
