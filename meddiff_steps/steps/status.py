"""Step `status`: how far a study is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import holder
from meddiff_steps.core.folders import MANIFEST
from meddiff_steps.operations.status import (
    Stage,
    gpus_of,
    jobs_of_run,
    newest_study,
    ran_without_gpu,
    read_stages,
    results_of,
    table,
)


def run(
    study: Annotated[Path, typer.Argument(help="study (YAML), or its folder results/STUDY")],
    measured: Annotated[
        Path | None,
        typer.Option(
            help=(
                "results of a finished study on such a machine: says what stages will take of which nothing is done yet"
            )
        ),
    ] = None,
) -> None:
    """Per stage: how many jobs are done, running, stopped and failed, hours and GPU-hours used and expected.

    Looks at files alone. A stopped job was ended from outside (Ctrl-C, a time limit, memory) and goes on with the next
    run; a failed one gave up with an error; the end says where their logs are. A job that was killed without a word
    (memory, a dead node) counts as running until the run ends or tries again; how long ago its log grew is the sign.
    GPU-hours are those of jobs that succeeded; what a failed attempt used is in the scheduler's accounts.
    """
    results = results_of(study)
    worker = holder(results / ".lock")
    stages = read_stages(results, active=worker is not None)
    estimated = estimated_hours(results, measured) if measured else {}
    known = {stage.name for stage in stages}
    frozen = newest_study(results)
    stages += [
        Stage(name, jobs, gpus=gpus_of(name, frozen)) for name, (jobs, _) in estimated.items() if name not in known
    ]
    print(f"{results}: {'a run works here, ' + worker if worker else 'no run works here'}")
    jobs = jobs_of_run(results)
    if jobs is not None:
        on = (
            ""
            if worker or jobs[0] == jobs[1]
            else "; the same `meddiff run` goes on. If it says that the folder is locked, which a kill leaves behind:"
            " `meddiff run STUDY.yaml -- --unlock`"
        )
        print(f"{jobs[0]} of {jobs[1]} jobs of the {'run' if worker else 'last run'} are done{on}")
    if not stages:
        print("no job has run yet")
        return
    hours = {name: hours for name, (_, hours) in estimated.items()}
    print("\n".join(table(stages, time.time(), hours, without_gpu=ran_without_gpu(results))))


def estimated_hours(results: Path, measured: Path) -> dict[str, tuple[int, float]]:
    """Jobs and hours of every stage of `all`, as `plan-cost` estimates them.

    Raises
    ------
    UserError
        The cohort has not been read yet, or nothing was measured.
    """
    import pyarrow.parquet as pq

    from meddiff_steps.operations.cost import Machine, estimates, of_all  # loads torch

    manifest = results / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{manifest}: not there yet, so the number of scans is not known. Ask again after the stage `cohort`, or"
            " use plan-cost."
        )
    found = estimates(newest_study(results), pq.read_metadata(manifest).num_rows, Machine(), measured)
    return {one.stage: (one.jobs, one.jobs * one.hours_each) for one in of_all(found)}
