"""Holes filled without a model, held to functions that solve the equations."""

from __future__ import annotations

import numpy as np
import pytest

from meddiff_steps.imaging import filling
from meddiff_steps.imaging.filling import biharmonic, harmonic, mean, mirror, pasted, seam


def grid(*shape: int) -> list[np.ndarray]:
    return list(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"))


def hole(*shape: int) -> np.ndarray:
    hidden = np.zeros(shape, bool)
    hidden[tuple(slice(n // 2 - 2, n // 2 + 2) for n in shape)] = True
    return hidden


def test_a_membrane_goes_on_as_harmonic_functions_do() -> None:
    x, y, z = grid(12, 14, 10)
    hidden = hole(12, 14, 10)
    truth = 2 * x - y + 0.5 * z + x * y  # its discrete Laplacian is 0, too
    np.testing.assert_allclose(harmonic(np.where(hidden, 99.0, truth), hidden), truth, atol=1e-9)


def test_a_plate_goes_on_as_biharmonic_functions_do() -> None:
    x, y = grid(16, 18)
    hidden = hole(16, 18)
    truth = x**3 + 2 * x * y - y**2 + x
    np.testing.assert_allclose(biharmonic(np.where(hidden, -99.0, truth), hidden), truth, atol=1e-8)
    # A membrane bends no further than its rim.
    assert np.abs(harmonic(np.where(hidden, 0, truth), hidden) - truth).max() > 1e-3


def test_a_large_hole_is_filled_by_iteration_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, hidden = np.random.default_rng(0).random((10, 12, 10)), hole(10, 12, 10)
    direct = harmonic(image, hidden)
    monkeypatch.setattr(filling, "DIRECT", 1)
    np.testing.assert_allclose(harmonic(image, hidden), direct, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axis", "shift"), [((10, 6, 6), 0, 0), ((10, 6, 6), 0, 3), ((8, 10), 1, 0), ((8, 10), 1, -3)]
)
def test_the_other_side_is_copied(shape: tuple[int, ...], axis: int, shift: int) -> None:
    """Of volumes along the first axis, of pictures along the last, wherever the head lies in the grid."""
    half = np.random.default_rng(0).uniform(0.1, 1.0, [n // 2 if a == axis else n for a, n in enumerate(shape)])
    head = np.concatenate([half, np.flip(half, axis)], axis)
    room = [(4, 4) if a == axis else (0, 0) for a in range(len(shape))]
    truth = np.roll(np.pad(head, room), shift, axis)
    hidden = np.zeros(truth.shape, bool)
    hidden[tuple(slice(4 + shift + 2, 4 + shift + 4) if a == axis else slice(2, 4) for a in range(len(shape)))] = True
    np.testing.assert_array_equal(mirror(np.where(hidden, 0, truth), hidden), truth)
    hidden |= np.roll(np.flip(hidden, axis), 2 * shift, axis)
    filled = mirror(np.where(hidden, 0, truth), hidden)
    np.testing.assert_array_equal(filled[~hidden], truth[~hidden])
    np.testing.assert_allclose(filled, harmonic(truth, hidden))


@pytest.mark.parametrize("place", [(30, 44), (25, 40), (36, 48), (32, 36)])
def test_a_hole_does_not_move_the_mirror(place: tuple[int, int]) -> None:
    """A large one in a head of two alike sides, which the other side fills exactly."""
    y, x = np.mgrid[:64, :64]
    head = ((y - 31.5) / 28) ** 2 + ((x - 31.5) / 22) ** 2 < 1
    half = np.random.default_rng(0).uniform(0.3, 0.8, (64, 32))
    truth = np.concatenate([half, half[:, ::-1]], 1) * head
    hidden = ((y - place[0]) ** 2 + (x - place[1]) ** 2 < 10**2) & head
    filled, alone = mirror(np.where(hidden, 0.9, truth), hidden), hidden & ~hidden[:, ::-1]
    assert alone.any()
    np.testing.assert_array_equal(filled[alone], truth[alone])


def test_what_is_mirrored_from_beyond_the_grid_is_not_known() -> None:
    truth, hidden = np.zeros((6, 10)), np.zeros((6, 10), bool)
    truth[:, 6:], hidden[2:4, 1:3] = 0.5, True  # mirrored about column 7.5, the hole lies beyond the last column
    np.testing.assert_allclose(mirror(truth, hidden), harmonic(truth, hidden))


def test_the_mean_is_of_the_head() -> None:
    image = np.zeros((4, 4))
    image[1:3, 1:3] = [[0.2, 0.4], [0.6, 0.8]]
    hidden = image == 0.8
    assert mean(image, hidden)[2, 2] == pytest.approx(0.4)


def test_a_step_at_the_rim_is_taken_off() -> None:
    """What was decoded a little too bright fits after pasting; copied it does not."""
    x, y = grid(14, 14)
    truth, hidden = 0.5 + 0.2 * np.sin(3 * x) * np.cos(2 * y), hole(14, 14)
    made = truth + 0.1 + 0.05 * x
    np.testing.assert_allclose(pasted(truth, made, hidden), truth, atol=1e-9)
    copied = pasted(truth, made, hidden, seamless=False)
    np.testing.assert_array_equal(copied[hidden], made[hidden])
    np.testing.assert_array_equal(copied[~hidden], truth[~hidden])
    assert seam(truth, truth, hidden) == 0
    assert seam(copied, truth, hidden) == pytest.approx(0.1, rel=0.1)
