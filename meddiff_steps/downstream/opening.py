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

import rfc8785

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic


def frozen_digest(frozen: Mapping[str, Any]) -> str:
    """SHA-256 of everything that determines the predictions on the test split."""
    return hashlib.sha256(rfc8785.dumps(dict(frozen))).hexdigest()


def record_opening(ledger: Path, frozen: Mapping[str, Any], opened: Mapping[str, Any]) -> dict[str, Any]:
    """Enter this opening of the test split into the study's ledger, before anything of it is read.

    Parameters
    ----------
    ledger
        A line of JSON per opening; outside the outputs of rules, so that a rerun adds to it.
    frozen
        What was fixed beforehand: digests of design, weights and samples, and the arm of the primary contrast.
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
