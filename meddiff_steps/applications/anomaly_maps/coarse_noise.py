"""Coarse noise: Gaussian on a coarser grid, and what the model draws from there."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from meddiff_steps.applications.anomaly_maps._noised import noised
from meddiff_steps.applications.anomaly_maps.base import Context, Mapper
from meddiff_steps.core.random_streams import philox

ENTRY = {
    "order": 3,
    "summary": "Noise in blobs of several cells on the latents, taken off by a model trained on Gaussian noise",
    "source": "Kascenas et al. 2023, section 3.1, who train on it too",
    "needs": ["a trained model"],
    "cost": "as `gaussian_noise`",
}


def build(context: Context) -> Mapper:
    cells = context.settings.coarse_cells

    def draw(root: str, shape: tuple[int, ...]) -> np.ndarray:
        return coarse(shape, cells, philox(root, "anomaly/coarse"))

    return noised(context, draw)


def coarse(shape: tuple[int, ...], cells: int, generator: np.random.Generator) -> np.ndarray:
    """Gaussian noise on a grid of `cells` times the spacing, interpolated linearly to (c, *spatial), moved by a random
    part of a cell, of mean square 1.
    """
    small = (shape[0], *(-(-n // cells) + 2 for n in shape[1:]))
    values = generator.standard_normal(small)
    starts = generator.uniform(0, 1, len(shape) - 1)
    field = np.stack(
        [
            ndimage.affine_transform(channel, [1 / cells] * starts.size, starts, shape[1:], order=1, mode="nearest")
            for channel in values
        ]
    )
    return (field / np.sqrt(np.square(field).mean())).astype(np.float32)
