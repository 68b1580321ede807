"""How the stages after training grow, measured: `python -m benchmarks.growth [--minutes 90]`.

The whole workflow, to an audited release, runs at growing image sizes with few subjects, and for growing numbers of
subjects with small images, with networks of next to no training.  What a stage's jobs took of the processor, beyond
starting, is divided by what `plan-cost` counts for the same study; how this ratio changes with voxels and subjects says
where the count grows too slowly or too fast.  By ordinary least squares in logarithms it is carried to the published
scale (`config/studies/ukb.yaml`, on processors alone), with 95 % prediction intervals.

Points that would not fit into the minutes that are left, by the growth so far, are left out.  `growth.json` is written
after every point; `--render` prints its table again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks import measure, scale
from meddiff_steps.config import Study, load_study, parse_study
from meddiff_steps.core.files import write_json
from meddiff_steps.operations.cost import Machine, working_seconds
from meddiff_steps.operations.rates import START_S
from meddiff_steps.operations.work import work

ROOT = Path(__file__).parents[1]
SIDES, SUBJECTS = (32, 48, 64, 96), (1_000, 3_000, 10_000)
#: Scans, and synthetic subjects at each of the sizes.
SCANS, FEW = 60, 8
#: As `rates` are measured: in bf16 where the processor has it.
COMPUTE: dict[str, Any] = {"compute": {"device": "cpu"}}
#: Networks of the demo, hardly trained.
NETWORKS: dict[str, Any] = COMPUTE | {
    "autoencoder": {
        "channels": [32, 64],
        "latent_channels": 12,
        "equivariance_weight": 0.25,
        "optimiser": {"steps": 3, "batch_size": 1},
    },
    "diffusion": {"channels": [64], "optimiser": {"steps": 3, "batch_size": 4}},
    "decoder": {"channels": 48, "num_res_blocks": 3, "optimiser": {"steps": 3, "batch_size": 4}},
}
#: Stages of the processor whose time says something: this many seconds beyond starting, at the largest point.
WORTH_S = 2.0


@dataclass(frozen=True)
class Point:
    """A run: voxels of an image, synthetic subjects, scans."""

    voxels: int
    subjects: int
    scans: int


def sized(side: int) -> tuple[int, dict[str, Any]]:
    """Synthetic subjects, and sections of the study, of one image size."""
    spacing = 160.0 / side
    shape = [side, side, side]
    return FEW, NETWORKS | {
        "cohort": {
            "source": "simulated",
            "subjects": SCANS,
            "shape": [side, side * 5 // 4, side],
            "spacing_mm": spacing,
        },
        "preprocess": {"shape": shape, "spacing_mm": 1.25 * spacing, "shards": 1},
        "generate": {"batch_size": 4, "drawing_steps": 4, "shard_size": FEW, "num_inference_steps": 4},
        "evaluate": {"sweep_steps": 3},
    }


def run_point(subjects: int, sections: dict[str, Any], folder: Path, cores: int) -> dict[str, Any]:
    """Run the workflow, and say of each stage after training what its jobs took and what is counted for them."""
    found = scale.measure(subjects, folder, cores, sections)
    content = scale.STUDY | {"study": "scale", "plan": [{"name": "syn", "subjects": subjects}]} | sections
    study = parse_study(content, "growth")
    scans = content["cohort"]["subjects"]
    counted = work(study, scans)
    shutil.rmtree(folder)
    stages = {
        name: {
            "jobs": stage.jobs,
            "cpu": stage.cpu or stage.wall,
            "wall": stage.wall,
            "counted": counted_seconds(name, study, scans),
            "memory_mb": stage.megabytes,
        }
        for name, stage in found.stages.items()
        if name in counted and counted[name].group == "after_training"
    }
    return {
        "voxels": math.prod(study.preprocess.shape),
        "subjects": subjects,
        "scans": scans,
        "seconds": found.seconds,
        "stages": stages,
    }


def counted_seconds(stage: str, study: Study, scans: int) -> float:
    """Of one core, as `plan-cost` counts them, without starting."""
    one = work(study, scans)[stage]
    return one.jobs * working_seconds(stage, one, Machine(cores=1), gpus=0)


@dataclass(frozen=True)
class Fit:
    """Growth of a stage: exponents of voxels and subjects with the half widths of their intervals, and the ratio of
    measured to counted that it gives for another study, with its interval.
    """

    exponents: tuple[tuple[float, float], tuple[float, float]]
    ratio: tuple[float, float, float]


def fit(points: Sequence[Point], seconds: Sequence[float], counted: Sequence[float], target: Point) -> Fit | None:
    """Least squares of ln(seconds) and of ln(seconds / counted) on ln(voxels) and ln(subjects); None of too few points.

    Exponents are those of the seconds.  Intervals are of 95 %, by Student's t with as many degrees of freedom as there
    are points beyond three; the ratio's is that of a new run (Draper and Smith 1998, section 5.4).
    """
    if len(points) < 4:
        return None
    design = np.array([[1.0, math.log(point.voxels), math.log(point.subjects)] for point in points])
    inverse, free = np.linalg.inv(design.T @ design), len(points) - 3
    width = stats.t.ppf(0.975, free)

    def solved(values: np.ndarray) -> tuple[np.ndarray, float]:
        weights = inverse @ design.T @ values
        return weights, float(np.square(values - design @ weights).sum() / free)

    weights, variance = solved(np.log(seconds))
    spread = width * np.sqrt(variance * np.diag(inverse))
    ratios, variance = solved(np.log(np.array(seconds) / counted))
    there = np.array([1.0, math.log(target.voxels), math.log(target.subjects)])
    middle, half = there @ ratios, width * math.sqrt(variance * (1 + there @ inverse @ there))
    low, value, high = (float(np.exp(middle + sign * half)) for sign in (-1, 0, 1))
    return Fit(
        ((float(weights[1]), float(spread[1])), (float(weights[2]), float(spread[2]))),
        (low, value, high),
    )


def working(stage: dict[str, Any]) -> float:
    """Seconds of the processor that the jobs of a stage took beyond starting; at least a quarter of all."""
    return max(stage["cpu"] - stage["jobs"] * START_S, 0.25 * stage["cpu"])


def table(found: dict[str, Any]) -> list[str]:
    """A line per stage, as Markdown."""
    study = load_study(ROOT / "config/studies/ukb.yaml")
    scans = study.cost.scans or 0
    target = Point(math.prod(study.preprocess.shape), study.plan[0].subjects, scans)
    lines = [
        "| stage | exponent of voxels | of subjects | counted, core-hours | by the growth measured, core-hours |",
        "|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(name for point in found["points"] for name in point["stages"]))
    for name in names:
        points = [point for point in found["points"] if name in point["stages"] and point["stages"][name]["cpu"] > 0]
        seconds = [working(point["stages"][name]) for point in points]
        if not seconds or max(seconds) < WORTH_S:
            continue
        counted = [point["stages"][name]["counted"] for point in points]
        one = fit([Point(p["voxels"], p["subjects"], p["scans"]) for p in points], seconds, counted, target)
        if one is None:
            continue
        hours = counted_seconds(name, study, scans) / 3600
        exponents = [f"{value:.2f} ± {half:.2f}" for value, half in one.exponents]
        low, value, high = (f"{hours * ratio:.3g}" for ratio in one.ratio)
        lines.append(f"| `{name}` | {exponents[0]} | {exponents[1]} | {hours:.3g} | {value} [{low}, {high}] |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=90.0, help="that all may take")
    parser.add_argument("--sides", type=int, nargs="*", default=SIDES, help="voxels a side")
    parser.add_argument("--subjects", type=int, nargs="*", default=SUBJECTS, help="synthetic subjects of small images")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "results/growth-benchmark")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/growth.json")
    parser.add_argument("--render", action="store_true", help="print the table of what was measured")
    arguments = parser.parse_args()
    if arguments.render:
        print("\n".join(table(json.loads(arguments.results.read_text()))))
        return 0
    end = time.monotonic() + 60 * arguments.minutes
    found: dict[str, Any] = {
        "name": "growth",
        "date": measure.now(),
        "machine": measure.machine(),
        "versions": measure.versions(),
        "cores": arguments.cores,
        "points": [],
        "left_out": [],
    }
    series: list[list[tuple[int, int, dict[str, Any]]]] = [
        [(side**3, *sized(side)) for side in arguments.sides],
        [(subjects, subjects, COMPUTE) for subjects in arguments.subjects],
    ]
    for points in series:
        before: tuple[int, float] | None = None
        for size, subjects, sections in points:
            left = end - time.monotonic()
            # In proportion: what starting takes makes it an upper bound, unless growth is steeper than linear.
            if left <= 0 or (before is not None and before[1] * size / before[0] > left):
                found["left_out"].append({"size": size, "subjects": subjects, "seconds_left": round(left)})
                continue
            point = run_point(subjects, sections, arguments.folder.resolve() / f"{size}", arguments.cores)
            before = (size, point["seconds"])
            found["points"].append(point)
            write_json(arguments.results, found)
            print(f"{point['voxels']:,} voxels, {subjects:,} subjects: {point['seconds']:.0f} s", flush=True)
    print("\n".join(table(found)))
    for one in found["left_out"]:
        print(f"left out: {one}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
