from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.models.trained import LatentDiffusion, load_autoencoder
from meddiff_steps.synthesis.generate import CohortGenerator
from meddiff_steps.synthesis.showcase import render, tiles


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `showcase`")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder/model.safetensors")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json")],
    diffusion: Annotated[Path, typer.Option(help="diffusion/model.safetensors")],
    diffusion_card: Annotated[Path, typer.Option(help="diffusion/card.json")],
    out: Annotated[Path, typer.Option(help="images to write (Arrow)")],
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
) -> None:
    """Sample the counterfactual sweeps and interpolations that the report shows."""
    study = load_stage(config, "showcase")
    table = read_manifest(manifest)
    fabric = make_fabric(study.compute, threads)
    first_stage, card = load_autoencoder(autoencoder, autoencoder_card)
    model = LatentDiffusion.load(diffusion, diffusion_card)
    generator = CohortGenerator(model, first_stage, study.generate, fabric, study.compute)
    found = tiles(
        study.covariates, table[table["split"] == "train"], study.seed, study.evaluate.sweep_steps, model.latent_shape
    )
    columns = {
        "panel": pa.string(),
        "row": pa.int64(),
        "position": pa.int64(),
        "label": pa.string(),
        "image": TensorColumn("float16", tuple(card["image_shape"])),
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
