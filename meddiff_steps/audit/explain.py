"""What a ledger tells of one subject, and how two cohorts differ."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meddiff_steps import config
from meddiff_steps.cohort.covariates import shorten
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.provenance import ledger, lineage, merkle, verify
from meddiff_steps.release import seal, versions


def find(release: Path, subject: str) -> tuple[int, bytes, ledger.Row, list[bytes]]:
    """Place, bytes and row of a subject in a ledger, and all leaf hashes.

    Parameters
    ----------
    subject
        With or without "sub-".

    Raises
    ------
    UserError
        There is no ledger, or the subject is not in it.
    """
    path = release / seal.LINES
    if not path.is_file():
        raise UserError(f"{path}: not there. {_which_release(release, subject)}")
    leaves: list[bytes] = []
    found: tuple[int, bytes, ledger.Row] | None = None
    for place, (content, row) in enumerate(ledger.read_lines(release)):
        leaves.append(merkle.leaf_hash(content))
        if row.get("sample_id") == subject.removeprefix("sub-"):
            found = (place, content, row)
    if found is None:
        raise UserError(
            f"{path}: no subject {subject!r} among {len(leaves)}. Participants are listed in participants.tsv."
        )
    return (*found, leaves)


def _which_release(release: Path, subject: str) -> str:
    """What to do where `release` has no ledger."""
    if Path(subject, seal.LINES).is_file():
        return "The subject comes first, then the release."
    if (release / "release" / seal.LINES).is_file():
        return f"Did you mean {release / 'release'}?"
    return "Give the root of a release that has a ledger."


def prove(release: Path, subject: str) -> dict[str, Any]:
    """The path from one subject's row to the ledger's root, for somebody who has nothing but that root."""
    place, content, _, leaves = find(release, subject)
    path = [step.hex() for step in merkle.inclusion_path(leaves, place)]
    proof = {
        "schema": "meddiff/proof/v1",
        "scheme": merkle.SCHEME,
        "record": content.decode(),
        "index": place,
        "rows": len(leaves),
        "path": path,
    }
    return proof | {"root": merkle.root(leaves).hex()}


# ------------------------------------------------------------------------------------------------- explain


def explain(release: Path, subject: str) -> list[str]:
    """Where an image comes from, as lines of a tree: its recipe, and the runs from the ledger back to the cohort.

    Raises
    ------
    UserError
        The release has no such subject, or its root or records cannot be read.
    """
    place, _, row, leaves = find(release, subject)
    try:
        root = verify.read_root(release)
    except verify.Unreadable as error:
        raise UserError(f"{release}: {error}. Run `audit` first.") from None
    shard = ledger.shard_of(root, place)
    records = lineage.read_published(release)
    lines = [f"{row['sample_id']}: {row['privacy']['decision']} after {row['privacy']['attempts']} attempt(s)"]
    image = row["image"]
    if image:
        lines += [
            f"├─ image {image['path']}, {image['bytes']} bytes",
            f"│  ├─ file SHA-256 {image['sha256']}",
            f"│  └─ voxels and geometry SHA-256 {image['voxel_sha256']}",
        ]
    asked = ", ".join(f"{name} {verify.cell(value)}" for name, value in row["covariates"].items())
    lines += [
        f"├─ asked for: {asked}",
        f"├─ noise of {row['cohort_root']!r}, number {row['noise_index']}, attempt {row['attempt']}",
    ]
    if row["seed_key"]:
        lines += [f"│  └─ key {row['seed_key']}"]
    lines += [f"├─ {name} {value}" for name, value in sorted(row["recipe"].items()) if value is not None]
    lines += [f"├─ row {place + 1} of {len(leaves)} of the ledger, root {root['ledger']['root']}", "└─ made by"]
    head = f"images/shard-{shard:04d}.parquet" if shard is not None else "plan.parquet"
    told: set[int] = set()
    return lines + [f"   {line}" for line in _tree(head, records, "", True, told)]


def _tree(path: str, records: dict[str, lineage.Record], indent: str, last: bool, told: set[int]) -> Iterator[str]:
    record = records.get(path)
    branch = f"{indent}{'└─ ' if last else '├─ '}"
    if record is None:
        yield f"{branch}{path} (no run)"
        return
    if id(record) in told:
        yield f"{branch}{path} (see above)"
        return
    told.add(id(record))
    code, parameters = record["code"], record["parameters"]
    named = ", ".join(f"{key} {value}" for key, value in sorted(parameters.items()))
    commit = (
        f", commit {code['commit'][:12]}{' with changes' if code.get('dirty') else ''}" if code.get("commit") else ""
    )
    yield f"{branch}{path} by `{record['step']}`{f' ({named})' if named else ''}, version {code.get('version')}{commit}"
    below = indent + ("   " if last else "│  ")
    parents = _parents(record, records)
    shown: list[str] = []
    more: Counter[str] = Counter()
    for parent in parents:
        source = records.get(parent)
        if source is not None and any(
            known is not None and known["step"] == source["step"] for known in map(records.get, shown)
        ):
            more[source["step"]] += 1  # another shard: its story is the same
        else:
            shown.append(parent)
    for number, parent in enumerate(shown):
        yield from _tree(parent, records, below, number == len(shown) - 1 and not more, told)
    for number, (step, count) in enumerate(sorted(more.items())):
        yield f"{below}{'└─ ' if number == len(more) - 1 else '├─ '}and {count} more by `{step}`"


def _parents(record: lineage.Record, records: dict[str, lineage.Record]) -> list[str]:
    """What a run read: one file per run behind it, and files from outside the study."""
    found: list[str] = []
    runs: set[int] = set()
    for entry in lineage.entries(record, "inputs"):
        source = records.get(entry["path"])
        if source is not None:
            if id(source) not in runs:
                found.append(entry["path"])
            runs.add(id(source))
        elif not entry["path"].startswith("config/"):
            found.append(entry["path"])
    return found


# --------------------------------------------------------------------------------------------------- diff


def compare(first: Path, second: Path) -> list[str]:
    """What differs between two releases, field by field and file by file; nothing for equal ones.

    Ledgers are walked side by side in the order of sample ids, so that memory stays bounded.

    Raises
    ------
    UserError
        One of them has no ledger.
    """
    for release in (first, second):
        if not (release / seal.LINES).is_file():
            raise UserError(f"{release / seal.LINES}: not there. Give the roots of two releases that have a ledger.")
    lines = _config_differences(first, second)
    fields: Counter[str] = Counter()
    examples: dict[str, str] = {}
    shared = alone_first = alone_second = 0
    for name, a, b in _side_by_side(first, second):
        if a is None or b is None:
            alone_first += b is None
            alone_second += a is None
            continue
        shared += 1
        for key, x, y in _leaves(a, b, ""):
            fields[key] += 1
            examples.setdefault(key, f"{name}: {x!r} and {y!r}")
    if alone_first or alone_second:
        lines.append(
            f"subjects: {shared} in both, {alone_first} in the first alone, {alone_second} in the second alone"
        )
    lines += [
        f"{key}: {count} of {shared} shared subjects differ ({examples[key]})"
        for key, count in sorted(fields.items(), key=lambda item: -item[1])
    ]
    return lines + _code_differences(first, second) + _file_differences(first, second)


def _file_differences(first: Path, second: Path) -> list[str]:
    """Files that differ as they lie there, whatever the ledgers say of them."""
    sides = [_files(release) for release in (first, second)]
    lines = [
        f"files: {len(alone)} in the {which} alone ({shorten(alone)})"
        for which, alone in (
            ("first", sorted(sides[0].keys() - sides[1].keys())),
            ("second", sorted(sides[1].keys() - sides[0].keys())),
        )
        if alone
    ]
    shared = sorted(sides[0].keys() & sides[1].keys())
    changed = [name for name in shared if not _alike(sides[0][name], sides[1][name])]
    if changed:
        lines.append(f"files: {len(changed)} of {len(shared)} in both differ on disk ({shorten(changed)})")
    return lines


def _files(release: Path) -> dict[str, Path]:
    """What lies in a release, by path within it; of folders their files."""
    return {
        path.relative_to(release).as_posix(): path
        for path in release.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def _alike(first: Path, second: Path) -> bool:
    """Whether two files are regular ones of the same bytes, or links to the same place."""
    if first.is_symlink() or second.is_symlink():
        return first.is_symlink() and second.is_symlink() and first.readlink() == second.readlink()
    if not (first.is_file() and second.is_file()) or first.stat().st_size != second.stat().st_size:
        return False
    return sha256_file(first) == sha256_file(second)


def _side_by_side(first: Path, second: Path) -> Iterator[tuple[str, ledger.Row | None, ledger.Row | None]]:
    streams = [(row for _, row in ledger.read_lines(release)) for release in (first, second)]
    a, b = (next(stream, None) for stream in streams)
    while a is not None or b is not None:
        if b is None or (a is not None and a["sample_id"] < b["sample_id"]):
            assert a is not None
            yield a["sample_id"], a, None
            a = next(streams[0], None)
        elif a is None or b["sample_id"] < a["sample_id"]:
            yield b["sample_id"], None, b
            b = next(streams[1], None)
        else:
            yield a["sample_id"], a, b
            a, b = next(streams[0], None), next(streams[1], None)


def _leaves(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Fields that differ between two JSON values, as (path, value, value)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            yield from _leaves(a.get(key), b.get(key), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(itertools.zip_longest(a, b)):
            yield from _leaves(x, y, f"{path}.{number}")
    elif a != b:
        yield path, a, b


def _config_differences(first: Path, second: Path) -> list[str]:
    configs = [lineage.read_strictly(release, seal.CONFIG) for release in (first, second)]
    made = [_version(release) for release in (first, second)]
    if made[0] != made[1]:  # keys had other names
        configs = [_as_today(content, version) for content, version in zip(configs, made, strict=True)]
    return [f"config {key}: {json.dumps(x)} and {json.dumps(y)}" for key, x, y in _leaves(configs[0], configs[1], "")]


def _version(release: Path) -> str:
    try:
        return versions.stated(verify.read_root(release)["software"]["version"])
    except verify.Unreadable as error:
        raise UserError(f"{release}: {error}. Run `audit` first.") from None


def _as_today(content: dict[str, Any], version: str) -> dict[str, Any]:
    """A published config with the names and defaults of this version, where it can be read."""
    try:
        return config.parse_published(content, seal.CONFIG, version).model_dump(mode="json")
    except UserError:
        return content


def _code_differences(first: Path, second: Path) -> list[str]:
    """Steps whose code or surroundings differ; what their inputs and outputs are follows from the rest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for side, release in enumerate((first, second)):
        for record in lineage.read_published(release).values():
            found.setdefault(lineage.step_of(record), [{}, {}])[side] = {
                "code": record["code"],
                "environment": record["environment"],
            }
    return [
        f"step {step} {key}: {x!r} and {y!r}"
        for step, (a, b) in sorted(found.items())
        if a and b
        for key, x, y in _leaves(a, b, "")
        if key != "code.diff_sha256"
    ]
