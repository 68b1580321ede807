from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn, in_background
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.models.masks import MaskModel
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.steps import options
from meddiff_steps.synthesis.generate import CohortGenerator


def run(
    config: options.Config,
    plan: options.Plan,
    shard: options.Shard,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="shard to write (Arrow)")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    threads: options.Threads = 1,
) -> None:
    """Sample and decode the planned subjects of one shard, with their label maps where there is a model of these.

    A subject depends on its own row of the plan, the weights and the batch size; not on its shard or on who shares a
    batch with it.
    """
    study = load_stage(config, "generate")
    subjects = pd.read_parquet(plan, filters=[("shard", "==", shard)])
    fabric = make_fabric(study.compute, threads)
    model = TrainedModel.load(autoencoder, diffusion, fabric, study.compute, decoder=decoder)
    generator = CohortGenerator(model, study.generate, MaskModel.where_there_is(masks, fabric, study.compute))
    columns = {"sample_id": pa.string(), "image": TensorColumn("float16", model.image_shape)}
    columns |= {LABELS: TensorColumn("uint8", model.image_shape[1:])} if masks else {}
    with ShardWriter(out, columns) as writer, in_background(writer.append) as append:
        for sample_id, image, labels in generator.pairs(subjects, f"shard {shard}"):
            append(sample_id=sample_id, image=image, **({} if labels is None else {LABELS: labels}))
