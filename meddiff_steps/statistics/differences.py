"""Tests of differences: DeLong's of two AUCs on the same subjects, Holm's adjustment for several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata
from statsmodels.stats.multitest import multipletests

from meddiff_steps.statistics.bootstrap import rounded


def delong(labels: np.ndarray, scores: np.ndarray, units: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs of several scores of the same rows, and their covariance.

    DeLong et al. 1988, with structural components from ranks (Sun and Xu 2014), and for several rows of one subject the
    extension of Obuchowski 1997 (equations for S10, S01 and S11), which is the former where every subject has one row.

    Parameters
    ----------
    labels
        Boolean (rows,).
    scores
        (rows, scores).
    units
        Subject of each row.

    Returns
    -------
    aucs, covariance
        (scores,) and (scores, scores); nan with fewer than two subjects on either side.
    """
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=float)
    m, n = int(labels.sum()), int((~labels).sum())
    numbers = np.unique(np.asarray(units, dtype=str), return_inverse=True)[1]
    subjects = int(numbers.max()) + 1 if len(numbers) else 0
    sides = [len(np.unique(numbers[labels])), len(np.unique(numbers[~labels]))]
    k = scores.shape[1]
    if min(sides) < 2:
        return np.full(k, math.nan), np.full((k, k), math.nan)
    overall = rankdata(scores, axis=0)
    above = (overall[labels] - rankdata(scores[labels], axis=0)) / n  # share of negative rows below each positive one
    below = 1.0 - (overall[~labels] - rankdata(scores[~labels], axis=0)) / m
    aucs = above.mean(0)
    sums = np.zeros((2, subjects, k))
    np.add.at(sums[0], numbers[labels], (above - aucs) / m)
    np.add.at(sums[1], numbers[~labels], (below - aucs) / n)
    corrections = [side / (side - 1) for side in (*sides, subjects)]
    cross = sums[0].T @ sums[1]
    return aucs, corrections[0] * sums[0].T @ sums[0] + corrections[1] * sums[1].T @ sums[1] + corrections[2] * (
        cross + cross.T
    )


def delong_difference(
    labels: np.ndarray, first: np.ndarray, second: np.ndarray, units: Sequence[Any] | np.ndarray
) -> dict[str, Any]:
    """Difference of two arms' mean AUC over seeds with DeLong's interval, over subjects alone: seeds are taken as they
    are.

    Parameters
    ----------
    first, second
        Scores of the arms' classifiers (rows, seeds).

    Returns
    -------
    dict
        `difference` (a figure, normal interval) and two-sided `p`; None where undefined.
    """
    aucs, covariance = delong(labels, np.concatenate([first, second], axis=1), units)
    contrast = np.concatenate(
        [np.full(first.shape[1], 1 / first.shape[1]), np.full(second.shape[1], -1 / second.shape[1])]
    )
    value, error = (
        float(contrast @ aucs),
        math.sqrt(max(0.0, float(contrast @ covariance @ contrast))) if np.isfinite(covariance).all() else math.nan,
    )
    half = float(norm.ppf(0.975)) * error
    if error == 0:  # both tell all subjects apart, or none: nothing scatters that an interval could be made of
        half = math.nan
    p = 2.0 * float(norm.sf(abs(value) / error)) if error > 0 else 1.0 if value == 0 else math.nan
    subjects = len(set(map(str, units)))
    return {
        "difference": {
            "value": rounded(value),
            "low": rounded(value - half),
            "high": rounded(value + half),
            "n": subjects,
        },
        "p": rounded(p),
    }


def holm(p_values: Sequence[float]) -> list[float | None]:
    """p values adjusted for all of them being looked at (Holm 1979); None where one is undefined."""
    known = [i for i, p in enumerate(p_values) if math.isfinite(p)]
    adjusted: list[float | None] = [None] * len(p_values)
    if known:
        for i, p in zip(known, multipletests([p_values[i] for i in known], method="holm")[1], strict=True):
            adjusted[i] = rounded(float(p))
    return adjusted
