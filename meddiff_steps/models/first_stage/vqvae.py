"""Vector-quantised autoencoder: MONAI's network behind an invertible stem."""

from __future__ import annotations

import math

from monai.networks.nets import VQVAE
from monai.networks.nets.vqvae import VQVAEResidualUnit
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.large_tensors import in_parts
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.models.blocks import by_slabs
from meddiff_steps.models.first_stage.base import FirstStage, Posterior
from meddiff_steps.models.first_stage.quantiser import Codebooks
from meddiff_steps.models.first_stage.stem import Stem

ENTRY = {
    "order": 4,
    "summary": "vector-quantised autoencoder (MONAI's VQVAE) behind an invertible stem",
    "source": "van den Oord et al. 2017; Tudosiu et al. 2022",
    "cost": "as `kl`, and a comparison of every cell with every entry",
    "keys": ["codebook"],
}

#: Stride, kernel, dilation and padding of the convolution that begins a level: the first keeps the size.
KEEPS, HALVES = (1, 3, 1, 1), (2, 4, 1, 1)


class Autoencoder(FirstStage):
    """Images in [0, 1] to latents, and back; latents are those before quantisation, as of `vq`.

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
        channels, widths, blocks = self.stem.channels(image_channels), tuple(settings.channels), settings.num_res_blocks
        steps = [KEEPS] + [HALVES] * (len(widths) - 1)
        net = VQVAE(
            spatial_dims=spatial_dims,
            in_channels=channels,
            out_channels=channels,
            channels=widths,
            num_res_layers=blocks,
            num_res_channels=widths,
            downsample_parameters=steps,
            upsample_parameters=[(*step, 0) for step in reversed(steps)],
            embedding_dim=settings.latent_channels,
        )
        self.encoder, self.decoder = net.encoder, net.decoder
        self.codebooks = Codebooks(settings.latent_channels, settings.codebook)
        if settings.gradient_checkpointing:
            recompute([block for block in self.modules() if isinstance(block, VQVAEResidualUnit)])
        self.downsampling = settings.downsampling
        self.widest = max(width / 2 ** (spatial_dims * level) for level, width in enumerate(widths))
        # Cells around one that its decoding sees, at most; as of `resnet`.
        self._reach = 1 + math.ceil(sum((2 * blocks + 1) / 2**level for level in range(len(widths))))

    @property
    def costly(self) -> dict[str, nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def quantiser(self) -> Codebooks:
        return self.codebooks

    def encode(self, images: Tensor) -> Posterior:
        """Latents of images (b, 1, *spatial) in [0, 1], before quantisation."""
        blocks = self.stem(images * 2.0 - 1.0)
        return Posterior(in_parts(self.encoder, blocks, self.widest * blocks[0, 0].numel()).float())

    def decode(self, latents: Tensor, slab: int | None = None) -> Tensor:
        entries, factor = self.codebooks(latents), self.downsampling // self.stem.factor
        if slab is None:
            finest = latents[0, 0].numel() * factor ** (latents.ndim - 2)
            decoded = in_parts(self.decoder, entries, self.widest * finest)
        else:
            decoded = by_slabs(self.decoder, [entries], -(-slab // self.downsampling), self._reach, factor)
        return (self.stem.inverse(decoded).float() + 1.0) / 2.0


def build(settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> Autoencoder:
    """The network with fresh weights."""
    return Autoencoder(settings, spatial_dims, image_channels)
