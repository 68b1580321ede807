"""Plans: what each origin of covariates promises, and that growing a plan changes nobody in it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter

from meddiff_steps.cohort.learnt import learnt
from meddiff_steps.config import Covariates, PlanGroup
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.synthesis.plan import COLUMNS, build_plan, one_row_each
from meddiff_steps.synthesis.size import plan_shards, planned_subjects

SCHEMA: Covariates = TypeAdapter(Covariates).validate_python(
    {
        "age": {"unit": "year", "range": [18, 100]},
        "volume": {"unit": "mL", "range": [0, 200]},
        "diagnosis": {"levels": ["control", "case", "other"]},
    }
)


@pytest.fixture(scope="module")
def training() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    age = rng.uniform(44, 82, 400)
    volume = 10 + 0.5 * (age - 44) + rng.gamma(3, 3, 400)
    case = rng.random(400) < 0.05 + 0.3 * (age > 65)
    frame = pd.DataFrame({"age": age, "volume": volume, "diagnosis": np.where(case, "case", "control").astype(object)})
    frame.loc[::50, "age"] = np.nan
    return frame


def group(**settings: Any) -> PlanGroup:
    return PlanGroup.model_validate({"name": "syn", "subjects": 40, **settings})


def plan(training: pd.DataFrame, *groups: PlanGroup, shard_size: int = 16, **more: Any) -> pd.DataFrame:
    return build_plan(groups, SCHEMA, training, "study seed", shard_size, **more)


def test_a_plan_has_the_agreed_columns_and_keys(training):
    rows = plan(training, group(subjects=35), group(name="extra", subjects=5))
    assert tuple(rows.columns) == (*COLUMNS, "age", "volume", "diagnosis")
    assert rows["sample_id"].is_unique and rows["sample_id"].iloc[[0, 34, 35]].tolist() == [
        "syn000000",
        "syn000034",
        "extra000000",
    ]
    assert rows["index"].tolist() == [*range(35), *range(5)] and (rows["index"] == rows["noise_index"]).all()
    assert rows["shard"].tolist() == [i // 16 for i in range(40)]
    assert (rows["attempt"] == 0).all() and set(rows["cohort_root"]) == {"study seed/syn", "study seed/extra"}
    assert rows["seed_key"].iloc[3] == seed_key("study seed/syn", 3, 0, "noise") and rows["seed_key"].is_unique
    assert [str(rows[c].dtype) for c in ("index", "noise_index", "attempt", "shard", "age")] == ["int64"] * 4 + [
        "float64"
    ]
    assert not rows.isna().any().any()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"where": {"diagnosis": "case", "age": [60, 75]}},
        {"covariates": "grid", "grid": {"age": [50, 60, 70]}},
        {"covariates": "counterfactual", "grid": {"volume": [15, 30]}, "base": {"diagnosis": "case"}},
    ],
    ids=["copula", "where", "grid", "counterfactual"],
)
def test_a_larger_plan_begins_with_the_smaller_one(training, settings):
    small, large = (plan(training, group(subjects=n, **settings), shard_size=s) for n, s in ((200, 3), (400, 1000)))
    pd.testing.assert_frame_equal(
        large[: len(small)].drop(columns="shard"), small.drop(columns="shard"), check_exact=True
    )


def test_groups_do_not_disturb_each_other(training):
    alone = plan(training, group(name="b"))
    beside = plan(training, group(name="a", subjects=11), group(name="b"))
    pd.testing.assert_frame_equal(beside[11:].reset_index(drop=True).drop(columns="shard"), alone.drop(columns="shard"))
    assert not np.isin(beside["age"][:11], alone["age"]).any()


def test_neither_the_order_of_covariates_nor_of_training_rows_matters(training):
    usual = plan(
        training, group(covariates="grid", grid={"diagnosis": ["case", "control"], "age": [50, 60]}, subjects=3)
    )
    other = build_plan(
        [group(covariates="grid", grid={"age": [50, 60], "diagnosis": ["case", "control"]}, subjects=3)],
        dict(reversed(SCHEMA.items())),
        training.sample(frac=1, random_state=0),
        "study seed",
        16,
    )
    pd.testing.assert_frame_equal(other[usual.columns], usual, rtol=1e-9)


def test_covariates_follow_the_training_rows(training):
    rows = plan(training, group(subjects=4000))
    assert rows["age"].mean() == pytest.approx(training["age"].mean(), abs=0.7)
    assert rows["age"].corr(rows["volume"]) == pytest.approx(training["age"].corr(training["volume"]), abs=0.05)
    assert (rows["diagnosis"] == "case").mean() == pytest.approx((training["diagnosis"] == "case").mean(), abs=0.03)
    assert rows.merge(training, on=["age", "volume"]).empty


def test_where_is_fulfilled_by_every_subject_and_the_rest_follows(training):
    rows = plan(training, group(subjects=300, where={"diagnosis": ["case"], "volume": [25, 35]}))
    assert (rows["diagnosis"] == "case").all() and rows["volume"].between(25, 35).all()
    real = training[(training["diagnosis"] == "case") & training["volume"].between(25, 35)]
    assert rows["age"].mean() == pytest.approx(real["age"].mean(), abs=5.0)
    assert rows["age"].mean() > training["age"].mean() + 3.0


def test_where_with_a_number_is_exact_and_conditions_the_others(training):
    young, old = (plan(training, group(subjects=200, where={"age": age})) for age in (50, 78))
    assert (young["age"] == 50).all() and (old["age"] == 78).all()
    assert old["volume"].mean() - young["volume"].mean() == pytest.approx(0.5 * 28, abs=3)


def test_where_on_a_rare_level_finds_it(training):
    rare = training.copy()
    rare["diagnosis"] = "control"
    rare.loc[[5, 9], "diagnosis"] = "case"
    rows = plan(rare, group(subjects=60, where={"diagnosis": "case"}))
    assert (rows["diagnosis"] == "case").all() and rows["age"].nunique() > 55


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"diagnosis": "other"},
            r"diagnosis should be \['other'\], but the training rows only have \['control', 'case'\]",
        ),
        ({"age": [20, 30]}, r"age should be in \[20, 30\], but the training rows are in \[44"),
        (
            {"age": [44, 44.5], "volume": [52, 53]},
            (
                r"none of 65,536 candidates fulfils age in \[44, 44.5\], volume in \[52, 53\] \(0 of 400 training rows"
                r" do\)"
            ),
        ),
        ({"age": [60, 50]}, r"plan.syn.where.age: found \[60, 50\], expected a number or a range"),
        ({"age": [50, 60, 70]}, r"expected a number or a range \[low, high\]"),
    ],
)
def test_conditions_that_cannot_be_fulfilled_are_refused(training, where, message):
    with pytest.raises(UserError, match=message):
        plan(training, group(where=where))


@pytest.mark.parametrize(
    "settings",
    [
        {"where": {"diagnosis": ["other"]}},
        {"where": {"age": 20}},
        {"where": {"age": [20, 30]}},
        {"covariates": "grid", "grid": {"diagnosis": ["case", "other"]}, "base": {"age": 50}},
        {"covariates": "grid", "grid": {"age": [50]}, "base": {"diagnosis": "other"}},
        {"covariates": "counterfactual", "grid": {"diagnosis": ["case", "other"]}},
        {"covariates": "table", "table": "mine.csv"},
    ],
    ids=str,
)
def test_what_no_training_row_has_is_refused(training, settings):
    table = pd.DataFrame({"age": [50.0] * 40, "volume": 20.0, "diagnosis": ["case"] * 39 + ["other"]})
    with pytest.raises(UserError, match=r"plan.syn: (age|diagnosis) should be .*, so the model has not learnt it"):
        plan(training, group(**settings), tables={"syn": table})


@pytest.mark.parametrize(
    "settings",
    [
        {"covariates": "grid", "grid": {"age": [20, 95], "diagnosis": ["case"]}},
        {"covariates": "grid", "grid": {"diagnosis": ["case"]}, "base": {"age": 95}},
        {"covariates": "counterfactual", "grid": {"age": [50, 95]}},
        {"covariates": "table", "table": "mine.csv"},
    ],
    ids=str,
)
def test_a_chosen_number_beyond_the_training_rows_is_said_to_be_an_extrapolation(training, settings, caplog):
    table = pd.DataFrame({"age": [50.0] * 39 + [95.0], "volume": 20.0, "diagnosis": "case"})
    plan(training, group(**settings), tables={"syn": table})
    assert "95, but the training rows are in [44" in caplog.text and "is an extrapolation" in caplog.text


def test_conditions_that_training_rows_fulfil_in_part_say_what_is_left_out(training, caplog):
    rows = plan(training, group(where={"age": [20, 60], "diagnosis": ["case", "other"]}))
    assert set(rows["diagnosis"]) == {"case"} and rows["age"].min() >= 44
    assert "age may be in [20, 60], but the training rows are in [44" in caplog.text
    assert "['other'], which no training row has" in caplog.text


@pytest.mark.parametrize(
    ("column", "possible"),
    [
        (lambda rng, n: rng.integers(20, 31, n), set(range(20, 31))),
        (lambda rng, n: rng.integers(0, 2000, n), set(range(2000))),
        (lambda rng, n: rng.choice([1.5, 3.0], n), {1.5, 3.0}),
        (lambda rng, n: rng.choice([0, 0.5, 1, 2, 3], n), {0, 0.5, 1, 2, 3}),
        (lambda rng, n: 5 * rng.integers(8, 20, n), set(range(40, 100, 5))),
        (lambda rng, n: np.round(rng.uniform(1.5, 2.0, n), 2), {round(i / 100, 2) for i in range(150, 201)}),
    ],
    ids=["score", "count", "setting", "half points", "rounded to 5", "two decimals"],
)
def test_counts_scores_and_settings_keep_their_own_values(column, possible):
    schema = TypeAdapter(Covariates).validate_python({"x": {"unit": "point", "range": [0, 2000]}})
    values = column(np.random.default_rng(0), 200).astype(float)
    rows = build_plan([group(subjects=300)], schema, pd.DataFrame({"x": values}), "seed", 100)
    assert set(rows["x"]) <= possible and rows["x"].nunique() > 1
    assert rows["x"].between(values.min(), values.max()).all()


def test_who_was_scanned_often_counts_once():
    """Fifty old people with nine visits each, one of which has no age, and a hundred and fifty young ones with one."""
    rng = np.random.default_rng(0)
    visits = np.repeat(np.arange(200), [9] * 50 + [1] * 150)
    age = np.where(visits < 50, 80, 30) + rng.uniform(0, 5, len(visits))
    scans = pd.DataFrame({"subject_id": visits.astype(str), "age": age, "volume": age + rng.uniform(0, 1, len(visits))})
    scans["scan_id"] = [f"scan-{i}" for i in range(len(scans))]
    scans.loc[scans["subject_id"].drop_duplicates()[:50].index, "age"] = np.nan
    schema = {name: SCHEMA[name] for name in ("age", "volume")}
    rows = build_plan([group(subjects=2000)], schema, scans, "seed", 100)
    assert (rows["age"] > 60).mean() == pytest.approx(0.25, abs=0.03)
    each = one_row_each(scans)
    assert len(each) == 200 and each["age"].notna().all()
    pd.testing.assert_frame_equal(each, one_row_each(scans.sample(frac=1, random_state=0)))
    once = scans.drop_duplicates("subject_id")
    assert one_row_each(once) is once


def test_a_number_of_few_people_with_many_scans_is_no_setting():
    column = pd.Series(np.repeat([31.0, 47.0, 52.0], 20))
    assert learnt(column, SCHEMA["age"], pd.Series(np.repeat(["a", "b", "c"], 20))).marks is None  # type: ignore[union-attr]
    assert learnt(column, SCHEMA["age"]).marks is not None  # type: ignore[union-attr]


def test_a_chosen_value_between_those_that_there_are_is_told(caplog):
    schema = TypeAdapter(Covariates).validate_python({"field": {"unit": "T", "range": [0, 10]}})
    asked = group(covariates="grid", grid={"field": [1.5, 2]})
    build_plan([asked], schema, pd.DataFrame({"field": [1.5, 3.0] * 20}), "seed", 100)
    assert "field is asked to be 2, which lies between the values that training rows have (1.5, 3)" in caplog.text


def test_a_fine_scale_stays_fine(training):
    rows = plan(training.assign(age=training["age"].round(1)), group(subjects=300))
    assert rows["age"].round(1).ne(rows["age"]).any()


def test_grid_has_all_combinations_each_with_its_own_noise(training):
    rows = plan(
        training, group(subjects=5, covariates="grid", grid={"age": [50, 70], "diagnosis": ["control", "case"]})
    )
    assert len(rows) == 20 and rows["seed_key"].is_unique
    assert (rows.groupby(["age", "diagnosis"]).size() == 5).all() and len(rows.groupby(["age", "diagnosis"])) == 4
    assert rows["volume"].nunique() == 20
    assert rows[rows["age"] == 70]["volume"].mean() > rows[rows["age"] == 50]["volume"].mean()


def test_counterfactual_moves_one_covariate_of_the_same_subject(training):
    rows = plan(
        training,
        group(subjects=6, covariates="counterfactual", grid={"volume": [15, 30, 45]}, base={"diagnosis": "control"}),
    )
    assert rows["index"].tolist() == list(range(18)) and rows["noise_index"].tolist() == [i // 3 for i in range(18)]
    assert rows["seed_key"].nunique() == 6 and rows["sample_id"].is_unique
    assert rows["volume"].tolist() == [15.0, 30.0, 45.0] * 6 and (rows["diagnosis"] == "control").all()
    assert (rows.groupby("noise_index")["age"].nunique() == 1).all() and rows["age"].nunique() == 6
    assert rows["seed_key"].iloc[4] == seed_key("study seed/syn", 1, 0, "noise")


def test_counterfactual_of_a_level_keeps_the_declared_text(training):
    rows = plan(training, group(subjects=2, covariates="counterfactual", grid={"diagnosis": ["control", "case"]}))
    assert (
        rows["diagnosis"].tolist() == ["control", "case"] * 2
        and (rows.groupby("noise_index")["volume"].nunique() == 1).all()
    )


def test_table_rows_come_in_order_with_their_gaps(training):
    table = pd.DataFrame(
        {"age": [50.0, np.nan, 70.0], "volume": [20.0, 30.0, 40.0], "diagnosis": ["case", None, "control"], "note": "x"}
    )
    rows = plan(training, group(subjects=2, covariates="table", table="mine.csv"), tables={"syn": table})
    assert (
        rows["volume"].tolist() == [20.0, 30.0]
        and np.isnan(rows["age"][1])
        and rows["diagnosis"].tolist() == ["case", None]
    )
    assert "note" not in rows


def test_a_table_or_a_full_grid_needs_no_copula():
    few = pd.DataFrame({"age": [50.0], "volume": [20.0], "diagnosis": ["case"]})
    assert len(plan(few, group(subjects=1, covariates="table", table="mine.csv"), tables={"syn": few})) == 1
    full = {"age": [50, 60], "volume": [20], "diagnosis": ["case"]}
    assert len(plan(few, group(subjects=2, covariates="grid", grid=full))) == 4
    with pytest.raises(UserError, match="a copula needs at least 10"):
        plan(few, group())


def test_a_table_that_is_too_short_or_lacks_a_column_is_refused(training):
    table = pd.DataFrame({"age": [50.0], "volume": [20.0], "diagnosis": ["case"]})
    asked = group(subjects=2, covariates="table", table="mine.csv")
    with pytest.raises(UserError, match=r"plan.syn: subjects is 2, but mine.csv has 1 rows"):
        plan(training, asked, tables={"syn": table})
    with pytest.raises(UserError, match="mine.csv: no column for covariate volume"):
        plan(training, asked, tables={"syn": table.drop(columns="volume")})


def test_a_covariate_named_like_a_plan_column_is_refused(training):
    schema = TypeAdapter(Covariates).validate_python({"group": {"levels": ["a", "b"]}})
    with pytest.raises(UserError, match="covariates.group: `group` is a column of every plan"):
        build_plan([group()], schema, training, "seed", 10)


@pytest.mark.parametrize("shard_size", [1, 7, 16, 1000])
def test_sizes_are_known_from_the_config_alone(training, shard_size):
    groups = [
        group(subjects=9),
        group(name="grid", subjects=2, covariates="grid", grid={"age": [50, 60, 70], "diagnosis": ["case", "control"]}),
        group(name="cf", subjects=3, covariates="counterfactual", grid={"volume": [15, 30, 45, 60]}),
    ]
    rows = plan(training, *groups, shard_size=shard_size)
    assert planned_subjects(groups) == len(rows) == 9 + 12 + 12
    assert plan_shards(groups, shard_size) == rows["shard"].nunique() == rows["shard"].max() + 1
    assert rows["shard"].value_counts().iloc[:-1].eq(shard_size).all()


def test_sizes_import_nothing_heavy():
    code = (
        "import sys, meddiff_steps.synthesis.size; print([m for m in ('torch', 'pandas', 'numpy', 'scipy', 'pydantic')"
        " if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
