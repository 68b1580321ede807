"""The plan: which synthetic subjects there will be, with which covariates, noise and shard.

A subject's row depends on its group and its number within the group, never on how many subjects are asked for, so that
a larger cohort begins with the smaller one.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.cohort.covariates import shorten
from meddiff_steps.cohort.learnt import Learnt, LearntLevels, LearntNumber, learnt
from meddiff_steps.cohort.splits import stable_fraction
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.cohort.texts import clean_text
from meddiff_steps.config import CategoricalCovariate, Condition, Covariates, PlanGroup, Scalar
from meddiff_steps.config.plan import filled
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import batch_noise, noise, seed_key
from meddiff_steps.synthesis.copula import GaussianCopula

log = logging.getLogger(__name__)

#: Columns of a plan before those of the covariates.
#:
#: `noise_index` is the index that enters the subject's random streams.  It is `index`, except in counterfactual groups,
#: where all rows of one subject share the number of that subject, and so its noise.
COLUMNS = ("sample_id", "group", "index", "noise_index", "attempt", "cohort_root", "seed_key", "shard")

#: Candidates drawn per subject and stream while looking for one that fulfils its conditions.
BLOCK = 16

#: Streams per subject, hence 65,536 candidates, before the search is given up.
MAX_BLOCKS = 4096

#: Candidates drawn beforehand to see whether the conditions can be fulfilled at all.
PILOT = 65_536

#: Subjects drawn at a time, which bounds memory.
CHUNK = 4096


def build_plan(
    groups: Sequence[PlanGroup],
    covariates: Covariates,
    training: pd.DataFrame,
    seed: str,
    shard_size: int,
    tables: Mapping[str, pd.DataFrame] | None = None,
    with_texts: bool = False,
) -> pd.DataFrame:
    """Plan all synthetic subjects.

    Parameters
    ----------
    groups
        Groups of the study, with distinct names.
    covariates
        The declared schema.
    training
        Training rows of the manifest: a column per covariate; `scan_id` and `subject_id` where several may be of one
        person.  The copula is fitted to their subjects, if any group needs it.
    seed
        Seed of the study; a group's root is "SEED/GROUP".
    shard_size
        Consecutive rows per shard, at least 1.
    tables
        For each group with `covariates: table`, its table: a typed column per covariate, checked against the schema.
    with_texts
        Whether the study has texts: the plan then has a column of them.

    Returns
    -------
    pandas.DataFrame
        The columns `COLUMNS`, then one per covariate: float64 (NaN where missing) or text (None where missing); and
        `text` (None where none is asked for).

    Raises
    ------
    UserError
        A covariate has the name of a plan column, the copula cannot be fitted, conditions cannot be fulfilled, a level
        is asked for that no training row has, or a table lacks rows or columns.
    """
    reserved = [name for name in covariates if name in COLUMNS]
    if reserved:
        raise UserError(
            f"covariates.{reserved[0]}: `{reserved[0]}` is a column of every plan. Give the covariate another name and"
            f" set `column: {reserved[0]}`."
        )
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1, found {shard_size}")
    source = _Source(covariates, training, seed)
    parts = []
    for group in groups:
        if group.covariates == "table":
            part = _from_table(group, source, (tables or {}).get(group.name))
        elif group.covariates == "grid":
            part = _from_grid(group, source)
        elif group.covariates == "counterfactual":
            part = _counterfactual(group, source)
        else:
            conditions = _conditions(group.where, covariates, f"plan.{group.name}.where")
            source.check(group, conditions)
            part = source.draw(group, np.arange(group.subjects), conditions)
        values = part[list(covariates)]
        if with_texts:
            values = values.assign(**{TEXT: _texts(group, values, tables)})
        parts.append(_identify(group, values, seed))
        log.info("group %s: %d subjects, covariates from %s", group.name, len(part), group.covariates)
    plan = pd.concat(parts, ignore_index=True)
    plan.insert(COLUMNS.index("shard"), "shard", np.arange(len(plan), dtype=np.int64) // shard_size)
    return plan


def _texts(group: PlanGroup, values: pd.DataFrame, tables: Mapping[str, pd.DataFrame] | None) -> pd.Series:
    if group.covariates == "table":
        table = (tables or {})[group.name]
        given = table[TEXT].iloc[: len(values)] if TEXT in table else [None] * len(values)
        texts = [clean_text(cell) for cell in given]
    else:
        texts = [planned_text(group, i, row) for i, row in enumerate(values.to_dict("records"))]
    return pd.Series(texts, index=values.index, dtype="object")


def planned_text(group: PlanGroup, index: int, covariates: Mapping[Any, Any]) -> str | None:
    """What the image of a subject is to show: the texts of its group in turn, with its covariates filled in.

    All points of a grid or counterfactual of one subject share its text.

    >>> group = PlanGroup(name="a", subjects=4, texts=["Effusion.", "{sex}, {age} years."])
    >>> [planned_text(group, i, {"age": 61.3, "sex": None}) for i in range(3)]
    ['Effusion.', 'unknown, 61 years.', 'Effusion.']
    """
    if not group.texts:
        return None
    points = math.prod(len(values) for values in group.grid.values())
    shown = {}
    for name, value in covariates.items():
        known = isinstance(value, str) or (value is not None and not pd.isna(value))
        number = f"{value:.0f}" if known and not isinstance(value, str) and abs(value) >= 10 else None
        shown[str(name)] = number or (value if isinstance(value, str) else f"{value:.2g}" if known else "unknown")
    return filled(group.texts[index // points % len(group.texts)], shown)


def _identify(group: PlanGroup, values: pd.DataFrame, seed: str) -> pd.DataFrame:
    """Put who a row is in front of its covariates."""
    index = np.arange(len(values), dtype=np.int64)
    points = len(next(iter(group.grid.values()))) if group.covariates == "counterfactual" else 1
    shared = index // points
    root = _root(seed, group)
    front: dict[str, Any] = {
        "sample_id": [f"{group.name}{i:06d}" for i in index],
        "group": group.name,
        "index": index,
        "noise_index": shared,
        "attempt": np.zeros(len(values), dtype=np.int64),
        "cohort_root": root,
        "seed_key": [seed_key(root, int(i), 0, "noise") for i in shared],
    }
    return pd.concat([pd.DataFrame(front), values.reset_index(drop=True)], axis=1)


def _root(seed: str, group: PlanGroup) -> str:
    return f"{seed}/{group.name}"


# --------------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True)
class Conditions:
    """What every subject of a group fulfils: exact numbers, ranges, and levels."""

    points: dict[str, float] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    levels: dict[str, frozenset[str]] = field(default_factory=dict)

    def hold(self, frame: pd.DataFrame) -> np.ndarray:
        """Whether each row fulfils ranges and levels (numbers are exact by construction), bool (n,)."""
        good = np.ones(len(frame), dtype=bool)
        for name, (low, high) in self.ranges.items():
            good &= frame[name].between(low, high).to_numpy()
        for name, levels in self.levels.items():
            good &= frame[name].isin(levels).to_numpy()
        return good

    def __str__(self) -> str:
        parts = [f"{name} = {value:g}" for name, value in self.points.items()]
        parts += [f"{name} in [{low:g}, {high:g}]" for name, (low, high) in self.ranges.items()]
        parts += [f"{name} in {sorted(levels)}" for name, levels in self.levels.items()]
        return ", ".join(parts)


def _conditions(wanted: Mapping[str, Condition], covariates: Covariates, where: str) -> Conditions:
    conditions = Conditions()
    for name, value in wanted.items():
        if isinstance(covariates[name], CategoricalCovariate):
            conditions.levels[name] = frozenset(str(v) for v in (value if isinstance(value, list) else [value]))
        elif not isinstance(value, list):
            conditions.points[name] = float(value)
        else:
            if len(value) != 2 or float(value[0]) > float(value[1]):
                raise UserError(
                    f"{where}.{name}: found {value}, expected a number or a range [low, high] with low <= high."
                )
            low, high = float(value[0]), float(value[1])
            if low == high:
                conditions.points[name] = low
            else:
                conditions.ranges[name] = (low, high)
    return conditions


def _typed(name: str, value: Scalar, covariates: Covariates) -> float | str:
    return str(value) if isinstance(covariates[name], CategoricalCovariate) else float(value)


# ------------------------------------------------------------------------------------------------ sources


def one_row_each(scans: pd.DataFrame) -> pd.DataFrame:
    """A row per subject, whoever was scanned often: of each covariate the value of one scan, by a hash of the scan ids.

    A value that this scan lacks is that of the next one which has it.  Without several scans of a subject, `scans`.
    """
    if "subject_id" not in scans or scans["subject_id"].is_unique:
        return scans
    lot = scans["scan_id"].map(lambda scan: stable_fraction(f"meddiff/plan/v1|{scan}"))
    return scans.loc[lot.sort_values().index].groupby("subject_id").first()


class _Source:
    """The copula, fitted when first needed, and how subjects are drawn from it by their own streams."""

    def __init__(self, covariates: Covariates, training: pd.DataFrame, seed: str) -> None:
        self.covariates, self.training, self.seed = covariates, training, seed
        whose = training.get("subject_id")
        self.learnt = {name: learnt(training[name], covariate, whose) for name, covariate in covariates.items()}
        self._copula: GaussianCopula | None = None

    @property
    def copula(self) -> GaussianCopula:
        if self._copula is None:
            self._copula = GaussianCopula.fit(one_row_each(self.training), self.covariates)
        return self._copula

    def draw(self, group: PlanGroup, indices: np.ndarray, conditions: Conditions) -> pd.DataFrame:
        """Covariates of the subjects `indices`, (len(indices),) rows.

        Subject i takes the first of its candidates that fulfils the conditions.  Its candidates come from its streams
        `covariates/0`, `covariates/1`, ... of its group's root, `BLOCK` of them each.
        """
        choosy = bool(conditions.ranges or conditions.levels)
        root, k = _root(self.seed, group), len(self.covariates)
        if choosy:
            pilot = noise(seed_key(root, 0, 0, "covariates/pilot"), (PILOT, k))
            if not conditions.hold(self.copula.sample(pilot, conditions.points)).any():
                raise UserError(self._unfulfilled(group, conditions, PILOT))
        parts = []
        for chunk in (indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)):
            found: dict[int, pd.DataFrame] = {}
            waiting = np.arange(len(chunk))
            for block in range(MAX_BLOCKS):
                normals = batch_noise(
                    [seed_key(root, int(i), 0, f"covariates/{block}") for i in chunk[waiting]], (BLOCK, k)
                )
                if not choosy:
                    found[block] = self.copula.sample(normals[:, 0], conditions.points).set_index(waiting)
                    waiting = waiting[:0]
                    break
                candidates = self.copula.sample(normals.reshape(-1, k), conditions.points)
                good = conditions.hold(candidates).reshape(-1, BLOCK)
                lucky = good.any(axis=1)
                rows = np.flatnonzero(lucky) * BLOCK + good[lucky].argmax(axis=1)
                found[block] = candidates.iloc[rows].set_index(waiting[lucky])
                waiting = waiting[~lucky]
                if not len(waiting):
                    break
            if len(waiting):
                raise UserError(self._unfulfilled(group, conditions, BLOCK * MAX_BLOCKS))
            parts.append(pd.concat([part for part in found.values() if len(part)]).sort_index())
        return pd.concat(parts, ignore_index=True)

    def check(self, group: PlanGroup, conditions: Conditions) -> None:
        """Refuse at once what no training scan comes near: the model has not learnt it either."""
        for name, value in conditions.points.items():
            if self.learnt[name].beyond([value]):
                raise UserError(self._unlearnt(group, name, f"{value:g}"))
        for name, (low, high) in conditions.ranges.items():
            values = _number(self.learnt[name]).values
            if not len(values) or high < values[0] or low > values[-1]:
                raise UserError(self._unlearnt(group, name, f"in [{low:g}, {high:g}]"))
            if low < values[0] or high > values[-1]:
                log.warning(
                    "plan.%s: %s may be in [%g, %g], but the training rows are %s; nothing is planned outside of that",
                    group.name,
                    name,
                    low,
                    high,
                    self.learnt[name],
                )
        for name, levels in conditions.levels.items():
            missing = self.learnt[name].beyond(levels)
            if len(missing) == len(levels):
                raise UserError(self._unlearnt(group, name, f"{missing}"))
            if missing:
                log.warning(
                    "plan.%s: %s may be %s, which no training row has; nothing is planned with it",
                    group.name,
                    name,
                    missing,
                )
        self.mark(group, {name: [value] for name, value in conditions.points.items()})

    def mark(self, group: PlanGroup, chosen: Mapping[str, Iterable[Any]]) -> None:
        """Say which values that somebody chose no training scan comes near; refuse levels that none has.

        Numbers beyond are an extrapolation; `evaluate` keeps them apart.
        """
        for name, values in chosen.items():
            known, beyond = self.learnt[name], self.learnt[name].beyond(values)
            if beyond and isinstance(known, LearntLevels):
                raise UserError(self._unlearnt(group, name, f"{beyond}"))
            if beyond:
                log.warning(
                    "plan.%s: %s is asked to be %s, but the training rows are %s: the model has not learnt it, and what"
                    " it draws there is an extrapolation",
                    group.name,
                    name,
                    shorten(f"{value:g}" for value in beyond),
                    known,
                )
            between = known.between(values) if isinstance(known, LearntNumber) else []
            if between:
                log.warning(
                    "plan.%s: %s is asked to be %s, which lies between the values that training rows have (%s)",
                    group.name,
                    name,
                    shorten(f"{value:g}" for value in between),
                    shorten(f"{value:g}" for value in np.unique(_number(known).values)),
                )

    def _unlearnt(self, group: PlanGroup, name: str, wanted: str) -> str:
        known = self.learnt[name]
        have = f"only have {known}" if isinstance(known, LearntLevels) else f"are {known}"
        return (
            f"plan.{group.name}: {name} should be {wanted}, but the training rows {have}, so the model has not learnt"
            " it. Ask for what training scans have, or add such scans."
        )

    def _unfulfilled(self, group: PlanGroup, conditions: Conditions, tries: int) -> str:
        exact = Conditions(
            {}, {**conditions.ranges, **{n: (v, v) for n, v in conditions.points.items()}}, conditions.levels
        )
        rows = int(exact.hold(self.training).sum())
        return (
            f"plan.{group.name}: none of {tries:,} candidates fulfils {conditions} ({rows} of {len(self.training)}"
            " training rows do). Widen a range or drop a condition; for covariates of your own choice use `covariates:"
            " grid` or `table`."
        )


def _number(known: Learnt) -> LearntNumber:
    assert isinstance(known, LearntNumber)
    return known


def _from_table(group: PlanGroup, source: _Source, table: pd.DataFrame | None) -> pd.DataFrame:
    """The user's own rows, the first `subjects` of them."""
    if table is None:
        raise ValueError(f"plan.{group.name}: tables has no entry for this group")
    missing = [name for name in source.covariates if name not in table]
    if missing:
        raise UserError(
            f"plan.{group.name}.table {group.table}: no column for covariate {', '.join(missing)}. Add the column;"
            " leave its cells empty where unknown."
        )
    if group.subjects > len(table):
        raise UserError(
            f"plan.{group.name}: subjects is {group.subjects}, but {group.table} has {len(table)} rows, one per"
            " subject. Ask for fewer, or add rows."
        )
    rows = table.iloc[: group.subjects]
    source.mark(group, {name: rows[name].dropna() for name in source.covariates})
    return rows


