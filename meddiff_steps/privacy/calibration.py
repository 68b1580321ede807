"""Thresholds of similarity: how near an unseen real subject comes to the training set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np


def conformal_threshold(scores: np.ndarray, level: float) -> float | None:
    """Smallest threshold that an unseen subject exceeds with probability at most `level`.

    Split-conformal: the ceil((n + 1)(1 - level))-th smallest of the calibration scores (Vovk et al. 2005; Angelopoulos
    and Bates 2021).  It holds exactly for subjects exchangeable with the calibration subjects, and says nothing of
    others.

    Parameters
    ----------
    scores
        Similarity of each calibration subject to its nearest training scan, (n,).
    level
        In (0, 1).

    Returns
    -------
    float or None
        None where n < 1 / level - 1: too few subjects for that level.

    Raises
    ------
    ValueError
        A score is not finite.
    """
    scores = np.sort(np.asarray(scores, dtype=np.float64))
    if not np.isfinite(scores).all():
        raise ValueError("a calibration score is not finite")
    rank = math.ceil((len(scores) + 1) * (1.0 - level) - 1e-9)
    return float(scores[rank - 1]) if 1 <= rank <= len(scores) else None


@dataclass(frozen=True)
class Thresholds:
    """One threshold per detector, for everybody and for the groups that are large enough.

    Attributes
    ----------
    overall
        Detector to threshold.
    groups
        Group to detector to threshold; who belongs to no such group is judged by `overall`.
    level
        Share of unseen real subjects that at least one detector may flag.
    subjects
        Calibration subjects behind `overall`.
    """

    overall: dict[str, float]
    groups: dict[str, dict[str, float]]
    level: float
    subjects: int

    def only(self, detectors: Sequence[str]) -> Thresholds:
        """The same of some detectors: of what the others cannot look at."""
        kept = {group: {name: of[name] for name in detectors if name in of} for group, of in self.groups.items()}
        return replace(self, overall={name: self.overall[name] for name in detectors}, groups=kept)

    def flags(self, scores: Mapping[str, np.ndarray], groups: np.ndarray) -> dict[str, np.ndarray]:
        """Per detector: whether each score is above its subject's threshold, bool (n,)."""
        flagged = {}
        for detector, overall in self.overall.items():
            limit = np.array([self.groups.get(str(group), self.overall).get(detector, overall) for group in groups])
            flagged[detector] = np.asarray(scores[detector]) > limit
        return flagged


def calibrate(scores: Mapping[str, np.ndarray], groups: np.ndarray, level: float) -> Thresholds | None:
    """Thresholds at `level`, shared equally over the detectors (Bonferroni).

    Parameters
    ----------
    scores
        Per detector: the similarity of each calibration subject to its nearest training scan, (n,).
    groups
        Subgroup of each subject, (n,).
    level
        Share of unseen real subjects that may be flagged, over all detectors.

    Returns
    -------
    Thresholds or None
        None where there are too few calibration subjects for the level (`privacy.size.subjects_needed`).
    """
    groups = np.asarray(groups, dtype=str)
    share = level / len(scores)

    def of(chosen: np.ndarray) -> dict[str, float] | None:
        found = {name: conformal_threshold(np.asarray(values)[chosen], share) for name, values in scores.items()}
        complete = {name: value for name, value in found.items() if value is not None}
        return complete if len(complete) == len(found) else None

    overall = of(np.ones(len(groups), dtype=bool))
    if overall is None:
        return None
    by_group = {str(group): found for group in np.unique(groups) if (found := of(groups == group)) is not None}
    return Thresholds(overall, by_group if len(by_group) > 1 else {}, level, len(groups))


def thresholds_of(card: Mapping[str, Any]) -> Thresholds | None:
    """The thresholds in a calibration card; None where it is not calibrated."""
    if card["status"] != "CALIBRATED":
        return None
    return Thresholds(
        dict(card["thresholds"]), {k: dict(v) for k, v in card["groups"].items()}, card["level"], card["subjects"]
    )
