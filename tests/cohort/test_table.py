"""Cohorts given as a table of image paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from meddiff_steps.cohort.table import load_table, read_table
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariates, TableSource
from meddiff_steps.core.errors import UserError

COVARIATES: Covariates = {
    "age": ContinuousCovariate(unit="year", range=(0, 120)),
    "abnormal": CategoricalCovariate(levels=["0", "1"]),
}

CXR = (
    Path(os.environ.get("MEDDIFF_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
    / "cxr"
    / "participants.csv"
)

ROWS: list[dict[str, Any]] = [
    {"path": "images/a_000.png", "subject_id": "007", "age": 40, "abnormal": 0},
    {"path": "images/a_001.PNG", "subject_id": "007", "age": 41, "abnormal": 1},
    {"path": "images/b.jpeg", "subject_id": "8", "age": None, "abnormal": 0},
    {"path": "scans/c.nii.gz", "subject_id": "9", "age": 50, "abnormal": None},
    {"path": "scans/d.dcm", "subject_id": "10", "age": 60, "abnormal": 1},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row in ROWS:
        path = tmp_path / str(row["path"])
        path.parent.mkdir(exist_ok=True)
        path.touch()
    pd.DataFrame(ROWS).to_csv(tmp_path / "cohort.csv", index=False)
    return tmp_path


def read(folder: Path, name: str = "cohort.csv", covariates: Covariates = COVARIATES, **fields: Any) -> pd.DataFrame:
    return read_table(
        TableSource.model_validate({"source": "table", "table": str(folder / name), **fields}), covariates
    )


@pytest.mark.parametrize("name", ["cohort.csv", "cohort.tsv", "cohort.parquet"])
def test_all_formats_give_the_same_cohort(folder: Path, name: str) -> None:
    frame = pd.DataFrame(ROWS)
    if name.endswith(".parquet"):
        frame.to_parquet(folder / name)
    else:
        frame.to_csv(folder / name, index=False, sep="\t" if name.endswith(".tsv") else ",")
    read_back = read(folder, name)
    assert list(read_back.columns) == ["scan_id", "subject_id", "session_id", "path", "age", "abnormal"]
    assert read_back["scan_id"].tolist() == ["a_000", "a_001", "b", "c", "d"]
    assert read_back["subject_id"].tolist() == ["007", "007", "8", "9", "10"]
    assert read_back["session_id"].isna().all()
    assert read_back["path"][0] == f"{folder}/images/a_000.png"


def test_between_tabs_a_quote_is_a_character_and_no_row_is_lost(tmp_path: Path) -> None:
    (tmp_path / "cohort.tsv").write_text(
        "path\tnote\n" + "".join(f"{i}.png\t{note}\n" for i, note in enumerate(['"5 ft', "ok", '6"', '"x" y']))
    )
    assert load_table(tmp_path / "cohort.tsv")["note"].tolist() == ['"5 ft', "ok", '6"', '"x" y']


def test_quotes_that_enclose_a_cell_between_tabs_are_no_part_of_it(tmp_path: Path) -> None:
    """BIDS quotes cells that hold tabs, R and spreadsheets all; a pair that would swallow a tab is none."""
    lines = ['"path"\t"note"', '0.png\t"a\tb"', '1.png\t"say ""no"""', '2.png\t""', '"3.png\t"', "\t", ""]
    (tmp_path / "cohort.tsv").write_text("\n".join(lines))
    assert load_table(tmp_path / "cohort.tsv").values.tolist() == [
        ["0.png", "a\tb"],
        ["1.png", 'say "no"'],
        ["2.png", ""],
        ['"3.png', '"'],
    ]


@pytest.mark.parametrize("ending", [".tsv", ".csv"])
def test_what_pandas_writes_is_read(tmp_path: Path, ending: str) -> None:
    """As the release writes participants.tsv."""
    cells = ['rare, "odd"', '"', '""', 'a"b', '"a" b', "a\tb", "a,b", "5' 6\"", "n/a", "x"]
    frame = pd.DataFrame({"path": [f"{i}.png" for i in range(len(cells))], "level": cells})
    frame.to_csv(tmp_path / f"t{ending}", sep="\t" if ending == ".tsv" else ",", index=False, lineterminator="\n")
    pd.testing.assert_frame_equal(load_table(tmp_path / f"t{ending}"), frame)


