from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import torch
import typer
from tqdm import tqdm

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.evaluation.image_quality import reconstruction_quality
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.weights import save_model
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask

log = logging.getLogger(__name__)

#: Held-out scans that are reconstructed for the card and the report.
MAX_RECONSTRUCTIONS = 256


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `autoencoder`")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet")],
    images: Annotated[list[Path], typer.Option(help="preprocessed shard; repeat for all of them")],
    weights: Annotated[Path, typer.Option(help="weights to write (safetensors)")],
    card: Annotated[Path, typer.Option(help="card to write (JSON)")],
    history: Annotated[Path, typer.Option(help="training curve to write (Parquet)")],
    reconstructions: Annotated[Path, typer.Option(help="held-out scans and their reconstructions to write (Arrow)")],
    state: Annotated[Path, typer.Option(help="folder for resumable checkpoints")],
    features: Annotated[
        Path | None, typer.Option(help="network of the perceptual term (TorchScript); needed if that has a weight")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
) -> None:
    """Train the autoencoder on the train split, resuming after a kill, and measure it on held-out scans."""
    study = load_stage(config, "autoencoder")
    settings = study.autoencoder
    shards = Shards(images)
    scans = read_manifest(manifest)
    rows = rows_by_split(scans, shards.column("scan_id"))
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    task = AutoencoderTask(
        settings, study.augmentation, shards, rows["train"], rows["val"], study.seed, fabric, features
    )
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    inputs = [manifest, *images, *([features] if features else [])]
    curve = fit(task, settings.optimiser, fabric, state / state_key("autoencoder", config, inputs), "autoencoder")
    if not fabric.is_global_zero:
        return
    task.fit_tone()

    with atomic_path(history) as path:
        curve.to_parquet(path, index=False)
    held_out = [(split, row) for split in ("test", "val") for row in rows[split]][:MAX_RECONSTRUCTIONS]
    ids = shards.column("scan_id")
    pairs: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {"test": ([], []), "val": ([], [])}
    shape = shards.shape("image")
    columns = {
        "scan_id": pa.string(),
        "split": pa.string(),
        "image": TensorColumn("float16", shape),
        "reconstruction": TensorColumn("float16", shape),
    }
    with ShardWriter(reconstructions, columns) as writer, torch.no_grad():
        for split, row in tqdm(held_out, desc="reconstructing held-out scans", mininterval=5, file=sys.stderr):
            image = shards.tensors("image", [row])
            with fabric.autocast():
                reconstruction = task.average.reconstruct(fabric.to_device(torch.from_numpy(image))).cpu().numpy()
            writer.append(scan_id=ids[row], split=split, image=image[0], reconstruction=reconstruction[0])
            pairs[split][0].append(image[0])
            pairs[split][1].append(reconstruction[0])
    subject = scans.set_index("scan_id")["subject_id"]
    metrics = {
        split: reconstruction_quality(
            np.stack(real), np.stack(made), subjects=[subject[ids[row]] for name, row in held_out if name == split]
        )
        for split, (real, made) in pairs.items()
        if real
    }
    save_model(
        task.average,
        weights,
        card,
        {
            "settings": settings.model_dump(mode="json"),
            "image_shape": list(shape),
            "latent_shape": [settings.latent_channels, *(n // settings.downsampling for n in shape[1:])],
            "precision": resolve(study.compute)[1],
            "scans": {split: len(indices) for split, indices in rows.items()},
            "held_out": metrics,
            **({"compiled": True} if compiled else {}),
        },
    )
    for split, figures in metrics.items():
        log.info("%s: PSNR %.2f dB", split, figures["psnr"]["value"])
