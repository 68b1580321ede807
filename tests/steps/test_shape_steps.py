"""The steps of shape completion on a file."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.imaging.points import defect
from meddiff_steps.steps import shape_completion, shape_completion_train


def test_shapes_are_completed_and_judged(tmp_path: Path) -> None:
    k = np.arange(300) + 0.5
    theta, z = np.pi * (1 + 5**0.5) * k, 1 - 2 * k / 300
    ball = np.stack([np.sqrt(1 - z**2) * np.cos(theta), np.sqrt(1 - z**2) * np.sin(theta), z], 1)
    rng = np.random.default_rng(0)
    points = np.stack([ball * rng.uniform(7, 9, 3) for _ in range(16)]).astype(np.float16)
    missing = np.stack([defect(p.astype(np.float32), int(rng.integers(300)), 60) for p in points])
    np.savez(tmp_path / "shapes.npz", points_mm=points, missing=missing, ids=np.array([f"shape{i}" for i in range(16)]))
    section = {
        "points": str(tmp_path / "shapes.npz"),
        "channels": 16,
        "blocks": 1,
        "samples": 2,
        "num_inference_steps": 3,
        "optimiser": {"steps": 2, "batch_size": 4},
    }
    study = config.parse_study(
        {
            "study": "tiny",
            "cohort": {"source": "simulated"},
            "covariates": {"age": {"unit": "year", "range": [40, 90]}},
            "shape_completion": section,
            "evaluate": {"bootstrap": 100},
            "plan": [{"name": "syn", "subjects": 1}],
            "compute": {"device": "cpu", "precision": "32-true"},
        },
        "test",
    )
    frozen = {name: config.freeze(study, name, tmp_path) for name in ("shape_completion_train", "shape_completion")}
    network, out = tmp_path / "network", tmp_path / "out"
    shape_completion_train.run(frozen["shape_completion_train"], tmp_path / "shapes.npz", network, tmp_path / "state")
    card = json.loads((network / "card.json").read_text())
    assert card["shapes"] == {"train": 11, "val": 1} and "points" not in card["settings"]
    shape_completion.run(frozen["shape_completion"], tmp_path / "shapes.npz", network, out)
    figures = json.loads((out / "figures.json").read_text())
    methods = {one["method"]: one for one in figures["methods"]}
    assert list(methods) == ["random", "nearest", "draw", "typical"] and figures["shapes"]["test"] == 4
    # Ellipsoids are alike; an untrained network draws noise
    assert methods["nearest"]["chamfer_mm"]["value"] < 2 < methods["draw"]["chamfer_mm"]["value"]
    assert methods["nearest"]["dice"]["value"] > 0.9
    assert methods["draw"]["nearer_mm"]["value"] < 0 and methods["draw"]["nearer_mm"]["than"] == "nearest"
    assert len(pd.read_parquet(out / "measurements.parquet")) == 16
    drawn = np.load(out / "completions.npz")
    assert drawn["drawn_mm"].shape == (4, 2, 60, 3) and drawn["ids"].tolist() == [f"shape{i}" for i in (0, 4, 8, 12)]
    mask = nib.load(out / "sub-shape4/anat/sub-shape4_desc-completed_mask.nii.gz")
    assert set(np.unique(mask.get_fdata())) == {0, 1}
    assert mask.affine[0, 0] == 1.0 and (mask.affine[:3, 3] < points.astype(np.float32).min((0, 1))).all()
    assert (out / "contact-sheet.png").read_bytes()[:4] == b"\x89PNG"
    assert str(tmp_path) not in (out / "figures.json").read_text()
