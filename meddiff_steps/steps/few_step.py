from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.torch import load_file

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.folders import CARD, WEIGHTS
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.denoiser.student import Distilled
from meddiff_steps.models.trained import load_denoiser, save_denoiser
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.latent_data import LatentData
from meddiff_steps.training.tasks.few_step import distil


def run(
    config: options.Config,
    manifest: options.Manifest,
    latents: options.Latents,
    scale: options.Scale,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    threads: options.Threads = 1,
) -> None:
    """Distil the diffusion model, guidance included, into a student that draws in a few steps; resumes after a kill."""
    study = load_stage(config, "few_step")
    table = read_manifest(manifest)
    shards = Shards(latents)
    ids = shards.column("scan_id")
    rows = rows_by_split(table, ids)
    teacher, made, card = load_denoiser(diffusion)
    # Generated images are like scans as they are, not like their variants.
    plain = np.array(shards.column("variant")) == 0
    kept = {split: np.array([row for row in rows[split] if plain[row]], dtype=np.int64) for split in ("train", "val")}
    covariates = made.encoding.encode(table.set_index("scan_id").loc[ids].reset_index())
    data = LatentData(shards, load_file(scale), covariates, kept["train"], kept["val"])
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    inputs = [manifest, scale, *latents, diffusion / WEIGHTS, diffusion / CARD]
    task, curve, compiled = distil(
        study.few_step,
        Distilled.of(study.few_step, study.generate),
        (teacher, made),
        data,
        study.seed,
        fabric,
        study.compute,
        state / state_key("few_step", config, inputs),
    )
    if not fabric.is_global_zero:
        return
    with atomic_path(out / "history.parquet") as path:
        curve.to_parquet(path, index=False)
    validation = curve[curve["metric"] == "val/loss"]["value"]
    facts = {
        "precision": resolve(study.compute)[1],
        "scans": {split: len({ids[row] for row in indices}) for split, indices in rows.items()},
        "teacher": card["weights_sha256"],
        "distillation": study.few_step.model_dump(mode="json"),
        "validation_loss": float(validation.iloc[-1]) if len(validation) else None,
        **({"compiled": True} if compiled else {}),
    }
    save_denoiser(task.average, task.card, out, facts)
