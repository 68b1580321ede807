"""The second stage as everything else sees it: what noise hides, from noisy latents, the time and a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import DENOISERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.latent_gaussian import LatentGaussian
from meddiff_steps.models.latent_statistics import Standardisation

#: Hidden units of the prior's component network.
COMPONENT_WIDTH = 256


class Denoiser(nn.Module):
    """Predicts epsilon, v or the flow velocity from noisy latents, the time and the condition.

    Two parts are added.  The `LatentGaussian` knows what all subjects share, the effects of covariates and how distant
    places vary together.  The network that `settings.network` names (`DENOISERS`), which starts at zero, learns all
    else. It sees the noisy latents and the Gaussian's estimate of the clean ones.

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    latent_shape
        (c, *spatial).
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    rank
        Components of the Gaussian; 0 leaves it out.
    maps, tokens
        Channels of every map and width of every kind of token that conditions may hold, by name.
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        settings: config.Diffusion,
        latent_shape: Sequence[int],
        levels: list[int],
        rank: int = 0,
        maps: Mapping[str, int] | None = None,
        tokens: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        latent_channels, *spatial = latent_shape
        self.process = NoiseProcess.of(settings)
        # How latents were standardised travels with the weights, so that it cannot be lost or mistyped.
        self.register_buffer("offset", torch.zeros(1, *latent_shape))
        self.register_buffer("scale", torch.ones(1, latent_channels, *(1,) * len(spatial)))
        width = COMPONENT_WIDTH if settings.component_steps else 0
        self.prior = LatentGaussian(self.process, latent_shape, levels, rank, width) if rank else None
        self.network: Any = DENOISERS.load(settings.network).build(
            settings, latent_shape, levels, inputs=2 if rank else 1, maps=dict(maps or {}), tokens=dict(tokens or {})
        )

    @property
    def costly(self) -> list[nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return self.network.costly

    @property
    def standardisation(self) -> Standardisation[Tensor]:
        return Standardisation(self.offset, self.scale)

    def standardise(self, latents: Tensor) -> Tensor:
        """What this model denoises, from the first stage's latents; (b, c, *spatial) both."""
        return self.standardisation(latents)

    def latents(self, standardised: Tensor) -> Tensor:
        """The first stage's latents from what this model generates; the inverse of `standardise`."""
        return self.standardisation.inverse(standardised)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """x (b, c, *spatial), timesteps (b,) -> (b, c, *spatial) float32."""
        if self.prior is None:
            return self.network([x], timesteps, condition).float()
        noise, clean = self.prior(x, timesteps, condition.covariates)
        learnt = self.network([x, clean], timesteps, condition).float()
        return learnt + self.process.target(clean, noise, timesteps)
