"""Places in a scan: what is hidden of it, and lesions that are put into it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from meddiff_steps import config
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import filled_in
from meddiff_steps.imaging.reading import Image, read_image
from meddiff_steps.imaging.resampling import box_map, canonical, interpolated, locate

#: Share of a voxel of the study's grid that a finer mask must cover to hide it: what is half covered is no longer what
#: the scan shows.
LEAST_SHARE = 0.25

Facts = Mapping[str, Any] | pd.Series


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: tuple[float, ...]) -> np.ndarray:
    """Voxels of an ellipsoid, bool; centre and radius in voxels along each axis."""
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    parts = [((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radius, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total <= 1.0


def ball_inside(
    foreground: np.ndarray, radius_mm: float, spacing_mm: tuple[float, ...], generator: np.random.Generator
) -> np.ndarray:
    """A ball of this radius around a random place so deep in the foreground that it fits; at the deepest place where it
    fits nowhere.
    """
    depth = ndimage.distance_transform_edt(np.pad(foreground, 1), sampling=spacing_mm)[
        (slice(1, -1),) * foreground.ndim
    ]
    deep = depth > radius_mm
    places = np.argwhere(deep if deep.any() else depth == depth.max())
    centre = tuple(float(c) for c in places[generator.integers(len(places))])
    return ball(foreground.shape, centre, tuple(radius_mm / size for size in spacing_mm)) & foreground


def share_on_grid(
    path: Path, values: Image, facts: Facts, shape: tuple[int, ...], grid: np.ndarray | None
) -> np.ndarray:
    """How much of each voxel of the study's grid a mask covers, float32 in [0, 1].

    Parameters
    ----------
    values
        The mask: above 0 is inside.
    facts
        The scan's row of the quality table.
    grid
        (4, 4) affine of the study's grid in the mask's world; None for pictures.
    """
    inside = (values.array > 0).astype(np.float32)
    if grid is None:
        scan = tuple(int(n) for n in json.loads(facts["shape"]))
        if inside.shape != scan:
            raise UserError(
                f"{path}: a mask of {'x'.join(map(str, inside.shape))} pixels, expected {'x'.join(map(str, scan))}, as"
                " the scan has. Make it on the scan itself."
            )
        return interpolated_picture(inside, facts, shape)
    if values.affine is None or inside.ndim != len(shape):
        raise UserError(f"{path}: {inside.ndim}D, expected a volume as the scan. Give a NIfTI mask of the scan.")
    array, affine, _ = canonical(Image(inside, values.affine))
    return interpolated(array, locate(affine, grid, shape), shape).clip(0, 1)


def interpolated_picture(inside: np.ndarray, facts: Facts, shape: tuple[int, ...]) -> np.ndarray:
    """A picture's mask on the study's grid, by block means."""
    index_map = box_map(json.loads(facts["picture_box"]), shape)
    sigmas = [max(step**2 - 1, 0) ** 0.5 / (8 * np.log(2)) ** 0.5 for step in index_map.steps]
    smooth = ndimage.gaussian_filter(inside, sigmas)
    return ndimage.affine_transform(smooth, index_map.steps, index_map.starts, shape, order=1).astype(np.float32)


def _grid(facts: Facts) -> np.ndarray | None:
    """The study's grid in the scan's world; None for pictures."""
    if facts.get("picture_box") is not None and not pd.isna(facts["picture_box"]):
        return None
    return np.array(json.loads(facts["target_affine"])).reshape(4, 4)


def hidden_voxels(
    settings: config.Hole,
    scan: Mapping[Any, Any],
    facts: Facts,
    foreground: np.ndarray,
    spacing_mm: tuple[float, ...],
    generator: np.random.Generator,
) -> np.ndarray:
    """What is hidden of a scan, bool (*spatial) on the study's grid.

    Parameters
    ----------
    scan, facts
        Its rows of the manifest and of the quality table.
    foreground
        Voxels of the head, bool.
    generator
        Of the place of a ball.

    Raises
    ------
    UserError
        A file is not there, or does not fit; there is no such label; nothing is hidden, or everything.
    """
    if settings.ball_mm is not None:
        return ball_inside(foreground, settings.ball_mm / 2, spacing_mm, generator)
    if settings.box:
        hidden = np.zeros(foreground.shape, dtype=bool)
        hidden[tuple(slice(low, high) for low, high in settings.box)] = True
        return checked(hidden, f"inpainting.hole.box of {scan['scan_id']}")
    assert settings.file is not None, "the rule asks for a hole"
    path = filled_in(settings.file, scan, "inpainting.hole.file")
    values = read_image(path, allow_constant=True, labels=True)
    if settings.labels:
        there = np.unique(values.array)
        absent = [label for label in settings.labels if label not in there]
        if absent:
            found = [int(v) for v in there[there > 0]]
            raise UserError(f"{path}: has no label {absent[0]}, only {found[:20]}. Correct inpainting.hole.labels.")
        values = Image(np.isin(values.array, settings.labels).astype(np.uint8), values.affine)
    elif not (values.array > 0).any():
        raise UserError(f"{path}: the mask is empty, so nothing is hidden. Leave the scan out, or correct the file.")
    hidden = share_on_grid(path, values, facts, foreground.shape, _grid(facts)) >= LEAST_SHARE
    if not hidden.any():
        raise UserError(
            f"{path}: covers no voxel of the study's grid. It lies beyond the grid, in another space than the scan, or"
            " is smaller than its voxels; look at both, one over the other, or raise inpainting.hole.grow_mm."
        )
    if settings.grow_mm:
        hidden = ndimage.distance_transform_edt(~hidden, sampling=spacing_mm) <= settings.grow_mm
    return checked(hidden, str(path))


def checked(hidden: np.ndarray, origin: str) -> np.ndarray:
    """The mask as it is.

    Raises
    ------
    UserError
        It hides everything.
    """
    if hidden.all():
        raise UserError(f"{origin}: hides every voxel of the grid, so nothing is left to go by. Hide less.")
    return hidden


def mask_of_scan(pattern: str, scan: Mapping[Any, Any], facts: Facts, key: str) -> np.ndarray:
    """A mask on the scan's own grid, bool; it may be empty.

    Parameters
    ----------
    pattern
        Of its path, filled in with the scan's row of the manifest.
    facts
        The scan's row of the quality table.
    key
        Of the study, for messages.

    Raises
    ------
    UserError
        There is no such file, or it is on another grid than the scan.
    """
    return _mask(pattern, scan, facts, key)[1].array > 0


def mask_on_grid(pattern: str, scan: Mapping[Any, Any], facts: Facts, shape: tuple[int, ...], key: str) -> np.ndarray:
    """The same on the study's grid: how much of each voxel it covers, float32 (*shape)."""
    return share_on_grid(*_mask(pattern, scan, facts, key), facts, shape, _grid(facts))


