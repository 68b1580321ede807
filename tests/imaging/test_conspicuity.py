"""Heads in images, and maps without a model."""

from __future__ import annotations

import numpy as np
import pytest

from meddiff_steps.imaging.conspicuity import (
    BASELINES,
    asymmetry,
    grey_scale,
    head_of,
    intensity,
    interior,
    sided,
    z_score,
)
from meddiff_steps.imaging.places import ball


def picture(shape: tuple[int, ...] = (40, 48)) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric head with texture and a dark hole in it, and a speck beside it; and which voxels the head has."""
    rng = np.random.default_rng(0)
    centre = tuple((n - 1) / 2 for n in shape)
    head = ball(shape, centre, tuple(0.35 * n for n in shape))
    axis = 0 if len(shape) == 3 else len(shape) - 1
    noise = rng.standard_normal(shape)
    noise = (noise + np.flip(noise, axis)) / 2
    image = np.where(head, 0.5 + 0.04 * noise, 0.02)
    image[ball(shape, centre, tuple(0.06 * n for n in shape))] = 0.0
    image[(0,) * len(shape)] = 0.9
    return image.astype(np.float32), head


@pytest.mark.parametrize("shape", [(40, 48), (24, 20, 22)])
def test_a_head_is_what_is_connected_with_what_it_encloses(shape: tuple[int, ...]) -> None:
    image, head = picture(shape)
    np.testing.assert_array_equal(head_of(image), head)
    inner = interior(head, 2)
    assert inner.any() and (inner <= head).all() and inner.sum() < head.sum()
    np.testing.assert_array_equal(interior(head, 0), head)
    np.testing.assert_array_equal(interior(head, 99), head)
    assert head_of(np.zeros(shape, np.float32)).all(), "an empty picture is head all over"


@pytest.mark.parametrize("shape", [(40, 48), (24, 20, 22)])
@pytest.mark.parametrize("name", ["z_score", "asymmetry"])
def test_a_bright_lesion_stands_out_and_the_grey_scale_does_not_matter(shape: tuple[int, ...], name: str) -> None:
    image, head = picture(shape)
    place = ball(shape, tuple(0.35 * n for n in shape), (2.2,) * len(shape))
    lit = np.where(place, image + 0.3, image)
    found = BASELINES[name](lit, head, "bright")
    assert found[place].min() > 2.5 and found[place].mean() > 3 * found[head & ~place].std()
    np.testing.assert_allclose(BASELINES[name](0.2 + 0.5 * lit, head, "bright"), found, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(BASELINES[name](lit, head, "dark"), -found, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(BASELINES[name](lit, head, "any"), np.abs(found), rtol=1e-6)


def test_a_symmetric_head_has_no_asymmetry_wherever_it_lies() -> None:
    image, head = picture()
    assert np.abs(asymmetry(image, head, "bright")[head]).max() < 1e-4
    moved, place = np.roll(image, 4, 1), np.roll(head, 4, 1)
    assert np.abs(asymmetry(moved, place, "bright")[place]).max() < 1e-4


def test_units_are_those_of_a_normal_distribution() -> None:
    values = (0.5 + 0.1 * np.random.default_rng(0).standard_normal((100, 100))).astype(np.float32)
    everywhere = np.ones(values.shape, bool)
    middle, spread = grey_scale(values, everywhere)
    assert middle == pytest.approx(0.5, abs=0.005) and spread == pytest.approx(0.1, rel=0.03)
    assert z_score(values, everywhere, "bright").std() == pytest.approx(1.0, rel=0.03)
    assert grey_scale(np.full((4, 4), 0.3, np.float32), np.ones((4, 4), bool))[1] > 0, "a flat head divides by nothing"


def test_grey_values_as_they_are() -> None:
    image, head = picture()
    np.testing.assert_array_equal(intensity(image, head, "bright"), image)
    np.testing.assert_array_equal(intensity(image, head, "dark"), 1 - image)
    np.testing.assert_array_equal(sided(np.array([-2.0, 1.0]), "any"), [2.0, 1.0])
