"""Sides of one part: made, warmed up, and timed in turns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.gpu.record import Allotment, Record, figure, free, synchronise, time_limit
from benchmarks.gpu.sides import Make, Work

#: Turns that the sides take at most, and seconds that one turn of one side shall last.
TURNS, TURN_SECONDS = 5, 4.0
#: The side that others are divided by: the first of these that was timed.
REFERENCES = ("ours compiled", "ours eager")


class Place(Protocol):
    """What of a case is needed here."""

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class Pace:
    """How many turns, and how long one of one side lasts."""

    turns: int = TURNS
    seconds: float = TURN_SECONDS


@dataclass
class Side:
    """Somebody's way of one part.

    Attributes
    ----------
    name
        Ours begins with "ours".
    batch
        The largest that fits is taken, of this one, half of it, and so on.
    operations
        Floating-point operations per image; 0 where nobody asks.
    making_seconds, first_seconds, second_seconds
        Making it; its first unit of work, which compiles and chooses kernels; and its second.
    """

    name: str
    make: Make
    batch: int
    operations: float = 0.0
    work: Work = field(init=False)
    making_seconds: float = 0.0
    first_seconds: float = 0.0
    second_seconds: float = 0.0
    peak_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def prepare(self, device: torch.device) -> None:
        """Make it and work twice; memory is read from the second."""
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        while True:
            try:
                begun = time.perf_counter()
                self.work = self.make(self.batch)
                synchronise(device)
                self.making_seconds = time.perf_counter() - begun
                self.first_seconds = self._timed(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                self.second_seconds = self._timed(device)
                if device.type == "cuda":
                    self.peak_bytes = torch.cuda.max_memory_allocated(device) - held
                return
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
            self.batch //= 2
            if hasattr(self, "work"):
                del self.work
            free()

    def _timed(self, device: torch.device) -> float:
        begun = time.perf_counter()
        self.work()
        synchronise(device)
        return time.perf_counter() - begun

    def turn(self, device: torch.device, seconds: float) -> None:
        """Work for about `seconds`, at least once; remembers seconds per image."""
        synchronise(device)
        images, begun, before = 0, time.perf_counter(), None
        while True:
            images += self.work()
            if device.type == "cuda":
                if before is not None:
                    # One unit ahead at most, as a training that writes its curve is not much further
                    before.synchronize()
                before = torch.cuda.current_stream(device).record_event()
            if time.perf_counter() - begun >= seconds:
                break
        synchronise(device)
        self.seconds.append((time.perf_counter() - begun) / images)

    def result(self, machine: dict[str, Any]) -> dict[str, Any]:
        """What is written down of it."""
        found: dict[str, Any] = {
            "side": self.name,
            "batch": self.batch,
            "seconds_per_image": figure(self.seconds),
            "making_seconds": round(self.making_seconds, 4),
            "compiling_seconds": round(max(self.first_seconds - self.second_seconds, 0.0), 2),
            "peak_gib": round(self.peak_bytes / 2**30, 2),
        }
        if self.operations:
            rate = [self.operations / seconds for seconds in self.seconds]
            found |= {
                "teraflop_per_image": self.operations / 1e12,
                "utilisation_measured": figure([value / machine["matrix_flops"] for value in rate]),
            }
            if machine.get("matrix_flops_nominal"):
                found["utilisation_nominal"] = figure([value / machine["matrix_flops_nominal"] for value in rate])
        return found


def compare(record: Record, case: Place, part: str, sides: list[Side], allotment: Allotment, pace: Pace) -> set[str]:
    """Prepare sides, let them take turns, and write down seconds per image, operations per second, memory and ratios to
    `REFERENCES`.

    Preparing ends when its time is up: each side gets an equal part of what those before it left.  Timing has its own.
    Returns the names of the sides that were timed.
    """
    ready, end = [], time.monotonic() + min(allotment.preparing, record.left())
    for number, side in enumerate(sides):
        try:
            with time_limit((end - time.monotonic()) / (len(sides) - number)):
                side.prepare(case.device)
            ready.append(side)
        except Exception as error:  # noqa: BLE001 - one side's failure must not cost the others their figures
            record.fail(f"{case.name} {part}: {side.name}", error)
            free()
    # What preparing did not need is for timing.
    end = max(end, time.monotonic()) + allotment.timing
    for turn in range(pace.turns):
        for side in list(ready):
            left = min(end - time.monotonic(), record.left())
            if turn and left < 2 * max(pace.seconds, side.second_seconds):
                break
            try:
                with time_limit(left):
                    side.turn(case.device, pace.seconds)
            except Exception as error:  # noqa: BLE001 - as above
                record.fail(f"{case.name} {part}: {side.name}", error)
                ready.remove(side)
    timed = [side for side in ready if side.seconds]
    for side in timed:
        record.add(part=part, shape=case.name, **side.result(record.content["machine"]))
    reference = next((side for name in REFERENCES for side in timed if side.name == name), None)
    for side in timed:
        if reference is not None and side is not reference:
            pairs = [other / own for other, own in zip(side.seconds, reference.seconds, strict=False)]
            record.add(part=part, shape=case.name, ratio=f"{side.name} / {reference.name}", times=figure(pairs))
    return {side.name for side in timed}


def agreement(record: Record, case: Place, part: str, images: dict[str, dict[str, np.ndarray]]) -> None:
    """How far images of the same subjects, made in other ways, are from those made in fp32 without compiling."""
    plain = images.get("plain", {})
    for way, made in images.items():
        shared = sorted(set(made) & set(plain))
        if way != "plain" and shared:
            difference = np.stack([made[name] for name in shared]) - np.stack([plain[name] for name in shared])
            spread = float(np.std(np.stack([plain[name] for name in shared])))
            error = np.abs(difference)
            record.add(
                part=part,
                shape=case.name,
                way=way,
                largest_difference=float(error.max()),
                mean_difference=float(error.mean()),
                spread=spread,
            )
