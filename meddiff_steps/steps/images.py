"""Step `images`: one shard of synthetic images as files of the release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path
from meddiff_steps.imaging.encoding import Grid
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.release.dataset import write_images
from meddiff_steps.release.layout import Layout
from meddiff_steps.release.measuring import Instruments
from meddiff_steps.steps import options


def run(
    config: options.Config,
    generated: Annotated[Path, typer.Option(help="Shard of filtered images (.arrow).")],
    released: options.Released,
    release: Annotated[Path, typer.Option(help="Root folder of the released dataset.")],
    out: Annotated[
        Path, typer.Option(help="Table to write (.parquet): path, digests and measurements of every image.")
    ],
    predictors: options.Predictors | None = None,
    segmenter: options.Segmenter = None,
) -> None:
    """Write one shard of synthetic images into the release, and measure covariates in them.

    3D studies get one NIfTI file per subject, and a label map where there is a segmenter or images are drawn from such;
    2D studies one PNG.  Each says in its own header that it is synthetic.
    """
    study = load_stage(config, "images")
    grid = Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    layout = Layout.of(study.spatial_dims, study.plan, study.release)
    columns = ["sample_id"] if layout.size is None else ["sample_id", "group", "index"]
    subjects = pd.read_parquet(
        released, columns=columns, filters=[("sample_id", "in", Shards([generated]).column("sample_id"))]
    )
    folders = (
        {}
        if layout.size is None
        else dict(zip(subjects["sample_id"], map(layout.folder, subjects["group"], subjects["index"]), strict=True))
    )
    torch.set_num_threads(1)
    structures = tuple(study.pairs.structures) if study.pairs else ()
    instruments = Instruments.load(
        {"predictors": predictors, "segmenter": segmenter}, study.covariates, grid, structures
    )
    table = write_images(
        generated, release, grid, study.study, study.release.suffix, set(subjects["sample_id"]), folders, instruments
    )
    with atomic_path(out) as temporary:
        table.to_parquet(temporary, index=False)
