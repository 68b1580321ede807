from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from safetensors.torch import load_file

from meddiff_steps.cohort.covariates import CovariateEncoding
from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.cohort.texts import COLUMN
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric, resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.core.folders import CARD, TEXT, WEIGHTS
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.models.pretrained.convert import published_encoding
from meddiff_steps.models.text_encoder import TextEncoder
from meddiff_steps.models.trained import load_denoiser, load_text_encoder, save_denoiser
from meddiff_steps.models.weights import ingredient, weights_digest
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.latent_data import CachedMaps, CachedTokens, LatentData
from meddiff_steps.training.loop import fit
from meddiff_steps.training.tasks.diffusion import DiffusionTask


def run(
    config: options.Config,
    manifest: options.Manifest,
    latents: options.Latents,
    scale: options.Scale,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    text: options.Text = None,
    label_latents: Annotated[
        list[Path] | None,
        typer.Option(help="latent shard of label maps; repeat for all. Left out where there are none"),
    ] = None,
    label_scale: Annotated[
        Path | None, typer.Option(help="masks/latents/scale.safetensors, where there are such")
    ] = None,
    base: options.Base = None,
    threads: options.Threads = 1,
) -> None:
    """Train the covariate-conditioned latent diffusion model, resuming after a kill."""
    study = load_stage(config, "diffusion")
    settings = study.diffusion
    table = read_manifest(manifest)
    shards = Shards(latents)
    ids, variants = shards.column("scan_id"), np.array(shards.column("variant"))
    rows = rows_by_split(table, ids)
    given, made, base_card = load_denoiser(base) if base else (None, None, None)
    if made is not None:
        encoding = made.encoding
    elif settings.network == "published":
        encoding = published_encoding(settings, study.covariates)
    else:
        encoding = CovariateEncoding.fit(table[table["scan_id"].isin(ids)], study.covariates)
    scans = table.set_index("scan_id").loc[ids].reset_index()
    encoder: TextEncoder | None = None
    tokens: dict[str, CachedTokens] = {}
    if text is not None:
        encoder, _ = load_text_encoder(text)
        cached = Shards([text / TEXT[2]])
        tokens[COLUMN] = CachedTokens(cached, [None if pd.isna(one) else one for one in scans[COLUMN]])
    maps: dict[str, CachedMaps] = {}
    if label_latents:
        if label_scale is None:
            raise UserError("--label-latents: latents of label maps need --label-scale, which the step `scale` wrote.")
        maps[LABELS] = CachedMaps(Shards(label_latents), load_file(label_scale), ids, variants)
    data = LatentData(
        shards=shards,
        prior=load_file(scale),
        covariates=encoding.encode(scans),
        train_rows=np.array(rows["train"]),
        val_rows=np.array([row for row in rows["val"] if variants[row] == 0], dtype=np.int64),
        tokens=tokens,
        maps=maps,
    )
    fabric = make_fabric(study.compute, threads, study.compute.devices)
    read = [manifest, scale, *latents]
    read += [text / TEXT[2]] if text else []
    read += [*(label_latents or []), *([label_scale] if label_scale else [])]
    read += [base / WEIGHTS, base / CARD] if base else []
    state = state / state_key("diffusion", config, read)
    task = DiffusionTask(settings, data, encoding, study.seed, fabric, given, text=study.text)
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
        **ingredient(base_card),
    }
    average, card = task.released, task.card
    if encoder is not None:
        average.text, card = encoder, replace(card, text=encoder.to_json())
        facts["text_encoder"] = weights_digest(encoder.state_dict())
    save_denoiser(average, card, out, facts)
