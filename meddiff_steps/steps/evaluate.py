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
from meddiff_steps.config import Covariates, Study, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, read_json, write_atomic
from meddiff_steps.evaluation import metrics as measuring
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments import features
from meddiff_steps.instruments.embedder import load_embedder
from meddiff_steps.instruments.segmenter import load_segmenter

logger = logging.getLogger(__name__)


def run(
    config: Annotated[Path, typer.Option(help="Frozen config of stage `evaluate`.")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet.")],
    images: Annotated[list[Path], typer.Option(help="Preprocessed shard; repeat for every shard.")],
    generated: Annotated[list[Path], typer.Option(help="Generated shard; repeat for every shard.")],
    plan: Annotated[Path, typer.Option(help="plan.parquet.")],
    reconstructions: Annotated[Path, typer.Option(help="Held-out images beside their reconstructions (.arrow).")],
    out: Annotated[Path, typer.Option(help="Figures to write (metrics.json).")],
    predictions: Annotated[
        Path, typer.Option(help="Table to write: requested or true beside measured covariates (.parquet).")
    ],
    embedder: Annotated[
        Path | None, typer.Option(help="privacy/embedder.safetensors: a feature space; left out if not given.")
    ] = None,
    embedder_card: Annotated[Path | None, typer.Option(help="privacy/embedder.json.")] = None,
    segmenter: Annotated[
        Path | None,
        typer.Option(help="evaluation/segmenter.safetensors: measures volumes as well; left out if not given."),
    ] = None,
    segmenter_card: Annotated[Path | None, typer.Option(help="evaluation/segmenter.json.")] = None,
    components: Annotated[
        Path | None, typer.Option(help="Table to write: where each image lies in the feature spaces (.parquet).")
    ] = None,
) -> None:
    """Measure covariate fidelity, realism, diversity, reconstruction quality and sharpness.

    Predictors of the covariates learn from real training scans only and are applied to synthetic images and to held-out
    real scans.  Grid and counterfactual groups are left out where other groups exist: their covariates are spread on
    purpose, and correlations over them would flatter.
    """
    study = load_stage(config, "evaluate")
    scans, planned = read_manifest(manifest, study.covariates), _plan(plan, study.covariates)
    real, synthetic = Shards(images), Shards(generated)
    if real.shape("image") != synthetic.shape("image"):
        raise UserError(
            f"generated images have shape {synthetic.shape('image')}, preprocessed ones {real.shape('image')}. Both"
            " must come from this study."
        )
    made = Images.of(synthetic, "sample_id", "seed_key", planned, f"{plan}")
    if len(made) < len(planned):
        logger.warning("%d of %d planned subjects were generated; figures are about those", len(made), len(planned))
    found = measuring.evaluate(
        Images.of(real, "scan_id", "subject_id", scans, f"{manifest}"),
        made,
        Images.of(Shards([reconstructions]), "scan_id", "subject_id", scans, f"{reconstructions}"),
        _spaces(study, len(real.shape("image")) - 1, embedder, embedder_card),
        study,
        load_segmenter(segmenter, segmenter_card) if segmenter is not None and segmenter_card is not None else None,
    )
    found.metrics["n"] |= {"subjects": int(scans["subject_id"].nunique()), "scans": len(scans), "planned": len(planned)}
    with atomic_path(predictions) as temporary:
        found.predictions.to_parquet(temporary, index=False)
    if components is not None:
        with atomic_path(components) as temporary:
            found.components.to_parquet(temporary, index=False)
    write_atomic(
        out, (json.dumps(found.metrics, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )
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


def _spaces(study: Study, spatial_dims: int, embedder: Path | None, card: Path | None) -> list[features.FeatureSpace]:
    spaces = [features.random_space(spatial_dims), features.radiomic_space()]
    if embedder is not None and card is not None:
        spaces.append(features.embedder_space(load_embedder(embedder, card), read_json(card)["weights_sha256"]))
    return spaces + [features.network_space(network, spatial_dims) for network in study.evaluate.features]
