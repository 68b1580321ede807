"""From predictions to `augmentation/results.json`: figures per arm, contrasts, ratio curves, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps.config import Arm, Downstream
from meddiff_steps.core.errors import UserError
from meddiff_steps.downstream.comparison import FIGURES, Draws, Resampling, verdict, verdict_text
from meddiff_steps.statistics.bootstrap import Side, Statistic, centred, figure, rounded
from meddiff_steps.statistics.differences import delong_difference, holm
from meddiff_steps.statistics.measures import auc, auc_within, one_versus_rest, smaller_side

#: Sets of predictions of test scans alone, and averaged with their neighbours.
NEARBY = ("test", "neighbours")


@dataclass(frozen=True)
class Scored:
    """Predictions of every arm and seed on the same images.

    Attributes
    ----------
    units, levels, subgroup
        Subject, true class and subgroup (None where unknown) of each image, (rows,).
    probability
        Per arm, (generators, seeds, rows, classes); of an arm that no generator enters, (1, seeds, rows, classes).
    """

    units: np.ndarray
    levels: np.ndarray
    subgroup: np.ndarray
    probability: Mapping[str, np.ndarray]

    def rests_on(self, rows: np.ndarray | slice = slice(None)) -> Side:
        """The rarest class among some rows, in subjects: what their AUC rests on."""
        levels, units = self.levels[rows], self.units[rows]
        return min((smaller_side(levels == level, units) for level in np.unique(levels)), default=Side(0, 0))


def scored(predictions: pd.DataFrame, tested_on: str, levels: Sequence[str]) -> Scored:
    """One set ("test", "shifted" or "synthetic") of the table of predictions, see docs/contracts.md for its columns."""
    table = predictions[predictions["set"] == tested_on].sort_values(
        ["arm", "generator", "seed", "image_id"], kind="stable"
    )
    columns = [f"probability_{level}" for level in levels]
    probability: dict[str, np.ndarray] = {}
    images = table.drop_duplicates("image_id").sort_values("image_id", kind="stable")
    for arm, part in table.groupby("arm", sort=False):
        cells = part["generator"].nunique(), part["seed"].nunique(), len(images)
        if len(part) != np.prod(cells):
            raise UserError(
                f"predictions of arm {arm} on {tested_on} images are incomplete. Run `downstream_test` again."
            )
        probability[str(arm)] = part[columns].to_numpy(dtype=float).reshape(*cells, len(levels))
    numbers = images["level"].map({level: i for i, level in enumerate(levels)}).to_numpy(dtype=int)
    return Scored(
        images["subject_id"].to_numpy(dtype=str), numbers, images["subgroup"].to_numpy(dtype=object), probability
    )


def choose(downstream: Downstream, validation: pd.DataFrame) -> str:
    """The arm of the primary contrast: the one with the highest mean AUC on the validation subjects; of one there is no
    choice.

    Parameters
    ----------
    validation
        arm, seed, auc of the kept weights.

    Raises
    ------
    UserError
        There are several candidates and the validation subjects are all of one class.
    """
    candidates = downstream.primary.arms
    if len(candidates) == 1:
        return candidates[0]
    means = validation.groupby("arm")["auc"].mean()
    if means.reindex(candidates).isna().any():
        raise UserError(
            "downstream.primary.arms names several arms, and the val split does not hold both classes to choose by."
            " Raise splits.val, or name one."
        )
    return max(candidates, key=lambda name: (means[name], -candidates.index(name)))


def contrasts_of(downstream: Downstream, primary: str) -> list[tuple[str, str]]:
    """Pairs (arm, reference) that are compared, the primary one first.

    An arm is compared with the plain real arm of its share (synthetic alone: of equal size); a plain arm, and one
    without such a partner, with the reference of the primary contrast.  Unfiltered images and reconstructions are also
    compared with the same arm on filtered synthetic images.
    """
    plain = {arm.real: arm.name for arm in downstream.arms if arm.plain}
    pairs = [(primary, downstream.primary.reference)]
    tested = [arm for arm in downstream.arms if arm.test == "real"]
    for arm in tested:
        share = arm.real or arm.synthetic
        reference = downstream.primary.reference if arm.plain else plain.get(share, downstream.primary.reference)
        pairs.append((arm.name, reference))
    for arm in tested:
        if arm.synthetic and arm.source != "filtered":
            twins = [
                other
                for other in tested
                if other.model_dump(exclude={"name"}) == arm.model_dump(exclude={"name"}) | {"source": "filtered"}
            ]
            pairs += [(twin.name, arm.name) for twin in twins]
    return list(dict.fromkeys((arm, other) for arm, other in pairs if arm != other))


def _statistics(data: Scored, names: Sequence[str]) -> dict[str, list[Statistic]]:
    """Statistics by "arm|figure" and, for subgroups, "arm|auc|group", each for every generator and seed."""
    groups = sorted({str(group) for group in data.subgroup if group is not None and group == group})
    found: dict[str, list[Statistic]] = {}
    for arm in names:
        cells = _cells(data.probability[arm])
        for name, kind in FIGURES.items():
            found[f"{arm}|{name}"] = [one_versus_rest(kind, data.levels, probability) for probability in cells]
        for group in groups:
            inside = data.subgroup == group
            found[f"{arm}|auc|{group}"] = [auc_within(data.levels, probability, inside) for probability in cells]
    return found


def measure(
    data: Scored, downstream: Downstream, root: str, label: str
) -> tuple[dict[str, dict[str, Any]], dict[str, Draws]]:
    """Figures of every arm on one set of images.

    Returns
    -------
    entries
        Per arm: auc, auprc, brier, ece (figures), `seeds` (AUC of each classifier, by generator and seed),
        `sd_over_seeds` (of means over generators), with several generators `generators` (mean AUC of each) and
        `sd_over_generators`, and with subgroups `groups`, `worst_group_auc` and `gap` (largest minus smallest AUC of a
        group).
    aucs
        The draws behind `auc`, for paired differences.
    """
    names = list(data.probability)
    generators, seeds = (
        max(cells) for cells in zip(*(probability.shape[:2] for probability in data.probability.values()), strict=True)
    )
    draws = Resampling(data.units, seeds, downstream.bootstrap, root, label, generators).draws(_statistics(data, names))
    side = data.rests_on()
    for key in (f"{arm}|{name}" for arm in names for name in ("auc", "auprc")):
        draws[key] = replace(draws[key], draws=side.enough(draws[key].draws))
    for key in (f"{arm}|ece" for arm in names):  # a resample repeats images, which makes it look worse calibrated
        draws[key] = replace(draws[key], draws=centred(draws[key].value, draws[key].draws, 0.0))
    entries: dict[str, dict[str, Any]] = {}
    everyone = np.ones((1, len(data.units)))
    for arm in names:
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.array(
                [
                    one_versus_rest(auc, data.levels, probability)(everyone)[0]
                    for probability in _cells(data.probability[arm])
                ]
            ).reshape(-1, seeds)
        rests_on: dict[str, int | Side] = {"auc": side, "auprc": side.units}
        entry: dict[str, Any] = {name: draws[f"{arm}|{name}"].figure(0.0, rests_on.get(name, 0)) for name in FIGURES}
        entry["seeds"] = [rounded(float(value)) for value in each.ravel()]
        entry["sd_over_seeds"] = rounded(float(np.std(each.mean(0), ddof=1))) if seeds > 1 else None
        if len(each) > 1:
            entry["generators"] = [rounded(float(value)) for value in each.mean(1)]
            entry["sd_over_generators"] = rounded(float(np.std(each.mean(1), ddof=1)))
        groups = {key.split("|", 2)[2]: value for key, value in draws.items() if key.startswith(f"{arm}|auc|")}
        if groups:
            entry |= _group_figures(data, groups)
        entries[arm] = entry
    return entries, {arm: draws[f"{arm}|auc"] for arm in names}


def _cells(probability: np.ndarray) -> np.ndarray:
    """One classifier after the other, (generators x seeds, rows, classes)."""
    return probability.reshape(-1, *probability.shape[2:])


def _group_figures(data: Scored, groups: Mapping[str, Draws]) -> dict[str, Any]:
    """AUC per subgroup, that of the worst, and the gap between best and worst; subgroups without two classes have none
    and do not count.

    fairlearn's MetricFrame gives the same values (`group_min`, `difference`), but no intervals from the resamples that
    all arms share.
    """
    sizes = {name: len(set(data.units[data.subgroup == name])) for name in groups}
    sides = {name: data.rests_on(data.subgroup == name) for name in groups}
    shown: dict[str, Any] = {
        name: replace(entry, n=sizes[name]).figure(0.0, sides[name]) for name, entry in groups.items()
    }
    judged = {
        name: replace(entry, draws=sides[name].enough(entry.draws))
        for name, entry in groups.items()
        if np.isfinite(entry.value)
    }
    if not judged:
        return {"groups": shown}
    values, draws = (
        np.array([g.value for g in judged.values()]),
        np.stack([np.clip(g.widened(), 0.0, 1.0) for g in judged.values()]),
    )
    smallest = min(sizes[name] for name in judged)
    return {
        "groups": shown,
        "worst_group_auc": figure(float(values.min()), draws.min(0), smallest, min(sides[name] for name in judged)),
        "gap": figure(float(np.ptp(values)), np.ptp(draws, axis=0), smallest),
    }


def with_neighbours(
    predictions: pd.DataFrame, downstream: Downstream, levels: Sequence[str], root: str
) -> list[dict[str, Any]]:
    """Every arm on test scans that are averaged with their neighbours: name, `figures` as `measure` has them, and in
    these `gain`, the paired difference of AUC to the scans alone.

    Parameters
    ----------
    predictions
        Of the sets `test` and `neighbours`, of the same images.
    """
    # The same resamples for both, so that differences are paired.
    alone, nearby = (measure(scored(predictions, name, levels), downstream, root, "test") for name in NEARBY)
    return [
        {"name": arm, "figures": entry | {"gain": nearby[1][arm].minus(alone[1][arm]).figure()}}
        for arm, entry in nearby[0].items()
    ]


def compare(data: Scored, draws: Mapping[str, Draws], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Paired differences of AUC, the primary one first; Holm's adjustment is over all others.

    Returns
    -------
    list of dict
        arm, reference, primary, difference (arm minus reference), p, p_holm (None for the primary one, which was
        declared beforehand and stands alone) and delong (None with more than two classes, for which the test is not
        defined).
    """
    rows, p_values = [], []
    for number, (arm, reference) in enumerate(pairs):
        difference = draws[arm].minus(draws[reference])
        first, second = _cells(data.probability[arm]), _cells(data.probability[reference])
        binary = first.shape[2] == 2
        p_values.append(difference.p_value())
        rows.append(
            {
                "arm": arm,
                "reference": reference,
                "primary": number == 0,
                "difference": difference.figure(),
                "p": rounded(p_values[-1]),
                "p_holm": None,
                "delong": (
                    delong_difference(data.levels == 1, first[:, :, 1].T, second[:, :, 1].T, data.units)
                    if binary
                    else None
                ),
            }
        )
    for row, adjusted in zip(rows[1:], holm(p_values[1:]), strict=True):
        row["p_holm"] = adjusted
    return rows


