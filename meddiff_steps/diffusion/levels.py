"""Noise levels of a run: where the network is asked, and how a state is carried from one level to the next.

Levels are kept as amplitudes (alpha, sigma), in which variance-preserving processes and flows look alike. Timesteps
are numbers, not only integers: the network is told the timestep of exactly the level at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.schedules import NoiseProcess

#: Largest sigma / alpha at which sampling starts (Karras et al. 2022, table 1). Cosine and zero-terminal-SNR schedules
#: go far beyond; with it, 20 steps spend none of themselves on differences of no consequence.
MAX_RATIO = 80.0

#: Smallest nonzero sigma / alpha of a multistep solver on a flow, which has no smallest level of its own. Uniform
#: levels end at 1 / steps, and keep only two thirds of details whose std is 0.05 (20 steps); this keeps 93 %.
MIN_FLOW_RATIO = 0.02

#: A sampler's own level is left out where it is nearer than this share of a step to where a run starts or stops:
#: multistep solvers divide by the length of the step before, and would multiply the network's rounding errors.
SHORTEST_STEP = 0.05

#: estimate(x, level) -> the network's estimate of the clean latents, guidance included, at the timestep of `level`.
Estimate = Callable[[Tensor, int], Tensor]
#: step(i, x, estimate) -> state at level i + 1 from the state x at level i; called for i = 0, 1, ... in order.
Step = Callable[[int, Tensor, Estimate], Tensor]
#: step_noise(i) -> standard normal noise (b, c, *spatial) for step i.
StepNoise = Callable[[int], Tensor]


@dataclass(frozen=True)
class Levels:
    """Levels of one run, from noisy to clean; a run of n steps has n + 1 of them.

    Attributes
    ----------
    timesteps
        Of the levels, falling. A run that ends with clean latents has n of them: its last level has no timestep.
    alpha, sigma
        Signal and noise amplitude, n + 1 numbers each; (1, 0) is clean.
    first
        Number of the first step in the sampler's full run: more than 0 where a run starts midway.  0 where it starts
        noisier than a full run, too: from there every step has the number after its own, as none is below 0.
    """

    timesteps: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    first: int = 0

    @classmethod
    def of(cls, process: NoiseProcess, own: np.ndarray, start: float | None = None, stop: float | None = None) -> Self:
        """The part of a full run between two timesteps.

        Parameters
        ----------
        process
            The forward process.
        own
            Timesteps (steps,), falling, of the full run.
        start
            First level of the part, followed by those of the full run that are cleaner; its noisiest by default.
        stop
            Last level of the part; clean latents by default.

        Raises
        ------
        UserError
            There is no such timestep, or no step lies between the two.
        """
        _check_ends(process, own, start, stop)
        low, high = 0, len(own)
        if start is not None:
            low = math.ceil(_position(own, start) + SHORTEST_STEP)
        if stop is not None:
            high = math.floor(_position(own, stop) - SHORTEST_STEP) + 1
        first, last = ([] if end is None else [end] for end in (start, None if stop == start else stop))
        timesteps = np.concatenate([first, own[low : max(low, high)], last])
        alpha, sigma = (values.tolist() for values in process.alpha_sigma(torch.from_numpy(timesteps)))
        if stop is None:
            alpha, sigma = [*alpha, 1.0], [*sigma, 0.0]
        return cls(tuple(timesteps.tolist()), tuple(alpha), tuple(sigma), max(low - 1, 0))

    @property
    def steps(self) -> int:
        return len(self.alpha) - 1

    @cached_property
    def ratio(self) -> tuple[float, ...]:
        """sigma / alpha of each level; infinite at pure noise."""
        return tuple(s / a if a else math.inf for a, s in zip(self.alpha, self.sigma, strict=True))

    @cached_property
    def log_snr(self) -> tuple[float, ...]:
        """log(alpha / sigma) of each level: the half log-SNR lambda of Lu et al. 2022; infinite at either end."""
        return tuple(-math.log(r) if r else math.inf for r in self.ratio)

    def towards(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """The state at level i + 1 on the straight way from the state x at level i to the clean latents x0.

        That is alpha' x0 + sigma' noise with the noise that x and x0 imply: DDIM (Song et al. 2021, equation 12 with
        eta = 0), an Euler step on a flow (Liu et al. 2023), the first-order step of DPM-Solver++ (Lu et al. 2022).
        """
        shrink = self.sigma[i + 1] / self.sigma[i]
        return shrink * x + (self.alpha[i + 1] - shrink * self.alpha[i]) * x0

    def along(self, i: int, x: Tensor, noise: Tensor) -> Tensor:
        """The state at level i + 1, from the state x at level i by an Euler step along `noise`.

        The differential equation is d(x / alpha) / d(sigma / alpha) = noise (Song et al. 2021, equation 14).
        """
        return self.alpha[i + 1] * (x / self.alpha[i] + (self.ratio[i + 1] - self.ratio[i]) * noise)

    def noise(self, i: int, x: Tensor, x0: Tensor) -> Tensor:
        """The noise that a state and an estimate of its clean latents imply at level i."""
        return (x - self.alpha[i] * x0) / self.sigma[i]


def karras_timesteps(process: NoiseProcess, steps: int) -> np.ndarray:
    """Timesteps (steps,), falling, of the noise levels of Karras et al. 2022, equation 5 with rho = 7.

    They put more steps where details are made: with 100 steps of DDIM and the default schedule, details with a std of
    0.1 keep 91 % of it, against 78 % on equidistant timesteps.
    """
    if process.is_flow:
        largest, smallest = MAX_RATIO, MIN_FLOW_RATIO
    else:
        alpha, sigma = process.alpha_sigma(torch.tensor([process.last_timestep, 0.0]))
        largest, smallest = (sigma / alpha).tolist()
        largest = min(largest, MAX_RATIO)
    ramp = np.linspace(0, 1, steps)
    ratios = (largest ** (1 / 7) + ramp * (smallest ** (1 / 7) - largest ** (1 / 7))) ** 7
    return np.array([process.timestep_at(r / (1 + r) if process.is_flow else r) for r in ratios])


def halving_timesteps(process: NoiseProcess, steps: int) -> np.ndarray:
    """Timesteps (steps,), falling, of equal steps of the angle arctan(sigma / alpha), which end at clean latents.

    Of the levels of 2n steps every second one is a level of n steps, as progressive distillation needs (Salimans and Ho
    2022, whose alpha is cos(pi / 2 * t)).  No other levels than those up to MAX_RATIO.
    """
    angle = np.pi / 2 * (1.0 - np.arange(steps) / steps)
    return process.timesteps_at(np.log(np.tan(angle).clip(0.0, MAX_RATIO)))


def flow_timesteps(process: NoiseProcess, steps: int) -> np.ndarray:
    """Equidistant timesteps (steps,) of a rectified flow, from pure noise to one step before clean."""
    return process.num_train_timesteps * np.linspace(1.0, 1.0 / steps, steps)


def trained_timesteps(process: NoiseProcess, steps: int) -> np.ndarray:
    """Timesteps (steps,) of training, as equidistant as integers are, from the noisiest to 0.

    Raises
    ------
    UserError
        Training had fewer.
    """
    if steps > process.num_train_timesteps:
        raise UserError(
            f"num_inference_steps: ddpm can take at most the {process.num_train_timesteps} steps of training, "
            f"found {steps}. Ask for fewer, or use dpmpp."
        )
    return np.linspace(process.last_timestep, 0, steps).round()


def _position(own: np.ndarray, timestep: float) -> float:
    """Where a timestep is among those of a full run, in steps from the first; between -1 and len(own)."""
    before = 2 * own[0] - (own[1] if len(own) > 1 else 0.0)
    grid = np.concatenate([[before], own, [0.0] if own[-1] > 1e-6 else []])
    return float(np.interp(timestep, grid[::-1], np.arange(len(grid))[::-1] - 1.0))


def _check_ends(process: NoiseProcess, own: np.ndarray, start: float | None, stop: float | None) -> None:
    last = process.last_timestep
    if start is not None and not (0 <= start <= last and (start > 0 or not process.is_flow)):
        above = "above 0, which is clean already, and" if process.is_flow else "from 0"
        raise UserError(f"start: expected a timestep {above} up to {last:g}, found {start:g}")
    if stop is None:
        return
    if not 0 <= stop <= last:
        raise UserError(f"stop: expected a timestep from 0 to {last:g}, found {stop:g}")
    if start is None and _position(own, stop) < SHORTEST_STEP:
        raise UserError(f"stop: expected a timestep below {own[0]:g}, where the run begins, found {stop:g}")
    if start is not None and stop > start:
        raise UserError(f"stop: expected a timestep cleaner than start, which is {start:g}, found {stop:g}")
