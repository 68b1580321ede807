"""Who is in which arm: counts, nested shares, refusals; no image is needed for any of it."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.config import Arm, Downstream, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.downstream.classifier import Task, class_weights, draw_batch
from meddiff_steps.downstream.design import (
    check,
    compose,
    design_digest,
    held_group,
    levels_of,
    needed,
    real_samples,
    recipe,
    recipes,
    synthetic_samples,
)
from meddiff_steps.downstream.results import choose, contrasts_of, ratio_curves

LEVELS = ["control", "case"]


def cohort(subjects: int = 400) -> pd.DataFrame:
    table = pd.DataFrame(
        {"scan_id": [f"s{i}" for i in range(subjects)], "subject_id": [f"p{i}" for i in range(subjects)]}
    )
    table["split"] = np.array(["train", "train", "train", "val", "calibration", "test"])[np.arange(subjects) % 6]
    table["diagnosis"] = np.where(np.arange(subjects) % 5 == 0, "case", "control")
    table["site"] = np.where(np.arange(subjects) % 7 == 0, "north", "south")
    table.loc[1, "diagnosis"] = None
    return table


def plan(subjects: int = 500) -> pd.DataFrame:
    table = cohort(subjects).rename(columns={"scan_id": "sample_id"}).drop(columns=["subject_id", "split"])
    table["sample_id"], table["group"] = (
        [f"syn{i}" for i in range(subjects)],
        np.where(np.arange(subjects) % 11, "syn", "sweep"),
    )
    return table


def downstream(*arms: dict[str, Any], **changes: Any) -> Downstream:
    listed = [{"name": "real"}, *arms]
    primary = {"reference": "real", "arms": [listed[1]["name"]]}
    return Downstream.model_validate({"target": "diagnosis", "arms": listed, "primary": primary} | changes)


def samples(settings: Downstream, planned: pd.DataFrame | None = None) -> pd.DataFrame:
    real = real_samples(cohort(), settings, LEVELS, "seed")
    made = [
        synthetic_samples(plan() if planned is None else planned, settings, ["syn"], LEVELS, "seed", kind)
        for kind in ("filtered", "generated")
    ]
    copies = real[real["split"] == "train"].assign(kind="reconstruction")
    return pd.concat([real, *made, copies], ignore_index=True)


SETTINGS = downstream({"name": "other", "synthetic": 1})
TABLE = samples(SETTINGS)


def counts(table: pd.DataFrame, rows: np.ndarray) -> list[int]:
    return np.bincount(table["level"].to_numpy()[rows], minlength=2).tolist()


def test_samples_hold_no_closed_split_no_missing_label_and_no_other_group() -> None:
    assert set(TABLE["split"]) == {"train", "val"}
    assert "s1" not in set(TABLE["image_id"])
    used = plan().set_index("sample_id").loc[TABLE.loc[TABLE["kind"] == "filtered", "image_id"]]
    assert set(used["group"]) == {"syn"}


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.7])
def test_added_images_keep_the_class_shares(ratio: float) -> None:
    made = compose(Arm(name="a", synthetic=ratio), TABLE, 2)
    real = counts(TABLE, made.real)
    assert counts(TABLE, made.added) == [int(ratio * n + 0.5) for n in real]
    assert set(TABLE["kind"].iloc[made.added]) == {"filtered"}
    assert set(TABLE["split"].iloc[made.rows]) == {"train"}


def test_shares_and_ratios_are_nested() -> None:
    shares = [set(compose(Arm(name="a", real=share), TABLE, 2).real) for share in (0.1, 0.25, 0.5, 1.0)]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert [len(s) / len(shares[3]) for s in shares] == pytest.approx([0.1, 0.25, 0.5, 1.0], abs=0.08)
    ratios = [set(compose(Arm(name="a", synthetic=ratio), TABLE, 2).added) for ratio in (0.5, 1, 2)]
    assert ratios[0] < ratios[1] < ratios[2]
    fewer = TABLE.drop(index=compose(Arm(name="a"), TABLE, 2).real[::2]).reset_index(drop=True)
    whose = [set(table["image_id"].iloc[compose(Arm(name="a", real=0.25), table, 2).real]) for table in (TABLE, fewer)]
    assert whose[1] < whose[0]  # who leaves moves nobody else


def test_all_scans_of_a_subject_are_in_or_out() -> None:
    scans = cohort()
    again = pd.concat([scans, scans.assign(scan_id=scans["scan_id"] + "b")])
    table = real_samples(again, SETTINGS, LEVELS, "seed")
    chosen = table.iloc[compose(Arm(name="a", real=0.3), table, 2).real]
    assert (chosen.groupby("subject_id").size() == 2).all()


def test_sources_and_rare_only() -> None:
    whole = counts(TABLE, compose(Arm(name="a"), TABLE, 2).real)
    assert whole == [160, 40]
    rare = compose(Arm(name="a", synthetic=0.4, rare_only=True), TABLE, 2)
    assert counts(TABLE, rare.added) == [0, round(0.4 * (160 - 40))]
    alone = compose(Arm(name="a", real=0, synthetic=1), TABLE, 2)
    assert (len(alone.real), counts(TABLE, alone.added)) == (0, whole)
    unfiltered = compose(Arm(name="a", synthetic=1, source="generated"), TABLE, 2)
    assert set(TABLE["kind"].iloc[unfiltered.added]) == {"generated"}
    control = compose(Arm(name="a", real=0.5, synthetic=1, source="reconstruction"), TABLE, 2)
    assert set(TABLE["kind"].iloc[control.added]) == {"reconstruction"}
    assert sorted(TABLE["image_id"].iloc[control.added]) == sorted(TABLE["image_id"].iloc[control.real])


def test_the_kept_out_group_is_nowhere() -> None:
    settings = downstream({"name": "other", "synthetic": 1}, shift={"covariate": "site", "levels": ["north"]})
    table = samples(settings)
    north = set(cohort().loc[held_group(cohort(), settings), "scan_id"]) | set(
        plan().loc[held_group(plan(), settings), "sample_id"]
    )
    assert north
    assert not north & set(table["image_id"])


def test_weighting_and_oversampling_balance_the_classes() -> None:
    levels = np.repeat([0, 1], [90, 10])
    weights = class_weights(levels, 2)
    assert weights[levels].mean() == pytest.approx(1.0)
    assert weights[1] / weights[0] == pytest.approx(9.0)
    drawn = [
        draw_batch(Task("r", 0, Arm(name="a", balance="oversample"), levels, levels), "seed", step, 50, 2)
        for step in range(40)
    ]
    assert levels[np.concatenate(drawn)].mean() == pytest.approx(0.5, abs=0.05)
    plain = [draw_batch(Task("r", 0, Arm(name="a"), levels, levels), "seed", step, 50, 2) for step in range(40)]
    assert levels[np.concatenate(plain)].mean() == pytest.approx(0.1, abs=1e-9)  # whole epochs


def test_arms_that_train_alike_are_trained_once() -> None:
    trts = Arm(name="trts", test="synthetic")
    assert recipe(trts) == recipe(Arm(name="real"))
    assert len(recipes(downstream({"name": "other", "real": 0.5}, trts.model_dump()))) == 2


def test_too_few_planned_subjects_are_refused_with_a_number_that_is_enough() -> None:
    settings = downstream({"name": "ten", "synthetic": 10}, {"name": "one", "synthetic": 1})
    with pytest.raises(UserError, match=r"arm ten needs 400 filtered images with diagnosis = case") as caught:
        check(settings, LEVELS, TABLE, 500)
    advised = int(str(caught.value).split("Plan about ")[1].split()[0])
    assert "arm one" not in str(caught.value)
    assert check(settings, LEVELS, samples(settings, plan(advised)), advised)[1]["images"]["added"] == {
        "control": 1600,
        "case": 400,
    }


def test_what_cannot_be_learnt_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 training subjects of every level, found control 160, case 0"):
        check(SETTINGS, LEVELS, TABLE[(TABLE["level"] == 0) | (TABLE["split"] == "val")].reset_index(drop=True), 500)
    with pytest.raises(UserError, match="no training image of class"):
        check(downstream({"name": "tiny", "real": 0.001}), LEVELS, TABLE, 500)
    with pytest.raises(UserError, match="Plan subjects of every level"):
        check(SETTINGS, LEVELS, TABLE[(TABLE["kind"] == "real") | (TABLE["level"] == 0)].reset_index(drop=True), 500)
    several = downstream(
        {"name": "a", "synthetic": 1}, {"name": "b", "synthetic": 2}, primary={"reference": "real", "arms": ["a", "b"]}
    )
    with pytest.raises(UserError, match="val split, which is empty"):
        check(several, LEVELS, TABLE[TABLE["split"] == "train"].reset_index(drop=True), 500)
    with pytest.raises(UserError, match="not set"):
        levels_of(Downstream(), {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"target": "height"}, "downstream.target: height is no declared covariate"),
        ({"target": "age"}, "downstream.target: age is a number"),
        ({"target": "sex", "subgroup": "age"}, "downstream.subgroup: age is a number"),
        ({"target": "sex", "shift": {"covariate": "sex", "levels": ["F"]}}, "leaves nothing to learn"),
        ({"target": "sex", "shift": {"covariate": "site", "levels": ["A", "B"]}}, "some, not all"),
        ({"target": "sex", "groups": ["none"]}, "no group none"),
        ({"arms": [{"name": "real"}]}, "downstream.arms"),
        ({"arms": [{"name": "real"}, {"name": "real"}]}, "distinct"),
        ({"arms": [{"name": "real"}, {"name": "a"}]}, "primary names the arm real_synthetic"),
        ({"primary": {"arms": ["real"]}}, "with itself"),
        ({"primary": {"reference": "synthetic_only"}}, "must be an arm without"),
        ({"arms": [{"name": "a", "real": 0}]}, "nothing to learn from"),
        ({"arms": [{"name": "a", "rare_only": True}]}, "rare_only adds synthetic"),
        ({"arms": [{"name": "a", "synthetic": 2, "source": "reconstruction"}]}, "one reconstruction"),
        ({"arms": [{"name": "a", "synthetic": 2, "test": "synthetic"}]}, "must not learn from them"),
        ({"seeds": 1}, "downstream.seeds"),
        ({"margin": 0}, "downstream.margin"),
        ({"classifier": {"optimiser": {"steps": 1, "batch_size": 2, "learning_rate": 0.1}}}, "batch normalisation"),
        ({"classifier": {"channels": [8]}}, "downstream.classifier.channels"),
    ],
)
def test_a_bad_study_is_refused(change: dict[str, Any], expected: str) -> None:
    covariates = {
        "age": {"unit": "year", "range": [0, 100]},
        "sex": {"levels": ["F", "M"]},
        "site": {"levels": ["A", "B"]},
    }
    with pytest.raises(UserError) as caught:
        parse_study(
            {
                "study": "tiny",
                "cohort": {"source": "simulated"},
                "covariates": covariates,
                "plan": [{"name": "syn", "subjects": 10}],
                "downstream": change,
            },
            "study.yaml",
        )
    assert expected in str(caught.value)


def test_each_arm_is_compared_with_its_equal() -> None:
    settings = downstream(
        {"name": "one", "synthetic": 1},
        {"name": "raw", "synthetic": 1, "source": "generated"},
        {"name": "alone", "real": 0, "synthetic": 0.25},
        {"name": "quarter", "real": 0.25},
        {"name": "quarter_one", "real": 0.25, "synthetic": 1},
        {"name": "half_one", "real": 0.5, "synthetic": 1},
        {"name": "mixup", "mixup": 0.2},
        {"name": "trts", "test": "synthetic"},
    )
    assert contrasts_of(settings, "one") == [
        ("one", "real"),
        ("raw", "real"),
        ("alone", "quarter"),
        ("quarter", "real"),
        ("quarter_one", "quarter"),
        ("half_one", "real"),
        ("mixup", "real"),
        ("one", "raw"),
    ]
    entries = {arm.name: {"auc": {"value": 0.5}} for arm in settings.arms}
    shown = [
        (c["real"], c["source"], [(p["ratio"], p["arm"]) for p in c["points"]]) for c in ratio_curves(settings, entries)
    ]
    assert shown == [
        (1.0, "generated", [(0.0, "real"), (1.0, "raw")]),
        (1.0, "filtered", [(0.0, "real"), (1.0, "one")]),
        (0.5, "filtered", [(1.0, "half_one")]),
        (0.25, "filtered", [(0.0, "quarter"), (1.0, "quarter_one")]),
    ]


def test_the_ratio_is_chosen_on_validation() -> None:
    settings = downstream(
        {"name": "a", "synthetic": 1}, {"name": "b", "synthetic": 2}, primary={"reference": "real", "arms": ["a", "b"]}
    )
    table = pd.DataFrame({"arm": ["real", "a", "a", "b", "b"], "auc": [0.99, 0.6, 0.7, 0.9, 0.5]})
    assert choose(settings, table) == "b"
    with pytest.raises(UserError, match="both classes"):
        choose(settings, table.assign(auc=np.nan))


# ------------------------------------------------------------------------------------------ generator seeds


def test_each_generator_seed_trains_only_arms_that_it_draws_for() -> None:
    arms = [
        {"name": "other", "synthetic": 1},
        {"name": "control", "synthetic": 1, "source": "reconstruction"},
        {"name": "trts", "test": "synthetic"},
    ]
    once, thrice = recipes(downstream(*arms)), recipes(downstream(*arms, generator_seeds=3))
    assert [(arm.name, generator) for arm, generator in thrice.values()] == [
        ("real", 0),
        ("other", 0),
        ("other", 1),
        ("other", 2),
        ("control", 0),
    ]
    assert list(once) == [name for name, (_, generator) in thrice.items() if generator == 0]


def test_generator_seeds_differ_by_the_images_alone() -> None:
    settings = downstream({"name": "other", "real": 0.5, "synthetic": 0.7}, generator_seeds=2)
    table = pd.concat(
        [TABLE, synthetic_samples(plan(), settings, ["syn"], LEVELS, "seed", "filtered", 1)], ignore_index=True
    )
    first, second = (compose(settings.arms[1], table, 2, generator) for generator in (0, 1))
    assert first.real.tolist() == second.real.tolist()
    assert not set(first.added) & set(second.added)
    assert table["image_id"].iloc[first.added].tolist() == table["image_id"].iloc[second.added].tolist()
    assert set(table["generator"].iloc[second.added]) == {1}
    assert check(settings, LEVELS, table, 500)[1]["images"]["added"] == dict(
        zip(LEVELS, counts(table, second.added), strict=True)
    )
    with pytest.raises(UserError, match="there are 0"):
        check(settings, LEVELS, TABLE, 500)


def test_a_further_seed_draws_what_arms_need_and_a_reserve() -> None:
    settings = downstream(
        {"name": "other", "synthetic": 0.5}, {"name": "rare", "synthetic": 0.2, "rare_only": True}, generator_seeds=2
    )
    wanted = set(needed(settings, LEVELS, TABLE))
    added = [compose(arm, TABLE, 2).added for arm in settings.arms[1:]]
    taken = np.max([counts(TABLE, rows) for rows in added], axis=0)
    levels = plan().set_index("sample_id").loc[sorted(wanted), "diagnosis"].map(LEVELS.index)
    available = [int((TABLE.loc[TABLE["kind"] == "filtered", "level"] == level).sum()) for level in (0, 1)]
    assert np.bincount(levels).tolist() == [
        min(int(np.ceil(1.1 * n)), most) for n, most in zip(taken, available, strict=True)
    ]
    assert all(set(TABLE["image_id"].iloc[rows]) <= wanted for rows in added)
    assert needed(downstream({"name": "other", "real": 0.5}), LEVELS, TABLE) == []


def test_the_digest_of_a_design_with_one_generator_is_what_it_was() -> None:
    assert (
        design_digest(downstream({"name": "other", "synthetic": 1}), False)
        == "bb576998af459f36a83a1f1f287f60565ace26d115d551b7c6a855d8dd171b9b"
    )
    several = downstream({"name": "other", "synthetic": 1}, generator_seeds=2)
    assert design_digest(several, False) != design_digest(SETTINGS, False)


def test_the_digest_says_whether_classical_arms_mirror() -> None:
    classical = downstream({"name": "other", "classical": True})
    assert design_digest(classical, True) == "27db96042388561a49537a25f5c05197e676abc5a99440509a2466e727d3cd68", (
        "as before `variants.flip` was asked"
    )
    assert design_digest(classical, False) != design_digest(classical, True)
    assert design_digest(SETTINGS, False) == design_digest(SETTINGS, True)
