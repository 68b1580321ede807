"""Whether a site can still be told after harmonisation, and whether what shall be read from images still can be."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariates
from meddiff_steps.evaluation.completion import closeness
from meddiff_steps.evaluation.realism.classifier_auc import CLASSIFIER_C
from meddiff_steps.instruments.predictors import Predictors, fit_predictors
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure
from meddiff_steps.statistics.combat import Combat
from meddiff_steps.statistics.measures import auc, mean_of, mean_where_known, pearson, smaller_side

log = logging.getLogger(__name__)

#: Levels of what is told: a scan of the site whose look is taken, or not.
SITE, LEVELS = "site", ["other", "to"]
#: Penalty of the ridge regression that reads covariates from features, in standardised features.
RIDGE = 10.0


def site_auc(scores: np.ndarray, table: pd.DataFrame, *, resamples: int, seed: str) -> Figure:
    """AUC of the site by the mean score of each subject at each side, of scores (n,) of scans; resampled by subject, so
    with both sides of one who was scanned at both.
    """
    sides = table.assign(score=scores).groupby(["subject_id", "there"], sort=True)["score"].mean().reset_index()
    labels, units = sides["there"].to_numpy(dtype=bool), sides["subject_id"].to_numpy(dtype=str)
    statistic = auc(labels, sides["score"].to_numpy(dtype=float))
    return Bootstrap(units, resamples, seed, "site").figure(statistic, smaller_side(labels, units))


def scanner(train: np.ndarray, table: pd.DataFrame) -> Predictors:
    """What tells the site from images as they were scanned, (n, 1, *spatial); table as of `told`."""
    site: Covariates = {SITE: CategoricalCovariate(levels=LEVELS)}
    return fit_predictors([train], _sited(table), table["subject_id"].tolist(), site)


def _sited(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(**{SITE: np.where(table["there"], "to", "other")})


def told(
    train: np.ndarray,
    test: np.ndarray,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    covariates: Covariates,
    as_scanned: Predictors,
    *,
    resamples: int,
    seed: str,
) -> dict[str, Any]:
    """What predictors that learnt from training images read from test images: the site, and covariates.

    Parameters
    ----------
    train, test
        Images (n, 1, *spatial) in [0, 1], of all sites, after whatever was done to them.
    tables
        A row per image: `subject_id`, `there` (bool: of the site whose look is taken), and covariates.
    covariates
        What is read beside the site, by name.
    as_scanned
        Of `scanner`.

    Returns
    -------
    dict
        `site_auc`, over subjects (their mean score at each side), 0.5 where the site cannot be told: by a classifier
        that learnt anew from such training images; `site_auc_as_scanned` by one that learnt from scans.  `covariates`:
        of each `r` and `mae` (over scans, resampled by subject), or `auc` of one with two levels.  `carried` has the
        same of predictors that learnt from scans of the site whose look is taken alone, on scans of the others: what
        harmonisation is for.
    """
    learnt, asked = (_sited(table) for table in tables)
    both: Covariates = {SITE: CategoricalCovariate(levels=LEVELS), **covariates}
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed}
    measured = fit_predictors([train], learnt, learnt["subject_id"].tolist(), both).measure(test)
    found: dict[str, Any] = {}
    for name, scores in (("site_auc", measured), ("site_auc_as_scanned", as_scanned.measure(test))):
        if SITE in scores:
            found[name] = site_auc(scores[SITE][:, 1], asked, **drawn)
    found["covariates"] = read(measured, asked, covariates, **drawn)
    there, others = learnt["there"].to_numpy(dtype=bool), ~asked["there"].to_numpy(dtype=bool)
    own = fit_predictors([train[there]], learnt[there], learnt["subject_id"][there].tolist(), covariates)
    found["carried"] = read(own.measure(test[others]), asked[others], covariates, **drawn)
    return found


def read(
    measured: Mapping[str, np.ndarray], table: pd.DataFrame, covariates: Covariates, *, resamples: int, seed: str
) -> dict[str, Any]:
    """Figures of measured covariates against those of a table, of scans where they are known."""
    found: dict[str, Any] = {}
    for name, values in measured.items():
        covariate = covariates.get(name)
        known = table[name].notna().to_numpy(dtype=bool) if covariate is not None else np.zeros(len(table), bool)
        if not known.any():
            continue
        units = Bootstrap(table["subject_id"][known].tolist(), resamples, seed, "read")
        if isinstance(covariate, ContinuousCovariate):
            truth = table[name][known].to_numpy(dtype=float)
            error = np.abs(values[known] - truth)
            found[name] = {
                "r": units.figure(pearson(truth, values[known])),
                "mae": units.figure(mean_of(error)) | {"unit": covariate.unit},
            }
        elif isinstance(covariate, CategoricalCovariate) and len(covariate.levels) == 2:
            labels = (table[name][known] == covariate.levels[1]).to_numpy(dtype=bool)
            rarer = smaller_side(labels, units.unit_of_row)
            found[name] = {"auc": units.figure(auc(labels, values[known][:, 1]), rarer)}
    return found


def kept(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """How much of the anatomy of an image (1, *spatial) is left: correlation within its head, and SSIM of the box
    around it; `moved`, the mean absolute change.
    """
    inside = before[0] > 0
    a, b = before[0][inside], after[0][inside]
    flat = min(float(a.std()), float(b.std())) == 0.0
    return {
        "correlation": float("nan") if flat else float(np.corrcoef(a, b)[0, 1]),
        "ssim": closeness(before[0], after[0], inside)["ssim"],
        "moved": float(np.abs(a - b).mean()),
    }


def anatomy(rows: pd.DataFrame, *, resamples: int, seed: str) -> dict[str, Any]:
    """Means of `kept` over the scans where they are known, as figures over subjects, by `method`."""
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed, "label": "kept"}
    found: dict[str, Any] = {}
    for method, part in rows.groupby("method", sort=False):
        figures = {
            column: mean_where_known(part[column].to_numpy(dtype=float), part["subject_id"], **drawn)
            for column in ("correlation", "ssim", "moved")
        }
        found[str(method)] = {column: figure for column, figure in figures.items() if figure is not None}
    return found


def known_at_both(names: Sequence[str], tables: tuple[pd.DataFrame, pd.DataFrame]) -> list[str]:
    """Covariates that, together with those before, are known of two training scans and a test scan of either side, or
    more; others are warned of.
    """
    left, found = list(tables), list[str]()
    for name in names:
        known = [table[table[name].notna()] for table in left]
        counts = [(table["there"] == side).sum() for table in known for side in (True, False)]
        if min(counts[:2]) >= 2 and min(counts[2:]) >= 1:
            left, found = known, [*found, name]
        else:
            log.warning(
                "harmonisation.kept: %s is known of %d training scans of `to` and %d of the others, and of %d and %d"
                " test scans: too few, ComBat is not told it",
                name,
                *counts,
            )
    return found


def features_told(
    train: np.ndarray,
    test: np.ndarray,
    tables: tuple[pd.DataFrame, pd.DataFrame],
    covariates: Covariates,
    *,
    resamples: int,
    seed: str,
) -> dict[str, Any]:
    """Of measured features instead of images, as they are (`none`) and after ComBat (`combat`): `site_auc` of a linear
    classifier, over subjects, and `r` of a ridge regression of each continuous covariate.

    ComBat is fitted to training scans, whose covariates it keeps.  Of test scans it is not told them, or they could be
    read from what it does.  A covariate that is hardly known at one of the sites cannot be told from the site, and is
    left out with a warning; scans without one of the others are left out of both.

    Parameters
    ----------
    train, test
        Features (n, features).
    tables
        As of `told`.
    """
    continuous = [name for name, each in covariates.items() if isinstance(each, ContinuousCovariate)]
    names = known_at_both(continuous, tables)
    sides = []
    for features, table in zip((train, test), tables, strict=True):
        known = table[names].notna().all(axis=1).to_numpy(dtype=bool)
        sides.append((features[known].astype(np.float64), table[known]))
    (x, learnt), (y, asked) = sides
    there = [table["there"].to_numpy(dtype=int) for table in (learnt, asked)]
    told_ = [table[names].to_numpy(dtype=float) for table in (learnt, asked)]
    centre, width = told_[0].mean(0), np.maximum(told_[0].std(0), 1e-9)
    design = [(values - centre) / width for values in told_]
    combat = Combat.of(x, there[0], design[0], reference=1)
    found: dict[str, Any] = {}
    for way, (a, b) in {
        "none": (x, y),
        "combat": (combat(x, there[0], design[0]), combat(y, there[1], np.zeros_like(design[1]))),
    }.items():
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=CLASSIFIER_C, max_iter=2000, class_weight="balanced")
        ).fit(a, there[0])
        told_site = site_auc(model.decision_function(b), asked, resamples=resamples, seed=seed)
        found[way] = {"site_auc": told_site, "covariates": {}}
        rows = Bootstrap(asked["subject_id"].tolist(), resamples, seed, "read")
        for column, name in enumerate(names):
            reader = make_pipeline(StandardScaler(), Ridge(RIDGE)).fit(a, told_[0][:, column])
            found[way]["covariates"][name] = {"r": rows.figure(pearson(told_[1][:, column], reader.predict(b)))}
    return found
