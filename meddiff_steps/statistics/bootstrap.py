"""Figures with intervals: the bootstrap over subjects, vectorised over resamples.

A statistic is a function of weights: given how often each row was drawn, (resamples, rows), it returns one number per
resample.  The same label gives the same resamples, so that statistics of the same rows are compared pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq

from meddiff_steps.core.random_streams import philox

Figure = dict[str, Any]
Statistic = Callable[[np.ndarray], np.ndarray]

#: Weights held at once (elements); bounds the memory of a bootstrap over many rows.
CHUNK = 2**22
#: Standard deviations of a normal distribution on either side of its mean that hold 95 % of it.
Z = 1.959963984540054
#: Significant digits of every published figure: more would only show the rounding of the machine.
DIGITS = 6
#: Units of the smaller side of an AUC below which it has no interval: of 4 against 30 one that holds the truth 95 % of
#: the time is as wide as 0.6 where nothing can be told.
LEAST = 5


class Side(NamedTuple):
    """The smaller side of an AUC: its units, and how many are on the other side, 0 of pairs."""

    units: int
    against: int

    def enough(self, draws: np.ndarray) -> np.ndarray:
        """Draws (resamples,) of what is made of AUCs, none of them a number where the side has fewer than `LEAST`
        units.
        """
        return draws if self.units >= LEAST else np.full(len(draws), math.nan)


def rounded(value: float) -> float | None:
    """`value` with `DIGITS` significant digits; None when it is not finite (JSON has no NaN)."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` units (Wilson 1927); where it is 0 or 1, it reaches as far as 3 / n at least (the
    rule of three).
    """
    if n == 0:
        return 0.0, 1.0
    square = Z**2 / n
    middle, half = share + square / 2, math.sqrt(square * (share * (1 - share) + square / 4))
    low, high = (max(0.0, middle - half) / (1 + square), min(1.0, (middle + half) / (1 + square)))
    return (
        min(low, max(0.0, 1.0 - 3.0 / n)) if share == 1.0 else low,
        max(high, min(1.0, 3.0 / n)) if share == 0.0 else high,
    )


def newcombe(area: float, side: Side) -> tuple[float, float]:
    """95 % interval of an AUC of independent units: the areas from which `area` lies no further than 1.96 of the
    standard errors that Hanley and McNeil 1982 give these (Newcombe 2006, method 5).

    >>> [round(end, 3) for end in newcombe(0.5, Side(5, 30))]
    [0.262, 0.738]
    """
    pairs, half = side.units * side.against, (side.units + side.against) / 2 - 1

    def beyond(true: float) -> float:
        spread = true * (1 - true) * (1 + half * (1 - true) / (2 - true) + half * true / (1 + true))
        return float(pairs * (area - true) ** 2 - Z**2 * spread)

    inside = min(max(area, 1e-9), 1 - 1e-9)
    return float(brentq(beyond, 0.0, inside)), float(brentq(beyond, inside, 1.0))


def figure(value: float, draws: np.ndarray, n: int, share_of: int | Side = 0) -> Figure:
    """A measured figure with its 95 % percentile interval.

    Resamples that are all alike, as of few images that are told apart perfectly, say nothing of how far another sample
    would lie.  A share has Wilson's interval then, and anything else has none.

    Resamples of few units scatter too little: of 5 against 30 their interval of an AUC held the truth 82 to 95 % of the
    time, of 10 against 30 still 83 to 95 %.  So an AUC of independent sides has the wider of it and `newcombe` at
    either end (95 % and more); of pairs, which differ less, it has that of resampled pairs.  Any has none where its
    smaller side has fewer than `LEAST` units.

    Parameters
    ----------
    value
        The statistic of all rows; not finite where it is undefined.
    draws
        The statistic of each resample, (resamples,).
    n
        Independent units (subjects, images) behind the figure.
    share_of
        Of a share, the units that it is a share of; of an AUC, which is a share of pairs, its smaller side.  0 for
        anything else.

    Returns
    -------
    dict
        value, low, high (None where undefined) and n; and `too_few`, the units of the smaller side of an AUC, where it
        has no interval because of them.
    """
    side = share_of if isinstance(share_of, Side) else None
    units = share_of.units if isinstance(share_of, Side) else share_of
    draws = draws if side is None else side.enough(draws)
    finite = draws[np.isfinite(draws)]
    known = math.isfinite(value) and n > 1 and 2 * len(finite) >= len(draws)
    low, high = np.percentile(finite, [2.5, 97.5]) if known else (math.nan, math.nan)
    if known and rounded(float(low)) == rounded(float(high)):
        low, high = wilson(float(value), units) if units else (math.nan, math.nan)
    elif known and side is not None and side.against:
        least, most = newcombe(float(value), side)
        low, high = min(low, least), max(high, most)
    found = {"value": rounded(float(value)), "low": rounded(float(low)), "high": rounded(float(high)), "n": int(n)}
    few = side is not None and units < LEAST and found["value"] is not None
    return found | ({"too_few": units} if few else {})


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

    def figure(self, statistic: Statistic, share_of: int | Side = 0) -> Figure:
        """The statistic with its interval; see `figure`."""
        return figure(*self.draws(statistic), self.n, share_of)

    def error_figure(self, statistic: Statistic) -> Figure:
        """An error that repeated rows make larger, of at least 0, with an interval about its value; see `centred`."""
        value, draws = self.draws(statistic)
        return figure(value, centred(value, draws, 0.0), self.n)


def centred(value: float, draws: np.ndarray, lowest: float = -math.inf) -> np.ndarray:
    """Draws moved so that their median is the value, and no lower than `lowest`.

    For statistics that repeated rows bias: a resample holds only 63 % of the rows, so a distance between samples comes
    out too large and a diversity too small.  The spread of the draws is still right; where they lie is not.
    """
    return np.maximum(draws + (value - np.median(draws)), lowest) if np.isfinite(draws).any() else draws
