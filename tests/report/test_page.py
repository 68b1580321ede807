"""Words and tables of the page."""

import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate
from meddiff_steps.report import glossary, names
from meddiff_steps.report.names import Names
from meddiff_steps.report.page import AUTHORS, SOFTWARE, Card, Section, Table, render
from meddiff_steps.report.sentences import Sentence
from meddiff_steps.report.tables import covariate_table, extrapolation_table, quality_control, subgroup_table
from meddiff_steps.report.wording import interval, limit, number, p_value, percent

ROOT = Path(__file__).parents[2]


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
    assert percent({"value": 0.996, "low": 0.9799, "high": 1.0}) == "99.6 % [98, 100]"
    assert percent({"value": 0.00496, "low": 0.0, "high": 0.0002}) == "0.5 % [0, < 0.1]"
    assert [percent({"value": v}) for v in (0.0, 1.0, 0.9998, 1.0002, 1.004, -0.0002)] == [
        *("0 %", "100 %", "> 99.9 %", "100 %", "100.4 %", "0 %")
    ]
    assert interval({"value": None, "low": None, "high": None}) == percent(None) == "not defined"
    assert interval({"value": 0.5, "low": None, "high": None}) == "0.500"
    few = {"value": 1.0, "low": None, "high": None, "n": 33, "too_few": 3}
    assert interval(few) == "1.00 (no interval: 3 on one side, too few)"


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (0.102, 0.0, 0.255, "0.10 [0.00, 0.26]"),
        (0.025, 0.005, 0.045, "0.025 [0.005, 0.045]"),
        (38.59, 36.19, 41.47, "38.6 [36.2, 41.5]"),
        (17278.0, 16000.0, 18500.0, "17,278 [16,000, 18,500]"),
        (-0.0004, -0.3, 0.3, "0.00 [-0.30, 0.30]"),
        (0.5, 0.5, 0.5, "0.50 [0.50, 0.50]"),
        (0.0, 0.0, 0.0, "0 [0, 0]"),
    ],
)
def test_a_figure_has_the_decimals_that_its_interval_has_a_use_for(
    value: float, low: float, high: float, text: str
) -> None:
    assert interval({"value": value, "low": low, "high": high}) == text


def test_limits_and_chances_have_no_digits_that_nobody_meant() -> None:
    assert (limit(0.1), limit(59.0), p_value(0.000999), p_value(0.34083), p_value(None)) == (
        "0.1",
        "59",
        "0.001",
        "0.34",
        "not defined",
    )


def page(**changes: object) -> str:
    content = {
        "title": "T",
        "study": "s",
        "lead": "l",
        "simulated": False,
        "sentences": [Sentence("Privacy", "bad", "FAIL", "w.")],
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
            tables=[Table([evil], [[evil]], evil)],
            cards=[Card(evil, {evil: evil, "list": [evil, {"k": evil}]})],
        )
    ]
    text = page(title=evil, lead=evil, sentences=[Sentence(evil, "good", evil, evil)], sections=sections)
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
        for r in covariate_table(
            manifest, pd.DataFrame({"age": [50.0, 52.0], "sex": ["F", None]}), covariates, Names()
        ).rows
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
    assert extrapolation_table(metrics, {"age": [40.0, 89.5]}, Names({"age": "Age at scan"})).rows == [
        ["Age at scan", "40.0 to 89.5 year", "7", "2.0 [1.0, 3.0]", "2.0 [1.0, 3.0]"]
    ]
    table = subgroup_table({"sex": {"F": {"images": {"synthetic": 9, "real": 1200}, "covariates": {}}}}, Names())
    assert table.rows == [["sex = F", "too few images", "", "", "", "9 / 1,200"]]


def test_covariates_are_called_as_the_study_describes_them() -> None:
    def number_(description: str) -> ContinuousCovariate:
        return ContinuousCovariate(unit="mL", range=(0, 9), description=description)

    called = names.of(
        {
            "csf_ml": number_("Ventricular CSF (field 25004)"),
            "age": number_("Age at scan. In years, as the clinic wrote it down"),
            "a_b": number_(""),
            "long": number_("a" * 41),
            "one": number_("Volume"),
            "two": number_("volume; of the other side"),
        }
    )
    assert called.covariates == {
        "csf_ml": "Ventricular CSF",
        "age": "Age at scan",
        "a_b": "a b",
        "long": "long",
        "one": "one",
        "two": "two",
    }
    assert called.pair("age~a_b = x_y") == "Age at scan and a b = x_y"
    assert called.gate("inference of csf_ml") == "inference of Ventricular CSF"
    assert called.gate("singling out by covariates") == "singling out by covariates"
    assert called.gate("planned subjects are filled") == "planned subjects left without an image"  # what its figure is


def test_feature_spaces_and_metrics_have_names_and_unknown_ones_their_key() -> None:
    assert names.space("structure") == "fine structure" != names.space("radiomics")
    assert names.metric("classifier_auc").startswith("AUC")
    assert (names.space("medical_net"), names.metric("my_own"), names.detector("mine")) == (
        "medical net",
        "my own",
        "mine",
    )


def test_the_glossary_has_the_words_of_the_page_and_no_others() -> None:
    text = page(sections=[Section("a", "A", text=["Recall is 0.9 at its ceiling."])])
    shown = re.findall(r"<dt>([^<]*)</dt>", text.split('id="glossary"')[1])
    assert {"recall", "ceiling"} <= set(shown)
    assert not {"Dice", "Nyquist", "segmenter", "p"} & set(shown)
    assert '"#glossary"' in text
    assert set(glossary.used_in("Candidates of both kinds")) >= {"candidate", "filter"}  # what a meaning uses, too
    assert "r" not in glossary.used_in("for four hours") and "r" in glossary.used_in("r 0.9")
    assert "floor" not in glossary.used_in("floor-plan")


def test_docs_have_the_glossary_of_the_report() -> None:
    assert glossary.table() in (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), (
        "docs/glossary.md: put what `python -c 'from meddiff_steps.report import glossary; print(glossary.table())'`"
        " prints in place of its first table"
    )
    assert list(glossary.TERMS) == sorted(glossary.TERMS, key=str.lower)


def test_the_footer_says_of_which_code_and_how_to_cite() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["title"], [author["name"] for author in citation["authors"]]) == (SOFTWARE, [AUTHORS])
    footer = page(code={"commit": "ab" * 20, "dirty": True}).split("<footer>")[1]
    assert f"commit {'ab' * 20}, with changes of its own" in footer
    assert f"{SOFTWARE}, version {citation['version']}" in footer
    assert "changes" not in page(code={"commit": "ab" * 20, "dirty": False}).split("<footer>")[1]
    assert "commit not known" in page()


def test_figures_and_tables_are_numbered_and_grades_can_be_told_without_colours() -> None:
    twice = [Table(["a"], [["1"]], "First of all."), Table(["a"], []), Table(["a"], [["2"]], "Then.")]
    text = page(sections=[Section("x", "X", parts=[Section("y", "Y", tables=twice), Section("z", "Z")])])
    assert "<b>Table 1.</b> First of all." in text and "<b>Table 2.</b> Then." in text and "Table 3" not in text
    assert "<h3>Y</h3>" in text and "<h3>Z</h3>" not in text
    assert re.search(r'<li class="bad">.*?✗</span> bad</span>', text)
