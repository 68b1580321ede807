"""Training, encoding and sampling on a GPU beside the peers' way: `make bench-gpu`, or `python -m benchmarks.gpu
--help`.

Networks are those of config/studies/ixi_2mm.yaml (80 x 96 x 80) and config/studies/ukb.yaml (160 x 224 x 160); images
are smooth noise, for time does not depend on what they show.  Sides run in turns in one process; a ratio is the median
over turns, with the smallest and the largest turn.  Compiling is written down by itself.  Each side of each part may
fail (out of memory, a compiler that is not there): that is written down, and the others go on.  A side that does not
fit at the study's batch size takes half of it, and so on; figures are per image.

`gpu.json` is written again after every figure, so that a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import peer
from benchmarks.gpu import sides
from benchmarks.gpu.case import Case, case_of
from benchmarks.gpu.compare import Pace, Side, agreement, compare
from benchmarks.gpu.convolutions import convolutions
from benchmarks.gpu.record import Allotment, Record, allot, describe, free, time_limit
from benchmarks.gpu.start import job_start


@dataclass(frozen=True)
class Run:
    """What a part is run with."""

    record: Record
    case: Case
    allotment: Allotment
    pace: Pace
    quick: bool

    def compare(self, part: str, made: list[Side]) -> set[str]:
        """`compare`; on a processor without sides that compile or let cuDNN choose."""
        on_cpu = self.case.device.type == "cpu"
        kept = [side for side in made if not (on_cpu and ("compiled" in side.name or "graphs" in side.name))]
        return compare(self.record, self.case, part, kept, self.allotment, self.pace)


def _ours(make: Callable[[bool], sides.Make], batch: int, operations: float) -> list[Side]:
    """Eager, and then compiled, which takes what time is left for preparing."""
    return [
        Side("ours eager", make(False), batch, operations),
        Side("ours compiled", make(True), batch, operations),
    ]


def sampling(run: Run) -> None:
    """Volumes as the study generates them, and without the drawing decoder, beside DDIM-50 and a flow of 30 steps."""
    case = run.case
    batch = case.study.generate.batch_size
    kept: dict[str, dict[str, np.ndarray]] = {"compiled": {}, "eager": {}, "plain": {}}
    shorter = 2 if run.quick else None
    made = [
        Side(f"peer {scheduler}-{shorter or steps}", sides.peer_sampling(case, scheduler, shorter or steps), 1)
        for scheduler, steps in (("DDIM", 50), ("RFlow", 30))
    ]
    operations = case.sampling_operations(drawn=case.draws)
    for way in ("eager", "compiled"):
        make = sides.our_sampling(case, case.compute(way == "compiled"), keep=kept[way])
        made.append(Side(f"ours {way}", make, batch, operations))
    if case.draws:
        make = sides.our_sampling(case, case.compute(True), drawn=False)
        made.append(Side("ours compiled, no drawing decoder", make, batch, case.sampling_operations(drawn=False)))
    run.compare("sampling", made)
    del made
    free()
    # The same subjects in fp32, at a small batch: what bf16 and compiling change.
    plain = sides.our_sampling(case, case.compute(False), "32-true", keep=kept["plain"])(2)
    with time_limit(min(run.allotment.preparing, run.record.left())):
        plain()
    agreement(run.record, case, "sampling", kept)


def ddim_200(run: Run) -> None:
    """The sampler of the published scripts, which has no other side: ours is in `sampling`."""
    run.compare("sampling", [Side("peer DDIM-200", sides.peer_sampling(run.case, "DDIM", 2 if run.quick else 200), 1)])


def latency(run: Run) -> None:
    """One volume at a time: where a GPU waits for its processor, if anywhere."""
    case = run.case
    ways = {
        "ours eager": case.compute(False),
        "ours compiled": case.compute(True),
    }
    if case.device.type == "cuda":
        ways["ours graphs"] = case.compute(True, cuda_graphs=True)
    operations = case.sampling_operations(drawn=case.draws)
    run.compare("latency", [Side(name, sides.our_sampling(case, how), 1, operations) for name, how in ways.items()])


def diffusion_training(run: Run) -> None:
    case = run.case
    settings, operations = case.study.diffusion, case.operations["train_diffusion"]
    batch = settings.optimiser.batch_size
    # The published model was trained in batches of 4; beyond 8, encoding images fits few GPUs at that scale.
    theirs = min(batch, 8) if case.study.study == "ukb" else batch
    made = [
        Side("peer tutorial", sides.peer_tutorial(case), theirs),
        Side("peer cached latents", sides.peer_cached(case), batch),
        *_ours(lambda compiled: sides.our_diffusion(case, compiled), batch, operations),
    ]
    if settings.network != "unet":
        same = peer.unet_settings(settings)
        made.append(Side("ours compiled, the peer's network", sides.our_diffusion(case, True, same), batch))
    run.compare("diffusion training", made)


def autoencoder_training(run: Run) -> None:
    case = run.case
    batch, operations = case.first.optimiser.batch_size, case.operations["train_autoencoder"]
    made = [
        Side("peer tutorial", sides.peer_autoencoder(case), batch),
        *_ours(lambda compiled: sides.our_autoencoder(case, compiled), batch, operations),
    ]
    if case.first.network != "kl":
        made.append(
            Side("ours compiled, autotune", sides.autotuned(sides.our_autoencoder(case, True)), batch, operations)
        )
        same = peer.same_network(case.first)
        made.append(Side("ours compiled, the peer's network", sides.our_autoencoder(case, True, same), batch))
    run.compare("autoencoder training", made)


def drawing_training(run: Run) -> None:
    """The drawing decoder, which no peer has."""
    batch = run.case.study.decoder.optimiser.batch_size
    run.compare("drawing training", _ours(lambda compiled: sides.our_drawing(run.case, compiled), batch, 0.0))


def latents(run: Run) -> None:
    """Encoding the cohort once."""
    batch, operations = run.case.study.latents.batch_size, run.case.operations["encode"]
    run.compare("latents", _ours(lambda compiled: sides.our_latents(run.case, compiled), batch, operations))


def detector(run: Run) -> None:
    """What `filter` and `calibrate` spend most on: the codes of candidates by the generator's own autoencoder."""
    batch, operations = run.case.study.latents.batch_size, run.case.operations["encode"]
    run.compare("detector", [Side("ours eager", sides.our_detector(run.case), batch, operations)])


