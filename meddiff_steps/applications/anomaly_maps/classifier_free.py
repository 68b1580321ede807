"""The scan taken back along the sampler's path, and forward again as a healthy one, by classifier-free guidance."""

from __future__ import annotations

from meddiff_steps.applications.anomaly_maps._moved import moved
from meddiff_steps.applications.anomaly_maps.base import Context, Mapper

ENTRY = {
    "order": 4,
    "summary": "A counterfactual: the scan inverted, and drawn again with the healthy value of a covariate",
    "source": "Sanchez et al. 2022; Sanchez and Tsaftaris 2022",
    "needs": ["a trained model", "one value of anomaly.healthy", "training scans with and without lesions"],
    "cost": "7 * inversion_depth * num_inference_steps passes of one image",
}


def build(context: Context) -> Mapper:
    return moved(context, context.settings.guidance_scale, ())
