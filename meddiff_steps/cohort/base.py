"""The cohort that given weights learnt from: in which units it has covariates, and whether it has people who are held
out here.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd

from meddiff_steps.cohort.covariates import shorten
from meddiff_steps.config import Covariates, InitFrom
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CONFIGS_OF_BASE

log = logging.getLogger(__name__)

#: Splits that thresholds, floors and gates are of.
HELD_OUT = ("calibration", "test")


def check_units(base: InitFrom, covariates: Covariates) -> None:
    """Refuse covariates in other units than a given diffusion network of ours knows them in.

    Where the study of the weights does not lie with them, nothing is known of units, and nothing is refused.

    Raises
    ------
    UserError
        Units differ.
    """
    folder = Path(base.path or "")
    config = next((folder / name for name in CONFIGS_OF_BASE if (folder / name).is_file()), None)
    if config is None or base.path is None or "diffusion" not in base.models:
        return
    known = read_json(config).get("covariates", {})
    for name, covariate in covariates.items():
        theirs, ours = (known.get(name) or {}).get("unit", ""), getattr(covariate, "unit", "")
        if theirs and ours and theirs.strip() != ours.strip():
            raise UserError(
                f"covariates.{name}.unit: {ours!r}, but the given diffusion network learnt {name} in {theirs!r}"
                f" ({config}). Convert the column and its range to {theirs!r}; where both are one unit, write it"
                " so, too."
            )


def check_held_out(manifest: pd.DataFrame, base: pd.DataFrame, place: Path) -> None:
    """Refuse a study that holds people out whose scans the given weights learnt from.

    Ids alone do not say that two are one person, since cohorts number theirs alike: of them a warning is logged.

    Parameters
    ----------
    manifest, base
        Manifests of the study and of the cohort that the weights learnt from.
    place
        Where the latter lies, for the message.

    Raises
    ------
    UserError
        A scan of the calibration or test split has the content of a training scan of `base`.
    """
    held_out, learnt = manifest[manifest["split"].isin(HELD_OUT)], base[base["split"] == "train"]
    same = held_out["content_sha256"].isin(learnt["content_sha256"].dropna())
    seen = sorted(set(held_out["subject_id"][same]))
    if seen:
        raise UserError(
            f"{place}: the given weights learnt from scans of {len(seen)} subject(s) of the calibration or test split"
            f" ({shorten(seen)}), so that privacy thresholds, floors and gates would shift towards PASS. Take `seed`"
            " and `splits` from the study of these weights, whose held-out subjects are then held out here, too; or"
            " take these scans off the cohort, or start from other weights."
        )
    named = sorted(set(held_out["subject_id"]) & set(learnt["subject_id"]))
    if named:
        log.warning(
            "%d subject(s) of the calibration or test split have ids of subjects that the given weights learnt from"
            " (%s; %s): if they are the same people, take `seed` and `splits` from the study of these weights",
            len(named),
            shorten(named),
            place,
        )
