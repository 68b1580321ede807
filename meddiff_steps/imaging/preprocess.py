"""From any scan to one grid and one intensity scale: the only definition of preprocessing in the workflow.

A volume is interpolated once.  Its target grid has the study's shape and spacing, axes along RAS+ world space,
and sits on the centre of the image or of its foreground.  Along an axis of a scan that lies along the world axes
and already has the study's spacing the grid snaps to the voxels, so that the scan is cropped or padded, not blurred.
Where the study registers its scans (`imaging.registration`) the grid lies along the axes of a template, in its middle.

What a study asks for is done in this order: the brain is taken out (`brain_extraction`, or its mask), the background
told, the field of the coil divided out (`bias_field`), the head registered, all on the scan's own voxels; then the one
interpolation, and grey levels to [0, 1].

The channels of a scan (`imaging.channels`) come to the same grid; `imaging.restoration` is the way back.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa
from tqdm import tqdm

from meddiff_steps.cohort.decisions import EXCLUDED
from meddiff_steps.config import Preprocess
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.background import BACKGROUND_COLUMNS, background_of, head_of
from meddiff_steps.imaging.bias_field import BIAS_FIELD_COLUMNS, corrected
from meddiff_steps.imaging.brain_extraction import EXTRACTION_COLUMNS, extracted
from meddiff_steps.imaging.channels import (
    channel_columns,
    channel_facts,
    channel_paths,
    filled_in,
    preprocess_channel,
)
from meddiff_steps.imaging.intensity import normalise
from meddiff_steps.imaging.masks import MASK_COLUMNS, mask_on, millilitres, on_head
from meddiff_steps.imaging.reading import Image, ScanError, as_volume, read_image
from meddiff_steps.imaging.registration import REGISTRATION_COLUMNS, Pose, load_template, register
from meddiff_steps.imaging.resampling import (
    Placement,
    box_map,
    canonical,
    inside,
    interpolated,
    locate,
    nearest,
    place,
    scaled_picture,
)
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.imaging.skull import SKULL_COLUMNS, skull_facts

logger = logging.getLogger(__name__)

#: Columns of a quality table; `channel_facts` has those of a study's channels.  `status` is "ok" or "left out";
#: `reason` is short and countable, `message` is the full sentence; `shape`, `spacing_mm`, `scan_affine`,
#: `target_affine` (16 numbers, row by row; mm, RAS+) and `picture_box` (of pictures: top, left, bottom, right edge of
#: the grid in pixels of the picture) are JSON; `cut_off_share` is the share of foreground outside the target grid.
#: The target grid of a registered scan is turned, in the scan's world.
QC_COLUMNS = {
    "scan_id": "string",
    "path": "string",
    "status": "string",
    "reason": "string",
    "message": "string",
    "shape": "string",
    "spacing_mm": "string",
    "orientation": "string",
    "scan_affine": "string",
    "two_spaces": "string",
    "target_affine": "string",
    "picture_box": "string",
    "percentile_low": "float64",
    "percentile_high": "float64",
    "cut_off_share": "float64",
    **BACKGROUND_COLUMNS,
    **MASK_COLUMNS,
    **EXTRACTION_COLUMNS,
    **SKULL_COLUMNS,
    **BIAS_FIELD_COLUMNS,
    **REGISTRATION_COLUMNS,
}

#: Share of a scan's foreground outside the grid from which on it is worth a warning.
NOTEWORTHY_CUT = 0.01


class CoreSeconds(dict[str, float]):
    """Seconds of a core by stage of preprocessing: `with seconds("grid"): ...` adds."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = process_time()
        try:
            yield
        finally:
            self[stage] = self.get(stage, 0.0) + process_time() - start


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
        The scan or its mask cannot be used, the scan was changed, or it cannot be registered.
    UserError
        The template of the registration cannot be used.
    """
    image, facts, *_ = _preprocess(Path(path), config, mask_path, sha256, CoreSeconds())
    return image, facts


def preprocess_scan(
    path: Path,
    config: Preprocess,
    mask_path: Path | None = None,
    sha256: str | None = None,
    channels: Mapping[str, Path] | None = None,
    seconds: CoreSeconds | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Bring one scan and its channels to the study's grid.

    Parameters
    ----------
    path, config, mask_path, sha256
        As of `preprocess_image`.
    channels
        The file of each channel of the config.
    seconds
        Is given what each stage took.

    Returns
    -------
    arrays
        `image` as of `preprocess_image`, and an array per channel as of `preprocess_channel`, under its name.
    facts
        The columns of `QC_COLUMNS` except `scan_id`, and those of `channel_facts`.

    Raises
    ------
    ScanError
        The scan, its mask or a channel cannot be used, the scan was changed, or it cannot be registered.
    UserError
        The template of the registration cannot be used.
    """
    seconds = CoreSeconds() if seconds is None else seconds
    image, facts, placement, head, mask = _preprocess(Path(path), config, mask_path, sha256, seconds)
    arrays = {"image": image}
    with seconds("channels"):
        for name, file in (channels or {}).items():
            arrays[name], found = preprocess_channel(name, Path(file), placement, config, mask, head)
            facts |= found
    return arrays, facts


