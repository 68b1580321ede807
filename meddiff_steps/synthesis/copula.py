"""Covariates of subjects who do not exist: a Gaussian copula fitted to the training rows.

Each covariate keeps its own distribution (its margin); how covariates hang together is one correlation matrix of latent
standard normals (Nelsen 2006; Patki et al. 2016 for tables).  A subject is a function of its own row of standard
normals.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

from meddiff_steps.cohort.learnt import LearntNumber
from meddiff_steps.config import ContinuousCovariate, Covariates
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

#: Fewest training values that a margin, and fewest common ones that a correlation, is fitted to.
MIN_ROWS = 10

#: Correlations are kept inside +- this, and eigenvalues of their matrix above 1 minus it.
MAX_CORRELATION = 0.999

#: Values are given to a power of ten that is at most this share of the declared range: as many digits as mean
#: something, and none of those in which two machines may differ.
RESOLUTION = 1e-5


@dataclass(frozen=True)
class ContinuousMargin:
    """Empirical distribution of a number: quantiles are interpolated linearly between the training values.  A count, a
    score or a setting keeps the values that it can have.

    Attributes
    ----------
    values
        Training values, sorted, (n,), in the covariate's unit.
    range
        Declared range; what is drawn stays inside.
    """

    name: str
    values: np.ndarray
    range: tuple[float, float]

    @cached_property
    def scale(self) -> LearntNumber:
        """The values that such a column can have."""
        return LearntNumber(self.values)

    def quantile(self, z: np.ndarray) -> np.ndarray:
        """Values (n,) at standard normal scores `z` (n,)."""
        low, high = self.range
        drawn = np.interp(ndtr(z), np.linspace(0.0, 1.0, len(self.values)), self.values)
        placed = self.scale.placed(drawn)
        if placed is not None:
            return placed
        return np.clip(np.round(drawn, -math.floor(math.log10((high - low) * RESOLUTION))), low, high)

    def score(self, value: float) -> float:
        """Standard normal score of a value; of one beyond the training values, that of half an observation's tail."""
        known, first, count = np.unique(self.values, return_index=True, return_counts=True)
        n = len(self.values)
        position = np.interp(value, known, (first + (count - 1) / 2) / (n - 1))
        return float(ndtri(np.clip(position, 0.5 / n, 1 - 0.5 / n)))

    def scores(self, column: pd.Series) -> np.ndarray:
        """Normal scores (van der Waerden) of a column, NaN where missing; equal values share their mean rank."""
        raw = column.to_numpy(dtype=np.float64)
        out = np.full(len(raw), np.nan)
        present = ~np.isnan(raw)
        out[present] = ndtri((rankdata(raw[present]) - 0.5) / present.sum())
        return out


@dataclass(frozen=True)
class CategoricalMargin:
    """Levels as consecutive intervals of a standard normal, in declared order, each as likely as in training.

    Attributes
    ----------
    levels
        Levels that occur in training.
    shares
        Their frequencies, (levels,), adding up to 1.
    """

    name: str
    levels: tuple[str, ...]
    shares: np.ndarray

    @property
    def thresholds(self) -> np.ndarray:
        """Inner borders of the intervals, (levels - 1,)."""
        return ndtri(np.cumsum(self.shares)[:-1])

    @property
    def means(self) -> np.ndarray:
        """Mean of the latent normal within each level, (levels,)."""
        density = np.exp(-0.5 * np.r_[-np.inf, self.thresholds, np.inf] ** 2) / math.sqrt(2 * math.pi)
        return -np.diff(density) / self.shares

    @property
    def spread(self) -> float:
        """Standard deviation of `means` over subjects: by this a correlation with the level is weaker than with the
        latent.
        """
        return float(np.sqrt((self.shares * self.means**2).sum()))

    def quantile(self, z: np.ndarray) -> np.ndarray:
        """Levels (n,) at standard normal scores `z` (n,)."""
        return np.array(self.levels, dtype=object)[np.searchsorted(self.thresholds, z)]

    def scores(self, column: pd.Series) -> np.ndarray:
        """Mean latent score of each row's level, NaN where missing."""
        known = dict(zip(self.levels, self.means, strict=True))
        return np.array([known.get(value, np.nan) for value in column.tolist()], dtype=np.float64)


