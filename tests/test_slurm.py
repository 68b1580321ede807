"""The workflow on a real Slurm that the test starts: `snakemake --profile slurm` from the root of a copy of the
repository.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests/slurm"), str(ROOT / "tests")]

from cluster import Cluster, why_not  # noqa: E402
from tiny_study import CONTRACT, ENVIRONMENT, LEAN, digests, made_later, whole_run  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(5400),
    pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}"),
]

#: Not what is asked for, only how often Snakemake looks: the profile's values are right for a cluster and long for a
#: test.
IMPATIENT = ["--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "10"]
#: The number of threads changes last bits, and a job on the cluster is given what its rule asks for, a local one what
#: there is.
ONE_THREAD = ["--max-threads", "1"]
GPU_STEPS = [
    "autoencoder",
    "decoder",
    "diffusion",
    "tone",
    "latents/0000",
    "latents/0001",
    "generate/0000",
    "generate/0001",
    "filter/0000",
    "filter/0001",
    "showcase",
]


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not under pytest's folders: paths of sockets must be short
    with Cluster(folder) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository, as a fresh clone has it, with its history: run records name the commit."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    shutil.copytree(
        ROOT,
        folder,
        ignore=shutil.ignore_patterns(".venv", ".snakemake", "results", "build", "shared", "__pycache__", ".*_cache"),
    )
    (folder / "results").mkdir()
    (folder / "results/study.yaml").write_text(yaml.safe_dump(LEAN))
    return folder


def snakemake(folder: Path, environment: dict[str, str], *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("snakemake")), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=5000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def test_concurrent_jobs_get_different_gpus_and_others_none(cluster, checkout):
    rules = ["-s", "tests/slurm/gpus.smk", "--directory", "gpus"]
    (checkout / "gpus").mkdir()
    snakemake(checkout, cluster.environment(), "--profile", "slurm", *rules, *IMPATIENT)
    found = [(checkout / "gpus" / f"gpu-{number}").read_text().strip() for number in range(4)]
    assert set(found) == {"0", "1"}
    assert (checkout / "gpus/cpu").read_text().strip() == "none"


@pytest.fixture(scope="module")
def release(cluster, checkout) -> Path:
    environment = cluster.environment(ENVIRONMENT | {"PYTHONPATH": str(checkout)})
    snakemake(
        checkout, environment, "--profile", "slurm", *IMPATIENT, *ONE_THREAD, "--configfile", "results/study.yaml"
    )
    return checkout


def test_the_tiny_study_becomes_a_valid_release(release, bids_report):
    assert [name for name in CONTRACT if not made_later(name) and not (release / "results/tiny" / name).exists()] == []
    assert [
        issue
        for issue in bids_report(release / "results/tiny/release")["issues"]["issues"]
        if issue["severity"] == "error"
    ] == []


def test_every_step_that_asks_for_a_gpu_was_given_one_of_its_own(release):
    results = release / "results/tiny"
    given = {
        step: re.search(r"CUDA_VISIBLE_DEVICES: (\S+)", (results / f"logs/{step}.log").read_text())
        for step in GPU_STEPS
    }
    assert {step: match and match[1] in ("0", "1") for step, match in given.items()} == dict.fromkeys(GPU_STEPS, True)
    runs = [
        json.loads((results / f"records/generated/shard-{shard}.arrow.json").read_text())["volatile"]
        for shard in ("0000", "0001")
    ]
    assert all(run["job"] for run in runs)
    if max(run["started"] for run in runs) < min(run["ended"] for run in runs):
        assert given["generate/0000"][1] != given["generate/0001"][1]


def test_the_release_is_that_of_a_local_run(release, tmp_path_factory):
    local = digests(whole_run(tmp_path_factory))
    assert digests(release) == {name: digest for name, digest in local.items() if not made_later(name)}
