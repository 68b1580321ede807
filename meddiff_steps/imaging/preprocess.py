"""From any scan to one grid and one intensity scale: the only definition of preprocessing in the workflow.

A volume is interpolated once.  Its target grid has the study's shape and spacing, axes along RAS+ world space,
and sits on the centre of the image or of its foreground.  Along an axis of a scan that lies along the world axes
and already has the study's spacing the grid snaps to the voxels, so that the scan is cropped or padded, not blurred.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image as PilImage
from scipy import ndimage, sparse
from tqdm import tqdm

from meddiff_steps.config import Preprocess
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.reading import Image, ScanError, read_image
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn

logger = logging.getLogger(__name__)

#: Columns of a quality table.  `status` is "ok" or "left out"; `reason` is short and countable, `message` is the full
#: sentence; `shape`, `spacing_mm`, `target_affine` (16 numbers, row by row) are JSON; `cut_off_share` is the share of
#: foreground outside the target grid.
QC_COLUMNS = {
    "scan_id": "string",
    "path": "string",
    "status": "string",
    "reason": "string",
    "message": "string",
    "shape": "string",
    "spacing_mm": "string",
    "orientation": "string",
    "target_affine": "string",
    "percentile_low": "float64",
    "percentile_high": "float64",
    "cut_off_share": "float64",
}

#: Share of a scan's foreground outside the grid from which on it is worth a warning.
NOTEWORTHY_CUT = 0.01
#: Displacement (voxels of the scan) anywhere in the target grid below which two grids count as the same.
SNAP_TOLERANCE = 0.05
#: A voxel belongs to a grid when its centre is within the grid's outer voxel faces; rounding must not decide.
_FACE = 0.5 + 1e-3


def preprocess_image(
    path: Path, config: Preprocess, mask_path: Path | None = None, sha256: str | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Bring one scan to the study's grid and intensity scale.

    Parameters
    ----------
    path
        The scan.
    config
        The study's `preprocess` section.
    mask_path
        Brain mask (above 0 is inside) of the same subject in the same world space; voxels outside become 0.
    sha256
        Of the scan when the cohort was read.

    Returns
    -------
    image
        float32 (1, *config.shape) in [0, 1].  3D axes: left-right, posterior-anterior, inferior-superior (RAS+).
    facts
        The columns of `QC_COLUMNS` except `scan_id`.

    Raises
    ------
    ScanError
        The scan or its mask cannot be used, or the scan was changed.
    """
    path = Path(path)
    scan = read_image(path, sha256=sha256)
    wanted = len(config.shape)
    if scan.array.ndim != wanted:
        remedy = "Leave it out of the cohort, or give preprocess.shape as many numbers as the images have axes."
        raise ScanError(path, "wrong dimension", f"a {scan.array.ndim}D image in a {wanted}D study. {remedy}")
    facts: dict[str, Any] = {
        "path": str(path),
        "status": "ok",
        "reason": None,
        "message": None,
        "shape": json.dumps(scan.array.shape),
        "spacing_mm": None,
        "orientation": None,
        "target_affine": None,
    }
    if mask_path is not None:
        scan = _apply_mask(path, scan, Path(mask_path))
    foreground = _foreground(path, scan.array, config)
    if (
        foreground.size > 1 and scan.array.min() < 0
    ):  # an image around 0, for example z-scores: background must be its darkest value, not grey
        scan = Image(np.where(foreground, scan.array, scan.array.min()), scan.affine)
    if scan.affine is None:
        image, inside, counted, kept = _fit_picture(scan.array, foreground, config)
    else:
        facts["spacing_mm"] = json.dumps([round(float(s), 6) for s in nib.affines.voxel_sizes(scan.affine)])
        facts["orientation"] = "".join(nib.orientations.aff2axcodes(scan.affine))
        image, inside, counted, kept, target = _fit_volume(scan, foreground, config)
        facts["target_affine"] = json.dumps([round(float(v), 6) + 0.0 for v in target.ravel()])
    facts["cut_off_share"] = 1.0 - kept
    image, facts["percentile_low"], facts["percentile_high"] = _normalise(path, image, inside, counted, config)
    return image[np.newaxis], facts


