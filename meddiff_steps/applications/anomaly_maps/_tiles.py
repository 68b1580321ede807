"""Tile after tile of latents drawn anew, given all that lies around it as it is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from meddiff_steps.applications.noise import keyed_noise
from meddiff_steps.diffusion.levels import Levels
from meddiff_steps.diffusion.repaint import OneStep, repaint

#: Images that are drawn at once.
BATCH = 16


def masks(shape: Sequence[int], cells: int) -> np.ndarray:
    """Tiles of `cells` cells a side that cover a grid, each cell once; those at the far ends are smaller. Bool
    (tiles, *shape).
    """
    corners = itertools.product(*(range(0, n, cells) for n in shape))
    found = []
    for corner in corners:
        mask = np.zeros(shape, bool)
        mask[tuple(slice(at, at + cells) for at in corner)] = True
        found.append(mask)
    return np.stack(found)


def tiles_drawn(
    latents: Tensor,
    cells: int,
    samples: int,
    step_of: Callable[[int], OneStep],
    levels: Levels,
    root: str,
    stream: str,
    *,
    noised: bool = False,
) -> Tensor:
    """Latents every tile of which was drawn while all others were told (RePaint, Lugmayr et al. 2022), `samples` times.

    Parameters
    ----------
    latents
        (1, c, *spatial).
    cells
        As of `masks`.
    step_of
        A step of the sampler for so many images.
    levels, noised
        As of `repaint`.
    root, stream
        Of the noise of a draw and a tile, which depends on nothing else.

    Returns
    -------
    Tensor
        (samples, c, *spatial).
    """
    shape = latents.shape[1:]
    tiles = torch.from_numpy(masks(shape[1:], cells)).to(latents.device)
    healed = latents.repeat(samples, *[1] * (latents.ndim - 1))
    drawn = list(itertools.product(range(samples), range(len(tiles))))
    for first in range(0, len(drawn), BATCH):
        part = drawn[first : first + BATCH]
        noise = keyed_noise([f"{root}/{i}/{tile}" for i, tile in part], shape, stream)
        made = repaint(
            step_of(len(part)),
            levels,
            latents.expand(len(part), *shape),
            ~tiles[[tile for _, tile in part]][:, None],
            lambda: next(noise).to(latents),  # noqa: B023
            jump_length=levels.steps,
            resamples=1,
            noised=noised,
        )
        for (i, tile), one in zip(part, made, strict=True):
            healed[i] = torch.where(tiles[tile], one, healed[i])
    return healed