def ratio_curves(downstream: Downstream, entries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """AUC by images added per real one, for each real share and kind of added image; ratio 0 is the plain real arm."""

    def pure(arm: Arm) -> bool:
        return (
            arm.test == "real"
            and arm.real > 0
            and not (arm.classical or arm.mixup or arm.rare_only)
            and arm.balance == "none"
        )

    curves = []
    arms = [arm for arm in downstream.arms if pure(arm)]
    for share, source in sorted({(arm.real, arm.source) for arm in arms if arm.synthetic}, reverse=True):
        points = [arm for arm in arms if arm.real == share and (arm.plain or arm.source == source)]
        ordered = sorted(points, key=lambda arm: arm.synthetic)
        curves.append(
            {
                "real": share,
                "source": source,
                "points": [{"ratio": a.synthetic, "arm": a.name, "auc": entries[a.name]["auc"]} for a in ordered],
            }
        )
    return curves


def summarise(
    downstream: Downstream,
    levels: Sequence[str],
    predictions: pd.DataFrame,
    validation: pd.DataFrame,
    arms: Sequence[Mapping[str, Any]],
    primary: str,
    root: str,
) -> dict[str, Any]:
    """The whole of `augmentation/results.json`.

    Parameters
    ----------
    predictions
        Of the test images (sets `test`, `shifted`, `synthetic`).
    validation
        arm, seed, step, auc and log_loss of the kept weights on the validation subjects.
    arms
        Settings and counts as `design.check` lists them.
    primary
        The arm that `choose` gave before the test split was opened.
    """
    test = scored(predictions, "test", levels)
    entries, draws = measure(test, downstream, root, "test")
    rows = compare(test, draws, contrasts_of(downstream, primary))
    word, non_inferior = verdict(rows[0]["difference"], downstream.margin)
    sets: dict[str, dict[str, dict[str, Any]]] = {"test": entries}
    shifted: list[dict[str, Any]] = []
    for name in ("shifted", "synthetic"):
        if (predictions["set"] == name).any():
            data = scored(predictions, name, levels)
            sets[name], other = measure(data, downstream, root, name)
            if name == "shifted":
                shifted = compare(data, other, contrasts_of(downstream, primary))
    reference = downstream.primary.reference
    share = next(arm.real for arm in downstream.arms if arm.name == reference)
    listed = []
    for arm in arms:
        of_arm = validation[validation["arm"] == arm["name"]]
        listed.append(
            dict(arm)
            | {
                "validation": {
                    "auc": rounded(float(of_arm["auc"].mean())),
                    "log_loss": rounded(float(of_arm["log_loss"].mean())),
                    "steps": of_arm["step"].astype(int).tolist(),
                },
                "figures": {name: found[arm["name"]] for name, found in sets.items() if arm["name"] in found},
            }
        )
    counts = np.bincount(test.levels, minlength=len(levels))
    return {
        "verdict": word,
        "verdict_text": verdict_text(word, non_inferior, primary, reference, downstream.margin, share),
        "target": downstream.target,
        "levels": list(levels),
        "primary": {
            "contrast": f"{primary} minus {reference}",
            "chosen_on": "val" if len(downstream.primary.arms) > 1 else "declared beforehand",
            "candidates": list(downstream.primary.arms),
            "margin": downstream.margin,
            "non_inferior": non_inferior,
            **{key: rows[0][key] for key in ("arm", "reference", "difference", "p", "delong")},
        },
        "contrasts": rows,
        "shifted_contrasts": shifted,
        "arms": listed,
        "ratio_curves": ratio_curves(downstream, entries),
        "subgroup": downstream.subgroup,
        "n": {
            "test_subjects": len(set(test.units)),
            "test_images": len(test.units),
            "test_images_by_level": dict(zip(levels, counts.tolist(), strict=True)),
            "prevalence": rounded(float(counts[-1] / counts.sum())) if counts.sum() and len(levels) == 2 else None,
            "seeds": downstream.seeds,
            "generators": downstream.generator_seeds,
            "generators_retrained": downstream.retrain,
            "validation_subjects": (
                int(validation["subjects"].iloc[0]) if "subjects" in validation and len(validation) else 0
            ),
        },
        "classifier": downstream.classifier.model_dump(mode="json"),
    }
