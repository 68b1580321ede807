"""A cohort from S3, and a release to S3, against a server on this machine (moto)."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_study import ENVIRONMENT, STUDY, snakemake

pytestmark = pytest.mark.slow

LOCK = Path(__file__).parents[1] / "envs/requirements-s3.lock"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
REMOTE = STUDY | {
    "cohort": {"source": "bids", "root": "data/cohort"},
    "covariates": {"age": {"unit": "year", "range": [40, 90]}, "sex": {"levels": ["F", "M"]}},
    "plan": [{"name": "syn", "subjects": 4}],
    "storage": {"protect": False, "cohort": "s3://hospital/bids/cohort", "publish": "s3://public/releases/tiny"},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The packages of `LOCK`, in a folder of their own that goes before the others."""
    folder = tmp_path_factory.mktemp("s3")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), "-r", str(LOCK)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"no environment for S3: {done.stderr.strip()[-200:]}")
    return {"PYTHONPATH": os.pathsep.join([str(folder), ENVIRONMENT["PYTHONPATH"]])}


@pytest.fixture(scope="module")
def endpoint(packages):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], env=os.environ | packages, stderr=subprocess.DEVNULL
    )
    for _ in range(300):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None, "moto's server ended at once"
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def bucket(packages, endpoint, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(packages["PYTHONPATH"].split(os.pathsep)[0])
    return pytest.importorskip("boto3").resource("s3", endpoint_url=endpoint)


@pytest.fixture
def run(tmp_path, packages, endpoint):
    """Runs Snakemake on `REMOTE` in `tmp_path`."""

    def run(*arguments: str) -> None:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(REMOTE))
        command = snakemake(tmp_path, *arguments, "--storage-s3-endpoint-url", endpoint)
        done = subprocess.run(command, env=ENVIRONMENT | KEYS | packages, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    return run


def test_a_cohort_comes_from_s3_and_is_read(tmp_path, bucket, run):
    bucket.create_bucket(Bucket="hospital")
    people = pd.DataFrame(
        {"participant_id": [f"sub-{i:02d}" for i in range(24)], "age": range(50, 74), "sex": ["F", "M"] * 12}
    )
    files = {
        "participants.tsv": people.to_csv(sep="\t", index=False).encode(),
        "dataset_description.json": b'{"Name": "x", "BIDSVersion": "1.10.0"}',
    }
    draw = np.random.default_rng(0)
    for name in people["participant_id"]:
        image = nib.Nifti1Image(draw.integers(0, 100, (4, 4, 4)).astype(np.int16), np.eye(4))
        files[f"{name}/anat/{name}_T1w.nii"] = image.to_bytes()
    for name, content in files.items():
        bucket.Object("hospital", f"bids/cohort/{name}").put(Body=content)
    run("results/tiny/cohort/manifest.parquet")
    manifest = pd.read_parquet(tmp_path / "results/tiny/cohort/manifest.parquet")
    assert sorted(manifest["subject_id"]) == sorted(people["participant_id"])
    found = {
        str(path.relative_to(tmp_path / "data/cohort")): path.read_bytes()
        for path in (tmp_path / "data/cohort").rglob("*")
        if path.is_file()
    }
    assert found == files


def test_a_sealed_release_goes_to_s3_whole(tmp_path, bucket, run):
    bucket.create_bucket(Bucket="public")
    release = tmp_path / "results/tiny/release"
    files = {
        "provenance/root.json": b"{}",
        "dataset_description.json": b"{}",
        "sub-1/anat/sub-1_T1w.nii.gz": bytes(range(256)),
    }
    for name, content in files.items():
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_bytes(content)
    run("publish", "--allowed-rules", "publish")
    found = {item.key: item.get()["Body"].read() for item in bucket.Bucket("public").objects.all() if item.size}
    assert {
        name.removeprefix("releases/tiny/"): content
        for name, content in found.items()
        if not name.endswith(".snakemake_timestamp")
    } == files
