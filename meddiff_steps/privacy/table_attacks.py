"""Attacks on the covariate table that goes out beside the images: singling out and attribute inference.

Both after Giomi et al. 2023 (Anonymeter, PoPETs 2023-2, sections 4 and 5): an attack that works as well on people who
were never trained on has learnt about the population; only what it gains beyond that is a leak.  The `anonymeter`
package pins an old numpy, so the definitions are implemented here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.core.random_streams import philox
from meddiff_steps.privacy.attacks import excess_risk, share
from meddiff_steps.statistics.bootstrap import Figure, rounded, wilson

#: Predicates that are tried, covariates that each combines, and times that people change sides for the interval.
PREDICATES, COMBINED, RESAMPLES = 500, 3, 1000

#: A number that fewer training subjects have is one that could point at somebody.
FEW = 5

#: Distances between people and synthetic subjects that are held at once.
BLOCK_DISTANCES = 2**21

#: A guess of a continuous covariate counts as right within this share of the true value.
TOLERANCE = 0.05


def table_attacks(
    released: pd.DataFrame, train: pd.DataFrame, others: pd.DataFrame, covariates: Covariates, seed: str
) -> dict[str, Any]:
    """Both attacks on training subjects, beside the same attacks on as many subjects who were not trained on.

    Parameters
    ----------
    released, train, others
        One row per synthetic, training and unseen subject, with all covariates.

    Returns
    -------
    dict
        `singling_out` and, by covariate, `inference` and `rare_values`; see the functions of these names.  Empty
        without subjects.
    """
    generator = philox(seed, "privacy/table")
    count = min(len(train), len(others))
    if count == 0 or released.empty:
        return {}
    names = list(covariates)
    members, strangers = (
        frame[names].iloc[np.sort(generator.permutation(len(frame))[:count])].reset_index(drop=True)
        for frame in (train, others)
    )
    result: dict[str, Any] = {
        "singling_out": singling_out(released[names], members, strangers, covariates, generator),
        "inference": {},
        "rare_values": rare_values(released, train, others, covariates),
    }
    if len(names) > 1:
        result["inference"] = {
            name: infer_attribute(released[names], members, strangers, covariates, name) for name in names
        }
    return result


def singling_out(
    released: pd.DataFrame,
    train: pd.DataFrame,
    others: pd.DataFrame,
    covariates: Covariates,
    generator: np.random.Generator,
) -> Figure:
    """Predicates true of exactly one synthetic subject: how much oftener are they true of exactly one training subject?

    A predicate takes a synthetic subject and up to three of its covariates: a level as it is, a number as "at least"
    where it is above the median and "at most" where it is below, a missing value as missing.  At most `PREDICATES` are
    tried, at random and each once.

    Many of them speak of the same people, so they are no independent trials.  The interval is as wide as the difference
    of both rates varies when people change sides at random, as it does where nothing leaked.

    Parameters
    ----------
    train, others
        Equally many, because a predicate singles out more easily in a smaller table.

    Returns
    -------
    dict
        The excess risk with its interval, the two success rates `attack` and `control`, how many `predicates` name one
        released subject alone, and as `n` the people on either side.  Where there is no such predicate, as among many
        subjects with labels only, nobody was singled out.
    """
    names = list(covariates)
    medians = {
        name: released[name].median() for name in names if not isinstance(covariates[name], CategoricalCovariate)
    }
    combined = list(combinations(names, min(COMBINED, len(names))))
    total = len(released) * len(combined)
    found = []
    for number in generator.choice(total, size=min(PREDICATES, total), replace=False):
        row = released.iloc[int(number) // len(combined)]
        chosen = combined[int(number) % len(combined)]
        if _matches(released, row, chosen, medians).sum() == 1:
            found.append(np.concatenate([_matches(table, row, chosen, medians) for table in (train, others)]))
    return _singled_out(np.array(found, dtype=bool).reshape(-1, len(train) + len(others)), len(train), generator)


def _matches(table: pd.DataFrame, row: pd.Series, chosen: Iterable[str], medians: Mapping[str, float]) -> np.ndarray:
    """Of whom the predicate of `row` and the `chosen` covariates is true, bool (len(table),)."""
    true = np.ones(len(table), dtype=bool)
    for name in chosen:
        column, value = table[name], row[name]
        if pd.isna(value):
            true &= column.isna().to_numpy()
        elif name in medians:
            true &= ((column >= value) if value >= medians[name] else (column <= value)).to_numpy()
        else:
            true &= (column == value).to_numpy()
    return true


def _singled_out(found: np.ndarray, training: int, generator: np.random.Generator) -> Figure:
    """The figure of `singling_out`, of whom each predicate is true (predicates, people), training people first."""
    matches = csr_array(found.astype(np.int32))

    def rates(is_training: np.ndarray) -> np.ndarray:
        sides = np.stack([is_training, ~is_training], 1).astype(np.int32)
        return (matches @ sides == 1).sum(0) / max(len(found), 1)

    as_it_is = np.arange(found.shape[1]) < training
    attack, control = rates(as_it_is)
    changed = [np.subtract(*rates(generator.permutation(as_it_is))) for _ in range(RESAMPLES)]
    half = float(np.percentile(np.abs(changed), 95))
    scale = max(1.0 - control, 1e-9)
    value, low, high = (min(1.0, max(0.0, (attack - control + x) / scale)) for x in (0.0, -half, half))
    if high == 0 or half == 0:  # surely none; what so few people leave open is said all the same
        high = max(high, wilson(attack, training)[1] - attack)
    return {
        **{name: rounded(float(x)) for name, x in (("value", value), ("low", low), ("high", high))},
        "n": training,
        "predicates": len(found),
        "attack": round(float(attack), 4),
        "control": round(float(control), 4),
    }


def rare_values(
    released: pd.DataFrame, train: pd.DataFrame, others: pd.DataFrame, covariates: Covariates
) -> dict[str, Figure]:
    """Share of released numbers that are exactly those of a few training subjects (fewer than `FEW`), by covariate.

    Covariates are drawn between neighbouring training values and rounded to as many digits as mean something, so some
    meet a training value, oftener than chance where neighbours are close.  They are not moved away from it: a table
    that avoids the values of training subjects would say which these are.  What chance gives is seen on `others`, who
    were never trained on.

    Returns
    -------
    dict
        Per continuous covariate a share, and as `chance` the same of the others' values.
    """
    found = {}
    for name, covariate in covariates.items():
        if not isinstance(covariate, CategoricalCovariate):
            held_by = train[name].value_counts()
            rare = held_by.index[held_by < FEW]
            drawn, unseen = (share(table[name].dropna().isin(rare).to_numpy()) for table in (released, others))
            found[name] = drawn | {"chance": unseen}
    return found


def infer_attribute(
    released: pd.DataFrame, train: pd.DataFrame, others: pd.DataFrame, covariates: Covariates, secret: str
) -> Figure:
    """Guess one covariate of a person whose others are known, from the nearest synthetic subject (Gower 1971).

    A number counts as guessed within 5 % of the truth; subjects whose secret is missing are no targets.

    Returns
    -------
    dict
        The excess risk with its interval, and the two success rates `attack` and `control`.
    """
    known = [name for name in covariates if name != secret]
    donors = released[released[secret].notna()].reset_index(drop=True)
    rates = []
    for table in (train, others):
        targets = table[table[secret].notna()]
        if donors.empty or targets.empty:
            return _against_control(np.zeros((2, 0), dtype=bool))
        nearest = _nearest_donors(targets[known], donors[known], covariates)
        guess, truth = donors[secret].to_numpy()[nearest], targets[secret].to_numpy()
        if isinstance(covariates[secret], CategoricalCovariate):
            rates.append(guess == truth)
        else:
            rates.append(np.abs(guess.astype(float) - truth.astype(float)) <= TOLERANCE * np.abs(truth.astype(float)))
    return _against_control(rates)


def _nearest_donors(targets: pd.DataFrame, donors: pd.DataFrame, covariates: Covariates) -> np.ndarray:
    """Row of the nearest donor of each target, the first of equally near ones, (len(targets),); a block of targets at a
    time.

    Gower 1971: levels are apart or not, numbers by their share of the donors' range, at most 1; of a value and a
    missing one the distance is 1, of two missing ones 0.
    """
    pairs: list[tuple[bool, np.ndarray, np.ndarray, float]] = []
    for name in map(str, donors):
        spread = 1.0
        if is_level := isinstance(covariates[name], CategoricalCovariate):
            codes = pd.factorize(pd.concat([targets[name], donors[name]], ignore_index=True))[0].astype(float)
            codes[codes < 0] = np.nan
            a, b = codes[: len(targets)], codes[len(targets) :]
        else:
            a, b = targets[name].to_numpy(float), donors[name].to_numpy(float)
            if not np.isnan(b).all():
                spread = float(np.nanmax(b) - np.nanmin(b)) or 1.0
        pairs.append((is_level, a, b, spread))
    nearest = np.zeros(len(targets), np.int64)
    size = max(1, BLOCK_DISTANCES // len(donors))
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        distance = np.zeros((len(targets[part]), len(donors)))
        for is_level, values, b, spread in pairs:
            a = values[part, None]
            apart = (a != b).astype(float) if is_level else np.minimum(np.abs(a - b) / spread, 1.0)
            distance += np.where(np.isnan(a) | np.isnan(b), np.isnan(a) != np.isnan(b), apart)
        nearest[part] = distance.argmin(1)
    return nearest


def _against_control(rates: Any) -> Figure:
    attack, control = (np.asarray(rate, dtype=bool) for rate in rates)
    if len(attack) == 0 or len(control) == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    return excess_risk(attack, control) | {
        "attack": round(float(attack.mean()), 4),
        "control": round(float(control.mean()), 4),
    }
