"""What planning a study takes as it grows: `python benchmarks/dry_run.py [SUBJECTS ...]`.

A dry run of config/studies/ukb.yaml through the Slurm profile, with as many synthetic subjects as it is told (by
default 1,000, 10,000 and 100,000).  Prints seconds (of the wall, and of the processor, user and system together: on a
busy machine only they say something), peak memory and jobs, and the exponent with which each grows from the smallest to
the largest.  Fails where the largest takes more than 15 s of the processor, 500 MB or 2,500 jobs.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "config/studies/ukb.yaml"
#: Runs a command from a small process, since Linux counts what a process had before `exec` into its peak of memory.
USED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:]).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=open(sys.argv[1], "w"))
sys.exit(code)
"""
SECONDS, MEGABYTES, JOBS = 15.0, 500.0, 2_500


@dataclass(frozen=True)
class Planned:
    """A dry run: seconds of the processor and of the wall, peak memory in MB, and jobs."""

    subjects: int
    cpu: float
    wall: float
    megabytes: float
    jobs: int


def measure(subjects: int, folder: Path) -> Planned:
    """Plan the study with so many synthetic subjects."""
    study = yaml.safe_load(STUDY.read_text())
    study["plan"][0]["subjects"] = subjects
    # Many small jobs, as a study of larger cohorts has.
    study["generate"]["shard_size"], study["preprocess"]["shards"] = 250, 128
    study["results"] = str(folder / "results")
    path = folder / f"{subjects}.yaml"
    path.write_text(yaml.safe_dump(study))
    environment = {key: value for key, value in os.environ.items() if key != "MEDDIFF_STUDY"} | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, "-m", "snakemake", "--profile", "slurm", "-n", "-q", "rules", "--configfile", str(path)]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", USED, str(folder / "used"), *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - begun
    total = re.search(r"^total\s+(\d+)", done.stdout, re.M)
    if done.returncode or total is None:
        sys.exit(f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
    cpu, kilobytes = map(float, (folder / "used").read_text().split())
    return Planned(subjects, cpu, wall, kilobytes * 1024 / 1e6, int(total.group(1)))


def exponent(small: float, large: float, factor: float) -> float:
    """p, where `large` is `small` times `factor` to the power p."""
    return math.log(large / small) / math.log(factor)


def main(counts: list[int]) -> int:
    print(f"{'subjects':>10}{'jobs':>7}{'processor, s':>14}{'wall, s':>9}{'peak, MB':>10}")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            one = measure(count, Path(folder))
            found.append(one)
            print(f"{one.subjects:>10,}{one.jobs:>7}{one.cpu:>14.1f}{one.wall:>9.1f}{one.megabytes:>10.0f}", flush=True)
    first, last = found[0], found[-1]
    if len(found) > 1:
        factor = last.subjects / first.subjects
        powers = [
            exponent(getattr(first, name), getattr(last, name), factor) for name in ("jobs", "cpu", "wall", "megabytes")
        ]
        print(f"{'exponent':>10}{powers[0]:>7.2f}{powers[1]:>14.2f}{powers[2]:>9.2f}{powers[3]:>10.2f}")
    return int(last.subjects <= 100_000 and (last.cpu > SECONDS or last.megabytes > MEGABYTES or last.jobs > JOBS))


if __name__ == "__main__":
    sys.exit(main([int(text) for text in sys.argv[1:]] or [1_000, 10_000, 100_000]))
