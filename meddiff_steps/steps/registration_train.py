"""Step `registration_train`: a network that registers scans of different people, with a score or the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.registration import RegistrationTask


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    network: Annotated[str, typer.Option(help="score: told a noise level, tells the score, too; plain: neither")],
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    threads: options.Threads = 1,
) -> None:
    """Train a registration network on pairs of training scans, resuming after a kill."""
    study = load_stage(config, "registration_train")
    settings = study.registration
    if network not in ("score", "plain"):
        raise UserError(f"--network {network}: no such network. Give score or plain.")
    shards = Shards(images)
    rows = rows_by_split(read_manifest(manifest), shards.column("scan_id"))
    if len(rows["train"]) < 2:
        raise UserError(f"{manifest}: {len(rows['train'])} training scans, a pair needs 2. Enlarge splits.train.")
    fabric = make_fabric(study.compute, threads)
    task = RegistrationTask(settings, shards, rows["train"], rows["val"], study.seed, fabric, score=network == "score")
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    folder = state / f"{state_key('registration_train', config, [manifest, *images])}-{network}"
    curve = fit(task, settings.optimiser, fabric, folder, f"registration_train, {network}")
    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    facts = {
        "settings": settings.model_dump(mode="json"),
        "image_shape": list(shards.shape("image")),
        "score": network == "score",
        "precision": resolve(study.compute)[1],
        "scans": {split: len(indices) for split, indices in rows.items()},
        **({"compiled": True} if compiled else {}),
    }
    save_model(task.modules["average"], out, facts)
