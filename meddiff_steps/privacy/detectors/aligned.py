"""The detector `aligned`: structural similarity after the best small shift."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from meddiff_steps.imaging.perturbations import MAX_TRANSLATION, flip
from meddiff_steps.privacy.detectors.base import Context, Detector, TrainingImages, parts_of, reduced
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.privacy.size import batch_size

ENTRY = {
    "order": 1,
    "summary": "Grey values voxel by voxel: finds copies that were moved along axes, by 3 voxels or 4 % of a side.",
    "source": "SSIM: Wang et al. 2004; as a copy detector: DeepSSIM (arXiv 2509.16582), table 2",
    "misses": (
        "copies that were warped, moved farther, or rotated by 8 degrees and more (of the demo's, 0 of 20; at 6 degrees"
        " all), and those moved by halves of a voxel along all axes at once."
    ),
}

#: The aligned detector compares at this size first, and its best candidates as they are, or reduced to
#: `privacy.size.COMPARED_VOXELS`.
ALIGNED_SIDE = {2: 32, 3: 16}
#: Training scans whose best shift is looked for, and that are then compared in full.
SHORTLIST, CANDIDATES = 200, 20
#: Shifts along an axis that are tried, in voxels of what is compared, at least; more where 4 % of the side are more.
MAX_SHIFT = 3

#: Where the mean training image is darker than this, nobody has anatomy.
BACKGROUND = 0.05

#: Side of the SSIM window.
WINDOW = 7


def reach(shape: Sequence[int]) -> list[int]:
    """Voxels by which images of `shape` (*spatial) are shifted along each axis at most, either way.

    >>> reach((32, 40, 32)), reach((512, 480)), reach((160, 160, 4))
    ([3, 3, 3], [21, 20], [7, 7, 1])
    """
    return [min(max(MAX_SHIFT, math.ceil(MAX_TRANSLATION * n)), (n - 1) // 2) for n in shape]


def cell(shape: Sequence[int]) -> list[int]:
    """Sides of the blocks by whose means images of `shape` (*spatial) are searched.

    >>> cell((32, 40, 32)), cell((512, 480))
    ([3, 3, 3], [16, 16])
    """
    return [min(-(-max(shape) // ALIGNED_SIDE[len(shape)]), n) for n in shape]


def searched(shape: Sequence[int]) -> list[range]:
    """Shifts along each axis at which the nearest are searched: every two thirds of a cell, since block means change
    little between.

    >>> [list(along) for along in searched((32, 40, 32))]
    [[-2, 0, 2], [-2, 0, 2], [-2, 0, 2]]
    """
    steps = [max(1, 2 * side // 3) for side in cell(shape)]
    return [range(-(most // step) * step, most + 1, step) for most, step in zip(reach(shape), steps, strict=True)]


class Aligned:
    """Structural similarity to the training scan that fits best, over small shifts and the mirror image.

    A search by correlation of block means inside a mask, at some shifts (`searched`), finds the 200 nearest.  The best
    of all shifts within `reach` is chosen for each by the same correlation, and the highest SSIM inside the mask (Wang
    et al. 2004) of the 20 that fit best is the similarity.  On registered brains this finds copies better than any
    embedding (DeepSSIM, arXiv 2509.16582, table 2), as long as they were hardly rotated.  Only what lies inside the
    extent of the image counts, so that a copy whose borders were cut off, or left the grid, is compared by what is
    left.  Large images are compared by block means (`base.reduced`).

    Parameters
    ----------
    mean
        Mean training image, (1, *spatial); it gives the mask and is taken off before correlating.
    training
        The training scans, `reduced`, as they are numbered in `references`.
    references
        Their directions, (m, d).
    """

    name = "aligned"

    def __init__(
        self,
        mean: np.ndarray,
        training: TrainingImages,
        references: np.ndarray | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        mean_image = reduced(torch.from_numpy(mean)[None]).to(device)
        self.training, self.device = training, device
        shape = list(mean_image.shape[2:])
        self.mask = mean_image > BACKGROUND
        if not bool(self.mask.any()):
            self.mask = torch.ones_like(self.mask)
        # Nothing outside the bounding box of the mask counts, so nothing there is compared.
        ends = [(int(where.min()), int(where.max()) + 1) for where in self.mask.nonzero().T[2:]]
        self.box = (slice(None), slice(None), *(slice(max(0, a - WINDOW // 2), b + WINDOW // 2) for a, b in ends))
        #: Every shift, (s, dims), and at which the nearest are searched.
        self.reach, self.cell = reach(shape), cell(shape)
        self.shifts = torch.cartesian_prod(*[torch.arange(-most, most + 1) for most in self.reach]).view(-1, len(shape))
        among = [
            torch.isin(moves, torch.tensor(along)) for moves, along in zip(self.shifts.T, searched(shape), strict=True)
        ]
        self.searched = torch.stack(among).all(0).nonzero()[:, 0].numpy()
        self.margin = [most for most in reversed(self.reach) for _ in range(2)]
        # Means of cells that begin anywhere lie at these places, of every shift and every cell inside the mask, (s, d).
        means = window_mean(functional.pad(self.mask.float(), self.margin), self.cell)
        sides = torch.tensor(means.shape[2:])
        strides = torch.tensor([math.prod(sides[axis + 1 :].tolist()) for axis in range(len(shape))])
        cells = torch.cartesian_prod(*[torch.arange(n // side) for n, side in zip(shape, self.cell, strict=True)])
        first = cells.view(-1, len(shape)) * torch.tensor(self.cell) + torch.tensor(self.reach)
        filled = means.flatten()[(first * strides).sum(1).to(device)].cpu()
        first = first[filled > (0.5 if bool((filled > 0.5).any()) else 0.0)]  # thin structures fill no cell by half
        self.places = ((first[None] - self.shifts[:, None]) * strides).sum(2).to(device)
        self.unmoved = self.places[len(self.shifts) // 2][None]
        self.mean = self._means(mean_image, self.unmoved)
        #: A GPU holds them once, and is not given them again for every search.
        self.references: np.ndarray | Tensor = (
            np.zeros((0, 0), np.float32) if references is None else torch.from_numpy(references).to(device)
        )

    def _means(self, images: Tensor, places: Tensor) -> Tensor:
        """Means of the cells of images (b, 1, *spatial) at `places` (s, d), (b, s, d)."""
        return window_mean(functional.pad(images, self.margin), self.cell).flatten(1)[:, places]

    def _vectors(self, images: Tensor, places: Tensor) -> np.ndarray:
        """Directions of images (b, 1, *spatial) at shifts, (b * s, d); 0 in cells that are not wholly inside."""
        inside = self._means(extent(images), places) > 1.0 - 1e-4
        return unit_rows(((self._means(images, places) - self.mean) * inside).flatten(0, 1).cpu().numpy())

    def vectors(self, images: Tensor) -> np.ndarray:
        return self._vectors(reduced(images.to(self.device)), self.unmoved)

    @torch.no_grad()
    def similarity(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        images = reduced(images.to(self.device))
        score, index = np.full(len(images), -1.0), np.zeros(len(images), np.int64)
        size = batch_size(images.shape[1:])
        for i, image in enumerate(images):
            both = torch.stack([image, flip(image[None])[0]])
            vectors = self._vectors(both, self.places)
            at_some = vectors.reshape(2, len(self.shifts), -1)[:, self.searched].reshape(-1, vectors.shape[1])
            found = _best(*nearest(at_some, self.references, SHORTLIST), SHORTLIST)
            fit = vectors @ torch.as_tensor(self.references[found]).cpu().numpy().T
            order = np.argsort(-fit.max(0), kind="stable")[:CANDIDATES]
            found, best = found[order], fit[:, order].argmax(0)
            whole = functional.pad(torch.stack([both, extent(both)], 1), self.margin)
            values = np.concatenate(
                [
                    self._ssim(moved, torch.from_numpy(self.training[found[part]]).to(self.device), seen)
                    for part in parts_of(np.arange(len(found)), size)
                    for moved, seen in [self._moved(whole, best[part])]
                ]
            )
            score[i], index[i] = values.max(), found[values.argmax()]
        return score, index

    def _moved(self, whole: Tensor, variants: np.ndarray) -> tuple[Tensor, Tensor]:
        """Variants of an image and their extents, (n, 1, *spatial) each, of both with a margin of zeros, for the image
        and its mirror image, (2, 2, 1, *padded).
        """
        moved = []
        for number in variants.tolist():
            one = whole[number // len(self.shifts)]
            for axis, shift in enumerate(self.shifts[number % len(self.shifts)].tolist(), start=2):
                most = self.reach[axis - 2]
                one = one.narrow(axis, most - shift, one.shape[axis] - 2 * most)
            moved.append(one)
        found = torch.stack(moved)
        return found[:, 0], found[:, 1]

    def _ssim(self, a: Tensor, b: Tensor, seen: Tensor) -> np.ndarray:
        a, b, seen = a[self.box], b[self.box], seen[self.box]
        window = min(WINDOW, *a.shape[2:])
        values = ssim_map(a, b, window)
        trim = [slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(a.shape[2:], values.shape[2:], strict=True)]
        # A window that reaches over a cut compares anatomy with nothing.
        inside = self.mask[self.box][(slice(None), slice(None), *trim)] * (window_mean(seen, window) > 1.0 - 1e-4)
        return ((values * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1.0)).cpu().numpy()


def _best(similarity: np.ndarray, index: np.ndarray, most: int) -> np.ndarray:
    """The references that are most similar to any of the queries, of what `nearest` gave."""
    order = np.argsort(-similarity, axis=None, kind="stable")
    return np.array(list(dict.fromkeys(index.ravel()[order].tolist()))[:most])


def extent(images: Tensor) -> Tensor:
    """1 inside the bounding box of what is not zero in each image, 0 outside; float32 (n, 1, *spatial)."""
    inside = torch.ones_like(images)
    for axis in range(2, images.ndim):
        filled = (images != 0).float().amax([other for other in range(2, images.ndim) if other != axis], keepdim=True)
        inside = inside * filled.cummax(axis).values * filled.flip(axis).cummax(axis).values.flip(axis)
    return inside


def window_mean(x: Tensor, window: int | Sequence[int]) -> Tensor:
    """Means over every window that fits, (n, 1, *spatial - window + 1); one side, or one along each axis.

    Sums of shifted slices, one axis at a time: ten times as fast as torch's average pooling on a CPU.
    """
    sides = [window] * (x.ndim - 2) if isinstance(window, int) else window
    for axis, side in enumerate(sides, start=2):
        fits = x.shape[axis] - side + 1
        total = x.narrow(axis, 0, fits).clone()
        for start in range(1, side):
            total += x.narrow(axis, start, fits)
        x = total / side
    return x


def ssim_map(a: Tensor, b: Tensor, window: int) -> Tensor:
    """SSIM at every place where a uniform window fits, (n, 1, *spatial - window + 1), for images in [0, 1].

    Wang et al. 2004, equation 13.  monai.metrics.regression.compute_ssim_and_cs gives the same numbers by a dense
    convolution, which took 0.4 s per image at 32 x 40 x 32 here; this filters one axis at a time.
    """
    mean_a, mean_b = window_mean(a, window), window_mean(b, window)
    variance_a, variance_b = window_mean(a * a, window) - mean_a**2, window_mean(b * b, window) - mean_b**2
    covariance = window_mean(a * b, window) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    return (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))
    )


def build(context: Context) -> Detector:
    """`Aligned` with the mean training image."""
    return Aligned(context.mean, context.training, context.directions.get("aligned"), context.device)
