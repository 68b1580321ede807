from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer

from meddiff_steps.cohort.manifest import read_manifest
from meddiff_steps.compute.device import resolve
from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_json
from meddiff_steps.downstream import segmentation
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.privacy.label_maps import RealLabelMaps
from meddiff_steps.steps import options

log = logging.getLogger(__name__)


def run(
    config: options.Config,
    manifest: options.Manifest,
    images: options.Images,
    label_maps: Annotated[list[Path], typer.Option(help="shard of the scans' label maps; repeat for all of them")],
    filtered: options.Filtered,
    released: options.Released,
    cases: Annotated[Path, typer.Option(help="what was measured of each structure of each scan, to write (Parquet)")],
    out: Annotated[Path, typer.Option(help="arms, differences and verdict to write (JSON)")],
    threads: options.Threads = 1,
) -> None:
    """Train segmenters on real pairs, synthetic ones and both, and compare them on the scans of the test split."""
    study = load_stage(config, "segmentation_study")
    assert study.pairs is not None
    settings, structures = study.segmentation_study, list(study.pairs.structures)
    shards, made = Shards(images), Shards(filtered)
    scans = read_manifest(manifest).set_index("scan_id").loc[shards.column("scan_id")].reset_index()
    maps = RealLabelMaps.of(Shards(label_maps), scans["scan_id"].tolist())
    train, test = (np.flatnonzero((scans["split"] == name).to_numpy()) for name in ("train", "test"))
    ids = set(pd.read_parquet(released, columns=["sample_id"])["sample_id"])
    kept = np.array([row for row, name in enumerate(made.column("sample_id")) if name in ids], dtype=int)
    for what, found in (("train split", train), ("test split", test), ("release", kept)):
        if not len(found):
            raise UserError(f"segmentation_study: no pair in the {what}. Check splits, and privacy/report.json.")

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Real training pairs first, then released ones."""
        pictures, labels = [], []
        for row in rows:
            if row < len(train):
                pictures.append(shards.tensors("image", [train[row]])[0])
                labels.append(maps[train[[row]]][0])
            else:
                pictures.append(made.tensors("image", [kept[row - len(train)]])[0])
                labels.append(made.tensor("labels", int(kept[row - len(train)])))
        return np.stack(pictures), np.stack(labels)

    compared = segmentation.arms(
        settings, scans["subject_id"].iloc[train].tolist(), len(train) + np.arange(len(kept)), study.seed
    )
    truth, spacing = maps[test], study.preprocess.voxel_mm
    assert spacing is not None
    device = resolve(study.compute)[0]
    measured = (shards.tensors("image", test), truth)
    table = segmentation.run_study(settings, compared, read, measured, structures, spacing, study.seed, device, threads)
    blind = np.broadcast_to(segmentation.commonest(maps[train], len(structures)), truth.shape)
    table = pd.concat(
        [table, segmentation.cases("commonest_label", 0, blind, truth, structures, spacing)], ignore_index=True
    )
    subjects = scans["subject_id"].iloc[test].tolist()
    result = segmentation.compare(table, settings, subjects, study.seed)
    counts: dict[str, Any] = {arm.name: {"real": len(arm.real), "synthetic": len(arm.synthetic)} for arm in compared}
    for entry in result["arms"]:
        entry["pairs"] = counts.get(entry["name"], {"real": len(train), "synthetic": 0})
    voxel_ml = float(np.prod(spacing)) / 1000
    drawn = np.stack([made.tensor("labels", row) for row in kept])
    result["volumes_ml"] = {
        name: {"test_scans": _spread(truth == number, voxel_ml), "synthetic": _spread(drawn == number, voxel_ml)}
        for number, name in enumerate(structures, start=1)
    }
    result |= {"seeds": settings.seeds, "steps": settings.optimiser.steps, "test_scans": len(test)}
    with atomic_path(cases) as path:
        table.assign(scan_id=scans["scan_id"].iloc[test].to_numpy()[table["scan"]]).to_parquet(path, index=False)
    write_json(out, result)
    log.info("%s", result["verdict_text"])
    for entry in result["arms"]:
        log.info("%s: Dice %.3f", entry["name"], entry["dice"]["value"])


def _spread(inside: np.ndarray, voxel_ml: float) -> dict[str, float]:
    """Mean and standard deviation of volumes of (n, *spatial), in mL."""
    volumes = inside.reshape(len(inside), -1).sum(1) * voxel_ml
    return {"mean": float(f"{volumes.mean():.6g}"), "sd": float(f"{volumes.std():.6g}")}
