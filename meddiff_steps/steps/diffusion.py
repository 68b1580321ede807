from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.torch import load_file, save_file

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.weights import save_model
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.components import train_components
from meddiff_steps.training.tasks.diffusion import DiffusionTask

log = logging.getLogger(__name__)


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `diffusion`")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet")],
    latents: Annotated[list[Path], typer.Option(help="latent shard; repeat for all of them")],
    scale: Annotated[Path, typer.Option(help="latents/scale.safetensors")],
    weights: Annotated[Path, typer.Option(help="weights to write (safetensors)")],
    card: Annotated[Path, typer.Option(help="card to write (JSON)")],
    history: Annotated[Path, typer.Option(help="training curve to write (Parquet)")],
    state: Annotated[Path, typer.Option(help="folder for resumable checkpoints")],
    threads: Annotated[int, typer.Option(help="CPU threads; changes the last bits of CPU results")] = 1,
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
    levels, state = encoding.level_counts, state / state_key("diffusion", config, [manifest, scale, *latents])
    components = state / "components.safetensors"
    if settings.component_steps and "prior.basis" in data.prior:
        if fabric.is_global_zero and not components.exists():
            tensors, gain = train_components(data, settings, levels, study.seed)
            log.info("components: held-out loss %.3f of the Gaussian's", gain)
            with atomic_path(components) as path:
                save_file(tensors, path)
        fabric.barrier()
        data.prior.update(load_file(components))
    task = DiffusionTask(settings, data, levels, study.seed, fabric)
    compiled = speed_up(task.costly, study.compute, fabric, training=True)
    curve = fit(task, settings.optimiser, fabric, state, "diffusion")
    if not fabric.is_global_zero:
        return
    with atomic_path(history) as path:
        curve.to_parquet(path, index=False)
    validation = curve[curve["metric"] == "val/loss"]["value"]
    save_model(
        task.modules["average"],
        weights,
        card,
        {
            "settings": settings.model_dump(mode="json"),
            "latent_shape": list(shards.shape("mean")),
            "gaussian_rank": len(data.prior.get("prior.basis", ())),
            "encoding": encoding.to_json(),
            "precision": resolve(study.compute)[1],
            "scans": {split: len({ids[row] for row in indices}) for split, indices in rows.items()},
            "validation_loss": float(validation.iloc[-1]) if len(validation) else None,
            **({"compiled": True} if compiled else {}),
        },
    )
