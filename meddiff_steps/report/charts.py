"""Charts of a report, as SVG that stands within the page: text stays text, and equal inputs give equal bytes.

A chart is drawn a panel at a time, so that panels stand beside each other on a desk's screen and below each other on a
phone's.  Clouds of many points are drawn as pixels within the SVG, which bounds its size.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from meddiff_steps.report.figures import GREY, INK, REAL, SYNTHETIC, figure, plain, png, styled, wrapped

#: Width of a panel and of a chart of one panel, inches: a phone shows either with letters that can be read.
PANEL, WHOLE = 3.9, 5.4
#: Points of one kind up to which each is a mark of the SVG; more are drawn as pixels.
MARKS = 300
#: Pixels per inch of what is drawn as pixels.
FINE = 200
_USED = re.compile(r"url\(#([^)]+)\)")
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Chart:
    """One panel as SVG: `title` is read to those who do not see it, sizes are in points, `marks` is what is inside.

    All ids in it begin with `prefix`, which a page replaces, since it may show the same chart twice.
    """

    title: str
    width: float
    height: float
    marks: str
    prefix: str


def chart(drawing: Figure, title: str) -> Chart:
    """The figure as SVG, without metadata, and with ids that no other chart of a page has."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    drawing.savefig(buffer, format="svg", dpi=FINE, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    width, height = (float(number) for number in root.attrib["viewBox"].split()[2:])
    used = {name for node in root.iter() for value in node.attrib.values() for name in _USED.findall(value)}
    used |= {node.attrib[_LINK][1:] for node in root.iter() if node.attrib.get(_LINK, "").startswith("#")}
    prefix = f"c{hashlib.sha256(buffer.getvalue().encode()).hexdigest()[:8]}-"
    for node in root.iter():
        node.tag = node.tag.removeprefix(_SVG)
        name = node.attrib.pop("id", None)
        if name in used:
            node.set("id", prefix + str(name))
        link = node.attrib.pop(_LINK, None)
        if link:
            node.set("href", f"#{prefix}{link[1:]}" if link.startswith("#") else link)
        for key in ("x", "y", "d", "transform"):
            if key in node.attrib:
                node.set(key, _shorter(node.attrib[key]))
        for key in ("style", "clip-path"):
            if key in node.attrib:
                value = _USED.sub(rf"url(#{prefix}\1)", node.attrib[key])
                node.set(key, re.sub(r"; font-family: [^;]*|(?<=[:;]) ", "", value))
        for parent_text in ("text", "tail"):
            if node.tag not in ("text", "tspan") and not (getattr(node, parent_text) or "").strip():
                setattr(node, parent_text, None)
    for group in root.iter("defs"):
        for style in group.findall("style"):  # it would be the whole page's
            group.remove(style)
    marks = "".join(ElementTree.tostring(node, encoding="unicode") for node in root)
    return Chart(title, width, height, marks, prefix)


def _shorter(numbers: str) -> str:
    """Coordinates to a hundredth of a point, on one line."""
    text = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(text.replace("-0 ", "0 ").split())


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    drawing = figure(width, height)
    return drawing, drawing.subplots()


def scatter(predictions: pd.DataFrame, metrics: Mapping[str, Any], names: Mapping[str, str]) -> list[Chart]:
    """Requested against measured, synthetic over held-out real scans, a panel per covariate; labels as the spread of
    measured probabilities.
    """
    charts = []
    for key in metrics:
        rows = predictions[predictions["covariate"] == key]
        if rows.empty:
            continue
        with styled():
            drawing, axes = _panel(PANEL, PANEL * 0.95)
            draw = _label_panel if metrics[key]["kind"] == "categorical" else _number_panel
            draw(axes, names.get(key, key), rows, metrics[key])
            drawing.tight_layout()
            charts.append(chart(drawing, f"{names.get(key, key)}: requested against measured"))
    return charts


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
            rasterized=len(thin) > MARKS,
            **style,
        )
    values = rows[["requested_or_true", "measured"]].to_numpy()
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.04 * (high - low or 1.0)
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal", title=plain(name))
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
                    rasterized=len(values[thin]) > MARKS,
                )
                quartiles = np.percentile(values, [25, 50, 75])
                axes.plot([centre + shift] * 2, quartiles[[0, 2]], color=INK, linewidth=1.2)
                axes.plot([centre + shift - 0.15, centre + shift + 0.15], [quartiles[1]] * 2, color=INK, linewidth=2)
    axes.set_xticks(ticks, labels)
    shown = plain(f"probability of {levels[0]}") if len(levels) == 1 else "probability of the level"
    axes.set(ylim=(-0.03, 1.28), title=plain(name), ylabel=f"measured {shown}")
    axes.set_xlabel("requested (synthetic) or true (real)")
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.legend(loc="upper center", fontsize=7.5, handletextpad=0.2, borderaxespad=0)


