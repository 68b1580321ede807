"""L0 of an audit, beside what `verify` does: config and records can be read, and both ledgers are written as they must
be.
"""

from __future__ import annotations

import itertools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from meddiff_steps import __version__
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import ledger, verify
from meddiff_steps.provenance.columns import canonical_lines
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import seal, versions
from meddiff_steps.release.sealed import Sealed

#: How a Parquet file names the program that wrote it, in its last bytes.
_WRITER = re.compile(rb"parquet-cpp-arrow version ([0-9.]{1,20})")
#: Most bytes that a table written by another version of pyarrow may have more, as a share.
_MORE = 0.25


def check_twins(release: Sealed) -> Iterator[Check]:
    """Config and records can be read; rows are canonical, and ledger.parquet is what is written of them."""
    yield from _check_readable(release)
    if release.study is None:
        yield Check(0, "twins", "not run", "without a config that can be read it is not known what rows hold")
        return
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder, "ledger.parquet")
        try:
            _write_again(release, again, lines)
        except (UserError, ValueError, KeyError, TypeError, OverflowError, pa.ArrowException) as error:
            yield Check(0, "twins", "finding", f"the rows cannot be written again ({error})")
            return
        yield judged(0, "canonical", lines, f"{seal.LINES} is written canonically", "line(s) are not canonical")
        yield _compared(release, again)


def _check_readable(release: Sealed) -> Iterator[Check]:
    yield judged(
        0,
        "readable",
        release.problems,
        f"config and {len(release.records)} outputs' records can be read",
        "file(s) of provenance cannot be read",
    )
    if release.unread is not None and not release.problems:
        how = "not at all" if release.study is None else "in part"
        yield Check(
            0,
            "other-version",
            "note",
            f"{seal.CONFIG} can be read {how} by version {__version__};"
            f" {versions.advice(release.version, 'to check all of it')}",
            release.unread.splitlines()[:5],
        )


def _write_again(release: Sealed, out: Path, lines: list[str]) -> None:
    """Write the table of the ledger's rows; on the way note lines that are not canonical."""
    assert release.study is not None
    first = next(release.rows(), None)
    known = set() if first is None or not release.is_other else set(verify.LATER["recipe"]) - set(first["recipe"])
    row = next(release.released(), first) or {}
    measured = ledger.measured_columns(release.study.covariates, row.get("measured") or {})
    texts = release.study.text.column is not None
    schema = ledger.public_schema(release.study.covariates, known, measured, "labels" in row, texts)

    def tables() -> Iterator[pa.Table]:
        with open(release.folder / seal.LINES, "rb") as stream:
            number = 0
            for table in ledger.as_tables(release.rows(), schema):
                written = itertools.islice(stream, len(table))
                for wanted, line in itertools.zip_longest(canonical_lines(table), written):
                    number += 1
                    if line != wanted + b"\n":
                        lines.append(f"line {number}")
                yield table

    ledger.write_ledger(tables(), schema, out)


def _compared(release: Sealed, again: Path) -> Check:
    """The table is never read: what a stranger wrote as Parquet can unpack to anything, and hide as much."""
    wanted = again.read_bytes()
    try:
        found = verify.read_bytes(release.folder, seal.TABLE, 2 * len(wanted) + verify.MOST)
    except (OSError, ValueError) as error:
        return Check(0, "twins", "finding", f"{seal.TABLE} cannot be read ({error})")
    if found == wanted:
        return Check(0, "twins", "pass", f"{seal.TABLE} is what pyarrow {pa.__version__} writes of {seal.LINES}")
    by = _WRITER.search(found[-(1 << 16) :])
    writer = by[1].decode() if by else "unknown"
    text = f"{seal.TABLE} is not what pyarrow {pa.__version__} writes of {seal.LINES}"
    if by is None or writer == pa.__version__ or len(found) > (1 + _MORE) * len(wanted) + verify.LINE:
        return Check(0, "twins", "finding", text)
    return Check(
        0,
        "twins",
        "note",
        f"{text}; by its own words pyarrow {writer} wrote it: install that one to compare, and use {seal.LINES} alone"
        " until then",
    )
