from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest, usable
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.steps import options
from meddiff_steps.synthesis.generate import CohortGenerator
from meddiff_steps.synthesis.showcase import render, tiles


def run(
    config: options.Config,
    manifest: options.Manifest,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="images to write (Arrow)")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    qc: options.KeptBy = None,
    threads: options.Threads = 1,
) -> None:
    """Sample the counterfactual sweeps and interpolations that the report shows."""
    study = load_stage(config, "showcase")
    table = read_manifest(manifest)
    if qc is not None:
        table = usable(table, pd.read_parquet(qc))
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder)
    generator = CohortGenerator(model, study.generate, MaskModel.where_there_is(masks, fabric, study.compute))
    found = tiles(
        study.covariates, table[table["split"] == "train"], study.seed, study.evaluate.sweep_steps, model.latent_shape
    )
    columns = {
        "panel": pa.string(),
        "row": pa.int64(),
        "position": pa.int64(),
        "label": pa.string(),
        "image": TensorColumn("float16", model.image_shape),
    }
    with ShardWriter(out, columns) as writer:
        for tile, image in tqdm(
            render(found, generator, study.seed),
            total=len(found),
            desc="showcase",
            unit="image",
            mininterval=5,
            file=sys.stderr,
        ):
            writer.append(panel=tile.panel, row=tile.row, position=tile.position, label=tile.label, image=image)
