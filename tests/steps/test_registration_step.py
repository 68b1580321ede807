"""The steps of registration on files: trained, judged, written on the fixed scan's grid; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import ndimage

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.steps import registration, registration_train

SHAPE, SCANS = (16, 16, 16), 8


def study(folder: Path, **changed: Any) -> config.Study:
    section = {
        "pairs": 2,
        "labels": str(folder / "{scan_id}_dseg.nii.gz"),
        "structures": {"left": [1], "both": [1, 7]},
        "channels": [8, 8],
        "reduce": 1,
        "shares": [0.5],
        "window": 3,
        "optimiser": {"steps": 2, "batch_size": 2},
    } | changed
    content = {
        "study": "tiny",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "year", "range": [40, 90]}},
        "preprocess": {"shape": list(SHAPE), "spacing_mm": 3},
        "autoencoder": {"channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4},
        "registration": section,
        "evaluate": {"bootstrap": 100},
        "plan": [{"name": "syn", "subjects": 1}],
        "compute": {"device": "cpu", "precision": "32-true"},
    }
    return config.parse_study(content, "test")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Scans (their own grids are the study's, but for an axis that runs the other way) with label maps."""
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    flipped = affine @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    rng, names = np.random.default_rng(0), [f"sub-{i}_T1w" for i in range(SCANS)]
    quality = []
    with ShardWriter(
        tmp_path / "images.arrow", {"scan_id": pa.string(), "image": TensorColumn("float32", (1, *SHAPE))}
    ) as shard:
        for i, name in enumerate(names):
            labels = np.zeros(SHAPE, np.int16)
            labels[4 : 8 + i % 3, 4:12, 4:12], labels[9 + i % 3 : 12, 4:12, 4:12] = 1, 7
            image = ndimage.gaussian_filter((labels > 0) * (0.5 + 0.05 * labels), 0.7) + (
                labels > 0
            ) * 0.05 * rng.random(SHAPE)
            shard.append(scan_id=name, image=np.clip(image, 0, 1)[None])
            nib.save(nib.Nifti1Image(labels[::-1], flipped), tmp_path / f"{name}_dseg.nii.gz")
            quality.append(
                {
                    "scan_id": name,
                    "status": "ok",
                    "reason": None,
                    "shape": json.dumps(SHAPE),
                    "scan_affine": json.dumps(flipped.ravel().tolist()),
                    "target_affine": json.dumps(affine.ravel().tolist()),
                    "picture_box": None,
                    "percentile_low": 10.0 * i,
                    "percentile_high": 100.0 + 10.0 * i,
                }
            )
    pd.DataFrame(quality).to_parquet(tmp_path / "qc.parquet")
    table = {
        "scan_id": names,
        "subject_id": [name.partition("_")[0] for name in names],
        "session_id": [None] * SCANS,
        "path": [f"/data/{name.partition('_')[0]}/anat/{name}.nii.gz" for name in names],
        "sha256": ["0" * 64] * SCANS,
        "content_sha256": ["0" * 64] * SCANS,
    }
    pd.DataFrame(table | {"split": ["train"] * 4 + ["val"] * 2 + ["test"] * 2}).to_parquet(
        tmp_path / "manifest.parquet"
    )
    return tmp_path


def train(folder: Path, wanted: config.Study, network: str) -> None:
    frozen = config.freeze(wanted, "registration_train", folder / "frozen")
    out = folder / "networks" / network
    registration_train.run(
        frozen, folder / "manifest.parquet", [folder / "images.arrow"], network, out, folder / "state"
    )


def judge(folder: Path, wanted: config.Study) -> Path:
    frozen = config.freeze(wanted, "registration", folder / "frozen")
    files = folder / "manifest.parquet", folder / "qc.parquet", [folder / "images.arrow"]
    networks = folder / "networks/score", folder / "networks/plain"
    registration.run(frozen, *files, *networks, folder / "out")
    return folder / "out"


def test_scans_are_brought_onto_each_other_and_judged(cohort: Path, caplog: pytest.LogCaptureFixture) -> None:
    for network in ("score", "plain"):
        train(cohort, study(cohort), network)
    out = judge(cohort, study(cohort, pairs=3))
    assert "registration.pairs: 3 were asked for, there are 2, one for each person" in caplog.text
    figures = json.loads((out / "figures.json").read_text())
    methods = {one["method"]: one for one in figures["methods"]}
    assert list(methods) == ["none", "affine", "demons", "plain", "score"]
    assert methods["none"]["folds"]["value"] == 0 == methods["none"]["log_jacobian_sd"]["value"]
    assert methods["demons"]["dice"]["value"] > methods["none"]["dice"]["value"] and methods["none"]["dice"]["n"] == 2
    assert {"dice_left", "dice_both", "dice_all", "seconds", "gain"} <= methods["score"].keys()
    assert [(one["share"], one["method"]) for one in figures["along"]] == [(0.5, "score"), (0.5, "plain")]
    oracle = {one["method"]: one["error_mm"]["value"] for one in figures["oracle"]}
    assert 0 < oracle["demons"] < oracle["none"]
    rows = pd.read_parquet(out / "measurements.parquet")
    first = rows[(rows["method"] == "none") & rows["dice"].notna()].iloc[0]
    assert (first["moving"], first["fixed"]) == ("sub-6_T1w", "sub-7_T1w")
    assert (out / "contact-sheet.png").read_bytes()[:4] == b"\x89PNG" and (out / "dataset_description.json").is_file()
    # On the grid of the fixed scan, in grey values of the moving one
    place = out / "sub-7/anat"
    image = nib.load(place / "sub-7_desc-fromsub6registered_T1w.nii.gz")
    assert image.shape == SHAPE and image.affine[0, 0] == -3
    assert image.get_fdata().min() > 59.9 and image.get_fdata().max() <= 160.1
    said = json.loads((place / "sub-7_desc-fromsub6part50_T1w.json").read_text())
    assert said["From"] == "sub-6_T1w" and said["Share"] == 0.5
    # Two steps hardly train: the label map comes as it was
    labels = nib.load(place / "sub-7_desc-fromsub6labels_T1w.nii.gz").get_fdata()
    own = nib.load(cohort / "sub-6_T1w_dseg.nii.gz").get_fdata()
    assert set(np.unique(labels)) == {0, 1, 7} and (labels == own).mean() > 0.9


def test_a_pair_is_of_two_people(cohort: Path) -> None:
    manifest = pd.read_parquet(cohort / "manifest.parquet")
    manifest["subject_id"] = manifest["subject_id"].replace("sub-7", "sub-6")  # his second session
    manifest.to_parquet(cohort / "manifest.parquet")
    with pytest.raises(UserError, match=r"registration.pairs: test scans of 1 person, a pair needs 2"):
        judge(cohort, study(cohort))


def test_labels_that_are_not_there_are_refused(cohort: Path) -> None:
    for network in ("score", "plain"):
        train(cohort, study(cohort), network)
    with pytest.raises(
        UserError, match=r"registration.labels: no test scan has a readable label map; looked for .*none"
    ):
        judge(cohort, study(cohort, labels=str(cohort / "none" / "{scan_id}.nii")))
    with pytest.raises(UserError, match=r"registration.structures.lost: no label map has one of \[3\]; they have 1, 7"):
        judge(cohort, study(cohort, structures={"lost": [3]}))
    with pytest.raises(UserError, match="registration.labels.*cannot be filled in"):
        judge(cohort, study(cohort, labels="{who}.nii"))
    with pytest.raises(UserError, match="--network other: no such network"):
        train(cohort, study(cohort), "other")
