"""Maps of what is unusual in a scan: what is there, less what a healthy head would have there.

Every method gives a difference.  All of them are treated alike after that: divided by the spread of the scan's own grey
values, the side that is looked for taken, smoothed, scalp and skull left out, and brought to the scale of healthy scans
of the calibration split.  There thresholds come from as well, so a map means the same whatever made it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy import ndimage

from meddiff_steps import config
from meddiff_steps.applications.anomaly_maps.base import Finding, Mapper, Scan
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging import conspicuity

log = logging.getLogger(__name__)

ENTRY = {
    "order": 6,
    "summary": "A map of what is unusual in a scan, a score, and thresholds from healthy scans",
    "source": "Baur et al. 2021 (a comparison of such maps); scores: Vovk et al. 2005 (conformal prediction)",
    "needs": ["a trained model", "healthy scans of people it did not learn from"],
}

#: The mean of all maps but plain intensity.
ENSEMBLE = "ensemble"
#: Healthy people that thresholds come from, at least: the ensemble of each is in units of the others.
LEAST_PEOPLE = 2


@dataclass(frozen=True)
class Head:
    """Where a map is made.

    Attributes
    ----------
    whole, interior
        The head, and what is left without scalp and skull; bool (*spatial).
    spread
        Of the grey values within.
    """

    whole: np.ndarray
    interior: np.ndarray
    spread: float

    @classmethod
    def of(cls, image: np.ndarray, margin: int) -> Self:
        """Of an image (*spatial) in [0, 1]."""
        whole = conspicuity.head_of(image)
        interior = conspicuity.interior(whole, margin)
        return cls(whole, interior, conspicuity.grey_scale(image, interior)[1])


def finished(difference: np.ndarray, head: Head, settings: config.Anomaly) -> np.ndarray:
    """The map of a method's difference, float32 (*spatial), NaN where none is made.

    Parameters
    ----------
    difference
        Of grey values, signed, (*spatial).
    """
    return _smoothed(conspicuity.sided(difference / head.spread, settings.look_for), head, settings)


def baseline(name: str, image: np.ndarray, head: Head, settings: config.Anomaly) -> np.ndarray:
    """A map without a model, as `finished` ones are."""
    found = conspicuity.BASELINES[name](image, head.interior, settings.look_for)
    if name in conspicuity.PLAIN:
        return np.where(head.whole, found, np.nan).astype(np.float32)
    return _smoothed(found, head, settings)


def _smoothed(values: np.ndarray, head: Head, settings: config.Anomaly) -> np.ndarray:
    if settings.smoothing_voxels:
        values = ndimage.gaussian_filter(values, settings.smoothing_voxels)
    return np.where(head.interior, values, np.nan).astype(np.float32)


def score(values: np.ndarray, share: float) -> float:
    """Of a map with NaN where none is made: the mean of the highest of its values, as many as `share` of them."""
    known = values[np.isfinite(values)]
    count = max(1, round(share * known.size))
    return float(np.partition(known, known.size - count)[known.size - count :].mean())


def _moments(values: np.ndarray, head: Head) -> np.ndarray:
    """Of a map in a head, float64 (3,): the share of voxels that it is made at, and the sums of its values and of their
    squares there, per voxel of the head.
    """
    inside = values[head.whole].astype(np.float64)
    known = inside[np.isfinite(inside)]
    return np.array([known.size, known.sum(), np.square(known).sum()]) / inside.size


@dataclass(frozen=True)
class Units:
    """What is usual of a method's maps.

    Attributes
    ----------
    mean, std
        Of their values, every person counting the same: maps in these units are comparable.
    """

    mean: float
    std: float

    @classmethod
    def usual(cls, moments: np.ndarray, subjects: Sequence[str]) -> Units:
        """Of scans with these `_moments`, (n, 3)."""
        people = np.asarray(subjects)
        share, first, second = np.mean([moments[people == person].mean(0) for person in np.unique(people)], axis=0)
        mean = first / share
        return Units(float(mean), math.sqrt(max(second / share - mean**2, 0.0)) or 1.0)

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """A map, or scores, in these units."""
        return (values - self.mean) / self.std


@dataclass(frozen=True)
class Calibration(Units):
    """How a method's maps look in healthy people: what is usual, and thresholds in these units.

    Attributes
    ----------
    threshold
        Above it lies the wanted share of the voxels of healthy heads.
    score_threshold
        With the wanted probability no scan of a healthy person scores above it.
    subjects
        People behind it.
    """

    threshold: float
    score_threshold: float
    subjects: int

    @classmethod
    def of(
        cls, maps: Sequence[np.ndarray], heads: Sequence[Head], subjects: Sequence[str], settings: config.Anomaly
    ) -> Self:
        """Of maps of healthy scans, NaN where none is made.

        The threshold of scores is that of split conformal prediction (Vovk et al. 2005) with people as units: a
        person's score is the highest of his scans, and that of a new person is exceeded by at most
        `subject_false_positive_rate`, whatever the distribution; if the new person has as many scans as they had, and
        nothing in the maps was learnt from these people, which of the ensemble does not quite hold (`calibrated`).
        That of voxels is the empirical share, over heads and people alike, and comes with no such guarantee.

        Raises
        ------
        UserError
            There are too few people.
        """
        names = sorted(set(subjects))
        check_people(len(names), settings)
        values, weights = [], []
        for one, head, subject in zip(maps, heads, subjects, strict=True):
            inside = one[head.whole]
            values.append(inside)
            weights.append(np.full(inside.size, 1.0 / (inside.size * sum(s == subject for s in subjects))))
        value, weight = np.concatenate(values), np.concatenate(weights)
        known = np.isfinite(value)
        order = np.argsort(-np.where(known, value, -np.inf), kind="stable")
        above = np.cumsum(weight[order]) / weight.sum()
        at = order[min(int(np.searchsorted(above, settings.voxel_false_positive_rate, side="right")), len(order) - 1)]
        threshold = float(value[at]) if known[at] else float(value[known].min())
        best = [
            max(score(one, settings.score_share) for one, s in zip(maps, subjects, strict=True) if s == name)
            for name in names
        ]
        rank = math.ceil((len(names) + 1) * (1 - settings.subject_false_positive_rate) - 1e-9)
        limit = float(np.sort(best)[rank - 1])
        units = Units.usual(np.stack([_moments(one, head) for one, head in zip(maps, heads, strict=True)]), subjects)
        threshold, limit = units.scaled(np.array([threshold, limit])).tolist()
        return cls(units.mean, units.std, threshold, limit, len(names))

    def scored(self, values: np.ndarray, share: float) -> float:
        """The score of a map that is not scaled yet, in these units."""
        return float(self.scaled(np.array(score(values, share))))

    def shown(self, values: np.ndarray) -> np.ndarray:
        """A map that is not scaled yet, as a picture in [0, 1]: grey (0.5) at the threshold, black where none is."""
        return np.clip(np.nan_to_num(self.scaled(values), nan=0.0) / (2 * max(self.threshold, 1e-6)), 0.0, 1.0)

    def marked(self, values: np.ndarray) -> np.ndarray:
        """Voxels of a scaled map above the threshold, bool."""
        return np.nan_to_num(values, nan=-np.inf) > self.threshold


def warn_of_scans_each(known: Sequence[str], asked: Sequence[str]) -> None:
    """Warn where people that are asked about have more than twice as many scans each, on average, as people that
    thresholds come from, or fewer than half: with more scans, one of them scores high more easily.

    Parameters
    ----------
    known, asked
        Subject of each scan.
    """
    each = [len(subjects) / len(set(subjects)) for subjects in (known, asked)]
    if max(each) > 2 * min(each):
        log.warning(
            "anomaly: thresholds come from people with %.3g scans each, and those that are asked about have %.3g: %s"
            " healthy people are flagged than subject_false_positive_rate says",
            *each,
            "more" if each[1] > each[0] else "fewer",
        )


def people_needed(settings: config.Anomaly) -> int:
    """Healthy people that thresholds of scores need."""
    return max(math.ceil(1.0 / settings.subject_false_positive_rate - 1.0 - 1e-9), LEAST_PEOPLE)


def check_people(count: int, settings: config.Anomaly) -> None:
    """Whether there are enough healthy people to take thresholds from.

    Raises
    ------
    UserError
        There are not.
    """
    needed = people_needed(settings)
    if count < needed:
        raise UserError(
            f"anomaly.subject_false_positive_rate: {settings.subject_false_positive_rate:g} needs healthy scans of"
            f" {needed} people in the calibration split, found {count}. Raise the rate, or splits.calibration;"
            " or correct anomaly.masks or anomaly.healthy, which say who is healthy."
        )


@dataclass(frozen=True)
class Mapped:
    """A scan and its maps.

    Attributes
    ----------
    maps
        By method, and by method and variant, (*spatial), NaN where none is made.
    healed
        The scan as methods expect it, (1, *spatial).
    """

    scan: Scan
    head: Head
    maps: Mapping[str, np.ndarray]
    healed: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, scan: Scan, mappers: Mapping[str, Mapper], settings: config.Anomaly) -> Self:
        """All maps of a scan, those without a model first."""
        image = scan.image[0]
        head = Head.of(image, settings.margin_voxels)
        maps = {name: baseline(name, image, head, settings) for name in conspicuity.BASELINES}
        healed = {}
        for name, mapper in mappers.items():
            findings: Mapping[str, Finding] = mapper(scan)
            for variant, found in findings.items():
                label = f"{name}_{variant}" if variant else name
                maps[label] = finished(found.difference, head, settings)
            healed[name] = findings[""].healed
        return cls(scan, head, maps, healed)

    def for_thresholds(self) -> Self:
        """The same without what no threshold is taken from."""
        return replace(self, healed={})

    def with_ensemble(self, units: Mapping[str, Units], members: Sequence[str]) -> Mapped:
        """The same with the mean of some methods' maps, each in its units of healthy people."""
        scaled = [units[name].scaled(self.maps[name]) for name in members]
        return replace(self, maps={**self.maps, ENSEMBLE: np.stack(scaled).mean(0, dtype=np.float32)})


