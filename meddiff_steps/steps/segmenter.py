"""Step `segmenter`: the network that measures volumes, trained on label maps of real scans."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.selection import Images, held_out
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments import segmenter
from meddiff_steps.models.weights import save_model
from meddiff_steps.steps import options


def run(
    config: options.Config,
    manifest: options.Manifest,
    qc: options.Quality,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights and card")],
    threads: options.Threads = 1,
) -> None:
    """Train a segmenter on label maps of the train split, and say how well it does on held-out scans.

    Label maps are files of the cohort, such as the derivatives of a BIDS dataset; `segmentation.labels` says where.
    """
    study = load_stage(config, "segmenter")
    settings, voxel_mm = study.segmentation, study.preprocess.voxel_mm
    if settings is None or voxel_mm is None:
        raise UserError(
            "the study has no section `segmentation`, or no volumes: there is nothing to train. Leave this step out."
        )
    torch.set_num_threads(threads)
    device, _ = resolve(study.compute)
    shards = Shards(images)
    scans = Images.of(shards, "scan_id", "subject_id", read_manifest(manifest), f"{manifest}")
    train, held = (
        scans.of_splits(["train"]).at_most(segmenter.MAX_SCANS),
        held_out(scans)[0].at_most(segmenter.MAX_SCANS),
    )
    grids = pd.read_parquet(qc).set_index("scan_id")["target_affine"]
    affines = {name: np.array(json.loads(grids[name])).reshape(4, 4) for name in [*train.ids, *held.ids]}
    shape = shards.shape("image")[1:]
    model = segmenter.new_segmenter(settings, shape, study.seed)
    with segmenter.labelled(train, affines, settings, model) as (found, labels):
        if len(found) < segmenter.MIN_SCANS:
            example = filled_in(settings.labels, train.table.iloc[0].to_dict(), "segmentation.labels")
            raise UserError(
                f"segmentation.labels: {len(found)} of {len(train)} training scans have a readable label map, at least"
                f" {segmenter.MIN_SCANS} are needed; looked for {example} and others. Correct the pattern, or leave"
                " the section out."
            )
        model = segmenter.train_segmenter(model, settings, found, labels, study.variants.flip, study.seed, device)
        content = {
            "image_shape": list(shards.shape("image")),
            "structures": list(settings.structures),
            "channels": list(settings.channels),
        }
        content |= {"training_scans": len(found), "steps": settings.optimiser.steps}
    with segmenter.labelled(held, affines, settings, model) as (found, labels):
        content["held_out"] = (
            segmenter.agreement(model, found, labels, math.prod(voxel_mm) / 1000, study.seed)
            if len(found)
            else {"scans": 0}
        )
    save_model(model, out, content)
