from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.evaluation.image_quality import reconstruction_quality
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.first_stage.base import latent_shape
from meddiff_steps.models.trained import save_first_stage
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask

log = logging.getLogger(__name__)

#: Held-out scans that are reconstructed for the card and the report.
MAX_RECONSTRUCTIONS = 256


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve, reconstructions")],
    state: options.State,
    features: Annotated[
        Path | None, typer.Option(help="network of the perceptual term (TorchScript); needed if that has a weight")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Train the autoencoder on the train split, resuming after a kill, and measure it on held-out scans."""
    study = load_stage(config, "autoencoder")
    settings = study.autoencoder
    shards = Shards(images)
    scans, ids = read_manifest(manifest), shards.column("scan_id")
    rows = rows_by_split(scans, ids)
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    task = AutoencoderTask(settings, study.variants, shards, rows["train"], rows["val"], study.seed, fabric, features)
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    inputs = [manifest, *images, *([features] if features else [])]
    curve = fit(task, settings.optimiser, fabric, state / state_key("autoencoder", config, inputs), "autoencoder")
    if not fabric.is_global_zero:
        return
    task.fit_grey_levels()

    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    shape = shards.shape("image")
    image = TensorColumn("float16", shape)
    columns = {"scan_id": pa.string(), "split": pa.string(), "image": image, "reconstruction": image}
    held_out = [(split, row) for split in ("test", "val") for row in rows[split]][:MAX_RECONSTRUCTIONS]
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"test": [], "val": []}
    with ShardWriter(out / "reconstructions.arrow", columns) as writer:
        for split, row in held_out:
            real, made = task.reconstruct(row)
            writer.append(scan_id=ids[row], split=split, image=real, reconstruction=made)
            pairs[split].append((real, made))
    subject = scans.set_index("scan_id")["subject_id"]
    metrics = {
        split: reconstruction_quality(
            np.stack([real for real, _ in found]),
            np.stack([made for _, made in found]),
            subjects=[subject[ids[row]] for name, row in held_out if name == split],
        )
        for split, found in pairs.items()
        if found
    }
    facts = {
        "settings": settings.model_dump(mode="json"),
        "latent_shape": list(latent_shape(settings, shape)),
        "precision": resolve(study.compute)[1],
        "scans": {split: len(indices) for split, indices in rows.items()},
        "held_out": metrics,
        **({"compiled": True} if compiled else {}),
    }
    save_first_stage(task.average, out, shape, facts)
    for split, figures in metrics.items():
        log.info("%s: PSNR %.2f dB", split, figures["psnr"]["value"])
