"""Realism: how far the distribution of synthetic images is from that of real ones, in a feature space.

Every figure compares synthetic images with held-out real scans.  Its floor is the same figure with as many training
scans in place of the synthetic images: what a generator as good as reality would get with these numbers of images.
With reconstructions of held-out scans in their place it says what the decoder alone can be told by.
Figures of different feature spaces or numbers of images cannot be compared; a figure and its floor can.

A metric (`evaluate.metrics`) is a module of this package: `ENTRY` says what it is, and
`figure(sample, reference, scale, draws)` measures it; `measure.measure` calls those that are chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from meddiff_steps.statistics.bootstrap import Bootstrap

#: Principal components kept at most.  A covariance of d components has d^2 / 2 numbers: fewer than five images per
#: component leave it mostly noise.
MAX_COMPONENTS, IMAGES_PER_COMPONENT = 64, 5
#: Fewer images than this, of any kind, say nothing about a distribution.
MIN_IMAGES = 10


@dataclass(frozen=True)
class Sample:
    """Features of some images.

    Attributes
    ----------
    features
        float64 (n, d).
    units
        What is resampled: the subject of each real scan or reconstruction, the noise of each synthetic image.
    """

    features: np.ndarray
    units: np.ndarray

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Scale:
    """Units of a feature space: standard deviations over held-out scans, and the main directions of their variation.

    They are of the very scans that all samples are compared with, so that a sample of training scans, which is the
    floor, and one of a generator as good as reality are alike to them.  Learnt from the floor's own sample, its
    directions would be those in which this one happens to vary, and the floor too large.

    Attributes
    ----------
    mean, spread
        (d,); a feature that is constant over held-out scans keeps its own unit.
    basis
        Principal components, orthonormal (d, k).
    explained
        Share of the variance of held-out scans along each, (k,).
    """

    mean: np.ndarray
    spread: np.ndarray
    basis: np.ndarray
    explained: np.ndarray

    @classmethod
    def of(cls, held_out: np.ndarray, images: int) -> Self:
        """Learn from held-out features (n, d); `images` is the size of the smallest sample that will be measured."""
        features = np.asarray(held_out, dtype=np.float64)
        mean, spread = features.mean(0), features.std(0)
        spread = np.where(spread > 1e-6 * np.maximum(np.abs(mean), 1e-3), spread, 1.0)
        _, singular, directions = np.linalg.svd((features - mean) / spread, full_matrices=False)
        count = max(2, min(MAX_COMPONENTS, images // IMAGES_PER_COMPONENT, len(directions)))
        directions = (
            directions[:count]
            * np.where(np.take_along_axis(directions, np.abs(directions).argmax(1)[:, None], 1) < 0, -1.0, 1.0)[:count]
        )
        power = np.square(singular)
        return cls(mean, spread, directions.T, power[:count] / max(power.sum(), 1e-300))

    def standard(self, features: np.ndarray) -> np.ndarray:
        """Features in standard deviations of held-out scans, float64 (n, d)."""
        return (np.asarray(features, dtype=np.float64) - self.mean) / self.spread

    def components(self, standard: np.ndarray) -> np.ndarray:
        """Standardised features along the principal components, (n, k)."""
        return standard @ self.basis


@dataclass(frozen=True)
class Draws:
    """What a metric may draw, and from which stream.

    Attributes
    ----------
    resamples
        Of the bootstrap behind an interval, where a resample costs little.
    slow_resamples
        The same where each costs as much as the figure itself.
    permutations
        Of a test of equal distributions.
    seed, label
        Root of all random numbers, and whose figure it is: `synthetic`, `training` for the floor, and so on.
    """

    resamples: int
    slow_resamples: int
    permutations: int
    seed: str
    label: str


def shared_units(a: Sample, b: Sample) -> np.ndarray:
    """Unit of each row of both samples, those of `a` first, text (n + m,).

    Samples have nobody in common, whatever their units are called, but where subjects are in both under one name: a
    scan and its reconstruction are one unit, which is resampled, folded and compared as one.
    """
    both = np.intersect1d(a.units.astype(str), b.units.astype(str))
    named = []
    for side, sample in (("a", a), ("b", b)):
        units = sample.units.astype(str)
        named.append(np.where(np.isin(units, both), np.char.add("c:", units), np.char.add(f"{side}:", units)))
    return np.concatenate(named)


def resampled(a: Sample, b: Sample, draws: Draws, name: str) -> tuple[np.ndarray, np.ndarray]:
    """How often each row of either sample is drawn, (slow resamples, n) and (slow resamples, m); `name` of the metric.

    Each sample's units are drawn by themselves, or together with those of the other where some are in both.
    """
    units = shared_units(a, b)
    if not np.char.startswith(units, "c:").any():
        boots = [
            Bootstrap(sample.units, draws.slow_resamples, draws.seed, f"{name} {draws.label} {side}")
            for side, sample in (("a", a), ("b", b))
        ]
        return boots[0].all_weights(), boots[1].all_weights()
    weights = Bootstrap(units, draws.slow_resamples, draws.seed, f"{name} {draws.label}").all_weights()
    return weights[:, : len(a)], weights[:, len(a) :]
