"""The segmentation study on pairs whose answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from meddiff_steps.config import PairsOptimiser, SegmentationStudy
from meddiff_steps.downstream import segmentation
from meddiff_steps.downstream.segmentation import Arm, arms, cases, commonest, compare, contrasts, draw_batch, measure

SHAPE = (16, 16)
SETTINGS = SegmentationStudy(
    shares=[0.2, 1.0],
    seeds=2,
    channels=[8, 16],
    max_shift_voxels=1,
    bootstrap=200,
    optimiser=PairsOptimiser(steps=60, batch_size=8, learning_rate=0.01, warmup_steps=5, ema_decay=0.9),
)


def pairs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Discs of two grey levels, which are what the labels say, on a noisy ground."""
    draw, axes = np.random.default_rng(seed), np.indices(SHAPE)
    images, labels = draw.uniform(0, 0.2, (count, 1, *SHAPE)), np.zeros((count, *SHAPE), np.uint8)
    for i in range(count):
        for number, (level, low, high) in enumerate(((0.9, 3, 5), (0.5, 10, 13)), start=1):
            centre, radius = draw.uniform((low, 4), (high, 12)), draw.uniform(2, 3.4)
            inside = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) <= radius**2
            images[i, 0][inside], labels[i][inside] = level, number
    return images.astype(np.float32), labels


REAL, MADE, TEST = pairs(20, 0), pairs(30, 1), pairs(12, 2)


def reader(made: tuple[np.ndarray, np.ndarray]) -> segmentation.Reader:
    images, labels = (np.concatenate(parts) for parts in zip(REAL, made, strict=True))
    return lambda rows: (images[rows], labels[rows])


def study(made: tuple[np.ndarray, np.ndarray], few: int = 1) -> dict:
    """With real pairs of which the smaller arm has `few`."""
    compared = arms(SETTINGS, [f"s{i}" for i in range(20)], 20 + np.arange(30), "root")
    compared = [Arm(a.name, a.real[:few] if a.name.endswith("_20") else a.real, a.synthetic) for a in compared]
    table = segmentation.run_study(SETTINGS, compared, reader(made), TEST, ["a", "b"], (1, 1), "root", "cpu", 1)
    blind = np.broadcast_to(commonest(REAL[1], 2), TEST[1].shape)
    table = pd.concat([table, cases("commonest_label", 0, blind, TEST[1], ["a", "b"], (1, 1))], ignore_index=True)
    return compare(table, SETTINGS, [f"t{i}" for i in range(12)], "root")


def dice(found: dict) -> dict[str, float]:
    return {arm["name"]: arm["dice"]["value"] for arm in found["arms"]}


@pytest.fixture(scope="module")
def good() -> dict:
    return study(MADE)


def test_pairs_that_are_as_good_as_real_ones_help_who_has_one(good):
    figures = dice(good)
    assert good["verdict"] == "helps" and good["primary"]["difference"]["low"] > 0
    assert "scans that they were not given" in good["verdict_text"]
    assert figures["both_20"] > figures["real_20"] + 0.05 and figures["synthetic"] > 0.8
    assert figures["commonest_label"] < figures["real_100"]


def test_pairs_whose_label_maps_are_swapped_harm():
    """The same images and shapes: what is wrong is which label is which."""
    swapped = (MADE[0], np.array([0, 2, 1], np.uint8)[MADE[1]])
    found = study(swapped, few=4)
    assert found["verdict"] == "harms" and dice(found)["synthetic"] < 0.2
    assert found["primary"]["contrast"]["non_inferior"] is False


def test_distances_and_dice_tell_the_same_order(good):
    distance = {arm["name"]: arm["surface_distance_mm"]["value"] for arm in good["arms"]}
    assert distance["both_20"] < distance["real_20"]
    difference = good["differences"][0]
    assert (difference["arm"], difference["reference"]) == contrasts(SETTINGS)[0] == ("both_20", "real_20")
    assert difference["surface_distance_mm"]["high"] < 0 < difference["dice"]["low"]


def test_a_study_gives_the_same_figures_whatever_the_number_of_workers():
    small = SETTINGS.model_copy(update={"optimiser": SETTINGS.optimiser.model_copy(update={"steps": 2})})
    compared = arms(small, [f"s{i}" for i in range(20)], 20 + np.arange(30), "root")[:2]
    tables = [
        segmentation.run_study(small, compared, reader(MADE), TEST, ["a", "b"], (1, 1), "root", "cpu", workers)
        for workers in (1, 3)
    ]
    pd.testing.assert_frame_equal(*tables)


def test_measures_of_shapes_that_are_known():
    truth, made = np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8), np.uint8)
    truth[0, 2:6, 2:6] = 1
    made[0, 2:6, 3:7] = 1  # moved by one
    truth[1, 2:6, 2:6] = 1  # missed
    found = measure(made, truth, 2, (2.0, 2.0))
    assert found["dice"][0, 0] == pytest.approx(0.75) and found["dice"][1, 0] == 0
    assert 0 < found["surface_distance_mm"][0, 0] < 2  # at most the shift, in mm
    assert found["surface_distance_mm"][1, 0] == pytest.approx(16 * 2**0.5)
    assert np.isnan(found["dice"][:, 1]).all()  # no scan has the second structure
    assert len(cases("x", 0, made, truth, ["a", "b"], (2.0, 2.0))) == 2
    perfect = measure(truth, truth, 1, (1.0, 1.0))
    assert (perfect["dice"] == 1).all() and (perfect["surface_distance_mm"] == 0).all()


def test_smaller_shares_are_parts_of_larger_ones_and_whole_subjects():
    whose = [f"s{i // 2}" for i in range(20)]
    found = {arm.name: arm for arm in arms(SETTINGS, whose, np.arange(20, 30), "root")}
    assert list(found) == ["real_20", "both_20", "real_100", "both_100", "synthetic"]
    assert len(found["real_20"].real) == 4 and set(found["real_20"].real) < set(found["real_100"].real)
    subjects = {whose[row] for row in found["real_20"].real}
    assert len(subjects) == 2 and len(found["real_100"].real) == 20
    assert not len(found["real_20"].synthetic) and not len(found["synthetic"].real)


def test_batches_hold_real_and_synthetic_pairs_by_chance():
    arm = Arm("both", np.arange(4), np.arange(10, 40))
    rows = np.concatenate([draw_batch(arm, SETTINGS, "root", 0, step) for step in range(200)])
    assert abs((rows >= 10).mean() - SETTINGS.synthetic) < 0.05 and set(rows) == {*range(4), *range(10, 40)}
    alone = Arm("real", np.arange(4), np.arange(0))
    assert set(draw_batch(alone, SETTINGS, "root", 0, 0)) == set(range(4))
    assert not np.array_equal(*(draw_batch(arm, SETTINGS, "root", seed, 0) for seed in (0, 1)))


def test_the_network_keeps_the_grid():
    network = segmentation.SegmentationNetwork(3, 3, [8, 16])
    assert network(torch.zeros(1, 1, 8, 12, 8)).shape == (1, 3, 8, 12, 8)
