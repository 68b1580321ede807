"""Statistics of weighted rows: each takes how often each row was drawn, (resamples, rows), and gives a number per
resample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, Side, Statistic

#: Bins of equal width of the expected calibration error.
ECE_BINS = 10


def mean_of(values: np.ndarray) -> Statistic:
    """Mean of `values` (rows,)."""
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ column / weights.sum(1)


def mean_where_known(
    values: np.ndarray, units: Iterable[Any], *, resamples: int, seed: str, label: str
) -> Figure | None:
    """Mean of `values` (rows,) over the rows where they are numbers, as a figure whose `n` are the units of these; None
    where no row is.

    The other arguments are those of `Bootstrap`.
    """
    known = np.isfinite(values)
    if not known.any():
        return None
    return Bootstrap(np.array(list(units))[known], resamples, seed, label).figure(mean_of(values[known]))


def smaller_side(labels: np.ndarray, units: Iterable[Any]) -> Side:
    """The rarer of two boolean labels, columns (rows,), counted in units: what an AUC rests on.  Where all of its units
    are on the other side, too, as reconstructions beside scans are, these are pairs: `against` is 0.
    """
    labels, units = np.asarray(labels, dtype=bool), np.array(list(units), dtype=str)
    few, many = sorted((np.unique(units[side]) for side in (labels, ~labels)), key=len)
    return Side(len(few), 0 if np.isin(few, many).all() else len(many))


def _moments(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()  # small numbers keep the differences of squares exact
    columns = np.stack([a, b, a * a, b * b, a * b], axis=1)

    def moments(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ma, mb, aa, bb, ab = (weights @ columns / weights.sum(1, keepdims=True)).T
        # A constant sample has a variance of rounding errors; it must read as 0 so that the ratio is undefined.
        return (
            np.where(aa - ma**2 > 1e-12 * aa, aa - ma**2, 0.0),
            np.where(bb - mb**2 > 1e-12 * bb, bb - mb**2, 0.0),
            ab - ma * mb,
        )

    return moments


def pearson(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Pearson correlation of two columns (rows,); NaN where one is constant."""
    moments = _moments(x, y)

    def statistic(weights: np.ndarray) -> np.ndarray:
        xx, yy, xy = moments(weights)
        return np.where(xx * yy > 0, xy / np.sqrt(xx * yy), np.nan)

    return statistic


def slope(x: np.ndarray, y: np.ndarray) -> Statistic:
    """Slope of the least-squares line of `y` on `x`, columns (rows,); NaN where `x` is constant."""
    moments = _moments(x, y)

    def statistic(weights: np.ndarray) -> np.ndarray:
        xx, _, xy = moments(weights)
        return np.where(xx > 0, xy / xx, np.nan)

    return statistic


def auc(labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """Area under the ROC curve (Mann-Whitney, ties count half) of boolean `labels` and `scores`, columns (rows,).

    NaN where a resample has no positive or no negative row.
    """
    order = np.argsort(scores, kind="stable")
    positive = np.asarray(labels, dtype=bool)[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(np.asarray(scores)[order]) > 0]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        ordered = weights[:, order]
        hits = np.add.reduceat(ordered * positive, starts, axis=1)
        misses = np.add.reduceat(ordered * ~positive, starts, axis=1)
        below = np.cumsum(misses, axis=1) - misses / 2
        return (hits * below).sum(1) / (hits.sum(1) * misses.sum(1))

    return statistic


def calibration_error(labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """Expected calibration error over `ECE_BINS` bins of equal width (Guo et al. 2017); 0 is perfect.

    It is biased upwards where bins hold few subjects, alike in whatever has as many.
    """
    bins = np.minimum((np.asarray(scores) * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = (np.arange(ECE_BINS) == bins[:, None]) * (np.asarray(labels, dtype=float) - scores)[:, None]
    return lambda weights: np.abs(weights @ gaps).sum(1) / weights.sum(1)


def macro(statistics: Sequence[Statistic]) -> Statistic:
    """Unweighted mean of several statistics, over those that are defined in a resample."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        values = np.stack([s(weights) for s in statistics])
        known = np.isfinite(values)
        return np.where(known, values, 0.0).sum(0) / known.sum(0)

    return statistic


def average_precision(labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """Area under the precision-recall curve as a sum of steps, equal scores together; nan without positive rows.

    The same definition as `sklearn.metrics.average_precision_score`; it is to be read beside the prevalence.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    positive = np.asarray(labels, dtype=bool)[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(np.asarray(scores)[order]) < 0]))

    def statistic(weights: np.ndarray) -> np.ndarray:
        ordered = weights[:, order]
        hits = np.add.reduceat(ordered * positive, starts, axis=1)
        found, seen = hits.cumsum(1), np.add.reduceat(ordered, starts, axis=1).cumsum(1)
        return (hits * found / np.maximum(seen, 1e-300)).sum(1) / hits.sum(1)

    return statistic


def brier(labels: np.ndarray, scores: np.ndarray) -> Statistic:
    """Mean squared difference of probability and outcome (Brier 1950); 0 is perfect."""
    return mean_of(np.square(np.asarray(labels, dtype=float) - scores))


def one_versus_rest(
    kind: Callable[[np.ndarray, np.ndarray], Statistic], levels: np.ndarray, probability: np.ndarray
) -> Statistic:
    """A figure of the last of two classes, or its mean over all classes, each against the rest.

    Parameters
    ----------
    levels
        True classes (rows,).
    probability
        (rows, classes).
    """
    classes = probability.shape[1]
    if classes == 2:
        return kind(levels == 1, probability[:, 1])
    return macro([kind(levels == number, probability[:, number]) for number in range(classes)])


def auc_within(levels: np.ndarray, probability: np.ndarray, inside: np.ndarray) -> Statistic:
    """AUC of the rows that are `inside`; see `one_versus_rest`."""
    rows = np.flatnonzero(inside)
    statistic = one_versus_rest(auc, levels[rows], probability[rows])
    return lambda weights: statistic(weights[:, rows])
