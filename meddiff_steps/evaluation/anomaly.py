"""How well lesions are found: by voxel, by lesion and by scan, with intervals over people.

Voxels are counted per person, by bins of their map's value: so a bootstrap over people needs the counts alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy import ndimage

from meddiff_steps.statistics.bootstrap import Bootstrap, Statistic
from meddiff_steps.statistics.measures import auc, mean_of, smaller_side

#: Bins that values are counted in; with fewer different values figures are exact.
BINS = 8192
#: Values that the edges of bins are chosen by, at most.
MOST_VALUES = 2_000_000
#: A lesion is found if so much of it is marked.
FOUND_SHARE = 0.25
#: Lesions are called small, medium and large by thirds of all of them.
SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Judged:
    """A scan, what was made of it, and what is known of it.

    Attributes
    ----------
    scan_id, subject_id
        Whose it is.
    values
        Of a map, (*spatial), NaN where none is made, which is below all values.
    truth
        The lesion, bool (*spatial).
    region
        Voxels that count, bool: the head. Lesion voxels count wherever they are.
    """

    scan_id: str
    subject_id: str
    values: np.ndarray
    truth: np.ndarray
    region: np.ndarray


@dataclass(frozen=True)
class Counts:
    """Voxels by person and bin.

    Attributes
    ----------
    edges
        (bins - 1,), rising: a value is in bin k if it is above k edges.
    lesion, other
        (people, bins).
    subjects
        Names of the people.
    """

    edges: np.ndarray
    lesion: np.ndarray
    other: np.ndarray
    subjects: list[str]

    @classmethod
    def of(cls, scans: Sequence[Judged], threshold: float) -> Self:
        """The threshold becomes an edge."""
        edges = _edges(scans, threshold)
        subjects = sorted({scan.subject_id for scan in scans})
        lesion, other = np.zeros((2, len(subjects), len(edges) + 1))
        for scan in scans:
            row, counted = subjects.index(scan.subject_id), scan.region | scan.truth
            values = np.where(np.isnan(scan.values), -np.inf, scan.values)[counted]
            number = np.searchsorted(edges, values, side="left")
            truth = scan.truth[counted]
            lesion[row] += np.bincount(number[truth], minlength=len(edges) + 1)
            other[row] += np.bincount(number[~truth], minlength=len(edges) + 1)
        return cls(edges, lesion, other, subjects)

    def _above(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lesion and other voxels in each bin and all above it, highest bin first: (resamples, bins)."""
        hits, misses = weights @ self.lesion, weights @ self.other
        return hits[:, ::-1].cumsum(1), misses[:, ::-1].cumsum(1)

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """As `sklearn.metrics.average_precision_score`, equal values together."""
        hits, misses = self._above(weights)
        steps = np.diff(hits, axis=1, prepend=0.0)
        return (steps * hits / np.maximum(hits + misses, 1e-300)).sum(1) / hits[:, -1]

    def auroc(self, weights: np.ndarray) -> np.ndarray:
        """Area under the ROC curve, equal values counting half."""
        hits, misses = self._above(weights)
        more = np.diff(misses, axis=1, prepend=0.0)
        before = hits - np.diff(hits, axis=1, prepend=0.0) / 2
        return (more * before).sum(1) / (hits[:, -1] * misses[:, -1])

    def dice(self, weights: np.ndarray) -> np.ndarray:
        """At every edge, from the highest, of all voxels together: (resamples, bins)."""
        hits, misses = self._above(weights)
        return 2 * hits / np.maximum(hits + misses + hits[:, -1:], 1e-300)

    def best_dice(self, weights: np.ndarray) -> np.ndarray:
        """At the threshold that is best for just these scans: no threshold that is known before can do better."""
        return self.dice(weights).max(1)

    def dice_at(self, threshold: float) -> Statistic:
        """At a threshold that is one of the edges."""
        number = len(self.edges) - 1 - int(np.flatnonzero(self.edges == threshold)[0])
        return lambda weights: self.dice(weights)[:, number]


def _edges(scans: Sequence[Judged], threshold: float) -> np.ndarray:
    """Half of them just below values of lesions, where precision is looked at, half at values of all voxels; and one
    below all of them.
    """
    lesion, every = (
        np.concatenate([scan.values[chosen(scan) & np.isfinite(scan.values)] for scan in scans]).astype(np.float64)
        for chosen in (lambda scan: scan.truth, lambda scan: scan.region | scan.truth)
    )
    edges = np.unique(np.concatenate([np.nextafter(_by_rank(lesion), -np.inf), _by_rank(every), [threshold]]))
    return np.append(np.nextafter(edges[0], -np.inf), edges)


