"""How well one scan came to lie on another: overlap of structures, folds, smoothness, and known deformations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.imaging.deformation import folds_and_spread
from meddiff_steps.statistics.measures import mean_where_known


def dice_by_label(first: np.ndarray, second: np.ndarray) -> dict[int, float]:
    """Dice coefficient of each label above 0 that one of two label maps (*spatial) has: twice what both share, of what
    they have.
    """
    names, numbers = np.unique(np.stack([first, second]), return_inverse=True)
    one, other = numbers.reshape(2, -1)
    of_one, of_other = (np.bincount(each, minlength=len(names)) for each in (one, other))
    both = np.bincount(one[one == other], minlength=len(names))
    found = 2.0 * both / (of_one + of_other)
    return {int(name): float(value) for name, value in zip(names, found, strict=True) if name > 0}


def overlap(fixed: np.ndarray, moved: np.ndarray, structures: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Dice coefficients of two label maps (*spatial): `dice_NAME` of each structure, which may have several labels,
    `dice`, their mean, and `dice_all`, the mean over all labels.

    A structure that neither has is left out.
    """
    found = {}
    for name, labels in structures.items():
        one, other = np.isin(fixed, labels), np.isin(moved, labels)
        size = np.count_nonzero(one) + np.count_nonzero(other)
        if size:
            found[f"dice_{name}"] = 2.0 * np.count_nonzero(one & other) / size
    every = list(dice_by_label(fixed, moved).values())
    means = {"dice": float(np.mean(list(found.values())))} if found else {}
    return {**means, **({"dice_all": float(np.mean(every))} if every else {}), **found}


def regularity(displacement: np.ndarray, region: np.ndarray) -> dict[str, float]:
    """`folds`, the share of the voxels of a region that are folded; `log_jacobian_sd`, how unevenly space is stretched
    there; displacement (3, *spatial) in voxels.
    """
    folds, spread = folds_and_spread(displacement, region)
    return {"folds": folds, "log_jacobian_sd": spread}


def distance(found: np.ndarray, known: np.ndarray, region: np.ndarray, voxel_mm: Sequence[float]) -> float:
    """Mean distance in mm of where two displacements (3, *spatial) lead to, over a region."""
    mm = np.asarray(voxel_mm, dtype=np.float64)[:, None]
    return float(np.linalg.norm((found - known)[:, region] * mm, axis=0).mean())


def figures(
    rows: pd.DataFrame, by: Sequence[str], reference: str, *, resamples: int, seed: str
) -> list[dict[str, Any]]:
    """A dictionary per group of rows: its names, and every measured column as a figure over the pairs where it is
    known.

    Parameters
    ----------
    rows
        fixed, moving, the columns `by`, the last of which is `method`, and measured ones.
    reference
        A method; `gain` is the `dice` beyond it, pair by pair.
    """
    measured = [c for c in rows.columns if c not in (*by, "fixed", "moving")]
    others = list(by[:-1])
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed, "label": "registration"}
    found: list[dict[str, Any]] = []
    for names, group in rows.groupby(others, sort=False) if others else [((), rows)]:
        base = group[group["method"] == reference].set_index("fixed")
        for method, part in group.groupby("method", sort=False):
            entry: dict[str, Any] = {**dict(zip(others, names, strict=True)), "method": method}
            for column in measured:
                known = mean_where_known(part[column].to_numpy(dtype=float), part["fixed"], **drawn)
                if known is not None:
                    entry[column] = known
            if "dice" in entry and method != reference and len(base):
                gain = part["dice"].to_numpy() - base["dice"][part["fixed"]].to_numpy()
                known = mean_where_known(gain, part["fixed"], **drawn)
                if known is not None:
                    entry["gain"] = known | {"beyond": reference}
            found.append(entry)
    return found