def test_quoted_cells_between_commas(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_bytes(b'path,"note"\r\n"a,b.png","say ""no"""\r\n\r\nc.png,5" tall\r\n')
    assert load_table(tmp_path / "cohort.csv").values.tolist() == [["a,b.png", 'say "no"'], ["c.png", '5" tall']]


def test_an_index_column_that_pandas_wrote_does_no_harm(folder: Path) -> None:
    pd.DataFrame(ROWS).to_csv(folder / "cohort.csv")
    assert len(read(folder)) == 5


def test_numeric_subjects_are_the_same_text_from_every_format(folder: Path) -> None:
    rows = [row | {"subject_id": float(i)} for i, row in enumerate(ROWS)]
    pd.DataFrame(rows).to_parquet(folder / "cohort.parquet")
    assert read(folder, "cohort.parquet")["subject_id"].tolist() == ["0", "1", "2", "3", "4"]


def test_a_root_moves_relative_paths_and_leaves_absolute_ones(folder: Path, tmp_path: Path) -> None:
    rows = [row | {"path": str(row["path"]).removeprefix("images/")} for row in ROWS[:2]] + [
        ROWS[2] | {"path": str(folder / "images/b.jpeg")}
    ]
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    assert read(folder, root=str(folder / "images"))["path"].tolist() == [
        f"{folder}/images/{n}" for n in ("a_000.png", "a_001.PNG", "b.jpeg")
    ]


def test_equal_file_names_get_their_folder_in_front(folder: Path) -> None:
    rows = []
    for subject in ("p1", "p2"):
        (folder / subject).mkdir()
        (folder / subject / "scan.nii.gz").touch()
        rows.append({"path": f"{subject}/scan.nii.gz", "subject_id": subject, "age": 1, "abnormal": 0})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    assert read(folder)["scan_id"].tolist() == ["p1_scan", "p2_scan"]


def test_a_path_that_is_nearly_there_is_told(folder: Path) -> None:
    (folder / "images/a_000.png").rename(folder / "images/A_0.png")
    with pytest.raises(UserError, match=r"There is .*images/A_0\.png: capitals, zeros, accents and slashes count"):
        read(folder)


def test_paths_of_windows_are_told(folder: Path) -> None:
    spoilt_path("images\\\\a_001.PNG")(folder)
    with pytest.raises(UserError, match=r"1 of 5 images are not there: .* There is .*images/a_001\.PNG"):
        read(folder)


def test_images_that_were_not_fetched_are_told_with_the_command(folder: Path) -> None:
    (folder / "images/a_000.png").unlink()
    (folder / "images/a_000.png").symlink_to("../.git/annex/objects/nowhere")
    with pytest.raises(UserError, match=r"1 image\(s\) are not there: .*a_000\.png is a link to nothing.*datalad get"):
        read(folder)


@pytest.mark.parametrize("name", ["cohort.tsv", "cohort.csv", "cohort.parquet"])
def test_a_table_that_was_not_fetched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(UserError, match="pointer of Git LFS.*git lfs pull"):
        load_table(tmp_path / name)


def text(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "cohort.csv").write_text(content)


def spoilt_path(value: object, row: int = 1) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        rows = [dict(r) for r in ROWS]
        rows[row]["path"] = value
        pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)

    return spoil


def replace_by_directory(folder: Path) -> None:
    (folder / "cohort.csv").unlink()
    (folder / "cohort.csv").mkdir()


def series(folder: Path) -> None:
    (folder / "series.dcm").mkdir()
    spoilt_path("series.dcm")(folder)


def two_formats(folder: Path) -> None:
    (folder / "images/b.png").touch()
    spoilt_path("images/b.png")(folder)


HEADER = "path,subject_id,age,abnormal\n"