Margin = ContinuousMargin | CategoricalMargin


@dataclass(frozen=True, eq=False)
class GaussianCopula:
    """A joint distribution of covariates.

    Attributes
    ----------
    margins
        One per covariate, by name in alphabetical order: the order of the normals, whatever the order in the config.
    correlation
        Of the latent normals, (k, k), positive definite.
    """

    margins: tuple[Margin, ...]
    correlation: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(margin.name for margin in self.margins)

    @classmethod
    def fit(cls, training: pd.DataFrame, covariates: Covariates) -> Self:
        """Fit margins and correlations to the training rows.

        A missing value takes part in nothing; a correlation is that of the rows which have both covariates.
        Correlations are shrunk towards 0 as far as their own uncertainty asks for (Schaefer and Strimmer 2005), then
        repaired to be positive definite.

        Parameters
        ----------
        training
            One row per training scan and a column per covariate: numbers (NaN where missing) or text (None where
            missing).
        covariates
            The declared schema.

        Raises
        ------
        UserError
            A covariate has fewer than 10 values, or only one and the same.
        """
        margins = tuple(_fit_margin(training[name], name, covariates) for name in sorted(covariates))
        return cls(margins, _fit_correlation(training, margins))

    def sample(self, normals: np.ndarray, given: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Covariates of subjects, from one row of standard normals each.

        A row of the result depends on its own row of normals only, to the last bit.

        Parameters
        ----------
        normals
            Standard normals (n, k), columns in the order of `names`.
        given
            Continuous covariates that are fixed, with their value; the others are drawn from their distribution given
            these.  (The normals of fixed covariates are not used.)

        Returns
        -------
        pandas.DataFrame
            A column per covariate in the order of `names`; nothing is missing.
        """
        given = given or {}
        normals = np.asarray(normals, dtype=np.float64)
        if normals.ndim != 2 or normals.shape[1] != len(self.margins):
            raise ValueError(f"normals must be (n, {len(self.margins)}), found {normals.shape}")
        fixed = [i for i, margin in enumerate(self.margins) if margin.name in given]
        free = [i for i, margin in enumerate(self.margins) if margin.name not in given]
        within, across = self.correlation[np.ix_(free, free)], self.correlation[np.ix_(free, fixed)]
        offset = np.zeros(len(free))
        if fixed:
            known = np.array([_continuous(self.margins[i]).score(given[self.margins[i].name]) for i in fixed])
            slopes = np.linalg.solve(self.correlation[np.ix_(fixed, fixed)], across.T).T
            offset, within = slopes @ known, within - slopes @ across.T
        root = np.linalg.cholesky(within)
        columns: dict[str, np.ndarray] = {name: np.full(len(normals), value) for name, value in given.items()}
        for row, i in enumerate(free):
            z = np.full(len(normals), offset[row])
            for column in range(row + 1):  # not a matrix product: its rounding could depend on how many rows there are
                z += root[row, column] * normals[:, free[column]]
            columns[self.margins[i].name] = self.margins[i].quantile(z)
        return pd.DataFrame({name: columns[name] for name in self.names})


def _continuous(margin: Margin) -> ContinuousMargin:
    if not isinstance(margin, ContinuousMargin):
        raise ValueError(f"{margin.name}: only continuous covariates can be given; choose among samples for a level")
    return margin


def _fit_margin(column: pd.Series, name: str, covariates: Covariates) -> Margin:
    covariate, present = covariates[name], column.dropna()
    instead = f"Remove `{name}` from `covariates`, add training scans that have it, or plan with `covariates: table`."
    if len(present) < MIN_ROWS:
        raise UserError(
            f"covariates.{name}: {len(present)} of {len(column)} training rows have a value; a copula needs at least"
            f" {MIN_ROWS}. {instead}"
        )
    if present.nunique() < 2:
        raise UserError(
            f"covariates.{name}: all {len(present)} training values are {present.iloc[0]}, so there is no distribution"
            f" to learn. {instead}"
        )
    if isinstance(covariate, ContinuousCovariate):
        return ContinuousMargin(name, np.sort(present.to_numpy(dtype=np.float64)), covariate.range)
    counts = {level: int((present == level).sum()) for level in covariate.levels}
    seen = tuple(level for level, count in counts.items() if count)
    return CategoricalMargin(name, seen, np.array([counts[level] for level in seen]) / len(present))


def _fit_correlation(training: pd.DataFrame, margins: tuple[Margin, ...]) -> np.ndarray:
    """Correlation of the latent normals, (k, k), shrunk and positive definite."""
    scores = [margin.scores(training[margin.name]) for margin in margins]
    matrix = np.eye(len(margins))
    uncertainty = strength = 0.0
    for i in range(len(margins)):
        for j in range(i):
            both = ~np.isnan(scores[i]) & ~np.isnan(scores[j])
            x, y = scores[i][both], scores[j][both]
            if len(x) < MIN_ROWS or np.ptp(x) == 0 or np.ptp(y) == 0:
                log.warning(
                    "covariates %s and %s: too few training rows have both; planned as if unrelated",
                    margins[j].name,
                    margins[i].name,
                )
                continue
            observed = float(np.corrcoef(x, y)[0, 1])
            matrix[i, j] = matrix[j, i] = _latent_correlation(observed, margins[i], margins[j])
            uncertainty += (1 - observed**2) ** 2 / (len(x) - 1)
            strength += observed**2
    shrinkage = min(1.0, uncertainty / strength) if strength else 1.0
    matrix = (1 - shrinkage) * matrix + shrinkage * np.eye(len(margins))
    values, vectors = np.linalg.eigh(matrix)
    if values[0] < 1 - MAX_CORRELATION:  # pairwise estimates need not fit together
        matrix = (vectors * np.maximum(values, 1 - MAX_CORRELATION)) @ vectors.T
        scale = np.sqrt(np.diag(matrix))
        matrix /= np.outer(scale, scale)
    return matrix


def _latent_correlation(observed: float, a: Margin, b: Margin) -> float:
    """Correlation of two latent normals, from that of their scores.

    A level stands for an interval, whose mean varies less than the latent itself.  With one categorical covariate the
    score correlation is rho times the spread of the level means; with two, the rho is searched that explains it.
    """
    if isinstance(a, CategoricalMargin) and isinstance(b, CategoricalMargin):
        rho = _polychoric(observed * a.spread * b.spread, a, b)
    else:
        spread = math.prod(margin.spread for margin in (a, b) if isinstance(margin, CategoricalMargin))
        rho = observed / spread
    return min(max(rho, -MAX_CORRELATION), MAX_CORRELATION)


def _polychoric(moment: float, a: CategoricalMargin, b: CategoricalMargin) -> float:
    """The correlation of two latent normals at which the mean product of their level scores is `moment`."""
    z = ndtri((np.arange(2000) + 0.5) / 2000)
    of_a = a.means[np.searchsorted(a.thresholds, z)]

    def excess(rho: float) -> float:
        below = ndtr((b.thresholds[:, None] - rho * z) / math.sqrt(1 - rho**2))
        chances = np.diff(np.vstack([np.zeros(len(z)), below, np.ones(len(z))]), axis=0)
        return float((of_a * (b.means @ chances)).mean()) - moment

    low, high = excess(-MAX_CORRELATION), excess(MAX_CORRELATION)
    if low >= 0 or high <= 0:
        return -MAX_CORRELATION if low >= 0 else MAX_CORRELATION
    return float(brentq(excess, -MAX_CORRELATION, MAX_CORRELATION, xtol=1e-9))
