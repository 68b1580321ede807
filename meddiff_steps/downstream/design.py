"""Who learns from what: the images of every arm, by stable hashes, and whether there are enough of them.

Nothing here sees an image.  The test split never enters: real rows are of the `train` and `val` splits only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import rfc8785

from meddiff_steps.cohort.splits import stable_fraction
from meddiff_steps.config import Arm, CategoricalCovariate, Covariates, Downstream, PlanGroup
from meddiff_steps.core.errors import UserError

#: Further generator seeds draw so many subjects more than arms need, in case the filter gives some up.
RESERVE = 0.1
#: Splits that training and choices may see.
OPEN_SPLITS = ("train", "val")


def levels_of(downstream: Downstream, covariates: Covariates) -> list[str]:
    """Levels of the target; their order is that of the classifier's outputs, the last is the positive one of two.

    Raises
    ------
    UserError
        No target is set, or it is no categorical covariate.
    """
    if downstream.target is None:
        raise UserError("downstream.target is not set, so there is no downstream study. Name a categorical covariate.")
    covariate = covariates.get(downstream.target)
    if not isinstance(covariate, CategoricalCovariate):
        found = "a continuous covariate" if covariate is not None else "not declared"
        raise UserError(
            f"downstream.target: {downstream.target} is {found}; a categorical one is needed. Declared are"
            f" {sorted(covariates)}."
        )
    return covariate.levels


def recipe(arm: Arm, generator: int = 0) -> str:
    """Name of what an arm trains with one generator seed: arms with equal training sets share it, whatever they are
    tested on.
    """
    name = hashlib.sha256(rfc8785.dumps(arm.model_dump(mode="json", exclude={"name", "test"}))).hexdigest()[:12]
    return f"{name}-{generator}" if generator and arm.drawn else name


def generators_of(arm: Arm, downstream: Downstream) -> range:
    """Generator seeds that make a difference to an arm; one where it has no images of a generator."""
    return range(downstream.generator_seeds if arm.drawn else 1)


def recipes(downstream: Downstream) -> dict[str, tuple[Arm, int]]:
    """One arm and generator seed per recipe, in the order of the arms."""
    found: dict[str, tuple[Arm, int]] = {}
    for arm in downstream.arms:
        for generator in generators_of(arm, downstream):
            found.setdefault(recipe(arm, generator), (arm, generator))
    return found


def held_group(table: pd.DataFrame, downstream: Downstream) -> pd.Series:
    """Rows of the group that is kept out of training; none without `downstream.shift`."""
    if downstream.shift is None:
        return pd.Series(False, index=table.index)
    return table[downstream.shift.covariate].isin(downstream.shift.levels)


def real_samples(manifest: pd.DataFrame, downstream: Downstream, levels: list[str], seed: str) -> pd.DataFrame:
    """Real scans that may be learnt from or validated on: their target is known, and they are not of the held-out
    group.

    Returns
    -------
    DataFrame
        image_id, kind ("real"), generator (0), split ("train" or "val"), subject_id, level (position in `levels`),
        fraction in [0, 1).
    """
    rows = manifest[
        manifest["split"].isin(OPEN_SPLITS)
        & manifest[downstream.target].isin(levels)
        & ~held_group(manifest, downstream)
    ]
    return _samples(
        rows, "scan_id", "subject_id", "real", rows["split"], rows[downstream.target], levels, f"real/v1|{seed}"
    )


def synthetic_samples(
    plan: pd.DataFrame,
    downstream: Downstream,
    groups: list[str],
    levels: list[str],
    seed: str,
    kind: str,
    generator: int = 0,
) -> pd.DataFrame:
    """Synthetic subjects that may be learnt from, labelled with what was requested of them; columns as `real_samples`.

    A subject has the same id, request and fraction with every generator seed: arms of two seeds differ by the images
    alone.
    """
    rows = plan[plan["group"].isin(groups) & plan[downstream.target].isin(levels) & ~held_group(plan, downstream)]
    return _samples(
        rows,
        "sample_id",
        "sample_id",
        kind,
        "train",
        rows[downstream.target],
        levels,
        f"synthetic/v1|{seed}",
        generator,
    )


def _samples(
    rows: pd.DataFrame,
    key: str,
    unit: str,
    kind: str,
    split: Any,
    labels: pd.Series,
    levels: list[str],
    stream: str,
    generator: int = 0,
) -> pd.DataFrame:
    table = pd.DataFrame(
        {"image_id": rows[key], "kind": kind, "generator": generator, "split": split, "subject_id": rows[unit]}
    )
    table["level"] = labels.map({level: i for i, level in enumerate(levels)}).astype("int64")
    table["fraction"] = [stable_fraction(f"meddiff/augment/{stream}|{name}") for name in rows[unit]]
    return table.reset_index(drop=True)


def usable_groups(downstream: Downstream, plan: list[PlanGroup]) -> list[str]:
    """Groups of the plan that arms draw from; grids and counterfactuals are spread on purpose and left out by
    default.
    """
    return list(downstream.groups) or [group.name for group in plan if group.covariates in ("copula", "table")]


def added_counts(arm: Arm, real: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Images that an arm adds per class, (classes,).

    Added images keep the class shares of the real ones, so that an arm changes the number of images and not the
    prevalence; `rare_only` fills the gap to the largest class instead.

    Parameters
    ----------
    real, whole
        Training scans per class in the arm's share, and in all.
    """
    base = real.max() - real if arm.rare_only else real if arm.real else whole
    return np.floor(arm.synthetic * base + 0.5).astype(int)


