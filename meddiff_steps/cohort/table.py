"""Tables: CSV, TSV and Parquet as people keep them, and cohorts given as a table of image paths."""

from __future__ import annotations

import csv
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import pandas as pd
import pyarrow as pa

from meddiff_steps.cohort.covariates import cell_text, is_null, require_columns, shorten
from meddiff_steps.cohort.identity import identity_key
from meddiff_steps.cohort.texts import text_columns
from meddiff_steps.config import Covariates, TableSource
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.pointers import not_fetched

#: Image formats that a table may name, longest extension first.
IMAGE_EXTENSIONS = (".nii.gz", ".nii", ".png", ".jpeg", ".jpg", ".dcm")

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TOO_FEW = "Fill the row; write n/a where a value is missing."
_TOO_MANY = (
    "Remove what is too much (a delimiter at the end counts, too), or name the column (R writes names of rows without"
    " one: row.names = FALSE)."
)
_TAB_CELL = re.compile(r'(?:^|\t)(?:"((?:[^"]|"")*)"(?=\t|$)|([^\t]*))')


def image_extension(path: str) -> str | None:
    """The image extension of a path in lower case, or None.

    >>> image_extension("a/b.NII.gz"), image_extension("notes.txt")
    ('.nii.gz', None)
    """
    return next((extension for extension in IMAGE_EXTENSIONS if path.lower().endswith(extension)), None)


def read_delimited(path: Path, delimiter: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header of a delimited text file, and its rows with their lines, every cell as text.

    Blank lines, and rows whose cells are all empty, are skipped.  A cell may be quoted, with "" for a quote inside, but
    not go over several lines.  Between tabs, as BIDS has it, quotes are needed around a tab alone, and one that does
    not enclose a cell is a character like any other.

    Raises
    ------
    UserError
        The file is missing, not fetched, unreadable, empty, a quote is not closed on its line, or a row is longer or
        shorter than the header.
    """
    if told := not_fetched(path):
        raise UserError(f"{path}: is {told}.")
    header: list[str] = []
    rows = []
    try:
        with open(path, encoding="utf-8-sig", newline="" if delimiter == "," else None) as stream:
            for line, row in _comma_rows(path, stream) if delimiter == "," else _tab_rows(stream):
                if not header:
                    header = [name.strip() for name in row]
                    if not any(header):
                        break
                    continue
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}, line {line}: {len(row)} cells, but the header has {len(header)}. "
                        + (_TOO_FEW if len(row) < len(header) else _TOO_MANY)
                    )
                rows.append((line, row))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such table. Check the path in the study; relative paths start at the working directory."
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory, expected a table. Name the file itself.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text table in UTF-8 ({error.reason}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a table ({error}). Check its permissions and its format.") from None
    if not any(header):
        raise UserError(f"{path}: empty, expected a header line with column names. Write the table again.")
    repeated = [name for name, count in Counter(header).items() if count > 1 and name]
    if repeated:
        raise UserError(f"{path}: column {shorten(repeated)} occurs more than once. Rename or remove one.")
    return header, rows


def _comma_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Lines and cells of a table between commas."""
    first = 1  # line where the row that is being read begins
    lines = csv.reader(stream, strict=True)
    try:
        for row in lines:
            if lines.line_num > first:  # an open quote would swallow the rows after it
                raise UserError(_open_quote(path, first, f"a cell goes on to line {lines.line_num}"))
            yield first, row
            first = lines.line_num + 1
    except csv.Error as error:
        raise UserError(_open_quote(path, first, str(error))) from None


def _tab_rows(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Lines and cells of a table between tabs; where quotes would give another number of cells than the header has,
    and the tabs alone the right one, the quotes are characters.
    """
    width = None
    for number, line in enumerate(stream, 1):
        text = line.rstrip("\n")
        cells, plain = tab_cells(text), text.split("\t")
        yield number, plain if len(cells) != width == len(plain) else cells
        width = width or len(cells)


def tab_cells(line: str) -> list[str]:
    """The cells of a line between tabs, without the quotes that enclose a cell.

    >>> tab_cells('sub-01\\t"moved\\ta lot"\\t5" tall\\t"a ""b"" c"')
    ['sub-01', 'moved\\ta lot', '5" tall', 'a "b" c']
    """
    return [quoted.replace('""', '"') or plain for quoted, plain in _TAB_CELL.findall(line)]


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
        frame = pd.DataFrame([row for _, row in rows], columns=pd.Index(header), dtype="object")
    elif kind == ".parquet":
        if told := not_fetched(path):
            raise UserError(f"{path}: is {told}.")
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


def read_table(source: TableSource, covariates: Covariates, text_column: str | None = None) -> pd.DataFrame:
    """A cohort from a table with one row per image; its `text_column`, if there is one, becomes the column `text`.

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
    columns = require_columns(covariates, available, str(table)) | text_columns(text_column, available, str(table))

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
    if linked := [f"{path} is {told}" for path in absent if (told := not_fetched(path))]:
        raise UserError(f"{where}: {len(linked)} image(s) are not there: {linked[0]}.")
    if absent:
        near = next((found for path in absent if (found := _near(path))), None)
        hint = f"There is {near}: capitals, zeros, accents and slashes count. " if near else ""
        raise UserError(
            f"{where}: {len(absent)} of {len(paths)} images are not there: {shorten(absent)}. {hint}"
            "Correct the paths, or set cohort.root to the directory they start at (the table's own by default)."
        )
    if folders:
        raise UserError(
            f"{where}: {len(folders)} path(s) are directories: {shorten(folders)}. Name the image files; convert a"
            " DICOM series to NIfTI first."
        )


def _near(path: str) -> str | None:
    """A file whose name differs in spelling alone from that of one that is not there."""
    folder, name = os.path.split(path.replace("\\", "/"))  # of Windows
    try:
        found = next((other for other in sorted(os.listdir(folder)) if identity_key(other) == identity_key(name)), None)
    except OSError:
        return None
    return found and os.path.join(folder, found)


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