def feature_spaces(places: pd.DataFrame, spaces: Mapping[str, Any], names: Mapping[str, str]) -> list[Chart]:
    """Where images lie along the two main directions of real variation, a panel per feature space.

    Parameters
    ----------
    places
        Columns `kind` (held_out or synthetic), `space`, `pc1`, `pc2`.
    spaces
        Per space `explained`, shares of the variance of real scans.
    names
        Of the spaces, for people.
    """
    looks: dict[str, tuple[str, dict[str, Any]]] = {
        "held_out": (
            "real, held out",
            {"marker": "o", "facecolors": "none", "edgecolors": REAL, "linewidths": 0.8, "s": 16},
        ),
        "synthetic": ("synthetic", {"marker": "x", "color": SYNTHETIC, "linewidths": 0.9, "s": 14}),
    }
    charts = []
    for key in spaces:
        rows = places[places["space"] == key]
        if rows.empty:
            continue
        with styled():
            drawing, axes = _panel(PANEL, PANEL * 0.95)
            for kind, (label, style) in looks.items():
                part = rows[rows["kind"] == kind]
                thin = part.iloc[:: max(1, len(part) // 1000)]
                axes.scatter(
                    thin["pc1"],
                    thin["pc2"],
                    label=f"{label}, n {len(part)}",
                    alpha=0.8,
                    rasterized=len(thin) > MARKS,
                    **style,
                )
            shares = [f"{100 * share:.0f} %" for share in spaces[key]["explained"]]
            name = names.get(key, key)
            axes.set(
                title=plain(name),
                xlabel=f"component 1 ({shares[0]} of real variance)",
                ylabel=f"component 2 ({shares[1]})",
            )
            axes.margins(0.08)
            axes.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.07), ncols=2, handletextpad=0.2)
            drawing.tight_layout()
            charts.append(chart(drawing, f"{name}: where real and synthetic images lie"))
    return charts


def spectra(spectrum: Mapping[str, Any]) -> list[Chart]:
    """Radially averaged power, and power over real, with the band edges."""
    frequency = np.asarray(spectrum["frequency_of_nyquist"])
    curves = {k: np.asarray(v) for k, v in spectrum["radial_average"].items()}
    looks = {
        "real": ("real, held out", REAL, "-"),
        "synthetic": ("synthetic", SYNTHETIC, "-"),
        "reconstruction": ("reconstruction of held-out scans", "#1d4ed8", "--"),
    }
    charts: list[Chart] = []
    for title in ("Radially averaged power", "Power over that of real images"):
        with styled():
            drawing, axes = _panel(PANEL, 3.2)
            if not charts:
                for name, (label, colour, line) in looks.items():
                    if name in curves:
                        axes.plot(frequency, curves[name], color=colour, linestyle=line, label=label)
                axes.set(yscale="log", ylabel="mean power")
            else:
                for name, reference in (("synthetic", "real"), ("reconstruction", "image")):
                    if name in curves and reference in curves:
                        _, colour, line = looks[name]
                        ratio = curves[name] / np.maximum(curves[reference], 1e-30)
                        label = f"{name} / {'real' if reference == 'real' else 'its image'}"
                        axes.plot(frequency, ratio, color=colour, linestyle=line, label=label)
                axes.axhline(1.0, color=INK, linewidth=0.8)
                axes.set(ylim=(0, max(1.25, min(2.0, axes.get_ylim()[1]))), ylabel="ratio")
            for edge in (0.25, 0.5):
                axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
            axes.set(xlim=(0, 1), xlabel="spatial frequency, fraction of Nyquist", title=title)
            axes.legend(fontsize=7.5, loc="lower left" if charts else "upper right")
            drawing.tight_layout()
            charts.append(chart(drawing, title))
    return charts


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
) -> list[Chart]:
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
        drawing = figure(WHOLE, 1.2 + (0.34 + 0.18 * (len(sets) - 1)) * len(entries))
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
        axes.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
        drawing.tight_layout()
        return [chart(drawing, "AUC of every arm")]


