"""What a study will cost: its work (`operations.work`) at the rates of a machine.

Rates are assumed (`operations.rates`), or taken from a finished study: how long its stages took, beside what its own
work would take at the assumed rates, says by how much such a machine is faster or slower at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from meddiff_steps.config import Compute, Study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import MANIFEST
from meddiff_steps.operations.counting import Group, Work
from meddiff_steps.operations.rates import (
    COMPILE_S,
    COMPILED_BEFORE_S,
    CORE_FLOPS,
    LIGHT_START_S,
    PROCESSOR,
    REQUESTS,
    START_S,
)
from meddiff_steps.operations.status import gpus_of, newest_study, ran_without_gpu, seconds, stage_of
from meddiff_steps.operations.work import work
from meddiff_steps.synthesis.size import planned_subjects

#: Stages before the trainings, these, and those from trained models to an audited release: all of `all`.
GROUPS: tuple[Group, ...] = ("preparation", "training", "after_training")
#: And those that are asked for by name.
APPLICATIONS: Group = "applications"
#: A stage that started and did next to nothing is taken to have worked for this share of its time, so that no rate is
#: infinite.
LEAST_WORK = 0.25
#: Share of the time of a stage, and hours of all its jobs, in which they start and compile: more of both is a waste.
WASTE = (0.2, 0.5)
#: FLOP/s of a GPU by which a stage is compared with itself, where nobody says how many it does.
NOMINAL = 1e14


@dataclass(frozen=True)
class Machine:
    """What jobs run on.

    Attributes
    ----------
    flops
        FLOP/s that a GPU sustains on the study's networks; None where jobs have none.
    cores
        Of a job at most.
    slower
        By how much networks take longer on a core than on that of `operations.rates`, by their names there.
    """

    flops: float | None = None
    cores: int = 8
    slower: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """One stage of the study that is planned.

    Attributes
    ----------
    stage, group
        Its name, and whether it comes before, in or after the trainings, or is of an application.
    jobs
        How many there are.
    hours_each
        From start to end of one.
    gpus, cores, memory
        That one holds meanwhile; memory in megabytes (2**20 bytes), at the first attempt.
    start_share
        Of its time, in which it starts and compiles.
    disk
        Bytes that the stage leaves.
    flops
        Of all its networks.
    measured
        Whether its rate is that of a finished study.
    """

    stage: str
    group: Group
    jobs: int
    hours_each: float
    gpus: int
    cores: int
    memory: int
    start_share: float
    disk: float
    flops: float
    measured: bool

    @property
    def hours(self) -> float:
        return self.jobs * self.hours_each

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.gpus

    @property
    def core_hours(self) -> float:
        return self.hours * self.cores


def compiled(networks: int, training: bool, compute: Compute, on_gpu: bool) -> int:
    """How many of a job's networks are compiled."""
    return networks if on_gpu and (compute.compile is True or (training and compute.compile == "auto")) else 0


def start_seconds(one: Work, study: Study, on_gpu: bool) -> float:
    """Of a job, before it works; what the first of several compiled, the others find compiled."""
    count = compiled(one.networks, one.training, study.compute, on_gpu)
    first = COMPILE_S * count / one.jobs
    return (START_S if one.flops else LIGHT_START_S) + first + COMPILED_BEFORE_S * count * (one.jobs - 1) / one.jobs


def working_seconds(stage: str, one: Work, machine: Machine, gpus: int) -> float:
    """Of a job, in which it works: networks and processor after each other, which is an upper bound."""
    cores = min(REQUESTS[stage].cores, machine.cores)
    if gpus and machine.flops:
        networks = sum(one.flops.values()) / (gpus * machine.flops)
    else:
        each = (amount * machine.slower.get(name, 1.0) / CORE_FLOPS[name] for name, amount in one.flops.items())
        networks = sum(each) / cores
    units = ((PROCESSOR[name], amount) for name, amount in one.units.items())
    beside = sum(unit.seconds * amount / (cores if unit.shared else 1) for unit, amount in units)
    return (networks + beside) / one.jobs


def estimates(study: Study, scans: int, machine: Machine, measured: Path | None = None) -> Iterator[Estimate]:
    """What each stage will take.

    Parameters
    ----------
    study, scans
        The study that is planned, and the scans in its cohort.
    machine
        Where it will run.
    measured
        Results folder of a finished study that ran there.  Stages that had no GPU there, and will have one here, stay
        as `machine` does them.

    Raises
    ------
    UserError
        The folder holds no finished study.
    """
    factors: dict[str, Factor] = {}
    disks: dict[str, float] = {}
    if measured is not None:
        if machine.flops is None and not ran_without_gpu(measured) and study.compute.device != "cpu":
            machine = replace(machine, flops=NOMINAL)
        factors, disks = measured_factors(measured, machine), measured_bytes(measured)
    for stage, one in work(study, scans).items():
        gpus = gpus_of(stage, study) if machine.flops else 0
        factor = factors.get(stage)
        if factor is not None and factor.on_gpu != (gpus > 0):
            factor = None
        start = start_seconds(one, study, gpus > 0) if factor is None else factor.start
        working = working_seconds(stage, one, machine, gpus) * (1.0 if factor is None else factor.working)
        disk = one.bytes * disks.get(one.folder or "", 1.0)
        yield Estimate(
            stage,
            one.group,
            one.jobs,
            (start + working) / 3600,
            gpus,
            min(REQUESTS[stage].cores, machine.cores),
            REQUESTS[stage].memory(study),
            start / (start + working),
            disk,
            sum(one.flops.values()),
            factor is not None,
        )


