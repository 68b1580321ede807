"""The page docs/benchmarks.md and its figure, made from the JSON files alone: no figure on it is typed by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullFormatter

from meddiff_steps.core.files import atomic_path, read_json, write_atomic

Result = dict[str, Any]
Row = dict[str, Any]

#: Characters of a line of text on the page.
WIDTH = 120

#: Colours that differ in brightness, too.
COLOURS = {"ours": "#0b6e99", "peer": "#d9822b"}
OTHERS = ("#0b6e99", "#d9822b", "#5a8f3c", "#7d4f9e", "#444444", "#b03a5b")


@dataclass(frozen=True)
class Aim:
    """What was to be reached.

    Attributes
    ----------
    what, beside
        As announced.
    least
        Ratio to reach.
    row
        Whether a row is about it; rows of the GPU name it themselves as `aim`.
    """

    what: str
    beside: str
    least: float
    row: Callable[[Row], bool]


def _named(start: str, *sizes: str) -> Callable[[Row], bool]:
    return lambda row: (
        row["what"].startswith(start) and (not sizes or row["size"] in sizes) and row.get("device", "cpu") == "cpu"
    )


#: Aims of the processor; those of the GPU have rows of their own with `aim`, `aim_text` and `aim_reached`.
AIMS = (
    Aim(
        "diffusion training throughput, CPU, 64x64x64",
        "the tutorial, which encodes at every step",
        3.0,
        _named("diffusion training, ours as studies have it, beside the tutorial", "64x64x64"),
    ),
    Aim(
        "unguided sampling at equal Frechet distance",
        "DDIM-200, unguided",
        10.0,
        _named("unguided sampling beside DDIM-200"),
    ),
    Aim(
        "unguided sampling at equal Frechet distance",
        "DDIM-50, unguided",
        3.0,
        _named("unguided sampling beside DDIM-50"),
    ),
    Aim(
        "loader after the first epoch, images",
        "PersistentDataset",
        100.0,
        _named("loader, later epochs, images, beside PersistentDataset"),
    ),
    Aim(
        "loader after the first epoch, what diffusion trains on",
        "PersistentDataset",
        100.0,
        _named("loader, later epochs, what diffusion trains on"),
    ),
)


def number(value: float | None) -> str:
    """Three significant digits without exponents: 0.0123, 4.56, 1,230."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{round(value, 2 - int(np.floor(np.log10(abs(value))))):,.{digits}f}"


def ratio_text(ratio: dict[str, Any]) -> str:
    """`3.4x [3.1, 3.8]`; without brackets where there was one turn only."""
    interval = "" if ratio.get("low") is None else f" [{number(ratio['low'])}, {number(ratio['high'])}]"
    return f"{number(ratio['value'])}x{interval}"


def lines(result: Result) -> list[str]:
    """A result for the terminal."""
    out = [f"{result['name']}: {result['seconds']:.0f} s (budget {result['budget_seconds']:.0f} s)"]
    for row in result.get("rows", []):
        out.append(
            f"  {row['what']}, {row['size']}: {number(row['ours']['value'])} beside {number(row['peer']['value'])}"
            f" {row['unit']}, {ratio_text(row['ratio'])}"
        )
    for curve in result.get("curves", []):
        out += [
            f"  {curve['name']}, {s['label']}: exponent {s['exponent']:.2f}" for s in curve["series"] if "exponent" in s
        ]
    return out


def page(results: Path, docs: Path) -> Path:
    """Write the page and its figure; returns the page's path.  Without results, the page says how they are made."""
    found = [read_json(path) for path in sorted(results.glob("*.json"))]
    found = [result for result in found if "rows" in result or "curves" in result]
    if found:
        with atomic_path(docs / "images" / "benchmarks.png") as path:
            _draw(found, path)
    write_atomic(docs / "benchmarks.md", (_text(found).rstrip() + "\n").encode())
    return docs / "benchmarks.md"


# -------------------------------------------------------------------------------------------------------- text


def _text(found: Sequence[Result]) -> str:
    rows = [row for result in found for row in result.get("rows", []) if "ratio" in row]
    quick = any(result.get("quick") for result in found)
    parts = [
        "# Benchmarks",
        "**Made with `--quick`: the figures mean nothing.**" if quick else "",
        _INTRODUCTION,
        *(_figures(found, rows) if found else [_NONE]),
        "## What is compared",
        _COMPARED,
        *(["## Machine and versions", _machines(found)] if found else []),
    ]
    return "\n\n".join(part for part in parts if part)


