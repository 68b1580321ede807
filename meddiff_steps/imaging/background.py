"""Where an image shows nothing: one description, from its format, a mask, the setting or an estimate.

Background is what surrounds the head, whatever its value: 0 in most MR scans, another where a scan has an offset
(`scl_inter`, z-scores), about -1000 HU in CT, a padding value, the white of a margin.  Everything else counts, also a
voxel that happens to be 0.  An affine change of grey values, or another padding value, changes nothing of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy import ndimage

from meddiff_steps.imaging.reading import Image, ScanError

Setting = Literal["nonzero", "all", "ct"]

#: Share of the outer faces (edges of a picture) that has one value where this is the background.
SURROUNDING_SHARE = 0.5
#: Values (share of the image's range) that are the same background; rounding must not decide.  0 counts exactly.
SAME_VALUE = 1e-5
#: Hounsfield units: air, what is darker than tissue and lungs, and the least that a CT scan is certain to show.
AIR_HU, DENSER_THAN_AIR_HU, SOME_AIR_HU = -1000.0, -900.0, -500.0
#: Of a head on a noisy background, what is darker than this share of the way from its 2nd to its 98th percentile is
#: background (Smith 2002).
HEAD_THRESHOLD = 0.1

#: Columns of the quality table: what says where the background is (`format`, `mask`, `air`, `surroundings`; `zero`
#: where these are noise; `unknown` where they are and values go below 0, so that all counts; null where all counts by
#: the setting), its grey value (null where it has no single one), and the share of the scan that counts.
BACKGROUND_COLUMNS = {"background": "string", "background_value": "float64", "foreground_share": "float64"}


@dataclass(frozen=True)
class Background:
    """Where an image shows nothing.

    Attributes
    ----------
    foreground
        Bool, True where the image counts; a single True that broadcasts where all does.
    origin
        As in `BACKGROUND_COLUMNS`.
    value
        Its grey value in the image, if it has one.
    fill
        The grey value that stands for it from here on: not brighter than anything.  None where a mask cuts and there
        is no window: the smallest value of what counts.
    """

    foreground: np.ndarray
    origin: str | None
    value: float | None
    fill: float | None

    def facts(self) -> dict[str, object]:
        """The columns of `BACKGROUND_COLUMNS`."""
        return {
            "background": self.origin,
            "background_value": self.value,
            "foreground_share": float(self.foreground.mean()),
        }

    def darkened(self, image: Image) -> Image:
        """The image with `fill` as its background, which would else be grey in an image around 0; what is darker is
        raised to it.
        """
        if self.foreground.size == 1:
            return image
        fill = np.float32(image.array[self.foreground].min() if self.fill is None else self.fill)
        return replace(image, array=np.where(self.foreground, np.maximum(image.array, fill), fill))


def background_of(
    path: Path,
    image: Image,
    setting: Setting,
    inside: np.ndarray | None = None,
    window: tuple[float, float] | None = None,
) -> Background:
    """Where an image shows nothing.

    Parameters
    ----------
    path
        Of the image, for messages.
    image
        As it was read, not masked.
    setting
        `nonzero`: what surrounds the head (`surrounding_value`); `ct`: air and any other padding, of an image in
        Hounsfield units; `all`: nothing, but for what the format or the mask says.
    inside
        Bool, of the image's shape: what a mask leaves.
    window
        The grey values that become 0 and 1, if they are given.  What a mask cuts away is filled with the lower: air
        or padding beside the brain would be interpolated into it.

    Raises
    ------
    ScanError
        Nothing counts, or `ct` is asked of an image that is not in Hounsfield units.
    """
    array, origin = image.array, None
    fill: float | None = float(array.min())
    foreground = np.ones((1,) * array.ndim, dtype=bool)
    value = None if setting == "all" else surrounding_value(array)
    if value is not None:
        foreground, origin = ~_surroundings(array, value), "surroundings"
    elif setting == "nonzero" and array.min() >= 0:
        foreground, origin, value = array != 0, "zero", 0.0
    elif setting == "nonzero":
        origin = "unknown"
    if setting == "ct":
        if array.min() > SOME_AIR_HU:
            raise ScanError(
                path,
                "no Hounsfield units",
                f"the darkest value is {array.min():g}, expected air of about {AIR_HU:g} HU. Apply the rescale slope"
                " and intercept, or set preprocess.foreground to what the images are.",
            )
        foreground, origin, fill = foreground & (array > DENSER_THAN_AIR_HU), "air", AIR_HU
    if image.blank is not None:
        foreground, origin = foreground & ~image.blank, origin or "format"
    if inside is not None:
        foreground, origin, fill = foreground & inside, "mask", None if window is None else window[0]
    if not foreground.any():
        found = "all of it is background" + ("" if value is None else f" ({value:g})")
        within = "" if inside is None else " inside the mask. Check that the mask belongs to this scan"
        raise ScanError(path, "no foreground", f"{found}{within or '. Look at the image'}.")
    return Background(foreground, origin, value, fill)


def surrounding_value(array: np.ndarray) -> float | None:
    """The one value that most of the outer faces (edges of a picture) have; None where there is none, as in noise."""
    faces = np.concatenate([np.take(array, [0, -1], axis).ravel() for axis in range(array.ndim)])
    value = float(np.partition(faces, faces.size // 2)[faces.size // 2])  # of more than half it is the median
    share = np.count_nonzero(_same(faces, value, array)) / faces.size
    return value if share >= SURROUNDING_SHARE else None


def _same(values: np.ndarray, value: float, array: np.ndarray) -> np.ndarray:
    """Which of some values of an array are the same background."""
    same: np.ndarray = values == 0 if value == 0 else np.abs(values - np.float32(value)) <= SAME_VALUE * np.ptp(array)
    return same


def _surroundings(array: np.ndarray, value: float) -> np.ndarray:
    """What has the surrounding value; only what reaches the faces where it is not the darkest, for then tissue may have
    it, too: white in a picture on white, 0 HU in CT that is padded with 0.
    """
    same = _same(array, value, array)
    if value <= array.min():
        return same
    parts, count = ndimage.label(same)
    reaches = np.zeros(count + 1, dtype=bool)
    for axis in range(array.ndim):
        reaches[np.take(parts, [0, -1], axis)] = True
    reaches[0] = False
    return reaches[parts]


def head_of(image: Image, setting: Setting) -> Image | None:
    """The head with what it encloses, as a bool image: by the surroundings, or by a threshold where these are noise;
    None of a picture without background.
    """
    array, value = image.array, surrounding_value(image.array)
    if image.affine is None and setting == "all":
        return None
    if value is not None:
        head = ~_surroundings(array, value)
    else:
        low, high = np.percentile(array, (2, 98))
        head = array > low + HEAD_THRESHOLD * (high - low)
    return Image(
        np.asarray(ndimage.binary_fill_holes(head if image.blank is None else head & ~image.blank)), image.affine
    )


def uncertain(quality: pd.DataFrame) -> str | None:
    """How many scans of a quality table have values below 0 and no background that could be told, in words; None if
    none has.
    """
    found = quality[quality["background"] == "unknown"]
    if found.empty:
        return None
    return (
        f"{len(found)} scans, {found['scan_id'].iloc[0]} first, have values below 0 and no one value around the head:"
        " all of their voxels count. Of CT, set preprocess.foreground: ct; else give preprocess.brain_mask"
    )
