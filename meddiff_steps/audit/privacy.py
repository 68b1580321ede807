"""L7 of an audit: released images are compared with the real training scans again; only the owner of the scans can do
this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from meddiff_steps.audit.reexecution import choose
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.imaging import encoding
from meddiff_steps.privacy.calibration import thresholds_of
from meddiff_steps.privacy.detectors import score
from meddiff_steps.privacy.reference import ReferenceFiles, load_detectors
from meddiff_steps.privacy.size import batch_size
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.verify import Check
from meddiff_steps.release.sealed import Sealed

#: Similarity by which a released image, rounded to whole numbers, may exceed the limit that its unrounded self was held
#: to.
ROUNDING = 0.002


def check_privacy(release: Sealed, results: Path, sample: int, seed: str) -> Iterator[Check]:
    """Score `sample` released images, drawn by `seed`, against all training scans of a study's folder, and hold them to
    its limits.
    """
    study = release.study
    assert study is not None
    rows = choose(list(release.released()), sample, seed, "privacy")
    if not rows:
        yield Check(7, "images", "not run", "nothing was released")
        return
    stale = [
        path
        for path, digest in release.root["inputs"].items()
        if verify.safe(path) and (results / path).is_file() and sha256_file(results / path) != digest
    ]
    if stale:
        yield Check(
            7,
            "inputs",
            "finding",
            f"{len(stale)} file(s) of {results} are not those that the ledger was made from",
            sorted(stale)[:5],
        )
    else:
        yield from _check_report(release, results)
    try:
        calibration = read_json(results / "privacy/calibration.json")
        thresholds = thresholds_of(calibration)
        detectors = load_detectors(_files(results), load_file(results / "privacy/reference.safetensors"))
    except (UserError, OSError, KeyError) as error:
        yield Check(7, "images", "not run", f"{results} lacks what the filter used ({error})")
        return
    if thresholds is None:
        yield Check(
            7,
            "images",
            "not run",
            f"too few unseen subjects for limits ({calibration['subjects']} of {calibration.get('needed')})",
        )
        return
    scale = encoding.VOLUME_SCALE if study.spatial_dims == 3 else encoding.PICTURE_SCALE
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    try:
        stored = [encoding.decode(release.folder / row["image"]["path"], grid).stored for row in rows]
    except encoding.Undecodable as error:
        yield Check(7, "images", "finding", f"an image cannot be decoded ({error})")
        return
    stack = np.stack(stored).astype(np.float32)[:, None] / scale
    size = batch_size(stack.shape[1:])
    parts = [score(detectors, torch.from_numpy(stack[start : start + size]))[0] for start in range(0, len(stack), size)]
    similarity = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    subgroup = study.privacy.subgroup
    groups = [str(row["covariates"][subgroup]) if subgroup else "all" for row in rows]
    near = []
    for i, row in enumerate(rows):
        limits = thresholds.groups.get(groups[i], thresholds.overall)
        over = [
            f"{name} {similarity[name][i]:.4f} > {limits[name]:.4f}"
            for name in similarity
            if similarity[name][i] > limits[name] + ROUNDING
        ]
        if over:
            near.append(f"{row['sample_id']}: {', '.join(over)}")
    if near:
        yield Check(
            7,
            "images",
            "finding",
            f"{len(near)} of {len(rows)} released images are nearer to a training scan than allowed",
            near[:5],
        )
    else:
        yield Check(
            7,
            "images",
            "pass",
            f"none of {len(rows)} released images is nearer to a training scan than {len(similarity)} detectors allow",
        )


def _check_report(release: Sealed, results: Path) -> Iterator[Check]:
    """Verdict and counts are those of the privacy report, which is the one that root.json names; a note at best, since
    no image was looked at.
    """
    said = release.root["privacy"]
    try:
        report = read_json(results / "privacy/report.json")
        same = report["verdict"] == said.get("verdict") and {
            k: v for k, v in report["counts"].items() if isinstance(v, int)
        } == said.get("counts")
    except (UserError, KeyError, AttributeError) as error:
        yield Check(7, "inputs", "not run", f"the privacy report cannot be read ({error})")
        return
    good, bad = (
        "the ledger was made from the files in",
        "root.json has another verdict or other counts than the privacy report in",
    )
    yield Check(7, "inputs", "note" if same else "finding", f"{good if same else bad} {results}")


def _files(results: Path) -> ReferenceFiles:
    privacy = results / "privacy"
    return ReferenceFiles(
        sorted((results / "preprocessed").glob("shard-*.arrow")),
        results / "autoencoder/model.safetensors",
        results / "autoencoder/card.json",
        results / "latents/scale.safetensors",
        privacy / "embedder.safetensors",
        privacy / "embedder.json",
    )
