"""What a copy of a scan may look like: changes that leave the anatomy of its subject in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

#: Shares of the field of view and factors are drawn evenly between minus and plus these.
MAX_ROTATION = 8.0  # degrees
MAX_TRANSLATION = 0.04  # of a side
MAX_ZOOM = 0.08
MAX_GAMMA = 0.3  # of log2 gamma
MAX_BIAS = 0.25  # of the intensity
MAX_NOISE = 0.05  # standard deviation, of the intensity range
MAX_CROP = 0.15  # of every side


def flip(images: Tensor) -> Tensor:
    """Mirrored left-right, (b, 1, *spatial): the first spatial axis of a volume, the last of a 2D image."""
    return images.flip(2 if images.ndim == 5 else 3)


def affine(
    images: Tensor, degrees: Tensor, translation: Tensor, zoom: Tensor, spacing: Sequence[float] | None = None
) -> Tensor:
    """Rotated, shifted and zoomed about the centre, linear interpolation, zeros outside.

    Parameters
    ----------
    images
        (b, 1, *spatial).
    degrees
        (b, 3) about each axis in 3D, (b, 1) in 2D.
    translation
        (b, dims), shares of half a side, in the order of `torch.nn.functional.affine_grid` (last axis first).
    zoom
        (b,), 0 for none.
    spacing
        Voxel size along each spatial axis, in any unit; None where it is the same along all.
    """
    dims = images.ndim - 2
    size = [1.0] * dims if spacing is None else [mm / min(spacing) for mm in spacing]
    sides = torch.tensor([n * mm for n, mm in zip(reversed(images.shape[2:]), reversed(size), strict=True)])
    matrix = torch.eye(dims).repeat(len(images), 1, 1)
    for number, (i, j) in enumerate([(0, 1), (0, 2), (1, 2)] if dims == 3 else [(0, 1)]):
        angle = torch.deg2rad(degrees[:, number])
        rotation = torch.eye(dims).repeat(len(images), 1, 1)
        rotation[:, i, i] = rotation[:, j, j] = angle.cos()
        rotation[:, i, j], rotation[:, j, i] = -angle.sin(), angle.sin()
        matrix = matrix @ rotation
    # Grid coordinates run from -1 to 1 along every axis; rotations must act on lengths.
    matrix = matrix * sides[None, None, :] / sides[None, :, None] / (1.0 + zoom)[:, None, None]
    grid = functional.affine_grid(
        torch.cat([matrix, translation[..., None]], 2), list(images.shape), align_corners=False
    )
    return functional.grid_sample(images, grid, align_corners=False)


def augment(
    images: Tensor, generator: np.random.Generator, spacing: Sequence[float] | None = None, mirror: bool = True
) -> Tensor:
    """A random change of every image: mirrored or not, moved, re-contrasted, with a bias field, noise, or a part cut
    off.

    Parameters
    ----------
    images
        (b, 1, *spatial) in [0, 1].
    spacing
        As of `affine`.
    mirror
        Whether half of them are mirrored; all else is drawn alike with and without.
    """
    b, dims = len(images), images.ndim - 2

    def uniform(*shape: int) -> Tensor:
        return torch.from_numpy(generator.uniform(-1.0, 1.0, shape).astype(np.float32))

    mirrored = torch.from_numpy((generator.random(b) < 0.5) & mirror).reshape(-1, *[1] * (dims + 1))
    x = torch.where(mirrored, flip(images), images)
    x = affine(
        x,
        MAX_ROTATION * uniform(b, 3 if dims == 3 else 1),
        2 * MAX_TRANSLATION * uniform(b, dims),
        MAX_ZOOM * uniform(b),
        spacing,
    )
    one = [1] * (dims + 1)
    x = x.clamp(0, 1) ** torch.exp2(MAX_GAMMA * uniform(b)).reshape(-1, *one)
    field = functional.interpolate(
        uniform(b, 1, *[3] * dims), images.shape[2:], mode="trilinear" if dims == 3 else "bilinear", align_corners=True
    )
    x = x * (1.0 + MAX_BIAS * field)
    x = x + MAX_NOISE * uniform(b).abs().reshape(-1, *one) * torch.from_numpy(
        generator.standard_normal(x.shape, dtype=np.float32)
    )
    return crop(x, generator.uniform(0, MAX_CROP, (b, dims, 2)) * (generator.random((b, 1, 1)) < 0.5))


def crop(images: Tensor, shares: np.ndarray) -> Tensor:
    """Zeros where `shares` (b, dims, 2) of each side is cut off at its beginning and end."""
    out = images.clone()
    for image, cuts in zip(out, shares, strict=True):
        for axis, (begin, end) in enumerate(cuts):
            n = image.shape[1 + axis]
            image.narrow(1 + axis, 0, int(begin * n)).zero_()
            image.narrow(1 + axis, n - int(end * n), int(end * n)).zero_()
    return out


def moved(image: np.ndarray, shift: Sequence[int] | np.ndarray) -> np.ndarray:
    """An image or label map (*spatial), moved by whole voxels along each axis; 0 moves in."""
    made = np.zeros_like(image)
    to = tuple(slice(max(0, s), n + min(0, s)) for s, n in zip(shift, image.shape, strict=True))
    since = tuple(slice(max(0, -s), n + min(0, -s)) for s, n in zip(shift, image.shape, strict=True))
    made[to] = image[since]
    return made


def perturbed_copies(
    images: Tensor, generator: np.random.Generator, spacing: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """The positive controls: each image changed in one way, by kind; strengths are those a thief would get away with.

    Moved are they along every axis at once, either way, by two voxels, or by 4 % of the side where that is more; by an
    eighth of sides of less than 16 voxels.

    Parameters
    ----------
    images
        (b, 1, *spatial) in [0, 1].
    spacing
        As of `affine`.
    """
    b, dims = len(images), images.ndim - 2
    zeros = {
        "degrees": torch.zeros(b, 3 if dims == 3 else 1),
        "translation": torch.zeros(b, dims),
        "zoom": torch.zeros(b),
    }
    angle = zeros["degrees"].clone()
    angle[:, 0] = torch.from_numpy(generator.choice([-3.0, 3.0], b).astype(np.float32))
    noise = torch.from_numpy(generator.standard_normal(images.shape, dtype=np.float32))
    steps = [min(max(2, round(MAX_TRANSLATION * n)), n // 8) for n in images.shape[2:]]
    shifts = generator.choice([-1, 1], (b, dims)) * steps
    return {
        "rotated": affine(images, **(zeros | {"degrees": angle}), spacing=spacing),
        "mirrored": flip(images),
        "noised": (images + 0.03 * noise).clamp(0, 1),
        "recontrasted": images.clamp(0, 1) ** 1.2,
        "cropped": crop(images, np.full((b, dims, 2), 0.08)),
        "moved": torch.from_numpy(
            np.stack([moved(image[0], shift)[None] for image, shift in zip(images.numpy(), shifts, strict=True)])
        ),
    }
