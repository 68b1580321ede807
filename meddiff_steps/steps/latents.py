from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import typer
from tqdm import tqdm

from meddiff_steps.compute.compilation import cast_weights, speed_up
from meddiff_steps.compute.device import channels_last, make_fabric, to_channels_last, to_device
from meddiff_steps.config import load_stage
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.imaging.variants import draw_variant
from meddiff_steps.models.trained import load_autoencoder


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `latents`")],
    images: Annotated[Path, typer.Option(help="preprocessed (or filtered synthetic) shard")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder/model.safetensors")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json")],
    out: Annotated[Path, typer.Option(help="latent shard to write (Arrow)")],
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
) -> None:
    """Encode one shard of scans, once: posterior mean and log-variance, of each scan and of its augmented variants."""
    study = load_stage(config, "latents")
    augmentation = study.augmentation
    fabric = make_fabric(study.compute, threads)
    model, card = load_autoencoder(autoencoder, autoencoder_card)
    shards = Shards([images])
    # Synthetic images, from which a distilled model learns, are named by their sample id.
    ids = shards.column("scan_id" if "scan_id" in shards.schema.names else "sample_id")
    spatial_dims = len(card["image_shape"]) - 1
    to_channels_last(model, spatial_dims)
    fabric.to_device(model)
    cast_weights(model.costly, fabric)
    speed_up(model.costly[:1], study.compute, fabric, training=False)
    latent = TensorColumn("float16", tuple(card["latent_shape"]))
    size = study.latents.batch_size
    jobs = [(row, variant) for row in range(len(ids)) for variant in range(augmentation.variants)]
    with (
        ShardWriter(
            out, {"scan_id": pa.string(), "variant": pa.int64(), "mean": latent, "log_variance": latent}
        ) as writer,
        torch.no_grad(),
    ):
        for start in tqdm(range(0, len(jobs), size), desc="encoding", mininterval=5, file=sys.stderr):
            batch = jobs[start : start + size]
            padded = batch + [batch[-1]] * (size - len(batch))
            x = []
            for row, variant in padded:
                image = shards.tensors("image", [row])[0]
                if variant:
                    image = draw_variant(
                        augmentation,
                        spatial_dims,
                        step_generator(f"{study.seed}/variant/{ids[row]}", "augmentation", variant),
                    )(image)
                x.append(image)
            with fabric.autocast():
                mean, log_variance = model.encode(
                    to_device(np.stack(x), fabric).contiguous(memory_format=channels_last(spatial_dims))
                )
            for (row, variant), m, v in zip(batch, mean.cpu().numpy(), log_variance.cpu().numpy(), strict=False):
                writer.append(scan_id=ids[row], variant=variant, mean=m, log_variance=v)
