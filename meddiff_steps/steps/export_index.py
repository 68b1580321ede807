"""Step `export_index`: table, README and checksums of the WebDataset export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file
from meddiff_steps.provenance.ledger import Row, read_lines
from meddiff_steps.release.webdataset import MANIFEST, write_index
from meddiff_steps.steps import options


def run(
    config: options.Config,
    root: Annotated[Path, typer.Option(help="root.json of the sealed release")],
    images: options.Images,
    tars: Annotated[
        list[Path], typer.Option(help="tar file of one shard, in the order of the tables; repeat for every shard")
    ],
    out: Annotated[Path, typer.Option(help="manifest.parquet to write, in the folder of the tar files")],
) -> None:
    """Write manifest.parquet, README.md and SHA256SUMS beside the tar files of an export."""
    if out.name != MANIFEST or any(tar.parent != out.parent for tar in tars):
        raise UserError(f"--out {out}: expected {MANIFEST} in the folder of the tar files.")
    if len(images) != len(tars):
        raise UserError(
            f"{len(images)} tables and {len(tars)} tar files were given. Give --images and --tars once per shard, in"
            " the same order."
        )
    study, release = load_stage(config, "export_index"), root.parents[1]
    members: dict[Path, list[Row]] = {tar: [] for tar in tars}
    place = {
        name: tar
        for table, tar in zip(images, tars, strict=True)
        for name in pd.read_parquet(table, columns=["sample_id"])["sample_id"]
    }
    for _, row in read_lines(release):
        if row["sample_id"] in place:
            members[place[row["sample_id"]]].append(row)
    write_index(members, out.parent, sha256_file(root), study.release.name, study.release.licence)