@dataclass(frozen=True)
class Composition:
    """Rows of the table of samples that an arm learns from."""

    real: np.ndarray
    added: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([self.real, self.added])


def compose(arm: Arm, samples: pd.DataFrame, classes: int, generator: int = 0) -> Composition:
    """The training set of one arm with the images of one generator seed.

    Real subjects are those whose fraction is below `arm.real`, added images those with the smallest fractions of each
    class: both are nested, and neither depends on who else takes part.

    Parameters
    ----------
    samples
        Columns of `real_samples`, all kinds; rows of the val split are never taken.

    Raises
    ------
    UserError
        A class has no image in the arm, or fewer images than the arm adds.
    """
    train = samples["split"].to_numpy() == "train"
    kind, level, fraction = (samples[name].to_numpy() for name in ("kind", "level", "fraction"))
    is_real = train & (kind == "real")
    inside = fraction < arm.real
    real = np.flatnonzero(is_real & inside)
    whole = np.bincount(level[is_real], minlength=classes)
    wanted = added_counts(arm, np.bincount(level[real], minlength=classes), whole)
    pool = train & (kind == arm.source) & ((samples["generator"].to_numpy() == generator) | (not arm.drawn))
    if arm.source == "reconstruction" and arm.real:
        pool &= inside
    order = np.lexsort((samples["image_id"].to_numpy(dtype=str), fraction))
    added = []
    for number in range(classes):
        chosen = order[(pool & (level == number))[order]][: wanted[number]]
        if len(chosen) < wanted[number]:
            raise UserError(
                f"downstream.arms.{arm.name}: {wanted[number]} {arm.source} images of one class are needed,"
                f" {len(chosen)} are there. Plan more synthetic subjects, or lower `synthetic`."
            )
        added.append(chosen)
    made = Composition(real, np.concatenate(added))
    empty = np.flatnonzero(np.bincount(level[made.rows], minlength=classes) == 0)
    if len(empty):
        raise UserError(
            f"downstream.arms.{arm.name}: no training image of class number {empty[0] + 1} of {classes}. Raise `real`"
            " or `synthetic`."
        )
    return made


def check(downstream: Downstream, levels: list[str], samples: pd.DataFrame, planned: int) -> list[dict[str, Any]]:
    """Whether every arm can be made, before anything is trained.

    Parameters
    ----------
    samples
        Real scans and the synthetic subjects that are there or planned.
    planned
        Subjects in the plan, for the advice.

    Returns
    -------
    list of dict
        Per arm name, settings, recipe, and images per class (`real`, `added`).

    Raises
    ------
    UserError
        Fewer than two training subjects of a level, too few synthetic subjects for an arm (with the number to plan), a
        share so small that a class is gone, or nobody to choose on.
    """
    classes = len(levels)
    train = samples[(samples["split"] == "train") & (samples["kind"] == "real")]
    subjects = train.groupby("level")["subject_id"].nunique().reindex(range(classes), fill_value=0)
    if (subjects < 2).any():
        found = ", ".join(f"{level} {subjects[i]}" for i, level in enumerate(levels))
        raise UserError(
            f"downstream.target {downstream.target}: a classifier needs at least 2 training subjects of every level,"
            f" found {found}. Choose another target, take the level off the covariate, or add subjects."
        )
    if len(downstream.primary.arms) > 1 and not (samples["split"] == "val").any():
        raise UserError(
            "downstream.primary.arms names several arms, and one is chosen on the val split, which is empty. Raise"
            " splits.val, or name one arm."
        )
    for generator in range(downstream.generator_seeds):
        _check_supply(
            downstream, levels, samples[(samples["kind"] == "real") | (samples["generator"] == generator)], planned
        )
    listed = []
    for arm in downstream.arms:
        made = compose(arm, samples, classes)
        for generator in generators_of(arm, downstream)[1:]:
            compose(arm, samples, classes, generator)
        counts = {
            name: dict(
                zip(levels, np.bincount(samples["level"].to_numpy()[rows], minlength=classes).tolist(), strict=True)
            )
            for name, rows in (("real", made.real), ("added", made.added))
        }
        listed.append(
            {
                "name": arm.name,
                "settings": arm.model_dump(mode="json", exclude={"name"}),
                "recipe": recipe(arm),
                "images": counts,
            }
        )
    return listed


