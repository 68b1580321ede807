"""Step `segmentation_model`: networks that mark a structure, a diffusion and the same one without noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.image_to_image import rows_to_train_on, train, with_noise_and_without


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights and cards of both, training curves")],
    state: options.State,
    beside: Annotated[
        str | None, typer.Option(help="whole or unplaced: those that are compared with patches; left out, the study's")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Train a diffusion that marks a structure given scans, and the same network without noise for as many steps."""
    study = load_stage(config, "segmentation_model")
    settings, key = study.segmentation_ensemble, "segmentation_ensemble"
    shards = Shards(images)
    rows = rows_to_train_on(rows_by_split(read_manifest(manifest), shards.column("scan_id")), key)
    pairs = Pairs.of(shards, settings.source, settings.target, rows[0], key)
    if pairs.kind == "contrast":
        raise UserError(
            f"{key}.target: {settings.target[0]} is a contrast, expected masks or labels. Say so (kind: mask) where it"
            " is declared, or draw contrasts with `translation`."
        )
    name = state_key("segmentation_model", config, [manifest, *images])
    if beside is not None:
        if beside not in ("whole", "unplaced") or settings.patch is None:
            raise UserError(
                f"--beside {beside}: expected whole or unplaced, of a study with {key}.patch (found {settings.patch})."
            )
        settings, name = settings.compared(beside, shards.shape("image")[1:]), f"{name}-{beside}"
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    networks = with_noise_and_without(pairs, out)
    train(networks, settings, study.variants, study.compute, rows, f"{study.seed}/segmentation", fabric, state / name)
