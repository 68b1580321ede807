"""DDIM's steps on levels that halve, for students of progressive distillation."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, halving_timesteps

ENTRY = {
    "order": 8,
    "summary": "For a student of `few_step.method: progressive`, in the steps that it was distilled for",
    "source": "Salimans and Ho 2022, Progressive distillation for fast sampling of diffusion models, algorithm 2",
    "default_steps": 4,
    "processes": ["variance_preserving", "flow"],
    "evaluations": "steps",
    "stochastic": False,
    "of_students": True,
}

timesteps = halving_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """x' = alpha' x0 + sigma' noise, with an x0 that leads to where the teacher's many steps end."""

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        return levels.towards(i, x, estimate(x, i))

    return step
