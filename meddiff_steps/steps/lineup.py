"""Step `lineup`: real and synthetic images in random order, for people to tell apart."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import write_atomic, write_json
from meddiff_steps.evaluation.lineup import choose
from meddiff_steps.imaging.selection import Images, drawn, held_out
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.report.lineup import lineup_name, render, tile
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    generated: options.Filtered,
    plan: options.Plan,
    out: Annotated[Path, typer.Option(help="page to write (HTML); private: it shows real scans")],
    key: Annotated[Path, typer.Option(help="which image is what, to write (JSON); not for readers")],
) -> None:
    """Write a page of as many held-out scans as accepted synthetic images, in random order, and its key.

    The page shows real scans: handle it as the cohort itself.
    """
    study = load_stage(config, "lineup")
    scans = read_manifest(manifest, study.covariates)
    real, _ = held_out(Images.of(Shards(images), "scan_id", "subject_id", scans, f"{manifest}"))
    made = Images.accepted(Shards(generated), pd.read_parquet(plan), f"{plan}", "show")
    made = replace(made, table=drawn(made.table, study.plan))
    shown = choose(real, made, study.lineup.images, study.lineup.seed or study.seed)
    sources = {"real": real.shards, "synthetic": made.shards}
    tiles = [
        tile(sources[kind].tensor("image", int(row))) for kind, row in zip(shown["kind"], shown["row"], strict=True)
    ]
    page = render(tiles, title=study.title or study.study, simulated=study.cohort.source == "simulated")
    entries = shown[["image", "kind", "id"]].to_dict("records")
    write_json(key, {"schema": "meddiff/lineup/v1", "lineup": lineup_name(tiles), "images": entries})
    write_atomic(out, page)
    log.info("%s: %d images; %s says which are real, and is not for readers", out, len(tiles), key)
