"""What is measured of completed scans, held to values that are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.evaluation.completion import (
    closeness,
    crps,
    figures,
    nominal_coverage,
    uncertainty,
    volume_figures,
    volumes_after,
)


def test_closeness_looks_at_the_region_alone() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((12, 12, 12)).astype(np.float32)
    region = np.zeros(truth.shape, bool)
    region[4:8, 4:8, 4:8] = True
    wrong_elsewhere = np.where(region, truth, 0).astype(np.float32)
    assert closeness(truth, wrong_elsewhere, region)["psnr"] == 100.0
    shifted = np.where(region, truth + 0.1, truth).astype(np.float32)
    found = closeness(truth, shifted, region)
    assert found["psnr"] == pytest.approx(20.0, abs=1e-4) and found["l1"] == pytest.approx(0.1, abs=1e-6)
    assert found["ssim"] < closeness(truth, truth, region)["ssim"] == pytest.approx(1.0, abs=1e-4)


def test_crps_is_that_of_the_normal_distribution() -> None:
    """Gneiting and Raftery 2007: for N(0, 1) and a value 0, (sqrt(2) - 1) / sqrt(pi)."""
    draws = np.random.default_rng(0).standard_normal((8, 40000))
    assert crps(np.zeros(40000), draws) == pytest.approx((2**0.5 - 1) / np.pi**0.5, abs=5e-3)
    assert crps(np.zeros(3), np.array([[1.0, -2.0, 3.0]])) == pytest.approx(2.0)
    narrow, wide = 0.2 * draws, 5 * draws
    truth = np.random.default_rng(1).standard_normal(40000)
    assert crps(truth, draws) < min(crps(truth, narrow), crps(truth, wide))


def test_draws_that_are_as_the_truth_is_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    middle = rng.standard_normal(50000)
    truth, draws = middle + rng.standard_normal(50000), middle + rng.standard_normal((5, 50000))
    found = uncertainty(truth, draws)
    assert found["covered"] == pytest.approx(nominal_coverage(5), abs=0.01) == 4 / 6
    assert found["spread"] == pytest.approx(found["error"], rel=0.02)
    narrow = uncertainty(truth, middle + 0.3 * (draws - middle))
    assert narrow["covered"] < 0.4 and narrow["spread"] < 0.5 * narrow["error"]
    assert nominal_coverage(1) is None and set(uncertainty(truth, draws[:1])) == {"crps"}


def test_figures_are_over_subjects_beside_the_best_simple_way() -> None:
    psnr = {"harmonic": [18.0, 20.0, 22.0], "mean": [19.0, 10.0, 10.0], "model": [20.0, 21.0, 24.0]}
    rows = pd.DataFrame(
        [
            {"scan_id": f"s{i}", "subject_id": f"s{i}", "strength": s, "method": method, "psnr": value + s}
            for s in (0, 1)
            for method, values in psnr.items()
            for i, value in enumerate(values)
        ]
    )
    found = figures(rows, ["strength", "method"], ["harmonic", "mean"], resamples=200, seed="x")
    assert [(e["strength"], e["method"]) for e in found] == [(s, m) for s in (0, 1) for m in psnr]
    assert found[5]["psnr"]["value"] == pytest.approx(65 / 3 + 1, rel=1e-5)
    gain = found[5]["gain"]
    assert gain["value"] == pytest.approx(5 / 3, rel=1e-5) and gain["beyond"] == "harmonic" and gain["n"] == 3
    assert 1.0 <= gain["low"] <= gain["high"] <= 2.0 and "gain" not in found[0]


def test_volumes_are_compared_with_those_without_a_lesion() -> None:
    measured = {"true": {"v": np.array([10.0, 20.0])}, "lesion": {"v": np.array([13.0, 15.0])}}
    rows = volumes_after(measured, "true")
    rows["subject_id"] = np.array(["a", "b"])[rows["row"]]
    found = volume_figures(rows, {"v": "mL"}, resamples=100, seed="x")
    assert [(e["kind"], e["v"]["value"], e["v"]["unit"]) for e in found] == [("true", 0.0, "mL"), ("lesion", 4.0, "mL")]


def test_a_scan_where_something_is_not_known_leaves_the_others() -> None:
    rows = pd.DataFrame(
        [
            {"scan_id": scan, "subject_id": scan, "method": method, "psnr": psnr, "texture": texture}
            for method, psnr in (("mean", 10.0), ("model", 12.0))
            for scan, texture in (("a", 0.5), ("b", np.nan), ("c", 0.7))
        ]
    )
    model = figures(rows, ["method"], ["mean"], resamples=50, seed="x")[1]
    assert model["texture"]["value"] == pytest.approx(0.6) and model["texture"]["n"] == 2
    assert model["psnr"]["n"] == model["gain"]["n"] == 3
