"""Preprocessing: geometry in millimetres, exactness where exactness is possible, reasons where there is no image."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image as PilImage

from meddiff_steps.cohort.splits import shard_of
from meddiff_steps.config import Preprocess, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.imaging import resampling
from meddiff_steps.imaging.preprocess import QC_COLUMNS, cut_off, preprocess_image, preprocess_shard
from meddiff_steps.imaging.reading import ScanError
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.steps import preprocess as preprocess_step
from meddiff_steps.steps import quality as quality_step

DATA = Path(os.environ.get("MEDDIFF_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


def config(**changes: Any) -> Preprocess:
    return Preprocess.model_validate({"shape": (24, 32, 28), "spacing_mm": 4.0, "percentiles": (0, 100), **changes})


def rotation(*degrees: float) -> np.ndarray:
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def affine_of(
    codes: str, spacing: tuple[float, float, float], shape: tuple[int, int, int], turn: np.ndarray | None = None
) -> np.ndarray:
    """Affine of a scan whose middle is at (10, -20, 30) mm."""
    axes = nib.orientations.axcodes2ornt(codes)
    linear = np.zeros((3, 3))
    for axis, (world, direction) in enumerate(axes):
        linear[int(world), axis] = direction * spacing[axis]
    affine = np.eye(4)
    affine[:3, :3] = linear if turn is None else turn @ linear
    affine[:3, 3] = np.array([10, -20, 30]) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def world(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(*shape, 3) mm position of every voxel."""
    return nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


# ------------------------------------------------------------------------------------------------- geometry

SCANS = {
    "RAS 2 mm": ("RAS", (2, 2, 2), (60, 70, 65), None),
    "LAS 2 mm": ("LAS", (2, 2, 2), (60, 70, 65), None),
    "LPI 4 mm": ("LPI", (4, 4, 4), (31, 35, 30), None),
    "sagittal PSR, 1 x 1 x 3 mm": ("PSR", (1, 1, 3), (140, 130, 40), None),
    "thick slices RAI, 1.5 x 1.5 x 6 mm": ("RAI", (1.5, 1.5, 6), (80, 90, 22), None),
    "coarse 5 mm": ("RAS", (5, 5, 5), (24, 28, 26), None),
    "slightly oblique LAS": ("LAS", (2, 2, 2), (60, 70, 65), rotation(3, -4, 2)),
    "oblique ASL, anisotropic": ("ASL", (1.5, 2, 4), (95, 70, 32), rotation(25, 10, -15)),
}


@pytest.mark.parametrize("name", SCANS)
def test_world_coordinates_are_kept(tmp_path: Path, name: str) -> None:
    codes, spacing, shape, turn = SCANS[name]
    marker = np.array([22.0, -41.0, 38.0])  # right, posterior and superior of the middle
    affine = affine_of(codes, spacing, shape, turn)
    distance = np.linalg.norm(world(affine, shape) - marker, axis=-1)
    path = save(tmp_path / "scan.nii.gz", (1000 * np.exp(-0.5 * (distance / 6) ** 2)).astype(np.float32), affine)
    image, facts = preprocess_image(path, config(foreground="all"))
    assert image.shape == (1, 24, 32, 28) and image.dtype == np.float32

    target = np.array(json.loads(facts["target_affine"])).reshape(4, 4)
    assert np.allclose(target[:3, :3], 4 * np.eye(3)), "RAS, isotropic"
    weight = image[0] / image[0].sum()
    found = (weight[..., np.newaxis] * world(target, image[0].shape)).sum(axis=(0, 1, 2))
    assert np.linalg.norm(found - marker) < 0.4, "centre of mass, mm"
    brightest = nib.affines.apply_affine(target, np.unravel_index(image[0].argmax(), image[0].shape))
    assert np.abs(brightest - marker).max() <= 2 + 1e-3, "within half a voxel"
    middle = (np.array(image[0].shape) - 1) / 2
    assert np.sign(np.unravel_index(image[0].argmax(), image[0].shape) - middle).tolist() == [1, -1, 1]
    assert facts["orientation"] == codes and json.loads(facts["shape"]) == list(shape)
    assert np.allclose(json.loads(facts["spacing_mm"]), spacing)


