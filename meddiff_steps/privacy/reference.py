"""The training set as the detectors see it, and their calibration and controls.  Private: never part of a release."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from meddiff_steps.compute.compilation import cast_weights
from meddiff_steps.compute.device import to_channels_last
from meddiff_steps.core.choice import chosen
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import step_generator
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.perturbations import perturbed_copies
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.instruments.embedder import load_embedder
from meddiff_steps.models.first_stage.base import FirstStage, reconstruct
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.trained import load_first_stage
from meddiff_steps.privacy.attacks import flagged_as_expected, share
from meddiff_steps.privacy.calibration import calibrate
from meddiff_steps.privacy.detectors.base import (
    Context,
    Detector,
    TrainingImages,
    batches,
    directions,
    reduced,
    score,
)
from meddiff_steps.privacy.label_maps import LabelMapDetector, RealLabelMaps
from meddiff_steps.privacy.label_maps import copies as copies_of_labels
from meddiff_steps.privacy.size import batch_size, subjects_needed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Training scans that are copied for the positive controls, each in six ways.
CONTROL_SCANS = 20


@dataclass(frozen=True)
class ReferenceFiles:
    """The files that the detectors are built from.

    Attributes
    ----------
    scans
        The training scans, `reduced`, as `write_scans` wrote them.
    autoencoder, scale, embedder
        The networks, and how latents are standardised.
    """

    scans: Path
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


def write_scans(shards: Shards, rows: np.ndarray, path: Path) -> np.ndarray:
    """Write the training scans as detectors compare them (`base.reduced`), in the order of `rows`, and return their
    mean at full size, float32 (1, *spatial).
    """
    total = np.zeros(shards.shape("image"))
    shape = (1, *reduced(torch.zeros(1, *shards.shape("image"))).shape[2:])
    with ShardWriter(path, {"image": TensorColumn("float16", shape)}) as writer:
        for _, images in batches(shards, rows):
            total += images.sum(0, dtype=torch.float64).numpy()
            for scan in reduced(images).numpy():
                writer.append(image=scan)
    return (total / len(rows)).astype(np.float32)


def build_reference(
    files: ReferenceFiles,
    shards: Shards,
    training_rows: np.ndarray,
    names: Sequence[str] | None = None,
    latents: Callable[[], Iterable[np.ndarray]] | None = None,
    fabric: Fabric | None = None,
) -> dict[str, np.ndarray]:
    """Mean training image, rows of the training scans, and their directions under each detector of `names` (None: all).

    Writes `files.scans`, too.

    Parameters
    ----------
    shards
        Preprocessed scans.
    latents
        Gives the most probable latents of the scans of `training_rows`, in order, where they were kept.
    fabric
        Device and precision; None: the processor, float32.

    Raises
    ------
    UserError
        As `make_detectors`.
    """
    mean = write_scans(shards, training_rows, files.scans)
    context = replace(_context(files, {"mean": mean}, fabric), latents=latents)
    chosen_names = chosen(DETECTORS, names, "privacy.detectors")
    found: dict[str, np.ndarray] = {}
    for name in chosen_names:
        known = getattr(DETECTORS.load(name), "known", lambda context: None)(context)
        if known is not None:
            found[name] = known
    others = [name for name in chosen_names if name not in found]
    found |= directions(make_detectors(context, others) if others else [], shards, training_rows)
    return {"mean": mean, "rows": training_rows.astype(np.int64)} | {name: found[name] for name in chosen_names}


def load_detectors(
    files: ReferenceFiles,
    reference: Mapping[str, np.ndarray],
    names: Sequence[str],
    mirrors: bool = True,
    fabric: Fabric | None = None,
) -> list[Detector]:
    """Detectors with the reference that `build_reference` made of them.

    Parameters
    ----------
    names, mirrors
        As the calibration card says: what is not calibrated has no threshold.
    fabric
        Device and precision; None: the processor, float32.

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
    return make_detectors(replace(_context(files, reference, fabric), mirrors=mirrors), names)


