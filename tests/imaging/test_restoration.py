"""The way back to a scan's own grid: exact where nothing was interpolated, close where something was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from PIL import Image as PilImage
from test_preprocess import (
    DATA,
    SCANS,
    affine_of,
    config,
    config_2d,
    picture,
    rotation,
    save,
    scan,
    world,
)

from meddiff_steps.config import Preprocess
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.preprocess import preprocess_image, preprocess_scan
from meddiff_steps.imaging.restoration import restore, restore_difference, restore_numbers


def smooth(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A landscape of 60 mm waves, and a slope along each axis: no symmetry that would hide a mirroring."""
    x, y, z = np.moveaxis(world(affine, shape), -1, 0)
    waves = np.sin(x / 10 + 1) + np.cos(y / 12 - z / 14)
    return (500 + 100 * waves + 2 * x + 1.5 * y - z).astype(np.float32)


def inner(
    affine: np.ndarray, shape: tuple[int, ...], facts: dict[str, Any], grid: tuple[int, ...], margin: float
) -> Any:
    """Voxels of a scan that lie in the grid, `margin` of its voxels away from its faces."""
    target = np.array(json.loads(facts["target_affine"])).reshape(4, 4)
    index = nib.affines.apply_affine(np.linalg.inv(target), world(affine, shape))
    return ((index >= margin - 0.5) & (index <= np.array(grid) - 0.5 - margin)).all(axis=-1)


def read_back(path: Path, array: np.ndarray, affine: np.ndarray | None) -> nib.Nifti1Image:
    nib.save(nib.Nifti1Image(array, affine), path)
    return nib.Nifti1Image.from_filename(path)


# -------------------------------------------------------------------------------------------------- volumes


@pytest.mark.parametrize("spacing", [4.0, 2.0], ids=["grid of 4 mm", "grid of 2 mm"])
@pytest.mark.parametrize("name", SCANS)
def test_a_smooth_scan_comes_back(tmp_path: Path, name: str, spacing: float) -> None:
    """Any orientation, spacing and tilt; the grid is smaller than some scans and larger than others along some axes."""
    codes, voxel, shape, turn = SCANS[name]
    affine = affine_of(codes, voxel, shape, turn)
    values = smooth(affine, shape)
    path = save(tmp_path / "scan.nii.gz", values, affine)
    grid = config(foreground="all", spacing_mm=spacing)
    image, facts = preprocess_image(path, grid)
    restored, found = restore(image, facts)
    original = nib.Nifti1Image.from_filename(path)
    assert restored.shape == shape and restored.dtype == np.float32
    assert found is not None and np.array_equal(found, original.affine)
    saved = read_back(tmp_path / "restored.nii.gz", restored, found)
    assert np.array_equal(saved.affine, original.affine)
    assert nib.orientations.aff2axcodes(saved.affine) == tuple(codes)
    assert np.allclose(saved.header.get_zooms(), original.header.get_zooms())

    at = inner(affine, shape, facts, grid.shape, 2)
    off = np.abs(restored - values)[at] / np.ptp(values)
    assert at.any() and off.max() < 0.04 and off.mean() < 0.008
    beyond = ~inner(affine, shape, facts, grid.shape, -0.01)
    assert (restored[beyond] == np.float32(facts["percentile_low"])).all()
    edge = inner(affine, shape, facts, grid.shape, 0.1)
    assert (np.abs(restored - values)[edge] / np.ptp(values)).max() < 0.12, (
        "padding does not darken the edge of the scan"
    )


@pytest.mark.parametrize("codes", ["RAS", "LAS", "PSR"])
@pytest.mark.parametrize("shape", [(30, 41, 37), (20, 33, 28), (11, 12, 13)], ids=["cropped", "both", "padded"])
def test_where_the_grid_snaps_nothing_but_half_precision_is_lost(
    tmp_path: Path, codes: str, shape: tuple[int, int, int]
) -> None:
    affine = affine_of(codes, (4, 4, 4), shape)
    values = scan(shape)
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, affine), config())
    low, high = (np.float32(facts[f"percentile_{end}"]) for end in ("low", "high"))
    shares = np.clip((values.astype(np.float32) - low) / (high - low), 0, 1).astype(np.float16)
    at = inner(affine, shape, facts, config().shape, 0.1)
    restored, _ = restore(image.astype(np.float16), facts)
    assert at.any() and np.array_equal(restored[at], (low + shares.astype(np.float32) * (high - low))[at])
    assert (restored[~at] == low).all()
    numbers = np.arange(np.prod(config().shape), dtype=np.int32).reshape(config().shape)
    back, _ = restore(numbers, facts, kind="labels")
    position = nib.affines.apply_affine(
        np.linalg.inv(np.array(json.loads(facts["target_affine"])).reshape(4, 4)), world(affine, shape)
    )
    index = np.rint(position).astype(int)[at]
    assert np.array_equal(back[at], numbers[tuple(index.T)]) and not back[~at].any()


