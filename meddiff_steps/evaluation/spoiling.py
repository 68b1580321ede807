"""Real images, spoilt in known ways: what figures are tried on, so that a reader sees which figure sees what.

Each way takes an image float32 (*spatial) in [0, 1] and gives one like it; what is random comes from a key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.fft
from scipy import ndimage

from meddiff_steps.core.random_streams import noise

#: Gaussian that `blurred` convolves with, voxels.
BLUR = 0.5
#: Side of the blocks of `blocky`, voxels, and deviation of their offsets in grey levels.
BLOCK, OFFSET = 4, 0.03
#: Mean grey level of the haze of `hazy`, and the Gaussian of its clouds, voxels.
HAZE, CLOUDS = 0.03, 3.0
#: Darker voxels are background, which gets neither blocks nor grain.
DARK = 0.02
#: Bins of grey level and of gradient that the deviation of a residual is looked up in, and the smallest deviation.
LEVELS, SLOPES, LEAST = 12, 8, 1e-3
#: Pairs that bins are laid by, and voxels of each at most.
BINNED, VOXELS = 40, 20_000

Pairs = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


def blurred(image: np.ndarray) -> np.ndarray:
    """Without its finest detail: convolved with a Gaussian of `BLUR` voxels."""
    return ndimage.gaussian_filter(image, BLUR)


def blocky(image: np.ndarray, key: str) -> np.ndarray:
    """With an offset in every block of `BLOCK` voxels a side, as errors in the latents of a linear code make."""
    offsets = OFFSET * noise(key, [-(-n // BLOCK) for n in image.shape])
    for axis, length in enumerate(image.shape):
        offsets = offsets.repeat(BLOCK, axis).take(range(length), axis)
    return np.where(image > DARK, np.clip(image + offsets, 0, 1), image).astype(np.float32)


def hazy(image: np.ndarray, key: str) -> np.ndarray:
    """With clouds of about `HAZE` where it is darker: seen in a black background, hardly in an image without."""
    clouds = ndimage.gaussian_filter(noise(key, image.shape), CLOUDS)
    return np.maximum(image, HAZE * (1 + 0.5 * np.tanh(clouds / clouds.std()))).astype(np.float32)


@dataclass(frozen=True)
class Grain:
    """Gaussian noise with the mean, the local deviation and the spectrum of what soft images lack.

    It makes soft images as sharp as real ones by every figure that measures how much detail there is.  Local: by the
    soft image's grey level and gradient.

    Attributes
    ----------
    levels, slopes
        Edges of the bins.
    mean, deviation
        Of image less soft image in each bin, (len(levels) + 1, len(slopes) + 1); 0 in background.
    filter
        Real amplitudes of an rfftn that white noise is multiplied by, which leaves its variance 1.
    """

    levels: np.ndarray
    slopes: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    filter: np.ndarray

    @classmethod
    def fit(cls, pairs: Pairs) -> Self:
        """Learn from pairs (image, soft image), which are gone through three times; not all are held."""
        some = [_bright(soft) for (_, soft), _ in zip(pairs(), range(BINNED), strict=False)]
        bright, steep = (np.concatenate([np.zeros(1), *parts]) for parts in zip(*some, strict=True))
        cuts = [np.linspace(0, 1, count + 1)[1:-1] for count in (LEVELS, SLOPES)]
        levels = np.concatenate([[DARK], np.quantile(bright, cuts[0])])
        binned = cls(levels, np.quantile(steep, cuts[1]), np.zeros(0), np.zeros(0), np.zeros(0))
        size = (len(levels) + 1, SLOPES)
        sums = np.zeros((3, *size))
        for image, soft in pairs():
            residual = (image - soft).astype(np.float64).ravel()
            places = np.ravel_multi_index(binned._bins(soft), size).ravel()
            for power, total in enumerate(sums):
                total += np.bincount(places, residual**power, total.size).reshape(size)
        count = np.maximum(sums[0], 1)
        mean = sums[1] / count
        deviation = np.sqrt(np.maximum(sums[2] / count - mean**2, 0))
        mean[0] = deviation[0] = 0.0
        total, shape = np.zeros(1), (1,)
        for image, soft in pairs():
            bins = binned._bins(soft)
            white = np.where(soft > DARK, (image - soft - mean[bins]) / np.maximum(deviation[bins], LEAST), 0)
            total, shape = total + np.square(np.abs(scipy.fft.rfftn(white))), image.shape
        amplitude = np.sqrt(ndimage.gaussian_filter(total, 1.0, mode="nearest"))
        kernel = scipy.fft.irfftn(amplitude, shape)
        energy = float(np.sqrt(np.square(kernel).sum()))
        return cls(binned.levels, binned.slopes, mean, deviation, amplitude / max(energy, 1e-30))

    def _bins(self, soft: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.digitize(soft, self.levels, right=True), np.digitize(_slope(soft), self.slopes)

    def drawn_on(self, soft: np.ndarray, key: str) -> np.ndarray:
        """The soft image with grain."""
        bins = self._bins(soft)
        white = scipy.fft.irfftn(scipy.fft.rfftn(noise(key, soft.shape)) * self.filter, soft.shape)
        return np.clip(soft + self.mean[bins] + self.deviation[bins] * white, 0, 1).astype(np.float32)


def _slope(image: np.ndarray) -> np.ndarray:
    """Magnitude of the gradient, grey levels per voxel."""
    return np.sqrt(sum(np.square(np.gradient(image, axis=axis)) for axis in range(image.ndim)))


def _bright(soft: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey level and gradient of some voxels that are no background, evenly spaced."""
    voxels = np.flatnonzero(soft > DARK)
    chosen = voxels[:: max(1, -(-len(voxels) // VOXELS))]
    return soft.ravel()[chosen], _slope(soft).ravel()[chosen]


def with_blur(images: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and themselves `blurred`, for `Grain.fit`."""
    return ((image, blurred(image)) for image in images)
