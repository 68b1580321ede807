"""Run records: what a step read and wrote is seen from its files, whatever its parameters are called."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import rfc8785
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from meddiff_steps import __version__
from meddiff_steps.config import freeze, parse_study, without_paths
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file, write_atomic
from meddiff_steps.core.weights_digest import safetensors_digest
from meddiff_steps.models.weights import weights_digest
from meddiff_steps.provenance import record

STUDY = {
    "study": "tiny",
    "cohort": {"source": "bids", "root": "/secret/place"},
    "covariates": {"age": {"unit": "year", "range": [0, 100]}},
    "plan": [{"name": "syn", "subjects": 10}],
}


def step(
    config: Annotated[Path, typer.Option()],
    source: Annotated[list[Path], typer.Option()],
    shard: Annotated[int, typer.Option()],
    out: Annotated[Path, typer.Option()],
    optional: Annotated[Path | None, typer.Option()] = None,
) -> None:
    """Joins files."""
    if shard < 0:
        raise UserError("bad shard")
    write_atomic(out, b"".join(path.read_bytes() for path in source))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    root = tmp_path / "results/tiny"
    (root / "cohort").mkdir(parents=True)
    for name in ("a", "b"):
        (root / "cohort" / name).write_bytes(name.encode() * 10)
    return root


def run(results: Path, *arguments: str) -> int:
    app = typer.Typer()
    app.command()(record.recorded("plan", step))
    frozen = freeze(parse_study(STUDY, "test"), "plan", results / "config")
    files = [
        "--config",
        frozen,
        "--source",
        results / "cohort/a",
        "--source",
        results / "cohort/b",
        "--out",
        results / "deep/joined",
    ]
    return CliRunner().invoke(app, [*map(str, files), *arguments]).exit_code


def read(results: Path) -> dict:
    return json.loads((results / "records/deep/joined.json").read_text())


def test_a_run_leaves_what_it_read_and_wrote(results):
    assert run(results, "--shard", "3") == 0
    found = read(results)
    assert found["schema"] == record.SCHEMA and found["step"] == "plan"
    assert found["inputs"]["source"] == [
        {"path": f"cohort/{name}", "bytes": 10, "sha256": hashlib.sha256(name.encode() * 10).hexdigest()}
        for name in ("a", "b")
    ]
    assert found["outputs"] == {
        "out": [{"path": "deep/joined", "bytes": 20, "sha256": sha256_file(results / "deep/joined")}]
    }
    assert set(found["inputs"]) == {"config", "source"} and found["inputs"]["config"][0]["path"].startswith(
        "config/plan-"
    )
    assert found["parameters"] == {"shard": 3}
    assert found["code"]["version"] == __version__ and len(found["code"]["digest"]) == 16
    assert found["environment"]["packages"]["numpy"] == np.__version__
    assert found["volatile"]["host"] and found["volatile"]["started"] <= found["volatile"]["ended"]


def test_an_output_that_is_made_again_is_still_an_output(results):
    run(results, "--shard", "3")
    first = record.public(read(results))
    run(results, "--shard", "3")
    assert record.public(read(results)) == first, "and equal runs leave equal public records"


def test_a_run_that_fails_leaves_no_record(results):
    assert run(results, "--shard", "-1") != 0
    assert not (results / "records").exists()


def test_a_file_that_does_not_exist_is_not_claimed(results, tmp_path):
    assert run(results, "--shard", "1", "--optional", str(tmp_path / "none")) == 0
    assert "optional" not in read(results)["inputs"]


def test_the_public_record_names_no_place_host_or_time(results, tmp_path):
    foreign = tmp_path / "elsewhere.txt"
    foreign.write_text("x")
    run(results, "--shard", "1", "--optional", str(foreign))
    text = json.dumps(record.public(read(results)))
    assert str(tmp_path) in json.dumps(read(results)) and str(tmp_path) not in text
    assert "external/elsewhere.txt" in text
    assert read(results)["volatile"]["host"] not in text


def test_the_config_digest_is_of_what_is_published(results):
    run(results, "--shard", "1")
    frozen = freeze(parse_study(STUDY, "test"), "cohort", results / "config")
    content = json.loads(frozen.read_text())
    assert content["cohort"]["root"] == "/secret/place"
    assert without_paths(content)["cohort"] == content["cohort"] | {"root": "(path)"}
    plan = json.loads(freeze(parse_study(STUDY, "test"), "plan", results / "config").read_text())
    assert read(results)["config"]["sha256"] == hashlib.sha256(rfc8785.dumps(without_paths(plan))).hexdigest()


def test_a_large_file_is_hashed_once_and_again_when_it_was_touched(tmp_path, monkeypatch):
    path, known = tmp_path / "large", record.KnownDigests(tmp_path / "known")
    path.write_bytes(b"x" * (record.CACHED_FROM + 1))
    count = []
    monkeypatch.setattr(record, "sha256_file", lambda p: count.append(p) or sha256_file(p))

    def digest() -> str:
        stat = record._stat(path)
        assert stat is not None
        return known.sha256(path, "large", stat)

    assert digest() == digest() == sha256_file(path) and len(count) == 1
    times = path.stat()
    time.sleep(0.02)
    with open(path, "r+b") as stream:
        stream.write(b"y")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time of change as before
    assert digest() == sha256_file(path) and len(count) == 2


def test_a_digest_that_cannot_be_kept_costs_the_next_run_a_look_but_no_record(results, monkeypatch):
    monkeypatch.setattr(record, "CACHED_FROM", 0)
    (results / "records").mkdir()
    (results / "records/.digests").write_text("a file where the folder should be")
    assert run(results, "--shard", "1") == 0
    assert read(results)["inputs"]["source"]


def test_a_run_whose_record_cannot_be_written_fails(results):
    (results / "records").write_text("a file where the folder should be")
    app = typer.Typer()
    app.command()(record.recorded("plan", step))
    frozen = freeze(parse_study(STUDY, "test"), "plan", results / "config")
    with pytest.raises(
        UserError, match="records: the work of plan is done, but its record cannot be written .* Check permissions"
    ):
        app(
            [
                "--config",
                str(frozen),
                "--source",
                str(results / "cohort/a"),
                "--shard",
                "1",
                "--out",
                str(results / "joined"),
            ],
            standalone_mode=False,
        )


def test_weights_have_the_same_digest_with_and_without_torch(tmp_path):
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.arange(5),
        "h": torch.randn(2).half(),
        "bf": torch.randn(2).bfloat16(),
        "s": torch.tensor(1.5),
    }
    tensors["empty"] = torch.zeros(0, 3)
    save_file(tensors, tmp_path / "m.safetensors", {"note": "x"})
    assert safetensors_digest(tmp_path / "m.safetensors") == weights_digest(tensors)
    (tmp_path / "bad.safetensors").write_bytes((tmp_path / "m.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        safetensors_digest(tmp_path / "bad.safetensors")


def test_the_command_line_records_a_real_step(tmp_path):
    results = tmp_path / "results/tiny"
    study = {
        "study": "tiny",
        "cohort": {"source": "simulated"},
        "covariates": {"sex": {"levels": ["F", "M"]}},
        "plan": [{"name": "syn", "subjects": 2, "covariates": "grid", "grid": {"sex": ["F", "M"]}}],
    }
    frozen = freeze(parse_study(study, "test"), "plan", results / "config")
    import pandas as pd

    from meddiff_steps.cohort.manifest import write_manifest

    frame = pd.DataFrame(
        {
            "scan_id": ["a", "b"],
            "subject_id": ["a", "b"],
            "session_id": None,
            "path": "x",
            "sha256": "0",
            "content_sha256": "0",
            "split": "train",
        }
    )
    (results / "cohort").mkdir()
    write_manifest(frame.assign(sex=["F", "M"]), results / "cohort/manifest.parquet")
    command = [
        "plan",
        "--config",
        frozen,
        "--manifest",
        results / "cohort/manifest.parquet",
        "--out",
        results / "plan.parquet",
    ]
    done = subprocess.run([sys.executable, "-m", "meddiff_steps", *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((results / "records/plan.parquet.json").read_text())
    assert [entry["path"] for entry in found["inputs"]["manifest"]] == ["cohort/manifest.parquet"]
    assert found["outputs"]["out"][0]["sha256"] == sha256_file(results / "plan.parquet")
