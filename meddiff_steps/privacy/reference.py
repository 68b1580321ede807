"""The training set as the detectors see it, and their calibration and controls.  Private: never part of a release."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.core.choice import chosen
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.perturbations import perturbed_copies
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.instruments.embedder import load_embedder
from meddiff_steps.models.first_stage.base import reconstruct
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.trained import load_first_stage
from meddiff_steps.privacy.attacks import flag_rate_is_nominal, share
from meddiff_steps.privacy.calibration import calibrate
from meddiff_steps.privacy.detectors.base import Context, Detector, TrainingImages, references, score
from meddiff_steps.privacy.size import batch_size, subjects_needed

#: Training scans that are copied for the positive controls, each in six ways.
CONTROL_SCANS = 20


@dataclass(frozen=True)
class ReferenceFiles:
    """The files that the detectors are built from."""

    images: Sequence[Path]
    autoencoder: Path
    scale: Path
    embedder: Path


def make_detectors(context: Context, names: Sequence[str] | None = None) -> list[Detector]:
    """Build detectors, in the order of their registry whatever the order of `names`.

    Parameters
    ----------
    context
        What they are built from; a detector that is not chosen loads nothing.
    names
        Of the registry `DETECTORS`.  None: all.

    Raises
    ------
    UserError
        A name is not in the registry, or there is none.
    """
    return [DETECTORS.load(name).build(context) for name in chosen(DETECTORS, names, "privacy.detectors")]


def build_reference(
    files: ReferenceFiles, training_rows: np.ndarray, names: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Mean training image, rows of the training scans, and their directions under each detector of `names` (None: all).

    Raises
    ------
    UserError
        As `make_detectors`.
    """
    training = TrainingImages(Shards(files.images), training_rows)
    total = np.zeros(training.shards.shape("image"))
    for batch in training.batches():
        total += batch.sum(0, dtype=torch.float64).numpy()
    mean = (total / len(training)).astype(np.float32)
    detectors = make_detectors(_context(files, training, {}, mean), names)
    tensors: dict[str, np.ndarray] = {"mean": mean, "rows": training_rows.astype(np.int64)}
    return tensors | {detector.name: references(detector, training) for detector in detectors}


def load_detectors(files: ReferenceFiles, reference: Mapping[str, np.ndarray], names: Sequence[str]) -> list[Detector]:
    """Detectors with the reference that `build_reference` made of them.

    Parameters
    ----------
    names
        Those that the calibration card lists: what is not calibrated has no threshold.

    Raises
    ------
    UserError
        A detector does not exist, or the reference lacks its directions.
    """
    missing = [name for name in names if name not in reference]
    if missing:
        raise UserError(
            f"the reference has no directions under the detector {missing[0]}, which the calibration lists: they are of"
            " different runs. Run the step `calibrate` again."
        )
    training = TrainingImages(Shards(files.images), reference["rows"])
    return make_detectors(_context(files, training, reference, reference["mean"]), names)


def _context(
    files: ReferenceFiles, training: TrainingImages, vectors: Mapping[str, np.ndarray], mean: np.ndarray
) -> Context:
    def standardisation() -> Standardisation[Tensor]:
        tensors = load_file(files.scale)
        return Standardisation(tensors["offset"], tensors["scale"])

    return Context(
        mean,
        training,
        embedder=lambda: load_embedder(files.embedder),
        first_stage=lambda: load_first_stage(files.autoencoder)[0],
        standardisation=standardisation,
        directions=vectors,
    )


def score_scans(
    detectors: list[Detector], shards: Shards, rows: Sequence[int] | np.ndarray, label: str
) -> dict[str, np.ndarray]:
    """Per detector: similarity of each scan to its nearest training scan, (len(rows),)."""
    parts: list[dict[str, np.ndarray]] = []
    size = batch_size(shards.shape("image"))
    for start in tqdm(range(0, len(rows), size), desc=label, mininterval=5, file=sys.stderr):
        parts.append(score(detectors, torch.from_numpy(shards.tensors("image", rows[start : start + size])))[0])
    return {
        detector.name: np.concatenate([part[detector.name] for part in parts]) if parts else np.zeros(0)
        for detector in detectors
    }


