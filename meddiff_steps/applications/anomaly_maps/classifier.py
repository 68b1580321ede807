"""The scan taken back along the sampler's path, and forward again along the gradient of a predictor of health."""

from __future__ import annotations

from meddiff_steps.applications.anomaly_maps._moved import moved
from meddiff_steps.applications.anomaly_maps.base import Context, Mapper
from meddiff_steps.core.errors import UserError

ENTRY = {
    "order": 5,
    "summary": "A counterfactual: the scan inverted, and drawn again along the gradient of a linear predictor",
    "source": "Wolleb et al. 2022; Dhariwal and Nichol 2021, algorithm 2",
    "needs": [
        "a trained model",
        "one value of anomaly.healthy",
        "training scans with and without lesions",
        "latents of the cohort",
    ],
    "cost": "6 * inversion_depth * num_inference_steps passes of one image, a third of them differentiated",
}


def build(context: Context) -> Mapper:
    if not context.guides:
        raise UserError(
            "anomaly.methods: classifier needs the cohort's latents, which its predictor is fitted to. Give them to the"
            " step (--latents, --scale), or leave the method out."
        )
    return moved(context, 1.0, context.guides)
