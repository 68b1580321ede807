"""KL-regularised autoencoder: MONAI's network behind an invertible stem."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from monai.networks.nets import AutoencoderKL
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.models.first_stage.base import Posterior
from meddiff_steps.models.first_stage.slabs import decode_in_slabs
from meddiff_steps.models.first_stage.stem import Stem
from meddiff_steps.models.first_stage.tone import ToneCurve, joint_counts

ENTRY = {
    "order": 1,
    "summary": "KL-regularised autoencoder (MONAI's AutoencoderKL) behind an invertible stem, with a tone curve",
    "source": "Kingma and Welling 2014; Rombach et al. 2022; Pinaya et al. 2022",
    "draws": False,
    "cost": "the decoder at full resolution less one level; grows with the voxels",
}

#: Bounds of the posterior log-variance; the same that MONAI clamps to.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


#: Log-variance that a posterior starts with when the latents start whitened: 0.03 standard deviations of noise.
INITIAL_LOG_VARIANCE = -7.0


class Autoencoder(nn.Module):
    """Images in [0, 1] to a Gaussian posterior over latents, and back.

    MONAI's AutoencoderKL takes most of its time in the full-resolution level; the stem removes that level
    without losing information.  Attention is off at every level: one 3D bottleneck map of the published size
    would take half a gigabyte per head and image.

    With `linear_path` a linear map of blocks to latent channels and back runs beside the network, which then
    only learns what is not linear (residual autoencoding as in Chen et al. 2025, DC-AE, here with a fitted
    map).  `fit_before_training` sets it to the Karhunen-Loeve transform of the training images, the best linear
    code there is, so that training starts near 30 dB and not near 0.

    Parameters
    ----------
    settings
        The study's `autoencoder` section.
    spatial_dims
        2 or 3.
    """

    draws = False

    def __init__(self, settings: config.Autoencoder, spatial_dims: int, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = Stem(spatial_dims, settings.stem)
        channels = self.stem.channels(in_channels)
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
        if settings.gradient_checkpointing:
            recompute([block for block in self.net.modules() if isinstance(block, AEKLResBlock)])
        self.tone = ToneCurve()
        self.downsampling = settings.downsampling
        self.analysis: nn.Conv2d | nn.Conv3d | None = None
        self.synthesis: nn.ConvTranspose2d | nn.ConvTranspose3d | None = None
        if settings.linear_path:
            conv, transposed = (nn.Conv2d, nn.ConvTranspose2d) if spatial_dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
            self.analysis = conv(in_channels, settings.latent_channels, self.downsampling, stride=self.downsampling)
            self.synthesis = transposed(
                settings.latent_channels, in_channels, self.downsampling, stride=self.downsampling
            )
            # The network starts at zero, so that the whole is the linear code at first.
            last = list(self.net.decoder.get_submodule("blocks").children())[-1]
            for convolution in (self.net.quant_conv_mu, self.net.quant_conv_log_sigma, last):
                for parameter in convolution.parameters():
                    nn.init.zeros_(parameter)
            for name, parameter in self.net.quant_conv_log_sigma.named_parameters():
                if name.endswith("bias"):
                    nn.init.constant_(parameter, INITIAL_LOG_VARIANCE)

    @torch.no_grad()
    def fit_before_training(self, images: Tensor) -> None:
        """Set the linear path to the whitened Karhunen-Loeve transform of non-overlapping blocks, and keep it there.

        Adam moves every weight by steps of one size, which are large beside what decodes the lesser channels.  Held-out
        PSNR of the demo (140 steps, tone curve included): 30.97 dB before training, 30.87 with a path that is trained,
        too, 31.15 with one that is not.

        Parameters
        ----------
        images
            Training images in [0, 1], (n, 1, *spatial); some dozens are enough, since every image has many blocks.
        """
        if self.analysis is None or self.synthesis is None or self.analysis.bias is None or self.synthesis.bias is None:
            return
        blocks = images.double() * 2.0 - 1.0
        for axis in range(2, images.ndim):
            blocks = blocks.unfold(axis, self.downsampling, self.downsampling)
        blocks = blocks.reshape(-1, self.downsampling ** (images.ndim - 2))
        # Centred on one number, not on a mean block: a transposed convolution has one bias per channel.
        center = blocks.mean()
        blocks = blocks - center
        variances, vectors = torch.linalg.eigh(blocks.T @ blocks / len(blocks))
        order = torch.argsort(variances, descending=True)[: self.analysis.out_channels]
        # Signs of eigenvectors are arbitrary; fix them, so that the same data give the same weights.
        basis = vectors[:, order].T
        basis = basis * torch.sign(basis[torch.arange(len(basis)), basis.abs().argmax(1)])[:, None]
        deviations = variances[order].clamp_min(1e-8).sqrt()[:, None]
        shape = (len(order), *self.analysis.weight.shape[1:])
        self.analysis.weight[: len(order)] = (basis / deviations).reshape(shape).float()
        self.analysis.bias[: len(order)] = -(basis / deviations).sum(1).float() * float(center)
        self.synthesis.weight[: len(order)] = (basis * deviations).reshape(shape).float()
        self.synthesis.weight[len(order) :] = 0.0  # more channels than a block has values: left to the network
        self.synthesis.bias.fill_(float(center))
        for path in (self.analysis, self.synthesis):
            path.requires_grad_(False)

    @property
    def costly(self) -> dict[str, nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return {"encoder": self.net.encoder, "decoder": self.net.decoder}

    def encode(self, images: Tensor) -> Posterior:
        """Posterior of images (b, 1, *spatial) in [0, 1].

        The log-variance is read before MONAI turns it into a standard deviation: squaring that in half
        precision underflows and makes the KL infinite.
        """
        x = images * 2.0 - 1.0
        features = self.net.encoder(self.stem(x))
        mean = self.net.quant_conv_mu(features).float()
        if self.analysis is not None:
            mean = mean + self.analysis(x).float()
        return Posterior(mean, self.net.quant_conv_log_sigma(features).float().clamp(*LOG_VARIANCE_RANGE))

    def decode(self, latents: Tensor, noise: Tensor | None = None, slab: int | None = None) -> Tensor:
        """The mean image of latents, through the tone curve: float32 (b, 1, *spatial) in [0, 1].

        `noise` has no part in it: this stage does not draw.  With `slab` in less memory (`decode_in_slabs`).
        """
        return self.tone(self.decode_untoned(latents, slab).clamp(0.0, 1.0))

    def decode_untoned(self, latents: Tensor, slab: int | None = None) -> Tensor:
        """Images as the network gives them, float32 (b, 1, *spatial), nominally in [0, 1], not clipped."""
        decoder, post = self.net.decoder, self.net.post_quant_conv
        decoded = self.net.decode(latents) if slab is None else decode_in_slabs(decoder, post(latents), slab)
        image = self.stem.inverse(decoded).float()
        if self.synthesis is not None:
            image = image + self.synthesis(latents).float()
        return (image + 1.0) / 2.0

    @torch.no_grad()
    def fit_grey_levels(self, scans: Iterable[Tensor]) -> None:
        """Fit the tone curve, so that decoded images have the grey levels of preprocessed scans.

        Parameters
        ----------
        scans
            Training scans in [0, 1], (1, 1, *spatial) each; at least one.
        """

        def counts(scan: Tensor) -> np.ndarray:
            return joint_counts(self.decode_untoned(self.encode(scan).mode()).clamp(0.0, 1.0), scan)

        self.tone.fit(sum((counts(scan) for scan in scans), np.zeros(1, np.int64)))

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction, mean and log-variance; the latent is the mean plus `noise` standard deviations."""
        posterior = self.encode(images)
        latents = posterior.mode() if noise is None else posterior.sample(noise)
        return self.decode_untoned(latents), posterior.mean, posterior.log_variance


def build(settings: config.Autoencoder, spatial_dims: int) -> Autoencoder:
    """The network with fresh weights."""
    return Autoencoder(settings, spatial_dims)
