"""Step `simulate`: the simulated cohort, as a BIDS dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.config import SimulatedSource, load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.simulation.dataset import simulate_cohort
from meddiff_steps.steps import options


def run(
    config: options.Config,
    out: Annotated[Path, typer.Option(help="participants.tsv to write; its directory becomes the BIDS dataset.")],
    threads: options.Threads = 1,
) -> None:
    """Make the simulated brain cohort (a BIDS dataset), labelled SIMULATED wherever it appears."""
    study = load_stage(config, "simulate")
    if not isinstance(study.cohort, SimulatedSource):
        raise UserError(
            f"{config}: cohort.source is {study.cohort.source!r}; only a study with cohort.source 'simulated' is"
            " simulated."
        )
    if out.name != "participants.tsv":
        raise UserError(
            f"--out {out}: must be named participants.tsv, the file that completes a BIDS dataset; its directory"
            " becomes the dataset."
        )
    simulate_cohort(study.cohort, study.seed, out.parent, threads)
