"""Step `harmonisation_model`: networks between the looks of two groups of sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.applications.harmonisation import domains
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.config import load_stage
from meddiff_steps.imaging.selection import Images
from meddiff_steps.steps import options
from meddiff_steps.training.checkpoints import state_key
from meddiff_steps.training.unpaired import train_unpaired


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    out: Annotated[Path, typer.Option(help="folder to write: weights, card, training curve")],
    state: options.State,
    threads: options.Threads = 1,
) -> None:
    """Train networks from scans of some sites to how another shows them, and back."""
    study = load_stage(config, "harmonisation_model")
    settings = study.harmonisation
    cohort = Images.of_scans(images, manifest)
    groups = domains(settings, cohort.shards, cohort.table)
    fabric = make_fabric(study.compute, threads)
    found = state / state_key("harmonisation_model", config, [manifest, *images])
    root = f"{study.seed}/harmonisation"
    train_unpaired(groups, settings.unpaired, study.variants, study.compute, root, fabric, found, out)
