"""Figures of registrations that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.evaluation import registration


def maps() -> tuple[np.ndarray, np.ndarray]:
    first, second = np.zeros((4, 4, 4), np.int32), np.zeros((4, 4, 4), np.int32)
    first[0], second[0, :2] = 5, 5  # 16 voxels, and 8 of these
    first[1], second[1] = 9, 9
    first[2, 0], second[3, 0] = 11, 11
    return first, second


def test_overlap_is_that_of_structures_and_of_all_labels() -> None:
    first, second = maps()
    found = registration.overlap(first, second, {"joint": [5, 9], "apart": [11], "nowhere": [4]})
    assert found == pytest.approx(
        {
            "dice": (2 * 24 / 56 + 0) / 2,
            "dice_all": (2 * 8 / 24 + 1 + 0) / 3,
            "dice_joint": 2 * 24 / 56,
            "dice_apart": 0.0,
        }
    )
    assert registration.dice_by_label(first, first) == {5: 1.0, 9: 1.0, 11: 1.0}


def test_distance_is_in_mm() -> None:
    known = np.zeros((3, 4, 4, 4))
    found = known + np.array([3.0, 0.0, 2.0])[:, None, None, None]
    region = np.zeros((4, 4, 4), bool)
    region[1:3] = True
    found[:, ~region] = 99.0
    assert registration.distance(found, known, region, (1.0, 1.0, 2.0)) == pytest.approx(5.0)


def test_figures_are_over_pairs_and_gain_is_pair_by_pair() -> None:
    rows = pd.DataFrame(
        [
            {"fixed": pair, "moving": "x", "method": method, "dice": dice + 0.01 * int(pair), "folds": 0.0}
            for pair in map(str, range(20))
            for method, dice in (("plain", 0.5), ("score", 0.6))
        ]
    )
    plain, score = registration.figures(rows, ["method"], "plain", resamples=200, seed="x")
    assert "gain" not in plain and plain["dice"]["value"] == pytest.approx(0.595)
    assert score["dice"]["low"] < score["dice"]["value"] < score["dice"]["high"] and score["dice"]["n"] == 20
    assert score["gain"]["value"] == pytest.approx(0.1) and score["gain"]["beyond"] == "plain"
    parts = pd.concat([rows.assign(share=0.5), rows.assign(share=1.0, dice=rows["dice"] + 0.1)])
    found = registration.figures(parts, ["share", "method"], "plain", resamples=50, seed="x")
    assert [(one["share"], one["method"]) for one in found] == [
        (0.5, "plain"),
        (0.5, "score"),
        (1.0, "plain"),
        (1.0, "score"),
    ]


def test_a_pair_without_label_maps_leaves_the_dice_of_the_others() -> None:
    rows = pd.DataFrame(
        [
            {"fixed": pair, "moving": "x", "method": method, "dice": np.nan if pair == "3" else dice}
            for pair in map(str, range(8))
            for method, dice in (("plain", 0.5), ("score", 0.6))
        ]
    )
    plain, score = registration.figures(rows, ["method"], "plain", resamples=50, seed="x")
    assert plain["dice"]["value"] == pytest.approx(0.5) and plain["dice"]["n"] == 7
    assert score["gain"]["value"] == pytest.approx(0.1) and score["gain"]["n"] == 7
