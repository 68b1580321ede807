"""Covariates: from cells of a table to typed values, and from typed values to what a network reads.

A missing value is a value here: it stays null in the manifest and becomes NaN in the encoding, which the models
replace by a learnt null.  A wrong value is never repaired or dropped in silence.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Self

import numpy as np
import pandas as pd
from pydantic import ValidationError

from meddiff_steps.cohort.identity import identity_key
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariate, Covariates, Rare
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

#: Columns of the manifest that are no covariates, so no covariate may have their name.
RESERVED = ("scan_id", "subject_id", "session_id", "path", "sha256", "content_sha256", "split")

#: Cells that mean "missing", in lower case (BIDS writes n/a, R writes NA, pandas an empty cell or NaN).  A declared
#: level wins over them.
NULLS = frozenset({"", "n/a", "na", "nan", "null"})

KINDS: dict[str, type[ContinuousCovariate | CategoricalCovariate]] = {
    "continuous": ContinuousCovariate,
    "categorical": CategoricalCovariate,
}

#: Problems listed in one message; the rest is counted.
SHOWN = 5


# --------------------------------------------------------------------------------------------------- cells


def shorten(items: Iterable[Any], shown: int = SHOWN) -> str:
    """The first few items, comma-separated, and how many more there are.

    >>> shorten("abcdefg", shown=3)
    'a, b, c and 4 more'
    """
    everything = [str(item) for item in items]
    rest = len(everything) - shown
    return ", ".join(everything[:shown]) + (f" and {rest} more" if rest > 0 else "")


def cell_text(value: Any) -> str:
    """A cell as stripped text, the same text whether a reader made it a string, an integer or a float; "" for null.

    >>> [cell_text(v) for v in (1, 1.0, " 1 ", 38.5, True, float("nan"), None)]
    ['1', '1', '1', '38.5', 'True', '', '']
    """
    if isinstance(value, str):
        return value.strip()
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return ""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def is_null(text: str) -> bool:
    """Whether the text of a cell means "missing"."""
    return text.lower() in NULLS


# ------------------------------------------------------------------------------------------------- parsing


def check_names(covariates: Covariates) -> None:
    """Refuse a covariate that has the name of a manifest column.

    Raises
    ------
    UserError
        With the covariate and the remedy.
    """
    for name in covariates:
        if name in RESERVED:
            raise UserError(
                f"covariates.{name}: `{name}` is a column of every manifest. Give the covariate another name and set"
                f" `column: {name}`."
            )


def require_columns(covariates: Covariates, available: Sequence[str], origin: str) -> dict[str, str]:
    """Source column per covariate, after checking that the table has them all.

    Raises
    ------
    UserError
        Columns are missing; names them, the columns there are, and the remedy.
    """
    check_names(covariates)
    columns = {name: covariate.column or name for name, covariate in covariates.items()}
    missing = {name: column for name, column in columns.items() if column not in available}
    if missing:
        wanted = ", ".join(f"covariates.{name} reads column {column!r}" for name, column in missing.items())
        column = next(iter(missing.values()))
        near = difflib.get_close_matches(column.lower(), [one.lower() for one in available], 1)
        meant = next((f" Did you mean {one!r}?" for one in available if [one.lower()] == near), "")
        raise UserError(
            f"{origin}: {wanted}, which is not there. Columns are: {', '.join(available)}.{meant} Set"
            f" {' and '.join(f'covariates.{name}.column' for name in missing)}, add what is missing to the table, or"
            " leave the covariate out."
        )
    return columns


def parse_covariates(frame: pd.DataFrame, covariates: Covariates) -> pd.DataFrame:
    """A copy of `frame` whose covariate columns hold typed values.

    Parameters
    ----------
    frame
        One row per scan or synthetic subject and one column per covariate, under the covariate's name, with raw cells
        (text as in the source, or numbers).  `scan_id` or `sample_id` name the rows in messages.
    covariates
        The declared schema.

    Returns
    -------
    pandas.DataFrame
        Continuous covariates as float64 in their own unit (NaN where missing), categorical ones as text (None where
        missing).

    Raises
    ------
    UserError
        A number cannot be read or is outside the declared range, a level is not declared, or a column is missing.
        Names row, column, value and remedy.
    """
    check_names(covariates)
    missing = [name for name in covariates if name not in frame]
    if missing:
        raise UserError(
            f"the table has no column for covariate {shorten(missing)}; its columns are:"
            f" {', '.join(map(str, frame.columns))}. Add the column."
        )
    named = next((column for column in ("scan_id", "sample_id") if column in frame), None)
    rows = (
        [f"scan {i}" if named == "scan_id" else f"sample {i}" for i in frame[named]]
        if named
        else [f"row {i}" for i in range(len(frame))]
    )

    problems: list[str] = []
    parsed = frame.copy()
    for name, covariate in covariates.items():
        values: list[Any] = []
        wrong: list[str] = []
        parse = _Levels(covariate.levels) if isinstance(covariate, CategoricalCovariate) else _Number(covariate)
        for row, cell in zip(rows, frame[name].tolist(), strict=True):
            try:
                values.append(parse(cell_text(cell)))
            except ValueError as error:
                wrong.append(f"{row}, column {covariate.column or name}: found {cell_text(cell)!r}, {error}")
        if wrong:
            field = "levels" if isinstance(covariate, CategoricalCovariate) else "range"
            more = f"\n    and {len(wrong) - SHOWN} more in this column" if len(wrong) > SHOWN else ""
            problems.append(
                f"  covariates.{name}: {len(wrong)} value(s) cannot be used. Correct them, write n/a where unknown, or"
                f" change covariates.{name}.{field}.\n    " + "\n    ".join(wrong[:SHOWN]) + more
            )
            continue
        parsed[name] = pd.Series(
            values, index=frame.index, dtype="float64" if isinstance(covariate, ContinuousCovariate) else "object"
        )
    if problems:
        raise UserError("the covariates do not fit what the study declares:\n" + "\n".join(problems))
    return parsed


class _Number:
    """Text to a number within the declared range, or NaN."""

    def __init__(self, covariate: ContinuousCovariate) -> None:
        self.low, self.high = covariate.range
        # Units are texts, which stages that only check and use values are not given.
        self.expected = (
            f"expected a number within [{self.low:g}, {self.high:g}] {getattr(covariate, 'unit', '')}".rstrip()
        )

    def __call__(self, text: str) -> float:
        if is_null(text):
            return math.nan
        try:
            value = float(text)
        except ValueError:
            comma = "; write decimals with a point" if _is_number(text.replace(",", ".", 1)) else ""
            raise ValueError(self.expected + comma) from None
        if "_" in text or not self.low <= value <= self.high:  # float() takes 1_000 as 1000
            raise ValueError(self.expected)
        return value


class _Levels:
    """Text to a declared level, or None.  `1`, `1.0` and `01` are one number, so they match the one level that is that
    number.
    """

    def __init__(self, levels: Sequence[str]) -> None:
        self.levels = frozenset(levels)
        self.expected = f"expected one of {list(levels)}"
        numbers = Counter(float(level) for level in levels if _is_number(level))
        self.by_number = {float(level): level for level in levels if _is_number(level) and numbers[float(level)] == 1}

    def __call__(self, text: str) -> str | None:
        if text in self.levels:
            return text
        if is_null(text):
            return None
        level = self.by_number.get(float(text)) if _is_number(text) else None
        if level is None:
            near = [known for known in sorted(self.levels) if identity_key(known) == identity_key(text)]
            raise ValueError(
                self.expected
                + (f"; did you mean {near[0]!r}? Capitals count, and so does the Unicode form" if near else "")
            )
        return level


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


# ------------------------------------------------------------------------------------------------- summary


def describe(values: pd.Series, covariate: Covariate) -> dict[str, Any]:
    """Summary of one typed column for a card.

    Returns
    -------
    dict
        `n` (values), `missing`, and mean, std, min, max in the covariate's unit (continuous; None without values), or
        per level its count and its share among the values (categorical).
    """
    present = values.dropna().tolist()
    summary: dict[str, Any] = {"n": len(present), "missing": len(values) - len(present)}
    if isinstance(covariate, CategoricalCovariate):
        counts = Counter(present)
        summary["levels"] = {
            level: {"n": counts[level], "share": counts[level] / len(present) if present else None}
            for level in covariate.levels
        }
        return summary
    mean = fmean(present) if present else None
    summary |= {
        "mean": mean,
        "std": _std(present),
        "min": min(present, default=None),
        "max": max(present, default=None),
    }
    return summary


def _std(values: Sequence[float]) -> float | None:
    """Sample standard deviation; exactly rounded sums make it independent of row order and instruction set."""
    if len(values) < 2:
        return None
    mean = fmean(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


# ------------------------------------------------------------------------------------------------ encoding


@dataclass(frozen=True)
class CovariateEncoding:
    """How covariates become the numbers a network reads; fitted to the training rows and stored with the model.

    Attributes
    ----------
    covariates
        The declared schema, in the order of the encoded columns.
    means, stds
        Per continuous covariate, over the training rows, in the covariate's unit.
    """

    covariates: Covariates
    means: dict[str, float]
    stds: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Covariates in the order of the encoded columns."""
        return tuple(self.covariates)

    @property
    def level_counts(self) -> list[int]:
        """Per encoded column: the number of its levels, or 0 for a continuous covariate."""
        return [len(self.levels.get(name, ())) for name in self.names]

    @property
    def kinds(self) -> tuple[str, ...]:
        """`continuous` or `categorical`, per encoded column."""
        return tuple(
            "categorical" if isinstance(c, CategoricalCovariate) else "continuous" for c in self.covariates.values()
        )

    @property
    def levels(self) -> dict[str, tuple[str, ...]]:
        """Levels per categorical covariate; a level's place is its code."""
        return {name: tuple(c.levels) for name, c in self.covariates.items() if isinstance(c, CategoricalCovariate)}

    @classmethod
    def fit(cls, frame: pd.DataFrame, covariates: Covariates) -> Self:
        """Measure mean and standard deviation over the training rows.

        Parameters
        ----------
        frame
            A manifest: rows with `split` = `train` are used.  Without a `split` column all rows are.
        covariates
            The declared schema.

        Raises
        ------
        UserError
            A covariate has no values, a continuous one has fewer than two, or one does not vary, so nothing can be
            learnt from it.
        """
        rows = parse_covariates(frame[frame["split"] == "train"] if "split" in frame else frame, covariates)
        means: dict[str, float] = {}
        stds: dict[str, float] = {}
        declared: Covariates = {}
        for name, covariate in covariates.items():
            declared[name] = covariate.model_copy(
                update={"column": None}
            )  # from here on the column has the covariate's name
            values = rows[name].dropna().tolist()
            remedy = f"Remove `{name}` from `covariates`, or add training scans that have it."
            if isinstance(covariate, CategoricalCovariate):
                if not values:
                    raise UserError(
                        f"covariates.{name}: all {len(rows)} training rows are missing it, so it cannot be learnt."
                        f" {remedy}"
                    )
                unseen = [level for level in covariate.levels if level not in set(values)]
                if len(set(values)) == 1:
                    raise UserError(
                        f"covariates.{name}: all {len(values)} training values are {values[0]}, so its effect cannot be"
                        f" learnt. {remedy}"
                    )
                if unseen:
                    log.warning(
                        "covariates.%s: no training row has level %s; images asked for with it will not follow it",
                        name,
                        shorten(unseen),
                    )
                continue
            std = _std(values)
            if std is None:
                raise UserError(
                    f"covariates.{name}: {len(values)} of {len(rows)} training rows have a value, at least 2 are"
                    f" needed. {remedy}"
                )
            if std == 0.0:
                raise UserError(
                    f"covariates.{name}: all {len(values)} training values are {values[0]:g}, so its effect cannot be"
                    f" learnt. {remedy}"
                )
            means[name], stds[name] = fmean(values), std
        return cls(declared, means, stds)

    def scaled(self, ranges: Mapping[str, tuple[float, float]]) -> Self:
        """The same with continuous covariates scaled so that the two values of their range become 0 and 1."""
        means = self.means | {name: float(low) for name, (low, _) in ranges.items()}
        stds = self.stds | {name: float(high - low) for name, (low, high) in ranges.items()}
        return replace(self, means=means, stds=stds)

    def encode(self, frame: pd.DataFrame) -> np.ndarray:
        """Rows as float32 (n, k): standardised values and level codes, NaN where missing.

        Raises
        ------
        UserError
            A column is missing, a value is outside the declared range, or a level is not declared.
        """
        rows = parse_covariates(frame, self.covariates)
        encoded = np.full((len(rows), len(self.covariates)), np.nan, dtype=np.float32)
        for k, name in enumerate(self.names):
            if name in self.means:
                encoded[:, k] = (rows[name].to_numpy(dtype=np.float64) - self.means[name]) / self.stds[name]
            else:
                codes = {level: float(code) for code, level in enumerate(self.levels[name])}
                encoded[:, k] = [math.nan if level is None else codes[level] for level in rows[name]]
        return encoded

    def to_json(self) -> dict[str, Any]:
        """The encoding as JSON values; a list keeps the order of the columns whatever happens to the keys."""
        entries = []
        for name, kind, covariate in zip(self.names, self.kinds, self.covariates.values(), strict=True):
            entry = {"name": name, "kind": kind, **covariate.model_dump(mode="json", exclude={"column"})}
            if kind == "continuous":
                entry |= {"mean": self.means[name], "std": self.stds[name]}
            entries.append(entry)
        return {"covariates": entries}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Read back what `to_json` gave.

        Raises
        ------
        UserError
            The content is no covariate encoding.
        """
        declared: Covariates = {}
        means: dict[str, float] = {}
        stds: dict[str, float] = {}
        try:
            for entry in content["covariates"]:
                fields = dict(entry)
                name, kind = fields.pop("name"), fields.pop("kind")
                if kind == "continuous":
                    means[name], stds[name] = float(fields.pop("mean")), float(fields.pop("std"))
                    fields.setdefault("unit", "")  # a text, which the step that trains is not given
                declared[name] = KINDS[kind].model_validate(fields)
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise UserError(
                f"covariate encoding: not readable ({error!r}). It comes from a model's card.json; train or download"
                " the model again."
            ) from None
        return cls(declared, means, stds)


def as_declared(trained: CovariateEncoding, covariates: Covariates, rare: Rare | None, place: str) -> CovariateEncoding:
    """The encoding that weights were trained with, for covariates as a study declares them.

    Parameters
    ----------
    rare
        A level that the weights are to learn, and so need not know.
    place
        Where the weights lie, for the message.

    Raises
    ------
    UserError
        The study declares other covariates than the weights know, or other levels.
    """
    said = {name: trained.levels.get(name) for name in trained.names}
    wanted = {
        name: tuple(each.levels) if isinstance(each, CategoricalCovariate) else None
        for name, each in covariates.items()
    }
    known = said
    if rare is not None and (levels := said.get(rare.covariate)) is not None and rare.level not in levels:
        known = said | {rare.covariate: (*levels, rare.level)}
    if known != wanted:
        further = f", and {rare.level} as the last of {rare.covariate}" if known is not said and rare else ""
        raise UserError(
            f"{place}: trained with covariates {_with_levels(said)}, this study has {_with_levels(wanted)}. Declare the"
            f" same, with levels in the same order{further}; some values may be n/a, all may not. For other covariates"
            " leave diffusion out of init_from.models: its network is then trained from nothing, and needs steps enough"
            " for that (diffusion.optimiser.steps)."
        )
    return replace(trained, covariates={name: covariates[name].model_copy(update={"column": None}) for name in said})


def _with_levels(covariates: Mapping[str, Sequence[str] | None]) -> str:
    return ", ".join(f"{name} ({', '.join(levels)})" if levels else name for name, levels in covariates.items())
