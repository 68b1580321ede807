from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.trained import load_first_stage
from meddiff_steps.steps import options
from meddiff_steps.training.encoding import encode_shard


def run(
    config: options.Config,
    images: Annotated[Path, typer.Option(help="preprocessed (or filtered synthetic) shard")],
    autoencoder: options.Autoencoder,
    out: Annotated[Path, typer.Option(help="latent shard to write (Arrow)")],
    threads: options.Threads = 1,
) -> None:
    """Encode one shard of scans, once: the posterior of each scan and of its variants."""
    study = load_stage(config, "latents")
    fabric = make_fabric(study.compute, threads)
    model, card = load_first_stage(autoencoder)
    shards = Shards([images])
    ids = shards.image_ids()
    latent = TensorColumn("float16", tuple(card["latent_shape"]))
    columns = {"scan_id": pa.string(), "variant": pa.int64()}
    settings = study.latents
    rows = encode_shard(model, shards, ids, study.variants, settings.batch_size, study.seed, fabric, study.compute)
    first = next(rows)
    columns |= {"numbers": TensorColumn("float32", first["numbers"].shape)}
    columns |= {name: latent for name in first if name not in columns}
    with ShardWriter(out, columns) as writer:
        for row in itertools.chain([first], rows):
            writer.append(**row)