def _figures(found: Sequence[Result], rows: Sequence[Row]) -> list[str]:
    """All sections that have figures."""
    return [
        "## Side by side",
        _table(rows),
        "![Ratios with intervals, held-out figures against seconds, growth of cost](images/benchmarks.png)",
        _FIGURE,
        *_reached([entry for result in found for entry in result.get("reached", [])]),
        *_realism([entry for result in found for entry in result.get("realism", [])]),
        "## Aims",
        _aims(found, rows),
        "## Distance to the floor",
        _floors(rows),
        "## How cost grows",
        _growth(found),
    ]


_NONE = """\
**No figures yet.** Those of version 0.1 were of other networks, and some of its comparisons were unfair to the peers;
they were taken off this page.\
"""

_INTRODUCTION = """\
<!-- Made by `make bench` from benchmarks/results/*.json. Do not edit: change benchmarks/render.py. -->

What a user of MONAI's own latent-diffusion tutorials would run, beside what this workflow does: on the same subjects
and the same machine. Sides take turns in one process. A ratio above 1 means that ours is faster; it is the median over
turns, in brackets its 95 % bootstrap interval over turns. A single turn has no interval. Absolute times are of a shared
machine and mean little.

`make bench` repeats everything in about half an hour on two cores; `python -m benchmarks run NAME` repeats one
comparison. What a GPU does is in [gpu.md](gpu.md).\
"""

_FIGURE = """\
Left: every ratio of the table. Right: held-out figures against seconds of training, realism against sampler steps, and
growth of cost with its exponents.\
"""

_COMPARED = """\
- **The peers' way** is in `benchmarks/peer.py`, written against MONAI's public API as its tutorials use it. The
  tutorial (`generation/3d_ldm`) has `AutoencoderKL` at full resolution and encodes every image again at every diffusion
  step. The cached peer is MAISI's (`generation/maisi`): latents are encoded once, and a rectified flow is learnt. Each
  trains at the rate of its own script, which the notes name. Further `CacheDataset` and `PersistentDataset` over
  `.nii.gz`, `DDIMScheduler` and `RFlowScheduler`, decoding one by one, MS-SSIM over all ordered pairs.
- **Two kinds of ours.** "As studies have it" has the networks of the demo (`config/config.yaml`), which are others
  than the peers', so that a ratio is the gain of networks and training together. "The peer's network in our training"
  has `AutoencoderKL` and `DiffusionModelUNet` of the peers' sizes (weights within a quarter, which a test checks): its
  ratio is the gain of the training alone. Latent grid, batch and noise schedule are the same everywhere.
- **Precision**: ours is what `compute.precision: auto` means on the machine, bf16 where the processor multiplies that
  fast; the peers' is fp32, as in their scripts on a processor, whose autocast is for GPUs.
- **In the peers' favour**: no anomaly detection, perceptual loss, discriminator or TensorBoard, which their scripts
  have; the narrowest full-resolution level; images and latents held in memory while diffusion trains; sampling in
  batches, not one by one. Ours has loss terms that theirs has not.
- **Where ours does more**: preprocessing also finds the brain's outline, looks for a skull and a face that the study
  denies, and measures what the table of quality holds, most of its time; the first epoch of a loader has that in it.
  Volumes are written with a mark, a checksum of the file and one of its voxels.
- **Not compared**: losses of diffusion models. Both would have to learn the same latents, and ours begins with the
  effects of covariates in closed form.
- **Sampling** has one trained model on both sides, ours, also as a rectified flow (the same noise levels by other
  names); what differs is the sampler and the decoding. Both sides are guided alike: not at all, one pass per step, or
  by the demo's scale, two passes. KID is of all features, standardised by training scans; 0 is one distribution.
- **Data** are simulated heads (`meddiff_steps.simulation.brains`); nothing here says how good images of real people
  are.\
"""