def nearest_of_subject(
    scores: Mapping[str, np.ndarray], subjects: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The largest similarity among the scans of each subject, and the subjects in order; subjects are what is
    exchangeable.
    """
    names, number = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    best = {}
    for detector, values in scores.items():
        best[detector] = np.full(len(names), -np.inf)
        np.maximum.at(best[detector], number, values)
    return best, names


def any_flag(flags: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether at least one detector fires, bool (n,)."""
    return np.logical_or.reduce(list(flags.values()))


def calibration_card(
    files: ReferenceFiles,
    reference: Mapping[str, np.ndarray],
    table: pd.DataFrame,
    groups: pd.Series,
    level: float,
    seed: str,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Thresholds from the calibration split, and both controls.

    Parameters
    ----------
    table
        One row per preprocessed scan: row (in the shards), subject_id, split.
    groups
        Subgroup per subject id.
    level, seed
        Of the study.
    names
        Detectors that share the level, as for `build_reference`; None: all.

    Returns
    -------
    dict
        status (`CALIBRATED` or `NOT_CALIBRATED`), level, detectors, subjects, needed, thresholds, groups, and under
        `controls`:
        positive (recall per kind of copy), negative (share of unseen real subjects flagged, and whether that is
        nominal).
    """
    shards, names = Shards(files.images), chosen(DETECTORS, names, "privacy.detectors")
    detectors = load_detectors(files, reference, names)

    def of(split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        scans = table[table["split"] == split]
        return nearest_of_subject(
            score_scans(detectors, shards, scans["row"].to_numpy(), split), scans["subject_id"].to_numpy()
        )

    scores, subjects = of("calibration")
    card: dict[str, Any] = {"status": "NOT_CALIBRATED", "level": level, "detectors": names, "subjects": len(subjects)}
    card["needed"] = subjects_needed(level, len(names))
    thresholds = calibrate(scores, groups.reindex(subjects).to_numpy(), level) if len(subjects) else None
    if thresholds is None:
        return card
    card |= {"status": "CALIBRATED", "thresholds": thresholds.overall, "groups": thresholds.groups}

    test_scores, test_subjects = of("test")
    flags = any_flag(thresholds.flags(test_scores, groups.reindex(test_subjects).to_numpy()))
    negative = share(flags) | {
        "flagged": int(flags.sum()),
        "level": level,
        "nominal": flag_rate_is_nominal(flags, level),
    }
    positive = {}
    originals = step_generator(seed, "privacy/controls", 0).permutation(reference["rows"])[:CONTROL_SCANS]
    owner = groups.reindex(table.set_index("row").loc[originals, "subject_id"]).to_numpy()
    for kind, copies in _copies(files, torch.from_numpy(shards.tensors("image", originals)), seed).items():
        found = thresholds.flags(score(detectors, copies)[0], owner)
        positive[kind] = share(any_flag(found)) | {
            "by_detector": {name: float(np.mean(values)) for name, values in found.items()}
        }
    return card | {"controls": {"positive": positive, "negative": negative}}


@torch.no_grad()
def _copies(files: ReferenceFiles, images: Tensor, seed: str) -> dict[str, Tensor]:
    """Each image reconstructed by the autoencoder, and changed in the ways of `perturbed_copies`."""
    autoencoder, _ = load_first_stage(files.autoencoder)
    copies = {
        "reconstructed": torch.cat(
            [reconstruct(autoencoder, part) for part in images.split(batch_size(images.shape[1:]))]
        )
    }
    return copies | perturbed_copies(images, step_generator(seed, "privacy/copies", 0))
