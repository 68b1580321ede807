"""Step `predictors`: what measures covariates in images, learnt from real training scans."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.predictors import MAX_TRAINING_SCANS, fit_predictors, save_predictors
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights and card")],
) -> None:
    """Learn to measure each covariate from the scans of the train split."""
    study = load_stage(config, "predictors")
    scans = read_manifest(manifest, study.covariates)
    every = Images.of(Shards(images), "scan_id", "subject_id", scans, f"{manifest}").of_splits(["train"])
    if len(every) == 0:
        raise UserError(
            f"{manifest}: no preprocessed scan is in the train split, so nothing can be measured. Check splits and"
            " preprocessed/qc.parquet."
        )
    train = every.at_most(MAX_TRAINING_SCANS)
    batches = train.batches("learning to measure")
    save_predictors(fit_predictors(batches, train.table, train.units.tolist(), study.covariates), out)
