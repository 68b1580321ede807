"""Networks of volumes that look at one slice at a time, and the same with layers across slices inserted (Make-A-Volume,
Zhu et al. 2023b).

Slices lie along the last axis.  A layer of slices is a 3D convolution whose kernel is one voxel thick along it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from meddiff_steps.models.blocks import ResidualBlock, silence
from meddiff_steps.models.denoiser.resnet import LocalNetwork

#: `alone`: no voxel sees another slice.  `joined`: with layers across slices.  `solid`: kernels of three voxels along
#: every axis.
Slices = Literal["alone", "joined", "solid"]


class AcrossBlock(ResidualBlock):
    """A residual block, and after it a convolution along the last axis that starts as the identity; (b, channels, x, y,
    z).
    """

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__(3, channels, embedding)
        self.across = nn.Conv3d(channels, channels, (1, 1, 3), padding=(0, 0, 1))
        silence(self.across)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h: Tensor = super().forward(x, embedding)
        return h + self.across(h)


class SliceNetwork(LocalNetwork):
    """`LocalNetwork` of volumes whose kernels are one voxel thick along the last axis; with `joined` its blocks are
    `AcrossBlock`s, whose other weights have the names that they have without.
    """

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int, joined: bool) -> None:
        super().__init__(3, inputs, outputs, 0, width, blocks)
        if joined:
            self.blocks = nn.ModuleList(AcrossBlock(width, 2 * width) for _ in range(blocks))
        for module in list(self.modules()):
            for name, layer in list(module.named_children()):
                if isinstance(layer, nn.Conv3d) and name != "across":
                    flat = nn.Conv3d(layer.in_channels, layer.out_channels, (3, 3, 1), padding=(1, 1, 0))
                    setattr(module, name, flat)
                    if name in ("conv2", "last"):  # silent in the network that it is made of
                        silence(flat)


def network_of(slices: Slices, inputs: int, outputs: int, width: int, blocks: int) -> LocalNetwork:
    """A network of one of these kinds; of a solid one `width` is that of the joined one that costs as much."""
    if slices == "solid":
        return LocalNetwork(3, inputs, outputs, 0, solid_width(inputs, outputs, width, blocks), blocks)
    return SliceNetwork(inputs, outputs, width, blocks, slices == "joined")


def solid_width(inputs: int, outputs: int, width: int, blocks: int) -> int:
    """Of a solid network whose convolutions take about as many multiplications per voxel as those of a joined one."""
    ends = inputs + 3 + outputs
    wanted = 9 * ends * width + blocks * 21 * width**2
    return min(range(1, width + 1), key=lambda v: abs(27 * ends * v + blocks * 54 * v**2 - wanted))


def by_slice(images: Tensor) -> Tensor:
    """(b, c, x, y, z) -> (b * z, c, x, y)."""
    return torch.movedim(images, -1, 1).flatten(0, 1)


def stacked(slices: Tensor, batch: int) -> Tensor:
    """The inverse of `by_slice`, of a batch of so many volumes."""
    return slices.unflatten(0, (batch, -1)).movedim(1, -1)
