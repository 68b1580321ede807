"""How the stages after training grow, measured: `python -m benchmarks.growth [--minutes 90]`.

The whole workflow, to an audited release, runs at growing image sizes with few subjects, and for growing numbers of
subjects with small images, with networks of next to no training.  What a stage's jobs took of the processor is held
against what `plan-cost` counts for the same study: so much for starting, and so much for every counted second.  Whether
the rest grows as it is counted says its exponent.  Both are carried to the published scale (`config/studies/ukb.yaml`,
on processors alone), with 95 % intervals.

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
from scipy import optimize, stats

from benchmarks import measure, scale
from meddiff_steps.config import Study, load_study, parse_study
from meddiff_steps.core.files import write_json
from meddiff_steps.operations.cost import Machine, working_seconds
from meddiff_steps.operations.rates import START_S
from meddiff_steps.operations.work import work

ROOT = Path(__file__).parents[1]
SIDES, SUBJECTS = (32, 48, 64, 96), (1_000, 3_000, 10_000)
#: Scans, and synthetic subjects at each of the sizes: as many as realism is measured on at least.
SCANS, FEW = 60, 12
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
#: Points that a line and its spread need.
MIN_POINTS = 4


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
            "cpu": stage.cpu,
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
    """Growth of a stage against what is counted for it.

    Attributes
    ----------
    start
        Seconds of the processor that a job takes whatever it has to do.
    ratio
        Of the seconds beyond that to those that are counted: lower end, value, upper end.
    exponent
        Of the seconds beyond starting, by the counted ones, and the half width of its interval: 1 grows as counted.
        None where too few points took longer than starting.
    """

    start: float
    ratio: tuple[float, float, float]
    exponent: tuple[float, float] | None


def fit(jobs: Sequence[float], counted: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """Least squares of relative errors: seconds = jobs * start + counted * ratio, neither below 0; None of too few
    points.

    Intervals are of 95 %, by Student's t.  The exponent is that of a line through logarithms, of the points at which
    more than half of the time is beyond starting.
    """
    n = np.array(jobs, float)
    work_, took = np.array(counted, float), np.array(seconds, float)
    if len(took) < MIN_POINTS:
        return None
    design = np.stack([n / took, work_ / took], 1)
    (start, ratio), _ = optimize.nnls(design, np.ones(len(took)))
    free = len(took) - 2
    variance = float(np.square(1.0 - design @ [start, ratio]).sum() / free)
    spread = (
        np.sqrt(variance * np.diag(np.linalg.pinv(design.T @ design)))[1]
        if start
        else math.sqrt(variance / float(np.square(design[:, 1]).sum()))
    )
    half = float(stats.t.ppf(0.975, free) * spread)
    beyond = took - n * start
    counts = beyond > 0.5 * took
    exponent = None
    if counts.sum() >= MIN_POINTS - 1 and np.ptp(np.log(work_[counts])) > 0:
        line = stats.linregress(np.log(work_[counts]), np.log(beyond[counts]))
        exponent = (float(line.slope), float(stats.t.ppf(0.975, counts.sum() - 2) * line.stderr))
    return Fit(float(start), (max(ratio - half, 0.0), float(ratio), float(ratio) + half), exponent)


def table(found: dict[str, Any]) -> list[str]:
    """A line per stage, as Markdown."""
    study = load_study(ROOT / "config/studies/ukb.yaml")
    scans = study.cost.scans or 0
    lines = [
        "| stage | starting, s | growth against the count, exponent | measured over counted | counted, core-hours |"
        " by what was measured |",
        "|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(name for point in found["points"] for name in point["stages"]))
    for name in names:
        stages = [point["stages"][name] for point in found["points"] if name in point["stages"]]
        one = fit(*([stage[key] for stage in stages] for key in ("jobs", "counted", "cpu")))
        if one is None or max(stage["cpu"] - stage["jobs"] * one.start for stage in stages) < WORTH_S:
            continue
        target = work(study, scans)[name]
        hours = counted_seconds(name, study, scans) / 3600
        started = target.jobs * one.start / 3600
        exponent = "" if one.exponent is None else f"{one.exponent[0]:.2f} ± {one.exponent[1]:.2f}"
        low, ratio, high = one.ratio
        carried = f"{started + ratio * hours:.3g} [{started + low * hours:.3g}, {started + high * hours:.3g}]"
        lines.append(
            f"| `{name}` | {one.start:.1f} | {exponent} | {ratio:.2f} [{low:.2f}, {high:.2f}] |"
            f" {hours + target.jobs * START_S / 3600:.3g} | {carried} |"
        )
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
