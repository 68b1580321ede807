"""Covariate fidelity: does a synthetic image show what was asked for?

The instrument (`predictors`) measures covariates from images.  It errs on real images too, so every figure on synthetic
images stands beside its *ceiling*: the same figure on held-out real scans, whose true covariates are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import wasserstein_distance

from meddiff_steps.config import CategoricalCovariate, Covariates
from meddiff_steps.core.random_streams import philox
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, Side, Statistic, centred, figure
from meddiff_steps.statistics.measures import auc, calibration_error, macro, mean_of, pearson, slope, smaller_side

#: Columns of a predictions table.  `unit` is what is resampled: the subject of a real scan, the noise of a synthetic
#: one. Numbers have one row per image and level null; a label has a row per level (of two levels: the second), in which
#: `requested_or_true` is 1 for that level and 0 otherwise, and `measured` its probability.  `extrapolated` marks
#: numbers beyond what training scans have: neither generator nor predictor has seen the like.
PREDICTION_COLUMNS = {
    "id": "string",
    "unit": "string",
    "kind": "string",
    "covariate": "string",
    "level": "string",
    "requested_or_true": "float64",
    "measured": "float64",
    "extrapolated": "bool",
}
#: Subgroups with fewer independent images than this, of either kind, get counts but no figures.
MIN_SUBGROUP = 10


def predictions_table(
    ids: Sequence[str],
    units: Sequence[str],
    kind: str,
    wanted: pd.DataFrame,
    measured: Mapping[str, np.ndarray],
    covariates: Covariates,
    trained: Mapping[str, tuple[float, float]] | None = None,
) -> pd.DataFrame:
    """Measured covariates beside what was requested (synthetic) or is true (real).

    Parameters
    ----------
    ids, units
        Image and resampling unit of each row.
    kind
        "real" or "synthetic".
    wanted
        A row per image, a column per covariate; rows that are null are left out for that covariate.
    measured
        What `Predictors.measure` gave for the same images.
    covariates
        The study's schema.
    trained
        Smallest and largest value of each continuous covariate among training scans (`training_range`); nothing is
        marked as extrapolated without.

    Returns
    -------
    pandas.DataFrame
        `PREDICTION_COLUMNS`.
    """
    parts = []
    for name, values in measured.items():
        covariate, column = covariates[name], wanted[name].reset_index(drop=True)
        present = column.notna().to_numpy(dtype=bool)
        base = {
            "id": np.asarray(ids, dtype=object)[present],
            "unit": np.asarray(units, dtype=object)[present],
            "kind": kind,
            "covariate": name,
        }
        base["extrapolated"] = False
        if isinstance(covariate, CategoricalCovariate):
            for i, level in enumerate(covariate.levels):
                if i or len(covariate.levels) > 2:
                    truth = (column[present] == level).to_numpy(dtype=np.float64)
                    parts.append(
                        pd.DataFrame(
                            base | {"level": level, "requested_or_true": truth, "measured": values[present, i]}
                        )
                    )
        else:
            numbers = column[present].to_numpy(dtype=np.float64)
            low, high = (trained or {}).get(name, (-np.inf, np.inf))
            outside = (numbers < low) | (numbers > high)
            parts.append(
                pd.DataFrame(
                    base
                    | {
                        "level": None,
                        "requested_or_true": numbers,
                        "measured": values[present],
                        "extrapolated": outside,
                    }
                )
            )
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(PREDICTION_COLUMNS))
    return table[list(PREDICTION_COLUMNS)].astype(PREDICTION_COLUMNS)


def training_range(training: pd.DataFrame, covariates: Covariates) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each continuous covariate in a table of training scans."""
    numbers = {
        name: training[name].dropna().astype(float)
        for name, c in covariates.items()
        if not isinstance(c, CategoricalCovariate)
    }
    return {name: (float(values.min()), float(values.max())) for name, values in numbers.items() if len(values)}


