"""L7 of an audit: released images are compared with the real training scans again; only the owner of the scans can do
this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from meddiff_steps import __version__
from meddiff_steps.audit.reexecution import choose
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.imaging import encoding
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.privacy.calibration import Thresholds, thresholds_of
from meddiff_steps.privacy.detectors.base import Detector, score
from meddiff_steps.privacy.label_maps import LabelMapDetector
from meddiff_steps.privacy.reference import ReferenceFiles, load_detectors
from meddiff_steps.privacy.size import batch_size
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.ledger import Row
from meddiff_steps.provenance.verify import Check
from meddiff_steps.release import versions
from meddiff_steps.release.sealed import Sealed

#: Similarity by which a released image, rounded to whole numbers, may exceed the limit that its unrounded self was held
#: to.
ROUNDING = 0.002


def check_privacy(release: Sealed, results: Path, sample: int, seed: str, threads: int) -> Iterator[Check]:
    """Score `sample` released images, drawn by `seed`, against all training scans of a study's folder, and hold them to
    its limits.
    """
    rows = choose(list(release.released()), sample, seed, "privacy")
    if not rows:
        yield Check(7, "images", "not run", "nothing was released")
        return
    stale = _stale(release, results)
    if stale:
        text = f"{len(stale)} file(s) of {results} are not those that the ledger was made from"
        yield Check(7, "inputs", "finding", text, stale[:5])
    else:
        yield from _check_report(release, results)
    try:
        with versions.explained(release.version, "to compare with scans again"):
            yield _check_images(release, rows, results, threads)
    except versions.OtherVersion as error:
        yield Check(7, "images", "not run", str(error))


def _stale(release: Sealed, results: Path) -> list[str]:
    """Inputs of the ledger that are other files in the study's folder."""
    return sorted(
        path
        for path, digest in release.root["inputs"].items()
        if verify.safe(path) and (results / path).is_file() and sha256_file(results / path) != digest
    )


def _check_images(release: Sealed, rows: list[Row], results: Path, threads: int) -> Check:
    study = release.study
    assert study is not None
    try:
        calibration = read_json(results / "privacy/calibration.json")
        thresholds = thresholds_of(calibration)
        reference = load_file(results / "privacy/reference.safetensors")
        detectors = load_detectors(
            _files(results),
            reference,
            calibration["detectors"],
            calibration.get("mirrors", True),  # cards that do not say so are older: they always were
            make_fabric(study.compute.model_copy(update={"device": "auto"}), threads),
        )
    except (UserError, OSError, KeyError) as error:
        advice = "" if not release.is_other else f"; {versions.advice(release.version, 'to compare with scans again')}"
        return Check(7, "images", "not run", f"{results} lacks what the filter used ({error}){advice}")
    if thresholds is None:
        needed = f"{calibration['subjects']} of {calibration.get('needed')}"
        return Check(7, "images", "not run", f"too few unseen subjects for limits ({needed})")
    try:
        images = _images(release, rows)
    except encoding.Undecodable as error:
        return Check(7, "images", "finding", f"an image cannot be decoded ({error})")
    similarity = _similarities(detectors, images)
    if LABELS in reference:
        try:
            labels = _label_maps(release, rows)
        except encoding.Undecodable as error:
            return Check(7, "images", "finding", f"a label map cannot be decoded ({error})")
        of_labels = LabelMapDetector(reference[LABELS], calibration["structures"], calibration.get("mirrors", True))
        similarity[LABELS] = of_labels.similarity(labels)[0]
    near = _too_near(release, rows, similarity, thresholds)
    if not near:
        allowed = "1 detector allows" if len(similarity) == 1 else f"{len(similarity)} detectors allow"
        text = f"none of {len(rows)} released images is nearer to a training scan than {allowed}"
        return Check(7, "images", "pass", text)
    text = f"{len(near)} of {len(rows)} released images are nearer to a training scan than allowed"
    if release.is_other:  # limits are of one version's detectors
        advice = versions.advice(release.version, "to compare with the detectors that its limits are of")
        return Check(7, "images", "note", f"{text}, by the detectors of version {__version__}; {advice}", near[:5])
    return Check(7, "images", "finding", text, near[:5])


def _images(release: Sealed, rows: list[Row]) -> torch.Tensor:
    """Released images, float32 (n, 1, *spatial) in [0, 1]."""
    study = release.study
    assert study is not None
    scale = encoding.VOLUME_SCALE if study.spatial_dims == 3 else encoding.PICTURE_SCALE
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
    stored = [encoding.decode(release.folder / row["image"]["path"], grid).stored for row in rows]
    return torch.from_numpy(np.stack(stored).astype(np.float32)[:, None] / scale)


def _label_maps(release: Sealed, rows: list[Row]) -> np.ndarray:
    """Released label maps, uint8 (n, *spatial)."""
    study = release.study
    assert study is not None
    grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm, labels=True)
    return np.stack([encoding.decode(release.folder / row["labels"]["path"], grid).stored for row in rows])


def _similarities(detectors: list[Detector], images: torch.Tensor) -> dict[str, np.ndarray]:
    """By detector, the similarity of each image to its nearest training scan."""
    parts = [score(detectors, part)[0] for part in images.split(batch_size(images.shape[1:]))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _too_near(release: Sealed, rows: list[Row], similarity: dict[str, np.ndarray], thresholds: Thresholds) -> list[str]:
    study = release.study
    assert study is not None
    near = []
    for i, row in enumerate(rows):
        group = str(row["covariates"][study.privacy.subgroup]) if study.privacy.subgroup else "all"
        limits = thresholds.groups.get(group, thresholds.overall)
        over = [
            f"{name} {similarity[name][i]:.4f} > {limits[name]:.4f}"
            for name in similarity
            if similarity[name][i] > limits[name] + ROUNDING
        ]
        if over:
            near.append(f"{row['sample_id']}: {', '.join(over)}")
    return near


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
    return ReferenceFiles(
        results / "privacy/reference-scans.arrow",
        results / "autoencoder",
        results / "latents/scale.safetensors",
        results / "instruments/embedder",
    )