def scan(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(1, 3000, shape).astype(np.int16)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR"])
@pytest.mark.parametrize("shape", [(30, 41, 37), (20, 33, 28), (11, 12, 13)])
def test_same_spacing_is_a_pure_crop(tmp_path: Path, codes: str, shape: tuple[int, int, int]) -> None:
    """Odd and even sizes, larger and smaller than the grid: no voxel value is touched, and the affine says where each
    went.
    """
    values = scan(shape)
    path = save(tmp_path / "scan.nii.gz", values, affine_of(codes, (4, 4, 4), shape))
    image, facts = preprocess_image(path, config())
    low, high = np.float32(facts["percentile_low"]), np.float32(facts["percentile_high"])
    source = nib.as_closest_canonical(nib.Nifti1Image.from_filename(path))
    target = np.array(json.loads(facts["target_affine"])).reshape(4, 4)
    index = nib.affines.apply_affine(
        np.linalg.inv(source.affine) @ target, np.moveaxis(np.indices(config().shape), 0, -1)
    )
    assert np.allclose(index, np.rint(index), atol=1e-4)
    position = np.rint(index).astype(int)
    inside = ((position >= 0) & (position < source.shape)).all(axis=-1)
    expected = np.zeros(config().shape, np.float32)
    stored = np.asarray(source.dataobj).astype(np.float32)[tuple(position[inside].T)]
    expected[inside] = np.clip((stored - low) / (high - low), 0, 1)
    assert inside.sum() == np.minimum(config().shape, source.shape).prod(), "as much of the scan as fits"
    assert np.array_equal(image[0], expected)


def test_snapping_does_not_depend_on_header_rounding(tmp_path: Path) -> None:
    """30 voxels onto 24 leave 3 on either side, 31 leave 3.5: a half goes the same way whatever the last bits of the
    affine.
    """
    shape, values = (31, 33, 31), scan((31, 33, 31))
    images = []
    for noise in (-1e-5, 0, 1e-5):
        affine = affine_of("RAS", (4, 4, 4), shape)
        affine[:3, :3] *= 1 + noise
        affine[:3, 3] += 1000 * noise
        images.append(preprocess_image(save(tmp_path / "scan.nii", values, affine), config())[0])
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])


def test_one_axis_snaps_on_its_own(tmp_path: Path) -> None:
    values = np.broadcast_to(scan((30, 40, 1)), (30, 40, 20)).copy()  # the same in every slice
    path = save(tmp_path / "scan.nii.gz", values, affine_of("RAS", (4, 4, 6), (30, 40, 20)))
    image, facts = preprocess_image(path, config())
    expected = np.clip((values[3:27, 4:36, 0].astype(np.float32) - np.float32(facts["percentile_low"])), 0, None)
    expected /= np.float32(facts["percentile_high"] - facts["percentile_low"])
    assert np.allclose(image[0, :, :, 14], expected, atol=1e-6), (
        "in-plane values are untouched, slices are interpolated"
    )


@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (1, 1, 3), (5, 5, 5), (4, 2, 7)])
def test_fast_and_general_resampling_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spacing: tuple[float, float, float]
) -> None:
    shape = (40, 38, 42)
    path = save(tmp_path / "scan.nii.gz", scan(shape), affine_of("LAS", spacing, shape))
    grid = config(shape=(16, 20, 18), spacing_mm=4.1)  # no axis snaps
    fast, facts = preprocess_image(path, grid)
    monkeypatch.setattr(resampling, "SNAP_TOLERANCE", -1.0)
    general, other = preprocess_image(path, grid)
    assert np.abs(fast - general).max() < 1e-4
    assert (
        facts["cut_off_share"] == pytest.approx(other["cut_off_share"])
        and facts["target_affine"] == other["target_affine"]
    )


