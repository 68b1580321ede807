"""A cohort from S3, and a release to S3, against a server on this machine (moto)."""

import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_study import ENVIRONMENT, STUDY, snakemake

boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")
pytest.importorskip("snakemake_storage_plugin_s3")
pytestmark = pytest.mark.slow

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
REMOTE = STUDY | {
    "cohort": {"source": "bids", "root": "data/cohort"},
    "covariates": {"age": {"unit": "year", "range": [40, 90]}, "sex": {"levels": ["F", "M"]}},
    "plan": [{"name": "syn", "subjects": 4}],
    "storage": {"protect": False, "cohort": "s3://hospital/bids/cohort", "publish": "s3://public/releases/tiny"},
}


@pytest.fixture(scope="module")
def endpoint():
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return boto3.resource("s3", endpoint_url=endpoint)


def run(folder: Path, endpoint: str, *arguments: str) -> None:
    (folder / "study.yaml").write_text(yaml.safe_dump(REMOTE))
    command = snakemake(folder, *arguments, "--storage-s3-endpoint-url", endpoint)
    paths = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=ENVIRONMENT | KEYS | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def test_a_cohort_comes_from_s3_and_is_read(tmp_path, endpoint, bucket):
    bucket.create_bucket(Bucket="hospital")
    people = pd.DataFrame({"participant_id": [f"sub-{i:02d}" for i in range(24)], "age": range(50, 74), "sex": ["F", "M"] * 12})
    files = {"participants.tsv": people.to_csv(sep="\t", index=False).encode(), "dataset_description.json": b'{"Name": "x", "BIDSVersion": "1.10.0"}'}
    draw = np.random.default_rng(0)
    for name in people["participant_id"]:
        image = nib.Nifti1Image(draw.integers(0, 100, (4, 4, 4)).astype(np.int16), np.eye(4))
        files[f"{name}/anat/{name}_T1w.nii"] = image.to_bytes()
    for name, content in files.items():
        bucket.Object("hospital", f"bids/cohort/{name}").put(Body=content)
    run(tmp_path, endpoint, "results/tiny/cohort/manifest.parquet")
    manifest = pd.read_parquet(tmp_path / "results/tiny/cohort/manifest.parquet")
    assert sorted(manifest["subject_id"]) == sorted(people["participant_id"])
    found = {str(path.relative_to(tmp_path / "data/cohort")): path.read_bytes() for path in (tmp_path / "data/cohort").rglob("*") if path.is_file()}
    assert found == files


def test_a_sealed_release_goes_to_s3_whole(tmp_path, endpoint, bucket):
    bucket.create_bucket(Bucket="public")
    release = tmp_path / "results/tiny/release"
    files = {"provenance/root.json": b"{}", "dataset_description.json": b"{}", "sub-1/anat/sub-1_T1w.nii.gz": bytes(range(256))}
    for name, content in files.items():
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_bytes(content)
    run(tmp_path, endpoint, "publish", "--allowed-rules", "publish")
    found = {item.key: item.get()["Body"].read() for item in bucket.Bucket("public").objects.all() if item.size}
    assert {name.removeprefix("releases/tiny/"): content for name, content in found.items() if not name.endswith(".snakemake_timestamp")} == files
