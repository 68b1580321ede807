"""How near one set of points, or one solid, comes to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from meddiff_steps.statistics.measures import mean_where_known


def chamfer(first: np.ndarray, second: np.ndarray) -> float:
    """Mean distance from a point of one set (n, 3) to the nearest of the other, both ways, halved."""
    return float(cKDTree(first).query(second)[0].mean() + cKDTree(second).query(first)[0].mean()) / 2


def farthest(first: np.ndarray, second: np.ndarray, share: float = 0.95) -> float:
    """The distance below which a share of the points of either set are from the nearest of the other: HD95."""
    return float(max(np.quantile(cKDTree(a).query(b)[0], share) for a, b in ((first, second), (second, first))))


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Twice what two masks share, of what they have; 1 of two that are empty."""
    size = np.count_nonzero(first) + np.count_nonzero(second)
    return 2.0 * np.count_nonzero(first & second) / size if size else 1.0


def figures(rows: pd.DataFrame, reference: str, *, resamples: int, seed: str) -> list[dict[str, Any]]:
    """A dictionary per method: every measured column as a figure over the shapes where it is known.

    Parameters
    ----------
    rows
        id, method, and measured columns, of which `chamfer_mm` is one.
    reference
        A method; `nearer_mm` is by how much the `chamfer_mm` is below its, shape by shape.
    """
    base = rows[rows["method"] == reference].set_index("id")["chamfer_mm"]
    drawn: dict[str, Any] = {"resamples": resamples, "seed": seed, "label": "shapes"}
    found: list[dict[str, Any]] = []
    measured: Sequence[str] = [c for c in rows.columns if c not in ("id", "method")]
    for method, part in rows.groupby("method", sort=False):
        values = {column: part[column].to_numpy(dtype=float) for column in measured}
        if method != reference:
            values["nearer_mm"] = base[part["id"]].to_numpy() - values["chamfer_mm"]
        figures = {name: mean_where_known(each, part["id"], **drawn) for name, each in values.items()}
        entry: dict[str, Any] = {"method": method}
        entry |= {name: figure for name, figure in figures.items() if figure is not None}
        if "nearer_mm" in entry:
            entry["nearer_mm"] |= {"than": reference}
        found.append(entry)
    return found
