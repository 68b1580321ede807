"""What training scans have of a covariate, and so what a model can have learnt of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.config import CategoricalCovariate, Covariate

#: A number of at most so many different values, each held by at least `HOLDERS` people on average, is a setting (1.5 T
#: or 3 T): there is nothing between two of them.
SETTINGS, HOLDERS = 10, 5
#: A scale of whole numbers, or of at most so many values, is a count or a score: nothing lies between its marks.
MARKS = 100
#: A sweep runs between these quantiles of the training values: inside what the model has seen.
SWEEP_QUANTILES = (0.03, 0.97)
#: Decimals of a scale that are looked for.
DECIMALS = 6


def shown(values: Iterable[float], digits: int = 4) -> list[str]:
    """Numbers with `digits` significant digits, or as many more as tell all that differ apart.

    >>> shown([0.123456, 7.0]), shown([20240101.0, 20240102.0, 20250101.0])
    (['0.1235', '7'], ['20240101', '20240102', '20250101'])
    """
    exact = [float(value) for value in values]
    for count in range(digits, 18):
        texts = [f"{value:.{count}g}" for value in exact]
        if len({float(text) for text in texts}) == len(set(exact)):
            break
    return texts


@dataclass(frozen=True)
class LearntNumber:
    """The values of a continuous covariate among training rows, sorted, (n,), in its unit, and how many people have
    them (n, if it is not said).
    """

    values: np.ndarray
    people: int | None = None

    def beyond(self, wanted: Iterable[Any]) -> list[float]:
        """Those of `wanted` that lie outside the range of the training rows."""
        inside = (self.values[0], self.values[-1]) if len(self.values) else (np.inf, -np.inf)
        return sorted({float(value) for value in wanted if not inside[0] <= value <= inside[1]})

    def between(self, wanted: Iterable[Any]) -> list[float]:
        """Those of `wanted` that a count, a score or a setting cannot be."""
        wanted = sorted({float(value) for value in wanted})
        placed = self.placed(np.array(wanted))
        return [] if placed is None else [value for value, near in zip(wanted, placed, strict=True) if value != near]

    def placed(self, numbers: np.ndarray) -> np.ndarray | None:
        """Each number as the nearest one that such a column can have; None where it can have any.

        >>> LearntNumber(np.array([20.0, 24.0, 25.0, 30.0])).placed(np.array([26.37]))
        array([26.])
        >>> LearntNumber(np.repeat([1.5, 3.0], 10)).placed(np.array([2.39, 1.6]))
        array([3. , 1.5])
        """
        if self.marks is not None:
            places = np.searchsorted((self.marks[1:] + self.marks[:-1]) / 2, numbers)
            return self.marks[places]
        if self.step is None:
            return None
        first, step, decimals = self.step
        return np.round(first + step * np.round((numbers - first) / step), decimals)

    def sweep(self, steps: int) -> np.ndarray:
        """`steps` values from low to high, evenly; fewer where a count, a score or a setting has no more."""
        low, high = np.quantile(self.values, SWEEP_QUANTILES)
        even = np.linspace(low, high, steps)
        placed = self.placed(even)
        return even if placed is None else np.unique(placed)

    @cached_property
    def marks(self) -> np.ndarray | None:
        """The values of a setting, sorted; None where it is none."""
        known, people = np.unique(self.values), len(self.values) if self.people is None else self.people
        return known if 0 < len(known) <= SETTINGS and len(known) * HOLDERS <= people else None

    @cached_property
    def step(self) -> tuple[float, float, int] | None:
        """A value of the scale of a count or score, the distance of its marks, and its decimals; None where it is
        none.
        """
        known = np.unique(self.values)
        for decimals in range(DECIMALS + 1) if len(known) > 1 else ():
            whole = np.round(known * 10.0**decimals)
            if np.array_equal(np.round(known, decimals), known) and np.abs(whole).max() < 2**53:
                marks = whole.astype(np.int64)
                step = int(np.gcd.reduce(marks - marks[0]))
                few = (marks[-1] - marks[0]) // step <= MARKS
                return (float(known[0]), step / 10.0**decimals, decimals) if decimals == 0 or few else None
        return None

    def __str__(self) -> str:
        return f"in [{self.values[0]:g}, {self.values[-1]:g}]" if len(self.values) else "without a value"


@dataclass(frozen=True)
class LearntLevels:
    """The levels of a categorical covariate that training rows have, in declared order."""

    levels: tuple[str, ...]

    def beyond(self, wanted: Iterable[Any]) -> list[str]:
        """Those of `wanted` that no training row has."""
        return sorted({str(level) for level in wanted} - set(self.levels))

    def __str__(self) -> str:
        return f"{list(self.levels)}"


Learnt = LearntNumber | LearntLevels


def learnt(training: pd.Series, covariate: Covariate, subjects: pd.Series | None = None) -> Learnt:
    """What the training rows' column of a covariate holds, and whose rows they are (one person's each, if it is not
    said); missing values are nothing.
    """
    present = training.dropna()
    if isinstance(covariate, CategoricalCovariate):
        return LearntLevels(tuple(level for level in covariate.levels if (present == level).any()))
    people = None if subjects is None else int(subjects[present.index].nunique())
    return LearntNumber(np.sort(present.to_numpy(dtype=np.float64)), people)
