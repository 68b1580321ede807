"""How close reconstructions are to their images: PSNR, multi-scale SSIM and L1, each with an interval over subjects."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric, SSIMMetric

from meddiff_steps.core.errors import UserError
from meddiff_steps.statistics.bootstrap import Bootstrap
from meddiff_steps.statistics.measures import mean_of

#: Weights of the five scales (Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity", section 3.2).
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
#: PSNR of a perfect reconstruction is infinite; it counts as this many dB.
MAX_PSNR = 100.0
#: Voxels compared at once, which bounds memory (SSIM holds about ten float32 copies).
BATCH_VOXELS = 2**22
#: SSIM takes seconds per large volume on a CPU: beyond this many images an evenly spaced subset is compared.
MAX_SSIM_IMAGES = 500


class Images(Protocol):
    """An array (n, 1, *spatial), or anything that reads one slice of it at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class SsimSettings:
    """Which structural similarity fits an image size; numbers of different settings are not comparable.

    Attributes
    ----------
    kernel_size
        Side of the Gaussian window (sigma 1.5), voxels.
    weights
        One per scale, summing to 1; a single one means plain SSIM.
    """

    kernel_size: int
    weights: tuple[float, ...]

    @property
    def name(self) -> str:
        return "ms_ssim" if len(self.weights) > 1 else "ssim"

    @classmethod
    def for_shape(cls, shape: Sequence[int]) -> SsimSettings:
        """The most scales (up to five) that leave a window of at least 5, then the largest window (7 in 3D, 11 in 2D).

        A scale s of S halves the image s - 1 times, and MONAI refuses sides below `(kernel_size - 1) * (S - 1)**2`;
        both must hold.  Sides too small for two scales with a window of 3 get plain SSIM.
        """
        side, limit = min(shape), 7 if len(shape) == 3 else 11

        def kernel(scales: int) -> int:
            fits = side // max((scales - 1) ** 2, 2 ** (scales - 1), 1)
            return min(limit, fits - (fits + 1) % 2)  # the largest odd number that fits

        for smallest in (5, 3):
            for scales in range(len(MS_SSIM_WEIGHTS), 1, -1):
                if kernel(scales) >= smallest:
                    total = sum(MS_SSIM_WEIGHTS[:scales])
                    return cls(kernel(scales), tuple(w / total for w in MS_SSIM_WEIGHTS[:scales]))
        return cls(max(1, kernel(1)), (1.0,))

    def metric(self, spatial_dims: int, data_range: float) -> MultiScaleSSIMMetric | SSIMMetric:
        if self.name == "ssim":
            return SSIMMetric(spatial_dims, data_range=data_range, win_size=self.kernel_size)
        return MultiScaleSSIMMetric(
            spatial_dims, data_range=data_range, kernel_size=self.kernel_size, weights=self.weights
        )

    def card(self) -> dict[str, Any]:
        return {
            "kernel_size": self.kernel_size,
            "kernel_sigma": 1.5,
            "scales": len(self.weights),
            "weights": [round(w, 6) for w in self.weights],
        }


def psnr(images: np.ndarray, reconstructions: np.ndarray, data_range: float = 1.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB, (n,); 10 log10(data_range^2 / mean squared error), at most
    `MAX_PSNR`.
    """
    axes = tuple(range(1, images.ndim))
    error = np.mean(np.square(images.astype(np.float64) - reconstructions), axis=axes)
    return 10.0 * np.log10(data_range**2 / np.maximum(error, data_range**2 * 10 ** (-MAX_PSNR / 10)))


def structural_similarity(
    images: np.ndarray, reconstructions: np.ndarray, settings: SsimSettings, data_range: float = 1.0
) -> np.ndarray:
    """(MS-)SSIM of each image, (n,), by MONAI with the given settings."""
    metric = settings.metric(images.ndim - 2, data_range)
    with torch.inference_mode():
        values = metric(
            torch.from_numpy(np.ascontiguousarray(reconstructions, np.float32)),
            torch.from_numpy(np.ascontiguousarray(images, np.float32)),
        )
    return np.asarray(values, dtype=np.float64).reshape(len(images))


def reconstruction_quality(
    images: Images,
    reconstructions: Images,
    data_range: float = 1.0,
    *,
    subjects: Sequence[str] | None = None,
    resamples: int = 1000,
    seed: str = "",
) -> dict[str, Any]:
    """PSNR (dB, mean of per-image values), MS-SSIM and L1 of reconstructions.

    Parameters
    ----------
    images, reconstructions
        float (n, 1, *spatial), read a slice at a time.
    data_range
        Largest possible difference of two intensities.
    subjects
        Unit of each image for the bootstrap; each image its own when None.
    resamples, seed
        Of the bootstrap.

    Returns
    -------
    dict
        `psnr`, `l1` and `ms_ssim` (`ssim` where two scales do not fit), each a figure, and `settings` of the
        similarity.

    Raises
    ------
    UserError
        Shapes differ, there are no images, or values are not finite.
    """
    if images.shape != reconstructions.shape:
        raise UserError(
            f"reconstructions: shape {reconstructions.shape} differs from the images' {images.shape}. Both must come"
            " from the same autoencoder run."
        )
    if len(images) == 0:
        raise UserError(
            "reconstructions: there are no images to compare, expected at least one. Check that the held-out splits are"
            " not empty."
        )
    n, shape = len(images), images.shape[2:]
    step = max(1, BATCH_VOXELS // int(np.prod(shape)))
    batches = ((images[at : at + step], reconstructions[at : at + step]) for at in range(0, n, step))
    units = [str(i) for i in range(n)] if subjects is None else subjects
    return quality_of_batches(batches, shape, units, data_range, resamples=resamples, seed=seed)


def quality_of_batches(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    shape: Sequence[int],
    subjects: Sequence[str],
    data_range: float = 1.0,
    *,
    resamples: int = 1000,
    seed: str = "",
) -> dict[str, Any]:
    """`reconstruction_quality` of images that are not all there at once: some (b, 1, *spatial) and their
    reconstructions at a time; spatial `shape`, and the subject of every image.
    """
    n, start = len(subjects), 0
    settings = SsimSettings.for_shape(shape)
    compared = np.unique(np.linspace(0, n - 1, min(n, MAX_SSIM_IMAGES)).round().astype(int))
    ratios, errors, similarities = [], [], []
    for batch in batches:
        image, other = (np.asarray(part, dtype=np.float32) for part in batch)
        if not (np.isfinite(image).all() and np.isfinite(other).all()):
            raise UserError(
                f"reconstructions: values that are not finite among rows {start} to {start + len(image) - 1}. The"
                " autoencoder diverged; train it again."
            )
        ratios.append(psnr(image, other, data_range))
        errors.append(np.abs(image - other).mean(axis=tuple(range(1, image.ndim)), dtype=np.float64))
        chosen = compared[(compared >= start) & (compared < start + len(image))] - start
        start += len(image)
        if len(chosen):
            similarities.append(structural_similarity(image[chosen], other[chosen], settings, data_range))
    units = np.asarray(subjects, dtype=str)
    every = Bootstrap(units, resamples, seed, "reconstruction")
    some = Bootstrap(units[compared], resamples, seed, "reconstruction")
    return {
        "psnr": every.figure(mean_of(np.concatenate(ratios))),
        settings.name: some.figure(mean_of(np.concatenate(similarities))),
        "l1": every.figure(mean_of(np.concatenate(errors))),
        "settings": settings.card() | {"metric": settings.name, "data_range": data_range},
    }
