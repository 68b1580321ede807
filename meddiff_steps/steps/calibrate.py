"""Step `calibrate`: the training set as the copy detectors see it, their thresholds and their controls.  All of it
private.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from safetensors.numpy import save_file

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.privacy.reference import ReferenceFiles, build_reference, calibration_card
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    autoencoder: options.Autoencoder,
    scale: options.Scale,
    embedder: options.Embedder,
    reference: Annotated[Path, typer.Option(help="directions of the training scans to write (safetensors)")],
    out: Annotated[Path, typer.Option(help="thresholds and controls to write (JSON)")],
    threads: options.Threads = 1,
) -> None:
    """Measure how near unseen real subjects come to the training set, and whether planted copies would be found."""
    study = load_stage(config, "calibrate")
    torch.set_num_threads(threads)
    shards = Shards(images)
    scans = read_manifest(manifest).set_index("scan_id").loc[shards.column("scan_id")].reset_index()
    table = pd.DataFrame({"row": np.arange(len(scans)), "subject_id": scans["subject_id"], "split": scans["split"]})
    files = ReferenceFiles(images, autoencoder, scale, embedder)
    training = table.loc[table["split"] == "train", "row"].to_numpy()
    if len(training) == 0:
        raise UserError(
            f"{manifest}: no preprocessed scan is in the train split, so there is nothing to compare with. Check splits"
            " and preprocessed/qc.parquet."
        )
    tensors = build_reference(files, training, study.privacy.detectors)
    with atomic_path(reference) as path:
        save_file(tensors, path)
    subgroup = study.privacy.subgroup
    groups = (
        scans.groupby("subject_id")[subgroup].first().astype(str)
        if subgroup
        else pd.Series("all", index=scans["subject_id"].unique())
    )
    card = calibration_card(files, tensors, table, groups, study.privacy.level, study.seed, study.privacy.detectors)
    write_json(out, card)
    if card["status"] != "CALIBRATED":
        log.warning(
            "NOT_CALIBRATED: %d calibration subjects, %d needed for privacy.level %g",
            card["subjects"],
            card["needed"],
            card["level"],
        )
