"""Step `downstream_design`: freeze the design of the downstream study, and refuse it while nothing is trained yet."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.config import load_stage
from meddiff_steps.core.files import write_json
from meddiff_steps.downstream.design import (
    check,
    design_digest,
    levels_of,
    real_samples,
    synthetic_samples,
    usable_groups,
)
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    plan: options.Plan,
    out: Annotated[Path, typer.Option(help="the design to write (JSON)")],
) -> None:
    """Count what every arm needs from the manifest and the plan alone: too few planned subjects are refused here."""
    study = load_stage(config, "downstream_design")
    downstream, levels = study.downstream, levels_of(study.downstream, study.covariates)
    planned = pd.read_parquet(plan)
    groups = usable_groups(downstream, study.plan)
    made = [
        synthetic_samples(planned, downstream, groups, levels, study.seed, source, generator)
        for source in ("filtered", "generated")
        for generator in range(downstream.generator_seeds)
    ]
    real = real_samples(read_manifest(manifest, study.covariates), downstream, levels, study.seed)
    copies = real[real["split"] == "train"].assign(kind="reconstruction")
    arms = check(downstream, levels, pd.concat([real, *made, copies], ignore_index=True), len(planned))
    write_json(
        out,
        {
            "target": downstream.target,
            "levels": levels,
            "groups": groups,
            "arms": arms,
            "primary": downstream.primary.model_dump(mode="json"),
            "margin": downstream.margin,
            "seeds": downstream.seeds,
            "generator_seeds": downstream.generator_seeds,
            "classifier": downstream.classifier.model_dump(mode="json"),
            "design_sha256": design_digest(downstream, study.variants.flip),
        },
    )
    for arm in arms:
        log.info("arm %s: %s real, %s added (planned)", arm["name"], arm["images"]["real"], arm["images"]["added"])
