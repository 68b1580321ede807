"""Covariate fidelity from tables of known predictions."""

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariates
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.fidelity import (
    PREDICTION_COLUMNS,
    correlation_structure,
    covariate_fidelity,
    distribution_distances,
    predictions_table,
    subgroup_fidelity,
    training_range,
)

COVARIATES: Covariates = {
    "a": ContinuousCovariate(unit="mL", range=(0, 1000)),
    "b": ContinuousCovariate(unit="year", range=(-100, 1000)),
    "sex": CategoricalCovariate(levels=["F", "M"]),
    "site": CategoricalCovariate(levels=["x", "y", "z"]),
}


def cohort(kind: str, n: int, noise: float = 1.0) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    rng = philox("test", f"fidelity {kind}")
    a = rng.normal(50, 10, n)
    wanted = pd.DataFrame(
        {
            "a": a,
            "b": 0.5 * a + rng.normal(0, 5, n),
            "sex": np.where(rng.random(n) < 0.5, "F", "M"),
            "site": rng.choice(["x", "y", "z"], n),
        }
    )
    chance = np.clip(np.where(wanted["sex"] == "M", 0.7, 0.3) + rng.normal(0, 0.1, n), 0, 1)
    site = np.eye(3)[wanted["site"].map(["x", "y", "z"].index)] * 0.8 + 0.1
    measured = {
        "a": a + rng.normal(0, noise, n),
        "b": wanted["b"].to_numpy() * 0.5 + 3,
        "sex": np.stack([1 - chance, chance], 1),
        "site": site,
    }
    return wanted, measured


def table(noise: float = 1.0) -> pd.DataFrame:
    parts = []
    for kind, n, spread in (("synthetic", 200, noise), ("real", 80, 1.0)):
        wanted, measured = cohort(kind, n, spread)
        ids = [f"{kind}-{i}" for i in range(n)]
        parts.append(predictions_table(ids, ids, kind, wanted, measured, COVARIATES))
    return pd.concat(parts, ignore_index=True)


def test_figures_of_known_predictions() -> None:
    out = covariate_fidelity(table(), COVARIATES, resamples=300)
    a, b = out["a"], out["b"]
    assert a["r"]["value"] == pytest.approx(10 / np.hypot(10, 1), abs=0.003)
    assert a["slope"]["value"] == pytest.approx(1.0, abs=0.03)
    assert a["mae"]["value"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.1)
    assert a["bias"]["low"] < 0 < a["bias"]["high"]
    assert (a["unit"], a["r"]["n"], a["r"]["ceiling"]["n"]) == ("mL", 200, 80)
    assert a["share_of_ceiling"]["value"] == pytest.approx(a["r"]["value"] / a["r"]["ceiling"]["value"], abs=1e-5)
    assert a["share_of_ceiling"]["low"] < 1.0 < a["share_of_ceiling"]["high"]
    assert b["r"]["value"] == pytest.approx(
        1.0
    )  # a measurement that is squeezed but in order: r does not see it, slope does
    assert b["slope"]["value"] == pytest.approx(0.5)
    assert out["sex"]["auc"]["value"] > 0.98
    assert out["site"]["auc"]["value"] == 1.0
    assert out["sex"]["ece"]["value"] == pytest.approx(
        0.3, abs=0.04
    )  # 0.7 where all are M, 0.3 where none is; less where both share a bin
    assert out["site"]["ece"]["value"] == pytest.approx(0.1)  # 0.9 instead of 1, 0.1 instead of 0
    assert out["sex"]["ece"]["low"] < out["sex"]["ece"]["value"] < out["sex"]["ece"]["high"]
    assert out["sex"]["ece"]["ceiling"]["n"] == 80


def test_a_worse_generator_scores_below_its_ceiling() -> None:
    out = covariate_fidelity(table(noise=8.0), COVARIATES, resamples=300)["a"]
    assert out["r"]["high"] < out["r"]["ceiling"]["low"]
    assert out["share_of_ceiling"]["high"] < 0.95