def _preprocess(
    path: Path, config: Preprocess, mask_path: Path | None, sha256: str | None, seconds: CoreSeconds
) -> tuple[np.ndarray, dict[str, Any], Placement, Image | None, tuple[Path, Image] | None]:
    """Image and facts as of `preprocess_image`, where the grid lies, the head where masks or labels are to lie on it,
    and the mask if there is one.
    """
    with seconds("reading"):
        scan = as_volume(path, read_image(path, sha256=sha256, colour=config.colour), config.depth)
    wanted = len(config.shape)
    if scan.array.ndim != wanted:
        remedy = "Leave it out of the cohort, or give preprocess.shape as many numbers as the images have axes."
        raise ScanError(path, "wrong dimension", f"a {scan.array.ndim}D image in a {wanted}D study. {remedy}")
    facts: dict[str, Any] = dict.fromkeys(name for name in QC_COLUMNS if name != "scan_id")
    facts |= {"path": str(path), "status": "ok", "shape": json.dumps(scan.array.shape)}
    mask = None
    if mask_path is not None:
        found_mask = read_image(mask_path, allow_constant=True, labels=True)
        mask = (Path(mask_path), as_volume(mask_path, found_mask, config.depth))
    if config.brain_extraction is not None:
        with seconds("brain extraction"):
            brain, found = extracted(path, scan, config.foreground)
        facts |= found
        mask = None if brain is None else (path, brain)
    drawn_on = mask is not None or any(c.kind != "contrast" for c in config.channels.values())
    head = head_of(scan, config.foreground) if drawn_on and config.depth is None else None  # no picture is a head
    inside = None
    if mask is not None:
        inside = mask_on(path, scan, mask[1], mask[0])
        if scan.affine is not None and inside.all():
            raise ScanError(
                path,
                "mask leaves nothing out",
                f"the mask {mask[0]} covers every voxel of the scan, expected a brain without what is around it. Make"
                " it again, or leave preprocess.brain_mask out.",
            )
        facts |= {"mask_ml": millilitres(mask[1]), "mask_on_head": on_head(path, head, mask[1], mask[0])}
    background = background_of(path, scan, config.foreground, inside, config.window)
    facts |= background.facts()
    if config.bias_field is not None:
        with seconds("bias field"):
            scan, found = corrected(path, scan, background.foreground)
        facts |= found
    foreground, scan = background.foreground, background.darkened(scan)
    if config.depth is None:
        with seconds("skull"):
            facts |= skull_facts(scan, config.foreground)
    if scan.affine is None:
        image, covered, counted, kept, placement = _fit_picture(scan.array, foreground, config)
        facts["picture_box"] = json.dumps(placement.box)
    else:
        facts["spacing_mm"] = json.dumps([round(float(s), 6) for s in nib.affines.voxel_sizes(scan.affine)])
        facts["two_spaces"] = scan.two_spaces
        facts["orientation"] = "".join(nib.orientations.aff2axcodes(scan.affine))
        # To the last bit: what is restored has the scan's affine, not one that is nearly so.
        facts["scan_affine"] = json.dumps([float(v) for v in scan.affine.ravel()])
        pose = None
        if config.registration is not None:
            template = load_template(config.registration.template)
            with seconds("registration"):
                pose = register(path, scan, foreground, config.registration, template)
            facts |= pose.facts(template)
        with seconds("grid"):
            image, covered, counted, kept, placement = _fit_volume(scan, foreground, config, pose)
        assert placement.target is not None, "a volume has an affine"
        facts["target_affine"] = json.dumps([round(float(v), 6) + 0.0 for v in placement.target.ravel()])
    facts["cut_off_share"] = 1.0 - kept
    image, facts["percentile_low"], facts["percentile_high"] = normalise(
        path, image, covered, counted, config.percentiles, config.window
    )
    return image[np.newaxis], facts, placement, head, mask