@pytest.mark.parametrize("slices", [1.0, 4.0])
@pytest.mark.parametrize("turn", [None, rotation(2, 3, 1)], ids=["aligned", "oblique"])
def test_downsampling_is_anti_aliased(tmp_path: Path, turn: np.ndarray | None, slices: float) -> None:
    """Stripes of 3 mm cannot be shown at 4 mm: they must vanish, not come back as a coarser pattern."""
    shape = (100, 130, int(110 / slices))
    affine = affine_of("RAS", (1, 1, slices), shape, turn)
    ramp = np.linspace(100, 200, shape[1])[np.newaxis, :, np.newaxis] * np.ones(shape)
    stripes = 50 * np.sign(np.sin(2 * np.pi * np.arange(shape[0]) / 3 + 0.5))[:, np.newaxis, np.newaxis]
    inner = (slice(3, -3),) * 3
    with_stripes, _ = preprocess_image(
        save(tmp_path / "a.nii", (ramp + stripes).astype(np.float32), affine),
        config(shape=(20, 24, 20), foreground="all"),
    )
    without, _ = preprocess_image(
        save(tmp_path / "b.nii", ramp.astype(np.float32), affine), config(shape=(20, 24, 20), foreground="all")
    )
    left = with_stripes[0][inner] - without[0][inner]
    assert left.std() < 0.03, "of a range of 1; stripes that alias leave more than 0.1"


def test_edges_are_not_lost(tmp_path: Path) -> None:
    """Finer grid, same field of view: the outer half voxel belongs to the image; beyond it there is padding."""
    path = save(tmp_path / "scan.nii", 1000 + scan((10, 10, 10)), affine_of("RAS", (4, 4, 4), (10, 10, 10)))
    image, _ = preprocess_image(
        path, config(shape=(44, 44, 44), spacing_mm=1.0, foreground="all", percentiles=(0, 100))
    )
    covered = image[0] > 0
    assert covered[2:-2, 2:-2, 2:-2].mean() > 0.99
    assert not covered[:2].any() and not covered[-2:].any()


def test_centre_on_the_foreground(tmp_path: Path) -> None:
    values = np.zeros((60, 60, 60), np.int16)
    values[40:56, 6:16, 30:50] = scan((16, 10, 20))
    path = save(tmp_path / "scan.nii.gz", values, affine_of("RAS", (2, 2, 2), values.shape))
    grid = {"shape": (10, 8, 12), "spacing_mm": 4.0}
    image, facts = preprocess_image(path, config(center="foreground", **grid))
    assert facts["cut_off_share"] == 0
    occupied = np.argwhere(image[0] > 0.05)
    assert np.abs(occupied.min(axis=0) + occupied.max(axis=0) - (np.array(image[0].shape) - 1)).max() <= 1, (
        "the same margin on either side"
    )
    with pytest.raises(ScanError, match="center: foreground") as caught:
        preprocess_image(path, config(center="image", **grid))
    assert caught.value.reason == "no foreground"


@pytest.mark.parametrize("turn", [None, rotation(10, 5, -5)], ids=["aligned", "oblique"])
def test_cut_off_share(tmp_path: Path, turn: np.ndarray | None) -> None:
    shape = (40, 40, 40)
    affine = affine_of("LAS", (4, 4, 4), shape, turn)
    values = scan(shape)
    values[:, :, :8] = 0
    _, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, affine), config())
    target = np.array(json.loads(facts["target_affine"])).reshape(4, 4)
    index = nib.affines.apply_affine(np.linalg.inv(target), world(affine, shape))
    outside = ((index < -0.5 - 1e-3) | (index > np.array(config().shape) - 0.5 + 1e-3)).any(axis=-1)
    assert facts["cut_off_share"] == pytest.approx(outside[values != 0].mean(), abs=1e-3)


# ------------------------------------------------------------------------------------------------ intensity


def test_percentiles_over_the_foreground(tmp_path: Path) -> None:
    values = np.zeros((24, 32, 28), np.float32)
    values[4:20, 4:28, 4:24] = np.random.default_rng(2).uniform(100, 200, (16, 24, 20))
    path = save(tmp_path / "scan.nii.gz", values, affine_of("RAS", (4, 4, 4), values.shape))
    image, facts = preprocess_image(path, config(percentiles=(1, 99)))
    brain = values[values > 0]
    assert facts["percentile_low"] == pytest.approx(np.percentile(brain, 1))
    assert facts["percentile_high"] == pytest.approx(np.percentile(brain, 99))
    assert image.min() == 0 and image.max() == 1
    assert (image == 1).sum() == pytest.approx(0.01 * brain.size, rel=0.05)
    assert not image[0][values == 0].any(), "background stays black"
    _, everything = preprocess_image(path, config(percentiles=(1, 99), foreground="all"))
    assert everything["percentile_low"] == 0