#: How the table is spoilt, and what the message must contain: the file or field, what was found, and the remedy.
SPOILT: list[tuple[str, Callable[[Path], object], list[str]]] = [
    ("no table", lambda f: (f / "cohort.csv").unlink(), ["cohort.csv", "no such table", "Check the path"]),
    ("table is a directory", replace_by_directory, ["cohort.csv is a directory", "Name the file"]),
    ("empty file", text(""), ["cohort.csv", "empty", "header"]),
    ("header only", text(HEADER), ["cohort.csv", "no rows", "one per image"]),
    (
        "no path column",
        text("file,subject_id,age,abnormal\nx.png,1,2,0\n"),
        ["cohort.csv", "no column 'path'", "file, subject_id", "cohort.path_column"],
    ),
    (
        "no subject column",
        text("path,patient,age,abnormal\nx.png,1,2,0\n"),
        ["no column 'subject_id'", "path, patient", "cohort.subject_column"],
    ),
    (
        "semicolons",
        text("path;subject_id;age;abnormal\nx.png;1;2;0\n"),
        ["no column 'path'", "separated by ';'", "needs ','"],
    ),
    (
        "covariate column missing",
        text("path,subject_id,Age,abnormal\nx.png,1,2,0\n"),
        ["cohort.csv", "covariates.age", "'age'", "Age", "covariates.age.column"],
    ),
    ("long row", text(HEADER + "x.png,1,2,0,9\n"), ["cohort.csv, line 2", "5 cells", "header has 4"]),
    (
        "quote left open",
        text(HEADER + 'x.png,1,"2,0\ny.png,2,3,0\n'),
        ["cohort.csv, line 2", "unexpected end", "Close the quote"],
    ),
    (
        "quote closed rows later",
        text(HEADER + 'w.png,0,1,0\nx.png,1,2,"0\ny.png,2,3,0\nz.png,3,4,0"\n'),
        ["cohort.csv, line 3", "goes on to line 5", "Close the quote"],
    ),
    (
        "text after a quote",
        text(HEADER + 'x.png,1,2,0\ny.png,"2"a,3,0\n'),
        ["cohort.csv, line 3", "expected after", "Close the quote"],
    ),
    (
        "header left open",
        text('path,subject_id,age,"abnormal\nx.png,1,2,0\n'),
        ["cohort.csv, line 1", "Close the quote"],
    ),
    ("path left empty", spoilt_path(""), ["column path", "1 row(s) without a path", "row 2", "Fill them in"]),
    (
        "subject left empty",
        text(HEADER + "images/a_000.png,n/a,2,0\n"),
        ["column subject_id", "without a subject", "row 1", "Fill them in"],
    ),
    (
        "duplicate path",
        spoilt_path("images/../images/a_000.png"),
        ["column path", "listed more than once", "a_000.png", "one row per image"],
    ),
    (
        "file does not exist",
        spoilt_path("images/nowhere.png"),
        ["column path", "1 of 5 images", "images/nowhere.png", "cohort.root"],
    ),
    ("unknown format", spoilt_path("images/a.bmp"), ["unknown format", "images/a.bmp", ".png", "convert"]),
    ("a directory", series, ["directories", "series.dcm", "Name the image files"]),
    ("same name, two formats", two_formats, ["images_b", "rename one"]),
]


@pytest.mark.parametrize(("spoil", "expected"), [pytest.param(s, e, id=name) for name, s, e in SPOILT])
def test_spoilt_tables_are_refused_with_a_remedy(
    folder: Path, spoil: Callable[[Path], object], expected: list[str]
) -> None:
    spoil(folder)
    with pytest.raises(UserError) as refusal:
        read(folder)
    for part in expected:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "cohort.parquet",
            b"PAR1 but then nothing",
            r"cohort\.parquet: cannot be read as Parquet .* Write the table again",
        ),
        ("cohort.parquet", None, r"cohort\.parquet: no such table"),
        ("cohort.xlsx", b"PK", r"cohort\.xlsx: tables are \.csv, \.tsv or \.parquet, found '\.xlsx'\. Save the table"),
        ("cohort.csv", b"path\n\xff\xfe\n", r"cohort\.csv: not a text table in UTF-8 .* Save it as UTF-8"),
        ("cohort.csv", b"path,path\n1,2\n", r"cohort\.csv: column path occurs more than once\. Rename"),
    ],
)
def test_unreadable_tables_are_refused(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_table(tmp_path / name)


@pytest.mark.skipif(not CXR.is_file(), reason=f"real data not found at {CXR}; set MEDDIFF_SHARED_DATA")
def test_the_real_table() -> None:
    frame = read(CXR.parent, CXR.name, path_column="image", subject_column="patient_id")
    assert (len(frame), frame["subject_id"].nunique()) == (1000, 264)
    assert frame["scan_id"].is_unique and frame["scan_id"][0] == "00000001_000"
