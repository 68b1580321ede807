"""Power spectra: energy is kept, blur shows in the high bands only, identical sets give 1."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.spectrum import (
    BANDS,
    band_power_ratio,
    radial_power,
    ring_count,
    ring_frequencies,
    ring_sizes,
)


def noise(n: int, shape: tuple[int, ...], label: str = "") -> np.ndarray:
    return philox("test", f"spectrum {label}").normal(size=(n, 1, *shape)).astype(np.float32)


def low_passed(images: np.ndarray, limit: float) -> np.ndarray:
    """Without anything above `limit` of Nyquist."""
    shape = images.shape[2:]
    radius = 2 * np.sqrt(sum(np.square(f) for f in np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")))
    axes = tuple(range(2, images.ndim))
    return np.fft.ifftn(np.fft.fftn(images, axes=axes) * (radius <= limit), axes=axes).real.astype(np.float32)


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (16, 20, 17), (40, 48, 40)])
def test_rings_are_filled_and_white_noise_is_flat(shape: tuple[int, ...]) -> None:
    sizes = ring_sizes(shape)
    assert len(sizes) == ring_count(shape) == len(ring_frequencies(shape))
    assert len(sizes) % 4 == 0
    assert (sizes > 1).all()  # at least a pair of mirror coefficients
    average = radial_power(noise(60, shape)).mean(0) / sizes
    window_power = np.prod([np.mean(np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 4) for n in shape])
    np.testing.assert_allclose(average[1:], window_power, rtol=0.25)
    assert average[1:].mean() == pytest.approx(window_power, rel=0.05)


def test_low_passed_images_lose_the_high_band_only() -> None:
    images = noise(20, (32, 40, 32))
    ratios = band_power_ratio(radial_power(low_passed(images, 0.5)), radial_power(images), paired=True, resamples=200)
    assert ratios["below_quarter"]["value"] == pytest.approx(1.0, abs=0.02)
    assert ratios["quarter_to_half"]["value"] == pytest.approx(1.0, abs=0.1)
    assert ratios["above_half"]["value"] < 0.05


def test_blur_and_added_noise_go_opposite_ways() -> None:
    images = np.stack([gaussian_filter(i, [0, 1, 1]) for i in noise(20, (64, 64))])
    blurred = np.stack([gaussian_filter(i, [0, 1, 1]) for i in images])
    reference = radial_power(images)
    softer = band_power_ratio(radial_power(blurred), reference, paired=True, resamples=200)
    values = [softer[band]["value"] for band in BANDS]
    assert values[0] > values[1] > values[2]
    harsher = band_power_ratio(
        radial_power(images + 0.2 * noise(20, (64, 64), "added")), reference, paired=True, resamples=200
    )
    assert harsher["above_half"]["value"] > 1.5


def test_identical_sets_give_exactly_one() -> None:
    power = radial_power(noise(12, (24, 24, 24)))
    for figure in band_power_ratio(power, power, paired=True, resamples=200).values():
        assert (figure["value"], figure["low"], figure["high"], figure["n"]) == (1.0, None, None, 12)


def test_unpaired_ratio_of_the_same_population_is_one_within_its_interval_and_has_a_ceiling() -> None:
    a, b = (
        radial_power(
            noise(40, (32, 32), label) * philox("t", label).uniform(0.5, 1.5, (40, 1, 1, 1)).astype(np.float32)
        )
        for label in "ab"
    )
    for figure in band_power_ratio(a, b, paired=False, resamples=300).values():
        assert figure["low"] < 1.0 < figure["high"]
        assert figure["ceiling"]["low"] < 1.0 < figure["ceiling"]["high"]
        assert figure["ceiling"]["value"] == pytest.approx(1.0, abs=0.05)


def test_an_edge_at_the_border_does_not_pass_for_sharpness() -> None:
    """A smooth ramp has a step where the image wraps around; the window must take its leakage away."""
    ramp = np.broadcast_to(np.linspace(0, 1, 64, dtype=np.float32), (1, 1, 64, 64))
    power = radial_power(ramp)
    assert power[0, ring_count((64, 64)) // 2 :].sum() < 1e-6 * power[0].sum()


def test_one_reference_subject_has_no_ceiling() -> None:
    power = radial_power(noise(4, (16, 16)))
    figure = band_power_ratio(power, power, paired=False, reference_units=["a"] * 4, resamples=100)["above_half"]
    assert figure["ceiling"]["value"] is None
