"""Harmonisation: curves of grey values, and figures in a world whose site effect and covariate are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from meddiff_steps import config
from meddiff_steps.applications.harmonisation import GreyValues, domains, sides, training_scans
from meddiff_steps.core.errors import UserError
from meddiff_steps.evaluation import harmonisation as judging
from meddiff_steps.imaging.selection import Images

SHAPE = (16, 16)
DRAWN: dict[str, Any] = {"resamples": 100, "seed": "x"}


def scans(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Heads with a dark hole that grows with age: as they are, as sites show them (site B is brighter and paler), and
    who they are.
    """
    rng = np.random.default_rng(seed)
    y, x = np.indices(SHAPE) - 7.5
    age = rng.uniform(20, 80, count)
    there = np.arange(count) % 2 == 1
    clean = np.zeros((count, 1, *SHAPE), np.float32)
    for image, years in zip(clean[:, 0], age, strict=True):
        head = np.hypot(x, y) < 7
        image[head] = 0.5 + 0.03 * rng.standard_normal(head.sum())
        image[np.hypot(x, y) < 1 + years / 20] = 0.2
    seen = np.where((clean > 0) & ~there[:, None, None, None], 0.7 * clean + 0.25, clean).astype(np.float32)
    table = pd.DataFrame(
        {"subject_id": [f"{seed}-{i}" for i in range(count)], "site": np.where(there, "A", "B"), "there": there}
    )
    return clean, seen, table.assign(age=age, split="train")


AGE: config.Covariates = {"age": config.ContinuousCovariate(unit="year", range=(0, 100))}


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, Any]]:
    (clean, seen, table), (true, shown, asked) = scans(60, 0), scans(40, 1)
    model = judging.scanner(seen, table)
    found = {}
    for way, (a, b) in {"none": (seen, shown), "exact": (clean, true)}.items():
        found[way] = judging.told(a, b, (table, asked), AGE, model, **DRAWN)
    return found


def test_a_known_site_effect_is_told_before_and_not_after(figures: dict[str, dict[str, Any]]) -> None:
    assert figures["none"]["site_auc"]["value"] == 1.0 == figures["none"]["site_auc_as_scanned"]["value"]
    for name in ("site_auc", "site_auc_as_scanned"):
        assert figures["exact"][name]["low"] < 0.5 < figures["exact"][name]["high"], name
    assert figures["none"]["site_auc"]["n"] == 40


def test_a_known_covariate_is_read_before_and_after_and_carried_after(
    figures: dict[str, dict[str, Any]],
) -> None:
    for way in figures.values():
        assert way["covariates"]["age"]["r"]["value"] > 0.9
    before, after = (figures[way]["carried"]["age"]["mae"]["value"] for way in ("none", "exact"))
    assert after < 0.6 * before  # what learnt at one site is right at the other only after harmonisation


def test_curves_of_grey_values_find_a_known_site_effect() -> None:
    clean, seen, table = scans(40, 2)
    there = table["there"].to_numpy()
    reference = GreyValues.of(seen[there])
    errors = {}
    for way in ("matched", "scaled"):
        made = np.stack([getattr(reference, way)(image) for image in seen[~there]])
        assert made.shape == seen[~there].shape and (made[seen[~there] == 0] == 0).all()
        errors[way] = np.abs(made - clean[~there]).mean()
    before = np.abs(seen[~there] - clean[~there]).mean()
    assert max(errors.values()) < 0.5 * before
    own = GreyValues.of(seen[there][:1])
    np.testing.assert_allclose(own.matched(seen[there][0]), seen[there][0], atol=1e-3)
    np.testing.assert_allclose(own.scaled(seen[there][0]), seen[there][0], atol=1e-5)
    assert not own.matched(np.zeros((1, *SHAPE), np.float32)).any()
    with pytest.raises(UserError, match="are empty"):
        GreyValues.of(np.zeros((2, 1, *SHAPE), np.float32))


def test_what_is_kept_of_anatomy_is_measured() -> None:
    clean, _, _ = scans(2, 3)
    same = judging.kept(clean[0], np.where(clean[0] > 0, 0.5 * clean[0] + 0.2, 0))
    assert same["correlation"] == pytest.approx(1) and same["moved"] > 0.02
    other = judging.kept(clean[0], clean[0][:, ::-1])
    assert other["correlation"] < 0.95 and other["ssim"] < judging.kept(clean[0], clean[0])["ssim"] == pytest.approx(1)


