"""Sampling under a measurement: y = H(x0) + noise, with H linear or nearly so, of clean latents.

Ways from the field, as guidance of a deterministic sampler:

`DataConsistency`
    the clean estimate is moved to agree with y as far as it is uncertain; or, after the step, the state is by as much.
`PosteriorSampling` (DPS)
    the state after every step goes down the gradient of what is left of y.
`MomentMatching`
    the estimate is that of x0 given x and y, by the covariance that the denoiser implies.

Of a Gaussian prior and a linear H, `MomentMatching` is exact, and consistency of the estimate is where the prior is
independent with equal variances.  The others have the posterior's mean nearly, where there is little noise, and its
spread not (tests/diffusion/test_posterior.py measures by how much).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from meddiff_steps.diffusion.guidance import BaseGuidance, State, gradient


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, start: Tensor | None = None, *, iterations: int, tolerance: float = 0
) -> Tensor:
    """Solution x of apply(x) = b, for a symmetric positive definite map of real tensors (b, ...), each row alone.

    Hestenes and Stiefel 1952.  A row is done when its residual is below `tolerance` times b, or stops falling because
    the map is not quite positive definite.
    """

    def dot(a: Tensor, c: Tensor) -> Tensor:
        return (a * c).flatten(1).sum(1).reshape(-1, *[1] * (a.ndim - 1))

    x = torch.zeros_like(b) if start is None else start
    residual = b if start is None else b - apply(x)
    direction, square = residual, dot(residual, residual)
    enough = max(tolerance, 1e-7) ** 2 * dot(b, b)
    for _ in range(iterations):
        if bool((square <= enough).all()):
            break
        image = apply(direction)
        curvature = dot(direction, image)
        going = (square > enough) & (curvature > 0)
        step = torch.where(going, square / torch.where(going, curvature, 1), 0)
        x = x + step * direction
        residual = residual - step * image
        after = dot(residual, residual)
        direction = residual + torch.where(going, after / torch.where(going, square, 1), 0) * direction
        square = torch.where(going, after, 0 * square)
    return x


def open_variance(ratio: float, variance: float = 1.0) -> float:
    """Variance of x0 given x at a level sigma / alpha, of independent latents with this variance a priori."""
    return variance if math.isinf(ratio) else variance * ratio**2 / (variance + ratio**2)


class DataConsistency(BaseGuidance):
    """Moves the clean estimate so that it agrees with what was measured, as far as it is uncertain.

    On the estimate, the noise of the state is what state and moved estimate imply (Zhu et al. 2023; Song
    et al. 2023b).  After the step, the state is moved and its noise stays that of the network (Chung et al. 2024;
    Song et al. 2022 project the noisy state, which moves it along the same correction).  The
    second counts the measurement again in every step: right where y has no noise, and fitted to noise where it has.

    Parameters
    ----------
    project
        project(x0, ratio): clean latents that agree with what was measured, as far as x0 is uncertain at the level
        sigma / alpha = ratio.
    after_step
        Which of both.
    """

    def __init__(self, project: Callable[[Tensor, float], Tensor], after_step: bool = False) -> None:
        self.project, self.after_step = project, after_step

    def estimate(self, state: State) -> Tensor:
        return state.x0 if self.after_step else self.project(state.x0, state.ratio)

    def after(self, state: State, x: Tensor) -> Tensor:
        if not self.after_step:
            return x
        return x + state.alpha_next * (self.project(state.x0, state.ratio) - state.x0)


class PosteriorSampling(BaseGuidance):
    """Diffusion posterior sampling: Chung et al. 2023, algorithm 1, x' - scale * grad ||y - H(x0(x))||.

    The gradient is that of the norm and not of its square, as in their code, which makes the step independent of the
    units of y.  It is scaled by how far the step goes, so that a number of steps does not change what `scale` means.

    Parameters
    ----------
    predict
        H: real measurements (b, ...) of clean latents, differentiable.
    measured
        y, shaped as these.
    scale
        Of a whole run.
    """

    needs_gradients = True

    def __init__(self, predict: Callable[[Tensor], Tensor], measured: Tensor, scale: float) -> None:
        self.predict, self.measured, self.scale = predict, measured, scale

    def after(self, state: State, x: Tensor) -> Tensor:
        left = (self.measured - self.predict(state.x0)).flatten(1)
        slope = gradient(left.norm(dim=1), state)
        # The angle arctan(sigma / alpha) runs from a quarter turn to 0.
        before, after = math.atan(state.ratio), math.atan2(state.sigma_next, state.alpha_next)
        return x - self.scale * (before - after) / (math.pi / 2) * slope


class MomentMatching(BaseGuidance):
    """The mean of x0 given x and y, for the Gaussian that the denoiser implies: Boys et al. 2024; Rozet et al. 2024.

    By Tweedie's formulas, x0 given x has the mean x0(x) and the covariance C = sigma^2 / alpha * dx0/dx, so that y
    moves the mean by C H' (H C H' + noise^2)^-1 (y - H(x0)).  Exact for Gaussian data and linear H; for another H its
    derivative is taken.  The inverse is found by conjugate gradients, and nothing is stored but vectors.

    Parameters
    ----------
    predict, measured
        As of `PosteriorSampling`.
    noise_std
        Of y.
    iterations
        Of conjugate gradients, each of which costs two passes backwards through H and one through the denoiser.
    """

    needs_gradients = True

    def __init__(
        self, predict: Callable[[Tensor], Tensor], measured: Tensor, noise_std: float, iterations: int = 4
    ) -> None:
        self.predict, self.measured = predict, measured
        self.noise_std, self.iterations = noise_std, iterations

    def estimate(self, state: State) -> Tensor:
        if state.ratio == math.inf:  # x says nothing, and sigma^2 / alpha has no value
            return state.x0
        scale = state.sigma**2 / state.alpha
        clean = state.x0.detach().requires_grad_(True)
        predicted = self.predict(clean)
        weights = torch.zeros_like(predicted, requires_grad=True)
        (pulled,) = torch.autograd.grad(predicted, clean, weights, create_graph=True)

        def covariance(v: Tensor) -> Tensor:
            """C H' v."""
            (back,) = torch.autograd.grad(predicted, clean, v, retain_graph=True)
            return scale * torch.autograd.grad(state.x0, state.x, back, retain_graph=True)[0]

        def apply(v: Tensor) -> Tensor:
            (forward,) = torch.autograd.grad(pulled, weights, covariance(v), retain_graph=True)
            return forward + self.noise_std**2 * v

        left = (self.measured - predicted).detach()
        return state.x0 + covariance(conjugate_gradients(apply, left, iterations=self.iterations)).detach()
