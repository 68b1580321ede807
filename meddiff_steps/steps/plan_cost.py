"""Step `plan-cost`: what a study will cost, before anything is run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.config import Study, load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.operations.core_speed import slowness
from meddiff_steps.operations.cost import (
    APPLICATIONS,
    GROUPS,
    Estimate,
    Machine,
    as_json,
    estimates,
    of_all,
    together,
    too_long,
    wall_hours,
    wasted,
)
from meddiff_steps.operations.machine import this_machine
from meddiff_steps.operations.rates import REQUESTS, RULES
from meddiff_steps.operations.work import forward_flops
from meddiff_steps.synthesis.size import planned_subjects

#: That rules ask for at most.
CORES = 8


def run(
    config: Annotated[Path, typer.Argument(help="study (YAML)")],
    measured: Annotated[
        Path | None,
        typer.Option(
            help="results of a finished study on the machine that will run this one: its benchmarks and files give the"
            " rates"
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s that a GPU sustains on the networks; `cost.tflops` of the study when left out"),
    ] = None,
    scans: Annotated[
        int | None, typer.Option(min=1, help="scans in the cohort; `cost.scans` of the study when left out")
    ] = None,
    cores: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="cores of a job at most; rules ask for 8, which is the default with --tflops, else what"
            " this machine has of them",
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="jobs at a time")] = 1,
    here: Annotated[
        bool, typer.Option("--here", help="time networks on a core of this machine, instead of taking known rates")
    ] = False,
    as_object: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Estimate hours of GPUs and cores, jobs, memory and disk of every stage.

    The work is counted from the study: floating-point operations of its networks, voxels and subjects elsewhere.
    Applications stand apart: they are asked for by name, and are not in what is said of the whole. With
    --tflops a GPU does the networks at that rate; without, processors do, at rates that were measured on one with
    bfloat16 in hardware; others can take ten times as long, and --here times networks on this one. With --measured the
    rates are those of a finished study; of one that ran without a GPU, for stages that have none.
    """
    study = load_study(config)
    rate = tflops or study.cost.tflops
    if rate is None and measured is None and study.compute.device == "cuda":
        raise UserError(
            f"{config}: compute.device is cuda, and nothing says how fast a GPU is. Give --tflops (the rate that it"
            " sustains, some tenths of what its data sheet says), or --measured with results from such a machine."
        )
    on_gpu = rate is not None and study.compute.device != "cpu"
    cores = cores or (CORES if on_gpu else min(CORES, this_machine().cores))
    machine = Machine(rate * 1e12 if rate and on_gpu else None, cores, slowness() if here else {})
    count = _scans(config, study, scans)
    found = list(estimates(study, count, machine, measured))
    if as_object:
        print(json.dumps(as_json(study, count, found), indent=1))
        return
    print(f"{study.study}: {count:,} scans in, {planned_subjects(study.plan):,} synthetic subjects out")
    passes = vars(forward_flops(study))
    print("TFLOP of one pass: " + ", ".join(f"{name} {value / 1e12:.3g}" for name, value in passes.items() if value))
    rates = [f"networks at {machine.flops / 1e12:g} TFLOP/s of a GPU" if machine.flops else "networks on processors"]
    if machine.slower:
        rates[0] += f", of which a core here takes {max(machine.slower.values()):.2g} times as long as the known one"
    rates += [f"stages marked * as {measured} was measured"] if measured else []
    print("; ".join(rates))
    never = [one.stage for one in of_all(found) if not one.measured]
    if measured and never:
        print(f"not measured in {measured}, so at assumed rates: {', '.join(never)}")
    print("\n".join(_table(found)))
    print(
        f"from start to end with {jobs} jobs at a time, of up to {cores} cores each (--cores; this machine has"
        f" {this_machine().cores}): {wall_hours(of_all(found), jobs):.1f} hours"
    )
    for one in too_long(found):
        minutes = REQUESTS[one.stage].minutes
        print(
            f"{one.stage}: a job takes {one.hours_each:.1f} hours, and its rule asks for {minutes / 60:g}. Let it ask"
            f" for more: --set-resources {RULES.get(one.stage, one.stage)}:runtime={math.ceil(90 * one.hours_each)}"
        )
    for one in wasted(found):
        print(
            f"{one.stage}: its {one.jobs} jobs start and compile for {one.start_share:.0%} of their time; fewer and"
            f" larger ones would not ({SIZED_BY.get(one.stage, 'generate.shard_size')})"
        )


#: Keys that say how large the jobs of a stage are, where it is not `generate.shard_size`.
SIZED_BY = dict.fromkeys(("preprocess", "latents"), "preprocess.shards")


def _scans(config: Path, study: Study, given: int | None) -> int:
    found = given or study.cost.scans
    if found is None and study.cohort.source == "simulated":
        found = study.cohort.subjects
    if found is None:
        raise UserError(
            f"{config}: its cohort is not read here; say how many scans it has with --scans, or write it into the study"
            " as cost.scans."
        )
    return found


def _table(found: list[Estimate]) -> list[str]:
    """A line per stage, and sums."""
    width = max(17, *(len(one.stage) + 3 for one in found))
    lines = [
        f"{'stage':<{width}}{'jobs':>7}{'hours each':>12}{'GPU-hours':>11}{'core-hours':>12}{'PFLOP':>10}"
        f"{'memory, GB':>12}{'disk, GB':>10}"
    ]

    def sums(label: str, some: list[Estimate]) -> str:
        whole = together(some)
        return (
            f"{label:<{width}}{sum(one.jobs for one in some):>7}{'':>12}{whole['gpu_hours']:>11.2f}"
            f"{whole['core_hours']:>12.2f}{sum(one.flops for one in some) / 1e15:>10.4g}"
            f"{max((one.memory for one in some), default=0) / 1024:>12.1f}{whole['disk_bytes'] / 1e9:>10.2f}"
        )

    def line(one: Estimate) -> str:
        return (
            f"{one.stage + ' *' * one.measured:<{width}}{one.jobs:>7}{one.hours_each:>12.3f}{one.gpu_hours:>11.2f}"
            f"{one.core_hours:>12.2f}{one.flops / 1e15:>10.4g}{one.memory / 1024:>12.1f}{one.disk / 1e9:>10.2f}"
        )

    for label in GROUPS:
        some = [one for one in found if one.group == label]
        lines += map(line, some)
        lines.append(sums(f"= {label.replace('_', ' ')}", some))
    lines.append(sums("= together", of_all(found)))
    some = [one for one in found if one.group == APPLICATIONS]
    return [*lines, "applications, asked for by name", *map(line, some)] if some else lines
