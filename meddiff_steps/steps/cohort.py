"""Step `cohort`: from a BIDS dataset, a table or the simulated dataset to manifest.parquet and its card."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.cohort.bids import read_bids
from meddiff_steps.cohort.covariates import check_names
from meddiff_steps.cohort.manifest import build_manifest, write_manifest
from meddiff_steps.cohort.table import read_table
from meddiff_steps.config import BidsSource, Privacy, SimulatedSource, TableSource, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.privacy.size import subjects_needed
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    out: Annotated[Path, typer.Option(help="Manifest to write (Parquet).")],
    card: Annotated[Path, typer.Option(help="Card to write: counts, balance of the splits, duplicates (JSON).")],
    simulated: Annotated[
        Path | None,
        typer.Option(help="Root of the simulated BIDS dataset; needed if, and only if, cohort.source is simulated."),
    ] = None,
    threads: options.Threads = 1,
) -> None:
    """Read a cohort and write its manifest: one row per scan with digests, split and covariates.

    Every file is hashed, so the manifest pins down exactly which images the study saw; identical images are found by
    their content, and the subjects that share them go to one split.
    """
    study = load_stage(config, "cohort")
    source, text = study.cohort, study.text.column
    if isinstance(source, SimulatedSource) != (simulated is not None):
        expected = (
            "is needed: give the directory that step `simulate` wrote"
            if simulated is None
            else "belongs to simulated cohorts only: leave it out"
        )
        raise UserError(f"--simulated {expected} (cohort.source is {source.source!r}).")

    check_names(study.covariates)
    if isinstance(source, TableSource):
        frame = read_table(source, study.covariates, text)
    elif isinstance(source, BidsSource):
        frame = read_bids(source, study.covariates, text)
    else:
        frame = read_bids(
            BidsSource.model_validate({"source": "bids", "root": str(simulated), "suffix": "T1w"}),
            study.covariates,
            text,
        )
    log.info("%d scans of %d subjects", len(frame), frame["subject_id"].nunique())

    manifest, summary = build_manifest(
        frame,
        study.covariates,
        study.splits,
        study.seed,
        threads,
        source=source.source,
        alike_ids="distinct" if isinstance(source, SimulatedSource) else source.alike_ids,
        text_column=text,
    )
    with atomic_path(out) as temporary:
        write_manifest(manifest, temporary)
    write_atomic(
        card, (json.dumps(summary, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    )
    calibrating, detectors = summary["splits"]["calibration"]["subjects"], len(DETECTORS.names())
    if calibrating < subjects_needed(Privacy().level, detectors):
        least = math.ceil(100 * detectors / (calibrating + 1) - 1e-9) / 100
        log.info(
            "the calibration split has %d subjects, %s. Otherwise the privacy filter rejects nothing, and the run stops"
            " before the release (docs/own-cohort.md).",
            calibrating,
            f"enough where privacy.level is {least:g} or more" if least < 0.5 else "too few at any privacy.level",
        )
    counts = ", ".join(f"{name} {split['scans']}" for name, split in summary["splits"].items())
    log.info(
        "%s: %s scans; %d duplicate pairs, %d undecodable",
        out,
        counts,
        len(summary["duplicates"]),
        len(summary["undecodable"]),
    )
