"""Splits by stable hash: a subject's split depends on its own id and the study's seed, and on nothing else.

Exact stratification (equal shares of every level in every split) needs the ranks of all subjects, so a newcomer would
move others between training and test.  A hash gives every stratum the same expected shares and moves nobody; how well
the splits came out is reported by `split_balance`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from meddiff_steps.cohort.covariates import describe
from meddiff_steps.config import ContinuousCovariate, Covariates, Splits
from meddiff_steps.core.errors import UserError

#: All splits, in the order in which they divide [0, 1).
SPLITS = ("train", "val", "calibration", "test")


def stable_fraction(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, uniform over texts.

    The first 53 bits of SHA-256, which is what a double holds exactly.

    >>> stable_fraction("sub-01")
    0.2568632474467053
    """
    return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53


def shard_of(subject_id: str, shards: int) -> int:
    """Shard of a subject, from 0 to `shards` - 1; the same in every study and whoever else takes part."""
    return int(stable_fraction(f"meddiff/shard/v1|{subject_id}") * shards)


def assign_splits(
    subjects: Iterable[str], groups: Iterable[Sequence[str]], splits: Splits, seed: str
) -> dict[str, str]:
    """Split of every subject.

    Parameters
    ----------
    subjects
        Subject ids.
    groups
        Subjects that must share a split, for example because they share an image.  Groups that overlap are united; a
        united group takes the split of the member with the smallest hash.
    splits
        Shares.
    seed
        The study's seed: another one gives other splits.

    Raises
    ------
    UserError
        A split with a share above 0 stays empty.
    """
    fractions = {subject: stable_fraction(f"meddiff/split/v1|{seed}|{subject}") for subject in sorted(set(subjects))}
    leader = {subject: subject for subject in fractions}

    def find(subject: str) -> str:
        while leader[subject] != subject:
            leader[subject] = leader[leader[subject]]
            subject = leader[subject]
        return subject

    for group in groups:
        for other in group[1:]:
            first, second = sorted((find(group[0]), find(other)), key=fractions.__getitem__)
            leader[second] = first  # the root is always the member with the smallest hash

    assigned = {subject: _split_at(fractions[find(subject)], splits) for subject in fractions}
    for name in SPLITS:
        share = getattr(splits, name)
        if share > 0 and name not in assigned.values():
            counts = ", ".join(f"{n} {sum(s == n for s in assigned.values())}" for n in SPLITS)
            enough = math.ceil(math.log(0.01) / math.log1p(-min(share, 0.99)))
            raise UserError(
                f"splits.{name} is {share:g}, but none of the {len(assigned)} subjects fell into it ({counts}). Add"
                f" subjects (with {max(enough, len(assigned) + 1)} or more this is unlikely), take another `seed`, or"
                " change the shares in `splits`."
            )
    return assigned


def _split_at(fraction: float, splits: Splits) -> str:
    edge = 0.0
    for name in SPLITS:
        edge += getattr(splits, name)
        if fraction < edge:
            return name
    return SPLITS[-1]  # the shares may add up to 1 - 1e-6; test is never configured to 0


def split_balance(manifest: pd.DataFrame, covariates: Covariates, splits: Splits) -> dict[str, Any]:
    """How the splits came out, for a card.

    Returns
    -------
    dict
        Per split: configured `share`, `scans`, `subjects`, and `covariates` as `describe` gives them.  Continuous
        covariates add `difference_from_train`, in standard deviations of the training scans.
    """
    report: dict[str, Any] = {}
    train = manifest[manifest["split"] == "train"]
    references = {name: describe(train[name], covariate) for name, covariate in covariates.items()}
    for split in SPLITS:
        rows = manifest[manifest["split"] == split]
        summaries = {name: describe(rows[name], covariate) for name, covariate in covariates.items()}
        for name, covariate in covariates.items():
            if isinstance(covariate, ContinuousCovariate):
                mean, reference = summaries[name]["mean"], references[name]
                comparable = mean is not None and reference["std"]
                summaries[name]["difference_from_train"] = (
                    (mean - reference["mean"]) / reference["std"] if comparable else None
                )
        report[split] = {
            "share": getattr(splits, split),
            "scans": len(rows),
            "subjects": int(rows["subject_id"].nunique()),
            "covariates": summaries,
        }
    return report
