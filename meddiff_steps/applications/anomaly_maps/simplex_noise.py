"""Simplex noise, whose long waves hide large lesions, and what the model draws from there."""

from __future__ import annotations

import numpy as np

from meddiff_steps.applications.anomaly_maps._noised import noised
from meddiff_steps.applications.anomaly_maps.base import Context, Mapper
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.simplex import simplex_noise

ENTRY = {
    "order": 2,
    "summary": "Octaves of simplex noise on the latents, taken off again by a model that was trained on Gaussian noise",
    "source": "Wyatt et al. 2022 (AnoDDPM), who train on it too; Perlin 2001",
    "needs": ["a trained model"],
    "cost": "as `gaussian_noise`",
}


def build(context: Context) -> Mapper:
    settings = context.settings

    def draw(root: str, shape: tuple[int, ...]) -> np.ndarray:
        generator = philox(root, "anomaly/simplex")
        wavelength = max(settings.wavelength * max(shape[1:]), 1.0)
        octaves, persistence = settings.octaves, settings.persistence
        return np.stack(
            [
                simplex_noise(shape[1:], wavelength, generator, octaves=octaves, persistence=persistence)
                for _ in range(shape[0])
            ]
        )

    return noised(context, draw)
