from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.files import channel_statistics, write_json


def run(
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet")],
    latents: Annotated[list[Path], typer.Option(help="latent shard; repeat for all of them")],
    out: Annotated[Path, typer.Option(help="latents/manifest.json to write")],
) -> None:
    """Measure mean and standard deviation of every latent channel over the whole train split, in one pass."""
    shards = Shards(latents)
    rows = rows_by_split(read_manifest(manifest), shards.column("scan_id"))["train"]
    offset, scale = channel_statistics(shards.tensor("mean", row) for row in rows)
    write_json(out, {"latent_shape": list(shards.shape("mean")), "offset": np.round(offset, 6).tolist(), "scale": np.round(scale, 6).tolist(), "train_latents": len(rows)})
