"""What is normal at each voxel, in worlds where it is known."""

import numpy as np
import pytest
from scipy import stats

from meddiff_steps.core.errors import UserError
from meddiff_steps.statistics.norms import LARGEST_Z, LEAST_STD, NormSums

RNG = np.random.default_rng(3)


def fitted(design: np.ndarray, values: np.ndarray):
    sums = NormSums(design.shape[1], values.shape[1])
    for one, value in zip(design, values, strict=True):
        sums.add(one, value)
    return sums.norm("subjects")


def test_healthy_newcomers_deviate_as_often_as_they_should_however_few_the_reference() -> None:
    """6 subjects of reference: z by a normal distribution with their own deviation would be beyond 1.96 in 13 %."""
    count, voxels = 6, 40_000
    norm = fitted(np.ones((count, 1)), 0.5 + 0.1 * RNG.standard_normal((count, voxels)))
    z = np.stack([norm.z(np.ones(1), 0.5 + 0.1 * RNG.standard_normal(voxels)) for _ in range(5)])
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.05, abs=0.002)
    assert (z.mean(), z.std()) == pytest.approx((0, 1), abs=0.02)


def test_covariates_are_taken_off_as_statsmodels_would() -> None:
    age = RNG.standard_normal(30)
    design = np.stack([np.ones(30), age], axis=1)
    values = np.stack([0.3 + 0.05 * age + 0.02 * RNG.standard_normal(30)], axis=1)
    found = fitted(design, values).z(np.array([1.0, 2.0]), np.array([0.5]))
    line = stats.linregress(age, values[:, 0])
    residual = values[:, 0] - line.intercept - line.slope * age
    spread = np.sqrt((residual**2).sum() / 28 * (1 + 1 / 30 + (2 - age.mean()) ** 2 / ((age - age.mean()) ** 2).sum()))
    t = (0.5 - line.intercept - 2 * line.slope) / spread
    assert found[0] == pytest.approx(stats.norm.ppf(stats.t.cdf(t, 28)), rel=1e-5)


def test_where_nobody_differs_a_grey_level_counts_and_no_z_is_infinite() -> None:
    norm = fitted(np.ones((40, 1)), np.zeros((40, 2)))
    assert norm.std.tolist() == [LEAST_STD] * 2
    z = norm.z(np.ones(1), np.array([0.0, 1.0]))
    assert z[0] == 0 and 10 < z[1] <= LARGEST_Z


def test_a_column_that_says_nothing_new_changes_nothing() -> None:
    age = RNG.standard_normal(20)
    values = (age * 0.1 + 0.01 * RNG.standard_normal(20))[:, None]
    once, twice = np.stack([np.ones(20), age], 1), np.stack([np.ones(20), age, 2 * age, np.zeros(20)], 1)
    newcomer = np.array([0.2])
    assert fitted(once, values).z(once[0], newcomer) == pytest.approx(
        fitted(twice, values).z(twice[0], newcomer), rel=1e-5
    )


def test_too_few_are_refused() -> None:
    with pytest.raises(UserError, match="subjects: 2 of them, expected at least 3"):
        fitted(np.ones((2, 1)), np.zeros((2, 4)))
