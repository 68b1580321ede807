"""Deviation maps by a model whose answer is known, and what is measured of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from meddiff_steps.applications.normative import (
    NormativeMaps,
    design_of,
    is_reference,
    known_means,
    matched,
    of_reference,
    reference_draws,
    smoothed,
)
from meddiff_steps.applications.scans import chosen_scans, one_a_session
from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Normative
from meddiff_steps.evaluation import normative as measuring
from meddiff_steps.imaging.selection import Images
from meddiff_steps.statistics.norms import NormSums
from tests.applications.test_inpainting import SHAPE, STD, SUBJECT, Exact

SETTINGS = Normative(wanted=True, samples=60, depth=0.6, num_inference_steps=40, smoothing_mm=1e-3)
RNG = np.random.default_rng(5)


def population(count: int, size: float) -> np.ndarray:
    """Scans (count, *SHAPE) of people of this size."""
    return (0.4 + 0.1 * size + STD * RNG.standard_normal((count, *SHAPE))).astype(np.float32)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_draws_are_of_the_posterior_of_the_noised_scan(prediction_type: str) -> None:
    """Noised to signal alpha and noise sigma and drawn again, a Gaussian returns by the share alpha^2 v / (alpha^2 v +
    sigma^2), and varies about that by the rest of its variance.
    """
    model = Exact(prediction_type)
    image = population(1, 1.0)[0]
    draws = reference_draws(model, image, SUBJECT, SETTINGS, "x")
    assert draws.shape == (60, *SHAPE)
    start = torch.tensor([SETTINGS.depth * model.process.last_timestep])
    alpha, sigma = (float(v.reshape(-1)[0]) for v in model.process.alpha_sigma(start))
    variance = (10 * STD) ** 2
    kept = alpha**2 * variance / (alpha**2 * variance + sigma**2)
    line = np.polyfit(image.ravel() - 0.5, draws.mean(0).ravel() - 0.5, 1)
    # A deterministic way from x_t to x_0 of a Gaussian scales by the root of the share.
    assert line[0] == pytest.approx(np.sqrt(kept), abs=0.05)
    assert draws.mean() == pytest.approx(0.5, abs=0.02)
    assert draws.std(0, ddof=1).mean() == pytest.approx(STD * np.sqrt(1 - kept), rel=0.1)


def test_draws_are_keyed_and_of_the_reference() -> None:
    image = population(1, 1.0)[0]
    few = SETTINGS.model_copy(update={"samples": 2})
    first, second = (reference_draws(Exact(), image, SUBJECT, few, "x") for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - reference_draws(Exact(), image, SUBJECT, few, "y")).max() > 0.01
    larger = reference_draws(Exact(), image, SUBJECT.assign(size=3.0), few, "x")
    assert (larger - first).mean() > 0.05


def test_healthy_scans_are_calibrated_and_a_lesion_is_found() -> None:
    few = SETTINGS.model_copy(update={"samples": 4, "num_inference_steps": 10})

    def difference(image: np.ndarray, root: str) -> np.ndarray:
        draws = reference_draws(Exact(), image, SUBJECT, few, root)
        return smoothed(image[0] - draws.mean(0)[0], few, (1.0, 1.0, 1.0)).ravel()

    sums = NormSums(1, int(np.prod(SHAPE)))
    for i, image in enumerate(population(12, 1.0)):
        sums.add(np.ones(1), difference(image, f"c{i}"))
    norm = sums.norm("calibration")
    healthy = population(25, 1.0)
    z = np.stack([norm.z(np.ones(1), difference(image, f"h{i}")) for i, image in enumerate(healthy)])
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.05, abs=0.012)

    place = np.zeros(SHAPE[1:], bool)
    place[1:3, 2:4, 2:4] = True
    ill = healthy[0] + 0.8 * place
    found = measuring.measured(
        norm.z(np.ones(1), difference(ill, "h0")).reshape(place.shape), np.ones_like(place), 1.96, place
    )
    assert found["auroc"] > 0.95
    assert found["inside"] > 3
    assert found["prevalence"] == pytest.approx(8 / 216)


def test_the_reference_is_its_levels_and_the_rest_the_scans_own() -> None:
    people = pd.DataFrame({"dx": ["CN", "AD", None], "age": [1.0, 2.0, 3.0]})
    settings = Normative(reference={"dx": "CN"})
    assert is_reference(people, settings).tolist() == [True, False, False]
    assert is_reference(people, Normative()).all()
    declared: Any = {
        "dx": CategoricalCovariate(levels=["CN", "AD"]),
        "age": ContinuousCovariate(unit="year", range=(0, 99)),
        "size": ContinuousCovariate(unit="mL", range=(0, 99)),
    }
    people["size"], people["text"] = 5.0, "Atrophy."
    found = of_reference(people.iloc[[1]], settings, declared)
    assert found.to_dict("records") == [{"dx": "CN", "age": 2.0, "size": 5.0}]
    found = of_reference(people.iloc[[1]], settings.model_copy(update={"matched": ["age"]}), declared)
    assert found.to_dict("records") == [{"dx": "CN", "age": 2.0, "size": None}]
    assert matched(people, Normative(matched=["size"]), declared)["dx"].tolist() == [None] * 3


def test_a_missing_value_is_the_mean_and_a_missing_label_the_share_of_each_level() -> None:
    declared: Any = {
        "size": ContinuousCovariate(unit="mL", range=(0, 9)),
        "dx": CategoricalCovariate(levels=["CN", "MCI", "AD"]),
    }
    people = pd.DataFrame({"size": [1.0, 3.0, None, 2.0, 2.0], "dx": ["CN", "AD", "AD", "MCI", None]})
    model: Any = SimpleNamespace(encoding=CovariateEncoding.fit(people, declared))
    maps = object.__new__(NormativeMaps)
    maps.model, maps.means = model, known_means(design_of(model, people))
    found = maps._design(people)
    np.testing.assert_allclose(found[:, 0], 1.0)
    np.testing.assert_allclose(found[[2, 3], 1], 0.0, atol=1e-6)
    np.testing.assert_array_equal(found[:, 2:], [[0, 0], [0, 1], [0, 1], [1, 0], [0.25, 0.5]])
    np.testing.assert_array_equal(known_means(np.full((3, 2), np.nan)), [0, 0])


def test_what_is_normal_is_learnt_at_the_place_that_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of twenty slices of each person the middle one, of everybody; of two sessions the first."""
    table = pd.DataFrame(
        [
            {"scan_id": f"{who}_{ses}_{number:02d}", "subject_id": who, "session_id": ses or None, "split": split}
            for split in ("train", "calibration", "test")
            for who, ses in [(f"{split}{i}", "") for i in range(3)] + [(f"{split}0", "2")]
            for number in range(20)
        ]
    ).sample(frac=1, random_state=0)
    used: dict[str, list[str]] = {}
    for split, name in (("train", "_regression"), ("calibration", "_calibrated")):
        monkeypatch.setattr(
            NormativeMaps, name, lambda self, scans, split=split: used.update({split: scans["scan_id"].tolist()})
        )
    shards: Any = SimpleNamespace(shape=lambda name: (1, 4, 4))
    study: Any = SimpleNamespace(normative=Normative(), preprocess=SimpleNamespace(voxel_mm=None))
    NormativeMaps(study, Exact(), Images(shards, table, "scan_id", "subject_id", "manifest"))
    tested = chosen_scans(one_a_session(table), [], 24)["scan_id"].tolist()
    assert tested == ["test0_2_10", "test0__10", "test1__10", "test2__10"]
    for split, scans in used.items():
        assert scans == [f"{split}0_2_10", f"{split}1__10", f"{split}2__10"]


def test_figures_say_what_was_measured() -> None:
    rows = [
        {"subject_id": f"s{i}", "method": "m", "kind": kind, "beyond": share, "mean": 0.0, "sd": 1.0}
        for i, (kind, share) in enumerate([("reference", 0.04)] * 4 + [("other", 0.2)] * 4)
    ]
    (found,) = measuring.figures(pd.DataFrame(rows), 0.05, resamples=200, seed="s")
    assert found["calibration"]["beyond"]["value"] == pytest.approx(0.04)
    assert found["calibration"]["beyond"]["nominal"] == 0.05
    assert found["groups"]["other"]["auc"]["value"] == 1.0
    assert "lesions" not in found
