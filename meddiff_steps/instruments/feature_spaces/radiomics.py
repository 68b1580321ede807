"""The space `radiomics`: texture and tissue measurements."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from meddiff_steps.instruments.feature_spaces.base import Context, FeatureSpace, digest_of

ENTRY = {
    "order": 2,
    "title": "grey values and texture",
    "summary": (
        "Grey-value statistics, co-occurrence texture and regional tissue amounts: sees tissue amounts, edges and haze"
        " in the background; may miss fine shape."
    ),
    "source": "co-occurrence texture of Haralick, Shanmugam and Dinstein 1973; not the published radiomic distance",
    "spatial_dims": [2, 3],
    "needs": "nothing",
}

#: Voxels brighter than this are looked at by first-order and texture features.
FOREGROUND = 0.05
#: Grey levels of the co-occurrence matrix (over [0, 1], fixed, so that images share them) and of the soft histograms.
GLCM_LEVELS, HISTOGRAM_LEVELS = 16, 8


def offsets(spatial_dims: int) -> list[tuple[int, ...]]:
    """Neighbours at distance 1, one of each opposite pair: 4 in 2D, 13 in 3D."""
    every = itertools.product((-1, 0, 1), repeat=spatial_dims)
    return [offset for offset in every if offset > (0,) * spatial_dims]


def cooccurrence(levels: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Grey-level co-occurrence matrices (Haralick, Shanmugam and Dinstein 1973), symmetric and normalised.

    Parameters
    ----------
    levels
        Whole numbers below `count`, (b, *spatial).
    mask
        Both voxels of a pair must be inside, bool (b, *spatial).
    count
        Grey levels.

    Returns
    -------
    numpy.ndarray
        float64 (b, count, count), summed over all directions; 0 everywhere for an image without a pair.
    """
    batch, spatial = levels.shape[0], levels.shape[1:]
    # A voxel outside counts as one more level, which is cut off at the end: cheaper than selecting pairs.
    plain = np.where(mask, levels, count).astype(np.int32)
    codes = plain + np.arange(batch, dtype=np.int32).reshape(-1, *(1,) * len(spatial)) * (count + 1)
    total = np.zeros(batch * (count + 1) ** 2)
    for offset in offsets(len(spatial)):
        here = (slice(None), *(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, spatial, strict=True)))
        there = (slice(None), *(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, spatial, strict=True)))
        total += np.bincount((codes[here] * (count + 1) + plain[there]).ravel(), minlength=len(total))
    matrices = total.reshape(batch, count + 1, count + 1)[:, :count, :count]
    matrices = matrices + matrices.transpose(0, 2, 1)
    return matrices / np.maximum(matrices.sum((1, 2), keepdims=True), 1.0)


def texture(matrices: np.ndarray) -> np.ndarray:
    """Contrast, dissimilarity, homogeneity, energy, correlation and entropy of co-occurrence matrices (b, k, k), (b,
    6).

    As scikit-image's `graycoprops` defines them (entropy in nats).  The correlation of a constant image is 1.
    """
    i, j = np.meshgrid(np.arange(matrices.shape[1]), np.arange(matrices.shape[1]), indexing="ij")

    def mean(values: np.ndarray) -> np.ndarray:
        return (matrices * values).sum((1, 2))

    centre = mean(i)
    variance = mean(i * i) - centre**2
    correlation = np.where(variance > 1e-12, (mean(i * j) - centre**2) / np.maximum(variance, 1e-12), 1.0)
    entropy = -(matrices * np.log(np.where(matrices > 0, matrices, 1.0))).sum((1, 2))
    squares = np.sqrt(np.square(matrices).sum((1, 2)))
    return np.stack(
        [mean((i - j) ** 2), mean(np.abs(i - j)), mean(1.0 / (1.0 + (i - j) ** 2)), squares, correlation, entropy],
        axis=1,
    )


def first_order(images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Share of voxels inside, and mean, spread, skewness, excess kurtosis, quantiles and entropy of their values, (b,
    11).

    Parameters
    ----------
    images, mask
        (b, *spatial) float and bool.  An image without voxels inside gives zeros.
    """
    out = np.zeros((len(images), 11))
    for i, (image, inside) in enumerate(zip(images, mask, strict=True)):
        values = image[inside].astype(np.float64)
        if len(values) == 0:
            continue
        mean, spread = values.mean(), values.std()
        scaled = (values - mean) / max(spread, 1e-12)
        shares = np.histogram(values, 32, (0.0, 1.0))[0] / len(values)
        entropy = -float(np.sum(shares * np.log(np.where(shares > 0, shares, 1.0))))
        out[i] = [
            inside.mean(),
            mean,
            spread,
            np.mean(scaled**3),
            np.mean(scaled**4) - 3.0,
            *np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]),
            entropy,
        ]
    return out


def soft_histograms(images: Tensor) -> Tensor:
    """Share of each grey level in each half of every axis: regional tissue amounts, (b, 64) in 3D and (b, 32) in 2D.

    Every voxel is shared between the two nearest of `HISTOGRAM_LEVELS` levels over [0, 1], as for the predictors.
    """
    position = images.clamp(0.0, 1.0) * (HISTOGRAM_LEVELS - 1)
    pool = functional.adaptive_avg_pool3d if images.ndim == 5 else functional.adaptive_avg_pool2d
    parts = [pool((1.0 - (position - level).abs()).clamp_min(0.0), 2).flatten(1) for level in range(HISTOGRAM_LEVELS)]
    return torch.cat(parts, 1)


def radiomic_features(images: Tensor) -> Tensor:
    """`first_order`, `texture` and `soft_histograms` of images (b, 1, *spatial), (b, 81) in 3D and (b, 49) in 2D."""
    values = images[:, 0].numpy()
    mask = values > FOREGROUND
    levels = np.clip((values * GLCM_LEVELS).astype(np.int32), 0, GLCM_LEVELS - 1)
    measured = np.concatenate([first_order(values, mask), texture(cooccurrence(levels, mask, GLCM_LEVELS))], axis=1)
    return torch.cat([torch.from_numpy(measured.astype(np.float32)), soft_histograms(images)], 1)


def build(context: Context) -> FeatureSpace:
    """The space `radiomics`: `radiomic_features`."""
    # The definition above is fixed by a version, which has to be raised when it changes.
    digest = digest_of("radiomics", 1, FOREGROUND, GLCM_LEVELS, HISTOGRAM_LEVELS)
    return FeatureSpace(
        "radiomics",
        digest,
        "grey-value statistics, co-occurrence texture and regional tissue amounts",
        radiomic_features,
    )
