"""The grey-level curve that generated images go through."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

#: Intervals of equal width in [0, 1]; stored images have 1,000 or 256 levels.
LEVELS = 512

#: Share of voxels that are taken to be spread evenly over [0, 1] in scans and decoded images alike: grey levels that
#: neither has stay as they are.
EVEN_SHARE = 1e-4


class ToneCurve(nn.Module):
    """A monotone map of [0, 1] into itself that gives generated images the grey levels of scans; before `fit`, the
    identity.

    What sampling leaves undone is a haze where scans are exactly 0, and contrast that is a little too low.  Voxel by
    voxel that is little, but every volume and histogram sees it.  The curve maps quantiles of images that were made to
    those of scans: of all maps of grey levels that give the right distribution, the one that moves them least.  As many
    voxels as in scans become exactly 0.  It is fitted on images that were generated for covariates of training scans:
    reconstructions have no such haze, so a curve that is fitted on them does not take it away.
    """

    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("values", torch.linspace(0.0, 1.0, LEVELS + 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images in [0, 1], float32 of any shape, through the curve, linear between its levels."""
        position = images * LEVELS
        below = position.nan_to_num(0.0).long().clamp(0, LEVELS - 1)  # what is no number stays none
        start = self.values[below]
        return start + (self.values[below + 1] - start) * (position - below)

    @torch.no_grad()
    def fit(self, generated: np.ndarray, scans: np.ndarray) -> None:
        """Set the curve, from voxels of both by their level (`level_counts`), (LEVELS + 1,) each."""
        knots = np.arange(LEVELS + 1) / LEVELS
        below = [
            (1.0 - EVEN_SHARE) * np.cumsum(counts / counts.sum()) + EVEN_SHARE * knots for counts in (generated, scans)
        ]
        self.values.copy_(torch.from_numpy(_quantiles(below[0], below[1], knots)))

    def extra_repr(self) -> str:
        return f"0 up to {float((self.values == 0).sum() - 1) / LEVELS:.3f}"


def level_counts(images: Tensor | np.ndarray) -> np.ndarray:
    """Voxels of images in [0, 1] by level, int64 (LEVELS + 1,).

    Level 0 is exactly 0, level k holds values above (k - 1) / LEVELS up to k / LEVELS.
    """
    levels = np.ceil(np.asarray(images, np.float64) * LEVELS).astype(np.int64).clip(0, LEVELS)
    return np.bincount(levels.ravel(), minlength=LEVELS + 1)


def level_distance(one: np.ndarray, other: np.ndarray) -> float:
    """How far grey levels must be moved on average to make one distribution the other, in [0, 1]: Wasserstein's
    distance, of counts by level.
    """
    return float(np.abs(np.cumsum(one / one.sum()) - np.cumsum(other / other.sum())).sum() / LEVELS)


def _quantiles(shares: np.ndarray, below: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """The smallest values, linear between `knots`, that `shares` of all voxels do not exceed, when `below` do not
    exceed the knots.
    """
    upper = np.searchsorted(below, shares.clip(max=below[-1]))
    lower = np.maximum(upper - 1, 0)
    part = (shares - below[lower]) / np.where(upper > lower, below[upper] - below[lower], 1.0)
    return np.where(upper > 0, knots[lower] + part.clip(0.0, 1.0) * (knots[upper] - knots[lower]), 0.0)
