"""Ways to ask how near an image comes to its nearest training scan.

Each detector turns images into directions, searched exactly by cosine, and gives one similarity per image.  They fail
in different ways: the aligned one misses what was warped, the learned one may not have learnt what matters, the latent
one sees only what the autoencoder kept.

A detector (`privacy.detectors`) is a module of this package: `ENTRY` says what it is and `build(context)` makes it;
`privacy.reference` builds those that are chosen.  A module whose directions of the training scans are known without
looking at these gives them as `known(context)`, (m, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps.imaging.perturbations import flip
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.first_stage.base import FirstStage
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.privacy.size import batch_size, reduction


class Detector(Protocol):
    """`vectors` are compared by cosine; `similarity` is what thresholds apply to.  Images may lie on any device."""

    name: str

    def vectors(self, images: Tensor) -> np.ndarray:
        """Directions of images (b, 1, *spatial) in [0, 1], float32 (b, d), norm 1 or 0."""

    def similarity(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Similarity to the nearest training scan and its number in the training set, (b,) each."""


@dataclass(frozen=True)
class TrainingImages:
    """The training scans by their number, read from their shards when they are needed."""

    shards: Shards
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        return self.shards.tensors("image", self.rows[index])

    def batches(self) -> Iterator[Tensor]:
        for _, images in batches(self.shards, self.rows):
            yield images


@dataclass(frozen=True)
class Context:
    """What a detector may need to be built; what is a function is called by a detector that needs it, so that one that
    is not chosen loads nothing.

    Attributes
    ----------
    mean
        Mean training image, float32 (1, *spatial).
    training
        The training scans, `reduced`.
    embedder
        Gives the learned embedding, (b, 1, *spatial) to (b, d), on the device.
    first_stage
        Gives the autoencoder, on the device.
    standardisation
        Gives how its latents are standardised.
    directions
        Of the training scans by the name of the detector, as `references` gave them before, (m, d); a detector without
        finds nothing.
    device
        Where networks and searches run.
    autocast
        Makes what the autoencoder computes in the study's precision in.
    mirrors
        Whether detectors to which the mirror image of an image costs as much as the image itself look at it, too.
    latents
        Gives the autoencoder's most probable latents of every training scan in order, (c, *spatial) each, where they
        were kept.
    """

    mean: np.ndarray
    training: TrainingImages
    embedder: Callable[[], nn.Module]
    first_stage: Callable[[], FirstStage]
    standardisation: Callable[[], Standardisation[Tensor]]
    directions: Mapping[str, np.ndarray]
    device: torch.device | str = "cpu"
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext
    mirrors: bool = True
    latents: Callable[[], Iterable[np.ndarray]] | None = None


def parts_of(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """`numbers` (n,) in parts of `size`, the last one smaller."""
    return np.split(numbers, range(size, len(numbers), size))


def batches(shards: Shards, rows: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
    """The images of `rows`, (b, 1, *spatial) each, as many at once as detectors take, and which of `rows` they are."""
    size = batch_size(shards.shape("image"))
    for start in range(0, len(rows), size):
        part = slice(start, min(start + size, len(rows)))
        yield part, torch.from_numpy(shards.tensors("image", rows[part]))


def reduced(images: Tensor) -> Tensor:
    """Images (b, 1, *spatial) as they are compared voxel by voxel: block means (`privacy.size.reduction`), or
    themselves.
    """
    sides = reduction(images.shape[2:])
    if max(sides) == 1:
        return images
    return (functional.avg_pool3d if images.ndim == 5 else functional.avg_pool2d)(images, sides)


def directions(
    detectors: Sequence[Detector], shards: Shards, rows: np.ndarray, mirrored: bool = False
) -> dict[str, np.ndarray]:
    """Per detector: directions of the images of `rows`, or of their mirror images, (len(rows), d); each image is read
    once.
    """
    found = {detector.name: np.zeros((0, 0), np.float32) for detector in detectors}
    for part, images in batches(shards, rows):
        images = flip(images) if mirrored else images
        for detector in detectors:
            vectors = detector.vectors(images)
            if part.start == 0:  # filled in place: a list of parts would need twice the memory
                found[detector.name] = np.empty((len(rows), vectors.shape[1]), np.float32)
            found[detector.name][part] = vectors
    return found


def references(detector: Detector, training: TrainingImages) -> np.ndarray:
    """Directions of all training scans, (m, d)."""
    return directions([detector], training.shards, training.rows)[detector.name]


def score(detectors: Sequence[Detector], images: Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per detector: similarity to the nearest training scan, and its number, (b,) each."""
    found = {detector.name: detector.similarity(images) for detector in detectors}
    return {name: values for name, (values, _) in found.items()}, {name: index for name, (_, index) in found.items()}
