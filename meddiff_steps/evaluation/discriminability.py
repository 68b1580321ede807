"""From which detail on images can be told from real ones: the classifier's AUC over what a low-pass leaves.

One AUC of all detail saturates at 1 by whatever little differs.  After the detail above a frequency is removed, the
same classifier says whether coarser structure is told, too: a curve that leaves 0.5 late is better than one that leaves
it early, where both end at 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import ndimage

from meddiff_steps.config import Evaluate
from meddiff_steps.evaluation.likeness import Kind, Measured, measured, smallest
from meddiff_steps.evaluation.realism import classifier_auc
from meddiff_steps.evaluation.realism.base import MIN_IMAGES, Draws
from meddiff_steps.instruments.feature_spaces.base import Change, Context
from meddiff_steps.instruments.feature_spaces.random import build


def low_pass(cutoff: float) -> Change:
    """A Gaussian that halves the amplitude at `cutoff` cycles per voxel, for images (b, 1, *spatial)."""
    width = math.sqrt(math.log(2) / 2) / (math.pi * cutoff)

    def change(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(images, (0, 0, *(width,) * (images.ndim - 2)))

    return change


def discriminability(
    kinds: Mapping[str, Kind],
    found: Sequence[Measured],
    settings: Evaluate,
    spatial_dims: int,
    voxel_mm: tuple[float, ...] | None,
    *,
    seed: str,
) -> dict[str, Any]:
    """AUC of `classifier_auc` in the space `random` against held-out scans, after removing detail above each of
    `evaluate.cutoffs`, and of all detail.

    Parameters
    ----------
    kinds, found
        Images, and their features in the spaces of the study (`likeness`).
    voxel_mm
        Of the grid, of which the coarsest axis counts; None in 2D.

    Returns
    -------
    dict
        `cutoffs_cycles_per_voxel`, ascending, the last None (all detail); `finest_mm`, half a wavelength at each; and
        for `synthetic`, `training` (the floor) and `reconstructions` a figure per cut-off.  The last is that of
        `realism` in the space `random`.  Only `skipped` where there are too few images.
    """
    space = build(Context(spatial_dims))
    card: dict[str, Any] = {"space": space.name, "digest": space.digest}
    if smallest(kinds) < MIN_IMAGES:
        return card | {
            "skipped": f"{smallest(kinds)} images of one kind, counted by subject, at least {MIN_IMAGES} are needed"
        }
    cutoffs = [*sorted(settings.cutoffs), None]
    draws = Draws(settings.bootstrap, settings.realism_bootstrap, settings.permutations, seed, "")
    curves: dict[str, list[Any]] = {kind: [] for kind in kinds if kind != "held_out"}
    whole = next((one for one in found if one.space.digest == space.digest), None)
    for cutoff in cutoffs:
        if cutoff is None and whole is not None:
            one = whole
        else:
            (one,) = measured([space], kinds, None if cutoff is None else low_pass(cutoff))
        for kind, curve in curves.items():
            curve.append(
                classifier_auc.figure(one.samples[kind], one.samples["held_out"], one.scale, replace(draws, label=kind))
            )
    coarsest = None if voxel_mm is None else max(voxel_mm)
    finest = [None if coarsest is None else float(f"{coarsest / (2 * (cutoff or 0.5)):.4g}") for cutoff in cutoffs]
    return card | {"cutoffs_cycles_per_voxel": cutoffs, "finest_mm": finest} | curves
