"""Deformations whose result is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meddiff_steps.imaging import deformation

SHAPE = (12, 14, 16)


def ramp() -> np.ndarray:
    return np.arange(SHAPE[0], dtype=np.float32)[:, None, None] + np.zeros(SHAPE, np.float32)


def shift(*by: float) -> np.ndarray:
    return np.stack([np.full(SHAPE, one, np.float32) for one in by])


def test_the_moved_image_has_at_x_what_the_image_has_at_x_plus_u() -> None:
    image = torch.from_numpy(np.random.default_rng(0).random(SHAPE, dtype=np.float32))[None, None]
    found = deformation.moved(image, torch.from_numpy(shift(2, 0, -1))[None])
    torch.testing.assert_close(found[..., :-2, :, 1:], image[..., 2:, :, :-1])
    halfway = deformation.moved(torch.from_numpy(ramp())[None, None], torch.from_numpy(shift(0.5, 0, 0))[None])
    np.testing.assert_allclose(halfway[0, 0, :-1].numpy(), ramp()[:-1] + 0.5, atol=1e-5)


def test_labels_are_copied_and_are_0_beyond() -> None:
    labels = np.random.default_rng(0).choice([0, 7, 300, 70001], SHAPE).astype(np.int32)
    found = deformation.moved_labels(labels, shift(0, 3.2, 0))
    np.testing.assert_array_equal(found[:, :-3], labels[:, 3:])
    assert not found[:, -3:].any() and found.dtype == labels.dtype


def test_a_constant_velocity_is_followed_and_undone() -> None:
    velocity = torch.from_numpy(shift(1.5, 0, -0.5))[None]
    torch.testing.assert_close(deformation.exponential(velocity), velocity, atol=1e-5, rtol=0)
    drawn = deformation.smooth_velocity(SHAPE, 2.0, 3.0, np.random.default_rng(1))
    assert np.linalg.norm(drawn, axis=0).max() == pytest.approx(2.0)
    there, back = (deformation.exponential(torch.from_numpy(sign * drawn)[None]) for sign in (1, -1))
    # u(x) + w(x + u(x)) = 0, where x + u(x) lies inside
    left = there + deformation.moved(back, there)
    assert left[..., 3:-3, 3:-3, 3:-3].abs().max() < 0.1 < there[..., 3:-3, 3:-3, 3:-3].abs().max()


def test_a_finer_displacement_leads_to_the_same_place() -> None:
    coarse = torch.from_numpy(shift(1, -2, 3))[None]
    torch.testing.assert_close(
        deformation.finer(coarse, [2 * n for n in SHAPE])[0, :, 5, 5, 5], 2 * coarse[0, :, 2, 2, 2]
    )


def test_determinants_are_those_of_the_map() -> None:
    scaled = np.stack([0.5 * ramp(), np.zeros(SHAPE), np.zeros(SHAPE)])
    np.testing.assert_allclose(deformation.jacobian_determinants(scaled), 1.5, atol=1e-6)
    region = np.ones(SHAPE, bool)
    assert deformation.folds_and_spread(scaled, region) == pytest.approx((0.0, 0.0), abs=1e-6)
    folded = scaled.copy()
    folded[0, 6:] *= -4.0  # x - 2 x there: turned over
    share, spread = deformation.folds_and_spread(folded, region)
    turned = deformation.jacobian_determinants(folded) <= 0
    assert share == pytest.approx(turned.mean()) and 0.4 < share < 0.7 and spread > 1
