"""Inpainting by a prior that was not trained for it: RePaint, Lugmayr et al. 2022, algorithm 1.

After every step the known part of the state is replaced by the known latents with that level's noise.  The drawn part
then knows nothing of what was just put beside it; so the state is noised again and drawn again, several times, until
both agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from meddiff_steps.diffusion.guidance import BaseGuidance, State
from meddiff_steps.diffusion.levels import Levels

#: step(x, start, stop, guidance) -> the state at timestep `stop` (clean for None), from x at `start`, in one step.
OneStep = Callable[[Tensor, float, float | None, "KnownPart"], Tensor]
#: noise() -> standard normal noise (b, c, *spatial), another one at every call.
Noise = Callable[[], Tensor]


class KnownPart(BaseGuidance):
    """After a step: the known part is as it is known, at the next level's noise; the rest is drawn (equation 8).

    The rest is drawn from q(x' | x, x0) (Ho et al. 2020, equation 7) and not taken from the sampler, so that a
    deterministic sampler, and a flow, have a random step as well: `sampler` then only says which levels there are.

    Parameters
    ----------
    latents
        The scan's, (b, c, *spatial); any values where they are not known.
    known
        Booleans that broadcast to them.
    noise
        Of the known part and of the rest.
    """

    def __init__(self, latents: Tensor, known: Tensor, noise: Noise) -> None:
        self.latents, self.known, self.noise = latents, known, noise

    def after(self, state: State, x: Tensor) -> Tensor:
        alpha, sigma = state.alpha_next, state.sigma_next
        if sigma == 0.0:
            return torch.where(self.known, self.latents, state.x0)
        drawn = _ancestral(state, self.noise().to(x))
        return torch.where(self.known, alpha * self.latents + sigma * self.noise().to(x), drawn)


def _ancestral(state: State, noise: Tensor) -> Tensor:
    """A draw from q(x' | x, x0) for the next level, as the sampler `ddpm` makes it."""
    shrink = state.alpha / state.alpha_next
    added = state.sigma**2 - (shrink * state.sigma_next) ** 2
    mean = (state.alpha_next * added * state.x0 + shrink * state.sigma_next**2 * state.x) / state.sigma**2
    return mean + added.sqrt() * state.sigma_next / state.sigma * noise


def visits(steps: int, jump_length: int, resamples: int) -> list[int]:
    """Numbers of the levels that are visited in turn, 0 the noisiest and `steps` the clean one.

    Every stretch of `jump_length` levels is gone `resamples` times.

    >>> visits(4, 2, 2)
    [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]
    """
    path = [0]
    for first in range(0, steps, jump_length):
        last = min(first + jump_length, steps)
        for again in range(resamples):
            path += ([first] if again else []) + list(range(first + 1, last + 1))
    return path


def noised_again(levels: Levels, cleaner: int, noisier: int, x: Tensor, noise: Tensor) -> Tensor:
    """A state carried from one level to a noisier one by the forward process."""
    shrink = levels.alpha[noisier] / levels.alpha[cleaner]
    added = levels.sigma[noisier] ** 2 - (shrink * levels.sigma[cleaner]) ** 2
    return shrink * x + math.sqrt(max(added, 0.0)) * noise


def repaint(
    step: OneStep,
    levels: Levels,
    latents: Tensor,
    known: Tensor,
    noise: Noise,
    *,
    jump_length: int = 5,
    resamples: int = 5,
    noised: bool = False,
) -> Tensor:
    """Clean latents (b, c, *spatial) that are `latents` where these are known, and drawn elsewhere.

    Parameters
    ----------
    step
        One step of a sampler, whose levels are `levels`, which ends with clean latents.
    latents, known, noise
        As of `KnownPart`.
    jump_length, resamples
        As of `visits`; with one resample nothing is noised again, the naive way.
    noised
        What is drawn begins as `latents` with the first level's noise, and not as noise alone: where `levels` begin on
        the way.
    """
    guidance = KnownPart(latents, known, noise)
    x = math.hypot(levels.alpha[0], levels.sigma[0]) * noise().to(latents)
    if noised:
        known = torch.ones_like(known)
    x = torch.where(known, levels.alpha[0] * latents + levels.sigma[0] * noise().to(latents), x)
    at = 0
    for level in visits(levels.steps, jump_length, resamples)[1:]:
        if level < at:
            x = noised_again(levels, at, level, x, noise().to(x))
        else:
            stop = levels.timesteps[level] if level < len(levels.timesteps) else None
            x = step(x, levels.timesteps[level - 1], stop, guidance)
        at = level
    return x
