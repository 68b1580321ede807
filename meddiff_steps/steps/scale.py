from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from safetensors.numpy import save_file

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.latent_statistics import gaussian_tensors, measure_standardisation
from meddiff_steps.steps import options


def run(
    config: options.Config,
    manifest: options.Manifest,
    latents: options.Latents,
    scale: Annotated[Path, typer.Option(help="latents/scale.safetensors to write")],
    out: Annotated[Path, typer.Option(help="latents/manifest.json to write")],
) -> None:
    """Measure how the latents of the train split are to be standardised, and fit the Gaussian that the diffusion model
    starts from.
    """
    study = load_stage(config, "scale")
    shards = Shards(latents)
    table, ids = read_manifest(manifest), shards.column("scan_id")
    rows = rows_by_split(table, ids)["train"]
    standardise = measure_standardisation(shards.tensor("mean", row) for row in rows)
    tensors = {"offset": standardise.offset, "scale": standardise.scale}
    if study.latents.gaussian_rank:
        encoding = CovariateEncoding.fit(table, study.covariates)
        scans = table.set_index("scan_id").loc[[ids[row] for row in rows]].reset_index()
        tensors |= gaussian_tensors(
            lambda i: standardise(shards.tensors("mean", [rows[i]]))[0],
            encoding.encode(scans),
            encoding.level_counts,
            study.latents.gaussian_rank,
            scans["subject_id"].to_numpy(),
        )
    with atomic_path(scale) as path:
        save_file(tensors, path)
    offset = standardise.offset
    write_json(
        out,
        {
            "latent_shape": list(offset.shape[1:]),
            "train_latents": len(rows),
            "channel_offset": offset.mean(tuple(range(2, offset.ndim)))[0].round(5).tolist(),
            "channel_scale": standardise.scale.ravel().round(5).tolist(),
        },
    )
