"""Figures of masks whose values are known by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation import completion
from meddiff_steps.evaluation.segmentation import (
    BINS,
    as_probability,
    distances,
    figures,
    lesion_dice,
    like_readers,
    overlap,
)


def strip(*cells: int, length: int = 8, label: int = 1) -> np.ndarray:
    mask = np.zeros((2, length), np.int16)
    mask[0, list(cells)] = label
    return mask


def test_overlap_of_two_masks() -> None:
    found = overlap(strip(0, 1, 2, 3), strip(2, 3, 4, 5), (1.0, 1.0))
    assert found["dice_scan"] == 0.5
    assert [found[f"voxels_{name}"] for name in ("both", "marked", "true")] == [2, 4, 4]
    # Each has two voxels in the other, and two that are 1 and 2 away from it
    assert found["surface"] == pytest.approx(3 / 4)
    assert overlap(strip(0, 1), strip(0, 1), (1.0, 1.0))["surface"] == 0
    doubled = overlap(strip(0, 1, 2, 3), strip(2, 3, 4, 5), (2.0, 2.0))
    assert doubled["surface"] == pytest.approx(3 / 2)


def test_overlap_by_label_and_of_nothing() -> None:
    truth = strip(0, 1) + strip(4, 5, label=2)
    assert overlap(truth, strip(0, 1) + strip(4, label=2), (1.0, 1.0))["dice_scan"] == pytest.approx((1 + 2 / 3) / 2)
    assert overlap(truth, strip(0, 1, label=2), (1.0, 1.0))["voxels_both"] == 0  # the right place, the wrong label
    missed, diagonal = overlap(truth, strip(), (2.0, 1.0)), np.linalg.norm([2.0 * truth.shape[0], truth.shape[1]])
    assert missed["dice_scan"] == 0 and missed["surface"] == pytest.approx(diagonal)
    nothing = overlap(strip(), strip(3), (1.0, 1.0))
    assert np.isnan(nothing["dice_scan"]) and np.isnan(nothing["surface"])


def test_distances_of_masks() -> None:
    masks = np.stack([strip(), strip(0, 1), strip(1, 2, 3)])
    assert distances(masks, masks) == pytest.approx(np.array([[0, 1, 1], [1, 0, 0.75], [1, 0.75, 0]]))


def test_draws_that_are_as_readers_have_no_energy_distance() -> None:
    readers = np.stack([strip(0, 1), strip(0, 1), strip(0, 1, 2, 3), strip()])
    same = like_readers(readers, np.concatenate([readers[::-1], readers]))
    assert same["ged2"] == pytest.approx(0) and same["hm_iou"] == 1 and same["dice_max"] == 1
    assert same["diversity"] == pytest.approx(same["readers_diversity"]) and same["sensitivity"] == 1


def test_energy_distance_of_one_mask_for_two_readers() -> None:
    readers = np.stack([strip(0, 1), strip(0, 1, 2, 3)])  # 1 - IoU = 0.5: E d(Y, Y') = 0.25
    one = like_readers(readers, strip(0, 1)[None])
    assert one["ged2"] == pytest.approx(2 * 0.25 - 0 - 0.25) and one["diversity"] == 0
    assert one["sensitivity"] == 0.5 and one["dice_max"] == pytest.approx((1 + 2 / 3) / 2)
    both = like_readers(readers, np.stack([strip(0, 1), strip(0, 1, 2, 3)]))
    assert both["ged2"] == pytest.approx(0)


def test_maps_are_judged_as_probabilities() -> None:
    """Half of the voxels where 0.75 is foretold are marked, by two readers alike."""
    truth = np.stack([strip(0, 1)] * 2)
    shares = np.where(strip(0, 1, 2, 3), 0.75, 0.0)
    found = as_probability(truth, shares, np.ones_like(shares, bool))
    bins = np.array([found["bin_voxels"], found["bin_foretold"], found["bin_marked"]])
    assert bins.shape == (3, BINS) and bins[:, 7].tolist() == [8, 6, 4] and bins[0].sum() == 32
    assert found["brier"] == pytest.approx((4 * 0.25**2 + 4 * 0.75**2) / 32)
    # Wrong ones are among the eight unsure ones: above the 24 sure ones, level with the four right ones
    assert found["error_auc"] == pytest.approx((24 + 2) / 28)


def rows() -> pd.DataFrame:
    truths = {"a": strip(0, 1, 2, 3), "b": strip(0, 1), "c": strip()}
    table = []
    for subject, truth in truths.items():
        for name in ("1", "2"):
            mask = strip(0, 1)
            table.append(
                {"scan_id": subject + name, "subject_id": subject, "method": "m"}
                | overlap(truth, mask, (1.0, 1.0))
                | as_probability(truth[None], mask.astype(float), np.ones_like(mask, bool))
                | like_readers(truth[None], mask[None])
            )
    return pd.DataFrame(table)


def test_figures_are_over_subjects() -> None:
    (found,) = figures(rows(), resamples=200, seed="x")
    assert found["dice"]["value"] == pytest.approx((2 / 3 + 1) / 2, rel=1e-4) and found["dice"]["n"] == 3
    assert found["dice"]["low"] == pytest.approx(2 / 3, rel=1e-4) and found["dice"]["high"] == 1
    assert found["dice_scan"]["n"] == 2  # of c nothing can be found
    assert (found["false_alarms"]["value"], found["false_alarms"]["n"]) == (1, 1)
    # Of six scans two mark two voxels too few, and two mark two too many: at 0 and at 1
    assert found["ece"]["low"] <= found["ece"]["value"] <= found["ece"]["high"]
    assert found["ece"]["value"] == pytest.approx((4 + 4) / (6 * 16), rel=1e-4)
    assert {entry["voxels"] for entry in found["reliability"]} == {84, 12}


def test_the_interval_of_the_calibration_error_lies_about_its_value() -> None:
    middle = (np.arange(BINS) + 0.5) / BINS
    signs = np.tile(np.concatenate([np.ones(50), -np.ones(50)])[:, None], BINS)  # errors of scans that cancel in all
    errors = 0.01 + philox("test", "calibrated maps").permuted(signs, axis=0)
    table = [
        {"scan_id": str(i), "subject_id": str(i), "method": "m", "voxels_both": 1, "voxels_marked": 1, "voxels_true": 1}
        | {"bin_voxels": [20.0] * BINS, "bin_foretold": 20 * middle, "bin_marked": 20 * middle - errors[i]}
        for i in range(100)
    ]
    (found,) = figures(pd.DataFrame(table), resamples=300, seed="x")
    assert found["ece"]["value"] == pytest.approx(0.01 / 20)
    assert found["ece"]["low"] < found["ece"]["value"] < found["ece"]["high"]


def test_a_lesion_is_found_in_images_or_not() -> None:
    found = lesion_dice(strip(0, 1), [strip(0, 1) > 0, strip(1, 2, 3, 4) > 0])
    assert found == {"lesion_dice": pytest.approx((1 + 1 / 3) / 2), "lesion_excess": pytest.approx((0 + 1) / 2)}
    assert np.isnan(lesion_dice(strip(), [strip(1) > 0])["lesion_dice"])


def test_texture_is_the_strength_of_steps() -> None:
    truth = np.random.default_rng(0).random((1, 16, 16))
    region = np.zeros((16, 16), bool)
    region[2:10, 2:10] = True
    assert completion.texture(truth, truth, region) == 1
    assert completion.texture(truth, 0.5 * truth + 0.1, region) == pytest.approx(0.5)
    changed = np.where(region, truth, 0)  # what lies outside, and steps to it, do not count
    assert completion.texture(truth, changed, region) == 1
