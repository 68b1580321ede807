"""Figures of harmonisations that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.evaluation import harmonisation


def test_a_scan_whose_anatomy_is_flat_leaves_the_others() -> None:
    rows = pd.DataFrame(
        {
            "subject_id": list("abcd"),
            "method": "draw",
            "correlation": [np.nan, 0.9, 0.9, 0.9],
            "ssim": 0.8,
            "moved": 0.1,
        }
    )
    found = harmonisation.anatomy(rows, resamples=50, seed="x")["draw"]
    assert found["correlation"]["value"] == pytest.approx(0.9) and found["correlation"]["n"] == 3
    assert found["ssim"]["n"] == 4


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_subject_who_was_scanned_at_both_sites_counts_at_both(order: tuple[bool, bool]) -> None:
    table = pd.DataFrame([{"subject_id": f"s{i}", "there": there} for i in range(12) for there in order])
    scores = table["there"].to_numpy(dtype=float)
    found = harmonisation.site_auc(scores, table, resamples=50, seed="x")
    assert found["value"] == 1.0 and found["n"] == 12


def test_scans_of_a_subject_at_one_site_are_averaged() -> None:
    table = pd.DataFrame({"subject_id": ["a", "a", "b", "c"], "there": [True, True, False, False]})
    scores = np.array([0.0, 1.0, 0.4, 0.6])  # the mean of a, 0.5, is above one of two
    assert harmonisation.site_auc(scores, table, resamples=50, seed="x")["value"] == 0.5
