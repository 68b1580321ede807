"""Named channels: other images of a scan (a second contrast, a mask, a label map) on the scan's own target grid.

Each becomes a column of the shard beside `image`, of the channel's name.  A column says of itself what kind it is, so
that a reader of shards needs no config (`channels_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from meddiff_steps.cohort.identity import SPELLING
from meddiff_steps.config import Channel, Preprocess
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.background import background_of
from meddiff_steps.imaging.intensity import normalise
from meddiff_steps.imaging.masks import mask_on, on_head
from meddiff_steps.imaging.reading import Image, ScanError, as_volume, read_image
from meddiff_steps.imaging.resampling import (
    Placement,
    canonical,
    inside,
    interpolated,
    majority,
    nearest,
    scaled_picture,
)
from meddiff_steps.imaging.shards import Shards, TensorColumn

Kind = Literal["contrast", "mask", "labels"]

#: How each kind is stored.
STORED: dict[Kind, str] = {"contrast": "float16", "mask": "uint8", "labels": "int16"}
#: Columns that every shard has; no channel can have their names.
TAKEN = ("image", "scan_id")
LARGEST_LABEL = int(np.iinfo(np.int16).max)


def channel_columns(config: Preprocess) -> dict[str, TensorColumn]:
    """The columns that a study's channels have in a shard, in the order of the config.

    Raises
    ------
    UserError
        A channel has the name of another column.
    """
    for name in TAKEN:
        if name in config.channels:
            raise UserError(
                f"preprocess.channels.{name}: shards have a column of this name already. Give the channel another name."
            )
    shape = (1, *config.shape)
    return {name: TensorColumn(STORED[channel.kind], shape, channel.kind) for name, channel in config.channels.items()}


def channel_facts(config: Preprocess) -> dict[str, str]:
    """Columns that a study's channels have in its quality table, and their types.

    `channel_NAME_present`: false where an optional channel had no file and was stored as zeros.
    `channel_NAME_percentile_low`, `channel_NAME_percentile_high`, of contrasts: the grey levels that became 0 and 1.
    `channel_NAME_on_head`, of masks and labels: as of `masks.on_head`.
    """
    columns = {}
    for name, channel in config.channels.items():
        columns[f"channel_{name}_present"] = "boolean"
        if channel.kind == "contrast":
            columns |= {f"channel_{name}_percentile_low": "float64", f"channel_{name}_percentile_high": "float64"}
        else:
            columns[f"channel_{name}_on_head"] = "float64"
    return columns


def channels_of(shards: Shards) -> dict[str, Kind]:
    """The channels that shards have beside `image`, and the kind of each, in the order of their columns."""
    kinds = {field.name: (field.metadata or {}).get(b"kind") for field in shards.schema}
    return {name: cast(Kind, kind.decode()) for name, kind in kinds.items() if kind is not None}


def absent_channels(quality: pd.DataFrame) -> str | None:
    """How many usable scans of a quality table lack an optional channel, for each that is lacking; None if
    none is.
    """
    usable = quality[quality["status"] == "ok"]
    marks = [c for c in usable.columns if c.startswith("channel_") and c.endswith("_present")]
    lacking = {c[len("channel_") : -len("_present")]: int((~usable[c].astype(bool)).sum()) for c in marks}
    told = [f"{name} for {count}" for name, count in lacking.items() if count]
    return f"of {len(usable)} usable scans these channels are lacking, stored as 0: {', '.join(told)}" if told else None


def preprocess_channel(
    name: str,
    path: Path,
    placement: Placement,
    config: Preprocess,
    mask: tuple[Path, Image] | None = None,
    head: Image | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Bring one channel of a scan to the scan's target grid.

    Contrasts are treated as the scan is: the brain mask, the same interpolation, percentiles of their own foreground or
    a window of their own; but for the field of the coil, which stays in them.  A mask is 1 where more than half of a
    voxel is above 0 in the file; a voxel of a label map has the label that fills most of it (`majority`).  The brain
    mask cuts neither.

    Parameters
    ----------
    name
        Of the channel, a key of `config.channels`.
    path
        Its file.  A volume may have any affine and shape, in the same world space as the scan; a picture must have as
        many pixels as the scan.
    placement
        Where the grid lies on the scan.
    config
        The study's `preprocess` section.
    mask
        Path and image of the brain mask.
    head
        The scan's, as of `background.head_of`, that masks and labels are to lie on.

    Returns
    -------
    array
        (1, *config.shape): float16 in [0, 1] (contrast), uint8 of 0 and 1 (mask), int16 from 0 (labels); zeros where an
        optional channel has no file.
    facts
        The columns of `channel_facts` of this channel.

    Raises
    ------
    ScanError
        The file is missing and required, or cannot be used; its reason begins with the channel's name.
    """
    channel = config.channels[name]
    present, found = True, dict[str, float | None]()
    try:
        image = _read(name, channel, path, config.colour, config.depth)
        if image is None:
            present, array = False, np.zeros(config.shape)
        else:
            _check_place(path, image, placement, of_pictures=config.depth is not None)
            if channel.kind == "contrast":
                array, low, high = _contrast(path, image, placement, config, channel, mask)
                found = {f"channel_{name}_percentile_low": low, f"channel_{name}_percentile_high": high}
            else:
                found = {f"channel_{name}_on_head": on_head(path, head, image, path)}
                array = _labels(image, placement)
    except ScanError as error:
        raise ScanError(error.path, f"channel {name}: {error.reason}", f"(channel {name}) {error.detail}") from None
    return array[np.newaxis].astype(STORED[channel.kind]), {f"channel_{name}_present": present, **found}


