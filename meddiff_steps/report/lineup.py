"""The page of a blind test: tiles that differ in nothing but what they show.

All go through one encoder, at one size, with no name and no metadata; numbers follow the order on the page.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from meddiff_steps.report import templates
from meddiff_steps.report.figures import mosaic, planes

#: Shortest side of a tile, pixels: smaller slices are enlarged by a whole number.
SMALLEST = 160
#: What a reader can answer, and the certainty that an image is synthetic, in percent, that stands for it.
CERTAINTY = (
    (0, "surely real"),
    (25, "perhaps real"),
    (50, "cannot tell"),
    (75, "perhaps synthetic"),
    (100, "surely synthetic"),
)


def tile(image: np.ndarray) -> bytes:
    """An image (1, *spatial) in [0, 1] as a grey PNG of 8 bits: a 2D image, or the middle slices of a volume side by
    side, enlarged by cubic interpolation.
    """
    flat = np.clip(mosaic(planes(image)), 0.0, 1.0)
    factor = -(-SMALLEST // min(flat.shape))
    picture = Image.fromarray(flat.astype(np.float32), mode="F")
    picture = picture.resize((flat.shape[1] * factor, flat.shape[0] * factor), Image.Resampling.BICUBIC)
    grey = np.clip(np.asarray(picture) * 255, 0, 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, format="PNG")
    return buffer.getvalue()


def lineup_name(tiles: Sequence[bytes]) -> str:
    """First 12 hex digits of a SHA-256 over the tiles: answers and key name the page by it."""
    return hashlib.sha256(b"".join(hashlib.sha256(png).digest() for png in tiles)).hexdigest()[:12]


def render(tiles: Sequence[bytes], *, title: str, simulated: bool) -> bytes:
    """The page as UTF-8; it loads nothing, and no script runs but its own, which puts answers into lines of a table."""
    environment = templates.environment()
    script = environment.get_template("lineup.js.jinja").render()
    page = environment.get_template("lineup.html.jinja").render(
        title=title,
        name=lineup_name(tiles),
        simulated=simulated,
        tiles=[base64.b64encode(png).decode("ascii") for png in tiles],
        answers=CERTAINTY,
        script=script,
        script_digest=templates.script_digest(script),
    )
    return page.encode("utf-8")