@dataclass(frozen=True)
class Factor:
    """What a finished study says of a stage: seconds in which a job starts, by how much work takes longer than at the
    assumed rates, and whether that was on a GPU.
    """

    start: float
    working: float
    on_gpu: bool


def finished(folder: Path) -> tuple[Study, dict[str, Work]]:
    """A finished study and its work.

    Raises
    ------
    UserError
        There is none in the folder.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{folder}: no cohort/manifest.parquet, expected the results of a finished study to measure by, such as"
            " results/demo."
        )
    study = newest_study(folder)
    return study, work(study, pq.read_metadata(manifest).num_rows)


def measured_seconds(folder: Path, column: str = "s") -> dict[str, list[float]]:
    """Seconds of every job of a study, by stage: of the clock, or (`cpu_time`) of processors."""
    took: dict[str, list[float]] = {}
    for benchmark in sorted((folder / "benchmarks").rglob("*.tsv")):
        took.setdefault(stage_of(benchmark.relative_to(folder / "benchmarks")), []).append(seconds(benchmark, column))
    return took


#: Seconds of a job from which Snakemake, which looks every half minute, knows what it took of processors.
SEEN = 120.0


def measured_factors(folder: Path, machine: Machine) -> dict[str, Factor]:
    """What a finished study says of its stages.

    Without a GPU by what jobs took of processors, so that neither the threads that they had nor what ran beside them
    counts; short ones by the clock, of which nothing else is known.
    """
    study, known = finished(folder)
    had_gpu, found = not ran_without_gpu(folder), {}
    of_processors = measured_seconds(folder, "cpu_time")
    for stage, took in measured_seconds(folder).items():
        one = known.get(stage)
        mean = sum(took) / len(took)
        if one is None or not mean:
            continue
        gpus = gpus_of(stage, study) if had_gpu and machine.flops else 0
        by, busy = machine, sum(of_processors[stage]) / len(took)
        if not gpus and mean > SEEN and busy:
            by, mean = replace(machine, cores=1), busy
        start = min(start_seconds(one, study, gpus > 0), (1 - LEAST_WORK) * mean)
        found[stage] = Factor(start, (mean - start) / working_seconds(stage, one, by, gpus), gpus > 0)
    return found


def measured_bytes(folder: Path) -> dict[str, float]:
    """What the folders of a finished study hold, over what they should."""
    _, known = finished(folder)
    return {
        one.folder: sum(path.stat().st_size for path in (folder / one.folder).rglob("*") if path.is_file()) / one.bytes
        for one in known.values()
        if one.folder and one.bytes
    }


def wall_hours(found: Sequence[Estimate], at_once: int) -> float:
    """Hours from start to end when `at_once` jobs run at a time and stages wait for each other."""
    return sum(math.ceil(one.jobs / at_once) * one.hours_each for one in found)


def together(found: Iterable[Estimate]) -> dict[str, float]:
    """Sums over stages: hours of GPUs and of cores that jobs hold, and bytes on disk."""
    found = list(found)
    return {
        "gpu_hours": sum(one.gpu_hours for one in found),
        "core_hours": sum(one.core_hours for one in found),
        "disk_bytes": sum(one.disk for one in found),
    }


def of_all(found: Iterable[Estimate]) -> list[Estimate]:
    """Those of the target `all`: without applications, which are asked for by name."""
    return [one for one in found if one.group != APPLICATIONS]


def wasted(found: Iterable[Estimate]) -> list[Estimate]:
    """Stages of several jobs that start for too much of their time: fewer, larger jobs would spare it."""
    share, hours = WASTE
    return [one for one in found if one.jobs > 1 and one.start_share > share and one.start_share * one.hours > hours]


def too_long(found: Iterable[Estimate]) -> list[Estimate]:
    """Stages of which a job takes longer than its rule asks for."""
    return [one for one in found if 60 * one.hours_each > REQUESTS[one.stage].minutes]


def as_json(study: Study, scans: int, found: Sequence[Estimate]) -> dict[str, Any]:
    """All of it as one object."""
    names = (*GROUPS, *([APPLICATIONS] if any(one.group == APPLICATIONS for one in found) else []))
    groups: dict[str, Any] = {name: together(one for one in found if one.group == name) for name in names}
    return {
        "study": study.study,
        "scans": scans,
        "subjects": planned_subjects(study.plan),
        "stages": [
            {
                "stage": one.stage,
                "group": one.group,
                "jobs": one.jobs,
                "hours_each": one.hours_each,
                "gpu_hours": one.gpu_hours,
                "core_hours": one.core_hours,
                "memory_mb": one.memory,
                "start_share": one.start_share,
                "disk_bytes": one.disk,
                "tflop": one.flops / 1e12,
                "measured": one.measured,
            }
            for one in found
        ],
        **groups,
        "together": together(of_all(found)),
    }