def test_a_header_that_is_nearly_aligned_snaps_both_ways(tmp_path: Path) -> None:
    shape = (30, 33, 31)
    affine = affine_of("LAS", (4, 4, 4), shape, rotation(0.01, 0.01, -0.01))
    values = scan(shape)
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, affine), config())
    restored, found = restore(image, facts)
    kept = inner(affine, shape, facts, config().shape, 0.1)
    assert np.allclose(restored[kept], values[kept], atol=1e-3)
    assert np.array_equal(found, nib.Nifti1Image.from_filename(tmp_path / "scan.nii.gz").affine)


def test_negative_grey_levels_come_back(tmp_path: Path) -> None:
    """z-scores in a masked brain: the background, darkest in the study's grid, comes back as the darkest level."""
    shape = (24, 32, 28)
    affine = affine_of("RAS", (4, 4, 4), shape)
    values = np.zeros(shape, np.float32)
    values[4:20, 4:28, 4:24] = np.random.default_rng(2).normal(0, 1, (16, 24, 20))
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, affine), config(percentiles=(1, 99)))
    restored, _ = restore(image, facts)
    low, high = facts["percentile_low"], facts["percentile_high"]
    brain = values != 0
    assert low < 0 and np.allclose(restored[brain], np.clip(values, low, high)[brain], atol=1e-5)
    assert np.allclose(restored[~brain], low)


@pytest.mark.parametrize("name", ["oblique ASL, anisotropic", "thick slices RAI, 1.5 x 1.5 x 6 mm", "LPI 4 mm"])
def test_labels_stay_labels_and_return_to_their_places(tmp_path: Path, name: str) -> None:
    codes, voxel, shape, turn = SCANS[name]
    affine = affine_of(codes, voxel, shape, turn)
    x, y, z = np.moveaxis(world(affine, shape), -1, 0)
    labels = np.where(np.hypot(np.hypot(x - 10, y + 20), z - 30) < 35, np.where(x > 10, 5, 300), 0)
    path = save(tmp_path / "scan.nii.gz", smooth(affine, shape), affine)
    file = save(tmp_path / "labels.nii.gz", labels.astype(np.int16), affine)
    grid = config(shape=(32, 32, 32), channels={"parts": {"path": str(file), "kind": "labels"}}, foreground="all")
    arrays, facts = preprocess_scan(path, grid, channels={"parts": file})
    back, found = restore(arrays["parts"], facts, kind="labels")
    assert back.dtype == np.int16 and back.shape == shape and set(np.unique(back)) == {0, 5, 300}
    assert np.array_equal(found, nib.Nifti1Image.from_filename(path).affine)
    for label in (5, 300):
        overlap = 2 * ((back == label) & (labels == label)).sum() / ((back == label).sum() + (labels == label).sum())
        assert overlap > 0.92
    mask, _ = restore(arrays["parts"] == 5, facts, kind="mask")
    assert mask.dtype == bool and np.array_equal(mask, back == 5)


@pytest.mark.parametrize(
    ("spacing", "side", "least"), [(2, 33, 0.97), (2, 32, 0.97), (4, 17, 0.92), (4, 16, 0.92), (3, 23, 0.95)]
)
def test_labels_come_back_without_a_shift(tmp_path: Path, spacing: float, side: int, least: float) -> None:
    """A ball about the middle of an odd number of voxels: many lie in the middle between voxels of the grid."""
    affine = nib.affines.from_matvec(np.eye(3), [-32.0] * 3)
    offsets = world(affine, (65, 65, 65))
    ball = np.linalg.norm(offsets, axis=-1) < 20
    path = save(tmp_path / "scan.nii.gz", np.where(ball, 300 + offsets[..., 0], 0).astype(np.int16), affine)
    file = save(tmp_path / "labels.nii.gz", ball.astype(np.int16), affine)
    grid = config(shape=(side,) * 3, spacing_mm=spacing, channels={"ball": {"path": str(file), "kind": "labels"}})
    arrays, facts = preprocess_scan(path, grid, channels={"ball": file})
    back, _ = restore(arrays["ball"], facts, kind="labels")
    assert offsets[back == 1].mean(axis=0) == pytest.approx(np.zeros(3), abs=0.03)
    assert 2 * (ball & (back == 1)).sum() / (ball.sum() + (back == 1).sum()) > least
    if spacing == 2:
        assert back.sum() == pytest.approx(ball.sum(), rel=0.02), "neither grown nor shrunk"


