"""UniPC of order 2: DPM-Solver++ (2M), and every step corrected once the estimate at its end is known."""

from __future__ import annotations

import math

from torch import Tensor

from meddiff_steps.diffusion.levels import Estimate, Levels, Step, StepNoise, karras_timesteps

ENTRY = {
    "order": 6,
    "summary": "Second order and a corrector that costs no evaluation",
    "source": "Zhao et al. 2023, UniPC, algorithms 1 and 2 for the prediction of data, with B(h) = exp(h) - 1",
    "default_steps": 20,
    "processes": ["variance_preserving", "flow"],
    "evaluations": "steps",
    "stochastic": False,
}

timesteps = karras_timesteps


def solver(levels: Levels, step_noise: StepNoise | None = None) -> Step:
    """Predictor UniP-2, the step to x0 + slope / 2, and corrector UniC-2; h are lengths of steps in log(alpha / sigma).

    The corrector adds what it would give less what the predictor gave: what guidance did to the state stays.
    """
    h = [after - before for before, after in zip(levels.log_snr, levels.log_snr[1:], strict=False)]
    previous: Tensor | None = None
    slope: Tensor | float = 0.0  # change of the estimate over the step at hand, as seen from the step before

    def step(i: int, x: Tensor, estimate: Estimate) -> Tensor:
        nonlocal previous, slope
        x0 = estimate(x, i)
        if previous is not None:
            old, new = corrector(h[i - 1], h[i - 2]) if i > 1 else (0.5, 0.5)
            change = (old - 0.5) * slope + new * (x0 - previous)
            x = x - levels.alpha[i] * math.expm1(-h[i - 1]) * change
            slope = (x0 - previous) * h[i] / h[i - 1] if levels.sigma[i + 1] > 0.0 else 0.0
        previous = x0
        return levels.towards(i, x, x0 + slope / 2)

    return step


def corrector(h: float, before: float) -> tuple[float, float]:
    """Weights of UniC-2 for the slope from the step before, of length `before`, and for that over the step itself.

    They solve w1 + w2 = b1 and r w1 + w2 = b2 with r = -before / h, and for the prediction of data, with k = -h,
    b1 = k phi_2(k) / B(k) and b2 = 2 k^2 phi_3(k) / B(k); k phi_2 = phi_1 - 1 and k phi_3 = phi_2 - 1/2.
    """
    b1 = (math.expm1(-h) / -h - 1.0) / math.expm1(-h)
    b2 = 2.0 * ((math.expm1(-h) / -h - 1.0) / -h - 0.5) / math.expm1(-h)
    old = (b1 - b2) / (1.0 + before / h)
    return old, b1 - old
