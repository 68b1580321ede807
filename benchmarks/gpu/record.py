"""What was measured, on disk after every figure; how much time there is for what; and what the machine can do."""

from __future__ import annotations

import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meddiff_steps.core.files import write_json

#: Dense bf16 rate of the data sheet, FLOP/s, by what the name of the device begins with (NVIDIA's data sheets, SXM).
NOMINAL = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100": 312e12}
#: Share of all time that is for making networks and compiling them; the rest is for timing them.
PREPARING = 0.6


class OutOfTime(Exception):
    """The time of a part is used up."""


@dataclass
class Record:
    """What was measured so far, on disk after every figure."""

    path: Path
    deadline: float
    content: dict[str, Any] = field(default_factory=lambda: {"machine": {}, "results": [], "failures": []})

    def add(self, **result: Any) -> None:
        self.content["results"].append(result)
        self._write()
        print(json.dumps(result), flush=True)

    def fail(self, where: str, error: BaseException) -> None:
        reason = (
            "out of memory"
            if isinstance(error, torch.OutOfMemoryError)
            else f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        )
        self.content["failures"].append({"where": where, "reason": reason})
        self._write()
        print(f"{where}: {reason}", file=sys.stderr, flush=True)

    def machine(self, **facts: Any) -> None:
        self.content["machine"] |= facts
        self._write()

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def _write(self) -> None:
        self.content["seconds_left"] = round(self.left(), 1)
        write_json(self.path, self.content)


@dataclass(frozen=True)
class Allotment:
    """Seconds that a part may take: to make and compile its networks, and to time them."""

    preparing: float
    timing: float


def allot(left: float, share: float, following: Sequence[float]) -> Allotment:
    """What a part gets of the seconds that are left, by its share and those of the parts that follow.

    Nobody can take what is another's: a part that uses all it was given leaves the others as much as they were to get,
    and one that uses less leaves them more.
    """
    mine = max(left, 0.0) * share / (share + sum(following))
    return Allotment(PREPARING * mine, (1.0 - PREPARING) * mine)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in this block after so many seconds; in the main thread only."""

    def ring(number: int, frame: object) -> None:
        raise OutOfTime(f"after {seconds:.0f} s")

    if seconds <= 0.1:
        raise OutOfTime("no time was left to begin")
    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def figure(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"value": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


# ---------------------------------------------------------------------------------------------------- the machine


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Give back memory that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def matrix_rate(device: torch.device, side: int) -> float:
    """FLOP/s of bf16 products (on a processor, which may emulate them, float32) of random matrices, median of ten after
    three.
    """
    a, b = (
        torch.randn(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        for _ in range(2)
    )
    seconds = []
    for turn in range(13):
        synchronise(device)
        begun = time.perf_counter()
        a @ b
        synchronise(device)
        if turn >= 3:
            seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / statistics.median(seconds)


def copy_rate(device: torch.device, count: int) -> float:
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    seconds = []
    for turn in range(13):
        synchronise(device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        if turn >= 3:
            seconds.append(time.perf_counter() - begun)
    return 8 * count / statistics.median(seconds)


def describe(record: Record, device: torch.device, quick: bool) -> None:
    """Write down the machine, its libraries and its rates."""
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/nowhere"))
    record.machine(
        device=(
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        ),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if device.type == "cuda" else None,
        processors=os.cpu_count(),
        compiler_cache="warm" if cache.is_dir() and any(cache.iterdir()) else "cold",
        begun=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    rate = matrix_rate(device, 512 if quick else 8192)
    name = str(record.content["machine"]["device"])
    nominal = next((value for start, value in NOMINAL.items() if name.startswith(start)), None)
    record.machine(
        matrix_flops=rate,
        matrix_flops_nominal=nominal,
        copy_bytes_per_second=copy_rate(device, 2**20 if quick else 2**29),
    )
