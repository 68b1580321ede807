"""Pictures of a report as PNG bytes: equal inputs give equal bytes (no dates, no software name, Agg only).

Volumes are RAS arrays (x left to right, y posterior to anterior, z inferior to superior).  They are shown as middle
slices in radiological convention: the subject's right is on the viewer's left; anterior is up in axial and left in
sagittal planes, superior is up in coronal and sagittal ones.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

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
    "image.cmap": "gray",
}


@dataclass(frozen=True)
class Tile:
    """One image with what is printed above it."""

    image: np.ndarray
    caption: str = ""


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
                show(axes, picture)
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


# ------------------------------------------------------------------------------------------------- charts


def _grid(panels: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(columns, panels)
    lines = -(-panels // columns)
    drawing = figure(width * columns, height * lines)
    axes = list(np.atleast_1d(drawing.subplots(lines, columns, squeeze=False)).ravel())
    for spare in axes[panels:]:
        spare.remove()
    return drawing, axes[:panels]


def scatter(predictions: pd.DataFrame, metrics: Mapping[str, Any]) -> bytes:
    """Requested against measured, synthetic over held-out real scans; labels as the spread of measured
    probabilities.
    """
    with styled():
        names = [name for name in metrics if (predictions["covariate"] == name).any()]
        drawing, axes = _grid(len(names), 2, 4.6, 4.2)
        for name, panel in zip(names, axes, strict=True):
            rows = predictions[predictions["covariate"] == name]
            draw = _label_panel if metrics[name]["kind"] == "categorical" else _number_panel
            draw(panel, name, rows, metrics[name])
        drawing.tight_layout()
        return png(drawing)


def _kinds(rows: pd.DataFrame) -> list[tuple[str, str, str, pd.DataFrame]]:
    """(kind, name in the legend, colour, rows), real first so that synthetic is drawn over it."""
    named = (("real", "real, held out", REAL), ("synthetic", "synthetic", SYNTHETIC))
    return [(kind, label, colour, rows[rows["kind"] == kind]) for kind, label, colour in named]


def _legend_text(entry: Mapping[str, Any], kind: str, key: str) -> str:
    value = (entry[key] if kind == "synthetic" else entry[key].get("ceiling", {})).get("value")
    return f"{'AUC' if key == 'auc' else key} {value:.3f}" if value is not None else f"no {key}"


def _number_panel(axes: Axes, name: str, rows: pd.DataFrame, entry: Mapping[str, Any]) -> None:
    for kind, label, colour, part in _kinds(rows):
        thin = part.iloc[:: max(1, len(part) // 1500)]
        style = {"s": 12, "linewidths": 0.7, "alpha": 0.75} | (
            {"facecolors": "none", "edgecolors": colour} if kind == "real" else {"color": colour, "linewidths": 0}
        )
        axes.scatter(
            thin["requested_or_true"],
            thin["measured"],
            label=f"{label}: {_legend_text(entry, kind, 'r')}, n {len(part)}",
            **style,
        )
    values = rows[["requested_or_true", "measured"]].to_numpy()
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.04 * (high - low or 1.0)
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal", title=name)
    axes.set(
        xlabel=plain(f"requested (synthetic) or true (real), {entry['unit']}"),
        ylabel=plain(f"measured from the image, {entry['unit']}"),
    )
    axes.legend(loc="upper left", fontsize=7.5, handletextpad=0.2, borderaxespad=0)


def _label_panel(axes: Axes, name: str, rows: pd.DataFrame, entry: Mapping[str, Any]) -> None:
    levels = sorted(set(rows["level"].dropna()))
    ticks, labels = [], []
    for i, level in enumerate(levels):
        for wanted in (0.0, 1.0):
            centre = 2.6 * i + 1.2 * wanted
            ticks.append(centre)
            labels.append(plain(level if wanted else f"not {level}"))
            for shift, (kind, label, colour, part) in zip(
                (-0.24, 0.24), _kinds(rows[rows["level"] == level]), strict=True
            ):
                values = part.loc[part["requested_or_true"] == wanted, "measured"].to_numpy()
                if len(values) == 0:
                    continue
                known = f"{label}: {_legend_text(entry, kind, 'auc')}" if i == 0 and wanted == 1.0 else None
                spread = (
                    (np.arange(len(values)) * 0.61803) % 1 - 0.5
                ) * 0.36  # golden-ratio jitter: even, and the same every time
                thin = slice(None, None, max(1, len(values) // 500))
                axes.scatter(
                    (centre + shift + spread)[thin],
                    values[thin],
                    s=7,
                    color=colour,
                    alpha=0.5,
                    linewidths=0,
                    label=known,
                )
                quartiles = np.percentile(values, [25, 50, 75])
                axes.plot([centre + shift] * 2, quartiles[[0, 2]], color=INK, linewidth=1.2)
                axes.plot([centre + shift - 0.15, centre + shift + 0.15], [quartiles[1]] * 2, color=INK, linewidth=2)
    axes.set_xticks(ticks, labels)
    shown = plain(f"probability of {levels[0]}") if len(levels) == 1 else "probability of the level"
    axes.set(ylim=(-0.03, 1.2), title=name, xlabel="requested (synthetic) or true (real)", ylabel=f"measured {shown}")
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper center", fontsize=7.5, ncols=2, handletextpad=0.2, borderaxespad=0)


def feature_spaces(places: pd.DataFrame, spaces: Mapping[str, Any]) -> bytes:
    """Where images lie along the two main directions of real variation, a panel per feature space.

    Parameters
    ----------
    places
        Columns `kind` (held_out or synthetic), `space`, `pc1`, `pc2`.
    spaces
        Per space `explained`, shares of the variance of real scans.
    """
    with styled():
        names = [name for name in spaces if (places["space"] == name).any()]
        drawing, axes = _grid(len(names), 3, 3.35, 3.5)
        looks: dict[str, tuple[str, dict[str, Any]]] = {
            "held_out": (
                "real, held out",
                {"marker": "o", "facecolors": "none", "edgecolors": REAL, "linewidths": 0.8, "s": 16},
            ),
            "synthetic": ("synthetic", {"marker": "x", "color": SYNTHETIC, "linewidths": 0.9, "s": 14}),
        }
        for name, panel in zip(names, axes, strict=True):
            rows = places[places["space"] == name]
            for kind, (label, style) in looks.items():
                part = rows[rows["kind"] == kind]
                thin = part.iloc[:: max(1, len(part) // 1000)]
                panel.scatter(thin["pc1"], thin["pc2"], label=f"{label}, n {len(part)}", alpha=0.8, **style)
            shares = [f"{100 * share:.0f} %" for share in spaces[name]["explained"]]
            panel.set(
                title=plain(name),
                xlabel=f"component 1 ({shares[0]} of real variance)",
                ylabel=f"component 2 ({shares[1]})",
            )
            panel.margins(0.08)
        handles, labels = axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, fontsize=8, loc="upper center", ncols=2, handletextpad=0.2)
        drawing.tight_layout(rect=(0, 0, 1, 0.94))
        return png(drawing)


def spectra(spectrum: Mapping[str, Any]) -> bytes:
    """Radially averaged power, and power over real, with the band edges."""
    with styled():
        frequency, curves = (
            np.asarray(spectrum["frequency_of_nyquist"]),
            {k: np.asarray(v) for k, v in spectrum["radial_average"].items()},
        )
        drawing, (left, right) = _grid(2, 2, 4.6, 3.6)
        looks = {
            "real": ("real, held out", REAL, "-"),
            "synthetic": ("synthetic", SYNTHETIC, "-"),
            "reconstruction": ("reconstruction of held-out scans", "#1d4ed8", "--"),
        }
        for name, (label, colour, line) in looks.items():
            if name in curves:
                left.plot(frequency, curves[name], color=colour, linestyle=line, label=label)
        for name, reference in (("synthetic", "real"), ("reconstruction", "image")):
            if name in curves and reference in curves:
                label, colour, line = looks[name]
                right.plot(
                    frequency,
                    curves[name] / np.maximum(curves[reference], 1e-30),
                    color=colour,
                    linestyle=line,
                    label=f"{name} / {'real' if reference == 'real' else 'its image'}",
                )
        right.axhline(1.0, color=INK, linewidth=0.8)
        for panel in (left, right):
            for edge in (0.25, 0.5):
                panel.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
            panel.set(xlim=(0, 1), xlabel="spatial frequency, fraction of Nyquist")
            panel.legend(fontsize=7.5, loc="upper right" if panel is left else "lower left")
        left.set(yscale="log", ylabel="mean power", title="Radially averaged power")
        right.set(ylim=(0, max(1.25, min(2.0, right.get_ylim()[1]))), ylabel="ratio", title="Power over real")
        drawing.tight_layout()
        return png(drawing)


#: Colours of Okabe and Ito 2008 that differ for every kind of colour vision, and in grey; markers tell them apart once
#: more.
SERIES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "-"),
    ("#56B4E9", "P", "--"),
)


def _error(figures: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,) and distances to their interval's ends (2, n); nan where a figure is undefined."""
    table = np.array(
        [[np.nan if f.get(k) is None else f[k] for k in ("value", "low", "high")] for f in figures], dtype=float
    ).reshape(-1, 3)
    return table[:, 0], np.abs(table[:, 1:].T - table[:, 0])


