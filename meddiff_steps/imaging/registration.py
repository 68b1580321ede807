"""Heads in one pose: the rigid or affine transform from a template's world to that of a scan, through SimpleITK.

It is estimated on coarse copies of both; what preprocessing makes of it is only where the study's grid lies in the
scan, so that the scan itself is interpolated once.

A rigid transform is estimated as a similarity, of which rotation and translation are kept: heads differ in size, and
a template of another size could be matched by turning a head, were its size not free.  Sizes stay what they are.

SimpleITK: Lowekamp et al. 2013.  The template `mni152`: Fonov et al. 2011.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import pandas as pd
import rfc8785
import SimpleITK as sitk
from scipy.linalg import polar

from meddiff_steps.config import MNI152, Registration
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.itk import itk_image, one_itk_thread
from meddiff_steps.imaging.reading import Image, ScanError, read_image
from meddiff_steps.imaging.resampling import canonical, inside, interpolated, locate

#: Voxels (mm) of the copies that a transform is estimated on; before that, it is estimated on every second of them.
COARSE_MM = 4.0
#: Air (voxels of the copy) around the template's foreground: its outline counts.
AIR = 2
#: What is darker than this share of a template's bright tissue (its 99.5th percentile) is background.
BACKGROUND = 0.05
#: Of the optimiser, in mm (parameters are scaled by how far they move voxels): the first step of a similarity, and of
#: an affine transform, which begins at a similarity and must not jump; the last one; how many at most on each level;
#: and the gradient that counts as none (by ITK's default, where it stops depends by up to a degree on the pose).
FIRST_STEP, FIRST_STEP_AFFINE, LAST_STEP, MOST_STEPS, NO_GRADIENT = 1.0, 0.1, 1e-3, 100, 1e-6

#: Columns of the quality table that say how a scan was registered; null where the study does not.
#: `registration_template` is the template's name and `registration_template_sha256` the digest of its content;
#: `registration_matrix` (16 numbers of a 4 x 4 matrix, row by row, JSON) leads from mm of the template's world to mm of
#: the scan's, both RAS+; `registration_rotation_deg` is its angle (0 to 180), `registration_translation_mm` how far it
#: moves the middle of the template; `registration_scale` is the size of the head as a share of the template's, as it
#: was estimated; `registration_correlation` (0 to 1) is the absolute correlation of grey values after it.
REGISTRATION_COLUMNS = {
    "registration_template": "string",
    "registration_template_sha256": "string",
    "registration_rotation_deg": "float64",
    "registration_translation_mm": "float64",
    "registration_scale": "float64",
    "registration_correlation": "float64",
    "registration_matrix": "string",
}


_Transform = TypeVar("_Transform", sitk.Similarity3DTransform, sitk.AffineTransform)


@dataclass(frozen=True)
class Template:
    """What scans are registered to.

    Attributes
    ----------
    name
        "mni152", or the name of a file.
    sha256
        Of the file; of voxels and affine where the template comes out of a package.
    coarse
        Grey values on voxels of `COARSE_MM` along RAS+, around the foreground.
    centre
        (3,) middle of the foreground's box, mm.
    """

    name: str
    sha256: str
    coarse: Image
    centre: np.ndarray


@lru_cache(maxsize=2)
def load_template(template: str) -> Template:
    """Read a template.

    Parameters
    ----------
    template
        "mni152": the average of 152 brains, without skull, that comes with nilearn (Fonov et al. 2011).  Else the path
        of a volume that shows what the scans show: with a skull where they have one, else without.

    Raises
    ------
    UserError
        The file is missing or not readable, or is no volume.
    """
    if template == MNI152:
        from nilearn.datasets import load_mni152_template  # takes a second: only where it is asked for

        volume = load_mni152_template(resolution=1)
        image = Image(volume.get_fdata(dtype=np.float32), np.asarray(volume.affine, dtype=np.float64))
        facts = {"shape": list(image.array.shape), "affine": [float(v) for v in volume.affine.ravel()]}
        digest = hashlib.sha256(rfc8785.dumps(facts) + image.array.astype("<f4").tobytes()).hexdigest()
        return _template(MNI152, digest, image)
    path = Path(template)
    try:
        image = read_image(path)
        if image.affine is None:
            raise ScanError(path, "wrong dimension", "a picture, expected a 3D volume.")
    except ScanError as error:
        raise UserError(
            f"preprocess.registration.template: {error} Give a 3D NIfTI volume that shows what the scans show (with a"
            f" skull where they have one, else without), or {MNI152}, which comes with nilearn."
        ) from None
    return _template(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), image)


def _template(name: str, sha256: str, image: Image) -> Template:
    values = image.array - image.array.min()
    foreground = values > BACKGROUND * np.percentile(values[values > 0], 99.5)
    coarse, centre = _coarse(image, foreground, AIR)
    return Template(name, sha256, coarse, centre)


def _coarse(image: Image, foreground: np.ndarray, air: int = 0) -> tuple[Image, np.ndarray]:
    """A copy on voxels of `COARSE_MM` along RAS+ that just holds the foreground and `air` voxels around it, background
    0; and the middle (3,) of the foreground's box, mm.
    """
    array, affine, to_ras = canonical(image)
    if foreground.size > 1:
        foreground = nib.orientations.apply_orientation(foreground, to_ras)
    foreground = np.broadcast_to(foreground, array.shape)
    others = [tuple(other for other in range(3) if other != axis) for axis in range(3)]
    occupied = [np.flatnonzero(foreground.any(axis=other))[[0, -1]] for other in others]
    corners = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*occupied), axis=-1).reshape(-1, 3))
    low, high = corners.min(axis=0), corners.max(axis=0)
    shape = tuple(int(n) for n in np.ceil((high - low) / COARSE_MM) + 1 + 2 * air)
    grid = np.diag([COARSE_MM] * 3 + [1.0])
    grid[:3, 3] = (low + high) / 2 - COARSE_MM * (np.array(shape) - 1) / 2
    index_map = locate(affine, grid, shape)
    values = interpolated(array, index_map, shape) - array.min()
    return Image(np.where(inside(index_map.matrix, shape, array.shape), values, np.float32(0)), grid), (low + high) / 2


# ----------------------------------------------------------------------------------------------- a scan


@dataclass(frozen=True)
class Pose:
    """How a head lies, against a template.

    Attributes
    ----------
    matrix
        (4, 4) from mm of the template's world to mm of the scan's, both RAS+.
    scale
        Size of the head as a share of the template's, as it was estimated; a rigid `matrix` has none.
    correlation
        Absolute correlation of grey values over the template's box, 0 to 1.
    centre
        (3,) middle of the template, mm.
    """

    matrix: np.ndarray
    scale: float
    correlation: float
    centre: np.ndarray

    @property
    def rotation_deg(self) -> float:
        """Angle of the rotation, 0 to 180; of an affine transform, of the rotation that is nearest to it."""
        cosine = (np.trace(polar(self.matrix[:3, :3])[0]) - 1) / 2
        return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    @property
    def translation_mm(self) -> float:
        """How far the middle of the template is moved."""
        return float(np.linalg.norm(nib.affines.apply_affine(self.matrix, self.centre) - self.centre))

    def grid(self, shape: tuple[int, ...], voxel_mm: tuple[float, float, float]) -> np.ndarray:
        """Affine (4, 4) in the scan's world of a grid along the template's axes, in the middle of the template."""
        spacing = np.array(voxel_mm)
        grid = np.diag([*spacing, 1.0])
        grid[:3, 3] = self.centre - spacing * (np.array(shape) - 1) / 2
        return self.matrix @ grid

    def facts(self, template: Template) -> dict[str, Any]:
        """The columns of `REGISTRATION_COLUMNS`."""
        return {
            "registration_template": template.name,
            "registration_template_sha256": template.sha256,
            "registration_rotation_deg": self.rotation_deg,
            "registration_translation_mm": self.translation_mm,
            "registration_scale": self.scale,
            "registration_correlation": self.correlation,
            "registration_matrix": json.dumps([float(v) for v in self.matrix.ravel()]),
        }


def register(path: Path, scan: Image, foreground: np.ndarray, config: Registration, template: Template) -> Pose:
    """Find how a head lies.  The same for the same scan, whatever the number of threads; no number is drawn.

    Parameters
    ----------
    path
        Of the scan, for messages.
    scan, foreground
        As preprocessing has them: with its mask applied; bool, or a single True where all counts.
    config
        The study's `preprocess.registration`.
    template
        As of `load_template`.

    Raises
    ------
    ScanError
        No transform was found, or it is not plausible.
    """
    coarse, _ = _coarse(scan, foreground)
    fixed, moving = itk_image(template.coarse), itk_image(coarse)
    try:
        with one_itk_thread():
            similarity, metric = _similarity(fixed, moving)
            found: sitk.Similarity3DTransform | sitk.AffineTransform = similarity
            if config.transform == "affine":
                found, metric = _affine(fixed, moving, similarity)
    except RuntimeError as error:  # ITK's only way to say that images do not overlap any more, or are flat
        why = str(error).splitlines()[-1]
        raise ScanError(path, "registration failed", f"no way onto {template.name} ({why}). {_REMEDY}") from None
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(found.GetMatrix()).reshape(3, 3)
    matrix[:3, 3] = found.TransformPoint((0.0, 0.0, 0.0))
    scale = float(np.cbrt(np.linalg.det(matrix[:3, :3])))
    if scale <= 0:
        raise ScanError(path, "registration failed", f"fits {template.name} best as its mirror image. {_REMEDY}")
    if config.transform == "rigid":
        middle = nib.affines.apply_affine(matrix, template.centre)
        matrix[:3, :3] /= scale
        matrix[:3, 3] = middle - matrix[:3, :3] @ template.centre
    # ITK's metric is the square of the correlation, with the sign of what is made small.
    pose = Pose(matrix, scale, float(np.sqrt(max(0.0, -metric))), template.centre)
    if pose.correlation < config.min_correlation:
        raise ScanError(
            path,
            "registration: low correlation",
            f"correlates with {template.name} by {pose.correlation:.2f} after registration, expected"
            f" preprocess.registration.min_correlation ({config.min_correlation:g}) or more. {_REMEDY}",
        )
    if pose.rotation_deg > config.max_rotation_deg:
        raise ScanError(
            path,
            "registration: implausible rotation",
            f"turned by {pose.rotation_deg:.0f} degrees against {template.name}, expected at most"
            f" preprocess.registration.max_rotation_deg ({config.max_rotation_deg:g}). {_REMEDY}",
        )
    return pose


def template_on_grid(template: Template, shape: tuple[int, ...], voxel_mm: tuple[float, float, float]) -> np.ndarray:
    """Where a template has its head on the grid of scans that are registered to it; bool (*shape)."""
    coarse = template.coarse
    assert coarse.affine is not None, "a volume has an affine"
    lies = Pose(np.eye(4), 1.0, 1.0, template.centre).grid(shape, voxel_mm)
    index_map = locate(coarse.affine, lies, shape)
    values = np.where(
        inside(index_map.matrix, shape, coarse.array.shape), interpolated(coarse.array, index_map, shape), 0
    )
    # Half of what counts as its foreground: interpolation blurs the outline by as much.
    return values > 0.5 * np.percentile(coarse.array[coarse.array > 0], 50)


def registered(quality: pd.DataFrame) -> str | None:
    """How the scans of a quality table lay, in words; None where none was registered, or nothing could be yet."""
    if "registration_rotation_deg" not in quality or quality["registration_rotation_deg"].isna().all():
        return None
    found = quality[quality["registration_rotation_deg"].notna()].set_index("scan_id")
    turned, alike = found["registration_rotation_deg"], found["registration_correlation"]
    return (
        f"{len(found)} scans registered to {found['registration_template'].iloc[0]}: turned by {turned.median():.1f}"
        f" degrees in the median and {turned.max():.1f} at most ({turned.idxmax()}); the least alike after it is"
        f" {alike.idxmin()} (correlation {alike.min():.2f})"
    )


_REMEDY = (
    "Look at the scan: does it show a whole head, are its axes what its header says, and does the template show the"
    " same (with or without a skull)? Repair it, mask it (preprocess.brain_mask), or take it out of the cohort."
)


def _similarity(fixed: sitk.Image, moving: sitk.Image) -> tuple[sitk.Similarity3DTransform, float]:
    """From centres of mass on: rotation, translation and one scale; the transform, and the metric."""
    start = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.Similarity3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    return _optimised(fixed, moving, sitk.Similarity3DTransform(start), [2, 1], FIRST_STEP)


def _affine(
    fixed: sitk.Image, moving: sitk.Image, similarity: sitk.Similarity3DTransform
) -> tuple[sitk.AffineTransform, float]:
    """From a similarity on: all twelve numbers."""
    start = sitk.AffineTransform(3)
    start.SetCenter(similarity.GetCenter())
    start.SetMatrix(similarity.GetMatrix())
    start.SetTranslation(similarity.GetTranslation())
    return _optimised(fixed, moving, start, [1], FIRST_STEP_AFFINE)


def _optimised(
    fixed: sitk.Image, moving: sitk.Image, transform: _Transform, shrink: list[int], first_step: float
) -> tuple[_Transform, float]:
    """Gradient descent on the correlation over all voxels: none is drawn."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        first_step, LAST_STEP, MOST_STEPS, gradientMagnitudeTolerance=NO_GRADIENT
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(shrink)
    method.SetSmoothingSigmasPerLevel([0.0 if factor == 1 else factor / 2 for factor in shrink])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(fixed, moving)
    return transform, method.GetMetricValue()