def start(run: Run) -> None:
    """A job of `generate` until it is at work."""
    case, limit = run.case, min(run.allotment.preparing + run.allotment.timing, run.record.left())
    begun = time.monotonic()
    with time_limit(limit):
        folder = case.model
    free()
    found = job_start(case.study.study.replace("-", "_"), folder, case.device.type, limit - (time.monotonic() - begun))
    run.record.add(part="start", shape=case.name, seconds=found)


def large_convolutions(run: Run) -> None:
    """Whether bfloat16 is right where tensors are largest."""
    convolutions(run.record, run.case, run.allotment, run.quick)


Part = Callable[[Run], None]

#: Parts in the order of what matters most, with the share of the whole time of each; 1 in all.
PARTS: list[tuple[str, Part, float]] = [
    ("ukb", sampling, 0.22),
    ("ukb", diffusion_training, 0.21),
    ("ukb", large_convolutions, 0.05),
    ("ukb", autoencoder_training, 0.16),
    ("ukb", latents, 0.05),
    ("ukb", detector, 0.02),
    ("ukb", start, 0.07),
    ("ixi_2mm", sampling, 0.06),
    ("ixi_2mm", diffusion_training, 0.05),
    ("ixi_2mm", autoencoder_training, 0.05),
    ("ixi_2mm", drawing_training, 0.02),
    ("ixi_2mm", latency, 0.02),
    ("ukb", ddim_200, 0.02),
]
QUICK_PARTS: list[tuple[str, Part, float]] = [
    ("quick", part, 0.1)
    for part in (
        sampling,
        diffusion_training,
        large_convolutions,
        autoencoder_training,
        latents,
        detector,
        start,
        drawing_training,
        latency,
        ddim_200,
    )
]