def _chosen(group: PlanGroup, covariates: Covariates) -> dict[str, list[float | str]]:
    """The values of a grid and its base, by covariate."""
    given = {**group.grid, **{name: [value] for name, value in group.base.items()}}
    return {name: [_typed(name, value, covariates) for value in values] for name, values in given.items()}


def _from_grid(group: PlanGroup, source: _Source) -> pd.DataFrame:
    """All combinations for subject 0, then all for subject 1, and so on; what is not fixed is drawn given what is."""
    source.mark(group, _chosen(group, source.covariates))
    names = sorted(group.grid)
    combinations = list(itertools.product(*(group.grid[name] for name in names)))
    parts = []
    for place, combination in enumerate(combinations):
        fixed = {**group.base, **dict(zip(names, combination, strict=True))}
        indices = np.arange(group.subjects) * len(combinations) + place
        parts.append(_fill(group, source, indices, fixed).set_index(indices))
    return pd.concat(parts).sort_index()


def _counterfactual(group: PlanGroup, source: _Source) -> pd.DataFrame:
    """All values of the moved covariate for subject 0, then for subject 1, and so on.

    What else is not fixed is drawn once per subject, by its own number, and does not follow the moved covariate.
    """
    source.mark(group, _chosen(group, source.covariates))
    ((name, values),) = group.grid.items()
    subjects = _fill(group, source, np.arange(group.subjects), {**group.base}, unread=name)
    rows = subjects.iloc[np.repeat(np.arange(group.subjects), len(values))].reset_index(drop=True)
    rows[name] = [_typed(name, value, source.covariates) for value in values] * group.subjects
    return rows