@dataclass(frozen=True)
class Bars:
    """One panel of bars: groups of them across, and within each group a bar per series, with what it may at best be."""

    title: str
    across: list[str]
    series: dict[str, list[Mapping[str, Any]]]
    ceilings: dict[str, list[Mapping[str, Any] | None]] = field(default_factory=dict)


def bars(panels: Sequence[Bars], label: str) -> list[Chart]:
    """Figures with intervals as bars from 0, a chart per panel; a short line over a bar is its ceiling."""
    charts = []
    for panel in panels:
        with styled():
            width = 0.8 / len(panel.series)
            drawing, axes = _panel(max(PANEL, min(WHOLE, 1.1 * len(panel.across))), 3.2)
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
                    label=plain(name),
                )
                axes.errorbar(places, values, yerr=distance, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
                for place, ceiling in zip(places, panel.ceilings.get(name, []), strict=False):
                    if ceiling and ceiling.get("value") is not None:
                        axes.hlines(
                            ceiling["value"], place - 0.48 * width, place + 0.48 * width, color=INK, linewidth=1.6
                        )
            axes.set_xticks(
                range(len(panel.across)),
                [wrapped([name.replace("_", " ")], 13) for name in panel.across],
                fontsize=8,
            )
            axes.set(ylabel=label)
            axes.set_title(panel.title, pad=22)
            axes.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 0.98), ncols=4)
            drawing.tight_layout()
            charts.append(chart(drawing, panel.title))
    return charts


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


def discriminability(curves: Mapping[str, Any]) -> list[Chart]:
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
        drawing, axes = _panel(WHOLE, 3.6)
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
        axes.legend(fontsize=7.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        drawing.tight_layout()
        return [chart(drawing, "AUC over the detail that is left")]


def _line_with_errors(
    axes: Axes, places: np.ndarray, figures: Sequence[Mapping[str, Any]], look: tuple[str, str, Any], label: str
) -> None:
    """Figures at `places`, joined, with their intervals; `look` is colour, marker and line style."""
    values, distance = _error(figures)
    colour, marker, line = look
    style: dict[str, Any] = {"markersize": 5, "linewidth": 1.4, "capsize": 2.5}
    axes.errorbar(places, values, yerr=distance, color=colour, marker=marker, linestyle=line, label=label, **style)


def ratio_curves(curves: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """AUC over images added per real one, a line per real share and kind of added image; the places are a
    little apart.
    """
    with styled():
        drawing, axes = _panel(WHOLE, 3.6)
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
        return [chart(drawing, "AUC over the images added")]


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


#: What quantities of a training history do as it goes well; of others (such as `kl`) neither can be said.
GOOD = dict.fromkeys(("l1", "loss", "coarse", "spectral"), "falls") | dict.fromkeys(
    ("psnr", "ssim", "ms_ssim"), "rises"
)


def loss_curves(history: pd.DataFrame) -> list[Chart]:
    """A panel per quantity of a training history (step, metric, value), training and validation together."""
    panels: dict[str, dict[str, pd.DataFrame]] = {}
    for metric, rows in history.groupby("metric", sort=True):
        quantity, series = _quantity(str(metric))
        panels.setdefault(quantity, {})[series] = rows.sort_values("step", kind="stable")
    colours = {"train": GREY, "validation": "#1d4ed8"}
    charts = []
    for quantity, group in panels.items():
        values = np.concatenate([rows["value"].to_numpy() for rows in group.values()])
        if not values.any():
            continue  # a loss without weight
        with styled():
            drawing, axes = _panel(2.9, 2.3)
            for series, rows in group.items():
                few = len(rows) <= 40
                axes.plot(
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
                axes.set_yscale("log")
            name, unit = ("PSNR", ", dB") if quantity == "psnr" else (quantity.replace("_", " "), "")
            good = f": good if it {GOOD[quantity]}" if quantity in GOOD else ""
            axes.set(title=plain(f"{name}{unit}{good}"), xlabel="step")
            if len(group) > 1:
                axes.legend(fontsize=7.5)
            drawing.tight_layout()
            charts.append(chart(drawing, f"{name} by step"))
    return charts
