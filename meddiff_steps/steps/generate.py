from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn, in_background
from meddiff_steps.models.trained import LatentDiffusion, load_autoencoder
from meddiff_steps.synthesis.generate import CohortGenerator


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `generate`")],
    plan: Annotated[Path, typer.Option(help="plan.parquet")],
    shard: Annotated[int, typer.Option(help="number of the shard")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder/model.safetensors")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json")],
    diffusion: Annotated[Path, typer.Option(help="diffusion/model.safetensors")],
    diffusion_card: Annotated[Path, typer.Option(help="diffusion/card.json")],
    out: Annotated[Path, typer.Option(help="shard to write (Arrow)")],
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
) -> None:
    """Sample and decode the planned subjects of one shard.

    A subject depends on its own row of the plan, the weights and the batch size; not on its shard or on who shares a
    batch with it.
    """
    study = load_stage(config, "generate")
    subjects = pd.read_parquet(plan, filters=[("shard", "==", shard)])
    fabric = make_fabric(study.compute, threads)
    first_stage, card = load_autoencoder(autoencoder, autoencoder_card)
    generator = CohortGenerator(
        LatentDiffusion.load(diffusion, diffusion_card), first_stage, study.generate, fabric, study.compute
    )
    columns = {"sample_id": pa.string(), "image": TensorColumn("float16", tuple(card["image_shape"]))}
    with ShardWriter(out, columns) as writer, in_background(writer.append) as append:
        for sample_id, image in generator.images(subjects, f"shard {shard}"):
            append(sample_id=sample_id, image=image)