def test_smoothing_does_not_move_the_foreground(tmp_path: Path) -> None:
    """Smoothing makes a rim of small values; they must not count as foreground, or percentiles would depend on it."""
    values = np.zeros((60, 70, 64), np.float32)
    values[20:40, 25:45, 22:42] = 500
    values[30:32, 35:37, 32:34] = 600
    _, facts = preprocess_image(
        save(tmp_path / "scan.nii.gz", values, affine_of("RAS", (2, 2, 2), values.shape)), config(percentiles=(50, 100))
    )
    assert facts["percentile_low"] > 490


def test_background_of_an_image_around_zero_is_black(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    values = np.zeros((48, 64, 56), np.float32)
    values[10:38, 12:52, 10:46] = rng.normal(0, 1, (28, 40, 36))
    image, facts = preprocess_image(
        save(tmp_path / "scan.nii.gz", values, affine_of("RAS", (2, 2, 2), values.shape)), config(percentiles=(1, 99))
    )
    assert facts["percentile_low"] < 0
    assert image[0, 0].max() == 0 and image[0, :, 0].max() == 0
    assert 0.3 < np.median(image[0, 10:14, 14:18, 12:16]) < 0.85, "the mean of the brain is grey"


def test_mask(tmp_path: Path) -> None:
    values = scan((24, 32, 28))
    affine = affine_of("RAS", (4, 4, 4), values.shape)
    path = save(tmp_path / "scan.nii.gz", values, affine)
    inside = np.zeros(values.shape, np.uint8)
    inside[6:18, 8:24, 7:21] = 3
    mask = save(tmp_path / "mask.nii.gz", inside, affine)
    image, _ = preprocess_image(path, config(), mask)
    assert not image[0][inside == 0].any() and image[0][inside > 0].mean() > 0.3

    coarse = save(
        tmp_path / "coarse.nii.gz",
        inside[::-1][1::2, ::2, ::2],
        nib.Nifti1Image.from_filename(mask).affine
        @ np.array([[-2, 0, 0, 22], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),
    )
    image, _ = preprocess_image(path, config(), coarse)
    agreement = (image[0] > 0) == (inside > 0)
    assert agreement.mean() > 0.85, "another grid and orientation, the same place"

    with pytest.raises(ScanError, match=r"mask\.nii\.gz covers no voxel") as caught:
        preprocess_image(path, config(), save(tmp_path / "mask.nii.gz", inside * 0, affine))
    assert caught.value.reason == "empty mask"
    with pytest.raises(ScanError, match="no such file"):
        preprocess_image(path, config(), tmp_path / "none.nii.gz")


# ------------------------------------------------------------------------------------------------- pictures


def picture(path: Path, pixels: np.ndarray) -> Path:
    PilImage.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def config_2d(**changes: Any) -> Preprocess:
    return Preprocess.model_validate(
        {"shape": (32, 32), "spacing_mm": None, "foreground": "all", "percentiles": (0, 100), **changes}
    )


def test_picture_of_the_right_size_is_untouched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (32, 32))
    pixels[0, :2] = 0, 255
    image, facts = preprocess_image(picture(tmp_path / "a.png", pixels), config_2d())
    assert image.shape == (1, 32, 32)
    assert np.allclose(image[0], pixels / 255, atol=1e-7)
    assert facts["spacing_mm"] is None and facts["target_affine"] is None and facts["cut_off_share"] == 0


def test_picture_keeps_its_proportions(tmp_path: Path) -> None:
    """The shorter side is scaled to fit, the longer one is cut in the middle; rows stay rows."""
    rows, columns = np.mgrid[:128, :96]
    disc = 255 * (np.hypot(rows - 64, columns - 48) < 36)
    disc[40:64, 44:52] = 100  # upper half
    image, facts = preprocess_image(picture(tmp_path / "a.png", disc), config_2d())
    lit = image[0] > 0.2
    assert lit.any(axis=1).sum() == lit.any(axis=0).sum() == 24, "a disc stays a disc"
    assert image[0, 11, 16] < 0.6 < image[0, 21, 16], "up stays up"
    assert facts["cut_off_share"] == pytest.approx(0.25)


def test_picture_is_anti_aliased(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:160, :160]
    stripes = 128 + 60 * np.sign(np.sin(2 * np.pi * columns / 3.0 + 0.3)) * (rows > 16)
    stripes[:16, :80], stripes[:16, 80:] = 0, 255  # fix the range
    image, _ = preprocess_image(picture(tmp_path / "a.png", stripes), config_2d())
    assert image[0, 8:].std() < 0.03


# --------------------------------------------------------------------------------------------- bad scans, shards


def test_dimension_must_fit_the_study(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", np.arange(64).reshape(8, 8))
    with pytest.raises(ScanError, match="a 2D image in a 3D study"):
        preprocess_image(path, config())
    volume = save(tmp_path / "a.nii", scan((8, 8, 8)), np.eye(4))
    with pytest.raises(ScanError, match="a 3D image in a 2D study"):
        preprocess_image(volume, config_2d())


def test_no_contrast(tmp_path: Path) -> None:
    values = np.full((24, 32, 28), 5, np.int16)
    values[0, 0, 0] = 9
    with pytest.raises(ScanError, match=r"preprocess\.percentiles") as caught:
        preprocess_image(
            save(tmp_path / "a.nii.gz", values, affine_of("RAS", (4, 4, 4), values.shape)), config(percentiles=(0, 90))
        )
    assert caught.value.reason == "no contrast"


def cohort(folder: Path, count: int = 9) -> pd.DataFrame:
    """Nine scans in scrambled order; numbers 2, 5 and 7 are broken."""
    shape = (26, 30, 28)
    rows = []
    for i in reversed(range(count)):
        values = np.random.default_rng(i).integers(1, 900, shape).astype(np.float32)
        if i == 7:
            values[3, 3, 3] = np.nan
        path = save(folder / f"scan{i}.nii.gz", values, affine_of("RAS", (4, 4, 4), shape, rotation(i, 0, 0)))
        if i == 2:
            path.write_bytes(path.read_bytes()[:-500])
        if i == 5:
            path.unlink()
        rows.append({"scan_id": f"sub-{i}", "subject_id": f"sub-{i}", "session_id": None, "path": str(path)})
    return pd.DataFrame(rows)


def test_shard_leaves_bad_scans_out_and_says_why(tmp_path: Path) -> None:
    table = preprocess_shard(cohort(tmp_path), config(), tmp_path / "shard.arrow")
    shards = Shards([tmp_path / "shard.arrow"])
    assert shards.column("scan_id") == [f"sub-{i}" for i in (0, 1, 3, 4, 6, 8)]
    assert list(table.columns) == list(QC_COLUMNS) and table["scan_id"].tolist() == [f"sub-{i}" for i in range(9)]
    left_out = table[table["status"] == "left out"].set_index("scan_id")["reason"].to_dict()
    assert left_out == {"sub-2": "truncated file", "sub-5": "missing file", "sub-7": "values not finite"}
    assert (table.loc[table["status"] == "ok", "percentile_high"] > 800).all()
    values = shards.tensors("image")
    assert values.min() == 0 and values.max() == 1
    image, _ = preprocess_image(tmp_path / "scan3.nii.gz", config())
    assert np.array_equal(values[2], image.astype(np.float16))


def test_a_grid_that_cuts_heads_off_is_told_with_the_worst(tmp_path: Path) -> None:
    table = preprocess_shard(cohort(tmp_path), config(), tmp_path / "shard.arrow")
    assert cut_off(table.assign(cut_off_share=0.01)) is None
    table["cut_off_share"] = [0.0, 0.02, np.nan, 0.3, 0.0, np.nan, 0.011, np.nan, 0.0]
    assert (cut_off(table) or "").startswith(
        "3 of 6 scans lose more than 1% of their foreground at the edge of the grid, sub-3 most (30%)"
    )


def test_workers_change_no_byte(tmp_path: Path) -> None:
    rows = cohort(tmp_path)
    serial = preprocess_shard(rows, config(), tmp_path / "serial.arrow", threads=1)
    parallel = preprocess_shard(rows.sample(frac=1, random_state=0), config(), tmp_path / "parallel.arrow", threads=2)
    assert (tmp_path / "serial.arrow").read_bytes() == (tmp_path / "parallel.arrow").read_bytes()
    pd.testing.assert_frame_equal(serial, parallel)


def test_a_scan_that_changed_since_the_cohort_was_read_is_left_out(tmp_path: Path) -> None:
    rows = cohort(tmp_path, 2).sort_values("scan_id", ignore_index=True)
    rows["sha256"] = [sha256_file(Path(path)) for path in rows["path"]]
    save(
        Path(rows["path"][1]),
        np.random.default_rng(9).integers(1, 900, (26, 30, 28)).astype(np.float32),
        np.diag([4.0, 4, 4, 1]),
    )
    table = preprocess_shard(rows, config(), tmp_path / "shard.arrow")
    assert table["status"].tolist() == ["ok", "left out"]
    assert table["reason"][1] == "changed since the cohort was read"
    assert "Restore it, or read the cohort again" in table["message"][1]
    assert Shards([tmp_path / "shard.arrow"]).column("scan_id") == ["sub-0"]


def test_a_mask_that_is_a_picture_gives_numbers_not_grey_levels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(50, 256, (32, 32))
    inside = np.zeros((32, 32), np.uint8)
    inside[8:20, 10:24] = 1
    indexed = PilImage.fromarray(inside).convert("P")
    indexed.putpalette([255, 255, 255, 0, 0, 0])  # drawn black on white
    indexed.save(tmp_path / "palette.png")
    path = picture(tmp_path / "a.png", pixels)
    image, _ = preprocess_image(path, config_2d(), tmp_path / "palette.png")
    assert np.array_equal(image[0] > 0, (inside > 0) & (pixels > pixels[inside > 0].min()))
    PilImage.fromarray(inside * 255).save(tmp_path / "mask.jpg")
    with pytest.raises(ScanError) as caught:
        preprocess_image(path, config_2d(), tmp_path / "mask.jpg")
    assert caught.value.reason == "lossy labels"


def test_mask_pattern(tmp_path: Path) -> None:
    rows = cohort(tmp_path, 2)
    for i in range(2):
        inside = np.zeros((26, 30, 28), np.uint8)
        inside[8:18, 8:18, 8:18] = 1
        save(
            tmp_path / f"sub-{i}_mask.nii.gz",
            inside,
            nib.Nifti1Image.from_filename(tmp_path / f"scan{i}.nii.gz").affine,
        )
    masked = config(brain_mask=str(tmp_path / "{subject_id}_mask.nii.gz"))
    preprocess_shard(rows, masked, tmp_path / "shard.arrow")
    assert (Shards([tmp_path / "shard.arrow"]).tensors("image") > 0).mean() < 0.08
    with pytest.raises(UserError, match=r"preprocess\.brain_mask.*'subject'.*session_id"):
        preprocess_shard(rows, config(brain_mask="{subject}_mask.nii.gz"), tmp_path / "other.arrow")
    assert not (tmp_path / "other.arrow").exists()


# ---------------------------------------------------------------------------------------------------- steps


def frozen(folder: Path, stage: str, **preprocess: Any) -> Path:
    sections = {"shape": [24, 32, 24], "spacing_mm": 4.0, **preprocess}
    raw = {
        "study": "test",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "year", "range": [0, 120]}},
        "plan": [{"name": "a", "subjects": 1}],
        "preprocess": sections,
    }
    return freeze(parse_study(raw, "test"), stage, folder)


