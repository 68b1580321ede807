"""Which scans an application works on, and what it shows of them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.cohort.learnt import LearntLevels, learnt, shown
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)


#: Splits that figures are not about, of all applications, and of those that calibrate on scans.
LEARNT_FROM = ("train",)
CALIBRATED_ON = ("train", "calibration")


def chosen_scans(
    scans: pd.DataFrame,
    wanted: Sequence[str],
    most: int,
    section: str = "counterfactual",
    seen: Collection[str] = LEARNT_FROM,
) -> pd.DataFrame:
    """The scans that were asked for by scan or subject id; where none was, `most` of the test split: as many of each
    subject as can be, the same number but for one, evenly spaced where a subject has more (slices of a head).

    Parameters
    ----------
    scans
        Manifest rows of preprocessed scans.
    section
        Of the study that asks, for messages.
    seen
        Splits that figures are not about: a warning says how many named scans are of them.

    Raises
    ------
    UserError
        A scan that was asked for is not there, or there is no test scan.
    """
    if not wanted:
        found = scans[scans["split"] == "test"].sort_values("scan_id")
        if found.empty:
            raise UserError(
                f"{section}.scans: no preprocessed scan is in the test split. Name scans, or enlarge splits.test."
            )
        turns = found.groupby("subject_id").cumcount().sort_values(kind="stable").index[:most]
        parts = []
        for subject, count in found.loc[turns].groupby("subject_id").size().items():
            rows = found[found["subject_id"] == subject]
            parts.append(rows.iloc[(2 * np.arange(count) + 1) * len(rows) // (2 * count)])
        return pd.concat(parts).sort_values("scan_id").reset_index(drop=True)
    parts = []
    for name in wanted:
        rows = scans[(scans["scan_id"] == name) | (scans["subject_id"].isin([name, f"sub-{name}"]))]
        if rows.empty:
            some = ", ".join(sorted(scans["scan_id"])[:3])
            raise UserError(
                f"{section}.scans: {name!r} is no preprocessed scan or subject of the cohort, which has {some},"
                " ... preprocessed/qc.parquet says which were left out, and why."
            )
        parts.append(rows)
    found = pd.concat(parts).drop_duplicates("scan_id").reset_index(drop=True)
    known = found.loc[found["split"].isin(seen), "split"].value_counts()
    if len(known):
        log.warning(
            "%s.scans: %d of %d scans are of the split %s, which was learnt from; they are worked on, and figures leave"
            " them out",
            section,
            known.sum(),
            len(found),
            ", ".join(f"{split} ({count})" for split, count in known.items()),
        )
    return found


def with_split(rows: pd.DataFrame, scans: pd.DataFrame) -> pd.DataFrame:
    """Measured rows with the split of their scan."""
    return rows.assign(split=rows["scan_id"].map(scans.set_index("scan_id")["split"])) if len(rows) else rows


def unseen(rows: pd.DataFrame, seen: Collection[str] = LEARNT_FROM) -> pd.DataFrame:
    """Of rows as of `with_split` those that figures are about, without the split."""
    return rows[~rows["split"].isin(seen)].drop(columns="split") if len(rows) else rows


def one_a_session(scans: pd.DataFrame) -> pd.DataFrame:
    """Of each session of each subject the middle scan by id (of slices of a head the same place), sorted by id."""
    found = scans.sort_values("scan_id")
    sessions = found.groupby(["subject_id", "session_id"], dropna=False, sort=False)["scan_id"]
    middle = (sessions.cumcount() == sessions.transform("size") // 2).to_numpy(dtype=bool)
    return found[middle].reset_index(drop=True)


def sweep(
    settings: config.Counterfactual, covariates: config.Covariates, training: pd.DataFrame
) -> list[config.Scalar]:
    """The values that a covariate is moved to: those of the study, or evenly over what training scans have.

    Raises
    ------
    UserError
        No covariate is named, or a level that no training scan has.
    """
    moved = settings.moved
    known = learnt(training[moved], covariates[moved])
    if settings.values:
        beyond = known.beyond(settings.values)
        if beyond and isinstance(known, LearntLevels):
            raise UserError(
                f"counterfactual.values: {beyond} of {moved}, but the training scans only have {known}, so the model"
                " has not learnt it. Ask for another level."
            )
        if beyond:
            log.warning(
                "counterfactual.values: %s of %s, but the training scans are %s: the model has not learnt it, and what"
                " it draws there is an extrapolation",
                beyond,
                moved,
                known,
            )
        return list(settings.values)
    if isinstance(known, LearntLevels):
        return list(known.levels)
    return [float(text) for text in shown(known.sweep(settings.sweep_steps))]
