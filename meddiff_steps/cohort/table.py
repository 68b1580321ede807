"""Tables: CSV, TSV and Parquet as people keep them, and cohorts given as a table of image paths."""

from __future__ import annotations

import csv
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from meddiff_steps.cohort.covariates import cell_text, is_null, require_columns, shorten
from meddiff_steps.config import Covariates, TableSource
from meddiff_steps.core.errors import UserError

#: Image formats that a table may name, longest extension first.
IMAGE_EXTENSIONS = (".nii.gz", ".nii", ".png", ".jpeg", ".jpg", ".dcm")

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def image_extension(path: str) -> str | None:
    """The image extension of a path in lower case, or None.

    >>> image_extension("a/b.NII.gz"), image_extension("notes.txt")
    ('.nii.gz', None)
    """
    return next((extension for extension in IMAGE_EXTENSIONS if path.lower().endswith(extension)), None)


def read_delimited(path: Path, delimiter: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a delimited text file, every cell as text, blank lines skipped.

    Cells between commas may be quoted, without line breaks inside; between tabs a quote is a character like any other,
    as in BIDS.

    Raises
    ------
    UserError
        The file is missing, unreadable, empty, a quote is not closed on its line, or a row is longer or shorter than
        the header.
    """
    first = 1  # line where the row that is being read begins
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(
                stream,
                delimiter=delimiter,
                strict=True,
                quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
            )
            header: list[str] = []
            rows = []
            for row in lines:
                begun, first = first, lines.line_num + 1
                if lines.line_num > begun:  # else an open quote would swallow the rows after it
                    raise UserError(_open_quote(path, begun, f"a cell goes on to line {lines.line_num}"))
                if not header:
                    header = [name.strip() for name in row]
                    if not any(header):
                        break
                    continue
                if not row or row == [""]:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {lines.line_num}: {len(row)} cells, but the header has {len(header)}. Fill the"
                        " row; write n/a where a value is missing."
                    )
                rows.append(row)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such table. Check the path in the study; relative paths start at the working directory."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, expected a table. Name the file itself.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text table in UTF-8 ({error.reason}). Save it as UTF-8.") from None
    except csv.Error as error:
        raise UserError(_open_quote(path, first, str(error))) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a table ({error}). Check its permissions and its format.") from None
    if not any(header):
        raise UserError(f"{path}: empty, expected a header line with column names. Write the table again.")
    repeated = [name for name, count in Counter(header).items() if count > 1 and name]
    if repeated:
        raise UserError(f"{path}: column {shorten(repeated)} occurs more than once. Rename or remove one.")
    return header, rows


def _open_quote(path: Path, line: int, found: str) -> str:
    return (
        f'{path}, line {line}: {found}, expected one row per line. Close the quote, write a quote inside a cell as ""'
        " or remove the line break."
    )


def load_table(path: Path) -> pd.DataFrame:
    """A CSV, TSV or Parquet file; text formats come with every cell as text, so that ids keep their leading zeros.

    Raises
    ------
    UserError
        The file is missing, unreadable, has no rows, or is of another kind.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in DELIMITERS:
        header, rows = read_delimited(path, DELIMITERS[kind])
        frame = pd.DataFrame(rows, columns=pd.Index(header), dtype="object")
    elif kind == ".parquet":
        if not path.is_file():
            raise UserError(
                f"{path}: no such table, or not a file. Check the path in the study; relative paths start at the"
                " working directory."
            )
        try:
            frame = pd.read_parquet(path)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{path}: cannot be read as Parquet ({error}). Write the table again, or save it as CSV."
            ) from None
    else:
        raise UserError(
            f"{path}: tables are .csv, .tsv or .parquet, found {kind or 'no extension'!r}. Save the table in one of"
            " these formats."
        )
    if frame.empty:
        raise UserError(f"{path}: the table has no rows, expected one per image. Write the table again.")
    return frame


