"""The copula against distributions whose correlations and margins are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from pydantic import TypeAdapter
from scipy.special import ndtr

from meddiff_steps.config import Covariates
from meddiff_steps.core.errors import UserError
from meddiff_steps.synthesis.copula import GaussianCopula

SCHEMA: Covariates = TypeAdapter(Covariates).validate_python(
    {
        "age": {"unit": "year", "range": [18, 100]},
        "ventricles": {"unit": "mL", "range": [0, 200]},
        "sex": {"levels": ["F", "M"]},
        "stage": {"levels": ["none", "mild", "severe"]},
    }
)
#: Latent correlations in alphabetical order: age, sex, stage, ventricles.  ORDERED: those without three levels.
TRUTH = np.array([[1.0, 0.1, 0.5, 0.7], [0.1, 1.0, -0.2, 0.3], [0.5, -0.2, 1.0, 0.4], [0.7, 0.3, 0.4, 1.0]])
ORDERED = np.ix_([0, 1, 3], [0, 1, 3])


def population(n: int, seed: int = 0) -> pd.DataFrame:
    z = np.random.default_rng(seed).standard_normal((n, 4)) @ np.linalg.cholesky(TRUTH).T
    return pd.DataFrame(
        {
            "age": 44 + 38 * ndtr(z[:, 0]),
            "ventricles": 10 + 15 * np.exp(0.5 * z[:, 3]),
            "sex": np.where(z[:, 1] < 0.1, "F", "M"),
            "stage": np.array(["none", "mild", "severe"], dtype=object)[np.searchsorted([0.8, 1.5], z[:, 2])],
        }
    )


def draw(copula: GaussianCopula, n: int, seed: int = 1, **given: float) -> pd.DataFrame:
    return copula.sample(np.random.default_rng(seed).standard_normal((n, len(copula.names))), given)


def test_latent_correlations_are_recovered_through_levels_too():
    copula = GaussianCopula.fit(population(20_000), SCHEMA)
    assert copula.names == ("age", "sex", "stage", "ventricles")
    np.testing.assert_allclose(copula.correlation, TRUTH[ORDERED], atol=0.03)


def test_samples_have_the_margins_and_relations_of_the_training_rows():
    training = population(3000)
    drawn = draw(GaussianCopula.fit(training, SCHEMA), 20_000)
    for name in ("age", "ventricles"):
        np.testing.assert_allclose(
            drawn[name].quantile([0.02, 0.25, 0.5, 0.75, 0.98]),
            training[name].quantile([0.02, 0.25, 0.5, 0.75, 0.98]),
            rtol=0.04,
        )
    for name in ("sex", "stage"):
        shares = training[name].value_counts(normalize=True)
        np.testing.assert_allclose(drawn[name].value_counts(normalize=True)[shares.index], shares, atol=0.012)
    assert drawn["age"].corr(drawn["ventricles"], method="spearman") == pytest.approx(
        training["age"].corr(training["ventricles"], method="spearman"), abs=0.03
    )
    assert drawn.groupby("stage")["age"].mean().to_dict() == pytest.approx(
        training.groupby("stage")["age"].mean().to_dict(), abs=1.0
    )


def test_missing_values_neither_bias_the_fit_nor_come_out():
    training = population(6000)
    complete = GaussianCopula.fit(training, SCHEMA)
    holes = np.random.default_rng(3).random((6000, 4)) < 0.3
    training.loc[holes[:, 0], "age"] = np.nan
    training.loc[holes[:, 1], "sex"] = None
    training.loc[holes[:, 2], "stage"] = None
    copula = GaussianCopula.fit(training, SCHEMA)
    np.testing.assert_allclose(copula.correlation, complete.correlation, atol=0.06)
    assert not draw(copula, 2000).isna().any().any()


def test_no_training_row_comes_back():
    training = population(400)
    drawn = draw(GaussianCopula.fit(training, SCHEMA), 5000)
    assert drawn.merge(training, on=["age", "ventricles"]).empty
    assert not set(drawn["ventricles"]) & set(training["ventricles"].round(6))


def test_values_stay_within_the_declared_range_and_have_sensible_digits():
    training = population(200)
    training["age"] = training["age"].clip(50, 60)
    tight = dict(SCHEMA)
    tight["age"] = SCHEMA["age"].model_copy(update={"range": (52.0, 58.0)})
    drawn = draw(GaussianCopula.fit(training, tight), 2000)
    assert drawn["age"].between(52, 58).all()
    np.testing.assert_array_equal(drawn["ventricles"], drawn["ventricles"].round(3))


def test_a_given_value_is_kept_and_moves_what_hangs_on_it():
    copula = GaussianCopula.fit(population(20_000), SCHEMA)
    young, old = (draw(copula, 4000, age=age) for age in (50.0, 78.0))
    assert (young["age"] == 50).all() and (old["age"] == 78).all()
    # The conditional mean of a latent is rho times the score of what is given.
    for drawn, age in ((young, 50.0), (old, 78.0)):
        z = np.log((drawn["ventricles"] - 10) / 15) / 0.5
        score = copula.margins[0].score(age)  # type: ignore[union-attr]
        assert z.mean() == pytest.approx(0.7 * score, abs=0.08)
        assert z.std() == pytest.approx((1 - 0.7**2) ** 0.5, abs=0.04)
    assert (young["stage"] == "severe").mean() < (old["stage"] == "severe").mean()


def test_a_row_depends_on_its_own_normals_only_to_the_last_bit():
    copula = GaussianCopula.fit(population(300), SCHEMA)
    normals = np.random.default_rng(5).standard_normal((257, 4))
    whole = copula.sample(normals, {"age": 60.0})
    for rows in (slice(0, 1), slice(3, 10), slice(200, 257)):
        pd.testing.assert_frame_equal(
            copula.sample(normals[rows], {"age": 60.0}), whole[rows].reset_index(drop=True), check_exact=True
        )


def test_the_order_of_the_schema_does_not_matter():
    training = population(300)
    backwards = dict(reversed(SCHEMA.items()))
    pd.testing.assert_frame_equal(
        draw(GaussianCopula.fit(training, SCHEMA), 50),
        draw(GaussianCopula.fit(training, backwards), 50),
        check_exact=True,
    )


def test_correlations_that_do_not_fit_together_are_repaired():
    """Each pair is seen in other rows, and the three correlations contradict each other."""
    rng = np.random.default_rng(0)
    schema = TypeAdapter(Covariates).validate_python({n: {"unit": "", "range": [-10, 10]} for n in "abc"})
    x = rng.standard_normal(300)
    parts = [pd.DataFrame({"a": x, "b": x}), pd.DataFrame({"b": x, "c": x}), pd.DataFrame({"a": x, "c": -x})]
    copula = GaussianCopula.fit(pd.concat(parts, ignore_index=True), schema)
    assert np.linalg.eigvalsh(copula.correlation)[0] > 0
    np.testing.assert_allclose(np.diag(copula.correlation), 1.0)
    assert np.isfinite(draw(copula, 100)).all().all()


def diagnosed(n: int, seed: int = 0) -> pd.DataFrame:
    """Hippocampi of three diagnoses whose names are not in the order of their volumes."""
    rng = np.random.default_rng(seed)
    dx = rng.choice(["AD", "CN", "MCI"], n, p=[0.2, 0.5, 0.3])
    volume = pd.Series(dx).map({"AD": 5.38, "CN": 7.25, "MCI": 6.26}) + 0.6 * rng.standard_normal(n)
    return pd.DataFrame({"dx": dx.astype(object), "hippocampi": volume, "age": 95 - 3 * volume + rng.normal(0, 6, n)})


def schema_of(levels: dict[str, list[str]], *numbers: str) -> Covariates:
    described = {name: {"levels": names} for name, names in levels.items()}
    return TypeAdapter(Covariates).validate_python(
        described | {name: {"unit": "", "range": [0, 120]} for name in numbers}
    )


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_the_order_of_levels_and_rows_says_nothing(missing):
    training = diagnosed(800)
    means, shares = training.groupby("dx")["hippocampi"].mean(), training["dx"].value_counts(normalize=True)
    training = training.mask(np.random.default_rng(1).random(training.shape) < missing, np.nan)
    training["dx"] = training["dx"].astype(object).where(training["dx"].notna(), None)
    one, other = (
        draw(GaussianCopula.fit(rows, schema_of({"dx": order}, "hippocampi", "age")), 20_000)
        for order, rows in ((["AD", "CN", "MCI"], training), (["MCI", "AD", "CN"], training[::-1]))
    )
    pd.testing.assert_frame_equal(one, other, rtol=1e-9)
    assert one.groupby("dx")["hippocampi"].mean().to_dict() == pytest.approx(means.to_dict(), abs=0.1)
    assert one["dx"].value_counts(normalize=True).to_dict() == pytest.approx(shares.to_dict(), abs=0.03)


def test_what_distinguishes_levels_need_not_lie_on_one_line():
    """Sites whose people differ in age, in sex and in the scanner that they have, and a site of hardly anybody."""
    rng = np.random.default_rng(0)
    site = rng.choice(["A", "B", "C", "D"], 900, p=[0.33, 0.33, 0.33, 0.01])
    training = pd.DataFrame(
        {
            "site": site.astype(object),
            "age": np.where(site == "B", 75, 35) + 5 * rng.standard_normal(900),
            "sex": np.where(rng.random(900) < np.where(site == "A", 0.2, np.where(site == "C", 0.8, 0.5)), "F", "M"),
            "scanner": np.where(site == "C", "x", np.where(rng.random(900) < 0.5, "y", "z")),
        }
    )
    levels = {"site": ["A", "B", "C", "D"], "sex": ["F", "M"], "scanner": ["x", "y", "z"]}
    drawn = draw(GaussianCopula.fit(training, schema_of(levels, "age")), 20_000)
    wanted, found = (
        frame.assign(female=frame["sex"] == "F", x=frame["scanner"] == "x")
        .groupby("site")[["age", "female", "x"]]
        .mean()
        for frame in (training, drawn)
    )
    assert found["age"].to_dict() == pytest.approx(wanted["age"].to_dict(), abs=4)
    np.testing.assert_allclose(found[["female", "x"]][:3], wanted[["female", "x"]][:3], atol=0.06)
    shares = (frame["site"].value_counts(normalize=True).sort_index() for frame in (drawn, training))
    np.testing.assert_allclose(*shares, atol=0.01)


def test_levels_are_drawn_from_their_shares_where_there_is_nothing_else():
    training = diagnosed(300)[["dx"]]
    drawn = draw(GaussianCopula.fit(training, schema_of({"dx": ["AD", "CN", "MCI"]})), 20_000)
    shares = training["dx"].value_counts(normalize=True)
    assert drawn["dx"].value_counts(normalize=True).to_dict() == pytest.approx(shares.to_dict(), abs=0.01)


@pytest.mark.parametrize(
    ("coarse", "other"),
    [
        (lambda z: np.floor(np.exp(1.2 * z)), lambda z: 60 + 10 * z),
        (lambda z: np.where(z < 0.8, 1.5, 3.0), lambda z: 60 + 10 * z),
        (lambda z: np.where(z < 0.8, 1.5, 3.0), lambda z: np.where(z < -0.5, 1.0, np.where(z < 1, 2.0, 3.0))),
    ],
    ids=["count", "setting", "two settings"],
)
def test_numbers_that_many_share_are_related_as_strongly_as_in_training(coarse, other):
    z = np.random.default_rng(0).standard_normal((10_000, 2)) @ np.linalg.cholesky([[1, 0.6], [0.6, 1]]).T
    training = pd.DataFrame({"a": coarse(z[:, 0]), "b": other(z[:, 1])})
    copula = GaussianCopula.fit(training, schema_of({}, "a", "b"))
    assert copula.correlation[0, 1] == pytest.approx(0.6, abs=0.02)
    assert draw(copula, 20_000).corr("spearman").iloc[0, 1] == pytest.approx(
        training.corr("spearman").iloc[0, 1], abs=0.02
    )


def test_what_is_given_stands_for_all_who_have_it():
    """A tenth of people have a 1, the others a 0: given a 0, the latent is on average that of nine tenths."""
    copula = GaussianCopula.fit(pd.DataFrame({"a": [0.0] * 90 + [1.0] * 10}), schema_of({}, "a"))
    assert copula.margins[0].score(0.0) == pytest.approx(-0.195, abs=0.005)  # type: ignore[union-attr]


def test_few_rows_are_trusted_less():
    schema = {"age": SCHEMA["age"], "ventricles": SCHEMA["ventricles"]}
    strong = [abs(GaussianCopula.fit(population(12, seed), schema).correlation[0, 1]) for seed in range(20)]
    raw = [abs(population(12, seed)[["age", "ventricles"]].corr(method="spearman").iloc[0, 1]) for seed in range(20)]
    assert np.mean(strong) < np.mean(raw)


def test_pairs_that_are_never_seen_together_are_planned_as_unrelated(caplog):
    training = population(100)
    training.loc[:49, "age"] = np.nan
    training.loc[50:, "ventricles"] = np.nan
    copula = GaussianCopula.fit(training, SCHEMA)
    assert copula.correlation[0, 2] == pytest.approx(0.0, abs=1e-12) and "planned as if unrelated" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:9], "covariates.age: 9 of 9 training subjects have a value; a copula needs at least 10."),
        (lambda t: t.assign(ventricles=np.nan), "covariates.ventricles: 0 of 50 training subjects have a value"),
        (
            lambda t: t.assign(age=61.0),
            "covariates.age: all 50 training values are 61.0, so there is no distribution to learn. Remove `age`",
        ),
        (lambda t: t.assign(sex="F"), "covariates.sex: all 50 training values are F,"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_a_remedy(change, message):
    with pytest.raises(UserError) as error:
        GaussianCopula.fit(change(population(50)), SCHEMA)
    assert str(error.value).startswith(message)


def test_normals_of_the_wrong_width_are_refused():
    with pytest.raises(ValueError, match=r"must be \(n, 4\)"):
        GaussianCopula.fit(population(50), SCHEMA).sample(np.zeros((3, 2)))
