"""Deterministic inversion: the noise from which the sampler makes a given latent."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.config import DEFAULT_STEPS
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.samplers import Denoiser, flow_timesteps, karras_timesteps, predict
from meddiff_steps.diffusion.schedules import NoiseProcess


def invert(
    denoiser: Denoiser,
    x0: Tensor,
    covariates: Tensor,
    process: NoiseProcess,
    num_inference_steps: int | None = None,
    guidance_scale: float = 1.0,
    iterations: int = 3,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Noise (b, c, *spatial), float32, that `ddim` (or `flow`) with the same steps and scale turns back into `x0`.

    Walks the sampler's own levels backwards, from the latent itself to the noisiest.  Each step of the sampler,
    x -> x', is undone by solving for the noisier state at which the network's velocity leads to the state at hand; the
    solution is found by fixed-point iteration, as in Pan et al. 2023 (AIDI).  One iteration is plain DDIM inversion
    (Dhariwal and Nichol 2021, appendix F) with the network asked at the level where the sampler will ask it.

    Parameters
    ----------
    denoiser, covariates, process, guidance_scale
        As in `samplers.sample`; guidance above 1 makes the iteration converge slowly, so invert at 1 where possible.
    x0
        Clean latents, (b, c, *spatial).
    num_inference_steps
        Steps of the sampler that will be used afterwards, which must be the same; by default its own default.
    iterations
        Network evaluations per step.
    on_step
        Called after every step as on_step(step, state).

    Raises
    ------
    UserError
        A number of steps or iterations is below 1.
    """
    steps = DEFAULT_STEPS["flow" if process.is_flow else "ddim"] if num_inference_steps is None else num_inference_steps
    if steps < 1 or iterations < 1:
        raise UserError(f"num_inference_steps and iterations must be at least 1, found {steps} and {iterations}")
    grid = flow_timesteps(process, steps) if process.is_flow else karras_timesteps(process, steps)
    alpha, sigma = (values.numpy() for values in process.alpha_sigma(torch.from_numpy(grid[::-1].copy())))
    alpha, sigma = np.r_[1.0, alpha], np.r_[0.0, sigma]

    x = x0.to(torch.promote_types(x0.dtype, torch.float32))
    with torch.no_grad():
        for i, timestep in enumerate(grid[::-1]):
            timesteps = torch.full((x.shape[0],), float(timestep), dtype=torch.float64, device=x.device)
            noisier = x
            for _ in range(iterations):
                output = predict(denoiser, noisier, timesteps, covariates, guidance_scale)
                velocity = process.to_velocity(output, noisier, timesteps)
                noisier = _back(process, x, velocity, (alpha[i], sigma[i]), (alpha[i + 1], sigma[i + 1]))
            x = noisier
            if on_step is not None:
                on_step(i, x)
    return x


def _back(
    process: NoiseProcess, x: Tensor, velocity: Tensor, here: tuple[float, float], there: tuple[float, float]
) -> Tensor:
    """The state at level `there` from which one step along `velocity` (of `there`) leads to `x` at level `here`.

    A level is (alpha, sigma).  On a flow the step is a straight line; else a rotation by the angle between the levels.
    """
    (alpha, sigma), (alpha_t, sigma_t) = here, there
    if process.is_flow:
        return x + (sigma_t - sigma) * velocity
    sine, cosine = sigma_t * alpha - alpha_t * sigma, alpha * alpha_t + sigma * sigma_t
    return (x + sine * velocity) / cosine
