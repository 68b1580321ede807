"""The manifest: one row per scan with its digests, split and covariates; what every later stage starts from."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from meddiff_steps.cohort.covariates import (
    RESERVED,
    CovariateEncoding,
    check_names,
    describe,
    parse_covariates,
    shorten,
)
from meddiff_steps.cohort.identity import SPELLING, alike, one_spelling, shown
from meddiff_steps.cohort.splits import SPLITS, assign_splits, split_balance
from meddiff_steps.cohort.table import image_extension
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.cohort.texts import read_texts
from meddiff_steps.config import CategoricalCovariate, Covariates, Scalar, Splits
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.pointers import not_fetched

log = logging.getLogger(__name__)

Source = Literal["bids", "table", "simulated"]


# ------------------------------------------------------------------------------------------------- digests


@dataclass(frozen=True)
class FileDigest:
    """What one file is: SHA-256 of its bytes and of its decoded content, and why the content could not be had."""

    sha256: str
    content_sha256: str | None
    problem: str | None = None


def digest_file(path: str) -> FileDigest:
    """Hash a file's bytes and its decoded voxels or pixels, in one read.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    data = Path(path).read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return FileDigest(sha256, content_digest(_decode(path, data)))
    except Exception as error:  # noqa: BLE001 decoders raise anything; preprocessing leaves such scans out
        return FileDigest(sha256, None, f"{type(error).__name__}: {error}")


def content_digest(array: np.ndarray) -> str:
    """SHA-256 of an array: dtype (little-endian), shape and values, first axis fastest.

    Two files with equal content have equal digests whatever their compression, header or byte order.
    """
    values = np.asfortranarray(array, dtype=array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"meddiff/content/v1|{values.dtype.str}|{values.shape}|".encode())
    digest.update(values.reshape(-1, order="F").view(np.uint8).data)
    return digest.hexdigest()


def _decode(path: str, data: bytes) -> np.ndarray:
    """Stored values of an image, without the header's intensity scaling."""
    extension = image_extension(path)
    if extension in (".nii", ".nii.gz"):
        raw = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        kind = (
            nib.Nifti2Image
            if 540 in (int.from_bytes(raw[:4], "little"), int.from_bytes(raw[:4], "big"))
            else nib.Nifti1Image
        )
        return np.asarray(kind.from_bytes(raw).dataobj.get_unscaled())  # type: ignore[attr-defined]
    if extension == ".dcm":
        return np.asarray(importlib.import_module("pydicom").dcmread(io.BytesIO(data)).pixel_array)
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGBA") if image.mode == "P" else image)  # palette indices alone say nothing


def _digest_all(paths: list[str], threads: int) -> list[FileDigest]:
    """Digests in the order of `paths`; refuses files that are not there before anything is hashed."""
    if any(image_extension(path) == ".dcm" for path in paths) and importlib.util.find_spec("pydicom") is None:
        raise UserError(
            "the cohort holds DICOM files (.dcm), which need the package pydicom. Install it (pip install pydicom), or"
            " convert them to NIfTI or PNG."
        )
    problems: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            problems.append(f"{path}: a directory, expected an image file")
        elif told := not_fetched(path):
            problems.append(f"{path}: not there ({told})")
        elif not os.path.exists(path):
            problems.append(f"{path}: not there")
        elif not os.access(path, os.R_OK):
            problems.append(f"{path}: no permission to read it")
    digests: list[FileDigest] = []
    if not problems:
        with ThreadPoolExecutor(
            max_workers=max(1, threads)
        ) as pool:  # hashing, inflating and reading release the interpreter lock
            jobs = [pool.submit(digest_file, path) for path in paths]
            for path, job in tqdm(
                zip(paths, jobs, strict=True),
                total=len(paths),
                desc="hash",
                unit="scan",
                mininterval=5,
                file=sys.stderr,
            ):
                try:
                    digests.append(job.result())
                except OSError as error:
                    problems.append(f"{path}: {error.strerror or error}")
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"{len(problems)} of {len(paths)} image files cannot be read:\n  "
            + "\n  ".join(problems[:5])
            + more
            + "\nRestore the files, or take them off the cohort."
        )
    return digests


# --------------------------------------------------------------------------------------------------- build


