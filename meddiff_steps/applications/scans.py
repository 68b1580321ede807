"""Which scans an application works on, and what it shows of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.core.errors import UserError

#: A sweep without values of its own runs between these quantiles of the training values: inside what the model has
#: seen.
SWEEP_QUANTILES = (0.03, 0.97)


def chosen_scans(scans: pd.DataFrame, wanted: Sequence[str], most: int) -> pd.DataFrame:
    """The scans that were asked for by scan or subject id; the first `most` of the test split where none was.

    Parameters
    ----------
    scans
        Manifest rows of preprocessed scans.

    Raises
    ------
    UserError
        A scan that was asked for is not there, or there is no test scan.
    """
    if not wanted:
        found = scans[scans["split"] == "test"].sort_values("scan_id")[:most]
        if found.empty:
            raise UserError(
                "counterfactual.scans: no preprocessed scan is in the test split. Name scans, or enlarge splits.test."
            )
        return found.reset_index(drop=True)
    parts = []
    for name in wanted:
        rows = scans[(scans["scan_id"] == name) | (scans["subject_id"].isin([name, f"sub-{name}"]))]
        if rows.empty:
            some = ", ".join(sorted(scans["scan_id"])[:3])
            raise UserError(
                f"counterfactual.scans: {name!r} is no preprocessed scan or subject of the cohort, which has {some},"
                " ... preprocessed/qc.parquet says which were left out, and why."
            )
        parts.append(rows)
    return pd.concat(parts).drop_duplicates("scan_id").reset_index(drop=True)


def sweep(
    settings: config.Counterfactual, covariates: config.Covariates, training: pd.DataFrame
) -> list[config.Scalar]:
    """The values that a covariate is moved to: those of the study, or evenly over what training scans have.

    Raises
    ------
    UserError
        No covariate is named.
    """
    moved = settings.moved
    declared = covariates[moved]
    if settings.values:
        return list(settings.values)
    if isinstance(declared, config.CategoricalCovariate):
        return list(declared.levels)
    low, high = training[moved].quantile(list(SWEEP_QUANTILES))
    return [float(f"{value:.4g}") for value in np.linspace(low, high, settings.sweep_steps)]