def chosen_parts(parts: list[tuple[str, Part, float]], only: str) -> list[tuple[str, Part, float]]:
    """Parts whose `STUDY FUNCTION` contains one of the texts that `only` has between commas; all for none.

    Raises
    ------
    ValueError
        A text is in no part.
    """
    wanted = [text.strip() for text in only.split(",") if text.strip()]
    names = [f"{study} {part.__name__}" for study, part, _ in parts]
    for text in wanted:
        if not any(text in name for name in names):
            raise ValueError(f"--only {text!r}: no part is called so; there are {', '.join(names)}")
    return [part for part, name in zip(parts, names, strict=True) if not wanted or any(text in name for text in wanted)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="everything ends within this time, measured or not")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "results/bench-gpu")),
        help="folder of gpu.json (default: $OUT)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny networks on the processor: whether everything runs")
    parser.add_argument(
        "--only",
        default="",
        help="parts whose `STUDY FUNCTION` contains one of these texts, for example `ukb sampling,ixi_2mm`; they share"
        " all of the time",
    )
    given = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() and not given.quick else "cpu"
    if device == "cpu" and not given.quick:
        print(
            "No GPU is visible. Run this on a machine that has one, or with --quick to see whether everything runs.",
            file=sys.stderr,
        )
        return 1
    try:
        parts = chosen_parts(QUICK_PARTS if given.quick else PARTS, given.only)
    except ValueError as error:
        parser.error(str(error))
    record = Record(given.out / "gpu.json", time.monotonic() + 60 * given.minutes)
    given.out.mkdir(parents=True, exist_ok=True)
    describe(record, torch.device(device), given.quick)
    torch._dynamo.config.recompile_limit = 64  # every side, at every batch size that it tries, compiles the same code
    pace = Pace(1, 0.0) if given.quick else Pace()
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Case] = {}
        for number, (study, part, share) in enumerate(parts):
            try:
                with time_limit(record.left()):
                    if study not in cases:
                        cases[study] = case_of(study, Path(folder), device)
                allotment = allot(record.left(), share, [later for _, _, later in parts[number + 1 :]])
                begun = time.monotonic()
                part(Run(record, cases[study], allotment, pace, given.quick))
                record.add(part=part.__name__, shape=cases[study].name, took=round(time.monotonic() - begun, 1))
            except Exception as error:  # noqa: BLE001 - one part's failure must not cost the others
                record.fail(f"{study} {part.__name__}", error)
            free()
            torch._dynamo.reset()
    print(summary(record.content))
    return 0


def summary(content: dict[str, Any]) -> str:
    """A table of what was measured, for the end of a log."""
    machine = content["machine"]
    rates = (
        f"matrix products {machine['matrix_flops'] / 1e12:.3g} TFLOP/s, copies"
        f" {machine['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    )
    cudnn = f", cuDNN {machine['cudnn']}" if machine.get("cudnn") else ""
    lines = [f"{machine['device']}, torch {machine['torch']}{cudnn}: {rates}"]
    for result in content["results"]:
        where = f"{result.get('shape', ''):>12} {result['part']:22}"
        if "seconds_per_image" in result:
            time_of, use = result["seconds_per_image"], result.get("utilisation_measured")
            used = f", {100 * use['value']:.1f} % of the measured rate" if use else ""
            spread = f"{time_of['value']:9.4f} s/image ({time_of['low']:.4f} to {time_of['high']:.4f})"
            more = f"batch {result['batch']}, {result['peak_gib']} GiB, compiled in {result['compiling_seconds']} s"
            lines.append(f"{where} {result['side']:34} {spread}, {more}{used}")
        elif "times" in result:
            times = result["times"]
            spread = f"{times['low']:.2f} to {times['high']:.2f}, n = {times['n']}"
            lines.append(f"{where} {result['ratio']:50} {times['value']:.2f} ({spread})")
        elif "way" in result:
            differs = (
                f"largest {result['largest_difference']:.4f}, mean {result['mean_difference']:.5f}, of a spread of"
                f" {result['spread']:.3f}"
            )
            lines.append(f"{where} {result['way']} against fp32: {differs}")
        elif "tensor" in result:
            said = "wrong: " + ", ".join(result["wrong"]) if result["wrong"] else "right"
            slow = f"{result['seconds_batch'] / max(result['seconds_alone'], 1e-9):.2f} of the time of its images alone"
            lines.append(f"{where} {'x'.join(map(str, result['tensor']))} {result['layout']}: {said}; {slow}")
        elif "seconds" in result:
            lines.append(f"{where} " + ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items()))
    lines += [f"FAILED {failure['where']}: {failure['reason'][:150]}" for failure in content["failures"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
