"""A light residual autoencoder: what a processor trains in minutes."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.compute.large_tensors import in_parts
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.models.blocks import ChannelNorm, ResidualBlock, by_slabs, convolution
from meddiff_steps.models.first_stage.base import FirstStage, Posterior, widest
from meddiff_steps.models.first_stage.stem import Stem

ENTRY = {
    "order": 1,
    "summary": "residual autoencoder behind an invertible stem; latents of unit power, nothing but local layers",
    "source": "He et al. 2016; Ba et al. 2016",
    "cost": "the decoder at half the resolution; grows with the voxels",
}


class Autoencoder(FirstStage):
    """Images in [0, 1] to latents, and back.

    Latents of every image have mean 0 and variance 1 over all of its numbers.  So an error of a given size, a sampler's
    or that which training adds, is as visible in one channel as in another: what costs power is what images need, and
    no weight of a divergence has to be found.  There is no posterior to draw from: the same image has the same latents.

    Parameters
    ----------
    settings
        The study's `autoencoder` section.
    spatial_dims
        2 or 3.
    image_channels
        Of what is encoded: 1 of scans.
    """

    def __init__(self, settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> None:
        super().__init__(image_channels)
        self.stem = Stem(spatial_dims, settings.stem)
        self.downsampling = settings.downsampling
        self.widest = widest(settings.channels, spatial_dims)
        widths, image = settings.channels, self.stem.channels(image_channels)
        encoder: list[nn.Module] = [convolution(spatial_dims, image, widths[0])]
        for level, width in enumerate(widths):
            if level:
                encoder.append(convolution(spatial_dims, widths[level - 1], width, stride=2))
            encoder += [ResidualBlock(spatial_dims, width) for _ in range(settings.num_res_blocks)]
        encoder += [ChannelNorm(widths[-1]), convolution(spatial_dims, widths[-1], settings.latent_channels)]
        decoder: list[nn.Module] = [convolution(spatial_dims, settings.latent_channels, widths[-1])]
        for level in reversed(range(len(widths))):
            # One more than on the way down: making an image is harder than reading one.
            decoder += [ResidualBlock(spatial_dims, widths[level]) for _ in range(settings.num_res_blocks + 1)]
            if level:
                decoder += [nn.Upsample(scale_factor=2), convolution(spatial_dims, widths[level], widths[level - 1])]
        decoder += [ChannelNorm(widths[0]), nn.SiLU(), convolution(spatial_dims, widths[0], image)]
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)
        # Cells around one that its decoding sees, at most: convolutions of a level reach half as far as those below.
        per_level = [2 * (settings.num_res_blocks + 1) + 1] * len(widths)
        self._reach = 1 + math.ceil(sum(steps / 2**level for level, steps in enumerate(per_level)))
        if settings.gradient_checkpointing:
            recompute([block for block in self.modules() if isinstance(block, ResidualBlock)])

    @property
    def costly(self) -> dict[str, nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    def encode(self, images: Tensor) -> Posterior:
        """Latents of images (b, 1, *spatial) in [0, 1]."""
        blocks = self.stem(images * 2.0 - 1.0)
        features = in_parts(self.encoder, blocks, self.widest * blocks[0, 0].numel()).float()
        return Posterior(functional.layer_norm(features, features.shape[1:]))

    def decode(self, latents: Tensor, slab: int | None = None) -> Tensor:
        if slab is None:
            finest = latents[0, 0].numel() * (self.downsampling // self.stem.factor) ** (latents.ndim - 2)
            decoded = in_parts(self.decoder, latents, self.widest * finest)
        else:
            cells = -(-slab // self.downsampling)
            decoded = by_slabs(self.decoder, [latents], cells, self._reach, self.downsampling // self.stem.factor)
        return (self.stem.inverse(decoded).float() + 1.0) / 2.0


def build(settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> Autoencoder:
    """The network with fresh weights."""
    return Autoencoder(settings, spatial_dims, image_channels)
