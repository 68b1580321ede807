"""The forward process: how much of a clean latent is left at each timestep, and what the network predicts there.

One object is shared by training, sampling and inversion. Its tables (`core.schedules`) are read-only. Notation:
`x = alpha * x0 + sigma * noise`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self, get_args

import numpy as np
import torch
from scipy.special import expit, ndtri
from torch import Tensor

from meddiff_steps.core.schedules import PredictionType, ProcessSettings, alphas_cumprod


@dataclass(frozen=True, eq=False)
class NoiseProcess:
    """Forward process and prediction target of one study; make it with `NoiseProcess.of(study.diffusion)`.

    Timesteps are numbers, not only integers. For `epsilon` and `v_prediction` they run from 0 (nearly clean) to
    num_train_timesteps - 1 (nearly noise), and the log-SNR is interpolated between integers. For `flow` they run from
    0 (clean) to num_train_timesteps (noise) on the straight path of rectified flow (Liu et al. 2023).
    """

    prediction_type: PredictionType
    num_train_timesteps: int
    #: float64 (num_train_timesteps,), read-only; None for `flow`.
    alphas_cumprod: np.ndarray | None
    _log_ratio: np.ndarray = field(repr=False)  # log(sigma / alpha) at each integer timestep, increasing
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, settings: ProcessSettings) -> Self:
        """The process that a study's `diffusion` section, or anything with its attributes, describes.

        For `flow` only `prediction_type` and `num_train_timesteps` are read.

        Raises
        ------
        ValueError
            There is no such prediction type or schedule.
        """
        if settings.prediction_type not in get_args(PredictionType):
            names = ", ".join(get_args(PredictionType))
            raise ValueError(f"prediction_type: expected one of {names}, found {settings.prediction_type!r}")
        if settings.prediction_type == "flow":
            return cls("flow", settings.num_train_timesteps, None, np.empty(0))
        table = alphas_cumprod(settings)
        ratio = 0.5 * (np.log1p(-table) - np.log(table))
        table.setflags(write=False)
        ratio.setflags(write=False)
        return cls(settings.prediction_type, settings.num_train_timesteps, table, ratio)

    @property
    def is_flow(self) -> bool:
        return self.prediction_type == "flow"

    @property
    def last_timestep(self) -> float:
        """The noisiest timestep, at which sampling starts."""
        return float(self.num_train_timesteps if self.is_flow else self.num_train_timesteps - 1)

    def training_timesteps(self, uniform: np.ndarray, mean: float, deviation: float) -> np.ndarray:
        """Timesteps to train on, float32 (b,), from uniform numbers (b,) in (0, 1).

        ln(sigma / alpha) is normal with this mean and deviation (Karras et al. 2022, section 5), and cut off where the
        process ends.
        """
        return self.timesteps_at(mean + deviation * ndtri(np.clip(uniform, 1e-6, 1 - 1e-6))).astype(np.float32)

    def timesteps_at(self, log_ratio: np.ndarray) -> np.ndarray:
        """The timesteps at which ln(sigma / alpha) is `log_ratio`, or the nearest there are; float64."""
        if self.is_flow:
            return self.num_train_timesteps * expit(log_ratio)
        return np.interp(log_ratio, self._log_ratio, np.arange(self.num_train_timesteps))

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise amplitude at `timesteps` (any shape), two float64 tensors of that shape.

        alpha**2 + sigma**2 = 1, or alpha + sigma = 1 for `flow`.

        Raises
        ------
        ValueError
            A timestep is outside the process (checked on the CPU only; elsewhere it would cost a synchronisation).
        """
        timesteps = timesteps.double()
        checked = timesteps.device.type == "cpu" and timesteps.numel() > 0
        if checked and not (timesteps.min() >= 0 and timesteps.max() <= self.last_timestep):
            raise ValueError(
                f"timesteps must be in [0, {self.last_timestep:g}], found [{timesteps.min():g}, {timesteps.max():g}]"
            )
        if self.is_flow:
            sigma = timesteps / self.num_train_timesteps
            return 1.0 - sigma, sigma
        if timesteps.device not in self._on_device:
            self._on_device[timesteps.device] = torch.tensor(self._log_ratio, device=timesteps.device)
        table = self._on_device[timesteps.device]
        below = timesteps.floor().clamp(0, self.num_train_timesteps - 2).long()
        log_ratio = torch.lerp(table[below], table[below + 1], timesteps - below)
        return torch.sigmoid(-2 * log_ratio).sqrt(), torch.sigmoid(2 * log_ratio).sqrt()

    def timestep_at(self, ratio: float) -> float:
        """The timestep at which sigma / alpha is `ratio` (sigma itself for `flow`); the inverse of `alpha_sigma`."""
        if self.is_flow:
            return float(ratio) * self.num_train_timesteps
        return float(np.interp(np.log(ratio), self._log_ratio, np.arange(self.num_train_timesteps)))

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents at `timesteps` (b,): alpha * x0 + sigma * noise, (b, c, *spatial), at least float32."""
        alpha, sigma = self._like(x0, timesteps)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict, (b, c, *spatial).

        `epsilon`: noise (Ho et al. 2020). `v_prediction`: alpha * noise - sigma * x0 (Salimans and Ho 2022).
        `flow`: noise - x0 (Liu et al. 2023; time runs from data to noise).
        """
        if self.prediction_type == "epsilon":
            return noise
        if self.is_flow:
            return noise - x0
        alpha, sigma = self._like(x0, timesteps)
        return alpha * noise - sigma * x0

    def to_x0(self, model_output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """The clean latents that a prediction implies, (b, c, *spatial)."""
        alpha, sigma = self._like(x, timesteps)
        if self.prediction_type == "epsilon":
            return (x - sigma * model_output) / alpha
        if self.is_flow:
            return x - sigma * model_output
        return alpha * x - sigma * model_output

    def to_noise(self, model_output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """The noise that a prediction implies, (b, c, *spatial)."""
        if self.prediction_type == "epsilon":
            return model_output
        alpha, sigma = self._like(x, timesteps)
        if self.is_flow:
            return x + alpha * model_output
        return alpha * model_output + sigma * x

    def to_velocity(self, model_output: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """The direction of motion that a prediction implies, (b, c, *spatial): the target of `v_prediction` or flow."""
        if self.prediction_type != "epsilon":
            return model_output
        alpha, sigma = self._like(x, timesteps)
        return (model_output - sigma * x) / alpha

    def _like(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes (b, 1, ...) that broadcast over `x`, in float32 or, for float64 latents, float64.

        Half-precision latents are promoted by them: near the clean end, 1 - alpha**2 has no half-precision value.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = self.alpha_sigma(timesteps.to(x.device))
        return alpha.to(dtype).reshape(shape), sigma.to(dtype).reshape(shape)
