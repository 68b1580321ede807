"""The samplers of diffusers on our levels: how samplers were run before there were solvers of our own.

diffusers steps by num_train_timesteps // num_inference_steps whatever its list of timesteps says, and rounds the
timesteps of Karras levels. So DDPM, DDIM and PNDM run on a schedule that consists of our levels only, where the stride
is 1, and the others have their sigmas replaced, which diffusers keeps in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from meddiff_steps.diffusion.levels import Levels

#: x0 of a state (b, c, *spatial) at a timestep.
Predict = Callable[[Tensor, float], Tensor]


def respaced(
    sampler: str, levels: Levels, is_flow: bool, predict: Predict, x: Tensor, step_noise: Callable[[int], Tensor]
) -> Tensor:
    """DDPM (DDIM with eta 1), DDIM and PNDM."""
    alpha, sigma = (np.array(values[:-1])[::-1] for values in (levels.alpha, levels.sigma))
    options: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 0, "set_alpha_to_one": True}
    options["num_train_timesteps"] = len(alpha)
    scheduler: Any
    if sampler == "pndm":
        scheduler = PNDMScheduler(**options, prediction_type="epsilon", skip_prk_steps=True)
    else:
        scheduler = DDIMScheduler(**options, prediction_type="sample", clip_sample=False)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = torch.from_numpy(alpha**2), torch.tensor(1.0).double()
    scheduler.set_timesteps(len(alpha))
    for i, level in enumerate(scheduler.timesteps.tolist()):
        output = predict(x, levels.timesteps[-1 - level])
        if sampler == "pndm":
            output = (x - alpha[level] * output) / sigma[level]
        noise = {"eta": 1.0, "variance_noise": step_noise(i).to(x)} if sampler == "ddpm" and level else {}
        x = scheduler.step(output, level, x, **noise).prev_sample
    return x


def heun(sampler: str, levels: Levels, is_flow: bool, predict: Predict, x: Tensor, step_noise: object) -> Tensor:
    """Heun's method, which diffusers solves for x / alpha."""
    scheduler: Any = HeunDiscreteScheduler(prediction_type="sample", clip_sample=False)
    scheduler.set_timesteps(len(levels.timesteps))
    scheduler.set_begin_index(0)
    twice = [0, *np.repeat(np.arange(1, levels.steps), 2)]  # every level but the first is evaluated twice
    scheduler.sigmas = torch.tensor([*(levels.ratio[i] for i in twice), 0.0], dtype=torch.float64)
    for i, after in zip(twice, [*twice[1:], levels.steps], strict=True):
        x0 = predict(x, levels.timesteps[i])
        x = scheduler.step(x0, levels.timesteps[i], x / levels.alpha[i]).prev_sample * levels.alpha[after]
    return x


def multistep(sampler: str, levels: Levels, is_flow: bool, predict: Predict, x: Tensor, step_noise: object) -> Tensor:
    """DPM-Solver++ and UniPC of order 2."""
    kind = DPMSolverMultistepScheduler if sampler == "dpmpp" else UniPCMultistepScheduler
    options: dict[str, Any] = {"solver_order": 2, "use_flow_sigmas": is_flow, "final_sigmas_type": "zero"}
    scheduler: Any = kind(prediction_type="sample", **options)
    scheduler.set_timesteps(levels.steps)
    scheduler.set_begin_index(0)  # else the first step looks itself up among rounded timesteps
    scheduler.sigmas = torch.tensor(levels.sigma if is_flow else levels.ratio, dtype=x.dtype)
    for timestep in levels.timesteps:
        x = scheduler.step(predict(x, timestep), timestep, x).prev_sample
    return x


def euler(sampler: str, levels: Levels, is_flow: bool, predict: Predict, x: Tensor, step_noise: object) -> Tensor:
    """Euler's method on a rectified flow."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=list(levels.sigma[:-1]))
    scheduler.set_begin_index(0)
    for timestep, sigma in zip(levels.timesteps, levels.sigma, strict=False):
        x = scheduler.step((x - predict(x, timestep)) / sigma, timestep, x).prev_sample
    return x


RUNS = {"ddpm": respaced, "ddim": respaced, "pndm": respaced, "heun": heun, "dpmpp": multistep, "unipc": multistep}
RUNS["flow"] = euler
