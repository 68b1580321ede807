"""ComBat: a known effect of a site goes, a known effect of a covariate stays."""

from __future__ import annotations

import numpy as np
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.statistics.combat import Combat

FEATURES = 40


@pytest.fixture(scope="module")
def world() -> dict[str, np.ndarray]:
    """Features that rise with age; site 1 shifts and stretches each by amounts that features have in common."""
    rng = np.random.default_rng(0)
    sites = np.repeat([0, 1], [300, 200])
    age = rng.normal(0, 1, len(sites)) + 0.8 * sites  # the other site's people are older
    slopes, noise = rng.normal(1, 0.3, FEATURES), rng.standard_normal((len(sites), FEATURES))
    shift, stretch = rng.normal(2, 0.4, FEATURES), rng.uniform(1.2, 1.8, FEATURES)
    clean = age[:, None] * slopes + noise
    seen = age[:, None] * slopes + np.where(sites[:, None] == 1, shift + stretch * noise, noise)
    return {"sites": sites, "age": age[:, None], "clean": clean, "seen": seen, "slopes": slopes}


def test_the_site_goes_and_the_covariate_stays(world: dict[str, np.ndarray]) -> None:
    combat = Combat.of(world["seen"], world["sites"], world["age"], reference=0)
    after = combat(world["seen"], world["sites"], world["age"])
    assert np.abs(after - world["clean"]).mean() < 0.15 < 0.6 < np.abs(world["seen"] - world["clean"]).mean()
    assert np.array_equal(after[world["sites"] == 0].round(8), world["seen"][world["sites"] == 0].round(8))
    residual = after - world["age"] * world["slopes"]
    for site in (0, 1):
        inside = world["sites"] == site
        assert abs(residual[inside].mean()) < 0.05
        assert residual[inside].std() == pytest.approx(1, abs=0.05)
        found = np.polyfit(world["age"][inside, 0], after[inside], 1)[0]
        np.testing.assert_allclose(found, world["slopes"], atol=0.3)


def test_without_the_covariate_its_effect_would_go_as_the_sites(world: dict[str, np.ndarray]) -> None:
    nothing = np.zeros((len(world["sites"]), 0))
    after = Combat.of(world["seen"], world["sites"], nothing, 0)(world["seen"], world["sites"], nothing)
    gaps = [after[world["sites"] == site].mean() for site in (0, 1)]
    assert abs(gaps[0] - gaps[1]) < 0.05  # people of site 1 are older, and no longer look it


def test_few_rows_are_drawn_to_what_features_have_in_common() -> None:
    rng = np.random.default_rng(1)
    sites = np.repeat([0, 1], [200, 4])
    features = rng.standard_normal((204, FEATURES)) + 3.0 * sites[:, None]
    combat = Combat.of(features, sites, np.zeros((204, 0)), reference=0)
    plain = features[sites == 1].mean(0) - features[sites == 0].mean(0)
    assert np.abs(combat.location[1] - 3).mean() < 0.75 * np.abs(plain - 3).mean()


def test_a_site_of_one_row_is_refused() -> None:
    with pytest.raises(UserError, match="site 1 has 1 rows, expected 2 or more"):
        Combat.of(np.zeros((3, 2)), np.array([0, 0, 1]), np.zeros((3, 0)), 0)
