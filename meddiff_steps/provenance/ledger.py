"""The ledger: a row per planned synthetic subject, released or not, from which its image can be made again and checked.

A row is a canonical JSON object and a leaf of a Merkle tree (`merkle`).  Rows are in the order of their `sample_id`
(code points), whatever shard made them, so that the cohort's root does not depend on shards or jobs; nothing that
changes from run to run (time, host, folder) is in a row, so that a rerun gives the same root.  The rows of a shard, in
the same order, have a root of their own, for whoever holds one shard alone.

The private ledger has a row per candidate image, also the rejected ones, with how near it came to which training scan.
It stays with the owner of the real scans; its root is published, so that it cannot be rewritten later.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.privacy.calibration import Thresholds
from meddiff_steps.provenance import merkle, verify
from meddiff_steps.provenance.columns import canonical_lines

SCHEMA = "meddiff/ledger/v1"
#: Trained parts that a recipe names by the digest of their weights, as the steps that train them are called.
WEIGHTS = ("autoencoder", "decoder", "diffusion", "mask_autoencoder", "mask_diffusion", "tone")
#: Numbers of a noise stream that its digest covers: all streams differ from the first number on, and drawing all is
#: slow.
NOISE_NUMBERS = 256
#: Rows held at a time, which bounds memory.
CHUNK = 10_000
Row = dict[str, Any]
#: How a column ends that holds a covariate as it was measured in the image, or by the label map.
MEASURED, SEGMENTED = "_measured", "_segmented"
#: Columns of a table of images that describe the label map.
LABELS = {name: f"labels_{name}" for name in ("path", "sha256", "voxel_sha256", "bytes")}


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
    tone: str
    decoder: str | None = None
    drawing_steps: int | None = None
    guidance_interval: list[float] | None = None
    guidance: str = "classifier_free"
    mask_autoencoder: str | None = None
    mask_diffusion: str | None = None


_ZEROS = np.zeros(4, np.uint64)
_PHILOX = np.random.Philox(key=0)
_GENERATOR = np.random.Generator(_PHILOX)


def noise_digest(key: str) -> str:
    """SHA-256 of the first `NOISE_NUMBERS` numbers (float32, little-endian) of the stream of `key`.

    The numbers are those of `diffusion.noise.noise`, from one generator whose state is set: making one takes three
    times as long.
    """
    words = np.array([int(key[16:], 16), int(key[:16], 16)], np.uint64)
    state: Any = {
        "bit_generator": "Philox",
        "state": {"counter": _ZEROS, "key": words},
        "buffer": _ZEROS,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    _PHILOX.state = state
    return hashlib.sha256(_GENERATOR.standard_normal(NOISE_NUMBERS, np.float32).astype("<f4").tobytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------- rows


def public_tables(
    plan: pd.DataFrame, decisions: pd.DataFrame, images: pd.DataFrame, covariates: Covariates, recipe: Recipe
) -> Iterator[pa.Table]:
    """Rows of the public ledger, in order, as tables of `public_schema`.

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
        raise UserError(
            f"images: {images.loc[images['sample_id'].duplicated(), 'sample_id'].iloc[0]} has more than one image. Give"
            " each images table once."
        )
    files, candidates = _by_id(images), _by_id(decisions)
    accepted = candidates[candidates["decision"] == "accepted"]
    _check_fit(*(set(names) for names in (plan["sample_id"].map(str), candidates.index, accepted.index, files.index)))
    ordered = _by_id(plan).sort_index()
    duplicates = candidates.index[candidates["decision"] == "duplicate"]
    ordered = ordered.assign(
        attempts=candidates.groupby(level=0).size(),
        attempt=accepted["attempt"],
        seed_key=accepted["seed_key"],
        decision=np.where(ordered.index.isin(duplicates), "duplicate", "rejected"),
    )
    ordered.loc[ordered.index.isin(accepted.index), "decision"] = "released"
    shared = asdict(recipe)
    columns_there = list(map(str, images))
    schema = schema_of(covariates, columns_there, TEXT in plan)
    measured = measured_columns(covariates, columns_there)
    for chunk in (ordered.iloc[start : start + CHUNK] for start in range(0, len(ordered), CHUNK)):
        released = (chunk["decision"] == "released").to_numpy()
        keys = [str(key) if made else None for key, made in zip(chunk["seed_key"], released, strict=True)]
        columns = {name: _texts(chunk[name]) for name in ("group", "cohort_root")} | {
            name: _integers(chunk[name]) for name in ("index", "noise_index", "attempt")
        }
        columns |= {"sample_id": pa.array(chunk.index, pa.string()), "seed_key": pa.array(keys, pa.string())}
        columns["noise_sha256"] = pa.array([key and noise_digest(key) for key in keys], pa.string())
        wanted = {
            name: _texts(chunk[name]) if isinstance(one, CategoricalCovariate) else _numbers(chunk[name])
            for name, one in covariates.items()
        }
        if TEXT in plan:
            wanted[TEXT] = _texts(chunk[TEXT])
        columns["covariates"] = _struct(schema.field("covariates"), wanted)
        columns["recipe"] = _struct(
            schema.field("recipe"), {name: [value] * len(chunk) for name, value in shared.items()}
        )
        columns["privacy"] = _struct(
            schema.field("privacy"), {"decision": _texts(chunk["decision"]), "attempts": _integers(chunk["attempts"])}
        )
        image = files.reindex(chunk.index)
        parts = {name: _texts(image[name]) for name in ("path", "sha256", "voxel_sha256")} | {
            "bytes": _integers(image["bytes"])
        }
        columns["image"] = _struct(schema.field("image"), parts, ~released)
        if LABELS["path"] in images:
            parts = {name: _texts(image[column]) for name, column in LABELS.items() if name != "bytes"}
            columns["labels"] = _struct(
                schema.field("labels"), parts | {"bytes": _integers(image[LABELS["bytes"]])}, ~released
            )
        if measured:
            kinds = {name: _texts if is_text(name, covariates) else _numbers for name in measured}
            columns["measured"] = _struct(
                schema.field("measured"), {name: kinds[name](image[name]) for name in measured}, ~released
            )
        yield pa.table([columns[field.name] for field in schema], schema=schema)