# ------------------------------------------------------------------------------------------ foreground and mask


def _foreground(path: Path, array: np.ndarray, config: Preprocess) -> np.ndarray:
    """Bool array, True where the scan counts; a single True that broadcasts when everything does."""
    if config.foreground == "all":
        return np.ones((1,) * array.ndim, dtype=bool)
    foreground = array != 0
    if not foreground.any():
        raise ScanError(
            path, "no foreground", "every voxel is 0 inside the mask. Check that the mask belongs to this scan."
        )
    return foreground


def _apply_mask(path: Path, scan: Image, mask_path: Path) -> Image:
    mask = read_image(mask_path, allow_constant=True)
    if mask.array.ndim != scan.array.ndim:
        raise ScanError(
            path,
            "mask does not fit",
            f"the mask {mask_path} is {mask.array.ndim}D, the scan {scan.array.ndim}D. Correct preprocess.brain_mask.",
        )
    inside = mask.array > 0
    if scan.affine is not None and mask.affine is not None:
        to_mask = np.linalg.inv(mask.affine) @ scan.affine
        if inside.shape != scan.array.shape or not np.allclose(to_mask, np.eye(4), atol=1e-3):
            inside = (
                ndimage.affine_transform(
                    inside.astype(np.uint8), to_mask[:3, :3], to_mask[:3, 3], output_shape=scan.array.shape, order=0
                )
                > 0
            )
    elif inside.shape != scan.array.shape:
        found, expected = ("x".join(map(str, a.shape)) for a in (inside, scan.array))
        raise ScanError(
            path,
            "mask does not fit",
            f"the mask {mask_path} has {found} pixels, the scan {expected}. Correct preprocess.brain_mask.",
        )
    if not inside.any():
        raise ScanError(
            path,
            "empty mask",
            f"the mask {mask_path} covers no voxel of the scan. Make it again, or check that both lie in the same"
            " space.",
        )
    return Image(np.where(inside, scan.array, np.float32(0)), scan.affine)


def _centre(foreground: np.ndarray, shape: tuple[int, ...], config: Preprocess) -> np.ndarray:
    """Index (fractional) of the point that the grid is centred on."""
    middle = (np.array(shape) - 1) / 2
    if config.center == "image" or foreground.size == 1:
        return middle
    others = [tuple(other for other in range(foreground.ndim) if other != axis) for axis in range(foreground.ndim)]
    occupied = [np.flatnonzero(foreground.any(axis=other)) for other in others]
    return np.array([(found[0] + found[-1]) / 2 for found in occupied])


# -------------------------------------------------------------------------------------------------- volumes


