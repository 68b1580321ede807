"""Simplex noise: its size, its smoothness, and how its power is spread over frequencies."""

from __future__ import annotations

import numpy as np
import pytest

from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.simplex import simplex, simplex_noise


def spectrum(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequency (cycles per cell) and power of every wave of a square field."""
    frequencies = np.fft.fftfreq(field.shape[0])
    radius = np.sqrt(sum(f**2 for f in np.meshgrid(*[frequencies] * field.ndim, indexing="ij")))
    window = np.hanning(field.shape[0])
    for axis in range(field.ndim):  # else the jump between opposite edges has power of its own
        field = np.moveaxis(np.moveaxis(field - field.mean(), axis, -1) * window, -1, axis)
    return radius, np.abs(np.fft.fftn(field)) ** 2


@pytest.mark.parametrize("shape", [(64, 48), (20, 24, 16)])
def test_its_mean_square_is_one_and_it_is_that_of_its_key(shape: tuple[int, ...]) -> None:
    first, second, other = (
        simplex_noise(shape, 8.0, philox("seed", label), octaves=6, persistence=0.8) for label in ("a", "a", "b")
    )
    assert first.shape == shape and first.dtype == np.float32
    assert np.square(first, dtype=float).mean() == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_array_equal(first, second)
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.5


@pytest.mark.parametrize("dims", [2, 3])
def test_one_octave_is_smooth_and_has_the_wavelength_that_it_is_asked_for(dims: int) -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 50, (2000, dims))
    near = points + 1e-4 * rng.standard_normal(points.shape)
    values, moved = simplex(points, philox("s", "x")), simplex(near, philox("s", "x"))
    assert np.abs(moved - values).max() < 0.01 * values.std(), "no jump where simplices meet"
    assert abs(values.mean()) < 0.1 * values.std()
    if dims == 2:
        fields = [simplex_noise((64, 64), 16.0, philox("s", str(i)), octaves=1, persistence=0.8) for i in range(20)]
        radius = spectrum(fields[0])[0]
        power = np.mean([spectrum(field)[1] for field in fields], axis=0)
        mean = (radius * power).sum() / power.sum()
        assert 0.5 / 16 < mean < 2.0 / 16, "most of the power is about one wave in 16 cells"
        assert power[radius > 4 / 16].sum() < 0.01 * power.sum()


def test_octaves_add_finer_detail_by_their_persistence() -> None:
    def fine(octaves: int, persistence: float) -> float:
        shares = []
        for i in range(8):
            field = simplex_noise((64, 64), 32.0, philox("s", str(i)), octaves=octaves, persistence=persistence)
            radius, power = spectrum(field)
            shares.append(power[radius > 0.15].sum() / power.sum())
        return float(np.mean(shares))

    assert fine(1, 0.8) < 0.01 < fine(6, 0.4) < fine(6, 0.8)
    # Sizes 1, 0.8, ... 0.8^5 of independent octaves: those of 4 cells and less have this share of the power.
    powers = 0.8 ** (2 * np.arange(6))
    assert fine(6, 0.8) == pytest.approx(powers[3:].sum() / powers.sum(), abs=0.12)


def test_white_noise_is_rougher() -> None:
    field = simplex_noise((64, 64), 16.0, philox("s", "a"), octaves=6, persistence=0.8).astype(float)
    white = np.random.default_rng(0).standard_normal((64, 64))
    neighbours = [float((f[:, 1:] * f[:, :-1]).mean() / np.square(f).mean()) for f in (field, white)]
    assert neighbours[0] > 0.4 > 0.1 > abs(neighbours[1])
