"""Texts of scans: from a table's cells to the manifest, their words, and what they say of a finding."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from meddiff_steps.cohort.bids import read_bids
from meddiff_steps.cohort.manifest import build_manifest, read_manifest, write_manifest
from meddiff_steps.cohort.table import read_table
from meddiff_steps.cohort.texts import clean_text, common_words, mentions, words
from meddiff_steps.config import BidsSource, ContinuousCovariate, Splits, TableSource
from meddiff_steps.core.errors import UserError

SPLITS = Splits(train=0.6, val=0, calibration=0, test=0.4)
AGE = {"age": ContinuousCovariate(unit="year", range=(0, 120))}


@pytest.mark.parametrize(
    ("text", "finding", "named"),
    [
        ("Left pleural effusion.", "effusion*", True),
        ("Bilateral EFFUSIONS", "effusion*", True),
        ("No pleural effusion, consolidation or collapse.", "collapse", False),
        ("No collapse. Consolidation of the left lung.", "consolidation", True),
        ("No collapse but consolidation", "consolidation", True),
        ("Ground-glass opacities", "ground glass", True),
        ("Glass on the ground", "ground glass", False),
        ("Clear, no abnormality", "no:abnormality", True),
        ("", "effusion", False),
    ],
)
def test_a_finding_is_named_unless_it_is_negated(text, finding, named):
    assert mentions(text, ["nothing at all", finding]) is named


def test_cells_become_one_line_or_nothing():
    assert clean_text("  Two\n lines\tand a\x00 null ") == "Two lines and a null"
    assert clean_text("Épanchement") == "Épanchement"
    assert [clean_text(cell) for cell in ("n/a", "", " . ", None, float("nan"))] == [None] * 5


def test_common_words_are_counted_by_people_and_not_by_texts():
    texts, subjects = ["effusion effusion", "effusion left", "left", "smith"], ["a", "a", "b", "b"]
    assert common_words(texts, subjects, 2) == ["left"]
    assert words("Smith's") == ["smith", "s"]


def cohort(folder: Path, texts: list[object], column: str = "report") -> TableSource:
    for i in range(len(texts)):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    rows = {"path": [f"{i}.png" for i in range(len(texts))], "subject_id": range(len(texts)), "age": range(len(texts))}
    pd.DataFrame({**rows, column: texts}).to_csv(folder / "cohort.csv", index=False)
    return TableSource(source="table", table=str(folder / "cohort.csv"))


def manifest_of(source: TableSource) -> tuple[pd.DataFrame, dict]:
    frame = read_table(source, AGE, "report")
    return build_manifest(frame, AGE, SPLITS, "seed", source="table", text_column="report")


def test_texts_are_a_column_of_the_manifest(tmp_path):
    manifest, card = manifest_of(cohort(tmp_path, ["A  consolidation", "n/a", *["Clear."] * 30]))
    write_manifest(manifest, tmp_path / "manifest.parquet")
    back = read_manifest(tmp_path / "manifest.parquet").set_index("scan_id")
    assert back.loc["0", "text"] == "A consolidation" and pd.isna(back.loc["1", "text"])
    assert card["texts"] == {"scans": 31, "subjects": 31, "distinct": 2}


def test_without_a_column_there_are_none(tmp_path):
    frame = read_table(cohort(tmp_path, ["a"] * 32), AGE)
    manifest, card = build_manifest(frame, AGE, SPLITS, "seed", source="table")
    assert "text" not in manifest and "texts" not in card


def test_a_column_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"text.column reads column 'report', which is not there. Columns are: path"):
        read_table(cohort(tmp_path, ["a"], column="note"), AGE, "report")
    with pytest.raises(UserError, match=r"'report' is empty for all 32 scans"):
        manifest_of(cohort(tmp_path, ["n/a"] * 32))


def test_participants_and_sessions_tables_hold_texts(tmp_path):
    for session in ("1", "2"):
        folder = tmp_path / f"sub-01/ses-{session}/anat"
        folder.mkdir(parents=True)
        (folder / f"sub-01_ses-{session}_T1w.nii.gz").touch()
    (tmp_path / "participants.tsv").write_text("participant_id\tage\treport\nsub-01\t40\tOf the person\n")
    (tmp_path / "sub-01/sub-01_sessions.tsv").write_text("session_id\treport\nses-2\tOf the visit\n")
    frame = read_bids(BidsSource(source="bids", root=str(tmp_path)), AGE, "report")
    assert frame["text"].tolist() == ["Of the person", "Of the visit"]
