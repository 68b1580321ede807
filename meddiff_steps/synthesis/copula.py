"""Covariates of subjects who do not exist: a Gaussian copula fitted to the training subjects.

Each number, and each covariate of two levels, keeps its own distribution (its margin); how they hang together is one
correlation matrix of latent standard normals (Nelsen 2006; Patki et al. 2016 for tables).  Three and more levels have
no order that could be relied on (sites, diagnoses): they are drawn last, given the others (Nowok et al. 2016).  A
subject is a function of its own row of standard normals.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri, softmax
from sklearn.linear_model import LogisticRegression

from meddiff_steps.cohort.learnt import LearntNumber
from meddiff_steps.config import ContinuousCovariate, Covariates
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox

log = logging.getLogger(__name__)

#: Fewest training values that a margin, and fewest common ones that a correlation, is fitted to.
MIN_ROWS = 10

#: Correlations are kept inside +- this, and eigenvalues of their matrix above 1 minus it.
MAX_CORRELATION = 0.999

#: Values are given to a power of ten that is at most this share of the declared range: as many digits as mean
#: something, and none of those in which two machines may differ.
RESOLUTION = 1e-5

#: Subjects and steps by which the shares of three and more levels are brought to those of the training subjects.
PILOT, CALIBRATIONS = 16_384, 50


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

    @cached_property
    def known(self) -> np.ndarray:
        """The different values, sorted, (k,)."""
        return np.unique(self.values)

    @cached_property
    def means(self) -> np.ndarray:
        """Normal score (van der Waerden) of each of `known`, (k,); of a value that several have, the mean of theirs."""
        place = np.searchsorted(self.known, self.values)
        return np.bincount(place, _untied(len(self.values))) / np.bincount(place)

    @property
    def spread(self) -> float:
        """Standard deviation of the scores, relative to that without ties: by this a correlation with a value is weaker
        than with the latent.
        """
        return float(self.scores(self.values).std() / _untied(len(self.values)).std())

    @property
    def levels(self) -> CategoricalMargin | None:
        """A setting as levels in the order of its values; None of what is none."""
        if self.scale.marks is None:
            return None
        counts = np.unique(self.values, return_counts=True)[1]
        return CategoricalMargin(self.name, tuple(map(str, self.known)), counts / len(self.values))

    def score(self, value: float) -> float:
        """Standard normal score of a value; of one beyond the training values, that of half an observation's tail."""
        first, n = np.searchsorted(self.values, self.known), len(self.values)
        alone = np.diff(np.r_[first, n]) == 1
        position = np.interp(value, self.known, np.where(alone, first / (n - 1), ndtr(self.means)))
        return float(ndtri(np.clip(position, 0.5 / n, 1 - 0.5 / n)))

    def scores(self, column: Column) -> np.ndarray:
        """Normal scores of values (n,), NaN where missing; between two training values they are interpolated."""
        return np.interp(np.asarray(column, dtype=np.float64), self.known, self.means)


def _untied(n: int) -> np.ndarray:
    """Normal scores of n different values, in their order."""
    return ndtri((np.arange(n) + 0.5) / n)


@dataclass(frozen=True)
class CategoricalMargin:
    """Two levels, or those of a setting, as consecutive intervals of a standard normal, each as likely as in training.

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

    def scores(self, column: Column) -> np.ndarray:
        """Mean latent score of each row's level, NaN where missing."""
        known = dict(zip(self.levels, self.means, strict=True))
        return np.array([known.get(value, np.nan) for value in column], dtype=np.float64)


Margin = ContinuousMargin | CategoricalMargin
Column = pd.Series | np.ndarray