def load_attackers(
    files: ReferenceFiles,
    reference: Mapping[str, np.ndarray],
    names: Sequence[str],
    shards: Shards,
    unseen: np.ndarray,
    mirrors: bool = True,
    fabric: Fabric | None = None,
) -> tuple[list[Detector], dict[str, np.ndarray]]:
    """Detectors whose `vectors` attacks compare, and under each the directions of the training scans, (m, d).

    `aligned` takes off the mean of training and unseen scans together here.  The mean of training scans alone holds
    each of these and nobody else, so that these lie farther from images than strangers do, although nothing leaked.

    Parameters
    ----------
    shards, unseen
        Preprocessed scans, and the rows of those of the calibration and test splits.
    """
    if "aligned" not in names:
        return load_detectors(files, reference, names, mirrors, fabric), {name: reference[name] for name in names}
    total = reference["mean"].astype(np.float64) * len(reference["rows"])
    for _, images in batches(shards, unseen):
        total += images.sum(0, dtype=torch.float64).numpy()
    mean = (total / (len(reference["rows"]) + len(unseen))).astype(np.float32)
    detectors = load_detectors(files, {**reference, "mean": mean}, names, mirrors, fabric)
    scans = Shards([files.scans])
    found = directions([one for one in detectors if one.name == "aligned"], scans, np.arange(len(scans)))
    return detectors, {name: found.get(name, reference[name]) for name in names}


def encodes_mirrors(flip: bool, names: Sequence[str]) -> bool:
    """Whether mirror images are encoded by the autoencoder, at the cost of the images themselves.

    Where training scans were mirrored (`flip`), or where no detector is chosen that sees mirrored copies at hardly any
    cost.
    """
    return flip or not {"aligned", "learned"} & set(names)


def _context(files: ReferenceFiles, reference: Mapping[str, np.ndarray], fabric: Fabric | None) -> Context:
    device = torch.device("cpu") if fabric is None else fabric.device

    def standardisation() -> Standardisation[Tensor]:
        tensors = load_file(files.scale)
        return Standardisation(tensors["offset"].to(device), tensors["scale"].to(device))

    scans = Shards([files.scans])
    return Context(
        reference["mean"],
        TrainingImages(scans, np.arange(len(scans))),
        embedder=lambda: load_embedder(files.embedder).to(device),
        first_stage=lambda: placed_first_stage(files.autoencoder, fabric),
        standardisation=standardisation,
        directions={name: vectors for name, vectors in reference.items() if name not in ("mean", "rows")},
        device=device,
        autocast=nullcontext if fabric is None else fabric.autocast,
    )


def placed_first_stage(folder: Path, fabric: Fabric | None) -> FirstStage:
    """The autoencoder where and as the step `latents` has it, but never compiled: few images a job would not pay for
    that.
    """
    first_stage, card = load_first_stage(folder)
    if fabric is not None:
        to_channels_last(first_stage, len(card["image_shape"]) - 1)
        fabric.to_device(first_stage)
        cast_weights(first_stage.costly.values(), fabric)
    return first_stage


def score_scans(
    detectors: list[Detector], shards: Shards, rows: Sequence[int] | np.ndarray, label: str
) -> dict[str, np.ndarray]:
    """Per detector: similarity of each scan to its nearest training scan, (len(rows),)."""
    parts: list[dict[str, np.ndarray]] = []
    with tqdm(total=len(rows), desc=label, unit="scan", mininterval=5, file=sys.stderr) as progress:
        for _, images in batches(shards, np.asarray(rows)):
            parts.append(score(detectors, images)[0])
            progress.update(len(images))
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


def one_scan_of_each(subjects: np.ndarray) -> np.ndarray:
    """Row of one scan of each subject, subjects in order; which one says the SHA-256 of the subject's id."""
    names, number = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    rows = np.split(np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1]) if len(names) else []
    chosen_rows = [
        mine[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(mine)]
        for name, mine in zip(names, rows, strict=True)
    ]
    return np.array(chosen_rows, dtype=np.int64)


def any_flag(flags: Mapping[str, np.ndarray]) -> np.ndarray:
    """Whether at least one detector fires, bool (n,)."""
    return np.logical_or.reduce(list(flags.values()))


