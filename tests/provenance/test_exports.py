"""What is made of a sealed release on request: tar shards for machine learning, and its models."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image as PilImage
from tiny_release import Place

from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file, write_json
from meddiff_steps.imaging.encoding import voxel_digest
from meddiff_steps.provenance.ledger import read_lines
from meddiff_steps.release.models import refuse_weights, weights_gate
from meddiff_steps.release.regeneration import find_models
from meddiff_steps.steps import export, export_index, export_models


def export_all(place: Place, release: Path, folder: Path) -> list[Path]:
    root = release / "provenance/root.json"
    tars = [folder / f"shard-{shard:04d}.tar" for shard in place.shards]
    for table, tar in zip(place.tables, tars, strict=True):
        export.run(place.frozen("export"), root, table, tar)
    export_index.run(place.frozen("export_index"), root, place.tables, tars, folder / "manifest.parquet")
    return tars


def rows_of(place: Place) -> dict[str, dict]:
    return {row["sample_id"]: row for _, row in read_lines(place.release) if row["image"]}


def test_tar_shards_hold_what_was_released(place, tmp_path):
    tars = export_all(place, place.release, tmp_path / "a")
    rows, found = rows_of(place), {}
    for tar in tars:
        with tarfile.open(tar) as archive:
            assert {(member.mtime, member.uid, member.gid, member.uname) for member in archive} == {(0, 0, 0, "")}
            found |= {member.name: archive.extractfile(member).read() for member in archive}
    assert set(found) == {f"{name}.{kind}" for name in rows for kind in ("npy", "json")}
    for name, row in rows.items():
        stored, facts = np.load(io.BytesIO(found[f"{name}.npy"])), json.loads(found[f"{name}.json"])
        assert (
            facts["synthetic"] is True
            and facts["covariates"] == row["covariates"]
            and facts["sha256"] == row["image"]["sha256"]
        )
        assert (
            stored.dtype == np.int16 and voxel_digest(stored, np.array(facts["affine"])) == row["image"]["voxel_sha256"]
        )
        assert np.array_equal(
            stored, np.asarray(nib.Nifti1Image.from_filename(place.release / row["image"]["path"]).dataobj)
        )
    manifest = pq.read_table(tmp_path / "a/manifest.parquet")
    assert manifest.schema.metadata[b"release_root_sha256"].decode() == sha256_file(
        place.release / "provenance/root.json"
    )
    table = manifest.to_pandas().set_index("sample_id")
    assert set(table.index) == set(rows) and table.loc["syn000003", "age"] == rows["syn000003"]["covariates"]["age"]
    with tarfile.open(tmp_path / "a" / table.loc["syn000003", "shard"]) as archive:
        assert "syn000003.npy" in archive.getnames()
    assert "SYNTHETIC" in (tmp_path / "a/README.md").read_text()
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "a", capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(list((tmp_path / "a").iterdir())) - 1


def test_the_same_release_gives_the_same_export(place, tmp_path):
    export_all(place, place.release, tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/shard-0099.tar").write_bytes(b"of an earlier export with more shards")
    export_all(place, place.release, tmp_path / "b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()
    }


def test_webdataset_reads_the_export(place, tmp_path):
    import webdataset

    tars = export_all(place, place.release, tmp_path)
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode())
    assert {sample["__key__"] for sample in samples} == set(rows_of(place))
    assert all(sample["npy"].shape == (8, 8, 8) and sample["json"]["synthetic"] for sample in samples)


def test_pictures_are_exported_as_they_are(tmp_path):
    place = Place(tmp_path, dims=2, sign=False)
    tars = export_all(place, place.release, tmp_path / "export")
    row = rows_of(place)["syn000003"]
    with tarfile.open(tars[int(place.plan.set_index("sample_id").loc["syn000003", "shard"])]) as archive:
        content = archive.extractfile("syn000003.png").read()
    assert content == (place.release / row["image"]["path"]).read_bytes()
    assert PilImage.open(io.BytesIO(content)).info["Description"].startswith("SYNTHETIC")


def test_a_changed_image_is_not_exported(place, copied, tmp_path):
    path = copied / rows_of(place)["syn000003"]["image"]["path"]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="not the file that the ledger names"):
        export_all(place, copied, tmp_path / "export")
    path.unlink()
    with pytest.raises(UserError, match="not readable"):
        export_all(place, copied, tmp_path / "export")


def test_an_index_wants_its_shards(place, tmp_path):
    root, frozen = place.release / "provenance/root.json", place.frozen("export_index")
    tars = [tmp_path / f"shard-{shard:04d}.tar" for shard in place.shards]
    with pytest.raises(UserError, match="no such shard"):
        export_index.run(frozen, root, place.tables, tars, tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match="in the same order"):
        export_index.run(frozen, root, place.tables, tars[1:], tmp_path / "manifest.parquet")
    with pytest.raises(UserError, match=r"expected manifest\.parquet"):
        export_index.run(frozen, root, place.tables, tars, tmp_path / "other.parquet")


def pack(place: Place, folder: Path, privacy: Path, **changed: Path) -> None:
    files = place.model_files() | changed
    export_models.run(
        place.frozen("export_models"),
        place.release / "provenance/root.json",
        privacy,
        **files,
        out=folder / "README.md",
    )


def report_of(place: Place, path: Path, **auc: float) -> Path:
    """The privacy report with what could be told from the weights."""
    report = json.loads((place.results / "privacy/report.json").read_text())
    write_json(path, report | {"attacks": {"denoising_loss": {"auc": auc}}} if auc else report)
    return path


def test_packed_models_make_the_release_again(place, tmp_path):
    pack(place, tmp_path / "models", report_of(place, tmp_path / "report.json", value=0.6, low=0.46, high=0.72))
    recipe = rows_of(place)["syn000003"]["recipe"]
    kinds = {kind: kind for kind in ("autoencoder", "decoder", "diffusion")} | {"tone": "diffusion"}
    assert find_models(tmp_path / "models", recipe) == {
        kind: tmp_path / "models" / folder for kind, folder in kinds.items()
    }
    readme = (tmp_path / "models/README.md").read_text()
    assert sha256_file(place.release / "provenance/root.json") in readme and "0.60 [0.46, 0.72]" in readme
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "models", capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 14
    checks = {
        check.name: check.outcome
        for check in audit(Request(place.release, models=tmp_path / "models", sample=4)).checks
        if check.level == 6
    }
    assert checks["models"] == checks["images"] == "pass"


def test_a_decoder_of_an_earlier_model_does_not_stay_among_packed_models(tmp_path):
    place = Place(tmp_path, drawing=False)
    (tmp_path / "models/decoder").mkdir(parents=True)
    (tmp_path / "models/decoder/model.safetensors").write_bytes(b"of a model before")
    pack(place, tmp_path / "models", report_of(place, tmp_path / "report.json", value=0.5, low=0.4, high=0.6))
    folders = {path.name for path in (tmp_path / "models").iterdir() if path.is_dir()}
    assert folders == {"autoencoder", "diffusion", "configs", "models"}


@pytest.mark.parametrize(("auc", "said"), [({}, "not measured"), ({"value": 0.77, "low": 0.7, "high": 0.84}, "0.77")])
def test_weights_that_give_people_away_are_kept(place, tmp_path, auc, said):
    with pytest.raises(UserError, match=rf"release\.models: .*{said}.*membership_limit"):
        pack(place, tmp_path / "models", report_of(place, tmp_path / "report.json", **auc))
    assert not (tmp_path / "models").exists()


def test_the_few_people_of_a_rare_level_count_as_much_as_all():
    told = {name: {"auc": {"value": v, "low": v - 0.03, "high": v + 0.03}} for name, v in (("all", 0.5), ("few", 0.9))}
    attacks = {"denoising_loss": told["all"]}
    assert weights_gate({"attacks": attacks}, 0.6).outcome == "PASS"
    assert weights_gate({"attacks": attacks | {"rare": {"denoising_loss": told["few"]}}}, 0.6).outcome == "FAIL"
    confounded = {"denoising_loss": told["few"], "strangers": "all"}
    for untried in (
        {"denoising_loss": None},
        {},
        attacks | {"rare": {"denoising_loss": None}},
        attacks | {"rare": confounded},
    ):
        assert weights_gate({"attacks": untried}, 0.6).outcome == "NOT_EVALUATED"
    few = {"denoising_loss": {"auc": {"value": 0.9, "low": None, "high": None, "n": 34, "too_few": 4}}}
    gate = weights_gate({"attacks": few}, 0.6)
    assert gate.outcome == "NOT_EVALUATED"
    with pytest.raises(UserError, match="is 0.90 .no interval: too few on one side., the limit 0.4 to 0.6"):
        refuse_weights(gate, "stop")


@pytest.mark.parametrize("name", ["diffusion/model", "diffusion/tone", "decoder/model", "autoencoder/model"])
def test_other_weights_are_not_packed(place, tmp_path, name):
    kind, file = name.split("/")
    other = Path(shutil.copytree(place.model_files()[kind], tmp_path / kind))
    weights = other / f"{file}.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file}.safetensors.* the release was made by"):
        privacy = report_of(place, tmp_path / "report.json", value=0.5, low=0.4, high=0.6)
        pack(place, tmp_path / "models", privacy, **{kind: other})


def test_the_manifest_can_be_read_by_pandas(place, tmp_path):
    export_all(place, place.release, tmp_path)
    table = pd.read_parquet(tmp_path / "manifest.parquet")
    assert {"sample_id", "shard", "sha256", "voxel_sha256", "age", "sex"} <= set(table)