def _fill(
    group: PlanGroup, source: _Source, indices: np.ndarray, fixed: Mapping[str, Scalar], unread: str | None = None
) -> pd.DataFrame:
    """Rows with the fixed covariates, and the others drawn; without touching the copula if there is nothing to draw."""
    if set(source.covariates) <= {*fixed, unread}:
        rows = pd.DataFrame(index=range(len(indices)))
    else:
        rows = source.draw(group, indices, _conditions(fixed, source.covariates, f"plan.{group.name}"))
    for name, value in fixed.items():
        rows[name] = _typed(name, value, source.covariates)
    return rows


def draws(group: PlanGroup, covariates: Covariates) -> bool:
    """Whether a group's covariates, or some of them, are drawn from the copula."""
    fixed = {*group.grid, *group.base}
    return group.covariates == "copula" or (
        group.covariates in ("grid", "counterfactual") and not set(covariates) <= fixed
    )


def redraw(subjects: pd.DataFrame, attempt: int) -> pd.DataFrame:
    """The same planned subjects with the noise of another attempt: same covariates, another person."""
    keys = [
        seed_key(str(root), int(index), attempt, "noise")
        for root, index in zip(subjects["cohort_root"], subjects["noise_index"], strict=True)
    ]
    return subjects.assign(attempt=attempt, seed_key=keys)


def reseed(subjects: pd.DataFrame, generator: int) -> pd.DataFrame:
    """The same planned subjects as another generator seed draws them: same covariates and ids, all noise from another
    root.
    """
    return redraw(subjects.assign(cohort_root=[f"{root}/generator/{generator}" for root in subjects["cohort_root"]]), 0)
