"""Pictures of a report as PNG bytes: equal inputs give equal bytes (no dates, no software name, Agg only).

Volumes are RAS arrays (x left to right, y posterior to anterior, z inferior to superior).  They are shown as middle
slices in radiological convention: the subject's right is on the viewer's left; anterior is up in axial and left in
sagittal planes, superior is up in coronal and sagittal ones.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

REAL, SYNTHETIC, INK, GREY = "#6b7280", "#c2410c", "#111827", "#9ca3af"
DPI = 120
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "text.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "meddiff",
    "svg.fonttype": "none",
    "image.cmap": "gray",
}


@dataclass(frozen=True)
class Tile:
    """One image with what is printed above it; a label map of so many structures in colours, 0 black."""

    image: np.ndarray
    caption: str = ""
    structures: int = 0

    @property
    def style(self) -> dict[str, Any]:
        """How it differs from a grey image, for `show`."""
        if not self.structures:
            return {}
        colours = ListedColormap(["black", *matplotlib.colormaps["turbo"](np.linspace(0.1, 0.95, self.structures))])
        return {"cmap": colours, "vmax": float(self.structures), "interpolation": "nearest"}


@dataclass(frozen=True)
class Block:
    """A titled group of tiles, `columns` per line."""

    title: str
    tiles: list[Tile]
    columns: int
    colour: str = INK
    row_labels: list[str] = field(default_factory=list)


def figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that belongs to the Agg canvas (no global state, no display)."""
    drawing = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(drawing)
    return drawing


def png(drawing: Figure) -> bytes:
    """The figure as PNG without metadata."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def styled() -> Any:
    """Context in which figures are drawn and saved: the same style whatever the user's matplotlibrc says."""
    style: dict[Any, Any] = {
        k: v
        for k, v in matplotlib.rcParamsDefault.items()
        if k not in ("backend", "interactive", "toolbar", "webagg.open_in_browser")
    }
    style.update(_STYLE)
    return matplotlib.rc_context(style)


# ------------------------------------------------------------------------------------------------- scans


