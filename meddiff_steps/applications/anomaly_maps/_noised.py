"""Noise and denoise: a scan's latents with noise on them, from several depths, drawn again as healthy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Mapper, Scan, mean_of

#: noise_of(root, shape) -> noise of mean square 1, float32 of `shape`, (c, *spatial).
NoiseOf = Callable[[str, tuple[int, ...]], np.ndarray]


def noised(context: Context, noise_of: NoiseOf) -> Mapper:
    """A method that noises by `noise_of`; every depth is a variant of it, where there are several."""
    model, settings = context.model, context.settings

    @torch.no_grad()
    def find(scan: Scan) -> Mapping[str, Finding]:
        latents = model.encode(scan.image[None])
        count = settings.samples
        noise = np.stack([noise_of(f"{scan.root}/{i}", model.latent_shape) for i in range(count)])
        condition = context.healthy(scan.subject, count)
        found: dict[str, Finding] = {}
        for depth in settings.depths:
            start = context.timestep(depth)
            state = _state(context, latents, torch.from_numpy(noise).to(latents), start)
            healed = model.sample(state, condition, context.sampler(), start=start)
            found[f"{depth:g}"] = context.finding(latents, healed)
        mean = mean_of(list(found.values()))
        return {"": mean, **(found if len(found) > 1 else {})}

    return find


def _state(context: Context, latents: Tensor, noise: Tensor, timestep: float) -> Tensor:
    """The latents (1, c, *spatial) at a timestep, with each of the noises (b, c, *spatial)."""
    timesteps = torch.full((len(noise),), timestep, device=latents.device)
    return context.model.process.add_noise(latents.expand_as(noise), noise, timesteps)
