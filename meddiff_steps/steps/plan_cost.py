"""Step `plan-cost`: what a study will cost, before anything is run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.config import load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.operations.cost import estimates, wall_hours
from meddiff_steps.operations.status import ran_without_gpu
from meddiff_steps.synthesis.size import planned_subjects


def run(
    config: Annotated[Path, typer.Argument(help="study (YAML)")],
    measured: Annotated[
        Path,
        typer.Option(
            help="results of a finished study on the machine that will run this one; its benchmarks and files are read"
        ),
    ],
    scans: Annotated[int | None, typer.Option(help="scans in the cohort; may be left out for a simulated one")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="jobs at a time")] = 1,
) -> None:
    """Estimate hours, GPU-hours and disk of every stage from what another study took.

    Run a small study first, on the same kind of machine: its rates carry over as far as its networks and images are
    alike. Larger networks use a GPU better than small ones, so that times measured on small ones are upper bounds
    there.
    """
    study = load_study(config)
    if scans is None:
        if study.cohort.source != "simulated":
            raise UserError(f"{config}: its cohort is not read here; say how many scans it has with --scans.")
        scans = study.cohort.subjects
    found = list(estimates(study, scans, measured))
    print(
        f"{study.study}: {scans:,} scans in, {planned_subjects(study.plan):,} synthetic subjects out; measured by"
        f" {measured}"
    )
    if ran_without_gpu(measured):
        print("measured without a GPU: GPU-hours are hours of such a processor, and say nothing of a GPU")
    print(f"{'stage':<14}{'jobs':>6}{'hours each':>12}{'hours':>10}{'GPU-hours':>11}{'disk, GB':>10}")
    for one in found:
        hours = one.jobs * one.hours_each
        print(
            f"{one.stage:<14}{one.jobs:>6}{one.hours_each:>12.2f}{hours:>10.2f}{hours if one.gpu else 0:>11.2f}"
            f"{one.disk / 1e9:>10.2f}"
        )
    hours, gpu = (
        sum(one.jobs * one.hours_each for one in found if one.gpu or everything) for everything in (True, False)
    )
    print(
        f"{'together':<14}{sum(one.jobs for one in found):>6}{'':>12}{hours:>10.2f}{gpu:>11.2f}"
        f"{sum(one.disk for one in found) / 1e9:>10.2f}"
    )
    print(f"from start to end with {jobs} jobs at a time: {wall_hours(found, jobs):.1f} hours")