def measured_columns(covariates: Covariates, names: Iterable[str]) -> list[str]:
    """Those of some columns that hold measured covariates, sorted."""
    known = {name + end for name in covariates for end in (MEASURED, SEGMENTED)}
    return sorted(known & set(names))


def is_text(column: str, covariates: Covariates) -> bool:
    """Whether a measured column holds levels rather than numbers."""
    return isinstance(covariates.get(column.removesuffix(MEASURED)), CategoricalCovariate)


def _by_id(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index(table["sample_id"].map(str).rename(None))


def _texts(column: pd.Series) -> pa.Array:
    return pa.array(
        [None if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)], pa.string()
    )


def _numbers(column: pd.Series) -> pa.Array:
    return pa.array(column.astype(float).to_numpy(), pa.float64(), from_pandas=True)


def _integers(column: pd.Series) -> pa.Array:
    return pa.array(column.to_numpy(), from_pandas=True).cast(pa.int64())


def _struct(field: pa.Field, columns: Mapping[str, Any], absent: np.ndarray | None = None) -> pa.StructArray:
    """Columns as records of a field's type, null where `absent`."""
    kinds = [field.type.field(i) for i in range(field.type.num_fields)]
    arrays = [
        column if isinstance(column := columns[kind.name], pa.Array) else pa.array(column, kind.type) for kind in kinds
    ]
    return pa.StructArray.from_arrays(arrays, fields=kinds, mask=None if absent is None else pa.array(absent))


def _check_fit(planned: set[str], judged: set[str], accepted: set[str], written: set[str]) -> None:
    for problem, found in (
        ("planned subject(s) have no decision", planned - judged),
        ("decision(s) are on nobody in the plan", judged - planned),
        ("accepted subject(s) have no image", accepted - written),
        ("image(s) are of subjects that were not accepted", written - accepted),
    ):
        if found:
            raise UserError(
                f"ledger: {len(found)} {problem}: {', '.join(sorted(found)[:3])}. Run the workflow again: these files"
                " come from different runs."
            )


def cell(value: Any, categorical: bool) -> str | float | None:
    """A covariate, or another number of a plan, as rows hold it."""
    if pd.isna(value):
        return None
    # Whole numbers as such: it is how canonical JSON writes them, and how they are read back.
    return str(value) if categorical else int(value) if float(value).is_integer() else float(value)


