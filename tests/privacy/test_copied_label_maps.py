"""Copies of label maps, and shapes that are alike without being copies."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.privacy.label_maps import LabelMapDetector, RealLabelMaps, centred, copies, moved, vectors

SHAPE = (14, 14, 14)


def shapes(count: int, seed: int = 0) -> np.ndarray:
    """Label maps of an ellipsoid with a part cut off as a second structure, (count, *SHAPE)."""
    draw, axes, found = np.random.default_rng(seed), np.indices(SHAPE), []
    for _ in range(count):
        centre, radii = draw.uniform(5.5, 7.5, 3), draw.uniform(2.5, 5, 3)
        inside = sum(((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)) <= 1
        found.append(np.where(inside, np.where(axes[0] > centre[0] + draw.uniform(-1, 1), 2, 1), 0))
    return np.array(found, np.uint8)


@pytest.fixture(scope="module")
def detector() -> LabelMapDetector:
    return LabelMapDetector(vectors(shapes(20), 2), 2, mirrors=False)


def test_a_copy_is_found_wherever_it_was_moved(detector):
    training = shapes(20)
    for labels in (training[7], moved(training[7], np.array([2, -1, 1]))):
        similarity, nearest = detector.similarity(labels[None])
        assert similarity[0] == pytest.approx(1, abs=1e-5) and nearest[0] == 7


def test_other_people_are_less_alike_than_copies(detector):
    """A threshold that unseen people hold finds every copy, shifted and smoothed ones too."""
    limit = detector.similarity(shapes(60, seed=1))[0].max()
    assert 0.5 < limit < 0.97
    for labels in copies(shapes(20), 2, mirrors=False).values():
        assert (detector.similarity(labels)[0] > limit).mean() > 0.8


def test_mirrored_copies_are_found_and_planted_where_training_scans_were_mirrored(detector):
    mirrors = LabelMapDetector(vectors(shapes(20), 2), 2, mirrors=True)
    planted = copies(shapes(20), 2, mirrors=True)["label map, mirrored"]
    assert np.array_equal(planted, shapes(20)[:, ::-1])
    similarity, nearest = mirrors.similarity(planted)
    assert similarity == pytest.approx(1, abs=1e-5) and np.array_equal(nearest, np.arange(20))
    limit = mirrors.similarity(shapes(60, seed=1))[0].max()
    assert limit < 0.97 and (detector.similarity(planted)[0] > limit).mean() < 0.2, "not mirrored, hardly any is found"
    assert "label map, mirrored" not in copies(shapes(2), 2, mirrors=False)


def test_it_is_nearly_dice(detector):
    one, other = shapes(2, seed=5)
    a, b = centred(one), centred(other)
    overlap = sum(((a == n) & (b == n)).sum() for n in (1, 2))
    dice = 2 * overlap / ((a > 0).sum() + (b > 0).sum())
    found = LabelMapDetector(vectors(one[None], 2), 2, False).similarity(other[None])[0][0]
    assert found == pytest.approx(dice, abs=0.05)


def test_which_structure_a_voxel_belongs_to_counts():
    one = shapes(1)
    swapped = np.array([0, 2, 1], np.uint8)[one]
    assert LabelMapDetector(vectors(one, 2), 2, False).similarity(swapped)[0][0] < 0.1


def test_an_empty_map_is_like_nothing(detector):
    empty = np.zeros((1, *SHAPE), np.uint8)
    assert detector.similarity(empty)[0][0] == 0 and np.array_equal(centred(empty[0]), empty[0])


def test_label_maps_are_found_by_the_name_of_their_scan(tmp_path):
    maps = shapes(3)
    distances = TensorColumn("float16", (3, *SHAPE), "distances")
    columns = {"scan_id": pa.string(), "image": distances, "labels": TensorColumn("uint8", SHAPE)}
    with ShardWriter(tmp_path / "maps.arrow", columns) as writer:
        for name, labels in zip("abc", maps, strict=True):
            writer.append(scan_id=name, image=np.zeros((3, *SHAPE)), labels=labels)
    shards = Shards([tmp_path / "maps.arrow"])
    found = RealLabelMaps.of(shards, ["c", "a"])
    assert np.array_equal(found[np.array([0, 1])], maps[[2, 0]]) and found.structures == 2
    with pytest.raises(UserError, match="no label map of d, and of 1 scans in all"):
        RealLabelMaps.of(shards, ["a", "d"])
