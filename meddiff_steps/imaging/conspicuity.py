"""What stands out of a scan without any model: too bright for the head, or unlike its other side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from scipy import ndimage

LookFor = Literal["bright", "dark", "any"]

#: Grey value, of the range of an image, above which it shows something.
HEAD_LEVEL = 0.1
#: A median absolute deviation of normal values is so much of their standard deviation.
NORMAL_MAD = 0.6744897501960817


def head_of(image: np.ndarray) -> np.ndarray:
    """The head in an image (*spatial) in [0, 1], with all that it encloses, bool: the largest connected part."""
    bright = image > HEAD_LEVEL
    opened = ndimage.binary_opening(bright)
    parts, count = ndimage.label(opened if opened.any() else bright)
    if count == 0:
        return np.ones(image.shape, dtype=bool)
    sizes = np.bincount(parts.ravel())[1:]
    return ndimage.binary_fill_holes(parts == 1 + int(sizes.argmax()))


def interior(head: np.ndarray, margin: int) -> np.ndarray:
    """A head without its `margin` outermost voxels, where scalp and skull are; all of it where nothing is left."""
    # Beyond the image the head goes on: a crop has no scalp at its edge.
    left = ndimage.binary_erosion(head, iterations=margin, border_value=1) if margin else head
    return left if left.any() else head


def grey_scale(image: np.ndarray, within: np.ndarray) -> tuple[float, float]:
    """Median of a scan's grey values within its head, and their standard deviation by their median absolute
    deviation: what lesions move little.
    """
    values = image[within]
    middle = float(np.median(values))
    spread = float(np.median(np.abs(values - middle))) / NORMAL_MAD
    return middle, spread if spread > 0 else max(float(values.std()), 1e-6)


def sided(difference: np.ndarray, look_for: LookFor) -> np.ndarray:
    """A signed difference from what is usual, so that larger is more of what is looked for."""
    return {"bright": difference, "dark": -difference, "any": np.abs(difference)}[look_for]


def z_score(image: np.ndarray, within: np.ndarray, look_for: LookFor) -> np.ndarray:
    """Grey values in robust standard deviations from the median of the head."""
    middle, spread = grey_scale(image, within)
    return sided((image - middle) / spread, look_for)


def asymmetry(image: np.ndarray, within: np.ndarray, look_for: LookFor) -> np.ndarray:
    """Grey values less those of the other side, in the same units.

    Left and right are the first axis of a volume and the last of a picture; the mirror stands in the middle of the
    head.
    """
    axis = 0 if image.ndim == 3 else image.ndim - 1
    middle = float(np.nonzero(within)[axis].mean())
    mirrored = np.roll(np.flip(image, axis), round(2 * middle - (image.shape[axis] - 1)), axis)
    return sided((image - mirrored) / grey_scale(image, within)[1], look_for)


def intensity(image: np.ndarray, within: np.ndarray, look_for: LookFor) -> np.ndarray:
    """Grey values as they are."""
    return image if look_for != "dark" else 1.0 - image


#: Maps without a model, by name: (*spatial) of an image, of the interior of its head, and of what is looked for.
BASELINES: Mapping[str, Callable[[np.ndarray, np.ndarray, LookFor], np.ndarray]] = {
    "z_score": z_score,
    "asymmetry": asymmetry,
    "intensity": intensity,
}
#: Those that are told nothing of where the head is, and are not smoothed either.
PLAIN = ("intensity",)
