"""Copies of a release for machine learning: WebDataset tar shards, a table of what is in them, and checksums.

A copy lies beside the release, not in it, so that the seal stays.  Each sample holds what the released file shows, not
the file: `ID.npy` (a volume, int16 as stored) or `ID.png` (a picture, as released), and `ID.json` with the covariates
asked for, the mark that it is synthetic, and the digests by which the ledger knows it.  Equal releases give equal
bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rfc8785
from tqdm import tqdm
from webdataset.writer import TarWriter

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import CHECKSUMS, atomic_path, write_atomic, write_checksums
from meddiff_steps.imaging.encoding import PICTURE_SCALE, SYNTHETIC, VOLUME_SCALE

MANIFEST, README = "manifest.parquet", "README.md"
Row = Mapping[str, Any]


def write_tar(rows: Iterable[Row], release: Path, out: Path, study: str) -> int:
    """Write one shard.

    Parameters
    ----------
    rows
        Rows of the ledger whose images are in this shard, in the order to write.
    release
        Root of the dataset.
    out
        The tar file.
    study
        Named in every sample.

    Returns
    -------
    int
        Samples written.

    Raises
    ------
    UserError
        An image is missing, or is not the one that was sealed.
    """
    count = 0
    # The time of every member is 0, so that the same images give the same tar.
    with (
        atomic_path(out) as path,
        open(path, "wb") as stream,
        TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer,
    ):
        for row in tqdm(rows, desc="export", unit="image", mininterval=5, file=sys.stderr):
            writer.write(_sample(row, release, study))
            count += 1
    return count


def _sample(row: Row, release: Path, study: str) -> dict[str, Any]:
    image = row["image"]
    try:
        content = (release / image["path"]).read_bytes()
    except OSError as error:
        raise UserError(
            f"{release / image['path']}: not readable ({error.strerror}). Run the `images` step again, and seal the"
            " release again."
        ) from None
    if hashlib.sha256(content).hexdigest() != image["sha256"]:
        raise UserError(
            f"{release / image['path']}: not the file that the ledger names. Run the `images` step again, and seal the"
            " release again."
        )
    facts = {
        "synthetic": True,
        "note": SYNTHETIC,
        "study": study,
        "sample_id": row["sample_id"],
        "covariates": row["covariates"],
        "path": image["path"],
        "sha256": image["sha256"],
        "voxel_sha256": image["voxel_sha256"],
    }
    if image["path"].endswith(".png"):
        return {"__key__": row["sample_id"], "png": content, "json": rfc8785.dumps(facts | {"scale": PICTURE_SCALE})}
    volume = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    stored = io.BytesIO()
    np.save(stored, np.ascontiguousarray(volume.dataobj.get_unscaled()), allow_pickle=False)  # type: ignore[attr-defined]
    facts |= {"scale": VOLUME_SCALE, "affine": [[float(x) for x in line] for line in volume.affine]}
    return {"__key__": row["sample_id"], "npy": stored.getvalue(), "json": rfc8785.dumps(facts)}


def write_index(tars: Mapping[Path, Sequence[Row]], folder: Path, root_sha256: str, title: str, licence: str) -> None:
    """Write the table, README and checksums of an export; shards of an earlier export are removed.

    Parameters
    ----------
    tars
        Rows of the ledger by the shard that holds them.
    folder
        Where the shards are.
    root_sha256
        SHA-256 of the release's root.json.
    title, licence
        The release's.

    Raises
    ------
    UserError
        A shard is not there.
    """
    absent = [str(tar) for tar in tars if not tar.is_file()]
    if absent:
        raise UserError(f"{absent[0]}: no such shard. Run the `export` step of every shard first.")
    for old in set(folder.glob("shard-*.tar")) - set(tars):
        old.unlink()
    rows = [_line(row, tar) for tar, members in tars.items() for row in members]
    with atomic_path(folder / MANIFEST) as path:
        pq.write_table(
            pa.Table.from_pylist(rows).replace_schema_metadata({"release_root_sha256": root_sha256}),
            path,
            compression="zstd",
        )
    write_atomic(folder / README, _readme(len(rows), root_sha256, title, licence).encode())
    write_checksums(folder, [*(tar.name for tar in tars), MANIFEST, README])


def _line(row: Row, tar: Path) -> dict[str, Any]:
    image = {key: row["image"][key] for key in ("path", "sha256", "voxel_sha256")}
    return {"sample_id": row["sample_id"], "group": row["group"], "shard": tar.name, **image, **row["covariates"]}


def _readme(count: int, root_sha256: str, title: str, licence: str) -> str:
    return f"""# {title}: WebDataset export

{SYNTHETIC}

{count} images as tar shards. Per sample: ID.npy (int16, 0 to {VOLUME_SCALE}, axes left-right, posterior-anterior,
inferior-superior) or ID.png (0 to {PICTURE_SCALE}), and ID.json: covariates that the model was asked for, affine in mm,
digests. {MANIFEST} lists all samples.
`sha256sum -c {CHECKSUMS}` checks the files.

Made from the release whose provenance/root.json has SHA-256 {root_sha256}; its README says what was measured and
tested.
`voxel_sha256` ties each sample to its row in that release's ledger.

Licence: {licence}.
"""
