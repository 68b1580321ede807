"""Euler's method on a rectified flow."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, flow_timesteps

ENTRY = {
    "order": 7,
    "summary": "Euler steps of equal length on a rectified flow; can be inverted",
    "source": "Liu et al. 2023, Flow straight and fast, equation 1",
    "default_steps": 50,
    "processes": ["flow"],
    "evaluations": "steps",
    "stochastic": False,
}

timesteps = flow_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """x' = x + (sigma' - sigma) * velocity. With velocity = noise - x0 and alpha = 1 - sigma, that is DDIM's step."""

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        return levels.towards(i, x, estimate(x, i))

    return step
