"""Is a label map a copy?  A shape can give a person away as an image can, and a generator of masks can memorise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.perturbations import flip, moved
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.imaging.signed_distances import from_distances, structures_of, to_distances
from meddiff_steps.privacy.detectors.base import reduced
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.privacy.size import batch_size

#: By how many voxels along each axis a copy of the positive control is shifted.
SHIFT = 2
#: Standard deviation, in voxels, of the Gaussian that smooths the signed distances of another.
SMOOTHING = 0.6


class LabelMapDetector:
    """Overlap of a label map with the nearest one of the training scans, wherever in the image both lie.

    Maps are moved so that the middle of what is labelled lies in the middle of the grid, by whole voxels.  Their
    similarity is Pearson's r of their structures as 0 and 1, by the search that serves images, too.  Where little of a
    grid is labelled it is |A and B| / sqrt(|A| |B|): Dice's coefficient with the geometric mean of both volumes for the
    arithmetic one (Ochiai 1957).

    Parameters
    ----------
    references
        `vectors` of the training scans, (m, d).
    structures
        How many there are.
    mirrors
        Whether mirror images are compared, too: where training scans were mirrored, a copy may be.
    """

    def __init__(self, references: np.ndarray, structures: int, mirrors: bool) -> None:
        self.references, self.structures, self.mirrors = references, structures, mirrors

    def similarity(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of label maps (b, *spatial): similarity to the nearest training label map, and its number, (b,) each."""
        found = [self._nearest(part) for part in _parts(labels)]
        return np.concatenate([values for values, _ in found]), np.concatenate([index for _, index in found])

    def _nearest(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ways = [labels, mirrored(labels)] if self.mirrors else [labels]
        found = [nearest(vectors(way, self.structures), self.references) for way in ways]
        similarity, index = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
        best = similarity.argmax(1)[:, None]
        return np.take_along_axis(similarity, best, 1)[:, 0], np.take_along_axis(index, best, 1)[:, 0]


def vectors(labels: np.ndarray, structures: int) -> np.ndarray:
    """Directions of label maps (b, *spatial) of so many structures, float32 (b, d), norm 1, or 0 of an empty map."""
    found = []
    for part in _parts(labels):
        moved = np.stack([centred(one) for one in part])
        each = [(moved == number)[:, None] for number in range(1, structures + 1)]
        small = [reduced(torch.from_numpy(one.astype(np.float32))).flatten(1).numpy() for one in each]
        found.append(unit_rows(np.concatenate(small, 1)))
    return np.concatenate(found)


def centred(labels: np.ndarray) -> np.ndarray:
    """A label map, moved by whole voxels so that the centre of mass of all structures lies in the middle; what leaves
    the grid on one side is cut off.
    """
    if not labels.any():
        return labels
    middle = np.array(ndimage.center_of_mass(labels > 0))
    shift = np.rint((np.array(labels.shape) - 1) / 2 - middle).astype(int)
    return moved(labels, shift)


def mirrored(labels: np.ndarray) -> np.ndarray:
    """Label maps (b, *spatial), mirrored left-right as training scans are; structures keep their numbers."""
    return flip(torch.from_numpy(labels)[:, None])[:, 0].numpy()


def copies(labels: np.ndarray, structures: int, mirrors: bool) -> dict[str, np.ndarray]:
    """Label maps (b, *spatial) as they are, shifted, with surfaces as smooth as a network's, and mirrored where the
    detector `mirrors`: what must be found.
    """
    shift = np.full(labels.ndim - 1, SHIFT)
    blur = [0.0, *(SMOOTHING,) * (labels.ndim - 1)]
    smooth = [from_distances(ndimage.gaussian_filter(to_distances(one, structures), blur)) for one in labels]
    return {
        "label map": labels,
        "label map, shifted": np.stack([moved(one, shift) for one in labels]),
        "label map, smoothed": np.stack(smooth),
        **({"label map, mirrored": mirrored(labels)} if mirrors else {}),
    }


@dataclass(frozen=True)
class RealLabelMaps:
    """Label maps of the scans.

    Attributes
    ----------
    shards
        Column `labels`, uint8 (*spatial).
    rows
        Row in `shards` of each scan.
    structures
        How many there are.
    """

    shards: Shards
    rows: np.ndarray
    structures: int

    @classmethod
    def of(cls, shards: Shards, scans: Sequence[str]) -> RealLabelMaps:
        """Of `scans`, in their order, from shards that the step `masks` wrote.

        Raises
        ------
        UserError
            A scan is not among them.
        """
        place = {scan: row for row, scan in enumerate(shards.column("scan_id"))}
        if absent := [scan for scan in scans if scan not in place]:
            raise UserError(
                f"{shards.origin}: no label map of {absent[0]}, and of {len(absent)} scans in all. Give all shards that"
                " the step `masks` wrote of these scans."
            )
        return cls(shards, np.array([place[scan] for scan in scans]), structures_of(shards.shape("image")[0]))

    def __getitem__(self, scans: np.ndarray) -> np.ndarray:
        return self.shards.tensors("labels", self.rows[scans], None)

    def similarity(self, detector: LabelMapDetector, scans: np.ndarray) -> np.ndarray:
        """Of each scan's label map to the nearest training one, (len(scans),)."""
        if not len(scans):
            return np.zeros(0)
        return detector.similarity(self[scans])[0]


def _parts(labels: np.ndarray) -> list[np.ndarray]:
    size = batch_size((1, *labels.shape[1:]))
    return [labels[start : start + size] for start in range(0, len(labels), size)]
