"""How two sides are timed beside each other, and what the machine could do at best.

Absolute times on a shared machine mean little.  Two sides therefore take turns in one process, each first as often as
the other, and what is reported is the ratio of each turn, its median, and how far it spread.  Processor seconds are
kept beside wall seconds: where both ratios agree, neighbours on the machine did not make the result.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from meddiff_steps.compute.device import resolve
from meddiff_steps.config import Compute
from meddiff_steps.core.random_streams import philox
from meddiff_steps.statistics.bootstrap import Figure, figure, rounded

#: Resamples behind the interval of a median over turns.
RESAMPLES = 2000
#: Side of the matrices, and bytes of the array, by which a machine's rates are measured.
MATRIX, COPIED = 1024, 2**27


@dataclass
class Clock:
    """Accumulated wall and processor seconds of one side."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


@dataclass
class Turns:
    """Seconds per unit of work of sides that took turns, by their names.

    Attributes
    ----------
    wall
        Seconds of the wall, one per turn.
    cpu
        Seconds of the processor, all threads together.
    """

    wall: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, side: str, clock: Clock, units: float) -> None:
        """Note one turn of a side, in which it did `units` units of work."""
        self.wall[side].append(clock.wall / units)
        self.cpu[side].append(clock.cpu / units)

    def row(
        self, what: str, size: str, unit: str, *, ours: str = "ours", peer: str = "peer", **more: Any
    ) -> dict[str, Any]:
        """A row of a result: how many units per second two of the sides do, and the ratio, above 1 where the first is
        faster.
        """
        count = min(len(self.wall[ours]), len(self.wall[peer]))
        mine, other = np.array(self.wall[ours][:count]), np.array(self.wall[peer][:count])
        return {
            "what": what,
            "size": size,
            "unit": unit,
            "ours": median_figure(1.0 / mine, what),
            "peer": median_figure(1.0 / other, what),
            "ratio": (
                median_figure(other / mine, what)
                | {"range": [rounded(float((other / mine).min())), rounded(float((other / mine).max()))]}
            ),
            "ratio_cpu": median_figure(
                np.array(self.cpu[peer][:count]) / np.maximum(self.cpu[ours][:count], 1e-9), what
            ),
        } | more


def take_turns(ours: Callable[[], float], peer: Callable[[], float], turns: int, warm_up: bool = True) -> Turns:
    """`rounds` of two sides."""
    return rounds({"ours": ours, "peer": peer}, turns, warm_up)


def rounds(sides: Mapping[str, Callable[[], float]], turns: int, warm_up: bool = True) -> Turns:
    """Run all sides `turns` times, another one first each time; each call returns how many units of work it did.

    A warm-up call of each is not counted: it fills caches and lets libraries choose their kernels.
    """
    names = list(sides)
    if warm_up:
        for run in sides.values():
            run()
    found = Turns()
    for turn in range(turns):
        first = turn % len(names)
        for side in names[first:] + names[:first]:
            clock = Clock()
            with clock.running():
                units = sides[side]()
            found.add(side, clock, units)
    return found


def median_figure(values: Sequence[float] | np.ndarray, label: str) -> Figure:
    """Median of values, one per turn, with its 95 % bootstrap interval; no interval from a single one."""
    rows = np.asarray(values, dtype=np.float64)
    picked = philox("benchmarks", label).integers(len(rows), size=(RESAMPLES, len(rows)))
    return figure(float(np.median(rows)), np.median(rows[picked], axis=1), len(rows))


# ---------------------------------------------------------------------------------------------------- floors


def matmul_rate(precision: str = "32-true", turns: int = 5) -> float:
    """Floating-point operations per second of a matrix product on the threads in use, in bfloat16 for `bf16-mixed`; the
    best of some tries.
    """
    a = torch.ones(MATRIX, MATRIX, dtype=torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    a @ a
    best = min(_seconds(lambda: a @ a) for _ in range(turns))
    return 2.0 * MATRIX**3 / best


def matmul_rates() -> dict[str, float]:
    """`matmul_rate` of both sides, each in its own precision: ours takes what `compute.precision: auto` means here, the
    peer float32.
    """
    return {"ours": matmul_rate(resolve(Compute(device="cpu"))[1]), "peer": matmul_rate()}


def copy_rate(turns: int = 5) -> float:
    """Bytes per second, read and written together, of a copy in memory; the best of some tries."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    target.copy_(source)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(turns))
    return 2.0 * COPIED / best


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def flops(run: Callable[[], Any]) -> float:
    """Floating-point operations of convolutions, matrix products and attention in a call, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def floor(operations: float, rate: float, seconds: float) -> dict[str, Any]:
    """How near a measured time is to that of its matrix products alone at the machine's measured rate."""
    least = operations / rate
    return {
        "kind": "matrix products",
        "gflop": rounded(operations / 1e9),
        "seconds": rounded(least),
        "reached": rounded(least / seconds),
    }


def copying(size: float, rate: float, seconds: float) -> dict[str, Any]:
    """How near a measured time is to that of moving its bytes alone at the machine's measured rate of copying."""
    return {
        "kind": f"{size / 1024:.0f} KiB read and written",
        "seconds": rounded(size / rate),
        "reached": rounded(size / rate / seconds),
    }


def private_mebibytes() -> float:
    """Memory of this process that nobody can take back: without pages of mapped files, which the system may drop."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return float("nan")


# --------------------------------------------------------------------------------------------------- results


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, cores in use, load of others, rates; and the precision that ours
    takes there.
    """
    precision = resolve(Compute(device="cpu"))[1]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
        )
    except OSError:
        model = platform.processor()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "precision": precision,
        "matmul_gflops": rounded(matmul_rate() / 1e9),
        "matmul_gflops_ours": rounded(matmul_rate(precision) / 1e9),
        "copy_gbytes": rounded(copy_rate() / 1e9),
    }


def versions() -> dict[str, str]:
    """Of everything that decides how fast the two sides are."""
    names = ("torch", "monai", "numpy", "scipy", "nibabel", "pyarrow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of log y over log x, by least squares."""
    return float(np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)[0])


def local_exponents(x: Sequence[float], y: Sequence[float]) -> list[float | None]:
    """Slope between each point and the next: where it changes, there is a knee."""
    slopes = np.diff(np.log(np.asarray(y, float))) / np.diff(np.log(np.asarray(x, float)))
    return [rounded(float(value)) for value in slopes]
