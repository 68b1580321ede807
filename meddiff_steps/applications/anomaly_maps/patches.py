"""Patch after patch is noised and drawn again, given all that lies around it as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from meddiff_steps.applications.anomaly_maps._tiles import tiles_drawn
from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Mapper, Scan, mean_of
from meddiff_steps.diffusion.repaint import KnownPart, OneStep
from meddiff_steps.diffusion.sampling import levels_of

ENTRY = {
    "order": 7,
    "summary": "Patch after patch of the latents noised and drawn again, given all others as they are",
    "source": "Behrendt et al. 2023, who train on noised patches; here the prior is told the rest by RePaint (Lugmayr "
    "et al. 2022)",
    "needs": ["a trained model"],
    "cost": "as `gaussian_noise`, for every patch",
}


def build(context: Context) -> Mapper:
    model, settings = context.model, context.settings

    @torch.no_grad()
    def find(scan: Scan) -> Mapping[str, Finding]:
        latents = model.encode(scan.image[None])
        found = {f"{depth:g}": _of_depth(context, scan, latents, depth) for depth in settings.depths}
        return {"": mean_of(list(found.values())), **(found if len(found) > 1 else {})}

    return find


def _of_depth(context: Context, scan: Scan, latents: Tensor, depth: float) -> Finding:
    model, settings, sampler = context.model, context.settings, context.sampler()
    levels = levels_of(sampler.sampler, model.process, settings.num_inference_steps, context.timestep(depth))

    def step_of(count: int) -> OneStep:
        condition = context.healthy(scan.subject, count)

        def step(x: Tensor, begin: float, stop: float | None, guidance: KnownPart) -> Tensor:
            return model.sample(x, condition, sampler, start=begin, stop=stop, guidance=[guidance])

        return step

    told = (settings.patch_cells, settings.samples, step_of, levels, scan.root, f"patches/{depth:g}")
    return context.finding(latents, tiles_drawn(latents, *told, noised=True))