def planted(scans: int, root: str) -> dict[int, int]:
    """Which of so many scans get a lesion, by position, and the number of each of these: half of them, by lot, so that
    a lesion goes with no session and no place of a slice.
    """
    ill = np.sort(philox(root, "ill").permutation(scans)[: (scans + 1) // 2])
    return {int(position): number for number, position in enumerate(ill)}


def members_of(settings: config.Anomaly) -> list[str]:
    """Whose maps are averaged: all methods, and maps without a model that know where the head is."""
    return [*(name for name in conspicuity.BASELINES if name not in conspicuity.PLAIN), *settings.methods]


def calibrated(
    healthy: Sequence[Mapped], subjects: Sequence[str], settings: config.Anomaly
) -> tuple[dict[str, Calibration], list[str]]:
    """The calibration of every map, and of the ensemble, from healthy scans; and who is in the ensemble.

    The ensemble of each of these people is in units of all others, as a newcomer's is in units of people that he is not
    among.  In his own units, his maps would be pulled to those of everybody, and newcomers flagged too often.  What is
    left is that his units come from one person less.  In simulations with 9 people at a rate of 10 %, newcomers were
    flagged in 7 to 9 % (in own units in 10 to 32 %), of 3 or 8 members whose sizes differ between people by a log-sd
    of 0.2, 0.5 or 1; with 19 people, in 10 to 11 %.

    Raises
    ------
    UserError
        There are too few people.
    """
    check_people(len(set(subjects)), settings)
    heads, members = [one.head for one in healthy], members_of(settings)

    def of(name: str, scans: Sequence[Mapped]) -> Calibration:
        return Calibration.of([one.maps[name] for one in scans], heads, subjects, settings)

    found = {name: of(name, healthy) for name in healthy[0].maps}
    people = np.asarray(subjects)
    moments = {name: np.stack([_moments(one.maps[name], one.head) for one in healthy]) for name in members}
    units = {
        person: {name: Units.usual(each[people != person], people[people != person]) for name, each in moments.items()}
        for person in np.unique(people)
    }
    alone = [one.with_ensemble(units[person], members) for one, person in zip(healthy, people, strict=True)]
    found[ENSEMBLE] = of(ENSEMBLE, alone)
    return found, members
