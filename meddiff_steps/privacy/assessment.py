"""Attacks on a synthetic cohort, before and after the filter, and the verdict."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps.config import CategoricalCovariate, Covariates, Privacy
from meddiff_steps.core.random_streams import batch_noise
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.privacy import attacks
from meddiff_steps.privacy.search import nearest, nearest_of_each
from meddiff_steps.privacy.size import batch_size
from meddiff_steps.privacy.verdict import (
    CALIBRATED,
    COPIES_BEFORE,
    COPIES_FOUND,
    DENSITY_DETECTORS,
    FILLED,
    PLAIN,
    RARE,
    SINGLING_OUT,
    STRANGERS,
    Gate,
    holds,
    inference,
    limits_of,
    measured,
    membership,
    nearer,
    verdict,
)
from meddiff_steps.statistics.bootstrap import Figure

#: Images per set that the attacks look at, chosen by the hash of their id: intervals hardly narrow beyond.
MAX_IMAGES = 5000
#: People of either side that `nearer_to_training` takes, at random.
MAX_PEOPLE = 1000

#: Members and others whose denoising loss is computed, and the shares of the timesteps it is computed at.
LOSS_SCANS = 96
LOSS_TIMES = (0.1, 0.25, 0.4)


def sample(ids: Sequence[str], most: int = MAX_IMAGES) -> np.ndarray:
    """Rows of at most `most` ids, those with the smallest SHA-256, in order."""
    if len(ids) <= most:
        return np.arange(len(ids))
    digests = [hashlib.sha256(name.encode()).digest() for name in ids]
    return np.sort(sorted(range(len(ids)), key=digests.__getitem__)[:most])


def some_people(subjects: Sequence[str]) -> np.ndarray:
    """Rows of one scan each of at most `LOSS_SCANS` people, by the hash of their ids: in the order of ids one site may
    come after the other.
    """
    people, first = np.unique(np.asarray(subjects, dtype=str), return_index=True)
    return first[sample(people.tolist(), LOSS_SCANS)]


@dataclass(frozen=True)
class RealScans:
    """Directions of the real scans of one split, and whose they are."""

    directions: Mapping[str, np.ndarray]
    subjects: np.ndarray

    def __len__(self) -> int:
        return len(self.subjects)

    def __getitem__(self, chosen: np.ndarray) -> RealScans:
        """Some of them, by their numbers or a mask."""
        return RealScans({name: vectors[chosen] for name, vectors in self.directions.items()}, self.subjects[chosen])


@dataclass(frozen=True)
class RealSplits:
    """The real scans: those that were learnt from, and those that were not."""

    train: RealScans
    calibration: RealScans
    test: RealScans


def attack(
    synthetic: Mapping[str, np.ndarray],
    real: RealSplits,
    resamples: int,
    seed: str,
    device: torch.device | str = "cpu",
    mirrored: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """All attacks that need the synthetic images alone.

    Where training scans were mirrored, an image may be near to a person by its mirror image: `mirrored` are the
    directions of these, in the order of `synthetic`, and the nearer of both counts, for members as for others.

    Members are the training scans; others are the test scans, which nothing was fitted or calibrated on.  The
    calibration scans are the reference of the density ratio, which is left out where none of `DENSITY_DETECTORS` is
    among the detectors, and of one image, which has no density.  The nearest are searched on `device`.
    """
    train, calibration, test = real.train, real.calibration, real.test
    result: dict[str, Any] = {"nearer_to_training": {}, "authenticity": {}, "membership": {}}
    strangers = np.concatenate([calibration.subjects, test.subjects])
    generator = np.random.default_rng(int(hashlib.sha256(f"{seed}/privacy/attack".encode()).hexdigest()[:8], 16))
    members = np.sort(generator.permutation(len(train))[: max(len(test), min(len(train), 4 * len(test)))])
    who = np.concatenate([train.subjects[members], test.subjects])
    is_member = np.arange(len(who)) < len(members)
    for name, images in synthetic.items():
        unseen = np.concatenate([calibration.directions[name], test.directions[name]])
        ways = [images] if mirrored is None else [images, mirrored[name]]
        sides = []
        for vectors, owners in ((train.directions[name], train.subjects), (unseen, strangers)):
            some = np.isin(owners, generator.permutation(np.unique(owners))[:MAX_PEOPLE])
            sides.append(np.maximum.reduce([nearest_of_each(way, vectors[some], owners[some]) for way in ways]))
        result["nearer_to_training"][name] = attacks.nearer_to_training(sides[0], sides[1], resamples, generator)
        known = torch.from_numpy(train.directions[name]).to(device)
        among = nearest(train.directions[name], known, 2)[0][:, -1]
        for label, each in (("synthetic", ways), ("held_out", [test.directions[name]])):
            similarity, index = (
                np.concatenate(found, 1) for found in zip(*[nearest(x, known) for x in each], strict=True)
            )
            best = (np.arange(len(similarity)), similarity.argmax(1))
            result["authenticity"].setdefault(name, {})[label] = attacks.authenticity(
                similarity[best], index[best], among
            )
        tested = np.concatenate([train.directions[name][members], test.directions[name]])
        scores = np.maximum.reduce([nearest(tested, torch.from_numpy(way).to(device))[0][:, 0] for way in ways])
        result["membership"][f"distance, {name}"] = attacks.membership(
            is_member, scores, list(who), resamples, seed, f"distance|{name}"
        )
    for name in [name for name in DENSITY_DETECTORS if len(synthetic.get(name, ())) > 1][:1]:
        tested = np.concatenate([train.directions[name][members], test.directions[name]])
        drawn = synthetic[name] if mirrored is None else np.concatenate([synthetic[name], mirrored[name]])
        ratio = attacks.density_ratio(tested, drawn, calibration.directions[name])
        result["membership"][f"density ratio, {name}"] = attacks.membership(
            is_member, ratio, list(who), resamples, seed, "density"
        )
    return result


@dataclass(frozen=True)
class RareLevel:
    """Who has a rare level of a covariate (`diffusion.rare`), or was asked for with it: bool masks.

    Attributes
    ----------
    train, calibration, test
        Scans of each split.
    images
        Synthetic images.
    """

    train: np.ndarray
    calibration: np.ndarray
    test: np.ndarray
    images: np.ndarray

    def has_strangers(self, real: RealSplits) -> bool:
        """Whether there are unseen people with that level to compare with, two at least of either split; otherwise all
        unseen people are compared with, who differ for other reasons, too.
        """
        sides = ((real.calibration, self.calibration), (real.test, self.test))
        return min(len(set(scans.subjects[chosen])) for scans, chosen in sides) >= 2


def attack_rare(
    rare: RareLevel,
    synthetic: Mapping[str, np.ndarray],
    real: RealSplits,
    resamples: int,
    seed: str,
    device: torch.device | str = "cpu",
    mirrored: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """`attack` of the images with a rare level, on the few people whom it was learnt from: they are seen most often.

    Where `strangers` are "all", figures also show how the level differs from others, and describe: `gates` leaves them
    out.
    """
    compared = rare.has_strangers(real)
    found: dict[str, Any] = {
        "subjects": len(set(real.train.subjects[rare.train])),
        "images": int(rare.images.sum()),
        "strangers": "of that level" if compared else "all",
    }
    strangers = (real.calibration, real.test)
    if compared:
        strangers = (real.calibration[rare.calibration], real.test[rare.test])
    if not found["images"] or found["subjects"] < 2:
        return found
    images, flipped = (
        None if each is None else {name: vectors[rare.images] for name, vectors in each.items()}
        for each in (synthetic, mirrored)
    )
    assert images is not None
    few = RealSplits(real.train[rare.train], *strangers)
    return found | attack(images, few, resamples, f"{seed}/rare", device, flipped)


@torch.no_grad()
def denoising_losses(model: TrainedModel, latents: Tensor, condition: Condition) -> np.ndarray:
    """How badly the model denoises each scan at its own covariates, (n,); a model knows its training scans better.

    The same times and noise for every scan (loss threshold attack; Matsumoto et al. 2023, section 4).

    Parameters
    ----------
    latents
        Of the scans, standardised, (n, c, *spatial); see `TrainedModel.encode`.
    condition
        Of the scans, n rows.
    """
    process, losses = model.process, np.zeros(len(latents))
    size = batch_size(latents.shape[1:])
    for number, share in enumerate(LOSS_TIMES):
        key = hashlib.sha256(f"denoising/{number}".encode()).hexdigest()[:32]
        noise = torch.from_numpy(batch_noise([key], latents.shape[1:])).to(latents.device)
        timestep = share * process.last_timestep
        for start in range(0, len(latents), size):
            part = slice(start, start + size)
            x0 = latents[part]
            timesteps, eps = torch.full((len(x0),), timestep, device=x0.device), noise.expand_as(x0)
            predicted = model.denoise(process.add_noise(x0, eps, timesteps), timesteps, condition[part])
            error = predicted - process.target(x0, eps, timesteps)
            losses[part] += error.square().flatten(1).mean(1).cpu().numpy()
    return losses / len(LOSS_TIMES)


def count(decisions: pd.DataFrame, planned: pd.DataFrame, duplicates: Sequence[str]) -> dict[str, Any]:
    """What became of every planned subject and of every candidate; planned = released + duplicates + failed.

    Parameters
    ----------
    decisions
        One row per candidate: sample_id, decision, reason.
    planned
        The plan, with a column `subgroup`.
    duplicates
        Accepted subjects that are left out because another synthetic image is nearly the same.
    """
    accepted = set(decisions.loc[decisions["decision"] == "accepted", "sample_id"]) - set(duplicates)
    failed = [name for name in planned["sample_id"] if name not in accepted and name not in set(duplicates)]
    rejected = decisions[decisions["decision"] == "rejected"]
    by_group = {}
    for group, rows in planned.groupby("subgroup"):
        mine = set(rows["sample_id"])
        drawn = decisions[decisions["sample_id"].isin(mine)]
        by_group[str(group)] = {
            "planned": len(mine),
            "released": len(mine & accepted),
            "failed": len(mine & set(failed)),
            "rejected": int((drawn["decision"] == "rejected").sum()),
            "candidates": len(drawn),
        }
    return {
        "planned": len(planned),
        "released": len(accepted),
        "duplicates": len(duplicates),
        "failed": len(failed),
        "candidates": len(decisions),
        "rejected": len(rejected),
        "rejected_by_reason": {
            str(reason): int(n) for reason, n in rejected["reason"].value_counts().sort_index().items()
        },
        "subgroups": by_group,
    }


def covariate_drift(planned: pd.DataFrame, released: pd.DataFrame, covariates: Covariates) -> dict[str, float]:
    """How far the released covariates moved from the planned ones, because the filter rejects some subjects oftener
    than others.

    Returns
    -------
    dict
        Per covariate: the difference of means in standard deviations of the plan, or the largest change of a level's
        share.
    """
    drift = {}
    for name, covariate in covariates.items():
        before, after = planned[name].dropna(), released[name].dropna()
        if len(before) == 0 or len(after) == 0:
            continue
        if isinstance(covariate, CategoricalCovariate):
            shares = [
                column.value_counts(normalize=True).reindex(covariate.levels, fill_value=0.0)
                for column in (before, after)
            ]
            drift[name] = round(float((shares[1] - shares[0]).abs().max()), 5)
        else:
            drift[name] = round(float((after.mean() - before.mean()) / (before.std(ddof=0) or 1.0)), 5)
    return drift


def gates(
    settings: Privacy,
    covariates: Collection[str],
    calibration: Mapping[str, Any],
    before: Figure | None,
    after: Mapping[str, Any],
    table: Mapping[str, Any],
    counts: Mapping[str, Any],
    rare: Mapping[str, Any] | None = None,
) -> list[Gate]:
    """All conditions of the verdict; what could not be tried is NOT_EVALUATED.

    Parameters
    ----------
    covariates
        Their names.
    calibration
        The calibration card.
    before
        Excess copies before the filter; None where nothing is calibrated.
    after
        Attacks on the cohort that would be released.
    table
        Attacks on its covariates, from `table_attacks`.
    counts
        From `count`.
    rare
        From `attack_rare`, where a rare level was learnt; not judged where people of other levels were compared with.
    """
    calibrated = calibration["status"] == "CALIBRATED"
    limits = limits_of(settings, covariates, calibration, rare is not None)
    enough = {"value": calibration["subjects"], "n": calibration["subjects"]}
    few = "NOT_CALIBRATED: too few calibration subjects to say what is too near, so the filter rejected nothing"
    found = [holds(CALIBRATED, True if calibrated else None, enough, limits[CALIBRATED], few)]
    if calibrated:
        positive, negative = calibration["controls"]["positive"], calibration["controls"]["negative"]
        weakest = min(positive, key=lambda kind: positive[kind]["value"])
        recall = positive[weakest] | {"kind": weakest}
        found_enough = recall["value"] >= settings.min_recall
        weak = "DETECTOR_WEAK: copies of this kind would pass unseen, so that few flags mean little"
        found.append(holds(COPIES_FOUND, found_enough, recall, limits[COPIES_FOUND], weak, "NOT_EVALUATED"))
        many = "unseen real subjects are flagged more often than the level says: calibration and test subjects differ"
        nominal = negative["nominal"] if negative["n"] else None
        found.append(holds(STRANGERS, nominal, negative, limits[STRANGERS], many, "CONDITIONAL"))
    figures: dict[str, tuple[Figure | None, str]] = {
        COPIES_BEFORE: (before, "the model has learnt training subjects by heart"),
        SINGLING_OUT: (table.get("singling_out"), "the released covariates point at single training subjects"),
    }
    near = "released images lie nearer to training subjects than to strangers, or where too many were rejected, farther"
    told = "from the released images it can be told who was in the training set"
    guessed = "the released covariates give away one covariate of a training subject whose others are known"
    told_apart = rare if rare and rare["strangers"] == "of that level" else {}
    for of_level, seen in ((False, after), (True, told_apart)):
        figures |= {
            nearer(name, of_level): (figure, near) for name, figure in seen.get("nearer_to_training", {}).items()
        }
        figures |= {membership(name, of_level): (one["auc"], told) for name, one in seen.get("membership", {}).items()}
    figures |= {inference(name): (figure, guessed) for name, figure in table.get("inference", {}).items()}
    little = "there was too little to try it on"
    few = "there are not two calibration and two test subjects of the level, and others differ in more than it"
    for name, limit in limits.items():
        if name not in PLAIN:
            untried = few if name.startswith(RARE) and rare and not told_apart else little
            figure, meaning = figures.get(name, (None, untried))
            found.append(measured(name, figure, limit, meaning))
    share = (counts["failed"] + counts["duplicates"]) / max(1, counts["planned"])
    failed = {"value": share, "n": counts["planned"]}
    region = "so many got no image: the filter rejects whole regions of the plan, or images are near duplicates"
    return [*found, holds(FILLED, share <= settings.max_failed_share, failed, limits[FILLED], region)]


def report(
    settings: Privacy,
    calibration: Mapping[str, Any],
    found: list[Gate],
    attacks_found: Mapping[str, Any],
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """The public report: decisions, thresholds and figures, no distance and no neighbour of any single image."""
    return {
        "verdict": verdict(found),
        "enforce": settings.enforce,
        "gates": [gate.to_json() for gate in found],
        "calibration": {
            key: calibration[key]
            for key in ("status", "level", "subjects", "needed", "detectors", "thresholds", "groups")
            if key in calibration
        },
        "controls": calibration.get("controls", {}),
        "attacks": dict(attacks_found),
        "counts": dict(counts),
    }
