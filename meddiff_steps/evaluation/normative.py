"""Whether deviation maps mean what they say: healthy scans deviate as seldom as they should, lesions are found where
they are, and groups that differ are told apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.statistics.measures import auc, mean_of, smaller_side

#: Kinds of scans whose figures are of healthy ones.
REFERENCE, LESION = "reference", "lesion"


def measured(z: np.ndarray, head: np.ndarray, beyond: float, lesion: np.ndarray | None = None) -> dict[str, float]:
    """What a map says of one scan.

    Parameters
    ----------
    z, head, lesion
        (*spatial); `head` bool, where it is looked at, and `lesion` bool, inside it.
    beyond
        |z| that counts as a deviation.

    Returns
    -------
    dict
        `beyond`, the share of the head's voxels; `mean` and `sd` of z over them; with a lesion the AUROC and the
        average precision (`ap`) of |z| for its voxels, and their mean |z| (`inside`).
    """
    values = z[head]
    found = {
        "beyond": float((np.abs(values) > beyond).mean()),
        "mean": float(values.mean()),
        "sd": float(values.std()),
    }
    if lesion is not None:
        truth, score = lesion[head], np.abs(values)
        found |= {"auroc": float(roc_auc_score(truth, score)), "ap": float(average_precision_score(truth, score))}
        found |= {"inside": float(score[truth].mean()), "prevalence": float(truth.mean())}
    return found


def figures(rows: pd.DataFrame, nominal: float, *, resamples: int, seed: str) -> list[dict[str, Any]]:
    """A dictionary per method, intervals over subjects.

    Parameters
    ----------
    rows
        subject_id, method, kind (`REFERENCE`, `LESION`, or what else a scan is), and what `measured` found.
    nominal
        Share of voxels that lie beyond in a healthy scan.

    Returns
    -------
    list of dict
        `calibration`, of scans of the reference: `beyond` with its `nominal` share, `mean` and `sd` of z (0 and 1 where
        maps are calibrated).  `lesions`: `auroc`, `ap`, `inside`, and the `prevalence` that a map of chance has as its
        ap.  `groups`: for every other kind the AUC of `beyond` against scans of the reference.
    """
    found = []
    for method, part in rows.groupby("method", sort=False):
        entry: dict[str, Any] = {"method": method, "groups": {}}

        def over(of: pd.DataFrame, columns: list[str]) -> dict[str, Any]:
            units = Bootstrap(of["subject_id"].tolist(), resamples, seed, "normative")
            return {name: units.figure(mean_of(of[name].to_numpy(float))) for name in columns}

        healthy = part[part["kind"] == REFERENCE]
        if len(healthy):
            entry["calibration"] = over(healthy, ["beyond", "mean", "sd"])
            entry["calibration"]["beyond"] |= {"nominal": nominal}
        lesions = part[part["kind"] == LESION]
        if len(lesions):
            entry["lesions"] = over(lesions, ["auroc", "ap", "inside", "prevalence"])
        for kind in sorted(set(part["kind"]) - {REFERENCE, LESION}):
            both = part[part["kind"].isin([REFERENCE, kind])]
            label = (both["kind"] == kind).to_numpy()
            if len(healthy):
                units = Bootstrap(both["subject_id"].tolist(), resamples, seed, f"normative {kind}")
                statistic = auc(label, both["beyond"].to_numpy(float))
                entry["groups"][kind] = {"auc": units.figure(statistic, smaller_side(label, both["subject_id"]))}
        found.append(entry)
    return found
