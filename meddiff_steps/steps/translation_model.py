"""Step `translation_model`: networks that draw another contrast, a diffusion and the same one without noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import having, read_manifest, rows_by_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.pairs import Pairs
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.slices import Slices
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.image_to_image import Network, rows_to_train_on, train, volume_wise, with_noise_and_without


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights and cards of all, training curves")],
    state: options.State,
    lesion: Annotated[
        Path | None, typer.Option(help="folder to write, where `translation.lesion` is set: what finds lesions")
    ] = None,
    back: Annotated[Path | None, typer.Option(help="folder to write, where `translation.cycle` is set")] = None,
    volume: Annotated[
        Path | None, typer.Option(help="folder to write, where `translation.volume_steps` is set: the volume-wise one")
    ] = None,
    solid: Annotated[
        Path | None, typer.Option(help="folder to write, beside `volume`: the 3D one of the same cost")
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Train a diffusion that draws another contrast, the same network without noise for as many steps, and what the
    study asks for besides: one that finds lesions in that contrast, the diffusion of the way back, those of volumes.
    """
    study = load_stage(config, "translation_model")
    settings, key = study.translation, "translation"
    shards = Shards(images)
    table, ids = read_manifest(manifest), shards.column("scan_id")
    by_split = rows_by_split(table, ids)
    if settings.cycle:
        healthy = set(having(table, study.anomaly.healthy)["scan_id"])
        by_split = {split: [row for row in of if ids[row] in healthy] for split, of in by_split.items()}
        if not by_split["train"]:
            raise UserError(
                f"{key}.cycle: no preprocessed scan of the train split has {study.anomaly.healthy} (anomaly.healthy)."
                " Correct it, or enlarge splits.train."
            )
    rows = rows_to_train_on(by_split, key)
    pairs = Pairs.of(shards, settings.source, settings.target, rows[0], key, settings.missing)
    if pairs.kind != "contrast":
        raise UserError(
            f"{key}.target: {settings.target[0]} is of kind {pairs.kind}, expected a contrast. Mark structures with"
            " `segmentation` (section `segmentation_ensemble`)."
        )
    more = settings.volume_steps
    slices: Slices | None = "alone" if more else None
    networks = with_noise_and_without(pairs, out, slices)
    if volume is not None and solid is not None:
        networks += volume_wise(pairs, out, volume, solid, settings.optimiser.steps, more)
    if settings.lesion is not None and lesion is not None:
        seen = Pairs.of(shards, settings.target, [settings.lesion], rows[0], f"{key}.lesion")
        networks.append(Network("lesion", "regression", seen, lesion, slices=slices))
    if settings.cycle and back is not None:
        again = Pairs.of(shards, settings.target, settings.source, rows[0], f"{key}.cycle")
        networks.append(Network("back", "diffusion", again, back))
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    found = state / state_key("translation_model", config, [manifest, *images])
    train(networks, settings, study.variants, study.compute, rows, f"{study.seed}/translation", fabric, found)