def planes(image: np.ndarray, views: Sequence[str] = ("axial", "coronal", "sagittal")) -> list[np.ndarray]:
    """Middle slices of an image (1, *spatial), oriented for display (row 0 on top).

    A volume gives one array per view, a 2D image itself.
    """
    values = np.asarray(image[0], dtype=np.float32)
    if values.ndim == 2:
        return [values]
    x, y, z = (n // 2 for n in values.shape)
    shown = {
        "axial": values[::-1, ::-1, z].T,  # columns right to left, rows anterior to posterior
        "coronal": values[::-1, y, ::-1].T,  # columns right to left, rows superior to inferior
        "sagittal": values[x, ::-1, ::-1].T,  # columns anterior to posterior, rows superior to inferior
    }
    return [shown[view] for view in views]


def mosaic(pictures: Sequence[np.ndarray], *, vertical: bool = False, fill: float = 0.0) -> np.ndarray:
    """Pictures side by side (or above each other), each centred on a common height (width), a pixel between them."""
    across = 1 if vertical else 0
    size = max(p.shape[across] for p in pictures)
    parts = []
    for i, picture in enumerate(pictures):
        before = (size - picture.shape[across]) // 2
        padding = [(0, 0), (0, 0)]
        padding[across] = (before, size - picture.shape[across] - before)
        padding[1 - across] = (1 if i else 0, 0)
        parts.append(np.pad(picture, padding, constant_values=fill))
    return np.concatenate(parts, axis=1 - across)


def show(axes: Axes, picture: np.ndarray, **options: Any) -> None:
    """A grey picture in [0, 1] without axes; bicubic between pixels."""
    defaults: dict[str, Any] = {"cmap": "gray", "vmin": 0.0, "vmax": 1.0, "interpolation": "bicubic"}
    axes.imshow(picture, **(defaults | options))
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def image_grid(
    blocks: Sequence[Block],
    width: float = 10.0,
    title: str = "",
    views: Sequence[str] = ("axial", "coronal", "sagittal"),
) -> bytes:
    """Blocks of images one below the other; each image shows its planes side by side.

    Sizes follow from the pictures, so pixels stay square and nothing overlaps.
    """
    with styled():
        top = 0.35 if title else 0.05
        layout: list[tuple[Block, list[np.ndarray], float, float, float]] = []
        height = top
        for block in blocks:
            pictures = [mosaic(planes(tile.image, views)) for tile in block.tiles]
            margin = 0.9 if block.row_labels else 0.05
            cell = (width - margin - 0.05) / block.columns
            rows, columns = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
            lines = max(t.caption.count("\n") + 1 if t.caption else 0 for t in block.tiles)
            text = 0.155 * lines + 0.04
            layout.append((block, pictures, margin, cell, text))
            height += 0.3 * bool(block.title) + -(-len(pictures) // block.columns) * (
                (cell - 0.06) * rows / columns + text + 0.06
            )
        drawing = figure(width, height + 0.05)
        canvas = height + 0.05
        if title:
            drawing.text(0.05 / width, 1 - 0.24 / canvas, title, fontsize=11, fontweight="bold", va="baseline")
        cursor = top
        for block, pictures, margin, cell, text in layout:
            if block.title:
                drawing.text(
                    0.05 / width,
                    1 - (cursor + 0.21) / canvas,
                    block.title,
                    fontsize=10,
                    fontweight="bold",
                    color=block.colour,
                    va="baseline",
                )
                cursor += 0.3
            rows, columns = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
            tall = (cell - 0.06) * rows / columns
            for i, (tile, picture) in enumerate(zip(block.tiles, pictures, strict=True)):
                line, column = divmod(i, block.columns)
                left, up = margin + column * cell, cursor + line * (tall + text + 0.06) + text
                axes = drawing.add_axes((left / width, 1 - (up + tall) / canvas, (cell - 0.06) / width, tall / canvas))
                show(axes, picture, **tile.style)
                drawing.text(
                    (left + 0.01) / width,
                    1 - (up - 0.05) / canvas,
                    tile.caption,
                    fontsize=7.5,
                    va="bottom",
                    linespacing=1.15,
                )
                if column == 0 and line < len(block.row_labels):
                    drawing.text(
                        0.05 / width, 1 - (up + tall / 2) / canvas, block.row_labels[line], fontsize=8, va="center"
                    )
            cursor += -(-len(pictures) // block.columns) * (tall + text + 0.06)
        return png(drawing)


def strip(
    rows: Sequence[Sequence[Tile]],
    *,
    difference: bool,
    views: Sequence[str] = ("axial", "coronal"),
    row_name: str = "subject",
) -> bytes:
    """Rows of images that change along a line; with `difference`, the last minus the first in red (brighter) and blue
    (darker).
    """
    with styled():
        positions = max(len(row) for row in rows)
        columns = positions + difference
        pictures = [[mosaic(planes(tile.image, views), vertical=True) for tile in row] for row in rows]
        tall, wide = pictures[0][0].shape
        width = min(10.0, 1.75 * columns + 0.5)
        cell = (width - 0.45) / columns
        line = (cell - 0.05) * tall / wide + 0.27
        height = line * len(rows) + 0.05
        drawing = figure(width, height)
        for r, (row, shown) in enumerate(zip(rows, pictures, strict=True)):
            bottom = height - (r + 1) * line + 0.02
            frame = ((cell - 0.05) / width, (line - 0.27) / height)
            drawing.text(
                0.12 / width,
                (bottom + line / 2) / height,
                f"{row_name} {r + 1}",
                rotation=90,
                fontsize=8,
                va="center",
                ha="center",
            )
            for p, (tile, picture) in enumerate(zip(row, shown, strict=True)):
                axes = drawing.add_axes(((0.4 + p * cell) / width, bottom / height, *frame))
                show(axes, picture)
                axes.set_title(tile.caption, fontsize=8, pad=2)
            if difference and len(shown) > 1:
                axes = drawing.add_axes(((0.4 + positions * cell) / width, bottom / height, *frame))
                change = shown[-1] - shown[0]
                limit = max(0.05, float(np.percentile(np.abs(change), 99.5)))
                show(axes, change, cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.set_title(f"last − first (±{limit:.2f})", fontsize=8, pad=2)
        return png(drawing)


def reconstruction_grid(rows: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> bytes:
    """Rows of (label, image, reconstruction): both, and their difference in colour on one scale."""
    with styled():
        pictures = [[mosaic(planes(image)), mosaic(planes(other))] for _, image, other in rows]
        changes = [other - image for image, other in pictures]
        limit = max(0.05, float(np.percentile(np.abs(np.stack(changes)), 99.5)))
        tall, wide = pictures[0][0].shape
        width = min(10.0, 2.6 * 3 * max(1.0, wide / tall / 2))
        cell = width / 3
        line = (cell - 0.06) * tall / wide + 0.25
        height = line * len(rows) + 0.25
        drawing = figure(width, height)
        for c, title in enumerate(("image", "reconstruction", f"difference (±{limit:.2f})")):
            drawing.text((c * cell + 0.03) / width, 1 - 0.17 / height, title, fontsize=9, fontweight="bold")
        for r, ((label, _, _), pair, change) in enumerate(zip(rows, pictures, changes, strict=True)):
            bottom = height - 0.25 - (r + 1) * line + 0.02
            drawing.text(0.03 / width, (bottom + line - 0.2) / height, label, fontsize=8)
            for c, picture in enumerate((*pair, change)):
                axes = drawing.add_axes(
                    ((c * cell + 0.03) / width, bottom / height, (cell - 0.06) / width, (line - 0.25) / height)
                )
                show(axes, picture, **({"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if c == 2 else {}))
        return png(drawing)


def wrapped(parts: Sequence[str], width: int) -> str:
    """Short facts joined by commas, broken into lines of at most `width` characters."""
    return plain("\n".join(textwrap.wrap(", ".join(parts), width)))


def plain(text: str) -> str:
    """Text of a user for a figure: a dollar sign is not the start of a formula."""
    return text.replace("$", r"\$")
