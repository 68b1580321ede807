"""Sharpness: the radially averaged power spectrum, in three bands, against real images.

Images are Hann-windowed after their mean is taken off.  Without a window, an image that does not fade out at its border
(any radiograph, a brain cut at the neck) has a step there whose leakage fills the high frequencies, for sharp and
blurred images alike, and hides what is to be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft

from meddiff_steps.core.random_streams import philox
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, figure
from meddiff_steps.statistics.measures import mean_of

#: Band edges as fractions of the Nyquist frequency along an axis.  Corners of the cube beyond 1 are left out: they are
#: sampled in some directions only.
BANDS = {"below_quarter": (0.0, 0.25), "quarter_to_half": (0.25, 0.5), "above_half": (0.5, 1.0)}


@lru_cache(maxsize=4)
def _rings(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ring of each rfftn coefficient (outside and zero frequency: `bins`), its multiplicity, and the Hann window."""
    bins = ring_count(shape)
    axes = [np.fft.fftfreq(n) for n in shape[:-1]] + [np.fft.rfftfreq(shape[-1])]
    radius = 2.0 * np.sqrt(sum(np.square(f) for f in np.meshgrid(*axes, indexing="ij")))
    ring = (
        np.ceil(radius * bins - 1e-9).astype(int) - 1
    )  # ring k holds (k / bins, (k + 1) / bins]; a small margin against rounding
    ring[(ring < 0) | (ring >= bins)] = bins
    multiplicity = np.full(ring.shape, 2.0)  # rfftn leaves out the mirror half
    multiplicity[..., 0] = 1.0
    if shape[-1] % 2 == 0:
        multiplicity[..., -1] = 1.0
    window = np.ones(())
    for n in shape:
        window = np.multiply.outer(window, np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2)
    return ring.ravel(), multiplicity.ravel(), window.astype(np.float32)


def ring_count(shape: Sequence[int]) -> int:
    """Rings between zero frequency and Nyquist: a multiple of four, so that band edges are ring edges."""
    return 4 * max(1, min(shape) // 8)


def ring_frequencies(shape: Sequence[int]) -> np.ndarray:
    """Centre of each ring as a fraction of Nyquist, (rings,)."""
    bins = ring_count(shape)
    return (np.arange(bins) + 0.5) / bins


def ring_sizes(shape: Sequence[int]) -> np.ndarray:
    """Fourier coefficients in each ring, (rings,): radial power divided by it is the radial average."""
    ring, multiplicity, _ = _rings(tuple(shape))
    bins = ring_count(shape)
    return np.maximum(np.bincount(ring, multiplicity, bins + 1)[:bins], 1.0)  # images below 8 voxels have empty rings


def radial_power(images: np.ndarray) -> np.ndarray:
    """Power of each image in rings of equal frequency.

    Parameters
    ----------
    images
        float (n, 1, *spatial), 2D or 3D with isotropic voxels.

    Returns
    -------
    numpy.ndarray
        float64 (n, rings): sum of |FFT|^2 / voxels over the coefficients of each ring.
    """
    shape = images.shape[2:]
    ring, multiplicity, window = _rings(tuple(shape))
    bins = ring_count(shape)
    out = np.empty((len(images), bins))
    for i, image in enumerate(images):
        values = image[0].astype(np.float32)
        transformed = scipy.fft.rfftn((values - values.mean()) * window)
        power = np.square(transformed.real, dtype=np.float64) + np.square(transformed.imag, dtype=np.float64)
        out[i] = np.bincount(ring, power.ravel() * multiplicity, bins + 1)[:bins] / values.size
    return out


def curves_card(powers: Mapping[str, np.ndarray], shape: Sequence[int]) -> dict[str, Any]:
    """Radial averages of sets of images with `radial_power` (n, rings), by name, and what their frequencies and bands
    are.
    """
    return {
        "bands_of_nyquist": {name: list(edges) for name, edges in BANDS.items()},
        "frequency_of_nyquist": [float(f"{f:.6g}") for f in ring_frequencies(shape)],
        "radial_average": {
            name: [float(f"{v:.6g}") for v in power.mean(0) / ring_sizes(shape)]
            for name, power in powers.items()
            if len(power)
        },
    }


def band_power(power: np.ndarray) -> np.ndarray:
    """Radial power (n, rings) summed within `BANDS`, (n, bands)."""
    bins = power.shape[1]
    return np.stack([power[:, round(low * bins) : round(high * bins)].sum(1) for low, high in BANDS.values()], axis=1)


def band_power_ratio(
    power: np.ndarray,
    reference: np.ndarray,
    *,
    paired: bool,
    units: Sequence[str] | None = None,
    reference_units: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: str = "",
) -> dict[str, Figure]:
    """Mean power of images over mean power of reference images, in three bands; 1 is as sharp as the reference.

    Parameters
    ----------
    power, reference
        `radial_power` of both sets, (n, rings) and (m, rings).
    paired
        Row i of both belongs together (an image and its reconstruction), so both are resampled alike.
    units, reference_units
        Subject of each row; each row its own when None.

    Returns
    -------
    dict
        A figure per band of `BANDS`; n counts the subjects of the images.  Unpaired figures carry as `ceiling` what
        halves of the reference give against each other.
    """
    a, b = band_power(power), band_power(reference)
    boot = Bootstrap(np.arange(len(a)) if units is None else units, resamples, seed, "spectrum")
    others = (
        boot
        if paired
        else Bootstrap(
            np.arange(len(b)) if reference_units is None else reference_units, resamples, seed, "spectrum reference"
        )
    )
    halves = None if paired else _halves(b, others, resamples, seed)
    out: dict[str, Figure] = {}
    for i, band in enumerate(BANDS):
        (top, tops), (bottom, bottoms) = boot.draws(mean_of(a[:, i])), others.draws(mean_of(b[:, i]))
        with np.errstate(divide="ignore", invalid="ignore"):
            out[band] = figure(float(np.divide(top, bottom)), tops / bottoms, boot.n)
        if halves is not None:
            out[band]["ceiling"] = figure(float(np.median(halves[:, i])), halves[:, i], others.n)
    return out


def _halves(bands: np.ndarray, boot: Bootstrap, resamples: int, seed: str) -> np.ndarray:
    """Ratio of mean band power between random halves of the reference subjects, (resamples, bands); NaN below two
    subjects.
    """
    if boot.n < 2:
        return np.full((resamples, bands.shape[1]), np.nan)
    rng = philox(seed, "spectrum halves")
    out = np.empty((resamples, bands.shape[1]))
    for i in range(resamples):
        first = (rng.permutation(boot.n) < boot.n // 2)[boot.unit_of_row]
        out[i] = bands[first].mean(0) / bands[~first].mean(0)
    return out