def test_numbers_have_no_scale(tmp_path: Path) -> None:
    shape = (20, 33, 40)
    affine = affine_of("LAS", (4, 4, 4), shape)
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", 500 + scan(shape), affine), config())
    found, back = restore_numbers(7.0 * image, facts)
    grey, expected = restore(image, facts)
    low, high = facts["percentile_low"], facts["percentile_high"]
    np.testing.assert_allclose(found, 7.0 * (grey - low) / (high - low), atol=1e-3)
    np.testing.assert_array_equal(back, expected)


def test_differences_have_a_scale_and_no_offset(tmp_path: Path) -> None:
    shape = (20, 33, 40)
    affine = affine_of("LAS", (4, 4, 4), shape)
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", 500 + scan(shape), affine), config())
    changed = np.clip(image + np.random.default_rng(0).normal(0, 0.2, image.shape), 0, 1).astype(np.float32)
    difference, found = restore_difference(changed - image, facts)
    before, _ = restore(image, facts)
    after, _ = restore(changed, facts)
    assert np.allclose(difference, after - before, atol=1e-2) and np.array_equal(found, restore(image, facts)[1])
    assert difference.min() < -100 and not difference[:, :, 0].any(), "beyond the grid nothing differs"


def test_a_contrast_has_its_own_grey_values(tmp_path: Path) -> None:
    shape = (24, 32, 28)
    affine = affine_of("PSR", (4, 4, 4), shape)
    first, second = scan(shape), (5000 - scan(shape)).astype(np.int16)
    path, file = save(tmp_path / "t1.nii.gz", first, affine), save(tmp_path / "t2.nii.gz", second, affine)
    study = config(channels={"t2": {"path": str(file)}})
    arrays, facts = preprocess_scan(path, study, channels={"t2": file})
    row = pd.DataFrame([facts]).iloc[0]
    kept = inner(affine, shape, facts, study.shape, 0.1)
    restored, _ = restore(arrays["t2"], row, channel="t2")
    assert np.allclose(restored[kept], second[kept], atol=2)
    difference, _ = restore_difference(arrays["t2"], row, channel="t2")
    assert np.allclose((restored - difference)[kept], facts["channel_t2_percentile_low"], atol=1e-2)
    with pytest.raises(UserError, match="contrast flair.*channel_flair_percentile_low"):
        restore(arrays["t2"], row, channel="flair")


@pytest.mark.parametrize("order", [0, 3])
@pytest.mark.parametrize("turn", [None, rotation(25, 10, -15)], ids=["aligned", "oblique"])
def test_other_orders(tmp_path: Path, turn: np.ndarray | None, order: int) -> None:
    shape = (40, 44, 42)
    affine = affine_of("LAS", (2.5, 2.5, 2.5), shape, turn)
    values = smooth(affine, shape)
    image, facts = preprocess_image(save(tmp_path / "scan.nii.gz", values, affine), config(foreground="all"))
    at = inner(affine, shape, facts, config().shape, 2)
    errors = {n: np.abs(restore(image, facts, order=n)[0] - values)[at].mean() for n in (0, 1, order)}
    assert errors[3] < errors[1] if order == 3 else errors[1] < errors[0]
    restored, _ = restore(image, facts, order=order)
    low, high = facts["percentile_low"], facts["percentile_high"]
    assert low - 1e-2 <= restored.min() and restored.max() <= high + 1e-2


# ------------------------------------------------------------------------------------------------- pictures


def smooth_picture(size: tuple[int, int]) -> np.ndarray:
    rows, columns = np.indices(size) / max(size)
    return 130 + 60 * np.sin(5 * rows + 1) + 50 * np.cos(6 * columns) - 20 * rows


