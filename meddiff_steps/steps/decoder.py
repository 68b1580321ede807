from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.folders import CARD, WEIGHTS
from meddiff_steps.evaluation.reconstructions import write_reconstructions
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.trained import load_decoder, load_first_stage, save_image_network
from meddiff_steps.models.weights import ingredient
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.decoder import DecoderTask


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    autoencoder: options.Autoencoder,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve, reconstructions")],
    state: options.State,
    base: options.Base = None,
    threads: options.Threads = 1,
) -> None:
    """Train the drawing decoder on what the autoencoder leaves open, resuming after a kill."""
    study = load_stage(config, "decoder")
    settings = study.decoder
    shards = Shards(images)
    ids = shards.column("scan_id")
    table = read_manifest(manifest)
    rows = rows_by_split(table, ids)
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    first_stage, card = load_first_stage(autoencoder)
    given, base_card = load_decoder(base) if base else (None, None)
    task = DecoderTask(
        settings, study.variants, first_stage, shards, rows["train"], rows["val"], study.seed, fabric, given
    )
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    inputs = [manifest, *images, autoencoder / WEIGHTS, autoencoder / CARD]
    inputs += [base / WEIGHTS, base / CARD] if base else []
    curve = fit(task, settings.optimiser, fabric, state / state_key("decoder", config, inputs), "decoder")
    if not fabric.is_global_zero:
        return
    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    if settings.optimiser.steps:  # else they are the base's, as all else is
        task.fit_grey_levels()
    metrics = write_reconstructions(
        out / "reconstructions.arrow",
        table,
        ids,
        shards.shape("image"),
        rows,
        lambda row: task.reconstruct(row, ids[row]),
    )
    validation = curve[curve["metric"] == "val/loss"]["value"]
    facts = {
        "settings": settings.model_dump(mode="json"),
        "precision": resolve(study.compute)[1],
        "scans": {split: len(indices) for split, indices in rows.items()},
        "autoencoder": card["weights_sha256"],
        "held_out": metrics,
        "residual": float(task.model.deviation),
        "validation_loss": float(validation.iloc[-1]) if len(validation) else None,
        **({"compiled": True} if compiled else {}),
        **ingredient(base_card),
    }
    save_image_network(task.modules["average"], out, shards.shape("image"), facts)
