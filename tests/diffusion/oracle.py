"""Exact denoisers of distributions whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meddiff_steps.core.schedules import PredictionType, Schedule
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.schedules import NoiseProcess


@dataclass
class Settings:
    """What a process is made from; a study's `diffusion` section has the same defaults."""

    prediction_type: PredictionType = "v_prediction"
    num_train_timesteps: int = 1000
    schedule: Schedule = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0205
    zero_terminal_snr: bool = False


def process_of(prediction_type: str = "v_prediction", **settings: object) -> NoiseProcess:
    return NoiseProcess.of(Settings(prediction_type, **settings))  # type: ignore[arg-type]


class MixtureDenoiser:
    """E[prediction | x] for data from a mixture of equally spread Gaussians; every voxel is on its own.

    The first covariate, where given, is added to the means. `calls` records the condition of each pass, and `timesteps`
    that of its first subject.
    """

    def __init__(self, process: NoiseProcess, std: float = 0.5, means: Sequence[float] = (0.0,)) -> None:
        self.process, self.std, self.means = process, std, means
        self.calls: list[Condition] = []
        self.timesteps: list[float] = []

    def __call__(self, x: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        assert timesteps.shape == (x.shape[0],) and timesteps.dtype == torch.float32
        self.calls.append(condition)
        self.timesteps.append(timesteps[0].item())
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (v.reshape(shape) for v in self.process.alpha_sigma(timesteps))
        variance = (alpha * self.std) ** 2 + sigma**2
        shift = torch.nan_to_num(condition.covariates[:, 0]).double().reshape(shape)
        means = torch.stack([shift + m for m in self.means])
        residual = x.double() - alpha * means
        weight = torch.softmax(-(residual**2) / (2 * variance), dim=0)
        x0 = (weight * (means + alpha * self.std**2 / variance * residual)).sum(0)
        noise = torch.where(sigma > 0, (x.double() - alpha * x0) / sigma, torch.zeros_like(x0))
        return self.process.target(x0, noise, timesteps).to(x.dtype)

    def spread(self, timestep: float) -> float:
        """Std of a state where there is one Gaussian; the exact flow keeps x / spread."""
        alpha, sigma = self.process.alpha_sigma(torch.tensor(timestep, dtype=torch.float64))
        return float(torch.hypot(alpha * self.std, sigma))


def told(values: float | Sequence[float], n: int = 1) -> Condition:
    """A condition with one covariate: a value for each of n subjects, or a list of values."""
    return Condition(torch.tensor([values] * n if isinstance(values, float) else values)[:, None])


def standard_normal(n: int, seed: int = 1) -> Tensor:
    """n numbers (n, 1, 1) whose mean is 0 and std is 1 exactly, so that a sampler's error is not hidden by chance."""
    half = torch.randn(n // 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([half, -half])
    return both / both.std(correction=0)
