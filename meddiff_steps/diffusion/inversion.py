"""Deterministic inversion: the noise, or the state on the way, from which the sampler makes a given latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import default_steps
from meddiff_steps.diffusion.conditioning import Condition, Denoiser
from meddiff_steps.diffusion.guidance import predict
from meddiff_steps.diffusion.levels import Levels, flow_timesteps, karras_timesteps
from meddiff_steps.diffusion.schedules import NoiseProcess


@dataclass(frozen=True)
class Inversion:
    """What `invert` found; `sample(denoiser, state, ..., start=timesteps[-1])` leads back.

    Attributes
    ----------
    state
        The noisiest state, (b, c, *spatial), where the latents were.
    timesteps
        Of the states, rising; the clean latents themselves have none and are left out.
    trajectory
        The states from nearly clean to noisy, one for each timestep, on the CPU: as many as steps do not fit beside a
        network on a GPU. The last is `state`. The sampler goes through them in the opposite order.
    """

    state: Tensor
    timesteps: tuple[float, ...]
    trajectory: tuple[Tensor, ...]


def invert(
    denoiser: Denoiser,
    x0: Tensor,
    condition: Condition,
    process: NoiseProcess,
    *,
    num_inference_steps: int | None = None,
    until: float | None = None,
    guidance_scale: float = 1.0,
    iterations: int = 3,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Inversion:
    """States, float32, that `ddim` (or `flow`) with the same steps and scale turns back into `x0`.

    Walks the sampler's own levels backwards, from the latent itself to the noisiest. Each step of the sampler, x -> x',
    is undone by solving for the noisier state at which the network's velocity leads to the state at hand; the solution
    is found by fixed-point iteration, as in Pan et al. 2023 (AIDI). One iteration is plain DDIM inversion (Dhariwal and
    Nichol 2021, appendix F) with the network asked at the level where the sampler will ask it.

    Parameters
    ----------
    denoiser, condition, process, guidance_scale
        As in `sampling.sample`; guidance above 1 makes the iteration converge slowly, so invert at 1 where possible.
    x0
        Clean latents, (b, c, *spatial).
    num_inference_steps
        Steps of a full run of the sampler that will be used afterwards, which must be the same; by default its own
        default.
    until
        Timestep to end at; the sampler's noisiest by default.
    iterations
        Network evaluations per step.
    on_step
        Called after every step as on_step(step, state), from clean to noisy.

    Raises
    ------
    UserError
        A number of steps or iterations is below 1, or there is no such timestep.
    ValueError
        Latents and condition are not of the same subjects.
    """
    name, timesteps_of = ("flow", flow_timesteps) if process.is_flow else ("ddim", karras_timesteps)
    steps = default_steps(name, process.num_train_timesteps) if num_inference_steps is None else num_inference_steps
    if steps < 1 or iterations < 1:
        raise UserError(f"num_inference_steps and iterations must be at least 1, found {steps} and {iterations}")
    if len(condition) != len(x0):
        raise ValueError(f"condition: {len(condition)} rows, but x0 has {len(x0)}. Give a row per subject in both.")
    levels = Levels.of(process, timesteps_of(process, steps), start=until)
    x, trajectory = x0.detach().to(torch.promote_types(x0.dtype, torch.float32)), []
    with torch.no_grad():
        for i in reversed(range(levels.steps)):
            timesteps = torch.full((len(x),), levels.timesteps[i], dtype=torch.float64, device=x.device)
            noisier = x
            for _ in range(iterations):
                output = predict(denoiser, noisier, timesteps, condition, guidance_scale)
                noisier = _undone(process, levels, i, x, process.to_velocity(output, noisier, timesteps))
            x = noisier
            trajectory.append(x.cpu())
            if on_step is not None:
                on_step(len(trajectory) - 1, x)
    return Inversion(x, levels.timesteps[::-1], tuple(trajectory))


def _undone(process: NoiseProcess, levels: Levels, i: int, x: Tensor, velocity: Tensor) -> Tensor:
    """The state at level i from which one step along its `velocity` leads to `x` at level i + 1.

    On a flow the step is a straight line; else a rotation by the angle between the levels. Unlike with the noise, the
    step from clean latents is no division by zero.
    """
    alpha, sigma, alpha_next, sigma_next = levels.alpha[i], levels.sigma[i], levels.alpha[i + 1], levels.sigma[i + 1]
    if process.is_flow:
        return x + (sigma - sigma_next) * velocity
    sine, cosine = sigma * alpha_next - alpha * sigma_next, alpha * alpha_next + sigma * sigma_next
    return (x + sine * velocity) / cosine
