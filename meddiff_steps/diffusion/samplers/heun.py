"""Heun's method: an Euler step, and the mean of the directions at its two ends."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, karras_timesteps

ENTRY = {
    "order": 4,
    "summary": "Second order without memory, two evaluations per step",
    "source": "Karras et al. 2022, Elucidating the design space of diffusion-based generative models, algorithm 1",
    "default_steps": 18,
    "processes": ["variance_preserving"],
    "evaluations": "2 * steps - 1",
    "stochastic": False,
}

timesteps = karras_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """The paper's x and sigma are x / alpha and sigma / alpha here, and its d is the noise."""

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        noise = levels.noise(i, x, estimate(x, i))
        euler = levels.along(i, x, noise)
        if levels.sigma[i + 1] == 0.0:
            return euler
        there = levels.noise(i + 1, euler, estimate(euler, i + 1))
        return levels.along(i, x, (noise + there) / 2)

    return step
