"""The steps of segmentation on files, with all that can be trained beside: few labels, patches, whole scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.steps import segmentation, segmentation_few_labels, segmentation_model

SHAPE, SUBJECTS = (8, 8, 8), 8


def study(**changed: Any) -> config.Study:
    section = {
        "target": ["lesion"],
        "block": 2,
        "channels": [8],
        "num_res_blocks": 1,
        "samples": 2,
        "num_inference_steps": 2,
        "start": 0,
        "most_images": 1,
        "labelled": [2, 3],
        "pretraining_steps": 3,
        "patch": [4, 4, 4],
        "beside": ["whole", "unplaced"],
        "optimiser": {"steps": 8, "batch_size": 2, "warmup_steps": 1},
    } | changed
    content = {
        "study": "tiny",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "year", "range": [40, 90]}},
        "preprocess": {"shape": list(SHAPE), "spacing_mm": 3, "channels": {"lesion": {"path": "x", "kind": "mask"}}},
        "autoencoder": {"channels": [8, 16], "norm_num_groups": 4, "latent_channels": 4},
        "segmentation_ensemble": section,
        "evaluate": {"bootstrap": 100},
        "plan": [{"name": "syn", "subjects": 1}],
        "compute": {"device": "cpu", "precision": "32-true"},
    }
    return config.parse_study(content, "test")


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two scans of each subject, a cube marked in each."""
    rng, names = np.random.default_rng(0), [f"sub-{i}_ses-{j}_T1w" for i in range(SUBJECTS) for j in (1, 2)]
    columns = {"scan_id": pa.string(), "image": TensorColumn("float32", (1, *SHAPE))}
    columns |= {"lesion": TensorColumn("uint8", (1, *SHAPE), "mask")}
    affine, quality = np.diag([3.0, 3.0, 3.0, 1.0]).ravel().tolist(), []
    with ShardWriter(tmp_path / "images.arrow", columns) as shard:
        for name in names:
            mask = np.zeros((1, *SHAPE))
            a, b, c = rng.integers(1, 5, 3)
            mask[0, a : a + 3, b : b + 3, c : c + 3] = 1
            shard.append(scan_id=name, image=0.2 + 0.5 * mask, lesion=mask)
            quality.append(
                {"scan_id": name, "status": "ok", "reason": None, "shape": json.dumps(SHAPE), "picture_box": None}
                | {"scan_affine": json.dumps(affine), "target_affine": json.dumps(affine)}
                | {"percentile_low": 0.0, "percentile_high": 1.0}
            )
    pd.DataFrame(quality).to_parquet(tmp_path / "qc.parquet")
    table = {"scan_id": names, "subject_id": [name.partition("_")[0] for name in names]}
    table |= {"session_id": [None] * len(names), "path": [f"/data/{name}.nii.gz" for name in names]}
    table |= {"sha256": ["0" * 64] * len(names), "content_sha256": ["0" * 64] * len(names)}
    table |= {"split": ["train"] * 10 + ["val"] * 2 + ["test"] * 4}
    pd.DataFrame(table).to_parquet(tmp_path / "manifest.parquet")
    return tmp_path


def learn(folder: Path, wanted: config.Study, network: str) -> Path:
    frozen = config.freeze(wanted, "segmentation_few_labels", folder / "frozen")
    out, base = folder / "few" / network, folder / "few/pretraining" if network.startswith("pretrained") else None
    files = folder / "manifest.parquet", [folder / "images.arrow"]
    segmentation_few_labels.run(frozen, *files, network, out, folder / "state", base)
    return out


def test_all_that_is_compared_is_trained_and_judged(cohort: Path) -> None:
    wanted, files = study(), (cohort / "manifest.parquet", [cohort / "images.arrow"])
    frozen = config.freeze(wanted, "segmentation_model", cohort / "frozen")
    beside = []
    for name in (None, "whole", "unplaced"):
        out = cohort / (name or "model")
        segmentation_model.run(frozen, *files, out, cohort / "state", name)
        beside += [out / "model.safetensors", out / "card.json"] if name else []
    learn(cohort, wanted, "pretraining")
    names = wanted.segmentation_ensemble.few_labels
    assert names == [f"{way}_{n}" for n in ("2", "3", "all") for way in ("scratch", "pretrained")]
    cards = {name: read_json(learn(cohort, wanted, name) / "card.json") for name in names}
    assert [card["scans"]["train"] for card in cards.values()] == [4, 4, 6, 6, 10, 10]
    assert [card["labelled_subjects"] for card in cards.values()] == [2, 2, 3, 3, 5, 5]
    base = read_json(cohort / "few/pretraining/card.json")
    assert (base["way"], base["source"], base["optimiser"]["steps"]) == ("diffusion", [], 3)
    assert all(("base" in card) == name.startswith("pretrained") for name, card in cards.items())
    assert cards["pretrained_2"]["base"]["weights_sha256"] == base["weights_sha256"]
    alike = [{key: card[key] for key in ("settings", "optimiser", "parameters")} for card in cards.values()]
    assert all(one == alike[0] for one in alike)

    few = [cohort / "few" / name / "model.safetensors" for name in names]
    frozen = config.freeze(wanted, "segmentation", cohort / "frozen")
    manifest, images = files
    out = cohort / "out"
    segmentation.run(frozen, manifest, cohort / "qc.parquet", images, cohort / "model", out, beside, few)
    said = read_json(out / "figures.json")
    ways = [one["method"] for one in said["methods"]]
    compared = [f"{name}_{way}" for name in ("whole", "unplaced") for way in ("regression", "ensemble")]
    assert [way for way in ways if way in (*compared, *names)] == [*compared, *names]
    assert {"regression", "ensemble", "mean_label"} < set(ways)
    assert all("dice_scan" in one and one["dice_scan"]["n"] == 2 for one in said["methods"])  # of subjects
    costs = said["trainings"]
    assert costs["whole_diffusion"]["steps"] == 1 and costs["diffusion"]["steps"] == 8  # an eighth of the voxels
    assert costs["diffusion"]["patch"] == [4, 4, 4] and costs["whole_diffusion"]["patch"] is None
    kept = [costs[name]["kept_for_gradients_bytes"] for name in ("diffusion", "whole_diffusion")]
    assert 0.12 < kept[0] / kept[1] < 0.3
    assert not costs["unplaced_regression"]["coordinates"] and set(said["beside"]) == {"whole", "unplaced", *names}


def test_what_cannot_be_trained_is_refused(cohort: Path) -> None:
    with pytest.raises(UserError, match="--network scratch_few: expected pretraining, scratch_N or pretrained_N"):
        learn(cohort, study(), "scratch_few")
    with pytest.raises(UserError, match=r"segmentation_ensemble.labelled: 6 of 5 training subjects"):
        learn(cohort, study(), "scratch_6")
    with pytest.raises(UserError, match="--network pretraining: segmentation_ensemble.pretraining_steps is 0"):
        learn(cohort, study(pretraining_steps=0), "pretraining")
    frozen = config.freeze(study(), "segmentation_few_labels", cohort / "frozen")
    files = frozen, cohort / "manifest.parquet", [cohort / "images.arrow"]
    with pytest.raises(UserError, match="--network pretrained_2: no --base"):
        segmentation_few_labels.run(*files, "pretrained_2", cohort / "out", cohort / "state")
    plain = config.freeze(study(patch=None, beside=[]), "segmentation_model", cohort / "frozen")
    with pytest.raises(UserError, match="--beside whole: expected whole or unplaced, of a study with .*patch"):
        segmentation_model.run(plain, *files[1:], cohort / "out", cohort / "state", "whole")
