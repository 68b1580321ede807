"""Figures with intervals: the bootstrap over subjects, vectorised over resamples.

A statistic is a function of weights: given how often each row was drawn, (resamples, rows), it returns one number per
resample.  The same label gives the same resamples, so that statistics of the same rows are compared pairwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Figure = dict[str, Any]
Statistic = Callable[[np.ndarray], np.ndarray]

#: Weights held at once (elements); bounds the memory of a bootstrap over many rows.
CHUNK = 2**22
#: Bins of equal width of the expected calibration error.
ECE_BINS = 10
#: Significant digits of every published figure: more would only show the rounding of the machine.
DIGITS = 6


def philox(seed: str, label: str) -> np.random.Generator:
    """A generator for one purpose; different labels give independent streams."""
    digest = hashlib.sha256(f"meddiff/evaluation/v1|{seed}|{label}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


def rounded(value: float) -> float | None:
    """`value` with `DIGITS` significant digits; None when it is not finite (JSON has no NaN)."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def figure(value: float, draws: np.ndarray, n: int) -> Figure:
    """A measured figure with its 95 % percentile interval.

    Parameters
    ----------
    value
        The statistic of all rows; not finite where it is undefined.
    draws
        The statistic of each resample, (resamples,).
    n
        Independent units (subjects, images) behind the figure.

    Returns
    -------
    dict
        value, low, high (None where undefined) and n.
    """
    finite = draws[np.isfinite(draws)]
    known = math.isfinite(value) and n > 1 and 2 * len(finite) >= len(draws)
    low, high = np.percentile(finite, [2.5, 97.5]) if known else (math.nan, math.nan)
    return {"value": rounded(float(value)), "low": rounded(float(low)), "high": rounded(float(high)), "n": int(n)}


class Bootstrap:
    """Resamples of units (subjects), each with all of its rows.

    Parameters
    ----------
    units
        Unit of each row.
    resamples, seed, label
        How many, and which random stream.
    """

    def __init__(self, units: Sequence[Any] | np.ndarray, resamples: int, seed: str, label: str = "") -> None:
        names, self.unit_of_row = np.unique(np.asarray(units, dtype=str), return_inverse=True)
        self.n = len(names)
        self.rows = len(self.unit_of_row)
        self.resamples, self.seed, self.label = resamples, seed, label

    def weights(self) -> Iterator[np.ndarray]:
        """How often each row was drawn, as float64 (some resamples, rows) at a time."""
        rng = philox(self.seed, f"bootstrap|{self.label}")
        step = max(1, CHUNK // max(1, self.rows))
        for start in range(0, self.resamples, step):
            size = min(step, self.resamples - start)
            drawn = rng.integers(0, self.n, size=(size, self.n)) + self.n * np.arange(size)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=size * self.n).reshape(size, self.n)
            yield counts[:, self.unit_of_row].astype(np.float64)

    def all_weights(self) -> np.ndarray:
        """All of `weights` at once, (resamples, rows): for few resamples of few rows."""
        return np.concatenate(list(self.weights()))

    def draws(self, statistic: Statistic) -> tuple[float, np.ndarray]:
        """The statistic of all rows, and of each resample (resamples,)."""
        if self.rows == 0:
            return math.nan, np.full(self.resamples, math.nan)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(np.ones((1, self.rows)))[0])
            return value, np.concatenate([statistic(weights) for weights in self.weights()])

    def figure(self, statistic: Statistic) -> Figure:
        """The statistic with its interval."""
        return figure(*self.draws(statistic), self.n)


def centred(value: float, draws: np.ndarray, lowest: float = -math.inf) -> np.ndarray:
    """Draws moved so that their median is the value, and no lower than `lowest`.

    For statistics that repeated rows bias: a resample holds only 63 % of the rows, so a distance between samples comes out too
    large and a diversity too small.  The spread of the draws is still right; where they lie is not.
    """
    return np.maximum(draws + (value - np.median(draws)), lowest) if np.isfinite(draws).any() else draws


def mean_of(values: np.ndarray) -> Statistic:
    """Mean of `values` (rows,)."""
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ column / weights.sum(1)


def _moments(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    a, b = (np.asarray(v, dtype=np.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()  # small numbers keep the differences of squares exact
    columns = np.stack([a, b, a * a, b * b, a * b], axis=1)

    def moments(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ma, mb, aa, bb, ab = (weights @ columns / weights.sum(1, keepdims=True)).T
        # A constant sample has a variance of rounding errors; it must read as 0 so that the ratio is undefined.
        return np.where(aa - ma**2 > 1e-12 * aa, aa - ma**2, 0.0), np.where(bb - mb**2 > 1e-12 * bb, bb - mb**2, 0.0), ab - ma * mb

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
