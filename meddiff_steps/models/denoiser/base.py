"""The second stage as everything else sees it: what noise hides, from noisy latents, the time and a condition."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from meddiff_steps import config
from meddiff_steps.core.registries import DENOISERS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.levels import halving_timesteps
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.models.denoiser.effects import CovariateEffects, Estimate
from meddiff_steps.models.latent_statistics import Standardisation
from meddiff_steps.models.text_encoder import TextEncoder


class Denoiser(nn.Module):
    """Predicts epsilon, v or the flow velocity from noisy latents, the time and the condition.

    What needs no training is computed: `CovariateEffects` estimates clean latents and noise as if latents were linear
    in the covariates and otherwise white.  The network that `settings.network` names (`DENOISERS`) sees the surprise
    that is left, of unit variance, and gives what to add to the estimate, in posterior standard deviations.  Its target
    has unit variance at every level too.  That is the preconditioning of Karras et al. 2022 (EDM, table 1) about a mean
    that depends on the covariates; written in amplitudes, it is the same for every prediction type.

    Parameters
    ----------
    settings
        The study's `diffusion` section.
    latent_shape
        (c, *spatial).
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    variants
        Numbers that describe a variant of a training image, which the network is told (`Condition.variant`).
    steps
        Of a student (`few_step`): levels, from each of which it leads to the next; 1 leads from any to clean latents.
    maps, tokens
        Channels of every map and width of every kind of token that conditions may hold, by name.
    names
        Of the covariates, in their order; needed by a network that is told some of them (`published`).

    A network whose ENTRY says `whole` gives the prediction itself: nothing is computed beside it.
    """

    offset: Tensor
    scale: Tensor

    def __init__(
        self,
        settings: config.Diffusion,
        latent_shape: Sequence[int],
        levels: list[int],
        variants: int = 0,
        maps: Mapping[str, int] | None = None,
        tokens: Mapping[str, int] | None = None,
        steps: int | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.steps = steps
        #: Whether the network gives the prediction itself, not what is to be added to a closed form.
        self.whole = bool(DENOISERS.entry(settings.network).get("whole", False))
        told: dict[str, Any] = {"variants": variants, "maps": dict(maps or {}), "tokens": dict(tokens or {})}
        if self.whole:
            told["names"] = tuple(names)
        self.process = NoiseProcess.of(settings)
        # How latents were standardised travels with the weights, so that it cannot be lost or mistyped.
        self.register_buffer("offset", torch.zeros(1, *latent_shape))
        self.register_buffer("scale", torch.ones(()))
        self.effects = CovariateEffects(latent_shape, levels)

        def network() -> Any:
            return DENOISERS.load(settings.network).build(settings, latent_shape, levels, **told)

        self.network = network()
        #: What makes tokens of texts, once somebody put it here; its weights are then among this model's.
        self.text: TextEncoder | None = None
        #: The same network, less trained, for autoguidance; None where none is kept.
        self.guide = network().requires_grad_(False) if settings.guide_share else None

    @property
    def costly(self) -> list[nn.Module]:
        """The parts that take nearly all of the time, called by tensors of one shape: what is worth compiling."""
        return [*self.network.costly, *(self.guide.costly if self.guide is not None else [])]

    @property
    def standardisation(self) -> Standardisation[Tensor]:
        return Standardisation(self.offset, self.scale)

    def prior(self) -> dict[str, np.ndarray]:
        """All that is not trained, as step `scale` writes it: standardisation, and effects of the covariates."""
        effects = {f"effects.{name}": value for name, value in self.effects.state_dict().items()}
        state = {"offset": self.offset, "scale": self.scale, **effects}
        return {name: value.detach().cpu().numpy() for name, value in state.items()}

    def standardise(self, latents: Tensor) -> Tensor:
        """What this model denoises, from the first stage's latents; (b, c, *spatial) both."""
        return self.standardisation(latents)

    def latents(self, standardised: Tensor) -> Tensor:
        """The first stage's latents from what this model generates; the inverse of `standardise`."""
        return self.standardisation.inverse(standardised)

    def forward(self, x: Tensor, timesteps: Tensor, condition: Condition, guide: bool = False) -> Tensor:
        """x (b, c, *spatial), timesteps (b,) -> (b, c, *spatial) float32; of the network, or of its `guide`."""
        network = self.guide if guide else self.network
        assert network is not None, "this model keeps no guide"
        if self.whole:
            return network(x, timesteps, condition).float()
        known = self.known(x, timesteps, condition)
        learnt = self.effects.outside_readout(network(known.surprise, timesteps, condition).float())
        return self.process.target(known.clean, known.noise, timesteps) + self.gain(timesteps, x.ndim) * learnt

    def known(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Estimate:
        """What needs no training: the posterior mean, which short steps may follow.

        With `steps`, the x0 that leads to the next of so many levels (`diffusion.levels.halving_timesteps`) on the
        exact path under the same prior (`CovariateEffects.path`).  So a student that has learnt nothing draws latents
        of the right mean and spread in one step, and covariates along the readout keep their spread.
        """
        alpha, sigma = self.process.alpha_sigma(timesteps)
        found = self.effects(x, alpha, sigma, condition.covariates)
        if self.steps is None:
            return found
        sigma = sigma.clamp_min(1e-6)  # a flow ends at 0
        levels = torch.from_numpy(halving_timesteps(self.process, self.steps)).to(timesteps.device)
        level = (timesteps[:, None] - levels).abs().argmin(1)
        # The level that follows, as arctan(sigma / alpha): a path does not depend on how amplitudes are scaled.
        angle = math.pi / 2 * (1.0 - (level.double() + 1) / self.steps)
        clean = self.effects.path(x, alpha, sigma, angle.cos(), angle.sin(), condition.covariates)
        alpha, sigma = (a.float().reshape(-1, *[1] * (x.ndim - 1)) for a in (alpha, sigma))
        return replace(found, clean=clean, noise=(x.float() - alpha * clean) / sigma)

    def taking(self, steps: int) -> Self:
        """The same weights, not copied, with the closed form for so many steps; of many steps it is what it was."""
        made = copy.copy(self)
        made.steps = steps
        return made

    def gain(self, timesteps: Tensor, ndim: int) -> Tensor:
        """What a unit of the network's output adds to the prediction, float32 (b, 1, ...) with `ndim` axes."""
        return gain(self.process, self.effects.deviation, timesteps, ndim)


def gain(process: NoiseProcess, deviation: Tensor | float, timesteps: Tensor, ndim: int) -> Tensor:
    """What it means for the prediction of `process` to add one posterior deviation to the estimate of x0.

    x0 of this `deviation` has the posterior deviation s = deviation * sigma / sqrt(alpha^2 deviation^2 + sigma^2).
    What is added to x0 is taken from the noise, so that x = alpha * x0 + sigma * noise stays: s, and -s * alpha /
    sigma.
    """
    alpha, sigma = (a.float().reshape(-1, *[1] * (ndim - 1)) for a in process.alpha_sigma(timesteps))
    per_noise = deviation * (alpha.square() * deviation**2 + sigma.square()).rsqrt()
    return process.target(per_noise * sigma, -per_noise * alpha, timesteps)
