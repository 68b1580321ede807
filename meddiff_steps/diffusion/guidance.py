"""Guidance: what is done to a denoiser's estimates, and to states, so that samples become what is asked for.

Classifier-free guidance needs two passes of the network and is done by `predict`. Any other guidance is an object that
corrects the estimate of the clean latents at every evaluation, or the state after every step, or both; several of
them compose in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from meddiff_steps.diffusion.conditioning import Condition, Denoiser

#: Levels where something acts, in sigma / alpha: above the first number, up to and including the second.
Interval = tuple[float, float]


@dataclass(frozen=True)
class State:
    """One evaluation of the network: `x = alpha * x0 + sigma * noise`.

    Attributes
    ----------
    step
        Number of the step in the sampler's full run, so that noise keyed by it is the same wherever a run starts.
    timesteps
        Where the network was evaluated, float32 (b,).
    alpha, sigma
        Amplitudes there, (b, 1, ...), in the dtype of x.
    x
        The state, (b, c, *spatial). It requires gradients where a guidance needs them, and else does not.
    x0
        Estimate of the clean latents, shaped as x: of the network, corrected by the guidance before.
    alpha_next, sigma_next
        Amplitudes of the level that the step leads to; (1, 0) where that is clean.
    ratio
        sigma / alpha as a number, infinite at pure noise; a batch is at one level. Computed where it is left out.
    """

    step: int
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    x: Tensor
    x0: Tensor
    alpha_next: float = 1.0
    sigma_next: float = 0.0
    ratio: float = math.nan

    def __post_init__(self) -> None:
        if math.isnan(self.ratio):
            object.__setattr__(self, "ratio", float((self.sigma / self.alpha).flatten()[0]))


class Guidance(Protocol):
    """What corrects a run of a sampler.

    Both methods act on each subject alone, and draw no random number: noise that they add is given to them by key.
    """

    @property
    def needs_gradients(self) -> bool:
        """Run the network under autograd, so that x0 can be differentiated with respect to x (more memory)."""

    def estimate(self, state: State) -> Tensor:
        """Corrected x0, (b, c, *spatial); called at every evaluation of the network."""

    def after(self, state: State, x: Tensor) -> Tensor:
        """Corrected next state, (b, c, *spatial); called after every step, also the last.

        `state` is that of the step's first evaluation, and `x` is at the level (alpha_next, sigma_next).
        """


class BaseGuidance:
    """Changes nothing; a guidance inherits from it and overrides what it is about."""

    needs_gradients: bool = False

    def estimate(self, state: State) -> Tensor:
        return state.x0

    def after(self, state: State, x: Tensor) -> Tensor:
        return x


class ClassifierGuidance(BaseGuidance):
    """Draws samples to where a classifier sees what is wanted: Dhariwal and Nichol 2021, algorithm 2.

    There, noise' = noise - scale * sigma * grad log p(y | x). As an estimate of the clean latents that is
    x0' = x0 + scale * sigma**2 / alpha * grad log p(y | x), which fits every sampler and prediction type. The
    classifier sees the estimate x0(x) and need not know noise; the gradient goes through the denoiser to x. That is
    exact for Gaussian data and a log p(y | x0) that is linear in x0, and otherwise the approximation of Chung et al.
    2023 (DPS), which takes x0(x) for all that x leaves open.

    Parameters
    ----------
    log_probability
        log p(y | x0) of clean latents (b, c, *spatial), up to a constant; (b,), differentiable.
    scale
        1 follows Bayes' rule; more sharpens.
    interval
        Levels in sigma / alpha where it acts; all by default.
    """

    needs_gradients = True

    def __init__(
        self, log_probability: Callable[[Tensor], Tensor], scale: float = 1.0, interval: Interval | None = None
    ) -> None:
        self.log_probability, self.scale, self.interval = log_probability, scale, check_interval(interval)

    def estimate(self, state: State) -> Tensor:
        # At pure noise x says nothing about x0, and sigma**2 / alpha has no value.
        if state.ratio == math.inf or not is_within(self.interval, state.ratio):
            return state.x0
        slope = gradient(self.log_probability(state.x0), state)
        return state.x0 + self.scale * state.sigma**2 / state.alpha * slope


def gradient(value: Tensor, state: State) -> Tensor:
    """Derivative of `value` (b,), a number for each subject, with respect to `state.x`; (b, c, *spatial).

    The graph is kept, for the guidance that comes next and for `after`; it goes when the step is done.

    Raises
    ------
    ValueError
        The network was run without gradients, or the value does not depend on it.
    """
    if not state.x.requires_grad:
        raise ValueError("gradient: the network was run without gradients. Set needs_gradients = True in the guidance.")
    if not value.requires_grad:
        raise ValueError("gradient: the value does not depend on state.x. Compute it from state.x0, without detaching.")
    return torch.autograd.grad(value.sum(), state.x, retain_graph=True)[0]


def corrected(guidance: Sequence[Guidance], state: State) -> State:
    """The state with its estimate corrected by every guidance in turn."""
    for each in guidance:
        state = replace(state, x0=each.estimate(state))
    return state


def predict(
    denoiser: Denoiser,
    x: Tensor,
    timesteps: Tensor,
    condition: Condition,
    guidance_scale: float = 1.0,
    guide: Denoiser | None = None,
) -> Tensor:
    """The network's prediction under guidance, (b, c, *spatial), in the dtype of x.

    Other + scale * (conditional - other). Other is the prediction without covariates (classifier-free guidance, Ho and
    Salimans 2022, equation 6 with scale = 1 + w), or that of a less trained `guide` with them (autoguidance, Karras et
    al. 2024b). At 1 and 0 there is one pass; otherwise there are two, each at the batch size of x, so that a subject's
    bits do not depend on how passes are put together.
    """
    timesteps = timesteps.float()
    if guide is None:
        guide, others = denoiser, condition.null()
    else:
        others = condition
    if guidance_scale == 0.0:
        return guide(x, timesteps, others).to(x.dtype)
    conditional = denoiser(x, timesteps, condition).to(x.dtype)
    if guidance_scale == 1.0:
        return conditional
    other = guide(x, timesteps, others).to(x.dtype)
    return other + guidance_scale * (conditional - other)


def check_interval(interval: Interval | None) -> Interval | None:
    """The interval as it is.

    Raises
    ------
    ValueError
        It holds no level.
    """
    if interval is not None and not 0.0 <= interval[0] < interval[1]:
        raise ValueError(f"interval: expected sigma / alpha as (low, high) with 0 <= low < high, found {interval}")
    return interval


def is_within(interval: Interval | None, ratio: float) -> bool:
    """Whether a level, sigma / alpha, is in an interval; None holds every level."""
    return interval is None or interval[0] < ratio <= interval[1]
