"""The light residual autoencoder with codebooks between encoder and decoder."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps import config
from meddiff_steps.models.first_stage import resnet
from meddiff_steps.models.first_stage.quantiser import Codebooks

ENTRY = {
    "order": 3,
    "summary": "the residual autoencoder of `resnet`, whose decoder sees nothing but entries of codebooks",
    "source": "van den Oord et al. 2017; Jégou et al. 2011; Rombach et al. 2022",
    "cost": "as `resnet`, and a comparison of every cell with every entry",
    "keys": ["codebook"],
}


class Autoencoder(resnet.Autoencoder):
    """Images in [0, 1] to latents, and back.

    Latents are those before quantisation, and `decode` begins with it (Rombach et al. 2022, section 3.1: the quantiser
    is absorbed by the decoder).  So what diffusion learns has a density, shards, statistics and detectors see numbers
    as of any other first stage, and what a sampler makes is moved to the nearest of what the decoder knows.
    """

    def __init__(self, settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> None:
        super().__init__(settings, spatial_dims, image_channels)
        self.codebooks = Codebooks(settings.latent_channels, settings.codebook)

    @property
    def quantiser(self) -> Codebooks:
        return self.codebooks

    def decode(self, latents: Tensor, slab: int | None = None) -> Tensor:
        return super().decode(self.codebooks(latents), slab)


def build(settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> Autoencoder:
    """The network with fresh weights."""
    return Autoencoder(settings, spatial_dims, image_channels)
