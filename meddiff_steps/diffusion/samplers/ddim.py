"""Denoising diffusion implicit models: to the next level on the straight way to the estimate."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, karras_timesteps

ENTRY = {
    "order": 2,
    "summary": "Deterministic, one evaluation per step; the one that can be inverted",
    "source": "Song et al. 2021, Denoising diffusion implicit models, equation 12 with eta = 0",
    "default_steps": 75,
    "processes": ["variance_preserving"],
    "evaluations": "steps",
    "stochastic": False,
}

timesteps = karras_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """x' = alpha' x0 + sigma' noise."""

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        return levels.towards(i, x, estimate(x, i))

    return step
