"""What is hidden of a scan, from a file, a box or a ball, and lesions that are put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from meddiff_steps.config import Hole, Lesions
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.places import ball_inside, hidden_voxels, lesion, mask_of_scan, mask_on_grid, with_lesion

SHAPE, SPACING = (12, 14, 10), (2.0, 2.0, 2.0)
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
SCAN = {"scan_id": "sub-1_T1w", "subject_id": "sub-1"}


def facts(**changes: Any) -> dict[str, Any]:
    rows = {"shape": json.dumps(SHAPE), "target_affine": json.dumps(AFFINE.ravel().tolist()), "picture_box": None}
    return rows | {"registration_matrix": json.dumps(np.eye(4).ravel().tolist())} | changes


def head() -> np.ndarray:
    inside = np.zeros(SHAPE, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    return inside


def hidden(**settings: Any) -> np.ndarray:
    return hidden_voxels(Hole(**settings), SCAN, facts(), head(), SPACING, np.random.default_rng(0))


def written(folder: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> str:
    nib.save(nib.Nifti1Image(values.astype(np.uint8), affine), folder / "sub-1_mask.nii.gz")
    return str(folder / "{subject_id}_mask.nii.gz")


def block() -> np.ndarray:
    values = np.zeros(SHAPE)
    values[3:6, 4:7, 2:5] = 3
    return values


def test_a_mask_on_the_scans_grid_hides_just_that(tmp_path: Path) -> None:
    np.testing.assert_array_equal(hidden(file=written(tmp_path, block())), block() > 0)


def test_a_mask_on_another_grid_hides_the_same_place(tmp_path: Path) -> None:
    fine = np.repeat(np.repeat(np.repeat(block(), 2, 0), 2, 1), 2, 2)[::-1]
    affine = np.diag([-1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = [-0.5 + fine.shape[0] - 1, -0.5, -0.5]
    np.testing.assert_array_equal(hidden(file=written(tmp_path, fine, affine)), block() > 0)


def test_labels_are_chosen_and_grown(tmp_path: Path) -> None:
    values = block()
    values[8, 8, 6] = 7
    pattern = written(tmp_path, values)
    found = hidden(file=pattern, labels=[7])
    assert found.sum() == 1 and found[8, 8, 6]
    assert hidden(file=pattern, labels=[7], grow_mm=2).sum() == 7
    with pytest.raises(UserError, match=r"has no label 9, only \[3, 7\]"):
        hidden(file=pattern, labels=[9])


def test_masks_that_hide_nothing_or_everything_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the mask is empty"):
        hidden(file=written(tmp_path, 0 * block()))
    away = AFFINE.copy()
    away[:3, 3] = 500
    with pytest.raises(UserError, match="covers no voxel of the study's grid"):
        hidden(file=written(tmp_path, block(), away))
    with pytest.raises(UserError, match="hides every voxel of the grid"):
        hidden(file=written(tmp_path, np.ones(SHAPE)))
    with pytest.raises(UserError, match="sub-1_mask"):
        hidden(file=str(tmp_path / "none" / "{subject_id}_mask.nii.gz"))
    with pytest.raises(UserError, match="inpainting.hole.file.*cannot be filled in"):
        hidden(file=str(tmp_path / "{who}.nii.gz"))


def test_a_picture_wants_a_mask_of_its_size(tmp_path: Path) -> None:
    row = facts(shape="[20, 16]", picture_box="[0, 0, 20, 16]")
    values = np.zeros((20, 16), np.uint8)
    values[4:8, 6:10] = 255
    from PIL import Image

    Image.fromarray(values).save(tmp_path / "sub-1.png")
    settings = Hole(file=str(tmp_path / "{subject_id}.png"))
    found = hidden_voxels(settings, SCAN, row, np.ones((10, 8), bool), (1.0, 1.0), np.random.default_rng(0))
    expected = np.zeros((10, 8), bool)
    expected[2:4, 3:5] = True
    assert found[expected].all() and found.sum() <= 16
    Image.fromarray(values[:10]).save(tmp_path / "sub-1.png")
    with pytest.raises(UserError, match="a mask of 10x16 pixels, expected 20x16"):
        hidden_voxels(settings, SCAN, row, np.ones((10, 8), bool), (1.0, 1.0), np.random.default_rng(0))


def test_a_box_and_a_ball() -> None:
    found = hidden(box=[(1, 3), (2, 4), (0, 5)])
    assert found.sum() == 2 * 2 * 5 and found[1, 2, 0]
    ball = hidden(ball_mm=8)
    assert (ball & head()).sum() == ball.sum() == 33  # the ball of radius 2 voxels
    np.testing.assert_array_equal(ball, hidden(ball_mm=8))
    large = ball_inside(head(), 1000, SPACING, np.random.default_rng(0))
    np.testing.assert_array_equal(large, head())


def test_lesions_lie_in_the_templates_space_and_in_the_head(tmp_path: Path) -> None:
    written(tmp_path, block())
    settings = Lesions(masks=str(tmp_path / "*_mask.nii.gz"))
    moved = np.eye(4)
    moved[:3, 3] = [4, 0, 0]  # the scan lies 2 voxels further than the template
    grid = moved @ AFFINE
    row = facts(target_affine=json.dumps(grid.ravel().tolist()), registration_matrix=json.dumps(moved.ravel().tolist()))
    share = lesion(settings, 0, row, head(), SPACING, np.random.default_rng(0), "inpainting")
    np.testing.assert_allclose(share, (block() > 0) & head())
    image = np.full(SHAPE, 0.6, np.float32)
    np.testing.assert_allclose(with_lesion(image, share, -0.3), 0.6 - 0.3 * share, atol=1e-6)
    with pytest.raises(UserError, match=r"inpainting.lesions.masks: .* is no file"):
        lesion(Lesions(masks=str(tmp_path / "no*")), 0, row, head(), SPACING, np.random.default_rng(0), "inpainting")
    ball = lesion(Lesions(diameter_mm=8), 0, row, head(), SPACING, np.random.default_rng(0), "inpainting")
    assert set(np.unique(ball)) == {0, 1} and not ball[~head()].any()


def test_a_mask_of_the_scan_itself_may_be_empty_and_lies_on_its_grid(tmp_path: Path) -> None:
    row = facts(scan_affine=json.dumps(AFFINE.ravel().tolist()))
    pattern = written(tmp_path, block())
    np.testing.assert_array_equal(mask_of_scan(pattern, SCAN, row, "a.masks"), block() > 0)
    np.testing.assert_allclose(mask_on_grid(pattern, SCAN, row, SHAPE, "a.masks"), block() > 0, atol=1e-6)
    assert not mask_of_scan(written(tmp_path, 0 * block()), SCAN, row, "a.masks").any()
    with pytest.raises(UserError, match=r"a mask of 12x14x9 voxels, expected 12x14x10, as sub-1_T1w has \(a.masks\)"):
        mask_of_scan(written(tmp_path, block()[..., 1:]), SCAN, row, "a.masks")
    moved = AFFINE.copy()
    moved[0, 3] = 1.0
    with pytest.raises(UserError, match=r"lies elsewhere than sub-1_T1w: its affine is another \(a.masks\)"):
        mask_of_scan(written(tmp_path, block(), moved), SCAN, row, "a.masks")