def _fit_volume(
    scan: Image, foreground: np.ndarray, config: Preprocess
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
    """Resample a volume: the image, which of its voxels lie in the scan and in the foreground (both broadcast), share
    of foreground kept, affine (4, 4).
    """
    assert scan.affine is not None and config.spacing_mm is not None
    shape, spacing = config.shape, config.spacing_mm
    to_ras = nib.orientations.io_orientation(scan.affine)
    array = nib.orientations.apply_orientation(scan.array, to_ras)
    affine = scan.affine @ nib.orientations.inv_ornt_aff(to_ras, scan.array.shape)
    if foreground.size > 1:
        foreground = nib.orientations.apply_orientation(foreground, to_ras)

    target = np.diag([spacing, spacing, spacing, 1.0])
    centre = nib.affines.apply_affine(affine, _centre(foreground, array.shape, config))
    target[:3, 3] = centre - spacing * (np.array(shape) - 1) / 2
    to_scan = np.linalg.inv(affine) @ target
    reach = np.array(shape) - 1
    steps = np.diag(to_scan)[:3].copy()
    tilt = np.abs(to_scan[:3, :3] - np.diag(steps)) @ reach
    # Width of the target voxel's point spread beyond the scan's own (Cardoso et al. 2015, scale factor point spread
    # function matching).
    excess = np.maximum((spacing / nib.affines.voxel_sizes(affine)) ** 2 - 1, 0)
    sigmas = np.sqrt(excess / (8 * np.log(2)))

    if tilt.max() < SNAP_TOLERANCE:
        starts = to_scan[:3, 3].copy()
        same = np.abs(steps - 1) * reach < SNAP_TOLERANCE
        steps[same], sigmas[same] = 1, 0
        starts[same] = np.floor(
            starts[same] + 0.5 - 1e-3
        )  # half a voxel goes down, whatever the rounding of the header
        to_scan = np.diag([*steps, 1.0])
        to_scan[:3, 3] = starts
        target[:3, 3] = nib.affines.apply_affine(affine, starts)
        image = _resample_separable(array, starts, steps, sigmas, shape)
    else:
        smooth = ndimage.gaussian_filter(array, sigmas, mode="nearest") if sigmas.max() > 0 else array
        image = ndimage.affine_transform(
            smooth, to_scan[:3, :3], to_scan[:3, 3], output_shape=shape, order=1, mode="nearest", output=np.float32
        )
    inside = _inside(to_scan, shape, array.shape)
    kept = foreground & _inside(np.linalg.inv(to_scan), array.shape, shape)
    share = (
        np.count_nonzero(kept) / np.count_nonzero(foreground)
        if foreground.size > 1
        else float(np.broadcast_to(kept, array.shape).mean())
    )
    return image, inside, inside & _nearest(foreground, to_scan, shape), share, target


def _nearest(foreground: np.ndarray, to_scan: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The foreground on the target grid by nearest neighbour: smoothing makes neighbours of the foreground nonzero,
    which must not count.
    """
    if foreground.size == 1:
        return foreground
    steps, starts = np.diag(to_scan)[:3], to_scan[:3, 3]
    if np.array_equal(to_scan[:3, :3], np.diag(steps)):
        index = [
            np.clip(np.rint(starts[k] + steps[k] * np.arange(shape[k])).astype(np.int64), 0, foreground.shape[k] - 1)
            for k in range(3)
        ]
        return foreground[np.ix_(*index)]
    return (
        ndimage.affine_transform(
            foreground.astype(np.uint8), to_scan[:3, :3], starts, output_shape=shape, order=0, mode="nearest"
        )
        > 0
    )


def _inside(matrix: np.ndarray, source: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
    """Which voxels of grid `source` fall into grid `target` under the index map `matrix` (4, 4); bool, broadcasts to
    `source`.
    """
    result = np.ones((1, 1, 1), dtype=bool)
    index = np.ogrid[tuple(slice(n) for n in source)]
    for row, size in zip(matrix[:3], target, strict=True):
        position: np.ndarray = np.full((1, 1, 1), row[3], dtype=np.float32)
        for slope, axis in zip(row[:3], index, strict=True):
            if abs(slope) > 1e-9:  # an axis that does not matter stays of length 1: aligned grids cost nothing
                position = position + np.float32(slope) * axis.astype(np.float32)
        result = result & (position >= -_FACE) & (position <= size - 1 + _FACE)
    return result


def _resample_separable(
    array: np.ndarray, starts: np.ndarray, steps: np.ndarray, sigmas: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Smooth, interpolate linearly and crop axis by axis, at start + step * index; the same operator as the oblique
    case, 10 x faster.
    """
    for axis in range(3):
        operator = _axis_operator(array.shape[axis], starts[axis] + steps[axis] * np.arange(shape[axis]), sigmas[axis])
        front = np.moveaxis(array, axis, 0)
        # A sparse product adds in one fixed order; BLAS does not, and its result would depend on the number of threads.
        result = operator @ front.reshape(front.shape[0], -1)
        array = np.moveaxis(result.reshape(-1, *front.shape[1:]), 0, axis)
    return array


def _axis_operator(size: int, positions: np.ndarray, sigma: float) -> sparse.csr_array:
    """Matrix (len(positions), size), float32: a Gaussian of `sigma` voxels, then linear interpolation; rows of 0
    outside the scan.
    """
    inside = (positions >= -_FACE) & (positions <= size - 1 + _FACE)
    clipped = np.clip(positions, 0, size - 1)
    lower = np.minimum(clipped.astype(np.int64), size - 2)
    weight = clipped - lower
    rows = np.arange(len(positions))
    values = np.concatenate([(1 - weight) * inside, weight * inside])
    linear = sparse.csr_array(
        (values, (np.concatenate([rows, rows]), np.concatenate([lower, lower + 1]))), shape=(len(positions), size)
    )
    if sigma > 0:
        linear = sparse.csr_array(linear @ ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, mode="nearest"))
    linear.eliminate_zeros()
    return linear.astype(np.float32)


# ------------------------------------------------------------------------------------------------- pictures


def _fit_picture(
    array: np.ndarray, foreground: np.ndarray, config: Preprocess
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Scale a picture until it just covers the target, and cut the rest off; triangle filter, as wide as a target
    pixel.

    Returns the image, which of its pixels lie in the picture (all) and in the foreground, and the share of foreground
    kept.
    """
    size, shape = np.array(array.shape), np.array(config.shape)
    scale = float((shape / size).max())
    extent = np.minimum(shape / scale, size)
    start = np.clip(_centre(foreground, array.shape, config) + 0.5 - extent / 2, 0, size - extent)
    if scale == 1:
        start = np.floor(start)
    stop = start + extent
    box = (float(start[1]), float(start[0]), float(stop[1]), float(stop[0]))
    to = (int(shape[1]), int(shape[0]))
    image = np.asarray(
        PilImage.fromarray(np.ascontiguousarray(array)).resize(to, PilImage.Resampling.BILINEAR, box=box),
        dtype=np.float32,
    )
    counted = foreground
    if foreground.size > 1:
        counted = (
            np.asarray(PilImage.fromarray(foreground.astype(np.uint8)).resize(to, PilImage.Resampling.NEAREST, box=box))
            > 0
        )
    rows, columns = (np.arange(n) + 0.5 for n in array.shape)
    kept = ((rows >= start[0]) & (rows <= stop[0]))[:, np.newaxis] & ((columns >= start[1]) & (columns <= stop[1]))
    share = (
        np.count_nonzero(foreground & kept) / np.count_nonzero(foreground)
        if foreground.size > 1
        else float(kept.mean())
    )
    return image, np.ones((1, 1), dtype=bool), counted, share


# ------------------------------------------------------------------------------------------------ intensity


def _normalise(
    path: Path, image: np.ndarray, inside: np.ndarray, counted: np.ndarray, config: Preprocess
) -> tuple[np.ndarray, float, float]:
    """Percentiles over `counted` on the target grid to 0 and 1, clipped; padding to 0."""
    values = image[np.broadcast_to(counted, image.shape)]
    if not values.size:
        raise ScanError(
            path,
            "no foreground",
            "nothing of the scan lies in the target grid. Set preprocess.center: foreground, or enlarge"
            " preprocess.shape.",
        )
    low, high = (float(v) for v in np.percentile(values, config.percentiles))
    if not low < high:
        found = (
            f"percentiles {config.percentiles[0]:g} and {config.percentiles[1]:g} of the foreground are both {low:g}"
        )
        raise ScanError(
            path,
            "no contrast",
            f"{found}, expected a range of grey values. Check the scan, or widen preprocess.percentiles.",
        )
    scaled = np.clip((image - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.where(inside, scaled, np.float32(0)).astype(np.float32), low, high


# --------------------------------------------------------------------------------------------------- shards


def preprocess_shard(rows: pd.DataFrame, config: Preprocess, out: Path, threads: int = 1) -> pd.DataFrame:
    """Preprocess scans and write them as one shard, in the order of `scan_id`.

    Parameters
    ----------
    rows
        Manifest rows; `scan_id` and `path` are read, `sha256` if it is there, and `subject_id`, `session_id` when there
        is a mask pattern.
    config
        The study's `preprocess` section.
    out
        Shard to write: `scan_id`, `image` float16 (1, *config.shape) in [0, 1].  The bytes do not depend on `threads`.
    threads
        Worker processes; each holds one scan at a time.

    Returns
    -------
    DataFrame
        `QC_COLUMNS`, a row per scan in the same order.  Scans that cannot be used are left out of the shard and say why here.

    Raises
    ------
    UserError
        The mask pattern names an unknown field, or a worker was killed.
    """
    rows = rows.sort_values("scan_id")
    tasks = [
        (str(row["scan_id"]), Path(str(row["path"])), config, _mask_path(row, config), row.get("sha256"))
        for row in rows.to_dict("records")
    ]
    table = []
    with ShardWriter(out, {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *config.shape))}) as shard:
        results = _in_order(_attempt, tasks, threads)
        for image, facts in tqdm(
            results, total=len(tasks), desc="preprocess", unit="scan", mininterval=5, file=sys.stderr
        ):
            if image is None:
                logger.warning("left out %s: %s", facts["scan_id"], facts["message"])
            else:
                shard.append(scan_id=facts["scan_id"], image=image)
            table.append(facts)
    return pd.DataFrame(table, columns=list(QC_COLUMNS)).astype(QC_COLUMNS)


def cut_off(quality: pd.DataFrame) -> str | None:
    """How many scans of a quality table lose more than `NOTEWORTHY_CUT` of their foreground at the edge of the grid;
    None if none does.
    """
    cut = quality[quality["cut_off_share"] > NOTEWORTHY_CUT]
    if cut.empty:
        return None
    worst = cut.loc[cut["cut_off_share"].idxmax()]
    return (
        f"{len(cut)} of {(quality['status'] != 'left out').sum()} scans lose more than {NOTEWORTHY_CUT:.0%} of their"
        f" foreground at the edge of the grid, {worst['scan_id']} most ({worst['cut_off_share']:.0%}): the grid of"
        " preprocess.shape and spacing_mm is too small for them, or preprocess.center: foreground would centre it"
        " better."
    )


def _mask_path(row: dict[Any, Any], config: Preprocess) -> Path | None:
    if config.brain_mask is None:
        return None
    fields = {
        name: "" if pd.isna(row.get(name)) else str(row[name]) for name in ("subject_id", "session_id", "scan_id")
    }
    try:
        return Path(config.brain_mask.format_map(fields))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"preprocess.brain_mask: {config.brain_mask!r} cannot be filled in ({error}). Known fields:"
            f" {sorted(fields)} in braces."
        ) from None


Task = tuple[str, Path, Preprocess, Path | None, str | None]


def _attempt(task: Task) -> tuple[np.ndarray | None, dict[str, Any]]:
    """One scan as (float16 image, facts), or (None, facts) with the reason."""
    scan_id, path, config, mask_path, sha256 = task
    try:
        image, facts = preprocess_image(path, config, mask_path, sha256)
    except ScanError as error:
        return None, {
            "scan_id": scan_id,
            "path": str(path),
            "status": "left out",
            "reason": error.reason,
            "message": str(error),
        }
    return image.astype(np.float16), {"scan_id": scan_id, **facts}


def _in_order(function: Callable[[Task], Any], tasks: list[Task], threads: int) -> Iterator[Any]:
    """Results in the order of `tasks`, from worker processes, with a bounded number of results waiting."""
    workers = min(threads, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # spawn, not fork: the parent may hold locks of Arrow's threads.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[Any]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                "preprocess: a worker process was killed, most likely for lack of memory. Give the job more memory or"
                " fewer threads."
            ) from None
        finally:
            for future in waiting:
                future.cancel()
