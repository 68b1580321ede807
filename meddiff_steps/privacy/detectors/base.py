"""Ways to ask how near an image comes to its nearest training scan.

Each detector turns images into directions, searched exactly by cosine, and gives one similarity per image.  They fail
in different ways: the aligned one misses what was rotated, the learned one may not have learnt what matters, the latent
one sees only what the autoencoder kept.

A detector (`privacy.detectors`) is a module of this package: `ENTRY` says what it is and `build(context)` makes it;
`privacy.reference` builds those that are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.first_stage.base import FirstStage
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.privacy.size import batch_size


class Detector(Protocol):
    """`vectors` are compared by cosine; `similarity` is what thresholds apply to."""

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
        for rows in parts_of(self.rows, batch_size(self.shards.shape("image"))):
            yield torch.from_numpy(self.shards.tensors("image", rows))


@dataclass(frozen=True)
class Context:
    """What a detector may need to be built; what is a function is called by a detector that needs it, so that one that
    is not chosen loads nothing.

    Attributes
    ----------
    mean
        Mean training image, float32 (1, *spatial).
    training
        The training scans.
    embedder
        Gives the learned embedding, (b, 1, *spatial) to (b, d).
    first_stage
        Gives the autoencoder.
    standardisation
        Gives how its latents are standardised.
    directions
        Of the training scans by the name of the detector, as `references` gave them before, (m, d); a detector without
        finds nothing.
    """

    mean: np.ndarray
    training: TrainingImages
    embedder: Callable[[], nn.Module]
    first_stage: Callable[[], FirstStage]
    standardisation: Callable[[], Standardisation[Tensor]]
    directions: Mapping[str, np.ndarray]


def parts_of(numbers: np.ndarray, size: int) -> list[np.ndarray]:
    """`numbers` (n,) in parts of `size`, the last one smaller."""
    return np.split(numbers, range(size, len(numbers), size))


def references(detector: Detector, training: TrainingImages) -> np.ndarray:
    """Directions of all training scans, (m, d)."""
    directions, filled = np.zeros((0, 0), np.float32), 0
    for images in training.batches():
        vectors = detector.vectors(images)
        if not filled:
            directions = np.empty(
                (len(training), vectors.shape[1]), np.float32
            )  # filled in place: a list of parts would need twice the memory
        directions[filled : filled + len(vectors)] = vectors
        filled += len(vectors)
    return directions


def score(detectors: Sequence[Detector], images: Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Per detector: similarity to the nearest training scan, and its number, (b,) each."""
    found = {detector.name: detector.similarity(images) for detector in detectors}
    return {name: values for name, (values, _) in found.items()}, {name: index for name, (_, index) in found.items()}