def _check_supply(downstream: Downstream, levels: list[str], samples: pd.DataFrame, planned: int) -> None:
    """Refuse arms that need more synthetic images than there are, and say how many would do for all of them."""
    real = samples[(samples["kind"] == "real") & (samples["split"] == "train")]
    whole = np.bincount(real["level"], minlength=len(levels))
    short, factor = [], 1.0
    for arm in downstream.arms:
        if not arm.drawn:
            continue
        share = np.bincount(real.loc[real["fraction"] < arm.real, "level"], minlength=len(levels))
        have = np.bincount(samples.loc[samples["kind"] == arm.source, "level"], minlength=len(levels))
        for number in np.flatnonzero(added_counts(arm, share, whole) > have):
            need = int(added_counts(arm, share, whole)[number])
            short.append(
                f"arm {arm.name} needs {need} {arm.source} images with {downstream.target} = {levels[number]}, there"
                f" are {have[number]}"
            )
            factor = max(factor, need / have[number]) if have[number] else math.inf
    if short:
        remedy = (
            f"Plan about {math.ceil(1.05 * factor * planned)} subjects instead of {planned}"
            if math.isfinite(factor)
            else f"Plan subjects of every level of {downstream.target}"
        )
        shown = "\n  ".join(short[:6]) + (f"\n  and {len(short) - 6} more" if len(short) > 6 else "")
        raise UserError(
            f"too few synthetic subjects for the downstream study:\n  {shown}\n{remedy} (`plan`), add a group of the"
            f" missing level (`where: {{{downstream.target}: LEVEL}}`), or lower `synthetic` in these arms."
        )


def needed(downstream: Downstream, levels: list[str], samples: pd.DataFrame) -> list[str]:
    """Ids of the synthetic subjects that a further generator seed has to draw: what the arms take, and `RESERVE` of
    each class.

    Parameters
    ----------
    samples
        Real scans and all planned subjects (`kind` "filtered" and "generated"), of generator seed 0.
    """
    classes = len(levels)
    taken = [
        np.bincount(samples["level"].to_numpy()[compose(arm, samples, classes).added], minlength=classes)
        for arm in downstream.arms
        if arm.drawn
    ]
    planned = samples[samples["kind"] == "filtered"].sort_values(["fraction", "image_id"], kind="stable")
    counts = np.ceil((1 + RESERVE) * np.max(taken, axis=0)) if taken else np.zeros(classes)
    return [
        name
        for number in range(classes)
        for name in planned.loc[planned["level"] == number, "image_id"][: int(counts[number])]
    ]


def design_digest(downstream: Downstream, flip: bool) -> str:
    """SHA-256 of everything that was decided beforehand; `flip` of `variants` is a part of it for `classical` arms."""
    # With one generator seed the digest is that of designs from before there could be several.
    left_out = {"jobs"} | ({"generator_seeds", "retrain"} if downstream.generator_seeds == 1 else set())
    left_out |= {"neighbours"} if downstream.stress.groups else {"neighbours", "stress"}
    decided = downstream.model_dump(mode="json", exclude=left_out)
    # Classical arms mirrored images before `variants.flip` was asked: digests of then say the same.
    if not flip and any(arm.classical for arm in downstream.arms):
        decided["flip"] = False
    return hashlib.sha256(rfc8785.dumps(decided)).hexdigest()
