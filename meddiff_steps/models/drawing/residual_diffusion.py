"""The drawing decoder of local residual layers, which learn from crops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.models.blocks import by_slabs
from meddiff_steps.models.denoiser.resnet import LocalNetwork
from meddiff_steps.models.drawing.base import DrawingDecoder

ENTRY = {
    "order": 1,
    "summary": "diffusion of what the first stage leaves open, local, on blocks of 2 x 2 (x 2) voxels",
    "source": "Pandey et al. 2022; Karras et al. 2022",
    "cost": "its network at half the resolution, once per step; grows with the voxels",
}


class ResidualDiffusion(DrawingDecoder):
    """Predicts v by residual blocks at the resolution of the blocks of voxels.

    Parameters
    ----------
    settings
        The study's `decoder` section.
    image_shape
        (1, *spatial), even along each axis.
    """

    def __init__(self, settings: config.Decoder, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape)
        dims, inputs = len(image_shape) - 1, 2 * self.channels
        self.net = LocalNetwork(dims, inputs, self.channels, 0, settings.channels, settings.num_res_blocks)

    @property
    def costly(self) -> list[nn.Module]:
        return [self.net]

    def forward(self, x: Tensor, timesteps: Tensor, decoded: Tensor, place: Tensor, slab: int | None = None) -> Tensor:
        alpha, sigma = self.process.alpha_sigma(timesteps)
        level, numbers = sigma.log() - alpha.log(), x.new_zeros(len(x), 0)
        if slab is None:
            return self.net(torch.cat([x, decoded], 1), place, level, numbers).float()

        def network(seen: Tensor, where: Tensor) -> Tensor:
            return self.net(seen, where, level, numbers).float()

        return by_slabs(network, [torch.cat([x, decoded], 1), place], slab, self.net.reach)


def build(settings: config.Decoder, image_shape: Sequence[int]) -> ResidualDiffusion:
    """The decoder with fresh weights."""
    return ResidualDiffusion(settings, image_shape)
