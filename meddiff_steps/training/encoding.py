"""Images to posteriors, once: of each scan and of its variants, in padded batches of a fixed size."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.compute.compilation import cast_weights, speed_up
from meddiff_steps.compute.device import channels_last, to_channels_last, to_device
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import DISTANCES
from meddiff_steps.imaging.variants import Variant, draw_variant, untouched

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def encode_shard(
    first_stage: Any,
    shards: Shards,
    ids: list[str],
    variants: config.Variants,
    batch_size: int,
    seed: str,
    fabric: Fabric,
    compute: config.Compute,
) -> Iterator[dict[str, Any]]:
    """Rows of a latent shard: scan_id, variant, `numbers` that describe it (`Variant.numbers`), and the columns of the
    posterior, float32 (c, *spatial).

    Parameters
    ----------
    first_stage
        A trained `FirstStage`.
    ids
        Of the rows of `shards`.
    """
    dims = len(shards.shape("image")) - 1
    to_channels_last(first_stage, dims)
    fabric.to_device(first_stage)
    cast_weights(first_stage.costly.values(), fabric)
    speed_up([first_stage.costly["encoder"]], compute, fabric, training=False)
    drawn = variants if variants.shift_latents else variants.model_copy(update={"max_shift_voxels": 0})
    jobs = [(row, variant) for row in range(len(ids)) for variant in range(variants.count)]

    def change(row: int, variant: int) -> Variant:
        if not variant:
            return untouched(dims)
        return draw_variant(drawn, dims, step_generator(f"{seed}/variant/{ids[row]}", "augmentation", variant))

    def image(row: int, variant: int) -> np.ndarray:
        made = change(row, variant)
        if shards.kind("image") == DISTANCES:  # of the same scan, mirrored and shifted alike
            made = replace(made, contrast=1.0)
        return made(shards.tensors("image", [row])[0])

    for start in tqdm(range(0, len(jobs), batch_size), desc="encoding", mininterval=5, file=sys.stderr):
        batch = jobs[start : start + batch_size]
        x = np.stack([image(*job) for job in batch + [batch[-1]] * (batch_size - len(batch))])
        with torch.no_grad(), fabric.autocast():
            posterior = first_stage.encode(to_device(x, fabric).contiguous(memory_format=channels_last(dims)))
        columns = {name: values.cpu().numpy() for name, values in posterior.columns().items()}
        for slot, (row, variant) in enumerate(batch):
            numbers = change(row, variant).numbers(variants)
            yield {"scan_id": ids[row], "variant": variant, "numbers": numbers} | {
                name: found[slot] for name, found in columns.items()
            }
