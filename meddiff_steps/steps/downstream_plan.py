"""Step `downstream_plan`: the subjects that a further generator seed draws for the downstream study."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import atomic_path, read_json
from meddiff_steps.downstream.design import needed, real_samples, synthetic_samples
from meddiff_steps.steps import options
from meddiff_steps.synthesis.plan import reseed

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    design: Annotated[Path, typer.Option(help="augmentation/design.json")],
    manifest: options.Manifest,
    plan: options.Plan,
    generator: Annotated[int, typer.Option(help="number of the generator seed, from 1; 0 is the released cohort")],
    out: Annotated[Path, typer.Option(help="plan to write (Parquet), in the columns of plan.parquet")],
) -> None:
    """Take those planned subjects that some arm needs, with the same requests in the same shards, and give them other
    noise.
    """
    study = load_stage(config, "downstream_plan")
    downstream, frozen, planned = study.downstream, read_json(design), pd.read_parquet(plan)
    levels, groups = frozen["levels"], frozen["groups"]
    tables = [
        synthetic_samples(planned, downstream, groups, levels, study.seed, kind) for kind in ("filtered", "generated")
    ]
    wanted = set(
        needed(
            downstream,
            levels,
            pd.concat(
                [real_samples(read_manifest(manifest, study.covariates), downstream, levels, study.seed), *tables],
                ignore_index=True,
            ),
        )
    )
    chosen = reseed(planned[planned["sample_id"].isin(wanted)], generator)
    with atomic_path(out) as path:
        chosen.to_parquet(path, index=False)
    log.info("generator seed %d draws %d of %d planned subjects", generator, len(chosen), len(planned))
