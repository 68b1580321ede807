"""The detector `aligned`: structural similarity after the best small shift."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from meddiff_steps.imaging.perturbations import flip
from meddiff_steps.privacy.detectors.base import Context, Detector, TrainingImages, parts_of, reduced
from meddiff_steps.privacy.search import nearest, unit_rows
from meddiff_steps.privacy.size import batch_size

ENTRY = {
    "order": 1,
    "summary": "Grey values voxel by voxel: finds copies that were not moved.",
    "source": "SSIM: Wang et al. 2004; as a copy detector: DeepSSIM (arXiv 2509.16582), table 2",
    "misses": "copies that were rotated, warped, or moved by more than a voxel.",
}

#: The aligned detector compares at this size first, and its best candidates as they are, or reduced to
#: `privacy.size.COMPARED_VOXELS`.
ALIGNED_SIDE = {2: 32, 3: 16}
CANDIDATES = 20  # halved between the image and its mirror image
MAX_SHIFT = 1  # voxels of what is compared, along every axis

#: Where the mean training image is darker than this, nobody has anatomy.
BACKGROUND = 0.05

#: Side of the SSIM window.
WINDOW = 7


class Aligned:
    """Structural similarity to the training scan that fits best, over small shifts and the mirror image.

    A search by correlation of coarse, masked images finds the 20 nearest; the best shift of each is chosen by the same
    correlation, and the highest SSIM inside the mask (Wang et al. 2004) is the similarity.  On registered brains this
    finds copies better than any embedding (DeepSSIM, arXiv 2509.16582, table 2), as long as they were not rotated.
    Only what lies inside the extent of the image counts, so that a copy whose borders were cut off is compared by what
    is left.  Large images are compared by block means (`base.reduced`).

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
        self.mean, self.training, self.device = reduced(torch.from_numpy(mean)[None]).to(device), training, device
        shape = self.mean.shape[2:]
        self.dims = len(shape)
        self.factors = [min(-(-max(shape) // ALIGNED_SIDE[self.dims]), n) for n in shape]
        self.mask = self.mean > BACKGROUND
        if not bool(self.mask.any()):
            self.mask = torch.ones_like(self.mask)
        # Nothing outside the bounding box of the mask counts, so nothing there is computed.
        ends = [(int(where.min()), int(where.max()) + 1) for where in self.mask.nonzero().T[2:]]
        self.box = (slice(None), slice(None), *(slice(max(0, a - WINDOW // 2), b + WINDOW // 2) for a, b in ends))
        filled = self._pool(self.mask.float())
        self.coarse_mask = filled > (0.5 if bool((filled > 0.5).any()) else 0.0)  # thin structures fill no cell by half
        #: A GPU holds them once, and is not given them again for every search.
        self.references: np.ndarray | Tensor = (
            np.zeros((0, 0), np.float32) if references is None else torch.from_numpy(references).to(device)
        )

    def _pool(self, images: Tensor) -> Tensor:
        return (functional.avg_pool3d if self.dims == 3 else functional.avg_pool2d)(images, self.factors)

    def vectors(self, images: Tensor) -> np.ndarray:
        images = reduced(images.to(self.device))
        return self._vectors(images, extent(images))

    def _vectors(self, images: Tensor, seen: Tensor) -> np.ndarray:
        return unit_rows(self._pool((images - self.mean) * (self.mask * seen))[:, self.coarse_mask[0]].cpu().numpy())

    @torch.no_grad()
    def similarity(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        images = reduced(images.to(self.device))
        score, index = np.full(len(images), -1.0), np.zeros(len(images), np.int64)
        shifts = torch.cartesian_prod(*[torch.arange(-MAX_SHIFT, MAX_SHIFT + 1)] * self.dims).tolist()
        variants = np.arange(2 * len(shifts))  # the image at every shift, then its mirror image
        unmoved = [len(shifts) // 2, len(shifts) + len(shifts) // 2]
        size = batch_size(images.shape[1:])
        for i, image in enumerate(images):
            both = torch.stack([image, flip(image[None])[0]])
            whole = torch.stack([both, extent(both)], 1)
            vectors = np.concatenate([self._vectors(*_moved(whole, part, shifts)) for part in parts_of(variants, size)])
            found = np.unique(nearest(vectors[unmoved], self.references, CANDIDATES // 2)[1])
            best = (vectors @ torch.as_tensor(self.references[found]).cpu().numpy().T).argmax(0)
            values = np.concatenate(
                [
                    self._ssim(moved, torch.from_numpy(self.training[found[part]]).to(self.device), seen)
                    for part in parts_of(np.arange(len(found)), size)
                    for moved, seen in [_moved(whole, best[part], shifts)]
                ]
            )
            score[i], index[i] = values.max(), found[values.argmax()]
        return score, index

    def _ssim(self, a: Tensor, b: Tensor, seen: Tensor) -> np.ndarray:
        a, b, seen = a[self.box], b[self.box], seen[self.box]
        window = min(WINDOW, *a.shape[2:])
        values = ssim_map(a, b, window)
        trim = [slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(a.shape[2:], values.shape[2:], strict=True)]
        # A window that reaches over a cut compares anatomy with nothing.
        inside = self.mask[self.box][(slice(None), slice(None), *trim)] * (window_mean(seen, window) > 1.0 - 1e-4)
        return ((values * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp_min(1.0)).cpu().numpy()


def _moved(whole: Tensor, variants: np.ndarray, shifts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Variants of an image and their extents, (n, 1, *spatial) each, of both for the image and its mirror image, (2, 2,
    1, *spatial).
    """
    axes = list(range(2, whole.ndim - 1))
    moved = torch.stack(
        [torch.roll(whole[number // len(shifts)], shifts[number % len(shifts)], dims=axes) for number in variants]
    )
    return moved[:, 0], moved[:, 1]


def extent(images: Tensor) -> Tensor:
    """1 inside the bounding box of what is not zero in each image, 0 outside; float32 (n, 1, *spatial)."""
    inside = torch.ones_like(images)
    for axis in range(2, images.ndim):
        filled = (images != 0).float().amax([other for other in range(2, images.ndim) if other != axis], keepdim=True)
        inside = inside * filled.cummax(axis).values * filled.flip(axis).cummax(axis).values.flip(axis)
    return inside


def window_mean(x: Tensor, window: int) -> Tensor:
    """Means over every window that fits, (n, 1, *spatial - window + 1).

    Sums of shifted slices, one axis at a time: ten times as fast as torch's average pooling on a CPU.
    """
    for axis in range(2, x.ndim):
        fits = x.shape[axis] - window + 1
        total = x.narrow(axis, 0, fits).clone()
        for start in range(1, window):
            total += x.narrow(axis, start, fits)
        x = total / window
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
