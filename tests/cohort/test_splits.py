"""Splits by stable hash."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.cohort.splits import SPLITS, assign_splits, shard_of, split_balance, stable_fraction
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate, Covariates, Splits
from meddiff_steps.core.errors import UserError

MANY = [f"sub-{i:05}" for i in range(4000)]
DEFAULT = Splits()


def test_the_hash_is_pinned() -> None:
    """These values are part of what a study publishes: a change moves subjects between training and test."""
    assigned = assign_splits(MANY, [], DEFAULT, "meddiff")
    assert stable_fraction("sub-01") == 0.2568632474467053
    assert [shard_of(f"sub-{i:02}", 4) for i in range(8)] == [3, 2, 3, 1, 1, 3, 1, 1]
    assert "".join(assigned[s][0] for s in MANY[:40]) == "ctttttttttttttvttttttttttttctttttttttttt"


def test_fractions_are_uniform_and_below_one() -> None:
    values = np.array([stable_fraction(s) for s in MANY])
    assert values.min() >= 0 and values.max() < 1
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_shards_are_even() -> None:
    counts = Counter(shard_of(s, 8) for s in MANY)
    assert set(counts) == set(range(8)) and max(counts.values()) < 1.2 * 500


def test_shares_are_met_and_independent_of_the_shards() -> None:
    assigned = assign_splits(MANY, [], DEFAULT, "meddiff")
    for name in SPLITS:
        share = getattr(DEFAULT, name)
        assert (
            abs(sum(s == name for s in assigned.values()) / len(MANY) - share)
            < 4 * (share * (1 - share) / len(MANY)) ** 0.5
        )
    in_shard = [assigned[s] for s in MANY if shard_of(s, 2) == 0]
    assert abs(in_shard.count("train") / len(in_shard) - DEFAULT.train) < 0.05


def test_newcomers_move_nobody_and_order_does_not_matter() -> None:
    before = assign_splits(MANY[:300], [], DEFAULT, "meddiff")
    after = assign_splits(reversed(MANY), [], DEFAULT, "meddiff")
    assert all(after[s] == split for s, split in before.items())


def test_another_seed_gives_other_splits() -> None:
    assert assign_splits(MANY, [], DEFAULT, "a") != assign_splits(MANY, [], DEFAULT, "b")


def test_groups_share_the_split_of_the_smallest_hash_and_overlapping_groups_unite() -> None:
    alone = assign_splits(MANY, [], DEFAULT, "meddiff")
    by_split = {name: next(s for s in MANY if alone[s] == name) for name in SPLITS}
    groups = [(by_split["test"], by_split["calibration"]), (by_split["val"], by_split["test"])]
    united = assign_splits(MANY, groups, DEFAULT, "meddiff")
    members = {by_split[name] for name in ("val", "calibration", "test")}
    assert {united[s] for s in members} == {"val"}  # val lies below calibration and test in [0, 1)
    assert assign_splits(MANY, [g[::-1] for g in groups[::-1]], DEFAULT, "meddiff") == united
    assert all(united[s] == alone[s] for s in MANY if s not in members)


def test_a_share_of_zero_stays_empty() -> None:
    assigned = assign_splits(MANY, [], Splits(train=0.8, val=0.0, calibration=0.0, test=0.2), "meddiff")
    assert set(assigned.values()) == {"train", "test"}


@pytest.mark.parametrize(
    ("subjects", "splits", "empty"),
    [
        (["sub-01"], Splits(train=0.001, val=0, calibration=0, test=0.999), "train"),
        (MANY[:12], Splits(train=0.9, val=0.0001, calibration=0, test=0.0999), "val"),
    ],
)
def test_empty_splits_are_refused_with_a_remedy(subjects: list[str], splits: Splits, empty: str) -> None:
    with pytest.raises(UserError) as refusal:
        assign_splits(subjects, [], splits, "meddiff")
    message = str(refusal.value)
    assert f"splits.{empty} is" in message and f"none of the {len(subjects)} subjects" in message
    assert "Add subjects" in message and "another `seed`" in message and "change the shares" in message


def test_all_subjects_united_into_one_split_are_refused() -> None:
    with pytest.raises(UserError, match=r"splits\.val is 0\.05, but none of the 4000 subjects"):
        assign_splits(MANY, [MANY], DEFAULT, "meddiff")


def test_balance() -> None:
    covariates: Covariates = {
        "age": ContinuousCovariate(unit="year", range=(0, 100)),
        "sex": CategoricalCovariate(levels=["F", "M"]),
    }
    manifest = pd.DataFrame(
        {
            "subject_id": ["a", "a", "b", "c"],
            "split": ["train", "train", "train", "test"],
            "age": [40.0, 50.0, 60.0, 70.0],
            "sex": ["F", "F", "M", None],
        }
    )
    report = split_balance(manifest, covariates, DEFAULT)
    assert {k: (v["share"], v["scans"], v["subjects"]) for k, v in report.items()} == {
        "train": (0.75, 3, 2),
        "val": (0.05, 0, 0),
        "calibration": (0.1, 0, 0),
        "test": (0.1, 1, 1),
    }
    assert report["train"]["covariates"]["sex"]["levels"]["F"]["share"] == pytest.approx(2 / 3)
    assert report["test"]["covariates"]["age"]["difference_from_train"] == pytest.approx(2.0)
    assert report["val"]["covariates"]["age"]["difference_from_train"] is None