def manifest_of(rows: pd.DataFrame, path: Path) -> Path:
    digests = [sha256_file(file) if (file := Path(name)).exists() else "0" * 64 for name in rows["path"]]
    rows.assign(sha256=digests, content_sha256=None, split="train", age=50.0).to_parquet(path, index=False)
    return path


def test_steps_share_the_scans_out_and_merge_the_tables(tmp_path: Path) -> None:
    rows = cohort(tmp_path)
    manifest = manifest_of(rows, tmp_path / "manifest.parquet")
    settings = frozen(tmp_path, "preprocess", shards=4)
    for shard in range(4):
        preprocess_step.run(settings, manifest, shard, tmp_path / f"s{shard}.arrow", tmp_path / f"s{shard}.parquet")
    assert sorted(Shards([tmp_path / f"s{s}.arrow" for s in range(4)]).column("scan_id")) == [
        f"sub-{i}" for i in (0, 1, 3, 4, 6, 8)
    ]
    assert Shards([tmp_path / "s0.arrow"]).column("scan_id") == [
        f"sub-{i}" for i in (0, 1, 3, 4, 6, 8) if shard_of(f"sub-{i}", 4) == 0
    ]
    tables = [tmp_path / f"s{s}.parquet" for s in (2, 0, 3, 1)]
    quality_step.run(frozen(tmp_path, "quality", max_failed_share=0.4), tables, tmp_path / "qc.parquet")
    merged = pd.read_parquet(tmp_path / "qc.parquet")
    assert merged["scan_id"].tolist() == [f"sub-{i}" for i in range(9)]

    with pytest.raises(UserError) as caught:
        quality_step.run(frozen(tmp_path, "quality", max_failed_share=0.3), tables, tmp_path / "none.parquet")
    message = str(caught.value)
    assert "3 of 9 scans (33.3%)" in message and "max_failed_share (30.0%)" in message
    assert "1 x truncated file: sub-2" in message and "ends early" in message
    assert not (tmp_path / "none.parquet").exists()


