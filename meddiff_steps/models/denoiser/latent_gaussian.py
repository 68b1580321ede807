"""What the diffusion model knows before its UNet is trained: a Gaussian in closed form, and a small network on its
components.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from monai.networks.nets.diffusion_model_unet import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional

from meddiff_steps.diffusion.schedules import NoiseProcess

#: Width of the embedding of the timestep.
TIME_DIM = 64

#: Residual blocks of a component network.
BLOCKS = 3

#: Leading components that a component network corrects; those behind them vary little and look Gaussian.
LEARNT_COMPONENTS = 64


class LatentGaussian(nn.Module):
    """Best estimates of clean latents and noise if latents were x0 | c ~ N(features(c) @ effects, S).

    S has principal components, `basis` (R, D) with `variances` (R,), and beside them a covariance of the c channels at
    each of the P positions: its eigenvectors `local_basis` (P, c, c), in columns, and eigenvalues `local_variances` (P,
    c); see `models.latent_statistics.fit_gaussian`.  What all subjects share, linear effects of covariates, how distant
    places vary together and what the channels at one place have to do with each other thus need no training.

    Heads of different size do not differ along straight lines, though.  How the leading components depend on each other
    and on the covariates is learnt by a `ComponentNet`, which corrects the Gaussian's estimate of their coefficients
    and costs next to nothing beside the UNet.

    Parameters
    ----------
    process
        The forward process.
    latent_shape
        (c, *spatial), D numbers in all.
    levels
        Per covariate: the number of levels, or 0 for a continuous one.
    rank
        R.
    width
        Width of the component network; 0 leaves it out.
    """

    effects: Tensor
    basis: Tensor
    variances: Tensor
    local_basis: Tensor
    local_variances: Tensor

    def __init__(
        self, process: NoiseProcess, latent_shape: Sequence[int], levels: list[int], rank: int, width: int = 0
    ) -> None:
        super().__init__()
        self.process, self.levels = process, levels
        size, features = math.prod(latent_shape), sum(n or 1 for n in levels)
        self.register_buffer("effects", torch.zeros(features, size))
        self.register_buffer("basis", torch.zeros(rank, size))
        self.register_buffer("variances", torch.ones(rank))
        channels, positions = latent_shape[0], size // latent_shape[0]
        self.register_buffer("local_basis", torch.eye(channels).expand(positions, -1, -1).clone())
        self.register_buffer("local_variances", torch.ones(positions, channels))
        self.learnt = min(rank, LEARNT_COMPONENTS)
        self.network = ComponentNet(self.learnt, features + len(levels), width) if width else None

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor, timesteps: Tensor, covariates: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the noise and of the clean latents in x = alpha * x0 + sigma * noise; each (b, c, *spatial)
        float32.

        E[x0 | x] = m + alpha S q and E[noise | x] = sigma q with q = (alpha^2 S + sigma^2)^-1 (x - alpha m).
        Components are orthonormal, so they are solved each on its own; the rest is solved position by position, without
        its projection on the components (exact where all local variances are equal, and else up to the R / D of it that
        components take).
        """
        alpha, sigma = (a.float()[:, None] for a in self.process.alpha_sigma(timesteps))
        mean = covariate_features(covariates, self.levels) @ self.effects
        centred = x.float().flatten(1) - alpha * mean
        y = centred @ self.basis.T
        marginal = alpha**2 * self.variances + sigma**2
        shift = self.deviations(timesteps) * self.correction(y, timesteps, covariates)  # of the clean coefficients
        local = torch.einsum("bcp,pck->bkp", centred.unflatten(1, (x.shape[1], -1)), self.local_basis)
        local_variances = self.local_variances.T
        weighted = local / (alpha[..., None] ** 2 * local_variances + sigma[..., None] ** 2)
        noise = self._assemble(sigma[..., None] * weighted, sigma * y / marginal - alpha / sigma * shift)
        clean = mean + self._assemble(
            alpha[..., None] * local_variances * weighted, alpha * self.variances * y / marginal + shift
        )
        return noise.reshape(x.shape), clean.reshape(x.shape)

    def _assemble(self, local: Tensor, coefficients: Tensor) -> Tensor:
        """(b, D) from its coefficients and, for all else, `local` (b, c, P) in the coordinates of `local_basis`."""
        rest = torch.einsum("bkp,pck->bcp", local, self.local_basis).flatten(1)
        return rest + (coefficients - rest @ self.basis.T) @ self.basis

    def deviations(self, timesteps: Tensor) -> Tensor:
        """Posterior standard deviation of each clean coefficient, (b, R): sqrt(v) sigma / sqrt(alpha^2 v + sigma^2)."""
        alpha, sigma = (a.float()[:, None] for a in self.process.alpha_sigma(timesteps))
        return self.variances.sqrt() * sigma * (alpha**2 * self.variances + sigma**2).rsqrt()

    def correction(self, y: Tensor, timesteps: Tensor, covariates: Tensor) -> Tensor:
        """What to add to the Gaussian's estimate of the coefficients, in posterior standard deviations, (b, R).

        Parameters
        ----------
        y
            Noisy coefficients less alpha times those of the mean, (b, R).

        Components behind the leading ones are not corrected.
        """
        if self.network is None:
            return torch.zeros_like(y)
        alpha, sigma = (a.float()[:, None] for a in self.process.alpha_sigma(timesteps))
        known = torch.isfinite(covariates).float()
        context = torch.cat([covariate_features(covariates, self.levels), known], 1)
        standardised = (y * (alpha**2 * self.variances + sigma**2).rsqrt())[:, : self.learnt]
        return functional.pad(self.network(standardised, timesteps, context), (0, y.shape[1] - self.learnt))


class ComponentNet(nn.Module):
    """Residual perceptron on standardised coefficients; starts at zero.

    Parameters
    ----------
    rank
        Coefficients in and out.
    context
        Numbers that describe the covariates.
    width
        Hidden units.
    dropout
        Probability that a hidden unit is left out in training.
    """

    def __init__(self, rank: int, context: int, width: int, dropout: float = 0.3) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(TIME_DIM + context, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.first = nn.Linear(rank, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(BLOCKS))
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(BLOCKS))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width))
            for _ in range(BLOCKS)
        )
        self.last = nn.Linear(width, rank)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, y: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """y (b, rank), timesteps (b,), context (b, context) -> (b, rank)."""
        embedding = self.embed(torch.cat([get_timestep_embedding(timesteps, TIME_DIM), context], 1))
        hidden = self.first(y)
        for norm, modulation, block in zip(self.norms, self.modulations, self.blocks, strict=True):
            gain, bias = modulation(embedding).chunk(2, 1)
            hidden = hidden + block(norm(hidden) * (1.0 + gain) + bias)
        return self.last(hidden)


def covariate_features(covariates: Tensor, levels: list[int]) -> Tensor:
    """The torch twin of `models.latent_statistics.covariate_features`, (b, k) -> (b, F)."""
    columns = []
    for value, count in zip(covariates.T, levels, strict=True):
        known = torch.isfinite(value)
        if count == 0:
            columns.append(torch.where(known, value, 0.0))
        else:
            columns += [torch.where(known, (value == level).float() - 1.0 / count, 0.0) for level in range(count)]
    return torch.stack(columns, 1)
