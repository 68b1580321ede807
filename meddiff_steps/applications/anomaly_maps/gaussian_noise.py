"""Gaussian noise, as the model was trained on it, and what it draws from there."""

from __future__ import annotations

from meddiff_steps.applications.anomaly_maps._noised import noised
from meddiff_steps.applications.anomaly_maps.base import Context, Mapper
from meddiff_steps.core.random_streams import noise, seed_key

ENTRY = {
    "order": 1,
    "summary": "Gaussian noise on the latents, taken off again; large lesions may come through it",
    "source": "Wyatt et al. 2022 (AnoDDPM), as their baseline",
    "needs": ["a trained model"],
    "cost": "depths * num_inference_steps passes, of `samples` images",
}


def build(context: Context) -> Mapper:
    return noised(context, lambda root, shape: noise(seed_key(root, 0, 0, "anomaly/gaussian"), shape))
