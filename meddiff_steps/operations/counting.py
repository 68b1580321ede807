"""What counting the work of stages is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps.config import Optimiser

Group = Literal["preparation", "training", "after_training", "applications"]

#: Forward and backward pass over the forward pass; and where features are computed again on the way back.
TRAINING, RECOMPUTED = 3.0, 4.0


@dataclass(frozen=True)
class Work:
    """What a stage has to do.

    Attributes
    ----------
    group
        Whether it comes before the trainings, is one, or comes after them; or is of an application, which `all` has
        not.
    jobs
        How many jobs share the work.
    flops
        Of networks, by network, all jobs together.
    units
        Of the processor beside them, by their names in `rates.PROCESSOR`, all jobs together.
    networks
        Networks that a job compiles where the study compiles.
    training
        Whether these are trained, which is when `compute.compile: auto` compiles.
    bytes
        That it leaves on disk.
    folder
        Where in the results they lie, None where they are few.
    """

    group: Group
    jobs: int
    flops: Mapping[str, float] = field(default_factory=dict)
    units: Mapping[str, float] = field(default_factory=dict)
    networks: int = 0
    training: bool = False
    bytes: float = 0.0
    folder: str | None = None


def counted(run: Callable[[], Any]) -> float:
    """Floating-point operations of what `run` does with torch."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def added(*parts: Mapping[str, float]) -> dict[str, float]:
    """Sums by name."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def times(count: float, part: Mapping[str, float]) -> dict[str, float]:
    """So many times what one takes."""
    return {name: count * value for name, value in part.items()}


def validations(settings: Optimiser) -> int:
    """How often a training looks at held-out scans: before the first step, every so many, and after the last."""
    return 1 + math.ceil(settings.steps / settings.validate_every)
