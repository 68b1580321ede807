"""The grey-level curve that decoded images go through."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

#: Intervals of equal width in [0, 1]; stored images have 1,000 or 256 levels.
LEVELS = 512

#: Share of voxels that are taken to be spread evenly over [0, 1] in scans and decoded images alike: grey levels that
#: neither has stay as they are.
EVEN_SHARE = 1e-4

#: The curve is left out where the mean squared error of reconstructions grows by more than this factor.
TOLERATED_ERROR = 1.1


class ToneCurve(nn.Module):
    """A monotone map of [0, 1] into itself that gives decoded images the grey levels of scans; before `fit`, the
    identity.

    Networks that learn from mean errors compress contrast: edges are soft, cavities too bright, and a haze lies where
    scans are exactly 0.  Voxel by voxel that is little, but every volume and histogram sees it.  The curve maps
    quantiles of decoded training scans to those of the scans themselves: of all maps of grey levels that give the right
    distribution, the one that moves them least. As many voxels as in scans become exactly 0.
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
    def fit(self, counts: np.ndarray) -> None:
        """Set the curve.

        Parameters
        ----------
        counts
            Voxels of decoded scans by their level (`levels`) and, second, that of the same voxel in the scan, (LEVELS +
            1, LEVELS + 1).
        """
        knots = np.arange(LEVELS + 1) / LEVELS
        decoded, scan = (counts.sum(axis) / counts.sum() for axis in (1, 0))
        below = [(1.0 - EVEN_SHARE) * np.cumsum(shares) + EVEN_SHARE * knots for shares in (decoded, scan)]
        curve = _quantiles(below[0], below[1], knots)
        if _squared_error(counts, curve) > TOLERATED_ERROR * _squared_error(counts, knots):
            curve = np.where(below[0] <= below[1][0], 0.0, knots)
        self.values.copy_(torch.from_numpy(curve))

    def extra_repr(self) -> str:
        return f"0 up to {float((self.values == 0).sum() - 1) / LEVELS:.3f}"


def levels(images: Tensor) -> np.ndarray:
    """Level of each voxel of images in [0, 1], int64, flat: 0 for exactly 0, k for values above (k - 1) / LEVELS up to
    k / LEVELS.
    """
    return (images.double() * LEVELS).ceil().long().clamp(0, LEVELS).flatten().cpu().numpy()


def joint_counts(decoded: Tensor, scan: Tensor) -> np.ndarray:
    """What `ToneCurve.fit` counts, of images of one shape in [0, 1]."""
    pairs = np.bincount(levels(decoded) * (LEVELS + 1) + levels(scan), minlength=(LEVELS + 1) ** 2)
    return pairs.reshape(LEVELS + 1, LEVELS + 1)


def _quantiles(shares: np.ndarray, below: np.ndarray, knots: np.ndarray) -> np.ndarray:
    """The smallest values, linear between `knots`, that `shares` of all voxels do not exceed, when `below` do not
    exceed the knots.
    """
    upper = np.searchsorted(below, shares.clip(max=below[-1]))
    lower = np.maximum(upper - 1, 0)
    part = (shares - below[lower]) / np.where(upper > lower, below[upper] - below[lower], 1.0)
    return np.where(upper > 0, knots[lower] + part.clip(0.0, 1.0) * (knots[upper] - knots[lower]), 0.0)


def _squared_error(counts: np.ndarray, curve: np.ndarray) -> float:
    """Sum over all voxels, each level taken at the middle of its interval."""
    middles = np.concatenate([[0.0], (np.arange(LEVELS) + 0.5) / LEVELS])
    made = np.interp(middles, np.arange(LEVELS + 1) / LEVELS, curve)
    return float((counts * np.square(made[:, None] - middles[None])).sum())