# ------------------------------------------------------------------------------------------------- geometry


def _centre(foreground: np.ndarray, shape: tuple[int, ...], config: Preprocess) -> np.ndarray:
    """Index (fractional) of the point that the grid is centred on."""
    middle = (np.array(shape) - 1) / 2
    if config.center == "image" or foreground.size == 1:
        return middle
    others = [tuple(other for other in range(foreground.ndim) if other != axis) for axis in range(foreground.ndim)]
    occupied = [np.flatnonzero(foreground.any(axis=other)) for other in others]
    return np.array([(found[0] + found[-1]) / 2 for found in occupied])


def _fit_volume(
    scan: Image, foreground: np.ndarray, config: Preprocess, pose: Pose | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, Placement]:
    """Resample a volume: the image, which of its voxels lie in the scan and in the foreground (both broadcast), share
    of foreground kept, and where the grid lies (turned as the template is, where there is a pose).
    """
    assert scan.affine is not None and config.voxel_mm is not None
    shape, spacing = config.shape, config.voxel_mm
    array, affine, to_ras = canonical(scan)
    if foreground.size > 1:
        foreground = nib.orientations.apply_orientation(foreground, to_ras)
    if pose is not None:
        target = pose.grid(shape, spacing)
        index_map = locate(affine, target, shape, sharp=True)
    else:
        target = np.diag([*spacing, 1.0])
        centre = nib.affines.apply_affine(affine, _centre(foreground, array.shape, config))
        target[:3, 3] = centre - np.array(spacing) * (np.array(shape) - 1) / 2
        index_map, target = place(affine, target, shape)
    index_map = index_map.by(config.interpolation)
    image = interpolated(array, index_map, shape)
    covered = inside(index_map.matrix, shape, array.shape)
    kept = foreground & inside(np.linalg.inv(index_map.matrix), array.shape, shape)
    share = (
        np.count_nonzero(kept) / np.count_nonzero(foreground)
        if foreground.size > 1
        else float(np.broadcast_to(kept, array.shape).mean())
    )
    counted = covered & nearest(foreground, index_map.matrix, shape)
    placement = Placement(
        shape, target, None, scan.array.shape, affine, index_map, pose is not None, config.interpolation
    )
    return image, covered, counted, share, placement


def _fit_picture(
    array: np.ndarray, foreground: np.ndarray, config: Preprocess
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, Placement]:
    """Scale a picture until it just covers the target, and cut the rest off.

    Returns what `_fit_volume` does; all of the grid's pixels lie in the picture.
    """
    size, shape = np.array(array.shape), np.array(config.shape)
    scale = float((shape / size).max())
    extent = np.minimum(shape / scale, size)
    start = np.clip(_centre(foreground, array.shape, config) + 0.5 - extent / 2, 0, size - extent)
    if scale == 1:
        start = np.floor(start)
    stop = start + extent
    box = (float(start[0]), float(start[1]), float(stop[0]), float(stop[1]))
    image, counted = scaled_picture(array, foreground, box, config.shape, config.interpolation)
    rows, columns = (np.arange(n) + 0.5 for n in array.shape)
    kept = ((rows >= start[0]) & (rows <= stop[0]))[:, np.newaxis] & ((columns >= start[1]) & (columns <= stop[1]))
    share = (
        np.count_nonzero(foreground & kept) / np.count_nonzero(foreground)
        if foreground.size > 1
        else float(kept.mean())
    )
    return (
        image,
        np.ones((1, 1), dtype=bool),
        counted,
        share,
        Placement(config.shape, None, box, array.shape, None, box_map(box, config.shape)),
    )


# --------------------------------------------------------------------------------------------------- shards