def test_measured_features_without_the_site(figures: dict[str, dict[str, Any]]) -> None:
    (_, seen, table), (_, shown, asked) = scans(60, 0), scans(40, 1)

    def features(images: np.ndarray) -> np.ndarray:
        heads = [image[image > 0] for image in images]
        return np.array([[h.mean(), h.std(), *np.quantile(h, [0.1, 0.5, 0.9])] for h in heads])

    found = judging.features_told(features(seen), features(shown), (table, asked), AGE, **DRAWN)
    assert found["none"]["site_auc"]["value"] > 0.95
    assert found["combat"]["site_auc"]["low"] < 0.5 < found["combat"]["site_auc"]["high"]
    assert found["combat"]["covariates"]["age"]["r"]["value"] > 0.8


def test_a_covariate_that_one_site_does_not_know_is_not_told_to_combat(caplog: pytest.LogCaptureFixture) -> None:
    (_, seen, table), (_, shown, asked) = scans(30, 0), scans(20, 1)
    unknown = [each.assign(score=each["age"].where(each["there"])) for each in (table, asked)]
    covariates = {"score": config.ContinuousCovariate(unit="", range=(0, 100)), **AGE}
    features = [images.reshape(len(images), -1)[:, ::16] for images in (seen, shown)]
    found = judging.features_told(features[0], features[1], (unknown[0], unknown[1]), covariates, **DRAWN)
    assert list(found["combat"]["covariates"]) == ["age"] and found["combat"]["site_auc"]["n"] == 20
    assert "score is known of 15 training scans of `to` and 0 of the others, and of 10 and 0 test scans" in caplog.text
    alone = judging.features_told(*features, (unknown[0], unknown[1]), {"score": covariates["score"]}, **DRAWN)
    assert alone["combat"]["covariates"] == {} and alone["none"]["site_auc"]["n"] == 20


# ---------------------------------------------------------------------------------------------------------- sides


def settings(**changes: Any) -> config.Harmonisation:
    return config.Harmonisation(**({"covariate": "site", "to": "A"} | changes))


def test_ways_are_judged_by_so_many_people_of_each_side() -> None:
    table = pd.DataFrame(
        [
            {"scan_id": f"{who}{i:02d}-{slice_}", "subject_id": f"{who}{i:02d}", "split": split, "there": who == "a"}
            for who, count in (("a", 30), ("b", 60))
            for i in range(count)
            for split in ["test" if i % 10 == 0 else "train"]
            for slice_ in range(3)
        ]
    )
    shards: Any = None
    cohort = Images(shards, table, "scan_id", "subject_id", "manifest")
    few = training_scans(cohort, 60)
    assert few["split"].eq("train").all() and few["there"].value_counts().to_dict() == {True: 60, False: 60}
    assert (few.groupby("subject_id").size() == 3).all() and few["scan_id"].is_monotonic_increasing
    pd.testing.assert_frame_equal(training_scans(cohort, 1000), table[table["split"] == "train"].reset_index(drop=True))


def test_nobody_is_in_both_groups() -> None:
    table = pd.DataFrame(
        {
            "subject_id": ["p", "p", "q", "r", "s", "t", "u"],
            "site": ["A", "B", "A", "B", "C", "B", None],
            "split": ["train"] * 5 + ["val", "train"],
        }
    )
    shards: Any = SimpleNamespace()
    found = domains(settings(), shards, table)
    assert found["a"].rows.tolist() == [1, 3, 4] and found["a"].held_out.tolist() == [5]
    assert found["b"].rows.tolist() == [2]  # p was at both sites, and is in the larger group alone
    assert domains(settings(others=["C"]), shards, table)["a"].rows.tolist() == [4]
    with pytest.raises(UserError, match=r"harmonisation.others: no preprocessed scan has site D; there are A, B, C"):
        sides(settings(others=["D"]), table)
    with pytest.raises(UserError, match=r"site X: no training scan|harmonisation.to: no preprocessed scan has site X"):
        sides(settings(to="X"), table)
