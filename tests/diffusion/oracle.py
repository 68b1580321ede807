"""Exact denoisers of distributions whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meddiff_steps.config import Diffusion
from meddiff_steps.diffusion.schedules import NoiseProcess


def process_of(prediction_type: str = "v_prediction", **settings: object) -> NoiseProcess:
    return NoiseProcess.of(Diffusion.model_validate({"prediction_type": prediction_type, **settings}))


class MixtureDenoiser:
    """E[prediction | x] for data from a mixture of equally spread Gaussians; every voxel is on its own.

    The first covariate, where given, is added to the means.  `calls` records the covariates of each pass.
    """

    def __init__(self, process: NoiseProcess, std: float = 0.5, means: Sequence[float] = (0.0,)) -> None:
        self.process, self.std, self.means = process, std, means
        self.calls: list[Tensor] = []

    def __call__(self, x: Tensor, timesteps: Tensor, covariates: Tensor) -> Tensor:
        assert timesteps.shape == (x.shape[0],) and timesteps.dtype == torch.float32
        self.calls.append(covariates)
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (v.reshape(shape) for v in self.process.alpha_sigma(timesteps))
        variance = (alpha * self.std) ** 2 + sigma**2
        shift = torch.nan_to_num(covariates[:, 0]).double().reshape(shape)
        means = torch.stack([shift + m for m in self.means])
        residual = x.double() - alpha * means
        weight = torch.softmax(-(residual**2) / (2 * variance), dim=0)
        x0 = (weight * (means + alpha * self.std**2 / variance * residual)).sum(0)
        noise = torch.where(sigma > 0, (x.double() - alpha * x0) / sigma, torch.zeros_like(x0))
        return self.process.target(x0, noise, timesteps).float()


def standard_normal(n: int, seed: int = 1) -> Tensor:
    """n numbers (n, 1, 1) whose mean is 0 and std is 1 exactly, so that a sampler's error is not hidden by chance."""
    half = torch.randn(n // 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([half, -half])
    return both / both.std(correction=0)
