"""DPM-Solver++ (2M): the estimate of the clean latents, extrapolated along log(alpha / sigma)."""

from __future__ import annotations

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, karras_timesteps

ENTRY = {
    "order": 5,
    "summary": "Second order with one evaluation per step: the fewest evaluations for most models",
    "source": "Lu et al. 2022, DPM-Solver++, algorithm 2",
    "default_steps": 20,
    "processes": ["variance_preserving", "flow"],
    "evaluations": "steps",
    "stochastic": False,
}

timesteps = karras_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """D = x0 + (x0 - previous x0) / (2 r), r the length of the last step over that of this one; then DDIM's step to D.

    First order at both ends: the first step knows no other, and the last one, to clean latents, is infinitely long.
    """
    snr = levels.log_snr
    previous: Tensor | None = None

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        nonlocal previous
        x0 = extrapolated = estimate(x, i)
        if previous is not None and levels.sigma[i + 1] > 0.0:
            r = (snr[i] - snr[i - 1]) / (snr[i + 1] - snr[i])
            extrapolated = x0 + (x0 - previous) / (2 * r)
        previous = x0
        return levels.towards(i, x, extrapolated)

    return step
