import numpy as np
import pandas as pd
import pytest

from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate
from meddiff_steps.privacy.assessment import covariate_drift
from meddiff_steps.privacy.table_attacks import infer_attribute, rare_values, singling_out, table_attacks

COVARIATES = {
    "age": ContinuousCovariate(unit="year", range=(0, 120)),
    "sex": CategoricalCovariate(levels=["F", "M"]),
    "brain_ml": ContinuousCovariate(unit="mL", range=(0, 5000)),
}


def people(count, seed):
    rng = np.random.default_rng(seed)
    sex = rng.choice(["F", "M"], count)
    age = rng.uniform(20, 80, count)
    return pd.DataFrame(
        {"age": age, "sex": sex, "brain_ml": 1500 - 5 * age + 150 * (sex == "M") + rng.normal(0, 80, count)}
    )


def test_a_table_of_strangers_gives_nobody_away():
    found = table_attacks(people(300, 0), people(300, 1), people(200, 2), COVARIATES, "seed")
    assert found["singling_out"]["low"] == 0
    assert found["singling_out"]["high"] < 0.35, "few predicates name one of 300"
    assert set(found["inference"]) == set(COVARIATES)
    for figure in found["inference"].values():
        assert figure["low"] == 0
        assert figure["n"] == 200
    # What the population tells is no leak: brain volume follows age and sex, so many guesses are right, for everybody.
    assert found["inference"]["brain_ml"]["control"] > 0.2


def test_a_table_that_repeats_the_training_subjects_gives_them_away():
    train = people(200, 1)
    found = table_attacks(train, train, people(200, 2), COVARIATES, "seed")
    assert found["singling_out"]["low"] > 0.3
    assert found["inference"]["brain_ml"]["attack"] == 1
    assert found["inference"]["brain_ml"]["low"] > 0.5


def test_predicates_single_out_one_subject_and_not_two():
    released = pd.DataFrame({"age": [30.0, 70.0], "sex": ["F", "M"], "brain_ml": [1300.0, 1500.0]})
    # Two training subjects answer to every predicate, so nobody is singled out; of the strangers one does.
    train = pd.concat([released, released])
    figure = singling_out(
        released,
        train,
        pd.concat([released, released.assign(age=50.0, sex="x", brain_ml=1400.0)]),
        COVARIATES,
        np.random.default_rng(0),
    )
    assert figure["attack"] == 0
    assert figure["control"] == 1
    assert figure["value"] == 0


def test_predicates_are_distinct_and_one_table_of_strangers_in_forty_seems_to_give_somebody_away():
    """Small tables, where most predicates speak of the same few people."""
    found = [
        singling_out(*(people(40, 3 * i + j) for j in range(3)), COVARIATES, np.random.default_rng(i))
        for i in range(60)
    ]
    assert max(figure["predicates"] for figure in found) <= 40, "one of each released subject"
    assert np.mean([figure["low"] > 0 for figure in found]) < 0.08


def test_where_labels_alone_are_released_nobody_can_be_singled_out():
    labels = {"sex": COVARIATES["sex"]}
    figure = singling_out(
        people(200, 0)[["sex"]], people(200, 1)[["sex"]], people(200, 2)[["sex"]], labels, np.random.default_rng(0)
    )
    assert (figure["value"], figure["low"], figure["predicates"], figure["n"]) == (0, 0, 0, 200)
    assert 0 < figure["high"] < 0.02


def test_numbers_that_few_training_subjects_have_are_counted_beside_chance():
    train, others = people(200, 1), people(200, 2)
    copied = rare_values(train.iloc[:50], train, others, COVARIATES)
    assert set(copied) == {"age", "brain_ml"} and copied["brain_ml"]["value"] > 0.9
    assert copied["brain_ml"]["chance"]["value"] < 0.1 and copied["brain_ml"]["n"] == 50
    common = train.assign(brain_ml=train["brain_ml"].round(-2))
    assert rare_values(common.iloc[:50], common, others, COVARIATES)["brain_ml"]["value"] < 0.2, "held by many"
    missing = train.assign(brain_ml=np.nan)
    assert rare_values(missing, train, others, COVARIATES)["brain_ml"]["value"] is None
    assert "rare_values" in table_attacks(people(50, 3), train, others, COVARIATES, "seed")


def test_missing_values_are_values_and_missing_secrets_no_targets():
    train, others = people(60, 1), people(60, 2)
    train.loc[:9, "brain_ml"] = np.nan
    train.loc[10:19, "sex"] = None
    released = train.copy()
    assert infer_attribute(released, train, others, COVARIATES, "brain_ml")["n"] == 50
    assert infer_attribute(released, train, others, COVARIATES, "sex")["n"] == 50
    assert infer_attribute(released, train, others, COVARIATES, "age")["attack"] > 0.8
    assert singling_out(released, train, others, COVARIATES, np.random.default_rng(0))["attack"] > 0.9


def test_nobody_to_attack():
    empty = people(0, 0)
    assert table_attacks(people(5, 0), people(5, 0), empty, COVARIATES, "seed") == {}
    assert table_attacks(empty, people(5, 0), people(5, 1), COVARIATES, "seed") == {}
    secretless = people(5, 0).assign(age=np.nan)
    assert infer_attribute(secretless, people(5, 0), people(5, 1), COVARIATES, "age")["value"] is None


def test_drift_is_in_deviations_and_shares():
    planned = people(400, 0)
    released = planned[planned["sex"] == "F"]
    drift = covariate_drift(planned, released, COVARIATES)
    assert drift["sex"] == pytest.approx((planned["sex"] == "M").mean(), abs=1e-4)
    assert drift["brain_ml"] < -0.2
    assert covariate_drift(planned, planned, COVARIATES) == {"age": 0.0, "sex": 0.0, "brain_ml": 0.0}
