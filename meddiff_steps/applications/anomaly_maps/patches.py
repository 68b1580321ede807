"""Patch after patch is noised and drawn again, given all that lies around it as it is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Mapper, Scan, mean_of
from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.diffusion.repaint import KnownPart, repaint
from meddiff_steps.diffusion.sampling import levels_of

ENTRY = {
    "order": 7,
    "summary": "Patch after patch of the latents noised and drawn again, given all others as they are",
    "source": "Behrendt et al. 2023, who train on noised patches; here the prior is told the rest by RePaint (Lugmayr "
    "et al. 2022)",
    "needs": ["a trained model"],
    "cost": "as `gaussian_noise`, for every patch",
}

#: Images that are drawn at once.
BATCH = 16


def masks(shape: Sequence[int], cells: int) -> np.ndarray:
    """Patches of `cells` cells a side that cover a grid, each cell once; those at the far ends are smaller. Bool
    (patches, *shape).
    """
    corners = itertools.product(*(range(0, n, cells) for n in shape))
    found = []
    for corner in corners:
        mask = np.zeros(shape, bool)
        mask[tuple(slice(at, at + cells) for at in corner)] = True
        found.append(mask)
    return np.stack(found)


def build(context: Context) -> Mapper:
    model, settings = context.model, context.settings
    tiles = torch.from_numpy(masks(model.latent_shape[1:], settings.patch_cells))

    @torch.no_grad()
    def find(scan: Scan) -> Mapping[str, Finding]:
        latents = model.encode(scan.image[None])
        found = {
            f"{depth:g}": _of_depth(context, scan, latents, tiles.to(latents.device), depth)
            for depth in settings.depths
        }
        return {"": mean_of(list(found.values())), **(found if len(found) > 1 else {})}

    return find


def _of_depth(context: Context, scan: Scan, latents: Tensor, tiles: Tensor, depth: float) -> Finding:
    model, settings = context.model, context.settings
    sampler, start = context.sampler(), context.timestep(depth)
    levels = levels_of(sampler.sampler, model.process, settings.num_inference_steps, start)
    healed = latents.repeat(settings.samples, *[1] * (latents.ndim - 1))
    drawn = list(itertools.product(range(settings.samples), range(len(tiles))))
    for first in range(0, len(drawn), BATCH):
        part = drawn[first : first + BATCH]
        condition = context.healthy(scan.subject, len(part))
        noise = keyed_noise([f"{scan.root}/{i}/{tile}" for i, tile in part], model.latent_shape, f"patches/{depth:g}")

        def step(x: Tensor, begin: float, stop: float | None, guidance: KnownPart) -> Tensor:
            return model.sample(x, condition, sampler, start=begin, stop=stop, guidance=[guidance])  # noqa: B023

        hidden = tiles[[tile for _, tile in part]][:, None]
        made = repaint(
            step,
            levels,
            latents.expand(len(part), *latents.shape[1:]),
            ~hidden,
            lambda: next(noise).to(latents),  # noqa: B023
            jump_length=levels.steps,
            resamples=1,
            noised=True,
        )
        for (i, tile), one in zip(part, made, strict=True):
            healed[i] = torch.where(tiles[tile], one, healed[i])
    return context.finding(latents, healed)
