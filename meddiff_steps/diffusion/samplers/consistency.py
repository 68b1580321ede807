"""Multistep consistency sampling: to clean latents at once, and from them, with fresh noise, again."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, halving_timesteps

ENTRY = {
    "order": 9,
    "summary": "For a student of `few_step.method: consistency`, in one step or several",
    "source": "Song et al. 2023, Consistency models, algorithm 1",
    "default_steps": 4,
    "processes": ["variance_preserving", "flow"],
    "evaluations": "steps",
    "stochastic": True,
    "of_students": True,
}

timesteps = halving_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """x' = alpha' x0 + sigma' fresh noise."""

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        clean = estimate(x, i)
        if levels.sigma[i + 1] == 0.0:
            return clean
        assert step_noise is not None, "`sample` asks for it"
        return levels.alpha[i + 1] * clean + levels.sigma[i + 1] * step_noise(i).to(clean)

    return step