def _by_rank(values: np.ndarray) -> np.ndarray:
    """At most half of `BINS` of some values, evenly by rank."""
    few = np.unique(values[:: -(-values.size // MOST_VALUES) or 1])
    return few if len(few) <= BINS // 2 else few[np.linspace(0, len(few) - 1, BINS // 2).astype(int)]


def lesions_of(scan: Judged, threshold: float) -> list[dict[str, Any]]:
    """Every connected lesion of a scan: its voxels, and whether it was found."""
    parts, count = ndimage.label(scan.truth, np.ones((3,) * scan.truth.ndim))
    marked = np.nan_to_num(scan.values, nan=-np.inf) > threshold
    sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
    found = np.bincount(parts.ravel(), weights=marked.ravel(), minlength=count + 1)[1:]
    return [
        {"scan_id": scan.scan_id, "subject_id": scan.subject_id, "voxels": int(n), "found": bool(m >= FOUND_SHARE * n)}
        for n, m in zip(sizes, found, strict=True)
    ]


def measured(scan: Judged, threshold: float, score: float, score_threshold: float) -> dict[str, Any]:
    """A row of a scan: what was marked of it, and how that agrees with the truth."""
    marked = (np.nan_to_num(scan.values, nan=-np.inf) > threshold) & (scan.region | scan.truth)
    size, both = int(scan.truth.sum()), int((marked & scan.truth).sum())
    parts, count = ndimage.label(marked, np.ones((3,) * marked.ndim))
    hit = len(np.unique(parts[scan.truth & marked]))
    return {
        "scan_id": scan.scan_id,
        "subject_id": scan.subject_id,
        "score": score,
        "flagged": score > score_threshold,
        "lesion_voxels": size,
        "marked_share": float(marked[scan.region].mean()),
        "false_share": float(marked[scan.region & ~scan.truth].mean()),
        "false_marks": int(count - hit),
        "dice": 2 * both / (marked.sum() + size) if size else np.nan,
    }


def figures(
    method: str,
    scans: Sequence[Judged],
    rows: pd.DataFrame,
    threshold: float,
    reference: Counts | None,
    *,
    resamples: int,
    seed: str,
) -> tuple[dict[str, Any], Counts]:
    """All figures of one method, and the counts of its voxels in scans with lesions.

    Parameters
    ----------
    rows
        `measured`, in the order of the scans.
    reference
        Counts of the method that all others are compared with, of the same scans.

    Returns
    -------
    dict
        `average_precision`, `auroc`, `best_dice`, `dice` (at the calibrated threshold): of the voxels of scans with
        lesions; `gain` in average precision beyond the reference; `average_precision_of_all` scans; `scan_dice`, the
        mean over scans with lesions; `recall` of lesions by size; `scan_auroc`, `sensitivity` and `false_alarms` of
        scores; `false_share` of the voxels, and `false_marks`, of scans without lesions.  A figure that there are no
        scans for is left out.
    """
    options: dict[str, Any] = {"resamples": resamples, "seed": seed, "label": "anomaly"}
    ill = [scan for scan in scans if scan.truth.any()]
    counts = Counts.of(ill, threshold)
    people = Bootstrap(counts.subjects, **options)
    found: dict[str, Any] = {
        "method": method,
        "prevalence": float(counts.lesion.sum() / (counts.lesion + counts.other).sum()),
    }
    found["average_precision"] = people.figure(counts.average_precision)
    if reference is not None:
        found["gain"] = people.figure(
            lambda weights: counts.average_precision(weights) - reference.average_precision(weights)
        )
    found |= {"auroc": people.figure(counts.auroc), "best_dice": people.figure(counts.best_dice)}
    found["dice"] = people.figure(counts.dice_at(threshold))
    everybody = Counts.of(scans, threshold)
    found["average_precision_of_all"] = Bootstrap(everybody.subjects, **options).figure(everybody.average_precision)
    has = (rows["lesion_voxels"] > 0).to_numpy()
    for name, column, part in (
        ("scan_dice", "dice", rows[has]),
        ("sensitivity", "flagged", rows[has]),
        ("false_alarms", "flagged", rows[~has]),
        ("false_share", "false_share", rows[~has]),
        ("false_marks", "false_marks", rows[~has]),
    ):
        if len(part):
            share_of = part["subject_id"].nunique() if column == "flagged" else 0
            units = Bootstrap(part["subject_id"].tolist(), **options)
            found[name] = units.figure(mean_of(part[column].to_numpy(dtype=float)), share_of)
    if has.any() and not has.all():
        statistic = auc(has, rows["score"].to_numpy())
        rests_on = smaller_side(has, rows["subject_id"])
        found["scan_auroc"] = Bootstrap(rows["subject_id"].tolist(), **options).figure(statistic, rests_on)
    found["recall"] = recall(pd.DataFrame([row for scan in ill for row in lesions_of(scan, threshold)]), options)
    return found, counts


def recall(lesions: pd.DataFrame, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Share of lesions found, by size: `size`, `voxels` (of the smallest and the largest), `lesions`, `found`."""
    third = pd.qcut(lesions["voxels"].rank(method="first"), 3, labels=SIZES) if len(lesions) > 2 else None
    parts = [("all", lesions)]
    if third is not None:
        parts += [(name, lesions[third == name]) for name in SIZES]
    found = []
    for name, part in parts:
        units = Bootstrap(part["subject_id"].tolist(), **options)
        share = units.figure(mean_of(part["found"].to_numpy(dtype=float)), part["subject_id"].nunique())
        sizes = [int(part["voxels"].min()), int(part["voxels"].max())]
        found.append({"size": name, "voxels": sizes, "lesions": len(part), "found": share})
    return found
