"""Stress test: how well classifiers do along a covariate, on synthetic images that were planned along it.

A test split has few old, few heavy, few rare cases; a plan can ask for as many as are needed.  The same strata of the
real test scans stand beside them, as far as there are such: where both can be measured they should agree, else the
synthetic figures say something of the generator and not of the classifier.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariate, Covariates, Downstream
from meddiff_steps.downstream.results import Scored, measure, scored


@dataclass(frozen=True)
class Strata:
    """Levels of a label, or bins of a number.

    Attributes
    ----------
    names
        Of the strata, in their order.
    edges
        Of bins, one more than these, both ends inside; None for levels.
    """

    names: tuple[str, ...]
    edges: np.ndarray | None

    @classmethod
    def of(cls, declared: Covariate, values: pd.Series, bins: int) -> Self:
        """Strata of what was planned: as many bins with equal numbers as asked for, one per value where these are
        fewer.
        """
        if isinstance(declared, CategoricalCovariate):
            return cls(tuple(level for level in declared.levels if (values == level).any()), None)
        numbers = values.dropna().to_numpy(dtype=float)
        found = np.unique(numbers)
        unit = f" {declared.unit}" if declared.unit else ""
        if len(found) <= bins:
            edges = np.concatenate([found[:1], (found[1:] + found[:-1]) / 2, found[-1:]])
            return cls(tuple(f"{value}{unit}" for value in _written(found)), edges)
        edges = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)))
        return cls(tuple(f"{low} to {high}{unit}" for low, high in pairwise(_written(edges))), edges)

    def label(self, values: pd.Series) -> np.ndarray:
        """The stratum of each value, None outside of all, object (rows,)."""
        if self.edges is None:
            return np.array([value if value in self.names else None for value in values], dtype=object)
        numbers = values.to_numpy(dtype=float, na_value=np.nan)
        inside = (numbers >= self.edges[0]) & (numbers <= self.edges[-1])
        at = np.clip(np.searchsorted(self.edges, numbers, side="right") - 1, 0, len(self.names) - 1)
        return np.array([self.names[i] if ok else None for i, ok in zip(at, inside, strict=True)], dtype=object)


def _written(numbers: np.ndarray) -> list[str]:
    """Distinct numbers with four significant digits, or as many more as tell them apart; never as powers of ten."""
    form = functools.partial(np.format_float_positional, unique=False, fractional=False, trim="-")
    written = ([form(number, digits) for number in numbers] for digits in range(4, 18))
    return next(names for names in written if len(set(names)) == len(numbers))


def stress_figures(
    predictions: pd.DataFrame,
    planned: pd.DataFrame,
    tested: pd.DataFrame,
    downstream: Downstream,
    covariates: Covariates,
    levels: Sequence[str],
    root: str,
) -> list[dict[str, Any]]:
    """AUC of every arm in every stratum of each covariate.

    Parameters
    ----------
    predictions
        As `augmentation/predictions.parquet`, with the sets `stress` and `test`.
    planned, tested
        Covariates of the images of the two sets, index `image_id`.

    Returns
    -------
    list of dict
        covariate, strata (names), and for `synthetic` and `real` images per arm `auc`, `groups` (by stratum),
        `worst_group_auc` and `gap`; of strata without both classes there is no figure.
    """
    names = downstream.stress.along or [name for name in covariates if name != downstream.target]
    sets = {"synthetic": ("stress", planned), "real": ("test", tested)}
    data = {kind: scored(predictions, which, levels) for kind, (which, _) in sets.items()}
    found = []
    for name in names:
        strata = Strata.of(covariates[name], planned[name], downstream.stress.bins)
        if len(strata.names) < 2:
            continue
        entry: dict[str, Any] = {"covariate": name, "strata": list(strata.names)}
        for kind, (which, table) in sets.items():
            images = sorted(predictions.loc[predictions["set"] == which, "image_id"].unique())
            labelled = replace(data[kind], subgroup=strata.label(table[name].reindex(images)))
            entry[kind] = _by_stratum(labelled, downstream, root, f"stress {kind} {name}")
        found.append(entry)
    return found


def _by_stratum(data: Scored, downstream: Downstream, root: str, label: str) -> dict[str, Any]:
    kept = ("auc", "groups", "worst_group_auc", "gap")
    entries, _ = measure(data, downstream, root, label)
    return {arm: {key: entry[key] for key in kept if key in entry} for arm, entry in entries.items()}