def detectors_of(decisions: pd.DataFrame) -> list[str]:
    """Names of the detectors that a table of decisions holds similarities of."""
    return sorted(name.removeprefix("similarity_") for name in map(str, decisions) if name.startswith("similarity_"))


def private_tables(
    plan: pd.DataFrame, decisions: pd.DataFrame, thresholds: Thresholds | None, subgroup: str | None
) -> Iterator[pa.Table]:
    """Rows of the private ledger, ordered by sample id and attempt: every candidate, its nearest training scans, the
    limits that it was held to.
    """
    detectors = detectors_of(decisions)
    schema = private_schema(detectors)
    groups = pd.Series(plan[subgroup].map(str).to_numpy() if subgroup else "all", index=plan["sample_id"].map(str))
    ordered = decisions.assign(sample_id=decisions["sample_id"].map(str)).sort_values(["sample_id", "attempt"])
    limits = {
        group: thresholds.groups.get(group, thresholds.overall) if thresholds else {} for group in groups.unique()
    }
    for chunk in (ordered.iloc[start : start + CHUNK] for start in range(0, len(ordered), CHUNK)):
        columns = {name: _texts(chunk[name]) for name in ("sample_id", "seed_key", "decision", "reason")} | {
            "attempt": _integers(chunk["attempt"])
        }
        similarity = {name: chunk[f"similarity_{name}"].astype(float) for name in detectors}
        similarity = {name: _numbers(values.where(np.isfinite(values))) for name, values in similarity.items()}
        held = chunk["sample_id"].map(groups)
        columns["similarity"] = _struct(schema.field("similarity"), similarity)
        columns["nearest"] = _struct(
            schema.field("nearest"), {name: _integers(chunk[f"nearest_{name}"]) for name in detectors}
        )
        columns["limit"] = _struct(
            schema.field("limit"), {name: [limits[group].get(name) for group in held] for name in detectors}
        )
        yield pa.table([columns[field.name] for field in schema], schema=schema)


# ----------------------------------------------------------------------------------------------------- files


def public_schema(
    covariates: Covariates,
    without: Collection[str] = (),
    measured: Collection[str] = (),
    labels: bool = False,
    texts: bool = False,
) -> pa.Schema:
    """Columns of ledger.parquet, but for fields of a recipe that its version did not know; rows read back from it are
    the canonical objects again.

    `measured` are the columns of measured covariates, `labels` says whether there are label maps, `texts` whether what
    was asked for in words is among the covariates.
    """
    kinds = [
        (name, pa.string() if isinstance(covariate, CategoricalCovariate) else pa.float64())
        for name, covariate in covariates.items()
    ]
    kinds += [(TEXT, pa.string())] if texts else []
    names = (
        *("autoencoder", "diffusion", "decoder", "tone", "mask_autoencoder", "mask_diffusion"),
        *("sampler", "guidance", "precision"),
    )
    recipe: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in names]
    recipe += [("num_inference_steps", pa.int64()), ("guidance_scale", pa.float64()), ("batch_size", pa.int64())]
    recipe += [("drawing_steps", pa.int64()), ("guidance_interval", pa.list_(pa.float64()))]
    recipe = [(name, kind) for name, kind in recipe if name not in without]
    image = [(name, pa.string()) for name in ("path", "sha256", "voxel_sha256")] + [("bytes", pa.int64())]
    columns = [(name, pa.string()) for name in ("sample_id", "group", "cohort_root", "seed_key", "noise_sha256")]
    columns += [(name, pa.int64()) for name in ("index", "noise_index", "attempt")]
    columns += [("covariates", pa.struct(kinds)), ("recipe", pa.struct(recipe)), ("image", pa.struct(image))]
    columns += [("labels", pa.struct(image))] if labels else []
    kinds = [(name, pa.string() if is_text(name, covariates) else pa.float64()) for name in sorted(measured)]
    columns += [("measured", pa.struct(kinds))] if kinds else []
    return pa.schema([*columns, ("privacy", pa.struct([("decision", pa.string()), ("attempts", pa.int64())]))])


def schema_of(covariates: Covariates, images: Collection[str], texts: bool = False) -> pa.Schema:
    """`public_schema` of released images whose tables have these columns, asked for with or without `texts`."""
    measured, labels = measured_columns(covariates, images), LABELS["path"] in images
    return public_schema(covariates, measured=measured, labels=labels, texts=texts)


