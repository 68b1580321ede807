"""Part of a scan drawn anew, given the rest: RePaint in latents, put back into the scan without a seam.

The hole is first filled smoothly, so that the scan can be encoded.  A latent is known if nothing that could stand in
the hole would move it: that is measured, by encoding the scan with other fillings, and so holds for any network,
whatever its receptive field and its normalisation.  What is drawn is decoded, and hidden voxels alone are taken of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional

from meddiff_steps import config
from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.diffusion.repaint import KnownPart, repaint
from meddiff_steps.diffusion.samplers import ddim, flow
from meddiff_steps.diffusion.sampling import levels_of
from meddiff_steps.imaging.filling import harmonic, pasted
from meddiff_steps.models.trained import TrainedModel

ENTRY = {
    "order": 3,
    "summary": "A hidden part of a scan, or a lesion, drawn anew to fit the rest",
    "source": "Lugmayr et al. 2022 (RePaint), algorithm 1; seams: Pérez et al. 2003",
    "needs": ["a trained model", "a mask, a label map, or a box"],
}


@dataclass(frozen=True)
class Inpainted:
    """What became of a scan.

    Attributes
    ----------
    drawn
        The scan with its hole filled, float32 (samples, 1, *spatial) in [0, 1].
    decoded
        The same wholly as decoded, nothing of the scan put back.
    known
        Share of the latents that were known.
    """

    drawn: np.ndarray
    decoded: np.ndarray
    known: float


def known_latents(
    model: TrainedModel, image: np.ndarray, hidden: np.ndarray, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Latents (1, c, *spatial) of a scan with a hole, and which cells (1, 1, *spatial) are known whatever is in it.

    Parameters
    ----------
    image, hidden
        (1, *spatial), and bool (*spatial).
    tolerance
        How far a known latent may move, in standard deviations, if the hole is black, white, or filled smoothly.  One
        whose own block of voxels has a hole in it is never known.

    Raises
    ------
    UserError
        No cell is known.
    """
    smooth = harmonic(image[0], hidden)
    fillings = [smooth, np.where(hidden, 0.0, image[0]), np.where(hidden, 1.0, image[0])]
    latents = model.encode(np.stack(fillings)[:, None].astype(np.float32))
    moved = (latents[1:] - latents[:1]).abs().amax(dim=(0, 1))
    pool = functional.adaptive_max_pool3d if hidden.ndim == 3 else functional.adaptive_max_pool2d
    covers = pool(torch.from_numpy(hidden[None, None].astype(np.float32)), moved.shape).to(moved.device) > 0
    known = (moved <= tolerance)[None, None] & ~covers
    if not known.any():
        raise UserError(
            f"what is hidden moves every latent by more than inpainting.tolerance ({tolerance:g}): nothing is left to"
            " go by. Hide less, or raise the tolerance."
        )
    return latents[:1], known


@torch.no_grad()
def inpaint(
    model: TrainedModel,
    image: np.ndarray,
    hidden: np.ndarray,
    subject: pd.DataFrame,
    settings: config.Inpainting,
    root: str,
) -> Inpainted:
    """Draw what is hidden of one scan, `settings.samples` times.

    Parameters
    ----------
    image
        Preprocessed scan, float32 (1, *spatial) in [0, 1]; hidden voxels are not looked at.
    hidden
        bool (*spatial).
    subject
        Its covariates, one row; empty cells are missing.
    root
        Of its random numbers.

    Raises
    ------
    UserError
        As `known_latents`.
    """
    latents, known = known_latents(model, image, hidden, settings.tolerance)
    count = settings.samples
    sampler = flow if model.process.is_flow else ddim
    forward = config.Generate(
        sampler=sampler.__name__.rpartition(".")[2],
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=1.0,
    )
    condition = model.condition(pd.concat([subject] * count))
    noise = keyed_noise([f"{root}/{i}" for i in range(count)], model.latent_shape, "inpainting")

    def step(x: Tensor, start: float, stop: float | None, guidance: KnownPart) -> Tensor:
        return model.sample(x, condition, forward, start=start, stop=stop, guidance=[guidance])

    found = repaint(
        step,
        levels_of(forward.sampler, model.process, forward.num_inference_steps),
        latents.expand(count, *latents.shape[1:]),
        known,
        lambda: next(noise).to(latents),
        jump_length=settings.jump_length,
        resamples=settings.resamples,
    )
    drawing = None
    if model.draws:
        keys = [seed_key(f"{root}/{i}", 0, 0, "decoder") for i in range(count)]
        drawing = torch.from_numpy(batch_noise(keys, model.image_shape))
    decoded = model.decode(found, drawing).cpu().numpy()
    seamless = settings.seam == "membrane"
    drawn = [np.clip(pasted(image[0], one[0], hidden, seamless=seamless), 0.0, 1.0)[None] for one in decoded]
    return Inpainted(np.stack(drawn).astype(np.float32), decoded, float(known.float().mean()))
