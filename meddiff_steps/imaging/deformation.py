"""Deformations: images moved by them, how they are made of velocities, and where they fold.

A displacement u is in voxels: the moved image has at x what the image has at x + u(x).  Stationary velocities give
deformations that can be gone back: exp(v), and exp(-v) (Arsigny et al. 2006).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.networks.blocks import DVF2DDF, Warp
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

#: Squarings of exp(v): velocities of up to some voxels are cut into pieces of a sixteenth.
SQUARINGS = 4
#: Determinants below which a logarithm is not taken.
SMALLEST = 1e-3


def _blocks() -> tuple[DVF2DDF, Warp, Warp]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "monai.networks.blocks.Warp")  # which sampler it uses: torch's
        return (
            DVF2DDF(num_steps=SQUARINGS, mode="bilinear", padding_mode="border"),
            Warp("bilinear", "border"),
            Warp("nearest", "zeros"),
        )


_EXPONENTIAL, _LINEAR, _NEAREST = _blocks()


def exponential(velocity: Tensor) -> Tensor:
    """The displacement that following a velocity for a unit of time leads to; voxels, (b, 3, *spatial) both."""
    found: Tensor = _EXPONENTIAL(velocity)
    return found


def finer(displacement: Tensor, shape: Sequence[int]) -> Tensor:
    """A displacement (b, 3, *spatial) on a grid of `shape` over the same place, in its voxels; as much finer along each
    axis.
    """
    factor = shape[0] / displacement.shape[2]
    return factor * functional.interpolate(displacement, tuple(shape), mode="trilinear", align_corners=False)


def moved(image: Tensor, displacement: Tensor) -> Tensor:
    """Images (b, c, *spatial), interpolated linearly."""
    found: Tensor = _LINEAR(image, displacement)
    return found


def moved_labels(labels: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """Labels (*spatial) of the nearest voxel, 0 beyond the image; displacement (3, *spatial)."""
    # Numbers of the labels, which a float32 holds exactly.
    names, numbers = np.unique(labels, return_inverse=True)
    one = torch.from_numpy(numbers.reshape(labels.shape).astype(np.float32))[None, None]
    places = one + 1.0  # 0 is left for what lies beyond
    found = _NEAREST(places, torch.from_numpy(displacement[None].astype(np.float32)))[0, 0].numpy()
    whole: np.ndarray = np.concatenate([[0], names])[np.rint(found).astype(int)].astype(labels.dtype)
    return whole


def jacobian_determinants(displacement: np.ndarray) -> np.ndarray:
    """How much larger each voxel becomes, (*spatial) less 2 along each axis; below 0 where the deformation folds.

    Of central differences; displacement (3, *spatial).
    """
    inner = (slice(1, -1),) * 3
    gradients = np.stack([np.stack(np.gradient(part))[(slice(None), *inner)] for part in displacement])
    determinants: np.ndarray = np.linalg.det(
        np.moveaxis(gradients + np.eye(3)[..., None, None, None], (0, 1), (-2, -1))
    )
    return determinants


def folds_and_spread(displacement: np.ndarray, region: np.ndarray) -> tuple[float, float]:
    """Share of the voxels of a region, bool (*spatial), that are folded (determinant 0 or below), and the standard
    deviation of the logarithm of the determinants there.
    """
    determinants = jacobian_determinants(displacement)[region[1:-1, 1:-1, 1:-1]]
    return float((determinants <= 0).mean()), float(np.log(np.maximum(determinants, SMALLEST)).std())


def smooth_velocity(shape: Sequence[int], largest: float, smooth: float, generator: np.random.Generator) -> np.ndarray:
    """A random velocity, float32 (3, *shape): white noise after a Gaussian of `smooth` voxels, whose longest vector has
    the length `largest`.
    """
    noise = generator.standard_normal((3, *shape))
    velocity = np.stack([ndimage.gaussian_filter(part, smooth, mode="constant") for part in noise])
    return (velocity * (largest / np.linalg.norm(velocity, axis=0).max())).astype(np.float32)
