"""Masks and label maps on the head they are of, and beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from meddiff_steps.config import Preprocess
from meddiff_steps.imaging.masks import mask_on, misplaced
from meddiff_steps.imaging.preprocess import preprocess_scan, preprocess_shard
from meddiff_steps.imaging.reading import Image, ScanError
from meddiff_steps.imaging.resampling import majority

AFFINE = np.diag([4.0, 4, 4, 1])
SHAPE = (32, 36, 34)


def ball(radius: float, centre: tuple[float, float, float] = (15.5, 17.5, 16.5)) -> np.ndarray:
    distance = sum((g - c) ** 2 for g, c in zip(np.indices(SHAPE), centre, strict=True))
    return np.asarray(distance < radius**2)


def save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    values = np.where(ball(11), np.random.default_rng(0).integers(100, 300, SHAPE), 0)
    return save(tmp_path / "scan.nii.gz", values.astype(np.int16))


def config(**changes: Any) -> Preprocess:
    return Preprocess.model_validate({"shape": (32, 32, 32), "spacing_mm": 4.0, **changes})


def shifted(x: float, y: float = 0, z: float = 0) -> np.ndarray:
    affine = AFFINE.copy()
    affine[:3, 3] += (x, y, z)
    return affine


def test_a_mask_has_a_volume_and_lies_on_the_head(scan: Path, tmp_path: Path) -> None:
    mask = save(tmp_path / "mask.nii.gz", ball(9).astype(np.uint8))
    _, facts = preprocess_scan(scan, config(), mask)
    assert facts["mask_ml"] == pytest.approx(ball(9).sum() * 0.064) and facts["mask_on_head"] == 1
    _, facts = preprocess_scan(scan, config(), save(mask, ball(9).astype(np.uint8), shifted(28)))
    assert 0.5 < facts["mask_on_head"] < 0.9


@pytest.mark.parametrize("kind", ["brain_mask", "mask", "labels"])
@pytest.mark.parametrize("affine", [shifted(60), shifted(0, -60), np.diag([-4.0, 4, 4, 1]) @ shifted(-60)])
def test_what_is_far_off_the_head_leaves_the_scan_out(
    scan: Path, tmp_path: Path, kind: str, affine: np.ndarray
) -> None:
    other = save(tmp_path / "other.nii.gz", (3 * ball(10)).astype(np.uint8), affine)
    settings = config() if kind == "brain_mask" else config(channels={"x": {"path": "x", "kind": kind}})
    with pytest.raises(ScanError) as caught:
        if kind == "brain_mask":
            preprocess_scan(scan, settings, other)
        else:
            preprocess_scan(scan, settings, channels={"x": other})
    assert caught.value.reason.endswith(("lies beside the head", "lies elsewhere", "empty mask"))
    assert "other.nii.gz" in str(caught.value)


@pytest.mark.parametrize("tilt", [0.0, 1e-3])
def test_the_outer_half_of_a_masks_voxels_counts(tilt: float) -> None:
    finer = np.diag([0.5, 0.5, 0.5, 1.0])
    finer[:3, 3], finer[0, 1] = -0.24, tilt
    image = Image(np.ones((20, 20, 20), np.float32), finer)
    assert mask_on(Path("scan"), image, Image(np.ones((10, 10, 10), np.float32), np.eye(4)), Path("mask")).all()


def test_an_inverted_mask_is_beside_the_head(scan: Path, tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"% of .*mask\.nii\.gz lies on the head, expected at least 50%"):
        preprocess_scan(scan, config(), save(tmp_path / "mask.nii.gz", (~ball(10)).astype(np.uint8)))


def test_a_mask_of_everything_masks_nothing(scan: Path, tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"mask\.nii\.gz covers every voxel") as caught:
        preprocess_scan(scan, config(), save(tmp_path / "mask.nii.gz", np.ones(SHAPE, np.uint8)))
    assert caught.value.reason == "mask leaves nothing out"


def test_small_large_and_empty_label_maps_are_what_they_are(scan: Path, tmp_path: Path) -> None:
    """A lesion at the surface, the whole head around a brain, and no lesion at all."""
    settings = config(channels={"x": {"path": "x", "kind": "labels"}})
    for labels, expected in ((ball(1.2, (26, 17.5, 16.5)), 1.0), (ball(15), 1.0), (ball(0), None)):
        path = save(tmp_path / "x.nii.gz", labels.astype(np.uint8))
        assert preprocess_scan(scan, settings, channels={"x": path})[1]["channel_x_on_head"] == expected


def test_a_brain_mask_does_not_judge_labels_outside_of_it(scan: Path, tmp_path: Path) -> None:
    mask = save(tmp_path / "mask.nii.gz", ball(5).astype(np.uint8))
    labels = save(tmp_path / "x.nii.gz", (ball(11) & ~ball(8)).astype(np.uint8))
    settings = config(channels={"x": {"path": "x", "kind": "labels"}})
    assert preprocess_scan(scan, settings, mask, channels={"x": labels})[1]["channel_x_on_head"] == 1


def test_what_is_partly_off_and_masks_of_another_size_are_told(scan: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    rows = [{"scan_id": f"sub-{i}", "subject_id": f"sub-{i}", "path": str(scan)} for i in range(5)]
    for i in range(5):
        radius, affine = (4 if i == 2 else 9), shifted(28 if i == 3 else 0)
        save(tmp_path / f"m/sub-{i}.nii.gz", ball(radius).astype(np.uint8), affine)
    settings = config(brain_mask=str(tmp_path / "m/{subject_id}.nii.gz"))
    table = preprocess_shard(pd.DataFrame(rows), settings, tmp_path / "s.arrow")
    told = misplaced(table) or ""
    assert "mask_on_head: below 0.9 in 1 scans, least in sub-3" in told
    assert "mask_ml: 1 masks" in told and "sub-2 first" in told
    assert misplaced(table.drop(index=[2, 3])) is None
    assert misplaced(preprocess_shard(pd.DataFrame(rows), config(), tmp_path / "s.arrow")) is None


def test_an_optional_channel_that_was_not_fetched_is_not_taken_for_absent(scan: Path, tmp_path: Path) -> None:
    (tmp_path / "x.nii.gz").symlink_to("../.git/annex/objects/nowhere")
    settings = config(channels={"x": {"path": "x", "kind": "mask", "required": False}})
    with pytest.raises(Exception, match="datalad get"):
        preprocess_scan(scan, settings, channels={"x": tmp_path / "x.nii.gz"})


def test_a_mask_of_larger_voxels_stays_where_it_is() -> None:
    """2 mm on 1 mm, centres on centres: every other voxel lies in the middle between two of the mask."""
    scan_affine, mask_affine = (nib.affines.from_matvec(np.eye(3) * mm, [-32.0] * 3) for mm in (1, 2))
    place = (np.indices((33, 33, 33)) - 16.0) * 2
    mask = Image((np.linalg.norm(place, axis=0) < 20).astype(np.float32), mask_affine)
    scan = Image(np.zeros((65, 65, 65), np.float32), scan_affine)
    inside = mask_on(Path("scan"), scan, mask, Path("mask"))
    assert np.argwhere(inside).mean(axis=0) == pytest.approx([32, 32, 32], abs=0.02)
    assert inside.sum() == pytest.approx(8 * mask.array.sum(), rel=0.02)
    labels = majority(mask.array.astype(np.int16), np.linalg.inv(mask_affine) @ scan_affine, inside.shape)
    assert np.array_equal(labels > 0, inside)