def covariate_fidelity(
    predictions: pd.DataFrame, covariates: Covariates, *, resamples: int = 1000, seed: str = ""
) -> dict[str, Any]:
    """How well synthetic images show the requested covariates, beside the ceiling on held-out real scans.

    Parameters
    ----------
    predictions
        Rows of both kinds, as `predictions_table` makes them.
    covariates
        The study's schema; those without predictions are left out.
    resamples, seed
        Of the bootstrap over units.

    Returns
    -------
    dict
        Per continuous covariate: `r` (Pearson, requested and measured), `slope` (of measured on requested), `mae` and
        `bias` (mean of measured minus requested) in `unit`, and `share_of_ceiling` (r over the ceiling's r).  Per
        categorical covariate: `auc` and `ece`, the expected calibration error of the probabilities (both one-vs-rest
        macro averages beyond two levels), and `share_of_ceiling` (of auc).  Each is a figure; all but the last carry a
        `ceiling`.  Rows that are extrapolated are left out of all of these; `extrapolation`, where there are such
        synthetic images, has their `mae` and `bias`.
    """
    out: dict[str, Any] = {}
    for name, covariate in covariates.items():
        every = predictions[predictions["covariate"] == name]
        rows = every[~every["extrapolated"]]
        if rows.empty:
            continue
        categorical = isinstance(covariate, CategoricalCovariate)
        head = "auc" if categorical else "r"
        results: dict[str, dict[str, tuple[float, np.ndarray, int]]] = {}
        sides: dict[str, Side] = {}
        for kind in ("synthetic", "real"):
            part = rows[rows["kind"] == kind]
            statistics, units = _label_statistics(part) if categorical else _number_statistics(part)
            sides[kind] = _smallest_side(part)
            boot = Bootstrap(units, resamples, seed, f"fidelity {kind}")
            results[kind] = {key: (*boot.draws(statistic), boot.n) for key, statistic in statistics.items()}
            if "ece" in statistics:  # a resample repeats images, which makes it look worse calibrated
                value, draws, n = results[kind]["ece"]
                results[kind]["ece"] = value, centred(value, draws, 0.0), n
        entry: dict[str, Any] = (
            {"kind": "categorical"}
            if isinstance(covariate, CategoricalCovariate)
            else {"kind": "continuous", "unit": covariate.unit}
        )
        for key, drawn in results["synthetic"].items():
            one, other = (sides["synthetic"], sides["real"]) if key == "auc" else (0, 0)
            entry[key] = figure(*drawn, one) | {"ceiling": figure(*results["real"][key], other)}
        (value, draws, n), (best, bests, _) = results["synthetic"][head], results["real"][head]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = draws / bests
        if categorical:
            shares = min(sides.values()).enough(shares)
        with np.errstate(divide="ignore", invalid="ignore"):
            entry["share_of_ceiling"] = figure(float(np.divide(value, best)), shares, n)
        beyond = every[every["extrapolated"] & (every["kind"] == "synthetic")]
        if len(beyond):
            statistics, units = _number_statistics(beyond)
            boot = Bootstrap(units, resamples, seed, "fidelity extrapolation")
            entry["extrapolation"] = {key: boot.figure(statistics[key]) for key in ("mae", "bias")}
        out[name] = entry
    return out


