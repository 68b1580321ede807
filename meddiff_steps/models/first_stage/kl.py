"""KL-regularised autoencoder: MONAI's network behind an invertible stem."""

from __future__ import annotations

from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.large_tensors import in_parts
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.models.first_stage.base import FirstStage, Posterior, widest
from meddiff_steps.models.first_stage.slabs import decode_in_slabs
from meddiff_steps.models.first_stage.stem import Stem

ENTRY = {
    "order": 2,
    "summary": "KL-regularised autoencoder (MONAI's AutoencoderKL) behind an invertible stem",
    "source": "Kingma and Welling 2014; Rombach et al. 2022; Pinaya et al. 2022",
    "cost": "the decoder at full resolution less one level; grows with the voxels",
    "keys": ["kl_weight"],
}

#: Bounds of the posterior log-variance; the same that MONAI clamps to.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Autoencoder(FirstStage):
    """Images in [0, 1] to a Gaussian posterior over latents, and back.

    MONAI's AutoencoderKL takes most of its time in the full-resolution level; the stem removes that level
    without losing information.  Attention is off at every level: one 3D bottleneck map of the published size
    would take half a gigabyte per head and image.

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
        self.centred = settings.grey_levels == "-1..1"
        channels = self.stem.channels(image_channels)
        levels = len(settings.channels)
        self.net = AutoencoderKL(
            spatial_dims=spatial_dims,
            in_channels=channels,
            out_channels=channels,
            channels=tuple(settings.channels),
            num_res_blocks=(settings.num_res_blocks,) * levels,
            attention_levels=(False,) * levels,
            with_encoder_nonlocal_attn=False,
            with_decoder_nonlocal_attn=False,
            latent_channels=settings.latent_channels,
            norm_num_groups=settings.norm_num_groups,
        )
        if settings.upsampling == "linear":
            for module in self.net.decoder.modules():
                if isinstance(module, nn.Upsample):
                    module.mode = "trilinear" if spatial_dims == 3 else "bilinear"
        if settings.gradient_checkpointing:
            recompute([block for block in self.net.modules() if isinstance(block, AEKLResBlock)])
        self.downsampling = settings.downsampling
        self.widest = widest(settings.channels, spatial_dims)

    @property
    def costly(self) -> dict[str, nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return {"encoder": self.net.encoder, "decoder": self.net.decoder}

    @property
    def reading(self) -> list[nn.Module]:
        """The parts that make latents of images."""
        return [self.net.encoder, self.net.quant_conv_mu, self.net.quant_conv_log_sigma]

    def encode(self, images: Tensor) -> Posterior:
        """Posterior of images (b, 1, *spatial) in [0, 1].

        The log-variance is read before MONAI turns it into a standard deviation: squaring that in half
        precision underflows and makes the KL infinite.
        """
        blocks = self.stem(images * 2.0 - 1.0 if self.centred else images)
        features = in_parts(self.net.encoder, blocks, self.widest * blocks[0, 0].numel())
        mean = self.net.quant_conv_mu(features).float()
        return Posterior(mean, self.net.quant_conv_log_sigma(features).float().clamp(*LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor, slab: int | None = None) -> Tensor:
        decoder, z = self.net.decoder, self.net.post_quant_conv(latents)
        finest = latents[0, 0].numel() * (self.downsampling // self.stem.factor) ** (latents.ndim - 2)
        decoded = in_parts(
            lambda part: decoder(part) if slab is None else decode_in_slabs(decoder, part, slab),
            z,
            self.widest * finest,
        )
        images = self.stem.inverse(decoded).float()
        return (images + 1.0) / 2.0 if self.centred else images


def build(settings: config.Autoencoder, spatial_dims: int, image_channels: int = 1) -> Autoencoder:
    """The network with fresh weights."""
    return Autoencoder(settings, spatial_dims, image_channels)
