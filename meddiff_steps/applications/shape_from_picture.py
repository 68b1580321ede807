"""The shape of a body from a picture of it: `segmentation` where pictures are repeated along depth, so that a diffusion
draws volumes from them (`preprocess.depth`; DISPR, Waibel et al. 2023).

Here is what needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage

from meddiff_steps.applications.segmentation import Marked
from meddiff_steps.evaluation.segmentation import distances
from meddiff_steps.imaging.channels import channels_of
from meddiff_steps.imaging.pairs import Pairs

ENTRY = {
    "order": 11,
    "summary": "The 3D shape of a body from a picture of it, by several draws; a setting of `segmentation`",
    "source": "Waibel et al. 2023 (DISPR)",
    "needs": ["pictures, and volumes of those to learn from"],
}

#: Factors of the thickness of inflated outlines that are tried on training bodies.
FACTORS = np.arange(0.2, 2.01, 0.05)
#: Training bodies that are looked at, at most.
MOST_BODIES = 400


@dataclass(frozen=True)
class Shapes:
    """What an outline alone says of a body, depth the first axis.

    Attributes
    ----------
    outline
        Which of the sources it is.
    middle
        Depth of the middle of training bodies, in voxels.
    factor
        How thick inflated outlines are, as a share of a ball over the largest disc in them.
    half
        Half of the thickness of an outline that is thick alike everywhere, in voxels.
    outlines, volumes
        Of training bodies, bool (n, rows, columns) and (n, depth, rows, columns).
    """

    outline: int
    middle: float
    factor: float
    half: float
    outlines: np.ndarray
    volumes: np.ndarray

    @classmethod
    def of(cls, pairs: Pairs, rows: Sequence[int] | np.ndarray) -> Self | None:
        """Of training bodies, evenly spaced where there are more than `MOST_BODIES`: thicknesses are those of the
        largest mean IoU.  None without an outline, which is the first source of kind `mask`.
        """
        kinds = channels_of(pairs.shards)
        masks = [i for i, name in enumerate(pairs.source) if kinds.get(name) == "mask"]
        if not masks:
            return None
        if len(rows) > MOST_BODIES:
            rows = np.asarray(rows)[np.linspace(0, len(rows) - 1, MOST_BODIES).round().astype(int)]
        return cls.fitted(masks[0], flat(pairs.sources(rows)[:, masks[0]]), pairs.truths(rows)[:, 0] > 0)

    @classmethod
    def fitted(cls, outline: int, outlines: np.ndarray, volumes: np.ndarray) -> Self:
        """Of outlines and volumes as the attributes have them."""
        depth = volumes.shape[1]
        filled = volumes.sum((0, 2, 3))
        middle = float((filled * np.arange(depth)).sum() / max(filled.sum(), 1))
        heights = np.stack([height(one) for one in outlines])

        def best(tried: np.ndarray, of: np.ndarray) -> float:
            scores = [iou(thick(value * of, middle, depth), volumes).mean() for value in tried]
            return float(tried[int(np.argmax(scores))])

        factor = best(FACTORS, heights)
        half = best(np.arange(0.5, depth / 2 + 0.1, 0.5), outlines.astype(float))
        return cls(outline, middle, factor, half, outlines, volumes)

    def __call__(self, sources: np.ndarray) -> dict[str, Marked]:
        """Of sources (s, depth, rows, columns), by way.

        `inflated`: round over its outline.  `extruded`: thick alike everywhere.  `nearest`: the volume of the training
        body of the most similar outline (IoU).
        """
        seen, depth = flat(sources[None, self.outline])[0], sources.shape[1]
        nearest = self.volumes[int(distances(seen[None], self.outlines)[0].argmin())]
        found = {
            "inflated": thick(self.factor * height(seen), self.middle, depth),
            "extruded": thick(self.half * seen.astype(float), self.middle, depth),
            "nearest": nearest,
        }
        return {name: Marked.of_mask(mask.astype(np.int16)) for name, mask in found.items()}


def flat(outlines: np.ndarray) -> np.ndarray:
    """Outlines (n, depth, rows, columns) that were repeated along depth, bool (n, rows, columns)."""
    return np.asarray(outlines[:, outlines.shape[1] // 2] > 0.5)


def height(outline: np.ndarray) -> np.ndarray:
    """Half of the thickness over each pixel of an outline (rows, columns), in pixels: that of a ball as large as the
    largest disc in it, at the same distance from the edge; so a disc becomes a ball.
    """
    inwards = np.maximum(ndimage.distance_transform_edt(np.pad(outline, 1))[1:-1, 1:-1] - 0.5, 0.0)
    found: np.ndarray = np.sqrt(inwards * (2 * inwards.max() - inwards))
    return found


def thick(half: np.ndarray, middle: float, depth: int) -> np.ndarray:
    """Bodies that reach `half` (..., rows, columns) voxels up and down from a middle, bool (..., depth, rows,
    columns).
    """
    away = np.abs(np.arange(depth) - middle)[:, None, None]
    found: np.ndarray = away < half[..., None, :, :]
    return found


def iou(bodies: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of bodies (n, *spatial) and as many others, (n,)."""
    axes = tuple(range(1, bodies.ndim))
    found: np.ndarray = (bodies & others).sum(axes) / np.maximum((bodies | others).sum(axes), 1)
    return found
