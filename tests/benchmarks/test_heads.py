"""Whole heads out of a template, and poses measured by the middles of labelled structures."""

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation

from benchmarks.poses import middles, pose_error, wilson
from benchmarks.whole_heads import whole_heads
from meddiff_steps.imaging.reading import read_image
from meddiff_steps.imaging.skull import shows_skull, skull_facts

CENTRE = np.array([2.0, -18.0, 5.0])


def structures(count: int = 40) -> dict[int, np.ndarray]:
    random = np.random.default_rng(0)
    return {n: random.normal(0, 40, 3) + CENTRE for n in range(1, count + 1)}


def moved(atlas: dict[int, np.ndarray], degrees, mm, scale: float = 0.93) -> dict[int, np.ndarray]:
    """Where structures are found of a smaller brain that lies wrongly, each of them a little beside."""
    random, turn = np.random.default_rng(1), Rotation.from_euler("xyz", degrees, degrees=True)
    return {n: scale * turn.apply(at - CENTRE) + CENTRE + mm + random.normal(0, 1, 3) for n, at in atlas.items()}


@pytest.mark.parametrize(
    ("degrees", "mm"), [((0, 0, 0), (0, 0, 0)), ((6, -2, 3), (1, -4, 2)), ((30, 0, 0), (0, 20, 0))]
)
def test_what_is_left_of_a_pose_is_found(degrees, mm):
    atlas = structures()
    error = pose_error(moved(atlas, degrees, mm), atlas, CENTRE)
    angle = np.linalg.norm(Rotation.from_euler("xyz", degrees, degrees=True).as_rotvec(degrees=True))
    assert error.degrees == pytest.approx(angle, abs=1) and error.mm == pytest.approx(np.linalg.norm(mm) / 0.93, abs=1)
    assert 0.05 < error.angle_se < 1 and 0.05 < error.mm_se < 1


def test_swapped_sides_of_some_structures_do_not_count():
    atlas = structures()
    found = moved(atlas, (2, 1, 0), (1, 1, 0))
    for n in (1, 3, 5, 7):
        found[n], found[n + 1] = found[n + 1], found[n]
    error = pose_error(found, atlas, CENTRE)
    assert error.structures <= 33 and error.degrees == pytest.approx(2.2, abs=1)
    with pytest.raises(ValueError, match="11 structures"):
        pose_error({n: found[n] for n in range(1, 12)}, atlas, CENTRE)


def test_middles_are_in_millimetres(tmp_path):
    labels = np.zeros((10, 12, 14), np.uint8)
    labels[2:5, 3:6, 4:7], labels[7, 7, 7] = 5, 9
    affine = np.array([[-2.0, 0, 0, 30], [0, 2, 0, -10], [0, 0, 2, 1], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
    (found,) = middles(tmp_path / "labels.nii.gz").items()
    assert found[0] == 5 and np.allclose(found[1], [24, -2, 11])


def test_the_interval_of_a_share():
    assert wilson(180, 181) == pytest.approx((0.969, 0.999), abs=1e-3)


def test_heads_differ_and_have_skulls(tmp_path):
    place = np.moveaxis(np.indices((45, 55, 55)), 0, -1) * 4.0 - [88, 108, 108]
    far = np.sqrt(((place / [70, 90, 75]) ** 2).sum(-1))
    head = np.where(far < 0.8, 600.0, np.where(far < 0.9, 50, np.where(far < 1.05, 800, 0)))
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = -88, -128, -98
    nib.save(nib.Nifti1Image(head.astype(np.int16), affine), tmp_path / "template.nii.gz")
    for name in ("a", "b"):
        whole_heads(tmp_path / name, 2, tmp_path / "template.nii.gz", "one")
    table = pd.read_csv(tmp_path / "a/participants.tsv", sep="\t")
    assert list(table) == ["participant_id", "age", "sex", "head_ml", "scanner"] and table["head_ml"].nunique() == 2
    scans = [
        [read_image(file) for file in sorted((tmp_path / name).glob("sub-*/anat/*.nii.gz"))] for name in ("a", "b")
    ]
    for one, again in zip(*scans, strict=True):
        assert np.array_equal(one.array, again.array) and shows_skull(skull_facts(one, "nonzero"))
    assert len({tuple(np.round(scan.affine.ravel(), 3)) for scan in scans[0]}) > 1, "of several scanners"
