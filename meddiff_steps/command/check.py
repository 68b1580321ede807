"""`meddiff check`: what would go wrong in a run, and what it will take."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.command.dry_run import DryRun
from meddiff_steps.command.run import check_targets, workflow_folder
from meddiff_steps.config import Study, load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.operations import check
from meddiff_steps.operations.check import Finding
from meddiff_steps.operations.expected import Expected, expected
from meddiff_steps.operations.machine import free_bytes, this_machine
from meddiff_steps.operations.status import another_cohort
from meddiff_steps.synthesis.size import planned_subjects

#: Wide enough for the longest state.
MARKS = {"ok": "ok      ", "warning": "warning ", "fail": "FAIL    "}


def run(
    study: Annotated[Path, typer.Argument(help="study (YAML)")],
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="what will be made, as of `meddiff run`: all (default), or an application"),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(help="results of a finished study on the machine that will run this one, such as results/demo"),
    ] = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="jobs will run on a cluster: leave out what this machine has")
    ] = False,
) -> None:
    """Say before hours are spent what would go wrong, and what the run will take.

    Tables, file names and the headers of up to 100 scans are read, no image data.  Exit code 0: nothing would fail;
    1: something would; 2: the study could not be read.
    """
    content = load_study(study)
    if targets:
        check_targets(targets, workflow_folder())
    counts = dict.fromkeys(MARKS, 0)
    for finding in findings(content, study, targets or [], measured, elsewhere):
        counts[finding.state] += 1
        print(f"{MARKS[finding.state]}{finding.topic}: {finding.text}", flush=True)
    print(f"{study}: {counts['ok']} ok, {counts['warning']} to look at, {counts['fail']} would fail")
    raise typer.Exit(1 if counts["fail"] else 0)


def findings(
    study: Study, path: Path, targets: Sequence[str], measured: Path | None, elsewhere: bool
) -> Iterator[Finding]:
    """Everything that is known, in the order in which it is found out."""
    with DryRun(path, targets) as planned:  # Snakemake plans while scans are looked at
        yield Finding("ok", "study", f"{path} can be read: {study.title or study.study}.")
        if other := another_cohort(study):
            yield Finding(other[0], "study", other[1])
        rules = _rules(planned) if targets else None
        if targets and "cohort" not in (rules or ()):
            told, count = check.shapes(study) if "shape_completion" in (rules or ()) else ([], 0)
            yield from told
            if count:
                yield _time(study, count, measured, rules)[0]
            yield from _planned(study, planned, elsewhere)
            return
        told, cohort = check.cohort(study)
        yield from told
        scans = 0
        if cohort is not None:
            scans = len(cohort.frame) or cohort.subjects
            if cohort.splits and (rules is None or "filter" in rules):
                yield check.privacy(study, cohort.splits["calibration"])
            if len(cohort.frame):
                yield from check.images(study, check.headers(cohort.frame, _progress))
                yield from check.beside(study, cohort.frame)
        if rules is None or "describe" in rules:
            yield check.licence(study)
        finding, found = _time(study, scans, measured, rules)
        yield finding
        if scans and not elsewhere:
            drawn = planned_subjects(study.plan) if rules is None or "generate" in rules else 0
            yield check.disk(study, scans, drawn, found, free_bytes(Path(study.results)))
        yield from _planned(study, planned, elsewhere)


def _time(
    study: Study, scans: int, measured: Path | None, rules: set[str] | None
) -> tuple[Finding, Sequence[Expected]]:
    """Hours, and what stages will take; `scans` may be shapes."""
    try:
        found = expected(study, scans, this_machine().cores, measured, rules) if scans else []
    except UserError as error:
        return Finding("warning", "time", str(error)), []
    return check.time(found, measured), found


def _planned(study: Study, planned: DryRun, elsewhere: bool) -> Iterator[Finding]:
    """What the jobs ask for, or why they cannot be planned."""
    try:
        jobs = planned.jobs()
    except UserError as error:
        yield Finding("fail", "workflow", str(error))
    else:
        yield from check.needs(study, jobs, None if elsewhere else this_machine())


def _rules(planned: DryRun) -> set[str] | None:
    """Rules that have something to do; None where that cannot be planned."""
    try:
        return {job["rule"] for job in planned.jobs()}
    except UserError:
        return None


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rheaders: {done} of {total}" if done < total else "\r\033[K")
        sys.stderr.flush()
