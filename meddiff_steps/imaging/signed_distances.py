"""Label maps as networks take them: signed distances to the surfaces of their structures, and back.

A network that draws distances draws smooth numbers, and a small error moves a surface by a part of a voxel, where one
that draws a number per label is right or wrong at every voxel (level sets: Osher and Fedkiw 2003).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from meddiff_steps.core.errors import UserError

#: What shards say of an image that holds signed distances: mirrored and shifted like a scan, but its numbers are no
#: grey levels.
DISTANCES = "distances"
#: What shards, detectors of copies and conditions of the model of images (`Condition.maps`) call a label map.
LABELS = "labels"
#: Distance in voxels from which on all are the same: the width of a cell of latents at a quarter of the resolution.
LIMIT = 4.0


def renumbered(
    labels: np.ndarray, structures: Mapping[str, Sequence[int]], outside: Sequence[int], scan: str
) -> np.ndarray:
    """A label map with the structures numbered from 1 in their order, uint8, 0 outside of them.

    Parameters
    ----------
    labels
        Whole numbers from 0.
    structures
        Labels by structure.
    outside
        Labels that become 0.
    scan
        Whose it is, for the message.

    Raises
    ------
    UserError
        It has a label that is in neither.
    """
    found = np.unique(labels)
    known = {0, *outside, *(label for of_one in structures.values() for label in of_one)}
    strange = [int(label) for label in found if int(label) not in known]
    if strange:
        raise UserError(
            f"{scan}: label {strange[0]} in {np.count_nonzero(labels == strange[0])} voxels, which no structure of"
            f" pairs.structures has (labels there: {sorted(known - {0})}). Name it in a structure, or in pairs.outside,"
            " where it counts as 0."
        )
    made = np.zeros(labels.shape, np.uint8)
    for number, of_one in enumerate(structures.values(), start=1):
        made[np.isin(labels, list(of_one))] = number
    return made


def channels(structures: int) -> int:
    """How many distances stand for a voxel of a label map: of every structure and, of several, of all together, which
    keeps two that touch from coming apart.
    """
    return structures + 1 if structures > 1 else 1


def structures_of(channel_count: int) -> int:
    """The inverse of `channels`."""
    return channel_count - 1 if channel_count > 1 else 1


def to_distances(labels: np.ndarray, structures: int) -> np.ndarray:
    """Signed distances of a label map, float32 (channels(structures), *spatial) in [0, 1]: 0.5 at a surface, 1 from
    `LIMIT` voxels inside on, 0 from as far outside on.

    Parameters
    ----------
    labels
        (*spatial), 0 to `structures`.
    structures
        How many there are.
    """
    parts = [labels == number for number in range(1, structures + 1)]
    if structures > 1:
        parts.insert(0, labels > 0)
    return np.stack([_signed(part) for part in parts])


def _signed(inside: np.ndarray) -> np.ndarray:
    """A surface lies half a voxel from the centres of the voxels on both its sides."""
    if not inside.any():
        return np.zeros(inside.shape, np.float32)
    if inside.all():
        return np.ones(inside.shape, np.float32)
    distance = np.where(
        inside, ndimage.distance_transform_edt(inside) - 0.5, 0.5 - ndimage.distance_transform_edt(~inside)
    )
    return (0.5 + np.clip(distance, -LIMIT, LIMIT) / (2 * LIMIT)).astype(np.float32)


def from_distances(distances: np.ndarray) -> np.ndarray:
    """The label map of signed distances as of `to_distances`, uint8 (*spatial); exact for those that it made."""
    if len(distances) == 1:
        return (distances[0] > 0.5).astype(np.uint8)
    nearest = distances[1:].argmax(0).astype(np.uint8) + 1
    return np.where(distances[0] > 0.5, nearest, 0).astype(np.uint8)