@dataclass(frozen=True, eq=False)
class NominalMargin:
    """Three and more levels, given the other covariates: a multinomial logit, which has no order of levels.

    Slopes have a standard normal prior, so that what few rows say of a level is trusted little.

    Attributes
    ----------
    levels
        Levels that occur in training, in alphabetical order.
    intercepts, slopes
        Log odds of each level, (levels,), and what a unit of each feature adds to them, (features, levels).
    """

    name: str
    levels: tuple[str, ...]
    intercepts: np.ndarray
    slopes: np.ndarray

    @classmethod
    def fit(cls, column: pd.Series, features: np.ndarray) -> Self:
        """Fit to the levels of rows (n,), none missing, and their features (n, features)."""
        if features.shape[1] == 0:  # which scikit-learn refuses
            shares = column.value_counts(normalize=True).sort_index()
            return cls(str(column.name), tuple(shares.index), np.log(shares.to_numpy()), np.empty((0, len(shares))))
        model = LogisticRegression(tol=1e-7, max_iter=1000).fit(features, column.to_numpy(dtype=str))
        return cls(str(column.name), tuple(model.classes_.tolist()), model.intercept_, model.coef_.T)

    def log_odds(self, features: Sequence[np.ndarray], n: int) -> np.ndarray:
        """Of n subjects with these features, each (n,): (n, levels)."""
        odds = np.tile(self.intercepts, (n, 1))
        for feature, slope in zip(features, self.slopes, strict=True):  # as in `GaussianCopula.sample`
            odds += feature[:, None] * slope
        return odds

    def calibrated(self, features: Sequence[np.ndarray], n: int, shares: np.ndarray) -> Self:
        """The same with intercepts at which n subjects with these features have the levels in these shares."""
        odds, shift = self.log_odds(features, n), np.zeros(len(shares))
        for _ in range(CALIBRATIONS):
            shift += np.log(shares / softmax(odds + shift, axis=1).mean(axis=0))
        return replace(self, intercepts=self.intercepts + shift)

    def draw(self, features: Sequence[np.ndarray], z: np.ndarray) -> np.ndarray:
        """Levels (n,) of subjects with these features, each (n,), by their standard normals (n,)."""
        odds = self.log_odds(features, len(z))
        below = np.cumsum(np.exp(odds - odds.max(axis=1, keepdims=True)), axis=1)
        place = (below[:, :-1] < ndtr(z)[:, None] * below[:, -1:]).sum(axis=1)
        return np.array(self.levels, dtype=object)[place]