def _mask(pattern: str, scan: Mapping[Any, Any], facts: Facts, key: str) -> tuple[Path, Image]:
    path = filled_in(pattern, scan, key)
    image = read_image(path, allow_constant=True, labels=True)
    shape = tuple(int(n) for n in json.loads(facts["shape"]))
    if image.array.shape != shape:
        found, expected = ("x".join(map(str, n)) for n in (image.array.shape, shape))
        raise UserError(
            f"{path}: a mask of {found} voxels, expected {expected}, as {scan['scan_id']} has ({key}). Give a mask that"
            " was drawn on the scan itself, or resample it to the scan's grid."
        )
    if _grid(facts) is not None:
        own = np.array(json.loads(facts["scan_affine"])).reshape(4, 4)
        if image.affine is None or not np.allclose(image.affine, own, atol=1e-3):
            raise UserError(
                f"{path}: lies elsewhere than {scan['scan_id']}: its affine is another ({key}). Give a mask that was"
                " drawn on the scan itself, or resample it to the scan's grid."
            )
    return path, image


def lesion(
    settings: config.Lesions,
    number: int,
    facts: Facts,
    foreground: np.ndarray,
    spacing_mm: tuple[float, ...],
    generator: np.random.Generator,
    key: str,
) -> np.ndarray:
    """A lesion of a scan: how much of each voxel it fills, float32 in [0, 1], (*spatial).

    Parameters
    ----------
    number
        Of the scan: scans get the masks of the folder in turn.
    key
        Section of the study, for messages.

    Raises
    ------
    UserError
        There are no masks, or one lies beside the head.
    """
    if settings.masks is None:
        assert settings.diameter_mm is not None, "the caller asks whether there are lesions"
        return ball_inside(foreground, settings.diameter_mm / 2, spacing_mm, generator).astype(np.float32)
    pattern = Path(settings.masks)
    files = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not files:
        raise UserError(f"{key}.lesions.masks: {pattern} is no file. Name some, with * for what differs.")
    path = files[number % len(files)]
    target, pose = (
        np.array(json.loads(facts[name])).reshape(4, 4) for name in ("target_affine", "registration_matrix")
    )
    mask = read_image(path, allow_constant=True, labels=True)
    share = share_on_grid(path, mask, facts, foreground.shape, np.linalg.inv(pose) @ target)
    share = share * foreground
    if share.max() < LEAST_SHARE:
        raise UserError(f"{path}: covers no voxel of the head. Is it in the space of the study's template?")
    return share.astype(np.float32)


def with_lesion(image: np.ndarray, share: np.ndarray, contrast: float) -> np.ndarray:
    """The image (*spatial) with a lesion's grey value added, in [0, 1]."""
    return np.clip(image + contrast * share, 0.0, 1.0).astype(image.dtype)
