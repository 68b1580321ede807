"""Second stage: MONAI's diffusion UNet, conditioned on any mix of covariates, each of which may be missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.compute.recompute import recompute
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.latent_gaussian import Prior

#: Frequencies of the sine features of a standardised covariate: periods of 16 to 1 standard deviations.
FREQUENCIES = tuple(2.0 * math.pi / period for period in (16.0, 8.0, 4.0, 2.0, 1.0))


#: Hidden units of the prior's component network.
COMPONENT_WIDTH = 256

#: Channels of the learnt map of positions that the network sees beside the latents.
POSITION_CHANNELS = 8


class CovariateTokens(nn.Module):
    """One token per covariate.

    With a single token, cross-attention is a softmax over one key and adds the same bias everywhere; with one
    token per covariate the network can attend to them by place and by feature.  Missing and dropped covariates
    have a learnt token of their own.

    Parameters
    ----------
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    dim
        Width of a token.
    """

    frequencies: Tensor

    def __init__(self, levels: list[int], dim: int) -> None:
        super().__init__()
        self.levels = levels
        self.null = nn.Parameter(torch.randn(len(levels), dim) * 0.02)
        self.register_buffer("frequencies", torch.tensor(FREQUENCIES), persistent=False)
        features = 1 + 2 * len(FREQUENCIES)
        self.embed = nn.ModuleList(
            nn.Embedding(n, dim) if n else nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))
            for n in levels
        )

    def forward(self, covariates: Tensor) -> Tensor:
        """(b, k) standardised values or level numbers, NaN where missing -> (b, k, dim)."""
        tokens = []
        for i, (n, embed) in enumerate(zip(self.levels, self.embed, strict=True)):
            value = covariates[:, i]
            known = torch.isfinite(value)
            value = torch.where(known, value, torch.zeros_like(value))
            if n:
                token = embed(value.long())
            else:
                phases = value[:, None] * self.frequencies
                token = embed(torch.cat([value[:, None], phases.sin(), phases.cos()], 1))
            tokens.append(torch.where(known[:, None], token, self.null[i].to(token.dtype)))
        return torch.stack(tokens, 1)


class Denoiser(nn.Module):
    """Predicts epsilon, v or the flow velocity from noisy latents, the time and the covariates.

    Two parts are added.  The `Prior` knows what all subjects share, the effects of covariates and how distant places
    vary together.  MONAI's UNet, which starts at zero, learns all else.  It sees the noisy latents, the prior's
    estimate of the clean ones and a learnt map of positions.

    Covariates enter the UNet twice: as cross-attention tokens, and added to the time embedding, which reaches every
    residual block.

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    latent_shape
        (c, *spatial).
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    rank
        Components of the prior; 0 leaves it out.
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self, settings: config.Diffusion, latent_shape: Sequence[int], levels: list[int], rank: int = 0
    ) -> None:
        super().__init__()
        spatial_dims, latent_channels = len(latent_shape) - 1, latent_shape[0]
        depth = len(settings.channels)
        self.process = NoiseProcess.of(settings)
        # How latents were standardised travels with the weights, so that it cannot be lost or mistyped.
        self.register_buffer("offset", torch.zeros(1, *latent_shape))
        self.register_buffer("scale", torch.ones(1, latent_channels, *(1,) * spatial_dims))
        self.prior = (
            Prior(self.process, latent_shape, levels, rank, COMPONENT_WIDTH if settings.component_steps else 0)
            if rank
            else None
        )
        self.positions = nn.Parameter(torch.randn(1, POSITION_CHANNELS, *latent_shape[1:]))
        self.tokens = CovariateTokens(levels, settings.covariate_dim)
        self.unet = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=latent_channels * (2 if rank else 1) + POSITION_CHANNELS,
            out_channels=latent_channels,
            num_res_blocks=(settings.num_res_blocks,) * depth,
            channels=tuple(settings.channels),
            attention_levels=tuple(settings.attention_levels),
            norm_num_groups=settings.norm_num_groups,
            num_head_channels=settings.num_head_channels,
            with_conditioning=True,
            cross_attention_dim=settings.covariate_dim,
            num_class_embeds=1,
            use_flash_attention=True,
        )
        # MONAI adds class_embedding(class_labels) to the time embedding; with the identity in its place, the
        # covariate vector itself is added.
        self.unet.class_embedding = nn.Identity()  # type: ignore[assignment]
        time_dim, token_dim = 4 * settings.channels[0], len(levels) * settings.covariate_dim
        last = nn.Linear(time_dim, time_dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.to_time = nn.Sequential(nn.LayerNorm(token_dim), nn.Linear(token_dim, time_dim), nn.SiLU(), last)
        if settings.gradient_checkpointing:
            recompute([*self.unet.down_blocks, self.unet.middle_block, *self.unet.up_blocks])

    @property
    def costly(self) -> list[nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return [self.unet]

    def latents(self, standardised: Tensor) -> Tensor:
        """The autoencoder's latents from what this model generates, (b, c, *spatial)."""
        return standardised * self.scale + self.offset

    def forward(self, x: Tensor, timesteps: Tensor, covariates: Tensor) -> Tensor:
        """x (b, c, *spatial), timesteps (b,), covariates (b, k) -> (b, c, *spatial) float32."""
        tokens = self.tokens(covariates)
        inputs = [x, self.positions.expand(len(x), *self.positions.shape[1:])]
        if self.prior is not None:
            noise, clean = self.prior(x, timesteps, covariates)
            inputs.insert(1, clean)
        learnt = self.unet(
            torch.cat(inputs, 1), timesteps=timesteps, context=tokens, class_labels=self.to_time(tokens.flatten(1))
        ).float()
        return learnt if self.prior is None else learnt + self.process.target(clean, noise, timesteps)