def build_manifest(
    frame: pd.DataFrame,
    covariates: Covariates,
    splits: Splits,
    seed: str,
    threads: int = 1,
    *,
    source: Source,
    alike_ids: str = "refuse",
    text_column: str | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The manifest of a cohort and its card.

    Parameters
    ----------
    frame
        scan_id, subject_id, session_id, path and raw covariate cells, as `read_bids` and `read_table` give them.
    covariates, splits, seed
        From the study.
    threads
        Files hashed at once.
    source
        Where the scans come from; `simulated` marks the card.
    alike_ids
        Subjects whose ids differ in spelling alone (`identity_key`): `refuse`, `join` to one, or `distinct`.
    text_column
        What the column `text` of `frame` was called, where there is one.

    Returns
    -------
    manifest : pandas.DataFrame
        scan_id, subject_id, session_id, path, sha256, content_sha256, split, a column per covariate, `text` where the
        study has texts, and `spelling`, the subject's id as it was written, where ids were joined; sorted by scan_id.
    card : dict
        Counts, covariate summaries, balance of the splits, duplicates (pairs of scan ids with equal content) and scans
        that could not be decoded.

    Raises
    ------
    UserError
        A covariate value is wrong, a covariate does not vary over the training scans, a scan id occurs twice, ids of
        subjects are alike, a file cannot be read, or a split stays empty.
    """
    typed = parse_covariates(frame, covariates).sort_values(
        "scan_id", ignore_index=True
    )  # wrong values are cheap to find: before hashing
    if text_column is not None:
        typed[TEXT] = pd.Series(read_texts(typed, text_column), dtype="object")
    repeated = sorted(set(typed["scan_id"][typed["scan_id"].duplicated()]))
    if repeated:
        raise UserError(
            f"scan_id {shorten(repeated)} occurs more than once. Rename the files so that each scan has its own name."
        )
    same = [] if alike_ids == "distinct" else alike(typed["subject_id"])
    if same and alike_ids == "refuse":
        found = "; ".join(shorten([shown(name) for name in names]) for names in same[:5])
        raise UserError(
            f"{len(same)} subject(s) have ids that differ in spelling alone: {found}. If each is one person, write the"
            " id in one way, or set cohort.alike_ids: join, which makes them one subject; if they are different"
            " people, set cohort.alike_ids: distinct."
        )
    # An empty split, and a covariate that nothing can be learnt from, are usually known before hashing, too.
    expected = assign_splits(typed["subject_id"], same, splits, seed)
    CovariateEncoding.fit(typed.assign(split=typed["subject_id"].map(expected)), covariates)

    digests = _digest_all(typed["path"].tolist(), threads)
    typed["sha256"] = [d.sha256 for d in digests]
    typed["content_sha256"] = pd.Series([d.content_sha256 for d in digests], dtype="object")
    for scan_id, digest in zip(typed["scan_id"], digests, strict=True):
        if digest.problem:
            log.warning("%s: cannot be decoded (%s); preprocessing will leave it out", scan_id, digest.problem)

    copies = [group for _, group in typed.groupby("content_sha256") if len(group) > 1]
    shared = [sorted(set(group["subject_id"])) for group in copies]
    united = sorted(subjects for subjects in shared if len(subjects) > 1)
    for subjects in united:
        log.warning("subjects %s share an identical image and go to one split", shorten(subjects))
    for names in same:
        log.warning("subjects %s are one person, called %s here (cohort.alike_ids: join)", shorten(names), names[0])
    united = sorted([*united, *same])
    assigned = assign_splits(typed["subject_id"], united, splits, seed)
    typed["split"] = typed["subject_id"].map(assigned)
    if same:
        typed[SPELLING] = typed["subject_id"]
        typed["subject_id"] = typed["subject_id"].replace(one_spelling(same))
    further = [name for name, there in ((TEXT, text_column is not None), (SPELLING, bool(same))) if there]
    manifest = typed[[*RESERVED, *covariates, *further]]

    card = {
        "source": source,
        "simulated": source == "simulated",
        **counts(manifest),
        "sessions": len(manifest[["subject_id", "session_id"]].drop_duplicates()),
        "splits": split_balance(manifest, covariates, splits),
        "covariates": {
            name: (
                covariate.model_dump(mode="json", exclude={"column", "levels"}, exclude_defaults=True)
                | {"kind": "categorical" if isinstance(covariate, CategoricalCovariate) else "continuous"}
                | describe(manifest[name], covariate)
            )
            for name, covariate in covariates.items()
        },
        "duplicates": sorted(
            [group["scan_id"].iloc[0], other] for group in copies for other in group["scan_id"].iloc[1:]
        ),
        "united_subjects": united,
        "undecodable": {
            scan_id: d.problem for scan_id, d in zip(manifest["scan_id"], digests, strict=True) if d.problem
        },
        **({"texts": _texts(manifest)} if text_column is not None else {}),
    }
    return manifest, card


def counts(manifest: pd.DataFrame) -> dict[str, int]:
    """How many scans these are, and of how many subjects."""
    return {"scans": len(manifest), "subjects": int(manifest["subject_id"].nunique())}


def _texts(manifest: pd.DataFrame) -> dict[str, int]:
    """How many scans and subjects have a text, and how many texts differ."""
    having = manifest[manifest[TEXT].notna()]
    return {
        **counts(having),
        "distinct": int(having[TEXT].nunique()),
    }


# ---------------------------------------------------------------------------------------------- read, write


def write_manifest(manifest: pd.DataFrame, path: Path) -> None:
    """Write a manifest as Parquet.  Column types are fixed, so that a column of nulls keeps its type."""
    types = [
        (str(name), pa.float64() if pd.api.types.is_float_dtype(manifest[name]) else pa.string())
        for name in manifest.columns
    ]
    manifest.to_parquet(path, index=False, schema=pa.schema(types))


def read_manifest(path: Path, covariates: Covariates | None = None) -> pd.DataFrame:
    """Read and check a manifest.

    Parameters
    ----------
    path
        A file that `write_manifest` wrote.
    covariates
        If given, their columns must be there and fit the schema.

    Returns
    -------
    pandas.DataFrame
        Text columns with None where null, continuous covariates as float64 with NaN where missing.

    Raises
    ------
    UserError
        The file is missing or no Parquet, columns are missing, a scan occurs twice, or a subject is in two splits.
    """
    path = Path(path)
    remedy = "Delete it and run the `cohort` step again."
    if not path.is_file():
        raise UserError(f"{path}: no such manifest. Make it with the `cohort` step.")
    try:
        manifest = pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable manifest ({error}). {remedy}") from None
    missing = [name for name in RESERVED if name not in manifest]
    if missing:
        raise UserError(
            f"{path}: no column {shorten(missing)}; columns are: {', '.join(map(str, manifest.columns))}. {remedy}"
        )
    if manifest.empty:
        raise UserError(f"{path}: no rows, expected one per scan. {remedy}")
    for name in ("scan_id", "subject_id", "path", "sha256", "split"):
        if not manifest[name].map(lambda value: isinstance(value, str)).all():
            raise UserError(
                f"{path}, column {name}: expected text in every row, found missing values or numbers. {remedy}"
            )
    repeated = sorted(set(manifest["scan_id"][manifest["scan_id"].duplicated()]))
    if repeated:
        raise UserError(f"{path}: scan_id {shorten(repeated)} occurs more than once. {remedy}")
    unknown = sorted(set(manifest["split"]) - set(SPLITS))
    if unknown:
        raise UserError(f"{path}, column split: found {shorten(unknown)}, expected {', '.join(SPLITS)}. {remedy}")
    per_subject = manifest.groupby("subject_id")["split"].nunique()
    torn = per_subject.index[per_subject > 1].tolist()
    if torn:
        raise UserError(
            f"{path}: subject {shorten(torn)} is in more than one split, so training data would leak into the test."
            f" {remedy}"
        )
    if covariates is not None:
        check_names(covariates)
        absent = [name for name in covariates if name not in manifest]
        if absent:
            raise UserError(f"{path}: no column for covariate {shorten(absent)}, which the study declares. {remedy}")
        manifest = parse_covariates(
            manifest, {name: c.model_copy(update={"column": None}) for name, c in covariates.items()}
        )
    return manifest


def having(table: pd.DataFrame, values: Mapping[str, Scalar]) -> pd.DataFrame:
    """Rows of a manifest whose covariates have these values; levels may be written as numbers."""
    for name, value in values.items():
        numbers = pd.api.types.is_numeric_dtype(table[name])
        table = table[table[name] == (value if numbers else str(value))]
    return table


def rows_by_split(manifest: pd.DataFrame, scan_ids: Sequence[str]) -> dict[str, list[int]]:
    """Positions in `scan_ids` per split, for all of `SPLITS`.

    Raises
    ------
    UserError
        A scan is not in the manifest, or no scan of the train split is there.
    """
    split_of = dict(zip(manifest["scan_id"], manifest["split"], strict=True))
    unknown = [scan for scan in scan_ids if scan not in split_of]
    if unknown:
        raise UserError(
            f"{len(unknown)} scan(s) are not in the manifest, for example {unknown[0]}. The images belong to another"
            " cohort; run the workflow again."
        )
    rows: dict[str, list[int]] = {split: [] for split in SPLITS}
    for row, scan in enumerate(scan_ids):
        rows[split_of[scan]].append(row)
    if not rows["train"]:
        raise UserError(
            "no scan of the train split is left after preprocessing. See preprocessed/qc.parquet for the reasons."
        )
    return rows


def usable(manifest: pd.DataFrame, quality: pd.DataFrame) -> pd.DataFrame:
    """The rows of scans that preprocessing kept, by its quality table: those that models can learn from.

    Raises
    ------
    UserError
        The table does not tell of a scan.
    """
    untold = sorted(set(manifest["scan_id"]) - set(quality["scan_id"]))
    if untold:
        raise UserError(
            f"preprocessed/qc.parquet: nothing of {len(untold)} scans of the manifest, for example {untold[0]}. It is"
            " of another cohort; run the workflow again."
        )
    kept = set(quality.loc[quality["status"] == "ok", "scan_id"])
    return manifest[manifest["scan_id"].isin(kept)]
