"""Figures of counterfactuals: does the moved covariate follow, and does the rest stay?

Everything stands beside the floor: the same images with nothing moved, there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps.config import CategoricalCovariate, Covariates, Scalar
from meddiff_steps.instruments.predictors import Predictors
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure
from meddiff_steps.statistics.measures import auc, mean_of, pearson, slope, smaller_side


def measure(
    scans: pd.DataFrame,
    kinds: Mapping[str, np.ndarray],
    values: Sequence[Scalar],
    covariate: str,
    covariates: Covariates,
    instrument: Predictors,
    embed: Callable[[Tensor], Tensor],
) -> pd.DataFrame:
    """`table` of images, measured by predictors of the covariates and by an embedding that tells people apart.

    Parameters
    ----------
    scans
        A row per scan: scan_id, subject_id, covariates.
    kinds
        Images float32 in [0, 1]: `scan`, `decoded` and `returned` (n, 1, *spatial), `moved` (n, values, 1, *spatial).
    embed
        (b, 1, *spatial) to directions of norm 1.
    """
    count, steps = kinds["moved"].shape[:2]
    flat = {kind: stack.reshape(-1, *stack.shape[-len(kinds["scan"].shape[1:]) :]) for kind, stack in kinds.items()}
    with torch.no_grad():
        vectors = {kind: embed(torch.from_numpy(stack)).numpy() for kind, stack in flat.items()}
    measured: dict[str, dict[str, np.ndarray]] = {}
    identity: dict[str, np.ndarray] = {}
    for kind, stack in flat.items():
        owner = np.arange(len(stack)) // (steps if kind == "moved" else 1)
        cosine = vectors[kind] @ vectors["scan"].T
        columns = {"recognised": (cosine.argmax(1) == owner).astype(float)}
        for name, found in instrument.measure(stack).items():
            declared = covariates[name]
            if isinstance(declared, CategoricalCovariate):
                columns |= {f"{name}={level}": found[:, i] for i, level in enumerate(declared.levels)}
            else:
                columns[name] = found
        shape = (count, steps) if kind == "moved" else (count,)
        measured[kind] = {name: column.reshape(shape) for name, column in columns.items()}
        identity[kind] = cosine[np.arange(len(stack)), owner].reshape(shape)
    return table(scans["scan_id"].tolist(), scans, covariate, values, measured, identity)


def table(
    scan_ids: Sequence[str],
    subjects: pd.DataFrame,
    covariate: str,
    values: Sequence[Scalar],
    measured: Mapping[str, Mapping[str, np.ndarray]],
    identity: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """A row per image: scan_id, subject_id, kind (`scan`, `decoded`, `returned`, `moved`), requested, a column per
    measured covariate (of a label the probability of each level), identity.

    Parameters
    ----------
    measured
        By kind and column, values (n,) or, for `moved`, (n, values).
    identity
        By kind but `scan`: cosine of the embedding to the scan's own, (n,) or (n, values).
    """
    rows = []
    for i, scan_id in enumerate(scan_ids):
        for kind, found in measured.items():
            places: list[tuple[int, ...]] = [(i, j) for j in range(len(values))] if kind == "moved" else [(i,)]
            for place in places:
                row: dict[str, Any] = {"scan_id": scan_id, "subject_id": subjects["subject_id"].iloc[i], "kind": kind}
                row["requested"] = values[place[1]] if kind == "moved" else subjects[covariate].iloc[i]
                row |= {name: float(column[place]) for name, column in found.items()}
                row["identity"] = 1.0 if kind == "scan" else float(identity[kind][place])
                rows.append(row)
    return pd.DataFrame(rows)


def figures(rows: pd.DataFrame, covariate: str, covariates: Covariates, *, resamples: int, seed: str) -> dict[str, Any]:
    """What was measured, intervals over subjects.

    Returns
    -------
    dict
        `moved`: of a number `r`, `slope` (requested against measured) and `slope_of_change` (of the change asked for
        against the change measured, each image against its own way back); of a label `auc` per level.  `others`: per
        other number the mean absolute change, in its own units, with the `floor` that going there and back makes.
        `identity`: mean cosine to the own scan, with the `ceiling` of the way back, and `recognised`: the share of
        images that look more like their own scan than like any other of these scans, where that was measured.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed}
    moved = rows[rows["kind"] == "moved"]
    returned = rows[rows["kind"] == "returned"].set_index("scan_id")
    scans = rows[rows["kind"] == "scan"].set_index("scan_id")

    def boot(part: pd.DataFrame, label: str) -> Bootstrap:
        return Bootstrap(part["subject_id"].tolist(), **options, label=f"counterfactual {label}")

    found: dict[str, Any] = {"moved": {}, "others": {}}
    declared = covariates[covariate]
    if isinstance(declared, CategoricalCovariate):
        for level in declared.levels:
            column = f"{covariate}={level}"
            if column in moved:
                hit = (moved["requested"] == level).to_numpy()
                statistic = auc(hit, moved[column].to_numpy())
                rests_on = smaller_side(hit, moved["subject_id"])
                found["moved"][level] = {"auc": boot(moved, column).figure(statistic, rests_on)}
    elif covariate in moved:
        requested, measured = moved["requested"].to_numpy(float), moved[covariate].to_numpy(float)
        base = returned[covariate].reindex(moved["scan_id"]).to_numpy(float)
        own = scans["requested"].reindex(moved["scan_id"]).to_numpy(float)
        known = np.isfinite(own)
        part = moved[known]
        found["moved"] = {
            "r": boot(moved, "r").figure(pearson(requested, measured)),
            "slope": boot(moved, "slope").figure(slope(requested, measured)),
            "slope_of_change": boot(part, "change").figure(slope((requested - own)[known], (measured - base)[known])),
        }
    for name, other in covariates.items():
        if name == covariate or isinstance(other, CategoricalCovariate) or name not in moved:
            continue
        change = np.abs(moved[name].to_numpy(float) - returned[name].reindex(moved["scan_id"]).to_numpy(float))
        floor = np.abs(returned[name].to_numpy(float) - scans[name].reindex(returned.index).to_numpy(float))
        figure: Figure = boot(moved, name).figure(mean_of(change))
        found["others"][name] = figure | {
            "unit": other.unit,
            "floor": boot(returned, f"{name} floor").figure(mean_of(floor)),
        }
    identity = boot(moved, "identity").figure(mean_of(moved["identity"].to_numpy(float)))
    ceiling = boot(returned, "identity ceiling").figure(mean_of(returned["identity"].to_numpy(float)))
    found["identity"] = identity | {"ceiling": ceiling}
    if "recognised" in moved:
        share, kept = (
            boot(part, label).figure(mean_of(part["recognised"].to_numpy(float)), part["subject_id"].nunique())
            for part, label in ((moved, "recognised"), (returned, "recognised ceiling"))
        )
        found["recognised"] = share | {"ceiling": kept}
    return found
