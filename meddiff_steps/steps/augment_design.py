"""Step `augment_design`: freeze the design of the augmentation study, and refuse it while nothing is trained yet."""

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

log = logging.getLogger(__name__)


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `augment_design`")],
    manifest: Annotated[Path, typer.Option(help="cohort/manifest.parquet")],
    plan: Annotated[Path, typer.Option(help="plan.parquet")],
    out: Annotated[Path, typer.Option(help="the design to write (JSON)")],
) -> None:
    """Count what every arm needs from the manifest and the plan alone: too few planned subjects are refused here."""
    study = load_stage(config, "augment_design")
    augment, levels = study.augment, levels_of(study.augment, study.covariates)
    planned = pd.read_parquet(plan)
    groups = usable_groups(augment, study.plan)
    made = [
        synthetic_samples(planned, augment, groups, levels, study.seed, source, generator)
        for source in ("filtered", "generated")
        for generator in range(augment.generator_seeds)
    ]
    real = real_samples(read_manifest(manifest, study.covariates), augment, levels, study.seed)
    copies = real[real["split"] == "train"].assign(kind="reconstruction")
    arms = check(augment, levels, pd.concat([real, *made, copies], ignore_index=True), len(planned))
    write_json(
        out,
        {
            "target": augment.target,
            "levels": levels,
            "groups": groups,
            "arms": arms,
            "primary": augment.primary.model_dump(mode="json"),
            "margin": augment.margin,
            "seeds": augment.seeds,
            "generator_seeds": augment.generator_seeds,
            "classifier": augment.classifier.model_dump(mode="json"),
            "design_sha256": design_digest(augment),
        },
    )
    for arm in arms:
        log.info("arm %s: %s real, %s added (planned)", arm["name"], arm["images"]["real"], arm["images"]["added"])
