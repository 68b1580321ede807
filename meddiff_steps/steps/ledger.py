"""Step `ledger`: a complete release gets its ledger, the records of how it was made, and the root that seals it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.core.folders import CARD, TONE
from meddiff_steps.privacy.calibration import thresholds_of
from meddiff_steps.provenance import ledger
from meddiff_steps.provenance.record import lock
from meddiff_steps.release import seal
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    plan: options.Plan,
    decisions: options.Decisions,
    privacy: options.Privacy,
    calibration: options.Calibration,
    images: options.ImageTables,
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    description: Annotated[Path, typer.Option(help="dataset_description.json of the complete release")],
    private: Annotated[Path, typer.Option(help="private ledger to write (Parquet)")],
    out: Annotated[Path, typer.Option(help="root.json to write, in the release's folder `provenance`")],
    decoder: options.Decoder = None,
    masks: options.Masks = None,
    results: Annotated[
        Path | None,
        typer.Option(help="the study's folder, which holds its run records; by default where the frozen config lies"),
    ] = None,
) -> None:
    """Write the ledger of a release and everything else in its folder `provenance`.

    Must come last: every file that lies in the release by then is sealed, and any that is added later is a finding.
    """
    release = description.parent
    if out != release / seal.ROOT:
        raise UserError(f"--out {out}: expected {release / seal.ROOT}, beside {description}.")
    study = load_stage(config, "ledger")
    settings = study.generate
    cards = {"autoencoder": autoencoder / CARD, "diffusion": diffusion / CARD, "tone": diffusion / TONE[1]}
    if decoder:
        cards["decoder"] = decoder / CARD
    if masks:
        cards |= {f"mask_{name}": masks / name / CARD for name in ("autoencoder", "diffusion")}
    weights = {name: read_json(card)["weights_sha256"] for name, card in cards.items()}
    assert settings.num_inference_steps is not None  # what a study leaves open is decided when it is frozen
    recipe = ledger.Recipe(
        **weights,
        sampler=settings.sampler,
        num_inference_steps=settings.num_inference_steps,
        guidance=settings.guidance,
        guidance_scale=settings.guidance_scale,
        guidance_interval=list(settings.guidance_interval) if settings.guidance_interval else None,
        drawing_steps=settings.drawing_steps if decoder else None,
        batch_size=settings.batch_size,
        precision=study.compute.precision,
    )
    planned, judged = pd.read_parquet(plan), pd.read_parquet(decisions)
    tables = pd.concat([pd.read_parquet(path) for path in images], ignore_index=True)
    seal.prepare(release)
    rows = ledger.public_tables(planned, judged, tables, study.covariates, recipe)
    schema = ledger.schema_of(study.covariates, tables.columns.tolist(), study.text.column is not None)
    public = ledger.write_ledger(rows, schema, release / seal.TABLE, release / seal.LINES)
    candidates = ledger.private_tables(planned, judged, thresholds_of(read_json(calibration)), study.privacy.subgroup)
    hidden = ledger.write_ledger(candidates, ledger.private_schema(ledger.detectors_of(judged)), private)
    folder = results or config.parent.parent
    read = [plan, decisions, privacy, calibration, *images, *cards.values(), description]
    facts = seal.Facts(
        config=json.loads(config.read_text(encoding="utf-8")),
        privacy=read_json(privacy),
        heads={_name(path, folder): sha256_file(path) for path in read},
        results=folder,
        lock=lock(),
    )
    shard_of = dict(zip(planned["sample_id"].map(str), planned["shard"], strict=True))
    paths = set(tables["path"]) | set(tables.get(ledger.LABELS["path"], []))
    root = seal.complete(release, public, hidden, shard_of, paths, facts)
    logger.info(
        "%s: %d rows, %d released, root %s",
        out,
        root["ledger"]["rows"],
        root["ledger"]["released"],
        root["ledger"]["root"],
    )


def _name(path: Path, folder: Path) -> str:
    try:
        return path.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        raise UserError(
            f"{path}: not in the study's folder {folder}. Give --results the folder that holds both."
        ) from None
