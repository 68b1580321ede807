"""A small conditional diffusion of the residual: scan minus decoded image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import SAMPLERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.sampling import sample
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.blocks import by_slabs, coordinates, dense
from meddiff_steps.models.denoiser.resnet import LocalNetwork
from meddiff_steps.models.drawing.base import DrawingDecoder
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.tone import ToneCurve

ENTRY = {
    "order": 1,
    "summary": "diffusion of what the first stage leaves open, local, on blocks of 2 x 2 (x 2) voxels",
    "source": "Pandey et al. 2022; Karras et al. 2022",
    "cost": "its network at half the resolution, once per step; grows with the voxels",
}

#: v-prediction on the default schedule: of residuals of unit variance, that is EDM's preconditioning.
PROCESS = NoiseProcess.of(config.Diffusion())


def sampler() -> str:
    """What takes the residual from noise to an image; loaded here, so that its code counts as code of this decoder
    (`core.code_digest`).
    """
    SAMPLERS.load("dpmpp")
    return "dpmpp"


class ResidualDiffusion(DrawingDecoder):
    """Predicts v by local layers; blocks are of two voxels along each axis.

    Its layers are local, so that it learns from crops.  Blocks are written as Haar coefficients, which is orthonormal:
    white noise stays white.

    Parameters
    ----------
    settings
        The study's `decoder` section.
    image_shape
        (1, *spatial), even along each axis.
    """

    process = PROCESS

    def __init__(self, settings: config.Decoder, image_shape: Sequence[int]) -> None:
        super().__init__()
        dims = len(image_shape) - 1
        self.stem = Stem(dims, "haar")
        self.block = self.stem.factor
        self.blocks_shape = tuple(n // self.block for n in image_shape[1:])
        self.register_buffer("deviation", torch.ones(()))
        self.tone = ToneCurve()
        channels = self.stem.channels(1)
        self.net = LocalNetwork(dims, 2 * channels, channels, 0, settings.channels, settings.num_res_blocks)

    @property
    def costly(self) -> list[nn.Module]:
        return [self.net]

    def place(self, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        whole = coordinates(self.blocks_shape)
        if start is None or size is None:
            return whole
        return whole[(slice(None), *(slice(low, low + n) for low, n in zip(start, size, strict=True)))]

    def residual(self, images: Tensor, decoded: Tensor) -> Tensor:
        return self.stem((images - decoded) / self.deviation)

    def forward(self, x: Tensor, timesteps: Tensor, decoded: Tensor, place: Tensor, slab: int | None = None) -> Tensor:
        alpha, sigma = PROCESS.alpha_sigma(timesteps)
        level, numbers = sigma.log() - alpha.log(), x.new_zeros(len(x), 0)
        if slab is None:
            return self.net(torch.cat([x, decoded], 1), place, level, numbers).float()

        def network(seen: Tensor, where: Tensor) -> Tensor:
            return self.net(seen, where, level, numbers).float()

        return by_slabs(network, [torch.cat([x, decoded], 1), place], slab, self.net.reach)

    def in_blocks(self, decoded: Tensor) -> Tensor:
        return dense(self.stem(decoded * 2.0 - 1.0))

    def step(self, decoded: Tensor) -> Tensor:
        seen = self.in_blocks(decoded)
        return self(seen, seen.new_zeros(len(seen)), seen, self._places(seen))

    def _places(self, seen: Tensor) -> Tensor:
        """Coordinates of all blocks for a batch, (b, d, *blocks)."""
        return self.place().to(seen).expand(len(seen), -1, *(-1 for _ in self.blocks_shape))

    def draw(self, decoded: Tensor, noise: Tensor, num_inference_steps: int, slab: int | None = None) -> Tensor:
        seen = self.in_blocks(decoded)
        place = self._places(seen)
        planes = None if slab is None else max(1, slab // self.block)
        drawn = sample(
            lambda x, timesteps, condition: self(dense(x), timesteps, condition.maps["decoded"], place, planes),
            self.stem(noise),
            Condition(seen.new_zeros(len(seen), 0), {"decoded": seen}),
            PROCESS,
            sampler(),
            num_inference_steps=num_inference_steps,
        )
        return self.tone((decoded + self.deviation * self.stem.inverse(drawn).float()).clamp(0.0, 1.0))


def build(settings: config.Decoder, image_shape: Sequence[int]) -> ResidualDiffusion:
    """The decoder with fresh weights."""
    return ResidualDiffusion(settings, image_shape)