@dataclass(frozen=True, eq=False)
class GaussianCopula:
    """A joint distribution of covariates.

    Attributes
    ----------
    margins
        One per number and covariate of two levels, by name in alphabetical order.
    correlation
        Of their latent normals, (margins, margins), positive definite.
    nominal
        One per covariate of three and more levels, by name; each is drawn given the margins and those before it.
    """

    margins: tuple[Margin, ...]
    correlation: np.ndarray
    nominal: tuple[NominalMargin, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Covariates in alphabetical order: the order of the normals, whatever the order in the config."""
        return tuple(sorted(margin.name for margin in (*self.margins, *self.nominal)))

    @classmethod
    def fit(cls, training: pd.DataFrame, covariates: Covariates) -> Self:
        """Fit margins and correlations to the training rows.

        A missing value takes part in nothing; a correlation is that of the rows which have both covariates.
        Correlations are shrunk towards 0 as far as their own uncertainty asks for (Schaefer and Strimmer 2005), then
        repaired to be positive definite.  Of three and more levels, what a row lacks is filled in from others of its
        level, by lot; they depend on the others by their means, not by how these vary within a level.

        Parameters
        ----------
        training
            One row per training subject and a column per covariate: numbers (NaN where missing) or text (None where
            missing).
        covariates
            The declared schema.

        Raises
        ------
        UserError
            A covariate has fewer than 10 values, or only one and the same.
        """
        fitted = {name: _fit_margin(training[name], name, covariates) for name in sorted(covariates)}
        margins = tuple(margin for margin in fitted.values() if margin is not None)
        copula = cls(margins, _fit_correlation(training, margins))
        rows = training[list(fitted)].sort_values(list(fitted), ignore_index=True)  # their order must not matter
        for name in (name for name, margin in fitted.items() if margin is None):
            filled = _filled(rows[rows[name].notna()], name)
            features = np.array(copula.features(filled)).reshape(-1, len(filled)).T
            margin = NominalMargin.fit(filled[name], features)
            drawn = copula.sample(philox("copula", f"{name}/shares").standard_normal((PILOT, len(copula.names))))
            shares = filled[name].value_counts(normalize=True)[list(margin.levels)].to_numpy()
            margin = margin.calibrated(copula.features(drawn), PILOT, shares)
            copula = replace(copula, nominal=(*copula.nominal, margin))
        return copula

    def features(self, values: Mapping[str, np.ndarray] | pd.DataFrame, before: int | None = None) -> list[np.ndarray]:
        """What the next level is drawn by, each (n,): scores of margins, an indicator of each level drawn `before`."""
        scores = [margin.scores(values[margin.name]) for margin in self.margins]
        return scores + [
            np.asarray(values[margin.name] == level, dtype=np.float64)
            for margin in self.nominal[:before]
            for level in margin.levels
        ]

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
        if normals.ndim != 2 or normals.shape[1] != len(self.names):
            raise ValueError(f"normals must be (n, {len(self.names)}), found {normals.shape}")
        if levels := [margin.name for margin in self.nominal if margin.name in given]:
            raise ValueError(f"{levels[0]}: {_NO_LEVEL}")
        own = dict(zip(self.names, normals.T, strict=True))
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
                z += root[row, column] * own[self.margins[free[column]].name]
            columns[self.margins[i].name] = self.margins[i].quantile(z)
        for place, margin in enumerate(self.nominal):
            columns[margin.name] = margin.draw(self.features(columns, place), own[margin.name])
        return pd.DataFrame({name: columns[name] for name in self.names})


def _filled(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows in which each missing value is that of another row of the same level of `name` (any row, if none has it)."""
    rows, lot = rows.copy(), philox("copula", name)
    for other in rows.columns.drop(name):
        known = rows[[name, other]].dropna()
        for level, gaps in rows[rows[other].isna()].groupby(name).groups.items():
            own = known[other][known[name] == level]
            rows.loc[gaps, other] = lot.choice((own if len(own) else known[other]).to_numpy(), len(gaps))
    return rows


_NO_LEVEL = "only continuous covariates can be given; choose among samples for a level"


def _continuous(margin: Margin) -> ContinuousMargin:
    if not isinstance(margin, ContinuousMargin):
        raise ValueError(f"{margin.name}: {_NO_LEVEL}")
    return margin


def _fit_margin(column: pd.Series, name: str, covariates: Covariates) -> Margin | None:
    """The margin of a number or two levels; None for more levels, which are fitted last."""
    covariate, present = covariates[name], column.dropna()
    instead = (
        f"Remove `{name}` from `covariates`, add training subjects that have it, or plan with `covariates: table`."
    )
    if len(present) < MIN_ROWS:
        raise UserError(
            f"covariates.{name}: {len(present)} of {len(column)} training subjects have a value; a copula needs at"
            f" least {MIN_ROWS}. {instead}"
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
    if len(seen) > 2:
        return None
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
                    "covariates %s and %s: too few training subjects have both; planned as if unrelated",
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
    if values.min(initial=1.0) < 1 - MAX_CORRELATION:  # pairwise estimates need not fit together
        matrix = (vectors * np.maximum(values, 1 - MAX_CORRELATION)) @ vectors.T
        scale = np.sqrt(np.diag(matrix))
        matrix /= np.outer(scale, scale)
    return matrix


def _latent_correlation(observed: float, a: Margin, b: Margin) -> float:
    """Correlation of two latent normals, from that of their scores.

    A level, or a value that many have, stands for an interval, whose mean varies less than the latent itself.  With
    one of them the score correlation is rho times the spread of the means; with two of few values, the rho is searched
    that explains it.
    """
    one, other = (margin.levels if isinstance(margin, ContinuousMargin) else margin for margin in (a, b))
    if one is not None and other is not None:
        rho = _polychoric(observed * one.spread * other.spread, one, other)
    else:
        rho = observed / (a.spread * b.spread)
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