def arms(
    entries: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, Any]]], Sequence[float | None]]],
    reference: float | None,
) -> bytes:
    """AUC of every arm with its interval, one line each.

    Parameters
    ----------
    entries
        Per arm: its name, (name of the set of images, figure) per set, and the AUC of each seed on the first set.
    reference
        AUC of the arm that the primary contrast refers to, drawn as a line.
    """
    with styled():
        sets = list(dict.fromkeys(name for _, figures, _ in entries for name, _ in figures))
        drawing = figure(9.2, 0.9 + (0.34 + 0.18 * (len(sets) - 1)) * len(entries))
        axes = drawing.subplots()
        if reference is not None:
            axes.axvline(reference, color=GREY, linewidth=1, zorder=0)
        axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":", zorder=0)
        for number, name in enumerate(sets):
            colour, marker, _ = SERIES[number % len(SERIES)]
            places = [(i, dict(figures)[name]) for i, (_, figures, _) in enumerate(entries) if name in dict(figures)]
            values, distance = _error([value for _, value in places])
            height = np.array([i for i, _ in places]) + 0.6 * ((number + 0.5) / len(sets) - 0.5)
            axes.errorbar(
                values,
                height,
                xerr=distance,
                fmt=marker,
                color=colour,
                markersize=5,
                linewidth=1.4,
                capsize=2.5,
                label=name,
            )
            if number == 0:
                for at, i in zip(height, (i for i, _ in places), strict=True):
                    each = [value for value in entries[i][2] if value is not None]
                    axes.scatter(
                        each, [at] * len(each), s=9, facecolors="none", edgecolors=INK, linewidths=0.6, zorder=3
                    )
        axes.set_yticks(range(len(entries)), [plain(name) for name, _, _ in entries])
        axes.set(ylim=(len(entries) - 0.5, -0.5), xlabel="AUC")
        axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        drawing.tight_layout()
        return png(drawing)


