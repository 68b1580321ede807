"""Second stage: MONAI's diffusion UNet, conditioned on any mix of covariates, each of which may be missing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meddiff_steps import config
from meddiff_steps.diffusion.schedules import NoiseProcess

#: Frequencies of the sine features of a standardised covariate: periods of 16 to 1 standard deviations.
FREQUENCIES = tuple(2.0 * math.pi / period for period in (16.0, 8.0, 4.0, 2.0, 1.0))


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
        self.embed = nn.ModuleList(nn.Embedding(n, dim) if n else nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim)) for n in levels)

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

    Two parts are added.  A Gaussian that was fitted to the training latents gives the best linear prediction in
    closed form: what all subjects share, linear effects of covariates, and how distant places vary together.  MONAI's
    UNet, which starts at zero, learns what is not Gaussian.  It sees the noisy latents, the Gaussian's estimate of
    the clean ones and a learnt map of positions.

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
        Components of the Gaussian; 0 leaves all of it out.
    """

    offset: Tensor
    scale: Tensor
    effects: Tensor
    basis: Tensor
    variances: Tensor
    residual: Tensor

    def __init__(self, settings: config.Diffusion, latent_shape: Sequence[int], levels: list[int], rank: int = 0) -> None:
        super().__init__()
        spatial_dims, latent_channels = len(latent_shape) - 1, latent_shape[0]
        size, depth = math.prod(latent_shape), len(settings.channels)
        self.process = NoiseProcess.of(settings)
        self.levels, self.rank = levels, rank
        # How latents were standardised travels with the weights, so that it cannot be lost or mistyped.
        self.register_buffer("offset", torch.zeros(1, *latent_shape))
        self.register_buffer("scale", torch.ones(1, *latent_shape))
        if rank:
            self.register_buffer("effects", torch.zeros(sum(n or 1 for n in levels), size))
            self.register_buffer("basis", torch.zeros(rank, size))
            self.register_buffer("variances", torch.ones(rank))
            self.register_buffer("residual", torch.ones(size))
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
            for block in [*self.unet.down_blocks, self.unet.middle_block, *self.unet.up_blocks]:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def latents(self, standardised: Tensor) -> Tensor:
        """The autoencoder's latents from what this model generates, (b, c, *spatial)."""
        return standardised * self.scale + self.offset

    def forward(self, x: Tensor, timesteps: Tensor, covariates: Tensor) -> Tensor:
        """x (b, c, *spatial), timesteps (b,), covariates (b, k) -> (b, c, *spatial) float32."""
        tokens = self.tokens(covariates)
        inputs = [x, self.positions.expand(len(x), *self.positions.shape[1:])]
        linear = None
        if self.rank:
            linear, clean = self.linear_prediction(x, timesteps, covariates)
            inputs.insert(1, clean)
        learnt = self.unet(torch.cat(inputs, 1), timesteps=timesteps, context=tokens, class_labels=self.to_time(tokens.flatten(1))).float()
        return learnt if linear is None else learnt + linear

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def linear_prediction(self, x: Tensor, timesteps: Tensor, covariates: Tensor) -> tuple[Tensor, Tensor]:
        """The exact prediction if latents were the fitted Gaussian, and its estimate of x0; each (b, c, *spatial) float32.

        With x = alpha x0 + sigma e and x0 ~ N(m, S), the posterior means are E[x0 | x] = m + alpha S q and
        E[e | x] = sigma q, where q = C^-1 (x - alpha m) and C = alpha^2 S + sigma^2 (Gaussian conditioning).  S is of low
        rank plus diagonal, so C^-1 needs one small system per subject (Woodbury identity).
        """
        if bool((timesteps == timesteps[0]).all()):  # sampling: one system serves the whole batch
            timesteps = timesteps[:1]
        alpha, sigma = (a.float()[:, None] for a in self.process.alpha_sigma(timesteps))
        mean = self.features(covariates) @ self.effects
        centred = x.float().flatten(1) - alpha * mean
        weights = 1.0 / (alpha**2 * self.residual + sigma**2)
        weighted = weights * centred
        system = torch.diag(1.0 / self.variances) + alpha[:, :, None] ** 2 * (self.basis * weights[:, None]) @ self.basis.T
        factors = torch.linalg.solve(system.expand(len(x), -1, -1), (weighted @ self.basis.T)[..., None])[..., 0]
        q = weighted - alpha**2 * weights * (factors @ self.basis)
        noise = sigma * q
        clean = mean + alpha * (self.residual * q + ((q @ self.basis.T) * self.variances) @ self.basis)
        match self.process.prediction_type:
            case "epsilon":
                prediction = noise
            case "v_prediction":
                prediction = alpha * noise - sigma * clean
            case "flow":
                prediction = noise - clean
        return prediction.reshape(x.shape), clean.reshape(x.shape)

    def features(self, covariates: Tensor) -> Tensor:
        """The torch twin of `models.latents.covariate_features`, (b, k) -> (b, F)."""
        columns = []
        for value, count in zip(covariates.T, self.levels, strict=True):
            known = torch.isfinite(value)
            if count == 0:
                columns.append(torch.where(known, value, 0.0))
            else:
                columns += [torch.where(known, (value == level).float() - 1.0 / count, 0.0) for level in range(count)]
        return torch.stack(columns, 1)
