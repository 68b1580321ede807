"""The ledger: a row per planned synthetic subject, released or not, from which its image can be made again and checked.

A row is a canonical JSON object and a leaf of a Merkle tree (`merkle`).  Rows are in the order of their `sample_id` (code
points), whatever shard made them, so that the cohort's root does not depend on shards or jobs; nothing that changes from
run to run (time, host, folder) is in a row, so that a rerun gives the same root.  The rows of a shard, in the same order,
have a root of their own, for whoever holds one shard alone.

The private ledger has a row per candidate image, also the rejected ones, with how near it came to which training scan.  It
stays with the owner of the real scans; its root is published, so that it cannot be rewritten later.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.errors import UserError
from meddiff_steps.files import atomic_path
from meddiff_steps.privacy.calibration import Thresholds
from meddiff_steps.provenance import merkle
from meddiff_steps.provenance.canonical import canonical_bytes

SCHEMA = "meddiff/ledger/v1"
#: Numbers of a noise stream that its digest covers: all streams differ from the first number on, and drawing all is slow.
NOISE_NUMBERS = 256
#: Rows held as Python objects at a time, which bounds memory.
CHUNK = 10_000
Row = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What all images of one cohort share: weights (digests of sorted tensors) and how they were sampled."""

    autoencoder: str
    diffusion: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    batch_size: int
    precision: str


_ZEROS = np.zeros(4, np.uint64)
_PHILOX = np.random.Philox(key=0)
_GENERATOR = np.random.Generator(_PHILOX)


