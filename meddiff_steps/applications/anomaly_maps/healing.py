"""Latents that surprise the model are drawn anew, given all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Mapper, Scan
from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.core.errors import UserError
from meddiff_steps.diffusion.repaint import KnownPart, repaint
from meddiff_steps.diffusion.sampling import levels_of

ENTRY = {
    "order": 6,
    "summary": "Latents of low likelihood drawn anew; what is changed elsewhere is no finding",
    "source": "Pinaya et al. 2022b, who do it on the latents of a VQ-VAE; Lugmayr et al. 2022",
    "needs": ["a trained model", "healthy validation scans"],
    "cost": "num_inference_steps + 4 passes, of `samples` images",
}

#: Depths that likelihoods are taken at: where what is drawn is neither noise nor detail (Pinaya et al. take 400 to 600
#: of 1,000 timesteps).
DEPTHS = (0.3, 0.4, 0.5, 0.6)
#: Cells over which what is usual at a place is averaged: there are few scans.
SMOOTHING = 1.5


def build(context: Context) -> Mapper:
    if not context.reference:
        raise UserError(
            "anomaly.methods: healing needs healthy scans in the val split, which say how surprising a latent may be."
            " Enlarge splits.val, or leave the method out."
        )
    model, settings = context.model, context.settings
    usual = np.stack([surprise(context, scan) for scan in context.reference])
    level = ndimage.gaussian_filter(usual.mean(0), SMOOTHING)
    limit = float(np.percentile(usual / level, settings.healing_percentile))
    levels = levels_of(context.sampler().sampler, model.process, settings.num_inference_steps)

    @torch.no_grad()
    def find(scan: Scan) -> Mapping[str, Finding]:
        latents, count = model.encode(scan.image[None]), settings.samples
        ratio = surprise(context, scan) / level
        known = torch.from_numpy(ratio <= limit).to(latents.device)[None, None]
        condition = context.healthy(scan.subject, count)
        noise = _noise(scan, count, model.latent_shape)

        def step(x: Tensor, start: float, stop: float | None, guidance: KnownPart) -> Tensor:
            return model.sample(x, condition, context.sampler(), start=start, stop=stop, guidance=[guidance])

        healed = repaint(
            step,
            levels,
            latents.expand(count, *latents.shape[1:]),
            known,
            lambda: next(noise).to(latents),
            jump_length=levels.steps,
            resamples=1,
        )
        found = context.finding(latents, healed)
        weight = on_grid(ratio / limit, found.difference.shape)
        # As Pinaya et al. do: differences count where latents were surprising; the more so, the more they were.
        return {"": Finding((found.difference * weight).astype(np.float32), found.healed)}

    return find


def on_grid(cells: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values of cells (*latent spatial) at the voxels (*shape) that they cover, linearly between their centres."""
    zooms = [n / m for n, m in zip(shape, cells.shape, strict=True)]
    found: np.ndarray = ndimage.zoom(cells, zooms, order=1, mode="nearest", grid_mode=True)
    return found


def _noise(scan: Scan, count: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    return keyed_noise([f"{scan.root}/{i}" for i in range(count)], shape, "anomaly/healing")


@torch.no_grad()
def surprise(context: Context, scan: Scan) -> np.ndarray:
    """How far each cell's latents are from what the model makes of them with noise on, (*latent spatial).

    Mean over channels and depths of the squared difference of latents and estimate, each depth in units of its own
    noise (sigma / alpha): the terms of the variational bound but for their weights (Ho et al. 2020, equation 8).
    """
    model = context.model
    latents = model.encode(scan.image[None])
    condition = context.healthy(scan.subject)
    noise = keyed_noise([scan.root], model.latent_shape, "anomaly/surprise")
    found = []
    for depth in DEPTHS:
        timesteps = torch.full((1,), context.timestep(depth), device=latents.device)
        x = model.process.add_noise(latents, next(noise).to(latents), timesteps)
        x0 = model.process.to_x0(model.denoise(x, timesteps, condition).to(x.dtype), x, timesteps)
        alpha, sigma = (float(v) for v in model.process.alpha_sigma(timesteps))
        found.append(((x0 - latents) * alpha / sigma).square().mean(1)[0])
    return torch.stack(found).mean(0).cpu().numpy()
