"""The steps of translation on files: whatever contrast is missing, and volumes from a network of slices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from meddiff_steps import config
from meddiff_steps.imaging.preprocess import preprocess_shard
from meddiff_steps.steps import translation, translation_model

SHAPE, SCANS = (8, 8, 8), 8


def study(folder: Path, **changed: Any) -> config.Study:
    section = {
        "source": ["image"],
        "target": ["post"],
        "block": 2,
        "channels": [8],
        "num_res_blocks": 1,
        "samples": 2,
        "num_inference_steps": 2,
        "optimiser": {"steps": 2, "batch_size": 2},
    } | changed
    post = {"path": str(folder / "{scan_id}_post.nii.gz"), "required": False}
    content = {
        "study": "tiny",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "year", "range": [40, 90]}},
        "preprocess": {"shape": list(SHAPE), "spacing_mm": 3, "channels": {"post": post}},
        "autoencoder": {"channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4},
        "translation": section,
        "evaluate": {"bootstrap": 100},
        "plan": [{"name": "syn", "subjects": 1}],
        "compute": {"device": "cpu", "precision": "32-true"},
    }
    return config.parse_study(content, "test")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Scans with a second contrast, but for the last, which is a test scan."""
    rng, affine = np.random.default_rng(0), np.diag([3.0, 3.0, 3.0, 1.0])
    rows = []
    for i in range(SCANS):
        values = np.zeros(SHAPE, np.float32)
        values[1:-1, 1:-1, 1:-1] = 100 + 50 * rng.random((6, 6, 6))
        nib.save(nib.Nifti1Image(values, affine), tmp_path / f"sub-{i}_T1w.nii.gz")
        if i < SCANS - 1:
            nib.save(nib.Nifti1Image(300 - values, affine), tmp_path / f"sub-{i}_T1w_post.nii.gz")
        split = "train" if i < 4 else "val" if i < 5 else "test"
        found = {"scan_id": f"sub-{i}_T1w", "subject_id": f"sub-{i}", "session_id": None, "split": split, "age": 50.0}
        rows.append(
            found | {"path": str(tmp_path / f"sub-{i}_T1w.nii.gz"), "sha256": "0" * 64, "content_sha256": "0" * 64}
        )
    table = pd.DataFrame(rows)
    table.to_parquet(tmp_path / "manifest.parquet", index=False)
    quality = preprocess_shard(table.drop(columns="sha256"), study(tmp_path).preprocess, tmp_path / "images.arrow")
    assert (quality["status"] == "ok").all(), quality["message"].tolist()
    quality.to_parquet(tmp_path / "qc.parquet")
    return tmp_path


def ran(folder: Path, made: config.Study, *more: str) -> dict[str, Any]:
    """Both steps, and what they measured."""
    frozen = {name: config.freeze(made, name, folder) for name in ("translation_model", "translation")}
    images, manifest = [folder / "images.arrow"], folder / "manifest.parquet"
    networks = {name: folder / name for name in more}
    translation_model.run(frozen["translation_model"], manifest, images, folder / "model", folder / "state", **networks)
    translation.run(
        frozen["translation"], manifest, folder / "qc.parquet", images, folder / "model", folder / "out", **networks
    )
    found: dict[str, Any] = json.loads((folder / "out/figures.json").read_text())
    return found


def test_whatever_is_missing_is_drawn_and_measured_where_it_is_known(cohort: Path) -> None:
    both = ["image", "post"]
    found = ran(cohort, study(cohort, source=both, target=both, missing=True))
    judged = {(entry["present"], entry["target"], entry["method"]) for entry in found["methods"]}
    assert {names[:2] for names in judged} == {("image", "post"), ("post", "image")}
    assert ("image", "post", "copy_of_image") in judged and ("image", "post", "copy_of_post") not in judged
    assert {entry["psnr"]["n"] for entry in found["methods"]} == {2}  # the third has nothing to compare with
    written = sorted(path.name for path in (cohort / "out").rglob("*T1w.nii.gz"))
    assert {name for name in written if "sub-7" in name} == {
        f"sub-7_desc-post{kind}_T1w.nii.gz" for kind in ("", "Draw", "Std")
    }
    assert sum("sub-5" in name for name in written) == 6  # each contrast from the other
    drawn = nib.load(next((cohort / "out").rglob("sub-7_desc-post_T1w.nii.gz"))).get_fdata()
    assert drawn.shape == SHAPE and drawn.max() <= 155  # in grey values of the scan itself


def test_slices_first_then_volumes(cohort: Path) -> None:
    found = ran(cohort, study(cohort, volume_steps=1), "volume", "solid")
    ways = {entry["method"]: entry for entry in found["methods"]}
    assert set(ways) == {
        *("copy_of_image", "patches", "regression", "draws", "mean_of_draws"),
        *(f"{kind}_{way}" for kind in ("volume", "solid") for way in ("draws", "mean_of_draws")),
    }
    assert all({"texture_within", "texture_across", "psnr"} <= set(entry) for entry in ways.values())
    assert set(found["model"]) == {"diffusion", "regression", "volume", "solid"}
    assert (cohort / "out/contact-sheet.png").exists()
