"""Cells to typed values, and typed values to what a network reads."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.cohort.covariates import CovariateEncoding, describe, parse_covariates
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariates, freeze, load_stage, parse_study
from meddiff_steps.core.errors import UserError

AGE = ContinuousCovariate(unit="year", range=(18, 100), column="age_at_scan")
SEX = CategoricalCovariate(levels=["F", "M"])
CASE = CategoricalCovariate(levels=["0", "1"])


def parse(values: list[Any], covariate: ContinuousCovariate | CategoricalCovariate, dtype: str = "object") -> pd.Series:
    frame = pd.DataFrame({"scan_id": [f"sub-{i}" for i in range(len(values))], "x": pd.Series(values, dtype=dtype)})
    return parse_covariates(frame, {"x": covariate})["x"]


@pytest.mark.parametrize("null", ["n/a", "N/A", "", "  ", "NaN", "nan", "NA", "null", None, float("nan"), pd.NA])
def test_missing_values_become_null(null: Any) -> None:
    numbers, levels = parse(["50.5", null], AGE), parse(["F", null], SEX)
    assert numbers.dtype == "float64" and numbers[0] == 50.5 and math.isnan(numbers[1])
    assert levels.tolist() == ["F", None]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (["0", "1"], "object"),
        ([0, 1], "int64"),
        ([0.0, 1.0], "float64"),
        (["0.0", "1.0"], "object"),
        ([0, 1], "Int64"),
        (["00", " 1"], "object"),
    ],
)
def test_numeric_levels_match_however_they_were_read(values: list[Any], dtype: str) -> None:
    assert parse(values, CASE, dtype).tolist() == ["0", "1"]


def test_numeric_levels_match_beside_missing_ones() -> None:
    assert parse([1, None, 0], CASE, "float64").tolist() == ["1", None, "0"]


def test_a_declared_level_wins_over_null() -> None:
    assert parse(["NA", "EU", "n/a"], CategoricalCovariate(levels=["NA", "EU"])).tolist() == ["NA", "EU", None]


def test_levels_that_are_the_same_number_are_matched_by_their_text_only() -> None:
    covariate = CategoricalCovariate(levels=["1", "01"])
    assert parse(["01", "1"], covariate).tolist() == ["01", "1"]
    with pytest.raises(UserError, match=r"found '1\.0'"):
        parse(["1.0"], covariate)


@pytest.mark.parametrize(
    ("value", "covariate", "expected"),
    [
        ("17.9", AGE, r"within \[18, 100\] year"),
        ("101", AGE, r"within \[18, 100\] year"),
        ("inf", AGE, r"within \[18, 100\] year"),
        ("1_8", AGE, r"within \[18, 100\] year"),
        ("old", AGE, r"expected a number"),
        ("50,5", AGE, r"write decimals with a point"),
        (True, AGE, r"expected a number"),
        ("X", SEX, r"expected one of \['F', 'M'\]"),
        ("f", SEX, r"did you mean 'F'\? Capitals count"),
        ("2", CASE, r"expected one of \['0', '1'\]"),
        (0.5, CASE, r"expected one of \['0', '1'\]"),
        (True, CASE, r"expected one of \['0', '1'\]"),
    ],
)
def test_wrong_values_are_refused_with_scan_column_value_and_remedy(
    value: Any, covariate: ContinuousCovariate | CategoricalCovariate, expected: str
) -> None:
    good = "50" if isinstance(covariate, ContinuousCovariate) else covariate.levels[0]
    with pytest.raises(UserError, match=expected) as refusal:
        parse([good, value], covariate)
    message = str(refusal.value)
    field = "range" if isinstance(covariate, ContinuousCovariate) else "levels"
    assert f"scan sub-1, column {covariate.column or 'x'}: found {str(value)!r}" in message
    assert "write n/a" in message and f"change covariates.x.{field}" in message


def test_problems_of_all_columns_are_told_at_once_and_long_lists_are_cut() -> None:
    frame = pd.DataFrame({"scan_id": [f"sub-{i}" for i in range(8)], "age": ["200"] * 8, "sex": ["X"] * 8})
    with pytest.raises(UserError) as refusal:
        parse_covariates(frame, {"age": AGE, "sex": SEX})
    message = str(refusal.value)
    assert (
        "covariates.age: 8 value(s)" in message
        and "covariates.sex: 8 value(s)" in message
        and message.count("and 3 more") == 2
    )


def test_a_missing_column_and_a_reserved_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"no column for covariate age; its columns are: scan_id\. Add the column"):
        parse_covariates(pd.DataFrame({"scan_id": ["a"]}), {"age": AGE})
    with pytest.raises(UserError, match=r"covariates\.path: `path` is a column of every manifest.*another name"):
        parse_covariates(pd.DataFrame({"path": ["a"]}), {"path": SEX})


def test_describe() -> None:
    assert describe(pd.Series([1.0, 3.0, np.nan]), AGE) == {
        "n": 2,
        "missing": 1,
        "mean": 2.0,
        "std": math.sqrt(2),
        "min": 1.0,
        "max": 3.0,
    }
    assert describe(pd.Series([], dtype="float64"), AGE)["mean"] is None
    assert describe(pd.Series(["F", "F", None, "M"]), SEX)["levels"] == {
        "F": {"n": 2, "share": 2 / 3},
        "M": {"n": 1, "share": 1 / 3},
    }


# ------------------------------------------------------------------------------------------------ encoding

BOTH: Covariates = {"sex": SEX, "age": AGE}


@pytest.fixture
def manifest() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "scan_id": list("abcde"),
            "split": ["train", "train", "train", "test", "val"],
            "age": [40.0, 60.0, np.nan, 90.0, 20.0],
            "sex": ["F", None, "M", "M", "F"],
        }
    )


def test_encoding_standardises_by_the_training_rows_and_keeps_missing_as_nan(manifest: pd.DataFrame) -> None:
    encoding = CovariateEncoding.fit(manifest, BOTH)
    assert (
        encoding.names == ("sex", "age")
        and encoding.kinds == ("categorical", "continuous")
        and encoding.levels == {"sex": ("F", "M")}
    )
    assert encoding.means == {"age": 50.0} and encoding.stds == {"age": pytest.approx(math.sqrt(200))}
    encoded = encoding.encode(manifest)
    assert encoded.dtype == np.float32 and encoded.shape == (5, 2)
    unit = math.sqrt(200)
    np.testing.assert_allclose(
        encoded, [[0, -10 / unit], [np.nan, 10 / unit], [1, np.nan], [1, 40 / unit], [0, -30 / unit]], rtol=1e-6
    )


def test_fitting_does_not_depend_on_row_order(manifest: pd.DataFrame) -> None:
    generator = np.random.default_rng(0)
    big = pd.DataFrame({"age": generator.uniform(18, 100, 1000), "sex": ["F", "M"] * 500})
    assert CovariateEncoding.fit(big, BOTH) == CovariateEncoding.fit(big.sample(frac=1, random_state=1), BOTH)


def test_encoding_survives_json_with_sorted_keys(manifest: pd.DataFrame) -> None:
    encoding = CovariateEncoding.fit(manifest, BOTH)
    again = CovariateEncoding.from_json(json.loads(json.dumps(encoding.to_json(), sort_keys=True)))
    assert again == encoding and again.names == ("sex", "age")
    np.testing.assert_array_equal(again.encode(manifest), encoding.encode(manifest))


def test_encoding_of_what_a_stage_is_given_is_the_same_whatever_texts_say(
    manifest: pd.DataFrame, tmp_path: Path
) -> None:
    def encoded(unit: str) -> CovariateEncoding:
        declared = {"age": {"unit": unit, "range": [18, 100], "description": unit}, "sex": {"levels": ["F", "M"]}}
        raw = {
            "study": "s",
            "cohort": {"source": "simulated"},
            "covariates": declared,
            "plan": [{"name": "syn", "subjects": 1}],
        }
        return CovariateEncoding.fit(
            manifest, load_stage(freeze(parse_study(raw, "test"), "diffusion", tmp_path), "diffusion").covariates
        )

    content = encoded("year").to_json()
    assert content == encoded("a").to_json() and "unit" not in json.dumps(content)
    np.testing.assert_array_equal(
        CovariateEncoding.from_json(content).encode(manifest), encoded("year").encode(manifest)
    )


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [("age", 101.0, r"sample s0, column age: found '101'"), ("sex", "X", r"sample s0, column sex: found 'X'")],
)
def test_encoding_refuses_what_was_not_declared(manifest: pd.DataFrame, column: str, value: Any, expected: str) -> None:
    plan = pd.DataFrame({"sample_id": ["s0"], "age": [50.0], "sex": ["F"]}).assign(**{column: [value]})
    with pytest.raises(UserError, match=expected):
        CovariateEncoding.fit(manifest, BOTH).encode(plan)


@pytest.mark.parametrize(
    ("ages", "sexes", "expected"),
    [
        ([50.0, 50.0, np.nan], ["F", "M", "M"], r"covariates\.age: all 2 training values are 50.*Remove `age`"),
        (
            [50.0, np.nan, np.nan],
            ["F", "M", "M"],
            r"covariates\.age: 1 of 3 training rows have a value, at least 2 are needed.*add training scans",
        ),
        ([50.0, 60.0, 70.0], [None, None, None], r"covariates\.sex: all 3 training rows are missing it.*Remove `sex`"),
        ([50.0, 60.0, 70.0], ["F", "F", None], r"covariates\.sex: all 2 training values are F.*Remove `sex`"),
    ],
)
def test_fitting_refuses_what_cannot_be_learnt(ages: list[float], sexes: list[str | None], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        CovariateEncoding.fit(pd.DataFrame({"age": ages, "sex": sexes}), BOTH)


def test_a_level_absent_from_training_is_a_warning(manifest: pd.DataFrame, caplog: pytest.LogCaptureFixture) -> None:
    three = CategoricalCovariate(levels=["F", "M", "X"])
    with caplog.at_level(logging.WARNING):
        CovariateEncoding.fit(manifest, BOTH | {"sex": three})
    assert "covariates.sex: no training row has level X" in caplog.text


@pytest.mark.parametrize(
    "content",
    [{}, {"covariates": [{"name": "age"}]}, {"covariates": [{"name": "a", "kind": "colour"}]}, {"covariates": 3}],
)
def test_a_foreign_card_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"covariate encoding: not readable .*card\.json"):
        CovariateEncoding.from_json(content)
