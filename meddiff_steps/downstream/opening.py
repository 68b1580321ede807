"""The test split is opened once: who opened it with which frozen design and weights is kept where no rerun
erases it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import rfc8785

from meddiff_steps.config import Downstream
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic


def frozen_digest(frozen: Mapping[str, Any]) -> str:
    """SHA-256 of everything that determines the predictions on the test split."""
    return hashlib.sha256(rfc8785.dumps(dict(frozen))).hexdigest()


def scans_digest(scans: pd.DataFrame, downstream: Downstream) -> str:
    """SHA-256 of the scans that are tested, rows of the manifest in any order: their ids, people and contents, and what
    figures go by, which is the target, the subgroup and the covariate of the shift.
    """
    shift = downstream.shift.covariate if downstream.shift else None
    names = ["scan_id", "subject_id", "content_sha256", *filter(None, (downstream.target, downstream.subgroup, shift))]
    contents = scans["content_sha256"].fillna(scans["sha256"])
    rows = scans.assign(content_sha256=contents).sort_values("scan_id")[names].to_numpy(dtype=object)
    cells = [[None if pd.isna(cell) else cell for cell in row] for row in rows]
    return frozen_digest({"columns": names, "rows": cells})


def record_opening(ledger: Path, frozen: Mapping[str, Any], opened: Mapping[str, Any]) -> dict[str, Any]:
    """Enter this opening of the test split into the study's ledger, before anything of it is read.

    Parameters
    ----------
    ledger
        A line of JSON per opening; outside the outputs of rules, so that a rerun adds to it.
    frozen
        What was fixed beforehand: digests of design, weights, samples and test scans (`test`), and the arm of the
        primary contrast.  An entry from before `test` was among them is taken for this one, and completed, where it
        says the same in all else and was of as many scans and subjects.
    opened
        What is about to be read: counts and files.

    Returns
    -------
    dict
        `frozen`, `opened`, `frozen_sha256`, `time` (UTC, of the first opening with this design), `designs`: how many
        different frozen designs have opened the test split so far.  More than one means that somebody changed the study
        after having seen its result.
    """
    entries = _read(ledger)
    digest = frozen_digest(frozen)
    before = {key: value for key, value in frozen.items() if key != "test"}
    for entry in entries:
        if entry.get("frozen") == before and entry.get("opened") == opened:
            entry.update(frozen=dict(frozen), frozen_sha256=digest)
    known = next((entry for entry in entries if entry["frozen_sha256"] == digest), None)
    if known is None:
        known = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "frozen_sha256": digest,
            "frozen": dict(frozen),
            "opened": dict(opened),
        }
        entries.append(known)
    write_atomic(ledger, "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries).encode())
    return known | {"designs": len({entry["frozen_sha256"] for entry in entries})}


def _read(ledger: Path) -> list[dict[str, Any]]:
    if not ledger.exists():
        return []
    try:
        entries = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
        assert all("frozen_sha256" in entry for entry in entries)
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"{ledger}: not readable as the record of openings of the test split ({error}). Restore it; without it"
            " nobody can say how often it was opened."
        ) from None
    return entries
