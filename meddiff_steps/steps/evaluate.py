"""Step `evaluate`: covariate fidelity, realism, diversity, reconstruction quality and sharpness, each beside what real
scans give.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import pyarrow as pa
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import Covariates, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic
from meddiff_steps.evaluation import metrics as measuring
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.feature_spaces.assemble import spaces
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.instruments.predictors import load_predictors
from meddiff_steps.instruments.segmenter import load_segmenter
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    generated: options.Generated,
    plan: options.Plan,
    reconstructions: Annotated[Path, typer.Option(help="Held-out images beside their reconstructions (.arrow).")],
    out: Annotated[Path, typer.Option(help="folder to write: metrics.json, predictions.parquet, components.parquet")],
    predictors: options.Predictors,
    embedder: options.Embedder | None = None,
    segmenter: options.Segmenter = None,
) -> None:
    """Measure covariate fidelity, realism, diversity, reconstruction quality and sharpness.

    Predictors, which learnt from real training scans only, are applied to synthetic images and to held-out real scans.
    Grid and counterfactual groups are left out where other groups exist: their covariates are spread on purpose, and
    correlations over them would flatter.
    """
    study = load_stage(config, "evaluate")
    scans, planned = read_manifest(manifest, study.covariates), _plan(plan, study.covariates)
    real, synthetic = Shards(images), Shards(generated)
    if real.shape("image") != synthetic.shape("image"):
        raise UserError(
            f"generated images have shape {synthetic.shape('image')}, preprocessed ones {real.shape('image')}. Both"
            " must come from this study."
        )
    made = Images.accepted(synthetic, planned, f"{plan}", "measure")
    if len(made) < len(planned):
        logger.warning("%d of %d planned subjects were generated; figures are about those", len(made), len(planned))
    context = Context(study.spatial_dims, embedder, study.preprocess.foreground)
    found = measuring.evaluate(
        Images.of(real, "scan_id", "subject_id", scans, f"{manifest}"),
        made,
        Images.of(Shards([reconstructions]), "scan_id", "subject_id", scans, f"{reconstructions}"),
        spaces(study.evaluate.spaces, context, study.evaluate.features),
        study,
        load_predictors(predictors),
        load_segmenter(segmenter) if segmenter is not None else None,
    )
    found.metrics["n"] |= {"subjects": int(scans["subject_id"].nunique()), "scans": len(scans), "planned": len(planned)}
    for name, table in (("predictions", found.predictions), ("components", found.components)):
        with atomic_path(out / f"{name}.parquet") as temporary:
            table.to_parquet(temporary, index=False)
    text = json.dumps(found.metrics, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(out / "metrics.json", f"{text}\n".encode())
    for name, entry in found.metrics["covariates"].items():
        key = "auc" if entry["kind"] == "categorical" else "r"
        logger.info(
            "%s: %s %s on synthetic images, %s on held-out real scans",
            name,
            key,
            entry[key]["value"],
            entry[key]["ceiling"]["value"],
        )


def _plan(path: Path, covariates: Covariates) -> pd.DataFrame:
    try:
        planned = pd.read_parquet(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable plan ({error}). Run the `plan` step again.") from None
    missing = [c for c in ("sample_id", "group", "seed_key", *covariates) if c not in planned]
    if missing:
        raise UserError(f"{path}: no column {missing[0]}. Run the `plan` step again.")
    return planned
