"""Words and tables of the page."""

import pandas as pd
import pytest

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate
from meddiff_steps.report.page import Card, Headline, Section, Table, render
from meddiff_steps.report.tables import covariate_table, extrapolation_table, quality_control, subgroup_table
from meddiff_steps.report.wording import interval, number, percent


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (31740, "31,740"),
        (1388.9, "1,389"),
        (0.94231, "0.942"),
        (29.6501, "29.7"),
        (0.0, "0"),
        (2.5e-7, "2.5e-07"),
        (None, "not defined"),
        (1, "1"),
        (-5.3, "-5.30"),
    ],
)
def test_numbers_read_well(value: float | None, text: str) -> None:
    assert number(value) == text


def test_figures_read_well() -> None:
    figure = {"value": 0.9423, "low": 0.93, "high": 0.9512, "n": 3}
    assert interval(figure) == "0.942 [0.930, 0.951]"
    assert percent(figure) == "94 % [93, 95]"
    assert interval({"value": None, "low": None, "high": None}) == percent(None) == "not defined"
    assert interval({"value": 0.5, "low": None, "high": None}) == "0.500"


def page(**changes: object) -> str:
    content = {
        "title": "T",
        "study": "s",
        "lead": "l",
        "simulated": False,
        "headline": [Headline("1", "w")],
        "sections": [],
    } | changes
    return render(**content).decode()  # type: ignore[arg-type]


def test_all_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    sections = [
        Section(
            "a",
            evil,
            text=[evil],
            tables=[Table([evil], [[evil]])],
            cards=[Card(evil, {evil: evil, "list": [evil, {"k": evil}]})],
        )
    ]
    text = page(title=evil, lead=evil, headline=[Headline(evil, evil, evil)], sections=sections)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 10


def test_cards_show_figures_nested_values_and_long_lists() -> None:
    figure = {"value": 29.5, "low": 29.0, "high": 30.0, "n": 12}
    content = {
        "psnr": figure,
        "shape": [8, 10],
        "empty": {},
        "none": None,
        "flag": True,
        "long": list(range(100)),
        "rows": [[1, 2], [3, 4]],
    }
    text = page(sections=[Section("c", "Cards", cards=[Card("Model", content)])])
    for expected in (
        "29.50 [29.00, 30.00], n 12",
        "8, 10",
        "yes",
        "100 values",
        "<summary>Model</summary>",
        "<li>1, 2</li>",
    ):
        assert expected in text


def test_simulated_data_are_announced_and_empty_sections_left_out() -> None:
    assert "SIMULATED training data" in page(simulated=True)
    assert "SIMULATED" not in page()
    assert "Nothing here" not in page(sections=[Section("x", "Nothing here")])


def test_covariate_table_counts_subjects_levels_and_missing_values() -> None:
    manifest = pd.DataFrame(
        {
            "subject_id": ["a", "a", "b"],
            "split": ["train", "train", "test"],
            "age": [40.0, None, 60.0],
            "sex": ["F", "F", "M"],
        }
    )
    covariates = {
        "age": ContinuousCovariate(unit="year", range=(0, 100)),
        "sex": CategoricalCovariate(levels=["F", "M"]),
    }
    rows = {
        r[0]: r[1:]
        for r in covariate_table(manifest, pd.DataFrame({"age": [50.0, 52.0], "sex": ["F", None]}), covariates).rows
    }
    assert rows["subjects"] == ["1", "0", "0", "1", "2"]
    assert rows["scans"] == ["2", "0", "0", "1", "2"]
    assert rows["age missing"][0] == "1"
    assert rows["age, year"][1] == "–"
    assert rows["sex = F"][0] == "2 (100 %)"
    assert rows["sex = F"][4] == "1 (100 %)"


def test_quality_control_tells_what_was_left_out() -> None:
    qc = pd.DataFrame(
        {
            "scan_id": ["a", "b", "c"],
            "status": ["ok", "ok", "left out"],
            "reason": [None, None, "NaN voxels"],
            "shape": ["[4, 4]", "[4, 4]", None],
        }
    )
    text, tables = quality_control(qc.assign(cut_off_share=[0.0, 0.02, None]))
    assert text[0] == "2 of 3 scans preprocessed, 1 left out."
    assert "4, 4 (2)" in text[1]
    assert "at most 2.00 % (b)" in text[2]
    assert tables[0].rows == [["NaN voxels", "1", "c"]]
    assert quality_control(qc[:2])[1] == []


def test_requests_beyond_training_and_small_subgroups_are_named() -> None:
    figure = {"value": 2.0, "low": 1.0, "high": 3.0, "n": 7}
    metrics = {"age": {"unit": "year", "extrapolation": {"mae": figure, "bias": figure}}, "size": {"unit": "mL"}}
    assert extrapolation_table(metrics, {"age": [40.0, 89.5]}).rows == [
        ["age", "40.0 to 89.5 year", "7", "2.00 [1.00, 3.00]", "2.00 [1.00, 3.00]"]
    ]
    table = subgroup_table({"sex": {"F": {"images": {"synthetic": 9, "real": 1200}, "covariates": {}}}})
    assert table.rows == [["sex = F", "too few images", "", "", "", "9 / 1,200"]]