def read_table(source: TableSource, covariates: Covariates) -> pd.DataFrame:
    """A cohort from a table with one row per image.

    Returns
    -------
    pandas.DataFrame
        scan_id, subject_id, session_id (None), path, and per covariate its raw cells; sorted by scan_id.  scan_id is
        the file name without extension, preceded by as many folder names as it takes to tell all images apart.

    Raises
    ------
    UserError
        The table or a column is missing, a path or subject is missing, twice there, of an unknown format, or leads to
        no file.
    """
    table = Path(source.table)
    frame = load_table(table)
    available = [str(column) for column in frame.columns if str(column)]
    hint = ""
    if len(available) == 1 and table.suffix.lower() in DELIMITERS:
        found = next((mark for mark in ";,\t" if mark in available[0]), None)
        hint = (
            f" It looks as if cells were separated by {found!r}; {table.suffix} needs"
            f" {DELIMITERS[table.suffix.lower()]!r}."
            if found
            else ""
        )
    for key, column in (("path_column", source.path_column), ("subject_column", source.subject_column)):
        if column not in available:
            raise UserError(
                f"{table}: no column {column!r}. Columns are: {', '.join(available)}.{hint} Set cohort.{key} to the"
                " right one."
            )
    columns = require_columns(covariates, available, str(table))

    listed = [cell_text(value) for value in frame[source.path_column]]
    subjects = [cell_text(value) for value in frame[source.subject_column]]
    for key, values, what in ((source.path_column, listed, "path"), (source.subject_column, subjects, "subject")):
        empty = [f"row {i}" for i, value in enumerate(values, 1) if is_null(value)]
        if empty:
            raise UserError(
                f"{table}, column {key}: {len(empty)} row(s) without a {what} ({shorten(empty)}). Fill them in, or"
                " remove the rows."
            )

    root = source.root if source.root is not None else str(table.parent)
    paths = [os.path.join(root, path) for path in listed]
    _check_paths(table, source.path_column, paths)
    content = {"scan_id": _scan_ids(table, listed), "subject_id": subjects, "session_id": None, "path": paths}
    content |= {name: frame[column].tolist() for name, column in columns.items()}
    return pd.DataFrame(content).sort_values("scan_id", ignore_index=True)


def _check_paths(table: Path, column: str, paths: Sequence[str]) -> None:
    where = f"{table}, column {column}"
    counts = Counter(os.path.normpath(path) for path in paths)
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise UserError(
            f"{where}: {len(repeated)} image(s) are listed more than once: {shorten(repeated)}. Keep one row per image."
        )
    unknown = [path for path in paths if image_extension(path) is None]
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} path(s) of an unknown format: {shorten(unknown)}. Images are"
            f" {', '.join(IMAGE_EXTENSIONS)}; convert them."
        )
    absent, folders = [], []
    for path in paths:
        try:
            if stat.S_ISDIR(os.stat(path).st_mode):
                folders.append(path)
        except OSError:
            absent.append(path)
    if absent:
        raise UserError(
            f"{where}: {len(absent)} of {len(paths)} images are not there: {shorten(absent)}. "
            "Correct the paths, or set cohort.root to the directory they start at (the table's own by default)."
        )
    if folders:
        raise UserError(
            f"{where}: {len(folders)} path(s) are directories: {shorten(folders)}. Name the image files; convert a"
            " DICOM series to NIfTI first."
        )


def _scan_ids(table: Path, listed: Sequence[str]) -> list[str]:
    """File names without extension, with as many parents in front as it takes to be unique."""
    parts = []
    for path in listed:
        whole = os.path.normpath(path)
        parts.append(whole[: -len(image_extension(whole) or "")].split(os.sep))
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part for part in some[-depth:] if part) for some in parts]
        if len(set(names)) == len(names):
            return names
    twice = [name for name, count in Counter(names).items() if count > 1]
    raise UserError(
        f"{table}: images that differ only in their extension or separators: {shorten(twice)}. Remove or rename one of"
        " each."
    )
