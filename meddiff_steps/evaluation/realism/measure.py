"""The chosen metrics of one feature space, each beside its floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meddiff_steps.core.choice import chosen
from meddiff_steps.core.registries import METRICS
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale


def measure(
    samples: Mapping[str, Sample],
    scale: Scale,
    names: Sequence[str] | None = None,
    *,
    resamples: int,
    slow_resamples: int,
    permutations: int,
    seed: str,
) -> dict[str, Any]:
    """Realism of one feature space.

    Parameters
    ----------
    samples
        `synthetic`, `training` (as many) and `held_out`, in standard deviations (`Scale.standard`); at least
        `MIN_IMAGES` each.
    scale
        Of the space.
    names
        Of the registry `METRICS`; None: all.  A metric's numbers do not depend on which others are chosen.
    resamples, slow_resamples, permutations, seed
        As in `Draws`.

    Returns
    -------
    dict
        Per metric, in the order of the registry, a figure with a `floor`.

    Raises
    ------
    UserError
        A name is not in the registry.
    """
    out: dict[str, Any] = {}
    for name in chosen(METRICS, names, "evaluate.metrics"):
        figure = METRICS.load(name).figure
        found, floor = (
            figure(
                samples[kind], samples["held_out"], scale, Draws(resamples, slow_resamples, permutations, seed, kind)
            )
            for kind in ("synthetic", "training")
        )
        out[name] = found | {"floor": floor}
    return out
