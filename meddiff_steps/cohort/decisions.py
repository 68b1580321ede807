"""What a person decided about scans after looking at them: qc.tsv."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from meddiff_steps.cohort.covariates import shorten
from meddiff_steps.cohort.table import read_delimited
from meddiff_steps.core.errors import UserError

#: Columns of the table; `note` may be left out.  The last row about a scan counts.
COLUMNS = ("scan_id", "decision", "note")
KEEP, EXCLUDE = "keep", "exclude"
#: What the quality table says of a scan that was excluded so.
EXCLUDED = "excluded by hand"


def read_decisions(path: Path, scan_ids: Collection[str]) -> dict[str, str]:
    """The scans that a table excludes, with the note beside each ("" for none).

    Parameters
    ----------
    path
        Tab-separated, with a heading: `scan_id`, `decision` (`keep` or `exclude`) and perhaps `note`.
    scan_ids
        Of the cohort.

    Raises
    ------
    UserError
        The table cannot be read, lacks a column, has another decision, or names a scan that is not of the cohort: a
        misspelt scan would silently stay in.
    """
    header, rows = read_delimited(Path(path), "\t")
    missing = [name for name in COLUMNS[:2] if name not in header]
    if missing:
        raise UserError(
            f"{path}: no column {missing[0]} (columns: {', '.join(header)}), expected scan_id, decision and perhaps"
            " note, with tabs between them."
        )
    known, excluded, unknown = set(scan_ids), dict[str, str](), list[str]()
    for line, cells in rows:
        row = dict(zip(header, cells, strict=True))
        scan, decision = row["scan_id"].strip(), row["decision"].strip().lower()
        if decision not in (KEEP, EXCLUDE):
            raise UserError(f"{path}, line {line}: decision {row['decision']!r}, expected {KEEP} or {EXCLUDE}.")
        if scan not in known:
            unknown.append(scan)
        elif decision == KEEP:
            excluded.pop(scan, None)
        else:
            excluded[scan] = row.get("note", "").strip()
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} scans are not of the cohort: {shorten(unknown)}. Write scan_id as"
            " preprocessed/qc.parquet does, and take out scans that the cohort has no more."
        )
    return excluded