def test_shuffled_requests_give_nothing() -> None:
    wanted, measured = cohort("synthetic", 300)
    order = philox("test", "shuffle").permutation(300)
    ids = [str(i) for i in range(300)]
    shuffled = predictions_table(ids, ids, "synthetic", wanted.iloc[order], measured, COVARIATES)
    out = covariate_fidelity(shuffled, COVARIATES, resamples=300)
    # 3.5 standard errors: a 95 % interval would miss one shuffle in twenty.
    assert abs(out["a"]["r"]["value"]) < 3.5 / np.sqrt(300)
    for name in ("sex", "site"):
        assert abs(out[name]["auc"]["value"] - 0.5) < 3.5 * np.sqrt(301 / (12 * 150 * 150))


def test_rows_without_a_request_are_skipped() -> None:
    wanted, measured = cohort("synthetic", 50)
    wanted.loc[:9, "a"] = np.nan
    wanted.loc[:4, "sex"] = None
    ids = [str(i) for i in range(50)]
    rows = predictions_table(ids, ids, "synthetic", wanted, measured, COVARIATES)
    assert rows.groupby("covariate").size().to_dict() == {"a": 40, "b": 50, "sex": 45, "site": 150}
    assert list(rows.columns) == list(PREDICTION_COLUMNS)
    out = covariate_fidelity(rows, COVARIATES, resamples=100)
    assert out["a"]["r"]["n"] == 40
    assert out["a"]["r"]["ceiling"]["value"] is None  # no real rows
    assert out["a"]["share_of_ceiling"]["value"] is None


def test_a_label_that_few_real_scans_have_has_a_ceiling_without_interval() -> None:
    rows = table()
    real = rows[(rows["kind"] == "real") & (rows["covariate"] == "sex")]
    rare = real.loc[real["requested_or_true"] > 0.5, "id"].unique()[3:]
    entry = covariate_fidelity(rows[~((rows["covariate"] == "sex") & rows["id"].isin(rare))], COVARIATES, resamples=100)
    found = entry["sex"]["auc"]
    assert found["low"] is not None and "too_few" not in found
    assert (found["ceiling"]["low"], found["ceiling"]["too_few"]) == (None, 3)
    share = entry["sex"]["share_of_ceiling"]
    assert share["value"] is not None and share["low"] is None


def test_no_predictions_no_figures() -> None:
    empty = predictions_table([], [], "real", pd.DataFrame(columns=list(COVARIATES)), {}, COVARIATES)
    assert covariate_fidelity(empty, COVARIATES, resamples=100) == {}
    assert correlation_structure(empty, COVARIATES, resamples=100) == {}


def test_correlations_as_requested_and_as_measured() -> None:
    pairs = correlation_structure(table(), COVARIATES, resamples=200)
    assert next(iter(pairs)) == "a~b"
    assert len(pairs) == 15 - 3  # two numbers, one column of sex, three of site, which are not compared with each other
    expected = 0.5 * 10 / np.hypot(5, 5)
    for key, n in (("requested", 200), ("measured", 200), ("true", 80), ("real_measured", 80)):
        assert abs(np.arctanh(pairs["a~b"][key]["value"]) - np.arctanh(expected)) < 3.5 / np.sqrt(n)
    wanted, measured = cohort("synthetic", 200)
    both = pairs["b~sex = M"]
    assert both["requested"]["value"] == pytest.approx(np.corrcoef(wanted["b"], wanted["sex"] == "M")[0, 1], abs=1e-5)
    assert both["measured"]["value"] == pytest.approx(np.corrcoef(measured["b"], measured["sex"][:, 1])[0, 1], abs=1e-5)


def test_shared_noise_counts_once() -> None:
    wanted, measured = cohort("synthetic", 60)
    rows = predictions_table(
        [str(i) for i in range(60)], [str(i % 20) for i in range(60)], "synthetic", wanted, measured, COVARIATES
    )
    assert covariate_fidelity(rows, COVARIATES, resamples=100)["a"]["r"]["n"] == 20