def test_empty_shard_is_valid(tmp_path: Path) -> None:
    rows = cohort(tmp_path, 2)
    empty = next(shard for shard in range(50) if shard not in {shard_of("sub-0", 50), shard_of("sub-1", 50)})
    preprocess_step.run(
        frozen(tmp_path, "preprocess", shards=50),
        manifest_of(rows, tmp_path / "manifest.parquet"),
        empty,
        tmp_path / "s.arrow",
        tmp_path / "s.parquet",
        threads=2,
    )
    assert len(Shards([tmp_path / "s.arrow"])) == 0
    table = pd.read_parquet(tmp_path / "s.parquet")
    assert len(table) == 0 and list(table.columns) == list(QC_COLUMNS)


def test_shard_number_must_exist(tmp_path: Path) -> None:
    manifest = manifest_of(cohort(tmp_path, 1), tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="numbered 0 to 1"):
        preprocess_step.run(
            frozen(tmp_path, "preprocess", shards=2), manifest, 2, tmp_path / "s.arrow", tmp_path / "s.parquet"
        )


def test_all_scans_bad(tmp_path: Path) -> None:
    rows = cohort(tmp_path).query("scan_id in ['sub-2', 'sub-5']")
    preprocess_shard(rows, config(), tmp_path / "s.arrow").to_parquet(tmp_path / "s.parquet", index=False)
    with pytest.raises(UserError, match="none of 2 scans could be used"):
        quality_step.run(
            frozen(tmp_path, "quality", max_failed_share=1.0), [tmp_path / "s.parquet"], tmp_path / "qc.parquet"
        )


