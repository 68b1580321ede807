from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.imaging.signed_distances import DISTANCES, channels, renumbered, to_distances
from meddiff_steps.steps import options


def run(
    config: options.Config,
    images: Annotated[Path, typer.Option(help="preprocessed shard, with the channel that holds label maps")],
    out: Annotated[Path, typer.Option(help="shard of label maps to write (Arrow)")],
) -> None:
    """Number the structures of the scans' label maps, and write what the networks of label maps learn from."""
    pairs = load_stage(config, "masks").pairs
    assert pairs is not None
    shards, count = Shards([images]), len(pairs.structures)
    shape, scans = shards.shape(pairs.channel)[1:], shards.column("scan_id")
    columns = {
        "scan_id": pa.string(),
        "image": TensorColumn("float16", (channels(count), *shape), DISTANCES),
        "labels": TensorColumn("uint8", shape),
    }
    empty = []
    with ShardWriter(out, columns) as writer:
        for row, scan in enumerate(scans):
            labels = renumbered(shards.tensor(pairs.channel, row)[0], pairs.structures, pairs.outside, scan)
            if not labels.any():
                empty.append(scan)
            writer.append(scan_id=scan, image=to_distances(labels, count), labels=labels)
        if len(empty) > pairs.empty_share * len(scans):
            raise UserError(
                f"{images}: the label maps of {len(empty)} of {len(scans)} scans show no structure of pairs.structures,"
                f" {empty[0]} first, expected at most a share of {pairs.empty_share:g}. Leave these scans out"
                " (preprocess.exclude), correct the labels in pairs.structures, or raise pairs.empty_share where not"
                " everybody has what is labelled."
            )