def test_requests_beyond_training_are_reported_apart() -> None:
    rows = []
    for kind, n in (("synthetic", 60), ("real", 60)):
        a = np.linspace(0, 59, n)
        wrong = np.where(a > 50, 20.0, 0.0)  # what was never seen comes out too small
        wanted = pd.DataFrame({"a": a})
        rows.append(
            predictions_table(
                [f"{kind}{i}" for i in range(n)],
                [f"{kind}{i}" for i in range(n)],
                kind,
                wanted,
                {"a": a - wrong},
                {"a": COVARIATES["a"]},
                {"a": (0.0, 50.0)},
            )
        )
    found = covariate_fidelity(pd.concat(rows), {"a": COVARIATES["a"]}, resamples=100)["a"]
    assert (found["mae"]["value"], found["mae"]["n"], found["mae"]["ceiling"]["n"]) == (0.0, 51, 51)
    assert (
        found["extrapolation"]["bias"]["value"],
        found["extrapolation"]["mae"]["value"],
        found["extrapolation"]["mae"]["n"],
    ) == (-20.0, 20.0, 9)
    assert "extrapolation" not in covariate_fidelity(table(), COVARIATES, resamples=100)["a"]


def test_training_range_ignores_missing_values_and_labels() -> None:
    training = pd.DataFrame(
        {"a": [3.0, None, 1.0], "b": [None, None, None], "sex": ["F", "M", None], "site": ["x", "y", "z"]}
    )
    assert training_range(training, COVARIATES) == {"a": (1.0, 3.0)}


def test_distance_of_shifted_distributions_is_the_shift() -> None:
    rows = table()
    moved = rows.copy()
    moved.loc[(moved["kind"] == "synthetic") & (moved["covariate"] == "a"), "measured"] += 30.0
    near, far = (distribution_distances(t, COVARIATES, resamples=100)["a"] for t in (rows, moved))
    gap = [
        rows.loc[(rows["kind"] == kind) & (rows["covariate"] == "a"), "measured"].mean()
        for kind in ("synthetic", "real")
    ]
    assert far["wasserstein"]["value"] == pytest.approx(
        30.0 + gap[0] - gap[1], abs=0.3
    )  # equal shapes: the distance is that of the means
    spread = rows.loc[(rows["kind"] == "real") & (rows["covariate"] == "a"), "measured"].std(ddof=0)
    assert far["relative"]["value"] == pytest.approx(far["wasserstein"]["value"] / spread, rel=1e-4)
    assert far["wasserstein"]["low"] > far["wasserstein"]["floor"]["high"]
    assert near["wasserstein"]["low"] < near["wasserstein"]["floor"]["high"]
    assert far["requested"] == near["requested"]
    assert (far["unit"], far["wasserstein"]["n"], far["wasserstein"]["floor"]["n"]) == ("mL", 200, 80)
    assert set(distribution_distances(rows, COVARIATES, resamples=100)) == {"a", "b"}  # labels have no distance


def test_a_subgroup_that_is_served_worse_is_found() -> None:
    rows, groups = [], []
    for kind, n, spread in (("synthetic", 200, 1.0), ("real", 80, 1.0)):
        wanted, measured = cohort(kind, n, spread)
        if kind == "synthetic":
            measured["a"] = np.where(wanted["sex"] == "M", measured["a"] + 12.0, measured["a"])
        ids = [f"{kind}-{i}" for i in range(n)]
        rows.append(predictions_table(ids, ids, kind, wanted, measured, COVARIATES))
        groups.append(wanted[["sex", "site"]].set_axis(ids))
    found = subgroup_fidelity(pd.concat(rows), pd.concat(groups), COVARIATES, resamples=100)
    assert set(found) == {"sex", "site"}
    assert set(found["site"]) == {"x", "y", "z"}
    female, male = (found["sex"][level]["covariates"] for level in ("F", "M"))
    assert set(male) == {"a", "b", "site"}
    assert male["a"]["bias"]["low"] > 10 > female["a"]["bias"]["high"]
    assert sum(found["sex"][level]["images"]["synthetic"] for level in ("F", "M")) == 200
    few = subgroup_fidelity(
        pd.concat(rows), pd.concat(groups)[:205], COVARIATES, resamples=100
    )  # five real ones are left
    assert few["sex"]["F"]["covariates"] == {}
