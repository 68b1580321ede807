from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.numpy import save_file

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import Study, load_stage
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.denoiser.effects import covariate_features
from meddiff_steps.models.latent_statistics import Standardisation, fit_effects, measure_standardisation
from meddiff_steps.models.trained import load_denoiser, load_first_stage
from meddiff_steps.steps import options


def run(
    config: options.Config,
    manifest: options.Manifest,
    latents: options.Latents,
    images: options.Images,
    autoencoder: options.Autoencoder,
    scale: Annotated[Path, typer.Option(help="latents/scale.safetensors to write")],
    out: Annotated[Path, typer.Option(help="latents/manifest.json to write")],
    base: options.Base = None,
    threads: options.Threads = 1,
) -> None:
    """Measure how the latents of the train split are to be standardised, and how they depend on covariates.

    With `--base init/diffusion` nothing is measured: the given network has its own.
    """
    study = load_stage(config, "scale")
    shards = Shards(latents)
    table, ids = read_manifest(manifest), shards.column("scan_id")
    # Of scans as they are, since images are generated as if of these: the mean of shifted ones is blurred.
    variants = shards.column("variant")
    rows = [row for row in rows_by_split(table, ids)["train"] if variants[row] == 0]
    if base:
        found = load_denoiser(base)[0].prior()
    else:
        found = _measured(shards, rows, table, ids, study, images, autoencoder, threads)
    with atomic_path(scale) as path:
        save_file(found, path)
    offset = found["offset"]
    write_json(
        out,
        {
            "latent_shape": list(offset.shape[1:]),
            "train_latents": len(rows),
            "channel_offset": offset.mean(tuple(range(2, offset.ndim)))[0].round(5).tolist(),
            "scale": float(found["scale"]),
            "deviation": float(found["effects.deviation"]),
            "readout_deviations": found["effects.readout_deviations"].astype(float).round(5).tolist(),
        },
    )


def _measured(
    shards: Shards,
    rows: list[int],
    table: pd.DataFrame,
    ids: list[str],
    study: Study,
    images: list[Path],
    autoencoder: Path,
    threads: int,
) -> dict[str, np.ndarray]:
    standardise = measure_standardisation(shards.tensor("mean", row) for row in rows)
    encoding = CovariateEncoding.fit(table[table["scan_id"].isin(ids)], study.covariates)
    scans = table.set_index("scan_id").loc[[ids[row] for row in rows]].reset_index()
    values, known = covariate_features(torch.from_numpy(encoding.encode(scans)), encoding.level_counts)
    fabric = make_fabric(study.compute, threads)
    first_stage = load_first_stage(autoencoder)[0].requires_grad_(False)
    fabric.to_device(first_stage)
    scanned = Shards(images)
    place = {name: row for row, name in enumerate(scanned.image_ids())}
    tensors = (fabric.to_device(torch.from_numpy(value)) for value in (standardise.offset, standardise.scale))
    scaled = Standardisation[torch.Tensor](*tensors)
    effects = fit_effects(
        lambda row: standardise(shards.tensors("mean", [rows[row]]))[0],
        values.numpy(),
        known.numpy(),
        scans["subject_id"].to_numpy(),
        lambda row: scanned.tensor("image", place[ids[rows[row]]]).astype(np.float32),
        lambda standardised: first_stage.decode(scaled.inverse(fabric.to_device(standardised))),
    )
    found = {"offset": standardise.offset, "scale": standardise.scale}
    return found | {f"effects.{name}": np.asarray(value) for name, value in effects.items()}
