"""Neighbours of a scan: images that share its coarse anatomy, drawn anew by the model.

A scan's latents are noised to a state where only coarse anatomy is left, and drawn from there several times with
covariates of one's choice.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from meddiff_steps import config
from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.diffusion.samplers import ddim, flow
from meddiff_steps.models.trained import TrainedModel


@torch.no_grad()
def neighbours(
    model: TrainedModel,
    image: np.ndarray,
    subject: pd.DataFrame,
    root: str,
    *,
    samples: int,
    depth: float,
    guidance_scale: float = 1.0,
    num_inference_steps: int | None = None,
) -> np.ndarray:
    """Draws that share the coarse anatomy of one scan (Meng et al. 2022), float32 (samples, 1, *spatial) in [0, 1].

    Parameters
    ----------
    image
        Preprocessed scan, float32 (1, *spatial) in [0, 1].
    subject
        Covariates that the model is told, one row; empty cells are missing.
    root
        Of the random numbers: draw number i depends on the root and i alone.
    depth
        How far the scan is noised, as a share of the noise process, in (0, 1].
    num_inference_steps
        Of a whole process; the default of `ddim` (`flow` for a flow model) when left out.
    """
    sampler = flow if model.process.is_flow else ddim
    forward = config.Generate(
        # The module, not its name: so its code counts for what is made with it.
        sampler=sampler.__name__.rpartition(".")[2],
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
    )
    latents, condition = model.encode(image[None]), model.condition(pd.concat([subject] * samples))
    noise = next(keyed_noise([f"{root}/{i}" for i in range(samples)], model.latent_shape, "neighbours")).to(latents)
    start = depth * model.process.last_timestep
    state = model.process.add_noise(latents.expand_as(noise), noise, torch.full((samples,), start).to(latents))
    return model.mean_images(model.sample(state, condition, forward, start=start)).cpu().numpy()
