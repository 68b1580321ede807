"""A cohort of many small images through the whole workflow: `python benchmarks/scale.py [SUBJECTS ...]`.

So many synthetic subjects (by default 10,000 and then 100,000) are planned, generated at 16 x 16 x 16 voxels by tiny
networks that learnt from 64 simulated brains, filtered, released in shards and audited, as `snakemake audit` does it,
on 2 cores.  Prints per stage: jobs, seconds of the processor, these per 1,000 subjects, and peak memory of one job,
side by side.  Fails where a job of a stage that works shard by shard needs a fifth more memory in the largest cohort
than in the smallest, or the audit finds something.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from meddiff_steps.operations.status import COST, PLAN_STAGES, stage_of

ROOT = Path(__file__).parents[1]
#: Subjects of a shard: as many at every size, so that what a job holds does not depend on the cohort.
SHARD = 1_000
#: How much more memory a job may need in the largest cohort.
GROWTH = 1.2

STUDY: dict[str, Any] = {
    "seed": "scale",
    "cohort": {"source": "simulated", "subjects": 64, "shape": [16, 20, 16], "spacing_mm": 10},
    "covariates": {"age": {"unit": "year", "range": [40, 90]}, "sex": {"levels": ["F", "M"]}},
    "splits": {"train": 0.5, "val": 0.1, "calibration": 0.2, "test": 0.2},
    "preprocess": {"shape": [16, 16, 16], "spacing_mm": 12, "shards": 1},
    "autoencoder": {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "optimiser": {"steps": 40, "batch_size": 4, "learning_rate": 1e-3},
    },
    "diffusion": {
        "channels": [8, 16],
        "norm_num_groups": 4,
        "num_head_channels": 8,
        "covariate_dim": 16,
        "num_res_blocks": 1,
        "optimiser": {"steps": 40, "batch_size": 8, "learning_rate": 1e-3},
    },
    "decoder": {"channels": 8, "num_res_blocks": 1, "optimiser": {"steps": 40, "batch_size": 8, "learning_rate": 1e-3}},
    "generate": {"batch_size": 64, "drawing_steps": 4, "shard_size": SHARD, "num_inference_steps": 4},
    # What so little training makes is no brain and copies nobody; only the work is measured.
    # Brains at 12 mm are all alike, and are no duplicates for that.
    "privacy": {
        "level": 0.4,
        "enforce": "report",
        "max_attempts": 2,
        "duplicate_correlation": 0.9999,
        "embedder": {"optimiser": {"steps": 20, "batch_size": 8, "learning_rate": 1e-3}},
    },
    "release": {"name": "Scale", "authors": ["A Benchmark", "B Benchmark"], "date": "2026-01-31"},
    "compute": {"device": "cpu", "precision": "32-true"},
    "storage": {"protect": False, "temporary": ["generated"]},
}


@dataclass
class Stage:
    """Jobs of one stage: how many, seconds of the processor and of the wall together, and most memory of one in MB."""

    jobs: int = 0
    cpu: float = 0.0
    wall: float = 0.0
    megabytes: float = 0.0


@dataclass
class Run:
    """One cohort: seconds from start to end, memory of Snakemake itself in MB, size of the release, and the stages."""

    subjects: int
    seconds: float = 0.0
    megabytes: float = 0.0
    files: int = 0
    bytes: int = 0
    stages: dict[str, Stage] = field(default_factory=lambda: defaultdict(Stage))


def memory_of(process: int) -> float:
    """Peak memory of a running process in MB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((float(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)


def measure(subjects: int, folder: Path, cores: int, changes: Mapping[str, Any] = MappingProxyType({})) -> Run:
    """Run the workflow for so many subjects in an empty folder, and read what its jobs took; `changes` are sections in
    place of those of `STUDY`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    study = STUDY | {"study": "scale", "plan": [{"name": "syn", "subjects": subjects}]} | dict(changes)
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    environment = {key: value for key, value in os.environ.items() if key != "MEDDIFF_STUDY"} | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "snakemake", "audit", "-s", str(ROOT / "Snakefile"), "--directory", str(folder)]
    command += [
        "--cores",
        str(cores),
        "--max-threads",
        "1",
        "--scheduler",
        "greedy",
        "--quiet",
        "rules",
        "--configfile",
        str(folder / "study.yaml"),
    ]
    run, begun = Run(subjects), time.monotonic()
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        while process.poll() is None:
            run.megabytes = max(run.megabytes, memory_of(process.pid))
            time.sleep(1)
    run.seconds = time.monotonic() - begun
    if process.returncode:
        sys.exit(
            f"{' '.join(command)} failed; its log is"
            f" {folder / 'log'}:\n{(folder / 'log').read_text(errors='replace')[-4000:]}"
        )
    results = folder / "results/scale"
    for path in sorted((results / "benchmarks").rglob("*.tsv")):
        (row,) = csv.DictReader(path.open(), delimiter="\t")
        place = path.relative_to(results / "benchmarks")
        stage = run.stages[stage_of(place)]
        told = COST.findall((results / "logs" / place).with_suffix(".log").read_text())
        if not told:
            sys.exit(f"{results / 'logs' / place}: does not say what the job took of the processor")
        stage.jobs += 1
        stage.wall += float(row["s"])
        stage.cpu += float(told[-1][0])
        stage.megabytes = max(stage.megabytes, float(told[-1][1]))
    for path in (results / "release").rglob("*"):
        if path.is_file():
            run.files, run.bytes = run.files + 1, run.bytes + path.stat().st_size
    return run


def report(runs: list[Run]) -> None:
    """A line per stage, in the order of what it took in the largest cohort."""
    names = sorted({name for run in runs for name in run.stages}, key=lambda name: -runs[-1].stages[name].cpu)
    width = max(map(len, names)) + 2
    print("".join([f"{'':<{width}}", *(f"{f'{run.subjects:,} subjects':>46}" for run in runs)]))
    print(
        "".join(
            [f"{'stage':<{width}}", *[f"{'jobs':>6}{'processor, s':>14}{'per 1,000':>12}{'peak, MB':>14}"] * len(runs)]
        )
    )
    for name in names:
        cells = [run.stages[name] for run in runs]
        print(
            "".join(
                [
                    f"{name:<{width}}",
                    *(
                        f"{one.jobs:>6}{one.cpu:>14.1f}{one.cpu / run.subjects * 1000:>12.2f}{one.megabytes:>14.0f}"
                        for one, run in zip(cells, runs, strict=True)
                    ),
                ]
            )
        )
    for run in runs:
        cpu, peak = sum(one.cpu for one in run.stages.values()), max(one.megabytes for one in run.stages.values())
        print(
            f"{run.subjects:,} subjects: {run.seconds / 60:.1f} minutes, {cpu / 60:.1f} of the processor in steps; most"
            f" memory of a step {peak:.0f} MB, of Snakemake {run.megabytes:.0f} MB; release {run.files:,} files,"
            f" {run.bytes / 1e6:.0f} MB"
        )


def growth(runs: list[Run]) -> list[str]:
    """Stages that work shard by shard and need more memory in the largest cohort than in the smallest, in words."""
    first, last = runs[0], runs[-1]
    grown = []
    for name in PLAN_STAGES:
        before, after = first.stages[name].megabytes, last.stages[name].megabytes
        if before and after > GROWTH * before:
            grown.append(
                f"{name}: {after:.0f} MB with {last.subjects:,} subjects, {before:.0f} MB with {first.subjects:,}"
            )
    return grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "subjects", nargs="*", type=int, default=[10_000, 100_000], help="synthetic subjects, one cohort each"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "results/scale-benchmark",
        help="where to work; about 1 GB and 500,000 files for 100,000",
    )
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the results there")
    arguments = parser.parse_args()
    runs = []
    for subjects in arguments.subjects:
        folder = arguments.folder.resolve() / str(subjects)
        runs.append(measure(subjects, folder, arguments.cores))
        report(runs[-1:])
        if not arguments.keep:
            shutil.rmtree(folder)
    if len(runs) > 1:
        print()
        report(runs)
    grown = growth(runs)
    print("\n".join(f"memory grows: {line}" for line in grown) or "memory of what works shard by shard does not grow")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
