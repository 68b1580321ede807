"""Step `preprocess`: one shard of scans to the study's grid and intensity scale."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.cohort.decisions import read_decisions
from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.cohort.splits import shard_of
from meddiff_steps.config import MNI152, Registration, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.brain_extraction import load_deepbet
from meddiff_steps.imaging.preprocess import preprocess_shard
from meddiff_steps.imaging.registration import load_template
from meddiff_steps.steps import options


def run(
    config: options.Config,
    manifest: options.Manifest,
    shard: options.Shard,
    out: Annotated[Path, typer.Option(help="Shard to write (.arrow).")],
    qc: Annotated[Path, typer.Option(help="Quality table to write (.parquet).")],
    template: options.Template = None,
    exclude: options.Exclude = None,
    threads: options.Threads = 1,
) -> None:
    """Bring one shard of scans to the study's grid and intensity scale.

    Writes the images, and a table that says what was done to each scan and why any was left out.
    """
    study = load_stage(config, "preprocess")
    if study.preprocess.registration is not None:
        _check_template(study.preprocess.registration, template)
    if study.preprocess.brain_extraction is not None:
        load_deepbet()  # refuses before any scan is read
    if shard >= study.preprocess.shards:
        raise UserError(
            f"--shard {shard}: preprocess.shards is {study.preprocess.shards}, so shards are numbered 0 to"
            f" {study.preprocess.shards - 1}."
        )
    if study.preprocess.exclude is not None and str(exclude) != study.preprocess.exclude:
        raise UserError(f"--exclude {exclude}: preprocess.exclude is {study.preprocess.exclude}. Give that file.")
    rows = read_manifest(manifest)
    excluded = read_decisions(exclude, rows["scan_id"].tolist()) if exclude is not None else {}
    mine = [shard_of(subject, study.preprocess.shards) == shard for subject in rows["subject_id"]]
    table = preprocess_shard(
        rows[pd.Series(mine, index=rows.index, dtype=bool)], study.preprocess, out, threads, excluded
    )
    with atomic_path(qc) as temporary:
        table.to_parquet(temporary, index=False)


def _check_template(settings: Registration, given: Path | None) -> None:
    """Refuse a template that cannot be used before any scan is read, and one that the run's record would not have."""
    if settings.template != MNI152 and (given is None or str(given) != settings.template):
        raise UserError(
            f"--template {given}: preprocess.registration.template is {settings.template}. Give that file, so that the"
            " record of the run has its digest."
        )
    load_template(settings.template)