def subgroup_fidelity(
    predictions: pd.DataFrame, groups: pd.DataFrame, covariates: Covariates, *, resamples: int = 1000, seed: str = ""
) -> dict[str, dict[str, dict[str, Any]]]:
    """`covariate_fidelity` within each level of each categorical covariate: who is served worse?

    Parameters
    ----------
    predictions
        As for `covariate_fidelity`.
    groups
        Indexed by image id, a column per categorical covariate: what was requested (synthetic) or is true (real).

    Returns
    -------
    dict
        Per categorical covariate and level: `images` (counts of both kinds) and `covariates`, figures of all other
        covariates, empty where there are fewer than `MIN_SUBGROUP` units of either kind.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for name, covariate in covariates.items():
        if not isinstance(covariate, CategoricalCovariate) or name not in groups:
            continue
        level_of = predictions["id"].map(groups[name])
        others = {other: c for other, c in covariates.items() if other != name}
        for level in covariate.levels:
            rows = predictions[level_of == level]
            counts = {kind: int(rows.loc[rows["kind"] == kind, "id"].nunique()) for kind in ("synthetic", "real")}
            units = [rows.loc[rows["kind"] == kind, "unit"].nunique() for kind in counts]
            figures = (
                covariate_fidelity(rows, others, resamples=resamples, seed=seed) if min(units) >= MIN_SUBGROUP else {}
            )
            out.setdefault(name, {})[level] = {"images": counts, "covariates": figures}
    return out


def distribution_distances(
    predictions: pd.DataFrame, covariates: Covariates, *, resamples: int = 200, seed: str = ""
) -> dict[str, dict[str, Any]]:
    """How far measured covariates of the synthetic cohort are from those of held-out real scans, as a distribution.

    Both are measured by the same instrument, so its errors are in both.  The distance is the first Wasserstein
    distance: how far a value has to be moved, on average, to turn one distribution into the other.

    Returns
    -------
    dict
        Per continuous covariate `wasserstein` in its unit and `relative`, in standard deviations of the real
        measurements, each with a `floor` (random halves of the real scans: fewer images than the figure has, so on the
        high side); and `requested`, the distance in the unit between requested and true values: what the request alone
        brings.
    """
    out: dict[str, dict[str, Any]] = {}
    for name, covariate in covariates.items():
        if isinstance(covariate, CategoricalCovariate):
            continue
        rows = predictions[predictions["covariate"] == name]
        sides = [rows[rows["kind"] == kind] for kind in ("synthetic", "real")]
        if any(side["unit"].nunique() < 2 for side in sides):
            continue
        boots = [
            Bootstrap(side["unit"].to_numpy(dtype=str), resamples, seed, f"distribution {i}")
            for i, side in enumerate(sides)
        ]
        weights = [boot.all_weights() for boot in boots]

        def distance(
            column: str, sides: list[pd.DataFrame] = sides, weights: list[np.ndarray] = weights
        ) -> tuple[float, np.ndarray]:
            a, b = (side[column].to_numpy(dtype=np.float64) for side in sides)
            value = float(wasserstein_distance(a, b))
            draws = np.array([wasserstein_distance(a, b, u, v) for u, v in zip(*weights, strict=True)])
            return value, centred(value, draws, 0.0)

        real = sides[1]["measured"].to_numpy(dtype=np.float64)
        rng = philox(seed, "distribution halves")
        halves = [(rng.permutation(boots[1].n) < boots[1].n // 2)[boots[1].unit_of_row] for _ in range(resamples)]
        floor = np.array([wasserstein_distance(real[half], real[~half]) for half in halves])
        spread = float(real.std()) or np.nan
        value, draws = distance("measured")
        out[name] = {"unit": covariate.unit, "requested": figure(*distance("requested_or_true"), boots[0].n)}
        for key, scale in (("wasserstein", 1.0), ("relative", spread)):
            out[name][key] = figure(value / scale, draws / scale, boots[0].n) | {
                "floor": figure(float(np.median(floor)) / scale, floor / scale, boots[1].n)
            }
    return out


def correlation_structure(
    predictions: pd.DataFrame, covariates: Covariates, *, resamples: int = 1000, seed: str = ""
) -> dict[str, dict[str, Figure]]:
    """Do covariates go together in synthetic images as they were requested to?

    Returns
    -------
    dict
        Per pair of covariates "a~b", Pearson's r over the images where both are known: `requested` and `measured`
        (synthetic), `true` and `real_measured` (held-out real scans: what the instrument makes of a known
        correlation).  A label enters as a column per level, "a = level" (of two levels: the second), 0 or 1 where it
        was requested, a probability where it was measured.
    """
    columns: dict[str, str] = {}
    for name, covariate in covariates.items():
        levels = covariate.levels if isinstance(covariate, CategoricalCovariate) else []
        levels = levels[1:] if len(levels) == 2 else levels
        columns |= dict.fromkeys([f"{name} = {level}" for level in levels] or [name], name)
    labelled = predictions.assign(
        column=predictions["covariate"].where(
            predictions["level"].isna(), predictions["covariate"] + " = " + predictions["level"].fillna("")
        )
    )
    wide = {
        kind: labelled[labelled["kind"] == kind].pivot(
            index=["id", "unit"], columns="column", values=["requested_or_true", "measured"]
        )
        for kind in ("synthetic", "real")
    }
    out: dict[str, dict[str, Figure]] = {}
    for a, b in combinations(columns, 2):
        if columns[a] == columns[b]:
            continue
        pair: dict[str, Figure] = {}
        for kind, names in (("synthetic", ("requested", "measured")), ("real", ("true", "real_measured"))):
            if not {("measured", a), ("measured", b)} <= set(wide[kind].columns):
                break
            both = wide[kind].dropna(subset=[("measured", a), ("measured", b)])
            boot = Bootstrap(
                both.index.get_level_values("unit").to_numpy(dtype=str), resamples, seed, f"correlation {kind}"
            )
            for label, what in zip(names, ("requested_or_true", "measured"), strict=True):
                pair[label] = boot.figure(
                    pearson(both[(what, a)].to_numpy(), both[(what, b)].to_numpy())
                    if len(both)
                    else mean_of(np.empty(0))
                )
        if pair:
            out[f"{a}~{b}"] = pair
    return out


def _number_statistics(rows: pd.DataFrame) -> tuple[dict[str, Statistic], np.ndarray]:
    wanted, measured = (rows[c].to_numpy(dtype=np.float64) for c in ("requested_or_true", "measured"))
    units = rows["unit"].to_numpy(dtype=str)
    if len(rows) == 0:
        return dict.fromkeys(("r", "slope", "mae", "bias"), mean_of(wanted)), units
    error = measured - wanted
    return {
        "r": pearson(wanted, measured),
        "slope": slope(wanted, measured),
        "mae": mean_of(np.abs(error)),
        "bias": mean_of(error),
    }, units


def _smallest_side(rows: pd.DataFrame) -> Side:
    """The rarest side of all levels; of nobody, of a number."""
    sides = [
        smaller_side(part["requested_or_true"].to_numpy() > 0.5, part["unit"]) for _, part in rows.groupby("level")
    ]
    return min(sides, default=Side(0, 0))


def _label_statistics(rows: pd.DataFrame) -> tuple[dict[str, Statistic], np.ndarray]:
    """AUC and calibration error per level over the same images in the same order, averaged."""
    aucs, errors, units = [], [], np.empty(0, dtype=str)
    for _, part in rows.groupby("level", sort=True):
        ordered = part.sort_values("id", kind="stable")
        units = ordered["unit"].to_numpy(dtype=str)
        truth, measured = ordered["requested_or_true"].to_numpy() > 0.5, ordered["measured"].to_numpy()
        aucs.append(auc(truth, measured))
        errors.append(calibration_error(truth, measured))
    empty = mean_of(np.empty(0))
    return {"auc": macro(aucs) if aucs else empty, "ece": macro(errors) if errors else empty}, units