# ------------------------------------------------------------------------------------------------ real data


def test_real_brains(tmp_path: Path) -> None:
    paths = sorted((DATA / "ixi").glob("sub-*/anat/*_T1w.nii.gz"))[:6]
    if not paths:
        pytest.skip(f"the IXI scans are not in {DATA} (set MEDDIFF_SHARED_DATA)")
    rows = pd.DataFrame({"scan_id": [p.name for p in paths], "path": [str(p) for p in paths]})
    table = preprocess_shard(rows, config(shape=(40, 48, 40), percentiles=(0, 99.5)), tmp_path / "s.arrow")
    assert (table["status"] == "ok").all() and (table["cut_off_share"] == 0).all()
    brains = Shards([tmp_path / "s.arrow"]).tensors("image")[:, 0]
    assert ((brains > 0.1).mean(axis=(1, 2, 3)) > 0.2).all() and ((brains > 0.1).mean(axis=(1, 2, 3)) < 0.6).all()
    assert (brains[:, [0, -1]] < 0.1).all(), "air left and right of every brain"
    # The cerebellum lies behind and below: the back of the lower third holds more brain than its front.
    lower = brains[..., :13] > 0.1
    assert (lower[:, :, :24].sum(axis=(1, 2, 3)) > lower[:, :, 24:].sum(axis=(1, 2, 3))).all()
