"""Step `embedder`: the network of the learned copy detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from meddiff_steps.cohort.manifest import read_manifest, rows_by_split
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.embedder import train_embedder
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import options


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights and card")],
    threads: options.Threads = 1,
) -> None:
    """Train the embedding that finds changed copies, on the train split only."""
    study = load_stage(config, "embedder")
    torch.set_num_threads(threads)
    shards = Shards(images)
    rows = np.array(rows_by_split(read_manifest(manifest), shards.column("scan_id"))["train"])
    if len(rows) < 2:
        raise UserError(
            f"{manifest}: {len(rows)} training scan; telling subjects apart cannot be learnt from fewer than 2. Add"
            " scans or change splits."
        )
    model, losses = train_embedder(study.privacy.embedder, shards, rows, study.preprocess.voxel_mm, study.seed)
    last = losses[-max(1, len(losses) // 10) :]
    facts = {"image_shape": list(shards.shape("image")), "training_scans": len(rows)}
    save_model(model, out, facts | {"loss": round(float(np.mean(last)), 5)})
