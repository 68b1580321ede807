from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.torch import load_file

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.trained import save_denoiser
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.diffusion import DiffusionTask


def run(
    config: options.Config,
    manifest: options.Manifest,
    latents: options.Latents,
    scale: options.Scale,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    threads: options.Threads = 1,
) -> None:
    """Train the covariate-conditioned latent diffusion model, resuming after a kill."""
    study = load_stage(config, "diffusion")
    settings = study.diffusion
    table = read_manifest(manifest)
    shards = Shards(latents)
    ids, variants = shards.column("scan_id"), np.array(shards.column("variant"))
    rows = rows_by_split(table, ids)
    encoding = CovariateEncoding.fit(table, study.covariates)
    data = LatentData(
        shards=shards,
        prior=load_file(scale),
        covariates=encoding.encode(table.set_index("scan_id").loc[ids].reset_index()),
        train_rows=np.array(rows["train"]),
        val_rows=np.array([row for row in rows["val"] if variants[row] == 0], dtype=np.int64),
    )
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    state = state / state_key("diffusion", config, [manifest, scale, *latents])
    task = DiffusionTask(settings, data, encoding, study.seed, fabric)
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    curve = fit(task, settings.optimiser, fabric, state, "diffusion")
    if not fabric.is_global_zero:
        return
    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    validation = curve[curve["metric"] == "val/loss"]["value"]
    facts = {
        "precision": resolve(study.compute)[1],
        "scans": {split: len({ids[row] for row in indices}) for split, indices in rows.items()},
        "validation_loss": float(validation.iloc[-1]) if len(validation) else None,
        **({"compiled": True} if compiled else {}),
    }
    save_denoiser(task.modules["average"], task.card, out, facts)
