"""The chosen metrics of one feature space, each beside its floor and beside what reconstructions of real scans give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from meddiff_steps.core.choice import chosen
from meddiff_steps.core.registries import METRICS
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.statistics.bootstrap import Figure


def judge(
    sample: Sample, reference: Sample, scale: Scale, draws: Draws, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Every chosen metric of one sample against the reference, in the order of the registry.

    Raises
    ------
    UserError
        A name is not in the registry.
    """
    return {
        name: METRICS.load(name).figure(sample, reference, scale, draws)
        for name in chosen(METRICS, names, "evaluate.metrics")
    }


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
        `MIN_IMAGES` each.  `reconstructions` of held-out scans, and these `originals`, where there are enough.
    scale
        Of the space.
    names
        Of the registry `METRICS`; None: all.  A metric's numbers do not depend on which others are chosen.
    resamples, slow_resamples, permutations, seed
        As in `Draws`.

    Returns
    -------
    dict
        Per metric, in the order of the registry, a figure with a `floor`, and `reconstructions`, a figure whose
        `floor` is that of the same scans before they were encoded.

    Raises
    ------
    UserError
        A name is not in the registry.
    """
    draws = Draws(resamples, slow_resamples, permutations, seed, "")

    def beside(kind: str, real: str) -> dict[str, Figure]:
        found, floor = (
            judge(samples[label], samples["held_out"], scale, replace(draws, label=label), names)
            for label in (kind, real)
        )
        return {name: figure | {"floor": floor[name]} for name, figure in found.items()}

    out = beside("synthetic", "training")
    if "reconstructions" in samples:
        for name, figure in beside("reconstructions", "originals").items():
            out[name]["reconstructions"] = figure
    return out
