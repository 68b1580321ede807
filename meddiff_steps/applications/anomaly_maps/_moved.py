"""Counterfactuals of health: by inversion, and a way back with one covariate moved."""

from __future__ import annotations

from collections.abc import Mapping

from meddiff_steps import config
from meddiff_steps.applications.anomaly_maps.base import Context, Finding, Mapper, Scan
from meddiff_steps.applications.counterfactual import counterfactuals
from meddiff_steps.diffusion.guidance import Guidance


def moved(context: Context, guidance_scale: float, guides: tuple[Guidance, ...]) -> Mapper:
    """A method that moves the covariate of `healthy`; against the same way there and back with nothing moved.

    A scan's own value is not known: the way to the state, and back with nothing moved, are without it.
    """
    ((covariate, value),) = context.settings.healthy.items()
    settings = config.Counterfactual(
        covariate=covariate,
        depth=context.settings.inversion_depth,
        guidance_scale=guidance_scale,
        num_inference_steps=context.settings.num_inference_steps,
    )

    def find(scan: Scan) -> Mapping[str, Finding]:
        made = counterfactuals(context.model, scan.image[None], scan.subject, [value], settings, [guides])
        healed = made.moved[0, 0]
        return {"": Finding((made.returned[0] - healed)[0], healed)}

    return find
