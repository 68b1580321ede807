"""Grey levels of generated images, fitted to those of training scans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from meddiff_steps.core.random_streams import seed_key, step_generator
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.models.tone import ToneCurve, level_counts, level_distance
from meddiff_steps.synthesis.generate import CohortGenerator

#: Images that are generated for it, and scans that they are compared with.
IMAGES = 64


def fit_tone(
    generator: CohortGenerator, scans: pd.DataFrame, shards: Shards, rows: Sequence[int], seed: str
) -> tuple[ToneCurve, dict[str, Any]]:
    """The curve for what `generator` makes, and what it is worth.

    Parameters
    ----------
    generator
        Of a model without a curve.
    scans
        Training scans: a row each, with the study's covariates.
    shards, rows
        Their images, in the same order.
    seed
        The study's.

    Returns
    -------
    curve, facts
        `distance` of grey levels from those of scans (`level_distance`), before and with a curve that was fitted on
        other images (`distance_toned`); the curve is the identity where it would not lower that.  `zeros`: the share of
        black voxels in scans and in images, before and with the curve.
    """
    count = min(IMAGES, len(scans))
    chosen = np.sort(step_generator(seed, "tone/scans", 0).permutation(len(scans))[:count])
    index = np.arange(count)
    root = f"{seed}/tone"
    plan = scans.iloc[chosen].assign(
        sample_id=[f"tone-{i:03d}" for i in index],
        index=index,
        cohort_root=root,
        noise_index=index,
        attempt=0,
        seed_key=[seed_key(root, int(i), 0, "noise") for i in index],
    )
    order = {name: i for i, name in enumerate(plan["sample_id"])}
    made = np.zeros((count, len(level_counts(np.zeros(1)))), np.int64)
    for name, image in generator.images(plan.reset_index(drop=True), "grey levels"):
        made[order[name]] = level_counts(image)
    real = np.stack([level_counts(shards.tensors("image", [rows[i]])) for i in chosen])
    halves = [index % 2 == 0, index % 2 == 1]
    before, after = [], []
    for fitted, other in (halves, halves[::-1]):
        if not (fitted.any() and other.any()):
            continue
        curve = _fitted(made[fitted], real[fitted])
        before.append(level_distance(made[other].sum(0), real[other].sum(0)))
        after.append(level_distance(_through(curve, made[other].sum(0)), real[other].sum(0)))
    helps = not before or float(np.mean(after)) < float(np.mean(before))
    curve = _fitted(made, real) if helps else ToneCurve()
    facts = {
        "images": count,
        "used": helps,
        "distance": float(np.mean(before)) if before else 0.0,
        "distance_toned": float(np.mean(after)) if after else 0.0,
        "zeros": {
            "scans": float(real[:, 0].sum() / real.sum()),
            "images": float(made[:, 0].sum() / made.sum()),
            "images_toned": float(_through(curve, made.sum(0))[0] / made.sum()),
        },
    }
    return curve, facts


def _fitted(made: np.ndarray, real: np.ndarray) -> ToneCurve:
    curve = ToneCurve()
    curve.fit(made.sum(0), real.sum(0))
    return curve


def _through(curve: ToneCurve, counts: np.ndarray) -> np.ndarray:
    """Counts by level behind the curve; each level is taken at its upper end."""
    levels = torch.arange(len(counts)) / (len(counts) - 1)
    moved = np.ceil(curve(levels).double().numpy() * (len(counts) - 1) - 1e-6).astype(np.int64).clip(0, len(counts) - 1)
    return np.bincount(moved, counts, minlength=len(counts))