@dataclass(frozen=True)
class Bars:
    """One panel of bars: groups of them across, and within each group a bar per series, with what it may at best be."""

    title: str
    across: list[str]
    series: dict[str, list[Mapping[str, Any]]]
    ceilings: dict[str, list[Mapping[str, Any] | None]] = field(default_factory=dict)


def bars(panels: Sequence[Bars], label: str) -> bytes:
    """Figures with intervals as bars from 0, a panel below the other; a short line over a bar is its ceiling."""
    with styled():
        drawing = figure(9.2, 2.9 * len(panels))
        for axes, panel in zip(np.atleast_1d(drawing.subplots(len(panels), 1)), panels, strict=True):
            width = 0.8 / len(panel.series)
            for number, (name, figures) in enumerate(panel.series.items()):
                colour = SERIES[number % len(SERIES)][0]
                places = np.arange(len(panel.across)) + width * (number - (len(panel.series) - 1) / 2)
                values, distance = _error(figures)
                axes.bar(
                    places,
                    values,
                    0.9 * width,
                    color=colour,
                    hatch=["", "///", "...", "xxx"][number % 4],
                    edgecolor="white",
                    linewidth=0,
                    label=name,
                )
                axes.errorbar(places, values, yerr=distance, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
                for place, ceiling in zip(places, panel.ceilings.get(name, []), strict=False):
                    if ceiling and ceiling.get("value") is not None:
                        axes.hlines(
                            ceiling["value"], place - 0.48 * width, place + 0.48 * width, color=INK, linewidth=1.6
                        )
            axes.set_xticks(range(len(panel.across)), [wrapped([plain(name)], 20) for name in panel.across], fontsize=8)
            axes.set(title=panel.title, ylabel=label)
            axes.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        drawing.tight_layout()
        return png(drawing)


def _seconds_axis(axes: Axes, entries: Sequence[Mapping[str, Any]]) -> None:
    """Seconds per image above an axis of network passes.

    Seconds grow with passes along a line, whose start is what decoding takes: its slope is the median over pairs of
    points (Theil 1950), which a machine that was busy with something else for a while does not move.
    """
    passes, seconds = (
        np.array([entry[key] for entry in entries], dtype=float) for key in ("passes", "seconds_per_image")
    )
    first, second = np.triu_indices(len(passes), 1)
    apart = passes[first] != passes[second]
    slopes = (seconds[second] - seconds[first])[apart] / (passes[second] - passes[first])[apart]
    slope = max(float(np.median(slopes)), 1e-9) if len(slopes) else 1e-9
    start = max(float(np.median(seconds - slope * passes)), 0.0)
    upper = axes.secondary_xaxis(
        "top", functions=(lambda x: start + slope * np.asarray(x), lambda s: (np.asarray(s) - start) / slope)
    )
    places = sorted({float(place) for place in passes})[:: max(1, len(set(passes)) // 4)]
    upper.xaxis.set_major_locator(FixedLocator([start + slope * place for place in places]))
    upper.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    upper.xaxis.set_minor_locator(NullLocator())
    upper.set_xlabel("seconds per image, here", fontsize=7.5)


def sampler_study(results: Mapping[str, Any]) -> bytes:
    """Quality over network passes per image: a row per measure, a column per guidance scale, a line per sampler, a
    point per number of steps.

    The recommended point has a ring in the first row.  Passes do not depend on the machine; the seconds that they took
    here stand at the upper edge (a line fitted to all points).

    Parameters
    ----------
    results
        What `evaluation.sampler_study.compare` returns.
    """
    with styled():
        entries = results["points"]
        recommended = None if results.get("choice") is None else entries[results["choice"]]
        scales, samplers = (
            list(dict.fromkeys(entry[key] for entry in entries)) for key in ("guidance_scale", "sampler")
        )
        read: dict[str, Any] = {
            "Frechet distance (low is good)": lambda entry: entry["frechet"],
            "KID (0 is good)": lambda entry: entry["kid"],
        }
        for name, part in entries[0]["covariates"].items():
            key = next(iter(part))
            label = f"{plain(name)}, {'AUC' if key == 'auc' else key} (high is good)"
            read[label] = lambda entry, name=name, key=key: entry["covariates"][name][key]
        drawing = figure(4.6 * max(2, len(scales)), 2.5 * len(read) + 0.5)
        grid = drawing.subplots(len(read), len(scales), squeeze=False, sharex=True, sharey="row")
        for line_number, (row, (label, value)) in enumerate(zip(grid, read.items(), strict=True)):
            for axes, scale in zip(row, scales, strict=True):
                for number, sampler in enumerate(samplers):
                    colour, marker, line = SERIES[number % len(SERIES)]
                    part = sorted(
                        (e for e in entries if (e["sampler"], e["guidance_scale"]) == (sampler, scale)),
                        key=lambda entry: entry["num_inference_steps"],
                    )
                    values, distance = _error([value(entry) for entry in part])
                    style: dict[str, Any] = {
                        "color": colour,
                        "marker": marker,
                        "linestyle": line,
                        "markersize": 5,
                        "linewidth": 1.4,
                        "capsize": 2,
                    }
                    # A little apart, since most samplers have the same numbers of passes.
                    passes = [entry["passes"] * 1.03 ** (number - (len(samplers) - 1) / 2) for entry in part]
                    axes.errorbar(passes, values, yerr=distance, elinewidth=0.7, label=sampler, **style)
                    if line_number == 0:
                        chosen = [
                            (at, value)
                            for at, value, entry in zip(passes, values, part, strict=True)
                            if entry is recommended
                        ]
                        axes.scatter(
                            *zip(*chosen, strict=True) if chosen else ([], []),
                            s=170,
                            facecolors="none",
                            edgecolors=INK,
                            linewidths=1.4,
                            zorder=4,
                        )
                        for at, height, entry in zip(passes, values, part, strict=True):
                            axes.annotate(
                                str(entry["num_inference_steps"]),
                                (at, height),
                                (3, 4),
                                textcoords="offset points",
                                fontsize=6.5,
                                color=colour,
                            )
                best = value(entries[0]).get("floor") or value(entries[0]).get("ceiling")
                if best and best["value"] is not None:
                    axes.axhline(best["value"], color=INK, linewidth=0.8, linestyle=":")
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.xaxis.set_minor_locator(NullLocator())
                if line_number == 0:
                    axes.set_yscale("log")
                    axes.set_title(f"guidance scale {scale:g}")
                    _seconds_axis(axes, entries)
                elif line_number == 1:  # from below 0 to millions
                    axes.set_yscale("symlog", linthresh=1.0)
                if line_number == len(grid) - 1:
                    axes.set_xlabel("network passes per image")
            row[0].set_ylabel(label)
        handles, labels = grid[0][0].get_legend_handles_labels()
        drawing.legend(handles, labels, fontsize=8, loc="upper center", ncols=len(samplers))
        drawing.tight_layout(rect=(0, 0, 1, 1 - 0.3 / (2.5 * len(read) + 0.5)))
        return png(drawing)


def discriminability(curves: Mapping[str, Any]) -> bytes:
    """AUC over the frequency above which detail was removed, a line per kind of image, places a little apart; the last
    point is of all detail.

    Parameters
    ----------
    curves
        The part `discriminability` of metrics.json.
    """
    kinds = {
        "training": ("training scans (floor)", REAL, "s", ":"),
        "reconstructions": ("reconstructions of held-out scans", "#1d4ed8", "^", "--"),
        "synthetic": ("synthetic", SYNTHETIC, "o", "-"),
    }
    with styled():
        drawing = figure(6.4, 3.8)
        axes = drawing.subplots()
        cutoffs, finest = curves["cutoffs_cycles_per_voxel"], curves["finest_mm"]
        shown = [kind for kind in kinds if kind in curves]
        for number, kind in enumerate(shown):
            label, colour, marker, line = kinds[kind]
            places = np.arange(len(cutoffs)) + 0.05 * (number - (len(shown) - 1) / 2)
            _line_with_errors(axes, places, curves[kind], (colour, marker, line), label)
        axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
        ticks = [
            ("all detail" if cutoff is None else f"{cutoff:g}") + (f"\n{size:.3g} mm" if size else "")
            for cutoff, size in zip(cutoffs, finest, strict=True)
        ]
        axes.set_xticks(range(len(cutoffs)), ticks)
        axes.set(ylabel="AUC of telling from held-out scans", ylim=(0.35, 1.03), xlim=(-0.4, len(cutoffs) - 0.6))
        axes.set_xlabel(f"cycles per voxel that are left{' (half a wavelength)' if any(finest) else ''}")
        axes.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        drawing.tight_layout()
        return png(drawing)


def _line_with_errors(
    axes: Axes, places: np.ndarray, figures: Sequence[Mapping[str, Any]], look: tuple[str, str, Any], label: str
) -> None:
    """Figures at `places`, joined, with their intervals; `look` is colour, marker and line style."""
    values, distance = _error(figures)
    colour, marker, line = look
    style: dict[str, Any] = {"markersize": 5, "linewidth": 1.4, "capsize": 2.5}
    axes.errorbar(places, values, yerr=distance, color=colour, marker=marker, linestyle=line, label=label, **style)


def ratio_curves(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """AUC over images added per real one, a line per real share and kind of added image; the places are a
    little apart.
    """
    with styled():
        drawing = figure(6.4, 3.8)
        axes = drawing.subplots()
        ratios = sorted({point["ratio"] for curve in curves for point in curve["points"]})
        for number, curve in enumerate(curves):
            colour, marker, line = SERIES[number % len(SERIES)]
            places = np.array([ratios.index(point["ratio"]) for point in curve["points"]]) + 0.06 * (
                number - (len(curves) - 1) / 2
            )
            label = f"{100 * curve['real']:.3g} % of the real subjects, {curve['source']}"
            _line_with_errors(axes, places, [point["auc"] for point in curve["points"]], (colour, marker, line), label)
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set(xlabel="images added per real one", ylabel="AUC on the test split", xlim=(-0.4, len(ratios) - 0.6))
        axes.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2 if len(curves) > 3 else 1)
        drawing.tight_layout()
        return png(drawing)


def _quantity(metric: str) -> tuple[str, str]:
    """Split "train/l1", "val_l1" and the like into (l1, train); without a prefix the series is the metric itself."""
    for prefix, series in (
        ("train", "train"),
        ("validation", "validation"),
        ("val", "validation"),
        ("valid", "validation"),
    ):
        for mark in ("/", "_", "."):
            if metric.startswith(prefix + mark):
                return metric[len(prefix) + 1 :], series
    return metric, metric


def loss_curves(history: pd.DataFrame) -> bytes:
    """One panel per quantity of a training history (step, metric, value), training and validation together."""
    with styled():
        panels: dict[str, dict[str, pd.DataFrame]] = {}
        for metric, rows in history.groupby("metric", sort=True):
            quantity, series = _quantity(str(metric))
            panels.setdefault(quantity, {})[series] = rows.sort_values("step", kind="stable")
        drawing, axes = _grid(len(panels), 3, 3.4, 2.6)
        colours = {"train": GREY, "validation": "#1d4ed8"}
        for (quantity, group), panel in zip(panels.items(), axes, strict=True):
            values = np.concatenate([rows["value"].to_numpy() for rows in group.values()])
            for series, rows in group.items():
                few = len(rows) <= 40
                panel.plot(
                    rows["step"],
                    rows["value"],
                    color=colours.get(series, INK),
                    linewidth=1.2,
                    marker="o" if few else None,
                    markersize=3,
                    label=series,
                )
            finite = values[np.isfinite(values)]
            if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
                panel.set_yscale("log")
            panel.set(title=quantity, xlabel="step")
            if len(group) > 1:
                panel.legend(fontsize=7.5)
        drawing.tight_layout()
        return png(drawing)


def wrapped(parts: Sequence[str], width: int) -> str:
    """Short facts joined by commas, broken into lines of at most `width` characters."""
    return plain("\n".join(textwrap.wrap(", ".join(parts), width)))


def plain(text: str) -> str:
    """Text of a user for a figure: a dollar sign is not the start of a formula."""
    return text.replace("$", r"\$")