def calibration_card(
    files: ReferenceFiles,
    shards: Shards,
    reference: Mapping[str, np.ndarray],
    table: pd.DataFrame,
    groups: pd.Series,
    level: float,
    seed: str,
    names: Sequence[str] | None = None,
    flip: bool = False,
    fabric: Fabric | None = None,
    maps: RealLabelMaps | None = None,
    spacing: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Thresholds from the calibration split, and both controls.

    Parameters
    ----------
    shards
        Preprocessed scans.
    table
        One row per preprocessed scan: row (in the shards), subject_id, split.
    groups
        Subgroup per subject id.
    level, seed
        Of the study.
    names
        Detectors that share the level, as for `build_reference`; None: all.
    flip
        Whether training scans were mirrored.
    fabric
        Device and precision; None: the processor, float32.
    maps
        The scans' label maps, where images are generated with such: one more to share the level.  Its threshold is
        that of `labels`, and `structures` says how many there are.
    spacing
        Voxel size in mm along each axis; None of pictures.

    Returns
    -------
    dict
        status (`CALIBRATED` or `NOT_CALIBRATED`), level, detectors, mirrors (whether the autoencoder also encodes
        mirror images, and those of label maps are compared), subjects, needed, thresholds, groups, and under
        `controls`: positive (recall per kind of copy), negative (share of unseen real subjects flagged, whether
        that is nominal, and how many are by one scan of theirs, which is what one image is compared with).
    """
    names = chosen(DETECTORS, names, "privacy.detectors")
    mirrors = encodes_mirrors(flip, names)
    detectors = load_detectors(files, reference, names, mirrors, fabric)

    of_labels = None if maps is None else LabelMapDetector(reference[LABELS], maps.structures, mirrors)

    def of(split: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
        scans = table[table["split"] == split]
        rows = scans["row"].to_numpy()
        found = score_scans(detectors, shards, rows, split)
        if maps is not None and of_labels is not None:
            found |= {LABELS: maps.similarity(of_labels, rows)}
        return found, scans["subject_id"].to_numpy()

    scores, subjects = nearest_of_subject(*of("calibration"))
    card: dict[str, Any] = {"status": "NOT_CALIBRATED", "level": level, "detectors": names, "mirrors": mirrors}
    card |= {"subjects": len(subjects), "needed": subjects_needed(level, len(scores))}
    card |= {} if maps is None else {"structures": maps.structures}
    thresholds = calibrate(scores, groups.reindex(subjects).to_numpy(), level) if len(subjects) else None
    if thresholds is None:
        return card
    card |= {"status": "CALIBRATED", "thresholds": thresholds.overall, "groups": thresholds.groups}

    scan_scores, owners = of("test")
    test_scores, test_subjects = nearest_of_subject(scan_scores, owners)
    group = groups.reindex(test_subjects).to_numpy()
    flags = any_flag(thresholds.flags(test_scores, group))
    ones = one_scan_of_each(owners)
    by_one = any_flag(thresholds.flags({name: values[ones] for name, values in scan_scores.items()}, group))
    negative = share(flags) | {
        "flagged": int(flags.sum()),
        "flagged_by_one_scan": int(by_one.sum()),
        "level": level,
        "nominal": flagged_as_expected(int(flags.sum()), len(flags), level, len(subjects)),
    }
    positive = {}
    originals = step_generator(seed, "privacy/controls", 0).permutation(reference["rows"])[:CONTROL_SCANS]
    owner = groups.reindex(table.set_index("row").loc[originals, "subject_id"]).to_numpy()
    images = torch.from_numpy(shards.tensors("image", originals))
    for kind, copies in _copies(files.autoencoder, fabric, images, seed, spacing).items():
        positive[kind] = _recall(thresholds.only(names).flags(score(detectors, copies)[0], owner))
    if maps is not None and of_labels is not None:
        for kind, labels in copies_of_labels(maps[originals], maps.structures, mirrors).items():
            positive[kind] = _recall(thresholds.only([LABELS]).flags({LABELS: of_labels.similarity(labels)[0]}, owner))
    return card | {"controls": {"positive": positive, "negative": negative}}


def _recall(flags: Mapping[str, np.ndarray]) -> dict[str, Any]:
    by_detector = {name: float(np.mean(values)) for name, values in flags.items()}
    return share(any_flag(flags)) | {"by_detector": by_detector}


@torch.no_grad()
def _copies(
    autoencoder: Path, fabric: Fabric | None, images: Tensor, seed: str, spacing: Sequence[float] | None
) -> dict[str, Tensor]:
    """Each image reconstructed by the autoencoder, and changed in the ways of `perturbed_copies`."""
    first_stage = placed_first_stage(autoencoder, fabric)
    made = []
    with nullcontext() if fabric is None else fabric.autocast():
        for part in images.split(batch_size(images.shape[1:])):
            made.append(reconstruct(first_stage, part if fabric is None else fabric.to_device(part)).cpu())
    copies = {"reconstructed": torch.cat(made)}
    return copies | perturbed_copies(images, step_generator(seed, "privacy/copies", 0), spacing)