def noise_digest(key: str) -> str:
    """SHA-256 of the first `NOISE_NUMBERS` numbers (float32, little-endian) of the stream of `key`.

    The numbers are those of `diffusion.noise.noise`, from one generator whose state is set: making one takes three times as long.
    """
    words = np.array([int(key[16:], 16), int(key[:16], 16)], np.uint64)
    state: Any = {"bit_generator": "Philox", "state": {"counter": _ZEROS, "key": words}, "buffer": _ZEROS, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    _PHILOX.state = state
    return hashlib.sha256(_GENERATOR.standard_normal(NOISE_NUMBERS, np.float32).astype("<f4").tobytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------- rows


def public_rows(plan: pd.DataFrame, decisions: pd.DataFrame, images: pd.DataFrame, covariates: Covariates, recipe: Recipe) -> Iterator[Row]:
    """Rows of the public ledger, in order.

    Parameters
    ----------
    plan
        plan.parquet: a row per planned subject.
    decisions
        privacy/decisions.parquet: a row per candidate.
    images
        Tables of the written images, one below the other.
    covariates
        The study's.
    recipe
        What all images share.

    Raises
    ------
    UserError
        The tables do not fit together: an image of a subject that was not accepted, an accepted one without image, or a
        subject without decision.
    """
    if images["sample_id"].duplicated().any():
        raise UserError(f"images: {images.loc[images['sample_id'].duplicated(), 'sample_id'].iloc[0]} has more than one image. Give each images table once.")
    files = images.set_index("sample_id").to_dict("index")
    attempts = decisions.groupby("sample_id").size().to_dict()
    accepted = decisions[decisions["decision"] == "accepted"].set_index("sample_id")[["attempt", "seed_key"]].to_dict("index")
    duplicates = set(decisions.loc[decisions["decision"] == "duplicate", "sample_id"])
    _check_fit(*(set(map(str, names)) for names in (plan["sample_id"], attempts, accepted, files)))
    shared = asdict(recipe)
    shared["guidance_scale"] = _value(recipe.guidance_scale, False)
    categorical = {name for name, covariate in covariates.items() if isinstance(covariate, CategoricalCovariate)}
    ordered = plan.assign(sample_id=plan["sample_id"].map(str)).sort_values("sample_id")
    for chunk in (ordered.iloc[start : start + CHUNK] for start in range(0, len(ordered), CHUNK)):
        for subject in chunk.to_dict("records"):
            sample_id = subject["sample_id"]
            row: Row = {name: str(subject[name]) for name in ("sample_id", "group", "cohort_root")}
            row |= {name: int(subject[name]) for name in ("index", "noise_index")}
            row["covariates"] = {name: _value(subject[name], name in categorical) for name in covariates}
            row["recipe"] = shared
            decision = "released" if sample_id in accepted else "duplicate" if sample_id in duplicates else "rejected"
            row["privacy"] = {"decision": decision, "attempts": int(attempts[sample_id])}
            row |= {"attempt": None, "seed_key": None, "noise_sha256": None, "image": None}
            if sample_id in accepted:
                key, file = str(accepted[sample_id]["seed_key"]), files[sample_id]
                row |= {"attempt": int(accepted[sample_id]["attempt"]), "seed_key": key, "noise_sha256": noise_digest(key)}
                row["image"] = {name: str(file[name]) for name in ("path", "sha256", "voxel_sha256")} | {"bytes": int(file["bytes"])}
            yield row


def _check_fit(planned: set[str], judged: set[str], accepted: set[str], written: set[str]) -> None:
    for problem, found in (
        ("planned subject(s) have no decision", planned - judged),
        ("decision(s) are on nobody in the plan", judged - planned),
        ("accepted subject(s) have no image", accepted - written),
        ("image(s) are of subjects that were not accepted", written - accepted),
    ):
        if found:
            raise UserError(f"ledger: {len(found)} {problem}: {', '.join(sorted(found)[:3])}. Run the workflow again: these files come from different runs.")


def _value(value: Any, categorical: bool) -> str | float | None:
    if pd.isna(value):
        return None
    # Whole numbers as such: it is how canonical JSON writes them, and how they are read back.
    return str(value) if categorical else int(value) if float(value).is_integer() else float(value)


def detectors_of(decisions: pd.DataFrame) -> list[str]:
    """Names of the detectors that a table of decisions holds similarities of."""
    return sorted(name.removeprefix("similarity_") for name in map(str, decisions) if name.startswith("similarity_"))


def private_rows(plan: pd.DataFrame, decisions: pd.DataFrame, thresholds: Thresholds | None, subgroup: str | None) -> Iterator[Row]:
    """Rows of the private ledger, ordered by sample id and attempt: every candidate, its nearest training scans, the limits that it was held to."""
    detectors = detectors_of(decisions)
    groups = dict(zip(plan["sample_id"], plan[subgroup].astype(str) if subgroup else ["all"] * len(plan), strict=True))
    ordered = decisions.assign(sample_id=decisions["sample_id"].map(str)).sort_values(["sample_id", "attempt"])
    for candidate in ordered.to_dict("records"):
        limits = thresholds.groups.get(groups[candidate["sample_id"]], thresholds.overall) if thresholds else {}
        row: Row = {name: str(candidate[name]) for name in ("sample_id", "seed_key", "decision", "reason")}
        row["attempt"] = int(candidate["attempt"])
        similarity = {name: float(candidate[f"similarity_{name}"]) for name in detectors}
        row["similarity"] = {name: value if np.isfinite(value) else None for name, value in similarity.items()}
        row["nearest"] = {name: int(candidate[f"nearest_{name}"]) for name in detectors}
        row["limit"] = {name: limits.get(name) for name in detectors}
        yield row


# ----------------------------------------------------------------------------------------------------- files


def public_schema(covariates: Covariates) -> pa.Schema:
    """Columns of ledger.parquet; rows read back from it are the canonical objects again."""
    kinds = [(name, pa.string() if isinstance(covariate, CategoricalCovariate) else pa.float64()) for name, covariate in covariates.items()]
    recipe = [(name, pa.string()) for name in ("autoencoder", "diffusion", "sampler", "precision")]
    recipe += [("num_inference_steps", pa.int64()), ("guidance_scale", pa.float64()), ("batch_size", pa.int64())]
    image = [(name, pa.string()) for name in ("path", "sha256", "voxel_sha256")] + [("bytes", pa.int64())]
    columns = [(name, pa.string()) for name in ("sample_id", "group", "cohort_root", "seed_key", "noise_sha256")]
    columns += [(name, pa.int64()) for name in ("index", "noise_index", "attempt")]
    columns += [("covariates", pa.struct(kinds)), ("recipe", pa.struct(recipe)), ("image", pa.struct(image))]
    return pa.schema([*columns, ("privacy", pa.struct([("decision", pa.string()), ("attempts", pa.int64())]))])


def private_schema(detectors: Sequence[str]) -> pa.Schema:
    columns = [(name, pa.string()) for name in ("sample_id", "seed_key", "decision", "reason")] + [("attempt", pa.int64())]
    columns += [(name, pa.struct([(detector, pa.float64()) for detector in detectors])) for name in ("similarity", "limit")]
    return pa.schema([*columns, ("nearest", pa.struct([(detector, pa.int64()) for detector in detectors]))])


@dataclass(frozen=True)
class Written:
    """What a written ledger is: leaf hashes and sample ids in order."""

    leaves: list[bytes]
    sample_ids: list[str]

    @property
    def root(self) -> str:
        return merkle.root(self.leaves).hex()


def write_ledger(rows: Iterable[Row], schema: pa.Schema, parquet: Path, lines: Path | None = None) -> Written:
    """Write rows as Parquet and, where `lines` is given, as one line of canonical JSON each; in chunks, atomically."""
    leaves: list[bytes] = []
    ids: list[str] = []
    with atomic_path(parquet) as table_path, pq.ParquetWriter(table_path, schema, compression="zstd") as writer:
        if lines is None:
            _write(rows, schema, writer, None, leaves, ids)
        else:
            with atomic_path(lines) as lines_path, open(lines_path, "wb") as stream:
                _write(rows, schema, writer, stream, leaves, ids)
    return Written(leaves, ids)


def _write(rows: Iterable[Row], schema: pa.Schema, writer: pq.ParquetWriter, stream: Any, leaves: list[bytes], ids: list[str]) -> None:
    for chunk in _chunks(rows):
        for row in chunk:
            content = canonical_bytes(row)
            leaves.append(merkle.leaf_hash(content))
            ids.append(row["sample_id"])
            if stream is not None:
                stream.write(content + b"\n")
        writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        yield chunk


def read_lines(path: Path) -> Iterator[tuple[bytes, Row]]:
    """Each line of a ledger, as bytes (what is hashed) and as an object.

    Raises
    ------
    UserError
        A line is no JSON object.
    """
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            content = line.removesuffix(b"\n")
            try:
                row = json.loads(content)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}). The file was changed; get the release again.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object. The file was changed; get the release again.")
            yield content, row


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet ledger as they were written.

    Raises
    ------
    UserError
        The file cannot be read as Parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK):
                yield from batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as Parquet ({error}). The file was changed; get it again.") from None


def shard_roots(written: Written, shard_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per shard: its root, the number of its rows, and which rows of the ledger they are as [first, past the last] ranges."""
    members: dict[int, list[int]] = {}
    for place, sample_id in enumerate(written.sample_ids):
        members.setdefault(int(shard_of[sample_id]), []).append(place)
    found = []
    for shard, places in sorted(members.items()):
        breaks = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
        ranges = [[places[a], places[b - 1] + 1] for a, b in itertools.pairwise([0, *breaks, len(places)])]
        found.append({"shard": shard, "rows": len(places), "ranges": ranges, "root": merkle.root([written.leaves[i] for i in places]).hex()})
    return found
