from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.folders import CARD, WEIGHTS
from meddiff_steps.evaluation.reconstructions import MAX_RECONSTRUCTIONS, codebook_use, write_reconstructions
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.first_stage.base import latent_shape
from meddiff_steps.models.trained import load_first_stage, save_image_network
from meddiff_steps.models.weights import ingredient
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.autoencoder import AutoencoderTask

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve, reconstructions")],
    state: options.State,
    features: Annotated[
        Path | None, typer.Option(help="network of the perceptual term (TorchScript); needed if that has a weight")
    ] = None,
    base: options.Base = None,
    threads: options.Threads = 1,
) -> None:
    """Train the autoencoder on the train split, resuming after a kill, and measure it on held-out scans."""
    study = load_stage(config, "autoencoder")
    settings = study.autoencoder
    shards = Shards(images)
    scans, ids = read_manifest(manifest), shards.column("scan_id")
    rows = rows_by_split(scans, ids)
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    given, base_card = load_first_stage(base) if base else (None, None)
    task = AutoencoderTask(
        settings, study.variants, shards, rows["train"], rows["val"], study.seed, fabric, features, given
    )
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    inputs = [manifest, *images, *([features] if features else []), *([base / WEIGHTS, base / CARD] if base else [])]
    curve = fit(task, settings.optimiser, fabric, state / state_key("autoencoder", config, inputs), "autoencoder")
    if not fabric.is_global_zero:
        return

    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    metrics = write_reconstructions(
        out / "reconstructions.arrow", scans, ids, shards.shape("image"), rows, task.reconstruct
    )
    subject = scans.set_index("scan_id")["subject_id"]
    for split in metrics:
        counts = task.codebook_counts(rows[split][:MAX_RECONSTRUCTIONS])
        if counts is not None:
            metrics[split]["codebook"] = codebook_use(counts, [subject[ids[row]] for row in rows[split]][: len(counts)])
    facts = {
        "settings": task.settings.model_dump(mode="json"),
        "latent_shape": list(latent_shape(settings, shards.shape("image"))),
        "precision": resolve(study.compute)[1],
        "scans": {split: len(indices) for split, indices in rows.items()},
        "held_out": metrics,
        **({"compiled": True} if compiled else {}),
        **ingredient(base_card),
    }
    save_image_network(task.average, out, shards.shape("image"), facts)
    for split, figures in metrics.items():
        log.info("%s: PSNR %.2f dB", split, figures["psnr"]["value"])