def private_schema(detectors: Sequence[str]) -> pa.Schema:
    columns = [(name, pa.string()) for name in ("sample_id", "seed_key", "decision", "reason")] + [
        ("attempt", pa.int64())
    ]
    columns += [
        (name, pa.struct([(detector, pa.float64()) for detector in detectors])) for name in ("similarity", "limit")
    ]
    return pa.schema([*columns, ("nearest", pa.struct([(detector, pa.int64()) for detector in detectors]))])


@dataclass(frozen=True)
class Written:
    """What a written ledger is: leaf hashes and sample ids in order, and how many rows are of released images."""

    leaves: list[bytes]
    sample_ids: list[str]
    released: int = 0

    @property
    def root(self) -> str:
        return merkle.root(self.leaves).hex()


def write_ledger(tables: Iterable[pa.Table], schema: pa.Schema, parquet: Path, lines: Path | None = None) -> Written:
    """Write tables as Parquet and, where `lines` is given, as one line of canonical JSON per row; atomically, one table
    in memory at a time.
    """
    leaves: list[bytes] = []
    ids: list[str] = []
    released = 0
    with ExitStack() as files:
        writer = files.enter_context(
            pq.ParquetWriter(files.enter_context(atomic_path(parquet)), schema, compression="zstd")
        )
        stream = files.enter_context(open(files.enter_context(atomic_path(lines)), "wb")) if lines is not None else None
        for table in tables:
            found = canonical_lines(table)
            leaves += map(merkle.leaf_hash, found)
            ids += table["sample_id"].to_pylist()
            released += len(table) - table["image"].null_count if "image" in table.column_names else 0
            if stream is not None:
                stream.writelines(line + b"\n" for line in found)
            writer.write_table(table)
    return Written(leaves, ids, released)


def as_tables(rows: Iterable[Row], schema: pa.Schema) -> Iterator[pa.Table]:
    """Rows as tables of a schema."""
    remaining = iter(rows)
    while chunk := list(itertools.islice(remaining, CHUNK)):
        yield pa.Table.from_pylist(chunk, schema=schema)


def read_lines(release: Path) -> Iterator[tuple[bytes, Row]]:
    """Each line of a release's ledger, as bytes (what is hashed) and as an object.

    Raises
    ------
    UserError
        There is no ledger, a line is too long, or one is no row.
    """
    try:
        for number, content, row in verify.rows(release):
            problem = "not JSON, or a key twice" if row is None else verify.row_problem(row)
            if problem:
                raise verify.Unreadable(f"line {number} of {verify.LINES}: {problem}")
            yield content, row
    except verify.Unreadable as error:
        raise UserError(f"{release}: {error}. The file was changed; get the release again.") from None


def read_tables(path: Path) -> Iterator[pa.Table]:
    """Rows of a Parquet ledger, as tables of some.

    Raises
    ------
    UserError
        The file cannot be read as Parquet.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(CHUNK):
                yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as Parquet ({error}). The file was changed; get it again.") from None


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a Parquet ledger as they were written; see `read_tables`."""
    for table in read_tables(path):
        yield from table.to_pylist()


def shard_roots(written: Written, shard_of: Mapping[str, int]) -> list[dict[str, Any]]:
    """Per shard: its root, the number of its rows, and which rows of the ledger they are as [first, past the last]
    ranges.
    """
    members: dict[int, list[int]] = {}
    for place, sample_id in enumerate(written.sample_ids):
        members.setdefault(int(shard_of[sample_id]), []).append(place)
    found = []
    for shard, places in sorted(members.items()):
        breaks = [i for i in range(1, len(places)) if places[i] != places[i - 1] + 1]
        ranges = [[places[a], places[b - 1] + 1] for a, b in itertools.pairwise([0, *breaks, len(places)])]
        found.append(
            {
                "shard": shard,
                "rows": len(places),
                "ranges": ranges,
                "root": merkle.root([written.leaves[i] for i in places]).hex(),
            }
        )
    return found


def shard_of(root: Mapping[str, Any], place: int) -> int | None:
    """The shard of a row, by root.json and the row's place in the ledger; None where no shard claims it."""
    shards = root["ledger"]["shards"]
    return next((one["shard"] for one in shards if any(first <= place < end for first, end in one["ranges"])), None)
