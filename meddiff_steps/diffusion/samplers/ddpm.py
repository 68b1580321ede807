"""Denoising diffusion probabilistic models: ancestral sampling, backwards through the chain of training."""

from __future__ import annotations

import math

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, trained_timesteps

ENTRY = {
    "order": 1,
    "summary": "Backwards through the chain of training; adds noise at every step, and needs many",
    "source": "Ho et al. 2020, Denoising diffusion probabilistic models, equations 6 and 7; "
    "fewer steps as in Nichol and Dhariwal 2021, section 4",
    "default_steps": 1000,
    "processes": ["variance_preserving"],
    "evaluations": "steps",
    "stochastic": True,
}

timesteps = trained_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """x' drawn from q(x' | x, x0), with x = shrink x' + N(0, added) and x' = alpha' x0 + N(0, sigma'^2)."""
    alpha, sigma = levels.alpha, levels.sigma

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        shrink = alpha[i] / alpha[i + 1]
        added = sigma[i] ** 2 - (shrink * sigma[i + 1]) ** 2  # beta, where alpha^2 + sigma^2 = 1
        mean = (alpha[i + 1] * added * estimate(x, i) + shrink * sigma[i + 1] ** 2 * x) / sigma[i] ** 2
        if sigma[i + 1] == 0.0:
            return mean
        assert step_noise is not None, "`sample` asks for it"
        return mean + math.sqrt(added) * sigma[i + 1] / sigma[i] * step_noise(i).to(x)

    return step