def _table(rows: Iterable[Row]) -> str:
    out = ["| what | size | ours | peers | ratio | by processor time | notes |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        values = [f"{number(row[side]['value'])} {row['unit']}" for side in ("ours", "peer")]
        cpu = ratio_text(row["ratio_cpu"]) if "ratio_cpu" in row else ""
        out.append(
            f"| {row['what']} | {row['size']} | {values[0]} | {values[1]} | **{ratio_text(row['ratio'])}** | {cpu} |"
            f" {_notes(row)} |"
        )
    return "\n".join(out)


def _notes(row: Row) -> str:
    notes = []
    if "steps" in row:
        notes.append(f"steps: ours {row['steps']['ours']}, peer {row['steps']['peer']}")
    if "realism" in row:
        notes.append(
            "Frechet: "
            + ", ".join(f"{side} {_figure(row['realism'][side]['frechet'])}" for side in ("ours", "peer", "floor"))
        )
    for key, title in (
        ("kibibytes_per_scan", "KiB per scan"),
        ("kibibytes_per_volume", "KiB per volume"),
        ("private_mebibytes", "MiB of memory taken"),
    ):
        if key in row:
            notes.append(f"{title}: ours {number(row[key]['ours'])}, peer {number(row[key]['peer'])}")
    if "figure" in row:
        notes.append(
            f"ours {_figure(row['figure'])}"
            + (f", all pairs {number(row['all_pairs']['value'])}" if row.get("all_pairs") else "")
        )
    if "ratio_for_1000_volumes" in row:
        notes.append(f"for 1,000 volumes {number(row['ratio_for_1000_volumes'])}x")
    if row.get("note"):
        notes.append(row["note"])
    return "; ".join(notes)


def _figure(entry: dict[str, Any]) -> str:
    """A figure with its interval, where it has one."""
    if entry.get("low") is None:
        return number(entry["value"])
    return f"{number(entry['value'])} [{number(entry['low'])}, {number(entry['high'])}]"


def _reached(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The section on what autoencoders reach, if anything is known."""
    if not entries:
        return []
    mean, level = entries[0]["mean_image"], entries[0]["level"]
    said = (
        f"The mean training image has {number(mean)} dB on held-out scans at {entries[0]['size']}: what a network gives"
        " that has learnt nothing about a subject."
    )
    said += (
        " The level lies 3 dB below the best of the peers."
        if level is not None
        else " Within these minutes no peer came 3 dB above it, so no seconds to a common level are told."
    )
    out = ["| training | by | starts at | best | within | seconds to the level |", "|---|---|---|---|---|---|"]
    for entry in entries:
        seconds = "-" if level is None else number(entry["seconds_to_level"])
        if level is not None and entry["seconds_to_level"] == 0:
            seconds = "there before the first step"
        reached = "-" if level is None else f"{seconds} ({number(level)} dB)"
        out.append(
            f"| {entry['side']} | {entry['settings']} | {number(entry['start'])} dB | {number(entry['best'])} dB |"
            f" {number(entry['minutes'])} min | {reached} |"
        )
    return ["## What an autoencoder reaches", textwrap.fill(said, WIDTH), "\n".join(out)]


def _realism(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The section on how real samples are, if anything is known."""
    if not entries:
        return []
    said = (
        f"Distances of {entries[0]['images']} images to as many held-out scans, with 95 % bootstrap intervals over"
        " images. As many training scans give the floor, the best that there is to get; what lies within its interval"
        " cannot be told from it. One model, trained for less than a minute, serves all samplers."
    )
    out = ["| what | size | Frechet distance | KID |", "|---|---|---|---|"]
    out += [f"| {e['what']} | {e['size']} | {_figure(e['frechet'])} | {_figure(e['kid'])} |" for e in entries]
    return ["## How real the samples are", textwrap.fill(said, WIDTH), "\n".join(out)]


def _aims(found: Sequence[Result], rows: Sequence[Row]) -> str:
    out = ["| what | beside | aim | measured | reached? |", "|---|---|---|---|---|"]
    for aim in AIMS:
        matching = [row for row in rows if aim.row(row)]
        if not matching:
            out.append(f"| {aim.what} | {aim.beside} | >= {aim.least:g}x | not measured | |")
        for row in matching:
            reached = row["ratio"]["value"] >= aim.least
            surely = row["ratio"].get("low") is None or row["ratio"]["low"] >= aim.least
            verdict = ("yes" if surely else "yes, by the median") if reached else f"no: {_why(row)}"
            out.append(
                f"| {aim.what} ({row['size']}) | {aim.beside} | >= {aim.least:g}x | {ratio_text(row['ratio'])} |"
                f" {verdict} |"
            )
    for row in (row for result in found for row in result.get("rows", []) if "aim" in row):
        out.append(
            f"| {row['aim']} | {row.get('beside', '')} | {row['aim_text']} | {row['measured']} | {row['aim_reached']} |"
        )
    return "\n".join(out)


def _why(row: Row) -> str:
    """What keeps a ratio down, from its own figures."""
    bound = row.get("floor", {})
    if {"ours", "peer"} <= set(bound):
        saved = bound["peer"]["gflop"] / bound["ours"]["gflop"]
        rates = ", ".join(f"{side} {100 * bound[side]['reached']:.0f} %" for side in ("ours", "peer"))
        return (
            f"the networks' operations alone differ {number(saved)}x, and of the machine's matrix-product rate the"
            f" sides reach: {rates}"
        )
    if "ours" in bound:
        return (
            f"ours takes {number(1e6 / row['ours']['value'])} us, the peer {number(1e6 / row['peer']['value'])} us; "
            f"no program takes less than {number(1e6 * bound['ours']['seconds'])} us ({bound['ours']['kind']})"
        )
    if "steps" in row:
        return f"ours needs {row['steps']['ours']} steps for the peer's realism at {row['steps']['peer']}"
    return row.get("note") or "see the table"


def _floors(rows: Iterable[Row]) -> str:
    out = [
        "| what | size | side | least seconds | of | share of the time that is irreducible |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for side, entry in row.get("floor", {}).items():
            detail = f"{number(entry['gflop'])} GFLOP of matrix products" if "gflop" in entry else entry["kind"]
            out.append(
                f"| {row['what']} | {row['size']} | {side} | {number(entry['seconds'])} | {detail} |"
                f" {100 * entry['reached']:.0f} % |"
            )
    return (
        "Operations over the machine's measured rate of matrix products, or the part that a library does and nobody\n"
        "can leave out, per subject, volume or step.\n\n" + "\n".join(out)
    )


def _growth(found: Sequence[Result]) -> str:
    grown = [
        curve for result in found for curve in result.get("curves", []) if any("exponent" in s for s in curve["series"])
    ]
    out = ["| against | what | from | to | exponent | between neighbours |", "|---|---|---|---|---|---|"]
    for curve in grown:
        for s in (s for s in curve["series"] if "exponent" in s):
            local = ", ".join("-" if value is None else f"{value:.2f}" for value in s["local_exponents"])
            out.append(
                f"| {curve['name']} | {s['label']} | {s['x'][0]:,.0f} | {s['x'][-1]:,.0f} | {s['exponent']:.2f} |"
                f" {local} |"
            )
    knees = [_knee(curve, s) for curve in grown for s in curve["series"] if "exponent" in s]
    said = [knee for knee in knees if knee]
    return (
        "Cost goes with the size to the power of the exponent (least squares on logarithms).\n\n"
        + "\n".join(out)
        + ("\n\n" + "\n".join(said) if said else "")
    )


def _knee(curve: dict[str, Any], series: dict[str, Any]) -> str:
    """A sentence where growth changes by more than a third of an exponent."""
    local = [value for value in series["local_exponents"] if value is not None]
    if "per_step" in curve:
        said = (
            f"- {curve['name']}: {number(curve['per_step'])} s per step and {number(max(0.0, curve['at_zero']))} s that"
            f" do not depend on steps (noise, decoding): below {number(max(0.0, curve['at_zero']) / curve['per_step'])}"
            " steps these weigh more than the steps."
        )
        return textwrap.fill(said, WIDTH, subsequent_indent="  ")
    if len(local) < 2 or max(local) - min(local) < 1 / 3:
        return ""
    jumps = np.diff(local)
    at = int(np.abs(jumps).argmax()) + 1
    return (
        f"- {curve['name']}, {series['label']}: the exponent turns from {local[at - 1]:.2f} to {local[at]:.2f} at"
        f" {series['x'][at]:,.0f}."
    )


def _machines(found: Sequence[Result]) -> str:
    out = [
        (
            "| result | date | processor or GPU | threads | load before | ours in | matrix products, peers; ours | copy"
            " | took |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in found:
        m = result.get("machine", {})
        products = "; ".join(number(m[key]) for key in ("matmul_gflops", "matmul_gflops_ours") if m.get(key))
        rates = [
            m.get("precision", ""),
            f"{products} GFLOP/s" if products else "",
            f"{number(m['copy_gbytes'])} GB/s" if m.get("copy_gbytes") else "",
        ]
        device = m.get("gpu") or f"{m.get('processor', '')}, {m.get('cores', '')} cores"
        load = m.get("load_before", [""])[0]
        cells = [
            result["name"],
            result.get("date", "") + (", beside other work" if result.get("busy") else ""),
            device,
            m.get("threads", ""),
            load,
            *rates,
            f"{result.get('seconds', 0):.0f} s",
        ]
        out.append("| " + " | ".join(map(str, cells)) + " |")
    versions = {(name, value) for result in found for name, value in result.get("versions", {}).items()}
    named = ", ".join(f"{name} {value}" for name, value in sorted(versions)) + "."
    return "\n".join(out) + "\n\n" + textwrap.fill(named, WIDTH, break_on_hyphens=False)


# ------------------------------------------------------------------------------------------------------ figure


def _draw(found: Sequence[Result], path: Path) -> None:
    rows = [row for result in found for row in result.get("rows", []) if "ratio" in row and row["ratio"]["value"]]
    curves = [curve for result in found for curve in result.get("curves", [])]
    height = max(0.4 * len(rows) + 1.2, 2.6 * -(-len(curves) // 2), 3.0)
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        canvas = Canvas(figsize=(15, height), layout="constrained")
        left, right = canvas.subfigures(1, 2, width_ratios=(1.2, 1.0)) if curves else (canvas.subfigures(1, 1), None)
        _forest(left.subplots(), rows)
        if right is not None:
            axes = np.atleast_1d(right.subplots(-(-len(curves) // 2), 2)).ravel()
            for axis, curve in zip(axes, curves, strict=False):
                _curve(axis, curve)
            for axis in axes[len(curves) :]:
                axis.set_visible(False)
        canvas.savefig(path, dpi=110, format="png", metadata={"Software": None})


def _forest(axis: Axes, rows: Sequence[Row]) -> None:
    """One line per ratio with its interval and range, on a logarithmic scale."""
    for place, row in enumerate(reversed(rows)):
        ratio = row["ratio"]
        if ratio.get("range"):
            axis.plot(ratio["range"], [place, place], color="#bbbbbb", linewidth=1)
        if ratio.get("low"):
            axis.plot([ratio["low"], ratio["high"]], [place, place], color=COLOURS["ours"], linewidth=3)
        axis.plot(ratio["value"], place, "o", color=COLOURS["ours"], markersize=5)
        axis.annotate(
            f"{number(ratio['value'])}x",
            (ratio["value"], place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axis.set_yticks(range(len(rows)), [textwrap.fill(f"{r['what']}, {r['size']}", 56) for r in reversed(rows)])
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("times faster than the peers (bar: 95 % interval; thin line: range)")


def _sparse(along: Axis) -> None:
    """Numbers of a logarithmic axis that do not lie on each other."""
    low, high = along.get_data_interval()
    along.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low and high < 1000 else (1.0,)))
    along.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    along.set_minor_formatter(NullFormatter())


def _curve(axis: Axes, curve: dict[str, Any]) -> None:
    for place, series in enumerate(curve["series"]):
        colour = COLOURS[series["side"]] if "side" in series else OTHERS[place % len(OTHERS)]
        label = series["label"] + (f" ({series['exponent']:.2f})" if "exponent" in series else "")
        axis.plot(series["x"], series["y"], "o-", markersize=3, linewidth=1.2, color=colour, label=label or None)
    if curve.get("log"):
        axis.set_xscale("log")
        axis.set_yscale("log")
    elif curve["name"].startswith("sampling"):
        axis.set_xscale("log")
    elif curve["name"].startswith("diffusion"):
        axis.set_yscale("log")
    for along in (axis.xaxis, axis.yaxis):
        if along.get_scale() == "log":
            _sparse(along)
    axis.set(title=curve["name"], xlabel=curve["x_label"], ylabel=curve["y_label"])
    axis.legend(frameon=False, fontsize=7)
