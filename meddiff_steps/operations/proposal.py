"""What a BIDS dataset says by itself about the study that is to be made of it: columns, splits, heads."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.cohort.covariates import cell_text, is_null
from meddiff_steps.cohort.splits import SPLITS, assign_splits
from meddiff_steps.config import (
    MNI152,
    RESERVED_COLUMNS,
    CategoricalCovariate,
    ContinuousCovariate,
    Covariate,
    Preprocess,
    Registration,
    Splits,
)
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.imaging.background import AIR_HU, DENSER_THAN_AIR_HU
from meddiff_steps.imaging.brain_extraction import extraction_installed
from meddiff_steps.imaging.preprocess import preprocess_image
from meddiff_steps.imaging.reading import ScanError, read_image
from meddiff_steps.imaging.skull import shows_skull
from meddiff_steps.operations.survey import spread
from meddiff_steps.privacy.size import SUBJECTS_PER_NUMBER, subjects_needed

# ------------------------------------------------------------------------------------------------- covariates

#: Covariates that are proposed; more are listed, to be taken instead.
MOST = 6
#: Values that few enough scans have to call them levels; a level needs so many scans, and so large a share.
MOST_LEVELS, LEAST_OF_LEVEL, LEAST_SHARE = 8, 5, 0.02
#: Whole numbers of so few values are levels (sex 1 and 2), not measurements.
FEW_NUMBERS = 4
#: Share of missing values from which a column is only listed, and correlation from which two say the same.
MANY_MISSING, SAME = 0.5, 0.95
#: Of the span of the values, added to either side of the range.
MARGIN = 0.1
#: Columns that come first, as they are often called.
FIRST = ("age", "sex", "gender", "diagnosis", "group", "dx")
UNITS = {"age": "year", "ml": "mL", "cm": "cm", "mm": "mm", "kg": "kg", "bmi": "kg/m2"}
UNITS |= {"year": "year", "years": "year", "month": "month", "months": "month"}
#: Years that nobody is old.
OLDEST = 130


@dataclass(frozen=True)
class Column:
    """A column of participants.tsv as a covariate.

    Attributes
    ----------
    name
        Of the covariate, which is the column's where that can be one.
    covariate
        As it would be declared; None where it cannot.
    why_not
        Why it is only listed; None where it is proposed.
    unsure
        What the owner of the data is to look at.
    """

    name: str
    column: str
    covariate: Covariate | None
    why_not: str | None = None
    unsure: str | None = None


def covariate_name(column: str) -> str:
    """A name that a covariate may have.

    >>> covariate_name("Total Brain (mL)"), covariate_name("2nd score"), covariate_name("session_id")
    ('Total_Brain_mL', 'c_2nd_score', 'session_id_value')
    """
    name = re.sub(r"\W+", "_", column, flags=re.ASCII).strip("_") or "column"
    name = name if name[0].isalpha() else f"c_{name}"
    return f"{name}_value" if name in RESERVED_COLUMNS else name


def covariate_names(columns: Iterable[str]) -> dict[str, str]:
    """A name of its own for the covariate of each column; a column keeps its name where that can be one.

    >>> covariate_names(["age (y)", "年齢", "性別", "age_y"])
    {'age_y': 'age_y', 'age (y)': 'age_y_2', '年齢': 'column', '性別': 'column_2'}
    """
    names: dict[str, str] = {}
    for column in sorted(columns, key=lambda column: covariate_name(column) != column):
        name = covariate_name(column)
        further = (f"{name}_{number}" for number in count(2))
        names[column] = next(one for one in chain([name], further) if one not in names.values())
    return names


def columns(cells: pd.DataFrame, sidecar: Mapping[str, Any]) -> list[Column]:
    """Every column as a covariate: what is proposed first.

    Parameters
    ----------
    cells
        A row per scan and a column per column of participants.tsv, raw.
    sidecar
        participants.json: an object per column; some write a text, its description.
    """
    names = covariate_names(map(str, cells))
    found = [
        _column(names[str(column)], str(column), cells[column].tolist(), _said(sidecar.get(str(column))))
        for column in cells
    ]
    order = {name: place for place, name in enumerate(FIRST)}
    found.sort(key=lambda one: (one.why_not is not None, order.get(one.column.lower(), len(order))))
    taken: list[Column] = []
    listed: list[Column] = []
    for one in found:
        twin = None if one.why_not else next((other for other in taken if _same(cells, one, other)), None)
        if one.why_not:
            listed.append(one)
        elif twin is not None:
            listed.append(_left_out(one, f"says nearly the same as {twin.name}"))
        elif len(taken) == MOST:
            listed.append(_left_out(one, f"only the {MOST} that come first are weighed"))
        else:
            taken.append(one)
    return [*taken, *listed]


def numbers_of(covariates: Iterable[Covariate]) -> int:
    """How many numbers tell covariates to a network: two each, or one per level."""
    from meddiff_steps.models.denoiser.effects import feature_count  # loads torch

    return feature_count([len(one.levels) if isinstance(one, CategoricalCovariate) else 0 for one in covariates])


def affordable(found: Sequence[Column], subjects: int) -> list[Column]:
    """Columns as they came, of which as many are proposed as so many training subjects can teach; one at least."""
    left = subjects  # who are not yet needed for a column above
    taken: list[Column] = []
    listed: list[Column] = []
    for one in found:
        if one.why_not is not None or one.covariate is None:
            listed.append(one)
            continue
        needed = numbers_of([one.covariate]) * SUBJECTS_PER_NUMBER
        if taken and needed > left:
            few = (
                f"needs {needed} training subjects, {SUBJECTS_PER_NUMBER} for each number that tells it; those above"
                f" leave {max(0, left)} of {subjects}"
            )
            listed.append(_left_out(one, few))
        else:
            taken.append(one)
            left -= needed
    return [*taken, *listed]


def _left_out(one: Column, why: str) -> Column:
    return Column(one.name, one.column, one.covariate, why, one.unsure)


def _column(name: str, column: str, raw: Sequence[Any], says: Mapping[str, Any]) -> Column:
    texts = [cell_text(cell) for cell in raw]
    given = [text for text in texts if not is_null(text)]
    missing = 1 - len(given) / len(texts)
    counts = Counter(given)
    description = " ".join(says.get("Description", "").split())
    common: dict[str, Any] = {"column": None if name == column else column, "description": description}
    if len(counts) < 2:
        return Column(name, column, None, "has one value" if counts else "is empty")
    numbers = _numbers(counts)
    rare = [level for level, count in counts.items() if count < max(LEAST_OF_LEVEL, LEAST_SHARE * len(given))]
    few = len(counts) <= FEW_NUMBERS and (numbers is None or all(number.is_integer() for number in numbers))
    if numbers is not None and not few and not _named(counts, says):
        unit, sure = _unit(column, says)
        why = f"{missing:.0%} of its values are missing" if missing > MANY_MISSING else None
        low, high = _range(min(numbers), max(numbers))
        covariate: Covariate = ContinuousCovariate(unit=unit, range=(low, high), **common)
        unsure = None if sure else "which unit?"
        if unit == "year" and "age" in _words(column) and max(numbers) > OLDEST:
            unsure = f"{max(numbers):g} years of age?"
        return Column(name, column, covariate, why, unsure)
    if len(counts) > MOST_LEVELS:
        return Column(name, column, None, f"has {len(counts)} different values, too many for levels")
    if any(level != level.strip() or len(level.splitlines()) != 1 for level in counts):
        return Column(name, column, None, "has values with line breaks")
    levels = sorted(counts, key=(lambda text: float(text)) if numbers is not None else None)
    why = f"{missing:.0%} of its values are missing" if missing > MANY_MISSING else None
    if rare:
        why = f"few scans have {', '.join(f'{level} ({counts[level]})' for level in rare[:3])}"
    unsure = "better words than numbers: they appear in every figure" if numbers is not None else None
    return Column(name, column, CategoricalCovariate(levels=levels, **common), why, unsure)


def _said(entry: Any) -> dict[str, Any]:
    """An entry of a sidecar, of which a description is a text.

    >>> _said("in years"), _said({"Units": "year", "Description": None}), _said(["?"])
    ({'Description': 'in years'}, {'Units': 'year', 'Description': ''}, {})
    """
    if isinstance(entry, str):
        return {"Description": entry}
    if not isinstance(entry, dict):
        return {}
    return entry if isinstance(entry.get("Description", ""), str) else entry | {"Description": ""}


def _numbers(counts: Mapping[str, int]) -> list[float] | None:
    try:
        numbers = [float(text) for text in counts if "_" not in text]
    except ValueError:
        return None
    return numbers if len(numbers) == len(counts) and all(map(math.isfinite, numbers)) else None


def _named(counts: Mapping[str, int], says: Mapping[str, Any]) -> bool:
    """Whether `Levels` of the sidecar name most of the values: then they are codes. Of ages it may name 90 and more.

    >>> _named({"0": 9, "1.0": 5}, {"Levels": {"0": "CN", "1": "AD"}})
    True
    """
    levels = says.get("Levels")
    if not isinstance(levels, dict):
        return False
    known = {_value(str(level)) for level in levels}
    return 2 * sum(_value(text) in known for text in counts) > len(counts)


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _unit(column: str, says: Mapping[str, Any]) -> tuple[str, bool]:
    given = says.get("Units")
    if isinstance(given, str) and given.strip():
        return UNITS.get(given.strip().lower(), given.strip()), True
    last = _words(column)[-1]
    return UNITS.get(last, "unknown"), last in UNITS


def _words(column: str) -> list[str]:
    return re.split(r"[^a-z]+", column.lower())


def _range(low: float, high: float) -> tuple[float, float]:
    """What is plausible, from what is there: a little more on either side, in round numbers.

    >>> _range(20.17, 81.94), _range(0, 100), _range(974.2, 1709.0)
    ((13.0, 89.0), (0.0, 110.0), (900.0, 1790.0))
    """
    span = high - low
    step = 10.0 ** math.floor(math.log10(span) - 1)
    least, most = low - MARGIN * span, high + MARGIN * span
    if low >= 0:
        least = max(0.0, least)
    return float(f"{math.floor(least / step) * step:.10g}"), float(f"{math.ceil(most / step) * step:.10g}")


def _same(cells: pd.DataFrame, one: Column, other: Column) -> bool:
    if not (isinstance(one.covariate, ContinuousCovariate) and isinstance(other.covariate, ContinuousCovariate)):
        return False
    first, second = (pd.to_numeric(cells[column.column], errors="coerce") for column in (one, other))
    return bool(abs(first.corr(second)) > SAME)


# ----------------------------------------------------------------------------------------------------- splits


@dataclass(frozen=True)
class Division:
    """Shares of subjects, how they come out, and what the privacy filter can do with them."""

    splits: Splits
    seed: str
    counts: Mapping[str, int]
    level: float | None
    """None where there are too few subjects for any."""


#: The levels at which the filter is meant to work: the first where the cohort has subjects for it, else the second, for
#: a subject learnt from is worth more than a candidate rejected in vain. What is left out of training for it at most.
LEVELS, MOST_CALIBRATING = (0.05, 0.2), 0.2


def division(subjects: Sequence[str], seed: str) -> Division:
    """Splits in which the filter has the calibration subjects that it needs, and training all others; where there are
    too few for any level of `LEVELS`, a level for those that there are.

    Raises
    ------
    UserError
        There are too few subjects for four splits.
    """
    detectors = len(DETECTORS.names())
    tried = [
        (percent, *found)
        for attempt in ("", "-2", "-3", "-4", "-5")
        for percent in range(10, round(100 * MOST_CALIBRATING) + 1)
        if (found := _divided(subjects, percent, seed + attempt)) is not None
    ]
    if not tried:
        raise UserError(
            f"{len(set(subjects))} subjects are too few: none of several ways to divide them into {', '.join(SPLITS)}"
            " leaves a subject in each. Add subjects."
        )
    for level in LEVELS:
        enough = [way for way in tried if way[3]["calibration"] >= subjects_needed(level, detectors)]
        if enough:
            least = min(percent for percent, *_ in enough)
            # By chance a split of few subjects comes out far smaller than it should: the way in which none does.
            _, shares, chosen, counts = max((way for way in enough if way[0] == least), key=_fairness)
            break
    else:
        _, shares, chosen, counts = max(tried, key=lambda way: (way[0], _fairness(way)))
    least_level = max(LEVELS[0], math.ceil(100 * detectors / (counts["calibration"] + 1) - 1e-9) / 100)
    return Division(shares, chosen, counts, least_level if least_level < 0.5 else None)


def _divided(subjects: Sequence[str], percent: int, seed: str) -> tuple[Splits, str, dict[str, int]] | None:
    """Splits with that share for calibration, and who comes where; None where a split stays empty."""
    val, test = (0.05, 0.1) if len(set(subjects)) >= 300 else (0.1, 0.15)
    shares = Splits(train=round(1 - val - test - percent / 100, 2), val=val, calibration=percent / 100, test=test)
    try:
        counts = Counter(assign_splits(subjects, [], shares, seed).values())
    except UserError:
        return None
    return shares, seed, {name: counts[name] for name in SPLITS}


def _fairness(way: tuple[int, Splits, str, dict[str, int]]) -> float:
    """How small the split is, of what it should be, that is smallest by chance."""
    _, shares, _, counts = way
    return min(counts[name] / share for name, share in shares.model_dump().items())


# ------------------------------------------------------------------------------------------------------ heads

#: Scans that are preprocessed to see how heads lie.
LOOKED_AT = 8
#: Voxels of the grid that they are looked at on, mm, and its sides: more than any head.
LOOK_MM, LOOK_SHAPE = 4.0, (72, 72, 72)
#: Correlation with a brain without skull after registration from which a scan shows one; and how little brains are
#: turned (degrees) and scattered (mm) that a pipeline has put into one pose already.
BRAIN, TURNED_DEG, SCATTERED_MM = 0.85, 3.0, 3.0
#: A scan is CT where so large a share of it is as dark as air, to so many Hounsfield units.
AIR_SHARE, NEAR_AIR_HU = 0.05, 100.0


@dataclass(frozen=True)
class Heads:
    """How the heads of a sample lie.

    Attributes
    ----------
    looked_at
        How many could be read.
    extent
        (3,) mm that a box must have along left-right, posterior-anterior, inferior-superior to hold all of them, as
        the grid will lie; up to two voxels of `LOOK_MM` more than they need.
    brains
        Whether they show brains without skull, or will after `extract`, by the correlation with a template.
    correlation, turned, scattered
        With the template (median); angle to its pose (median, degrees); standard deviation of translations (mm, along
        the axis where it is largest).
    skulls
        How many show a skull.
    extract
        Whether the brains are to be taken out of them: where any shows a skull and the program is installed.
    ct
        Whether most are CT in Hounsfield units; they are neither registered nor held against a brain.
    """

    looked_at: int
    extent: tuple[float, float, float]
    brains: bool
    correlation: float = 0.0
    turned: float = 0.0
    scattered: float = 0.0
    skulls: int = 0
    extract: bool = False
    ct: bool = False

    @property
    def registered(self) -> bool:
        """Whether a pipeline has put them into one pose already."""
        return self.turned <= TURNED_DEG and self.scattered <= SCATTERED_MM

    @property
    def to_register(self) -> bool:
        return self.brains and not self.registered


def heads(paths: Sequence[str], told: Callable[[int, int], None], may_extract: bool = True) -> Heads:
    """Preprocess some scans as the study would, with and without registration, and see how large they are.

    Parameters
    ----------
    paths
        Of the scans.
    told
        Called with how many scans of how many were looked at.
    may_extract
        Whether brains may be taken out of heads: the scans are T1w.

    Raises
    ------
    UserError
        None of them can be read.
    """
    chosen = spread(paths, LOOKED_AT)
    problems: list[str] = []
    ct = 2 * sum(map(_in_hounsfield, chosen)) > len(chosen)
    plain = Preprocess(shape=LOOK_SHAPE, spacing_mm=LOOK_MM, center="foreground", foreground="ct" if ct else "nonzero")
    seen = [_looked(path, plain, problems) for path in chosen]
    read = [(path, found) for path, found in zip(chosen, seen, strict=True) if found is not None]
    if not read:
        raise UserError(f"none of {len(chosen)} scans can be read; the last one: {problems[-1]}")

    def box(found: Sequence[_Look]) -> tuple[float, float, float]:
        half = np.max([half for half, _ in found], axis=0)
        return tuple(float(2 * n * LOOK_MM) for n in half)  # type: ignore[return-value]

    if ct:
        told(len(read), len(read))
        return Heads(len(read), box([found for _, found in read]), False, ct=True)
    skulls = sum(shows_skull(facts) for _, (_, facts) in read)
    extract = bool(skulls) and may_extract and extraction_installed()
    pose = Registration.model_validate({"template": MNI152, "max_rotation_deg": 180, "min_correlation": 0})
    changes = {"brain_extraction": "deepbet"} if extract else {}
    posed = []
    for number, (path, _) in enumerate(read, 1):
        posed.append(_looked(path, plain.model_copy(update={"registration": pose, **changes}), problems))
        told(number, len(read))

    def as_they_lie() -> tuple[float, float, float]:
        if not extract:
            return box([found for _, found in read])
        again = [_looked(path, plain.model_copy(update=changes), problems) for path, _ in read]
        return box([found for found in again if found is not None] or [found for _, found in read])

    registered = [found for found in posed if found is not None]
    if len(registered) < len(read):
        return Heads(len(read), as_they_lie(), False, skulls=skulls, extract=extract)
    lay = [facts for _, facts in registered]
    alike, turned = (
        float(np.median([one[f"registration_{name}"] for one in lay])) for name in ("correlation", "rotation_deg")
    )
    moves = np.array([np.reshape(json.loads(one["registration_matrix"]), (4, 4))[:3, 3] for one in lay])
    scattered = float(moves.std(axis=0).max())
    brains = alike >= BRAIN and (extract or 2 * skulls < len(read))
    result = Heads(len(lay), box(registered), brains, alike, turned, scattered, skulls=skulls, extract=extract)
    return result if result.to_register else replace(result, extent=as_they_lie())


_Look = tuple[np.ndarray, dict[str, Any]]


def _looked(path: str, config: Preprocess, problems: list[str]) -> _Look | None:
    """Half the size of a head as it is preprocessed, and the facts; None, and why, where it cannot be."""
    try:
        image, facts = preprocess_image(Path(path), config)
    except ScanError as error:
        problems.append(str(error))
        return None
    return _half_extent(image[0]), facts


def _in_hounsfield(path: str) -> bool:
    """Whether a scan shows air as CT does."""
    try:
        array = read_image(Path(path)).array
    except ScanError:
        return False
    air = np.abs(array - AIR_HU) <= NEAR_AIR_HU
    return bool(array.min() <= DENSER_THAN_AIR_HU and air.mean() >= AIR_SHARE)


def _half_extent(image: np.ndarray) -> np.ndarray:
    """(3,) voxels from the middle of an image to the farthest that is not background, along each axis."""
    farthest = []
    for axis in range(3):
        occupied = np.flatnonzero(image.any(axis=tuple(other for other in range(3) if other != axis)))
        middle = (image.shape[axis] - 1) / 2
        farthest.append(max(middle - occupied[0], occupied[-1] - middle) + 0.5 if occupied.size else 0.5)
    return np.array(farthest)


def grid(extent: Sequence[float], spacing: float, divisor: int) -> tuple[int, int, int]:
    """Voxels of the smallest box, with sides that a number divides, that holds an extent (mm).

    >>> grid((140, 180, 144), 4, 8)
    (40, 48, 40)
    """
    return tuple(divisor * math.ceil(mm / spacing / divisor - 1e-9) for mm in extent)  # type: ignore[return-value]
