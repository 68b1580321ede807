"""Measured features without the effect of the site: location and scale, pooled over features (ComBat).

Johnson, Li and Rabinovic 2007, "Adjusting batch effects in microarray expression data using empirical Bayes methods",
sections 3.1 and 3.2; of brain scans Fortin et al. 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from meddiff_steps.core.errors import UserError

#: Rounds in which a site's location and scale are pooled, each given the other; they settle in a few.
ROUNDS = 30
#: Smallest spread of a feature.
LEAST = 1e-9


@dataclass(frozen=True)
class Combat:
    """What is taken off of rows of a site.

    Attributes
    ----------
    effects
        (covariates, features): slopes, which are kept.
    mean, spread
        (features,): of rows of the reference site, where covariates are 0, and about it.
    location, scale
        (sites, features): of each site, of standardised features.
    """

    effects: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    location: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, sites: np.ndarray, covariates: np.ndarray, reference: int) -> Self:
        """Fitted to rows.

        Parameters
        ----------
        features
            (rows, features).
        sites
            Whole numbers from 0, (rows,).
        covariates
            (rows, k), finite: what they explain stays.
        reference
            The site that others are taken to, which is left as it is.

        Raises
        ------
        UserError
            A site has fewer than two rows.
        """
        counts = np.bincount(sites)
        if counts.min() < 2:
            raise UserError(
                f"site {int(counts.argmin())} has {int(counts.min())} rows, expected 2 or more to fit a scale"
            )
        design = np.concatenate([np.eye(len(counts))[sites], covariates], 1)
        found = np.linalg.lstsq(design, features, rcond=None)[0]
        sited, effects = found[: len(counts)], found[len(counts) :]
        residual = features - design @ found
        inside = sites == reference
        spread = np.maximum(np.sqrt(np.square(residual[inside]).mean(0)), LEAST)
        standard = (features - covariates @ effects - sited[reference]) / spread
        location, scale = np.zeros_like(sited), np.ones_like(sited)
        for site in range(len(counts)):
            if site != reference:
                location[site], scale[site] = _pooled(standard[sites == site])
        return cls(effects, sited[reference], spread, location, scale)

    def __call__(self, features: np.ndarray, sites: np.ndarray, covariates: np.ndarray) -> np.ndarray:
        """Features (rows, features) as the reference site would have them."""
        kept = covariates @ self.effects + self.mean
        standard = (features - kept) / self.spread
        found: np.ndarray = (standard - self.location[sites]) / self.scale[sites] * self.spread + kept
        return found


def _pooled(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Location and scale of standardised rows (n, features), drawn to what features have in common (equations of
    section 3.2: a normal prior of locations, an inverse gamma prior of variances, both by their moments).
    """
    n, mean, variance = len(rows), rows.mean(0), rows.var(0, ddof=1)
    if rows.shape[1] < 2:
        return mean, np.sqrt(np.maximum(variance, LEAST))
    middle, width = mean.mean(), max(float(mean.var(ddof=1)), LEAST)
    of_variance = max(float(variance.var(ddof=1)), LEAST)
    shape = variance.mean() ** 2 / of_variance + 2
    rate = variance.mean() * (shape - 1)
    location = mean
    for _ in range(ROUNDS):
        squares = np.square(rows - location).sum(0)
        variance = (rate + squares / 2) / (n / 2 + shape - 1)
        location = (n * width * mean + variance * middle) / (n * width + variance)
    return location, np.sqrt(np.maximum(variance, LEAST))