def _read(name: str, channel: Channel, path: Path, colour: str, depth: int | None) -> Image | None:
    """The file, checked against its kind; None where there may be none and is none."""
    labels = channel.kind != "contrast"
    try:
        image = as_volume(path, read_image(path, allow_constant=labels, labels=labels, colour=colour), depth)
    except ScanError as error:
        if error.reason != "missing file":
            raise
        if not channel.required:
            return None
        remedy = (
            f"Correct preprocess.channels.{name}.path, or set required: false, which stores zeros where there is none."
        )
        raise ScanError(path, error.reason, f"no such file. {remedy}") from None
    if channel.kind == "mask":
        return Image((image.array > 0).astype(np.uint8), image.affine)
    return Image(_whole(path, image.array), image.affine) if labels else image


def _whole(path: Path, values: np.ndarray) -> np.ndarray:
    """Labels as int16."""
    between = values != np.rint(values)
    if between.any():
        raise ScanError(
            path,
            "not whole numbers",
            f"values between whole numbers, for example {values[between][0]:g}, expected labels. Give the label map as"
            " it was before it was interpolated, or declare it as kind: contrast.",
        )
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > LARGEST_LABEL:
        raise ScanError(
            path,
            "labels out of range",
            f"labels from {low:.0f} to {high:.0f}, expected 0 (no label) to {LARGEST_LABEL}. Number them anew, for"
            " example from 1, in all label maps of the cohort alike.",
        )
    return values.astype(np.int16)


def _check_place(path: Path, image: Image, placement: Placement, *, of_pictures: bool) -> None:
    if image.array.ndim != len(placement.shape):
        found = f"a {image.array.ndim}D image of a {len(placement.shape)}D scan"
        raise ScanError(path, "wrong dimension", f"{found}. Give an image of the same kind as the scan.")
    if (image.affine is None or of_pictures) and image.array.shape != placement.scan_shape:
        found, expected = ("x".join(map(str, s)) for s in (image.array.shape, placement.scan_shape))
        raise ScanError(
            path, "wrong size", f"{found} pixels, the scan has {expected}. Give a picture of the same pixels."
        )
    if image.affine is None:
        return
    array, affine, _ = canonical(image)
    if not inside(placement.map_to(affine).matrix, placement.shape, array.shape).any():
        raise ScanError(
            path,
            "lies elsewhere",
            "no voxel of it lies in the scan's target grid. Give an image in the scan's own world space, not one that"
            " was registered to a template.",
        )


def _contrast(
    path: Path,
    image: Image,
    placement: Placement,
    config: Preprocess,
    channel: Channel,
    mask: tuple[Path, Image] | None,
) -> tuple[np.ndarray, float, float]:
    inside_mask = None if mask is None else mask_on(path, image, mask[1], mask[0])
    setting = "nonzero" if config.foreground == "ct" else config.foreground  # a channel may be of another modality
    background = background_of(path, image, setting, inside_mask, channel.window)
    foreground, image = background.foreground, background.darkened(image)
    scale = (config.percentiles, channel.window)
    if image.affine is None:
        assert placement.box is not None, "a picture has a box"
        scaled, counted = scaled_picture(image.array, foreground, placement.box, placement.shape, config.interpolation)
        return normalise(path, scaled, np.ones((1, 1), dtype=bool), counted, *scale)
    array, affine, _ = canonical(image)
    if foreground.size > 1:
        foreground = canonical(Image(foreground, image.affine))[0]
    index_map = placement.map_to(affine)
    covered = inside(index_map.matrix, placement.shape, array.shape)
    counted = covered & nearest(foreground, index_map.matrix, placement.shape)
    return normalise(path, interpolated(array, index_map, placement.shape), covered, counted, *scale)


def _labels(image: Image, placement: Placement) -> np.ndarray:
    """A mask or label map on the grid, in its own type."""
    array, affine = (image.array, None) if image.affine is None else canonical(image)[:2]
    return majority(array, placement.map_to(affine).matrix, placement.shape)


def channel_paths(row: Mapping[Any, Any], config: Preprocess) -> dict[str, Path]:
    """The files of a scan's channels; `row` is the scan's of the manifest.

    Raises
    ------
    UserError
        A pattern names an unknown field.
    """
    return {
        name: filled_in(channel.path, row, f"preprocess.channels.{name}.path")
        for name, channel in config.channels.items()
    }


def filled_in(pattern: str, row: Mapping[Any, Any], key: str) -> Path:
    """A path pattern of config key `key` with the fields of a manifest row in it; subject_id as it was written.

    Raises
    ------
    UserError
        It names a field that is none of subject_id, session_id and scan_id.
    """
    fields = {
        name: "" if pd.isna(row.get(name)) else str(row[name]) for name in ("subject_id", "session_id", "scan_id")
    }
    if not pd.isna(row.get(SPELLING)):
        fields["subject_id"] = str(row[SPELLING])
    try:
        return Path(pattern.format_map(fields))
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{key}: {pattern!r} cannot be filled in ({error}). Known fields: {sorted(fields)} in braces."
        ) from None