@pytest.mark.parametrize("size", [(128, 96), (40, 100), (20, 50), (33, 32)])
@pytest.mark.parametrize("center", ["image", "foreground"])
def test_a_smooth_picture_comes_back(tmp_path: Path, size: tuple[int, int], center: str) -> None:
    values = smooth_picture(size)
    values[:, : size[1] // 4] = 0
    grid: Preprocess = config_2d(center=center, foreground="nonzero")
    image, facts = preprocess_image(picture(tmp_path / "a.png", values), grid)
    restored, affine = restore(image, facts)
    assert affine is None and restored.shape == size and restored.dtype == np.float32
    top, left, bottom, right = json.loads(facts["picture_box"])
    rows, columns = np.indices(size)
    step = (bottom - top) / 32
    at = (rows > top + step) & (rows < bottom - step - 1) & (columns > left + step) & (columns < right - step - 1)
    at &= columns > size[1] // 4 + 2 * max(step, 1)
    exact = np.asarray(PilImage.open(tmp_path / "a.png"), dtype=np.float32)
    assert at.any() and np.abs(restored - exact)[at].max() < 5, "of a range of about 200"
    beyond = (rows + 1 <= top) | (rows >= bottom) | (columns + 1 <= left) | (columns >= right)
    assert (restored[beyond] == np.float32(facts["percentile_low"])).all()


def test_a_picture_that_was_cropped_alone_comes_back_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (32, 45))
    image, facts = preprocess_image(picture(tmp_path / "a.png", pixels), config_2d())
    top, left, bottom, right = (int(edge) for edge in json.loads(facts["picture_box"]))
    assert (bottom - top, right - left) == (32, 32)
    restored, _ = restore(image, facts)
    assert np.allclose(restored[:, left:right], pixels[:, left:right], atol=1e-4)
    assert (restored[:, :left] == facts["percentile_low"]).all() and (
        restored[:, right:] == facts["percentile_low"]
    ).all()
    labels, _ = restore(np.arange(1024).reshape(32, 32), facts, kind="labels")
    assert np.array_equal(labels[:, left:right], np.arange(1024).reshape(32, 32)) and not labels[:, right:].any()


# --------------------------------------------------------------------------------------------------- errors


def test_what_cannot_be_restored_is_said(tmp_path: Path) -> None:
    shape = (24, 32, 28)
    image, facts = preprocess_image(
        save(tmp_path / "scan.nii.gz", scan(shape), affine_of("RAS", (4, 4, 4), shape)), config()
    )
    facts["scan_id"] = "sub-1"
    with pytest.raises(UserError, match=r"sub-1.*shape \(24, 32\), expected 3 axes"):
        restore(image[0, :, :, 0], facts)
    with pytest.raises(UserError, match="labels of type float32"):
        restore(image, facts, kind="labels")
    with pytest.raises(UserError, match=r"left out by preprocessing \(truncated file\)"):
        restore(image, {**facts, "status": "left out", "reason": "truncated file"})
    with pytest.raises(UserError, match=r"no scan_affine.*qc\.parquet again"):
        restore(image, pd.Series({**facts, "scan_affine": None}))


# ------------------------------------------------------------------------------------------------ real data


def test_a_real_brain_and_its_labels_come_back(tmp_path: Path) -> None:
    path = DATA / "ixi/sub-IXI012/anat/sub-IXI012_T1w.nii.gz"
    file = DATA / "ixi/derivatives/dlmuse/sub-IXI012/anat/sub-IXI012_dseg.nii.gz"
    if not (path.exists() and file.exists()):
        pytest.skip(f"the IXI scans and label maps are not in {DATA} (set MEDDIFF_SHARED_DATA)")
    original, labels = nib.Nifti1Image.from_filename(path), nib.Nifti1Image.from_filename(file)
    values, structures = np.asarray(original.dataobj), np.asarray(labels.dataobj)
    for spacing, shape, overlap in ((2.0, (80, 96, 80), 1.0), (4.0, (40, 48, 40), 0.6)):
        study = config(shape=shape, spacing_mm=spacing, channels={"dlmuse": {"path": str(file), "kind": "labels"}})
        arrays, facts = preprocess_scan(path, study, channels={"dlmuse": file})
        restored, affine = restore(arrays["image"].astype(np.float16), facts)
        back, _ = restore(arrays["dlmuse"], facts, kind="labels")
        assert np.array_equal(affine, original.affine) and restored.shape == values.shape
        assert arrays["dlmuse"].dtype == np.int16 and set(np.unique(back)) <= set(np.unique(structures))
        if spacing == 2:
            low = facts["percentile_low"]
            assert np.abs(restored - np.maximum(values, low)).max() < 0.1 and np.array_equal(back, structures)
        assert np.corrcoef(restored.ravel(), values.ravel())[0, 1] > 0.94
        inside = structures > 0
        assert (back == structures)[inside].mean() >= overlap
