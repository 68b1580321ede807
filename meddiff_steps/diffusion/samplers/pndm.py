"""Pseudo numerical methods: linear multistep on the noise, which DDIM's step then transfers to the next level."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, karras_timesteps

ENTRY = {
    "order": 3,
    "summary": "Linear multistep with four estimates of the noise, begun by a step of Heun's method",
    "source": "Liu et al. 2022, Pseudo numerical methods for diffusion models on manifolds, with its linear multistep "
    "method begun as in latent diffusion (Rombach et al. 2022), without Runge-Kutta steps",
    "default_steps": 20,
    "processes": ["variance_preserving"],
    "evaluations": "steps + 1",
    "stochastic": False,
}

#: Adams-Bashforth methods of order 1 to 4: weights of the estimates, the latest first.
WEIGHTS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

timesteps = karras_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """As many of the last estimates as there are, up to four."""
    latest: list[Tensor] = []

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        latest.insert(0, levels.noise(i, x, estimate(x, i)))
        del latest[len(WEIGHTS) :]
        there = levels.along(i, x, weighted(latest))
        if i > 0 or levels.sigma[1] == 0.0:
            return there
        return levels.along(0, x, (latest[0] + levels.noise(1, there, estimate(there, 1))) / 2)

    return step


def weighted(latest: Sequence[Tensor]) -> Tensor:
    """Mean noise over the step, extrapolated from as many estimates as are given."""
    first, *others = zip(WEIGHTS[len(latest) - 1], latest, strict=True)
    mean = first[0] * first[1]
    for weight, noise in others:
        mean = mean + weight * noise
    return mean
