"""Invertible 2x reductions that take the place of an autoencoder's most expensive, full-resolution level."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn


class Stem(nn.Module):
    """Move every 2 x 2 (x 2) block of voxels into channels, optionally as orthonormal Haar wavelet coefficients.

    Both kinds are orthonormal, so an L2 distance is the same before and after, and `inverse` is exact up to
    rounding.  Haar coefficients separate the block mean (first channel) from detail, which a network learns
    faster than raw voxels.

    Parameters
    ----------
    kind
        ``haar``: orthonormal Haar wavelet, one level (Haar 1910).  ``space_to_depth``: rearrangement only.
        ``none``: identity.
    """

    basis: Tensor

    def __init__(self, spatial_dims: int, kind: Literal["haar", "space_to_depth", "none"]) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.kind = kind
        size = 2**spatial_dims
        corners = list(itertools.product((0, 1), repeat=spatial_dims))
        hadamard = torch.tensor(
            [[(-1.0) ** sum(a * b for a, b in zip(row, column, strict=True)) for column in corners] for row in corners]
        )
        self.register_buffer("basis", hadamard / size**0.5 if kind == "haar" else torch.eye(size), persistent=False)

    @property
    def factor(self) -> int:
        """Voxels per output cell along one axis."""
        return 1 if self.kind == "none" else 2

    def channels(self, in_channels: int) -> int:
        """Number of channels after the stem."""
        return in_channels if self.kind == "none" else in_channels * 2**self.spatial_dims

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, *spatial) -> (b, c * 2**d, *spatial / 2)."""
        if self.kind == "none":
            return x
        d = self.spatial_dims
        b, c, *spatial = x.shape
        blocks = x.reshape(b, c, *itertools.chain.from_iterable((n // 2, 2) for n in spatial))
        blocks = blocks.permute(0, 1, *range(3, 3 + 2 * d, 2), *range(2, 2 + 2 * d, 2))
        coefficients = torch.tensordot(
            blocks.reshape(b, c, 2**d, *(n // 2 for n in spatial)), self.basis.to(x.dtype), dims=([2], [1])
        )
        return coefficients.movedim(-1, 2).reshape(b, c * 2**d, *(n // 2 for n in spatial))

    def inverse(self, y: Tensor) -> Tensor:
        """(b, c * 2**d, *spatial) -> (b, c, *spatial * 2)."""
        if self.kind == "none":
            return y
        d = self.spatial_dims
        b, channels, *spatial = y.shape
        c = channels // 2**d
        blocks = torch.tensordot(y.reshape(b, c, 2**d, *spatial), self.basis.to(y.dtype), dims=([2], [0])).movedim(
            -1, 2
        )
        blocks = blocks.reshape(b, c, *(2,) * d, *spatial)
        interleaved = itertools.chain.from_iterable((2 + d + axis, 2 + axis) for axis in range(d))
        return blocks.permute(0, 1, *interleaved).reshape(b, c, *(2 * n for n in spatial))
