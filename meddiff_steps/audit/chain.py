"""L3 of an audit: the runs lead from the ledger back to the cohort."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from meddiff_steps import __version__
from meddiff_steps.provenance import lineage, verify
from meddiff_steps.provenance.ledger import WEIGHTS
from meddiff_steps.provenance.lineage import Lineage, Record, kind_of, step_of
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import seal, versions
from meddiff_steps.release.sealed import Sealed

#: Files of the study without which a ledger cannot have been made.
HEADS = ("plan.parquet", "privacy/decisions.parquet", "privacy/report.json", "autoencoder/card.json")
#: Steps without which there is no release.
STEPS = ("cohort", "autoencoder", "diffusion", "generate", "filter", "privacy", "images")


def check_lineage(release: Sealed) -> list[Check]:
    """The runs lead from the ledger back to the cohort without a gap, and name the weights that the rows name."""
    inputs = {str(path): str(digest) for path, digest in release.root["inputs"].items()}
    found = lineage.trace(inputs, release.records.get)
    steps = found.steps()
    gaps = [*_gaps(found), *_unlike_sealed(release, inputs)]
    stray = sorted(path for path in release.records if path not in found.records)
    checks = [
        judged(
            3,
            "chain",
            gaps,
            f"{len(steps)} runs: every file that one read is what another wrote",
            "gap(s) in the chain of runs",
        ),
        judged(
            3,
            "ends",
            _open_ends(inputs, steps),
            "the chain leads from the ledger to the cohort",
            "end(s) of the chain are missing",
        ),
        judged(3, "stray-records", stray, "no record that leads nowhere", "record(s) that do not lead to this release"),
        judged(
            3,
            "sources",
            [*_without_sources(found), *_by_other_weights(release, found)],
            "every run read what its step needs",
            "run(s) did not read what their step needs",
        ),
        judged(
            3,
            "weights",
            _weight_problems(release, found),
            "the rows' weights were written by recorded trainings",
            "row(s) or models name other weights",
        ),
        _check_lock(release, steps),
    ]
    return checks + _code_notes(release, steps)


# ------------------------------------------------------------------------------------------------- files


def _gaps(found: Lineage) -> Iterator[str]:
    for path in found.missing:
        yield f"{path}: no run wrote it"
    for path, wanted, written in found.stale:
        yield f"{path}: read with SHA-256 {wanted[:16]}, but written with {written[:16]}"
    for path in sorted(set(found.cyclic)):
        yield f"{path}: leads to itself"


def _unlike_sealed(release: Sealed, inputs: dict[str, str]) -> Iterator[str]:
    """What of the release itself the ledger was made from, and is sealed otherwise."""
    for path, digest in inputs.items():
        inside = path.removeprefix("release/")
        if inside != path and release.root["files"].get(inside, {}).get("sha256") != digest:
            yield f"{path}: read with SHA-256 {digest[:16]}, but sealed with another"


def _open_ends(inputs: dict[str, str], steps: list[Record]) -> Iterator[str]:
    names = {step_of(record) for record in steps}
    yield from (f"{name} is not among the inputs of the ledger" for name in HEADS if name not in inputs)
    yield from (f"no run of step `{name}`" for name in STEPS if name not in names)


# ----------------------------------------------------------------------------------------------- sources


def _paths(record: Record, side: str) -> set[str]:
    return {entry["path"] for entry in lineage.entries(record, side)}


def _without_sources(found: Lineage) -> Iterator[str]:
    """Runs that lack an input."""
    for record in found.steps():
        sources = {step_of(found.records[path]) for path in _paths(record, "inputs") if path in found.records}
        for needed in lineage.SOURCES.get(step_of(record), ()):
            if not needed & sources:
                yield f"{_written(record)} (step {record['step']}): read nothing of step {' or '.join(sorted(needed))}"


def _by_other_weights(release: Sealed, found: Lineage) -> Iterator[str]:
    """Runs that made or filtered the released images with other weights than the rows name."""
    written = _weights_by_path(found)
    for record in _made_images(found):
        for kind in sorted({kind for kind, _ in release.weights}):
            read = {
                (kind, digest)
                for path in _paths(record, "inputs") & set(found.records)
                if kind_of(found.records[path]) == kind
                for digest in written.get(path, ())
            }
            if not read or not read <= set(release.weights):
                named = ", ".join(sorted(digest[:16] for _, digest in read)) or "none"
                yield f"{_written(record)} (step {record['step']}): read {kind} {named}, which the rows do not name"


def _made_images(found: Lineage) -> list[Record]:
    """Runs of `generate` and `filter` that the released images come from."""
    steps = found.steps()
    filtered = {path for record in steps if step_of(record) == "images" for path in _paths(record, "inputs")}
    filters = [record for record in steps if step_of(record) == "filter" and filtered & _paths(record, "outputs")]
    drawn = {path for record in filters for path in _paths(record, "inputs")}
    made = [record for record in steps if step_of(record) == "generate" and drawn & _paths(record, "outputs")]
    chosen = {id(record) for record in [*filters, *made]}
    return [record for record in steps if id(record) in chosen]


def _weights_by_path(found: Lineage) -> dict[str, set[str]]:
    """Digests of the weights that runs wrote, by the file that they are in."""
    weights: dict[str, set[str]] = {}
    for record in found.steps():
        for entry in lineage.entries(record, "outputs"):
            if "weights_sha256" in entry and found.records.get(entry["path"]) is record:
                weights.setdefault(entry["path"], set()).add(entry["weights_sha256"])
    return weights


def _written(record: Record) -> str:
    return next((str(entry["path"]) for entry in lineage.entries(record, "outputs")), "nothing")


def _weight_problems(release: Sealed, found: Lineage) -> Iterator[str]:
    written: dict[str, set[str]] = {kind: set() for kind in WEIGHTS}
    for path, digests in _weights_by_path(found).items():
        if (kind := kind_of(found.records[path])) in written:
            written[kind] |= digests
    for (kind, digest), (first, count) in release.weights.items():
        if digest not in written[kind]:
            yield f"{kind} {digest[:16]} of {count} row(s), first {first}: no recorded training wrote it"
    kinds = [kind for kind, _ in release.weights]
    for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        yield f"{kinds.count(kind)} different weights of {kind} in one cohort"


# -------------------------------------------------------------------------------------- environment, code


def _check_lock(release: Sealed, steps: list[Record]) -> Check:
    locks = {record["environment"].get("lock_sha256") for record in steps}
    try:
        digest = hashlib.sha256(verify.read_bytes(release.folder, seal.LOCK)).hexdigest()
    except (OSError, ValueError) as error:
        return Check(
            3, "environment", "finding", f"{seal.LOCK} cannot be read ({error}): nobody can have these versions"
        )
    if digest not in locks:
        return Check(3, "environment", "finding", f"{seal.LOCK} is not the lock of any recorded run")
    return Check(3, "environment", "pass", f"{seal.LOCK} is the lock of the recorded runs")


def _code_notes(release: Sealed, steps: list[Record]) -> list[Check]:
    versions_of = Counter(str(record["code"].get("version")) for record in steps)
    commits = Counter(str(record["code"].get("commit"))[:12] for record in steps)
    code = _code(release.root["software"]["version"], versions_of, commits)
    found = [] if code is None else [code]
    dirty = sorted({record["step"] for record in steps if record["code"].get("dirty")})
    if dirty:
        text = f"steps with uncommitted changes: {', '.join(dirty)}; their code digests are in the records"
        found.append(Check(3, "uncommitted", "note", text))
    if not found:
        version, commit = next(iter(versions_of), ""), next(iter(commits), "")
        found = [Check(3, "code", "pass", f"all runs by version {version}, commit {commit}")]
    if release.is_other:
        advice = versions.advice(release.version, "to make images again")
        found.append(Check(3, "other-version", "note", f"{advice}; this is version {__version__}"))
    return found


def _code(sealed_by: Any, versions_of: Counter[str], commits: Counter[str]) -> Check | None:
    """How the versions of the runs go with that of the seal; None if all is one."""
    if not isinstance(sealed_by, str) or sealed_by not in versions_of:
        text = f"sealed by version {versions.stated(sealed_by)!r}, but runs by {dict(versions_of)}"
        return Check(3, "code", "finding", text)
    if set(versions_of) != {sealed_by} or len(commits) > 1:
        return Check(3, "code", "note", f"runs by versions {dict(versions_of)}, commits {dict(commits)}")
    return None
