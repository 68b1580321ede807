"""Step `export`: one shard of a sealed release as a WebDataset tar file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.config import load_stage
from meddiff_steps.provenance.ledger import read_lines
from meddiff_steps.release.webdataset import write_tar
from meddiff_steps.steps import options

logger = logging.getLogger(__name__)


def run(
    config: options.Config,
    root: Annotated[Path, typer.Option(help="root.json of the sealed release")],
    images: Annotated[Path, typer.Option(help="table of one shard of images")],
    out: Annotated[Path, typer.Option(help="tar file to write")],
) -> None:
    """Write the released images of one shard, with their covariates, as a tar file for WebDataset readers.

    Only a sealed release is exported, and only images that are as they were sealed.
    """
    study, release = load_stage(config, "export"), root.parents[1]
    members = set(pd.read_parquet(images, columns=["sample_id"])["sample_id"])
    rows = [row for _, row in read_lines(release) if row["sample_id"] in members]
    logger.info("%s: %d images", out, write_tar(rows, release, out, study.study))
