"""L0 of an audit, beside what `verify` does: config and records can be read, and both ledgers hold the same rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pyarrow as pa

from meddiff_steps import __version__
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import ledger
from meddiff_steps.provenance.columns import canonical_lines
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import seal, versions
from meddiff_steps.release.sealed import Sealed


def check_twins(release: Sealed) -> list[Check]:
    """Config and records can be read, and ledger.parquet holds the same rows as ledger.jsonl, which are canonical."""
    differ: list[str] = []
    try:
        differ += _differences(release)
    except (UserError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        differ.append(str(error))
    twins = judged(
        0,
        "twins",
        differ,
        "ledger.parquet and ledger.jsonl hold the same canonical rows",
        "row(s) differ between ledger.parquet and ledger.jsonl",
    )
    return [*_check_readable(release), twins]


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


def _differences(release: Sealed) -> Iterator[str]:
    """Rows that differ between table and lines; on the way `release` learns which weights they name."""
    number = 0
    with open(release.folder / seal.LINES, "rb") as lines:
        for table in ledger.read_tables(release.folder / seal.TABLE):
            # Equal bytes: the same row, and canonical.
            for expected, name, line in itertools.zip_longest(
                canonical_lines(table), table["sample_id"].to_pylist(), itertools.islice(lines, len(table))
            ):
                number += 1
                if line is None or line.removesuffix(b"\n") != expected:
                    yield f"line {number} ({name})"
            release.count_weights(table)
        for extra, _ in enumerate(lines, start=1):
            yield f"line {number + extra}: not in {seal.TABLE}"
