"""What `plan-cost` expects, for those who ask for a study as a whole."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from meddiff_steps.config import Study


@dataclass(frozen=True)
class Expected:
    """Of a stage: its name, how many jobs it has, hours of one, bytes that it leaves."""

    stage: str
    jobs: int
    hours_each: float
    disk: float
    #: Of what is asked for: the target `all`, or others.
    asked: bool = True


def expected(
    study: Study, scans: int, cores: int, measured: Path | None, rules: Container[str] | None = None
) -> list[Expected]:
    """What every stage will take on processors like this machine's, on which networks are timed for it, or where a
    finished study was measured.

    Parameters
    ----------
    study, scans
        The study, and the scans in its cohort.
    cores
        Of the machine.
    measured
        Results of a finished study.
    rules
        What is asked for; the target `all` where left out.
    """
    from meddiff_steps.operations.core_speed import slowness
    from meddiff_steps.operations.cost import Machine, estimates, of_all  # loads torch
    from meddiff_steps.operations.rates import RULES

    machine = Machine(cores=min(8, cores), slower=slowness() if measured is None else {})
    found = list(estimates(study, scans, machine, measured))
    whole = of_all(found) if rules is None else [one for one in found if RULES.get(one.stage, one.stage) in rules]
    return [Expected(one.stage, one.jobs, one.hours_each, one.disk, one in whole) for one in found]


def hours(found: Sequence[Expected]) -> float:
    """Of all jobs that are asked for, one after the other."""
    return sum(one.jobs * one.hours_each for one in found if one.asked)
