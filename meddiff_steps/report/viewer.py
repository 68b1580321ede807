"""The interactive slice viewer of the report: volumes that a script on the page shows in three linked planes.

The page stays one file that loads nothing: volumes are embedded as grey PNG files, the script (`viewer.js.jinja`) is
part of the page and allowed there by its digest.  2D images need no viewer.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

#: Larger volumes are block-averaged until they have at most this many voxels, so that the page stays small.
MAX_VOXELS = 750_000


@dataclass(frozen=True)
class Volume:
    """One volume as it is embedded, with what is printed above it."""

    png: bytes
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Viewer:
    """Groups of volumes, shown one group at a time, and the shape (x, y, z) that all of them have in the page."""

    shape: tuple[int, int, int]
    groups: list[list[Volume]]
    caption: str

    @property
    def axes(self) -> list[tuple[str, int]]:
        """Names of the axes for the sliders, from low to high, and their lengths."""
        return list(zip(("left to right", "back to front", "bottom to top"), self.shape, strict=True))


def reduced(image: np.ndarray) -> np.ndarray:
    """A volume (1, x, y, z) as (x, y, z), block-averaged as little as keeps it within `MAX_VOXELS`; what fills no block
    is cut off.
    """
    values = np.asarray(image[0], dtype=np.float32)
    factor = 1
    while math.prod(n // factor for n in values.shape) > MAX_VOXELS:
        factor += 1
    x, y, z = (n // factor for n in values.shape)
    return values[: x * factor, : y * factor, : z * factor].reshape(x, factor, y, factor, z, factor).mean((1, 3, 5))


def encoded(volume: np.ndarray) -> bytes:
    """A volume (x, y, z) in [0, 1] as a grey PNG: slabs of equal z one below the other, each with rows y and
    columns x.
    """
    grey = np.round(np.clip(np.nan_to_num(volume), 0.0, 1.0) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey.transpose(2, 1, 0).reshape(-1, grey.shape[0])).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def viewer(groups: Sequence[Sequence[tuple[str, np.ndarray]]], caption: str) -> Viewer:
    """A viewer of groups of (caption, volume (1, x, y, z) in [0, 1]), at least one, all of one shape."""
    small = [[(words, reduced(image)) for words, image in group] for group in groups]
    x, y, z = small[0][0][1].shape
    return Viewer((x, y, z), [[Volume(encoded(image), words) for words, image in group] for group in small], caption)
