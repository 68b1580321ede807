"""L4 of an audit, with the private ledger: the release commits to it, and the public one agrees with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from meddiff_steps.audit.recipes import Outcome
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import ledger, verify
from meddiff_steps.provenance.columns import canonical_lines
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release.sealed import Sealed


def check_private(release: Sealed, private: Path | None, outcomes: Mapping[str, Outcome]) -> Check:
    """The private ledger is the one that the release commits to, and agrees with the public one."""
    name = "private-ledger"
    if private is None:
        return Check(4, name, "not run", "no private ledger: give --private")
    candidates = _Candidates(outcomes)
    try:
        for table in ledger.read_tables(private):
            candidates.look(table)
    except (UserError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        return Check(4, name, "finding", f"{private} cannot be read as the private ledger ({error})")
    wrong = [*candidates.wrong, *candidates.unlike(release.root["private_ledger"])]
    good = f"{len(candidates.leaves)} candidates; decisions follow from similarities and limits"
    return judged(4, name, wrong, good, "problem(s) with the private ledger")


class _Candidates:
    """Rows of the private ledger, a table at a time."""

    def __init__(self, outcomes: Mapping[str, Outcome]) -> None:
        self.outcomes = outcomes
        self.leaves: list[bytes] = []
        self.wrong: list[str] = []
        self._accepted: dict[str, tuple[int, str]] = {}
        self._tries: Counter[str] = Counter()
        self._limits: dict[str, Any] = {}

    def look(self, table: pa.Table) -> None:
        """Add a table."""
        self.leaves += map(verify.leaf_hash, canonical_lines(table))
        names, tried, decided, keys = (
            table[name].to_pylist() for name in ("sample_id", "attempt", "decision", "seed_key")
        )
        self._tries.update(names)
        for name, limit in zip(names, table["limit"].to_pylist(), strict=True):
            group = self.outcomes[name][3] if name in self.outcomes else ""
            if self._limits.setdefault(group, limit) != limit:
                limits = self._limits[group]
                self.wrong.append(f"{name}: limits {limit}, those of its subgroup {group!r} are {limits}")
        self._accepted |= {
            name: (attempt, key)
            for name, attempt, key, decision in zip(names, tried, keys, decided, strict=True)
            if decision == "accepted"
        }
        for row in table.filter(_to_look_at(table)).to_pylist():
            who = f"{row['sample_id']}, attempt {row['attempt']}"
            self.wrong += [f"{who}: {problem}" for problem in _candidate_problems(row)]

    def unlike(self, sealed: Mapping[str, Any]) -> Iterator[str]:
        """When all are there: differences from what is sealed."""
        if verify.merkle_root(self.leaves).hex() != sealed.get("root") or len(self.leaves) != sealed.get("rows"):
            yield "its root is not the one that root.json commits to"
        for name, (attempt, key, attempts, _) in self.outcomes.items():
            if self._accepted.get(name, (None, None)) != (attempt, key):
                yield f"{name}: released and accepted do not fit together"
            if self._tries[name] != attempts:
                yield f"{name}: {self._tries[name]} candidates, {attempts} attempts"


def _to_look_at(table: pa.Table) -> pa.Array:
    """Candidates about which `_candidate_problems` could say something: the rejected ones, and those above a limit."""
    found = pc.equal(table["decision"], "rejected").combine_chunks()
    similarity, limit = table["similarity"].combine_chunks(), table["limit"].combine_chunks()
    for place in range(similarity.type.num_fields):
        name = similarity.type.field(place).name
        found = pc.or_(
            found, pc.fill_null(pc.greater(pc.struct_field(similarity, name), pc.struct_field(limit, name)), False)
        )
    return found


def _candidate_problems(row: ledger.Row) -> Iterator[str]:
    above = [
        name
        for name, limit in row["limit"].items()
        if limit is not None and row["similarity"][name] is not None and row["similarity"][name] > limit
    ]
    if row["decision"] == "rejected":
        if row["reason"] != "not an image" and sorted(row["reason"].split(", ")) != sorted(above):
            yield f"rejected for {row['reason']!r}, above its limit is {above}"
    elif above:
        yield f"{row['decision']}, but above its limit is {above}"