def preprocess_shard(
    rows: pd.DataFrame, config: Preprocess, out: Path, threads: int = 1, excluded: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Preprocess scans and write them as one shard, in the order of `scan_id`.

    Parameters
    ----------
    rows
        Manifest rows; `scan_id` and `path` are read, `sha256` if it is there, and `subject_id`, `session_id` when there
        is a mask pattern or a channel.
    config
        The study's `preprocess` section.
    out
        Shard to write: `scan_id`, `image` float16 (1, *config.shape) in [0, 1], and a column per channel as of
        `preprocess_channel`.  The bytes do not depend on `threads`.
    threads
        Worker processes; each holds one scan at a time.
    excluded
        Scans that a person excluded, with a note on each: they are left out unread.

    Returns
    -------
    DataFrame
        `QC_COLUMNS` and the columns of `channel_facts`, a row per scan in the same order.  Scans that cannot be used
        are left out of the shard and say why here.

    Raises
    ------
    UserError
        A pattern names an unknown field, a channel has the name of another column, the template of the registration
        cannot be used, or a worker was killed.
    """
    columns = {
        "scan_id": pa.string(),
        "image": TensorColumn("float16", (1, *config.shape)),
        **channel_columns(config),
    }
    by_hand = rows["scan_id"].isin(list(excluded or {}))
    tasks = [_task(row, config) for row in rows[~by_hand].sort_values("scan_id").to_dict("records")]
    table: list[dict[str, Any]] = [_excluded(row, excluded or {}) for row in rows[by_hand].to_dict("records")]
    took = CoreSeconds()
    with ShardWriter(out, columns) as shard:
        results = _in_order(_attempt, tasks, threads)
        for arrays, facts, seconds in tqdm(
            results, total=len(tasks), desc="preprocess", unit="scan", mininterval=5, file=sys.stderr
        ):
            if arrays is None:
                logger.warning("left out %s: %s", facts["scan_id"], facts["message"])
            else:
                shard.append(scan_id=facts["scan_id"], **arrays)
            table.append(facts)
            for stage, number in seconds.items():
                took[stage] = took.get(stage, 0.0) + number
    if tasks:
        means = ", ".join(f"{stage} {number / len(tasks):.2f}" for stage, number in took.items())
        logger.info("seconds of a core per scan: %s", means)
    known = QC_COLUMNS | channel_facts(config)
    return pd.DataFrame(table, columns=list(known)).astype(known).sort_values("scan_id", ignore_index=True)


def _excluded(row: dict[Any, Any], notes: Mapping[str, str]) -> dict[str, Any]:
    """Facts of a scan that a person excluded."""
    scan_id, path = str(row["scan_id"]), str(row["path"])
    note = notes[scan_id]
    message = f"{path}: {EXCLUDED}{f' ({note})' if note else ''}. Take its row out of qc.tsv to bring it back."
    return {"scan_id": scan_id, "path": path, "status": "left out", "reason": EXCLUDED, "message": message}


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


def other_spaces(quality: pd.DataFrame) -> str | None:
    """How many scans of a quality table have a sform of another space than their qform, in words; None if none has."""
    found = quality[quality["two_spaces"].notna()]
    if found.empty:
        return None
    first = found.iloc[0]
    return (
        f"{len(found)} of {(quality['status'] != 'left out').sum()} scans have a sform of another space than their"
        f" qform, and the sform is used: {first['scan_id']}, whose {first['two_spaces']}, first"
    )


@dataclass(frozen=True)
class _Task:
    """What a worker needs to preprocess one scan."""

    scan_id: str
    path: Path
    config: Preprocess
    mask_path: Path | None
    sha256: str | None
    channels: dict[str, Path]


def _task(row: dict[Any, Any], config: Preprocess) -> _Task:
    pattern = config.brain_mask
    mask_path = None if pattern is None else filled_in(pattern, row, "preprocess.brain_mask")
    channels = channel_paths(row, config)
    return _Task(str(row["scan_id"]), Path(str(row["path"])), config, mask_path, row.get("sha256"), channels)


def _attempt(task: _Task) -> tuple[dict[str, np.ndarray] | None, dict[str, Any], CoreSeconds]:
    """The tensors of one scan as they are stored, and facts; or None and facts with the reason; and what it took."""
    seconds = CoreSeconds()
    try:
        arrays, facts = preprocess_scan(task.path, task.config, task.mask_path, task.sha256, task.channels, seconds)
    except ScanError as error:
        return (
            None,
            {
                "scan_id": task.scan_id,
                "path": str(task.path),
                "status": "left out",
                "reason": error.reason,
                "message": str(error),
            },
            seconds,
        )
    arrays["image"] = arrays["image"].astype(np.float16)
    return arrays, {"scan_id": task.scan_id, **facts}, seconds


def _in_order(function: Callable[[_Task], Any], tasks: list[_Task], threads: int) -> Iterator[Any]:
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
