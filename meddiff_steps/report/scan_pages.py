"""Pages of all scans of a cohort as they were preprocessed, the oddest first, for a person to keep or exclude.

A page is self-contained, loads nothing, and runs no script but its own, which sorts and writes decisions as lines of
qc.tsv.  It shows scans of people: it is private.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from meddiff_steps.cohort.decisions import EXCLUDED
from meddiff_steps.report import templates
from meddiff_steps.report.figures import mosaic, planes

#: Scans of a page: about 6 MB.
PER_PAGE = 500
#: Shortest side of a thumbnail, pixels.
SMALLEST = 112
#: Colours of outlines: what counts of the scan, and the template.
COUNTED, TEMPLATE = (56, 189, 248), (251, 146, 60)
#: A column counts as a measure where at least so many scans have it, and two of them differ.
LEAST_SCANS = 2
#: Columns that number things and measure nothing.
_NO_MEASURE = ("background_value",)
#: What the measures of the quality table say, by column (docs/preprocessing.md has all of them).
LEGEND: Mapping[str, str] = {
    "oddness": "how far the scan is from the middle of the cohort, in the measure where it is furthest: robust standard"
    " deviations",
    "percentile_low": "grey level that became 0",
    "percentile_high": "grey level that became 1",
    "cut_off_share": "share of the foreground outside of the grid",
    "foreground_share": "share of the scan that counts",
    "mask_ml": "volume of the brain mask, mL",
    "mask_on_head": "share of the brain mask that lies on the head",
    "head_ml": "volume of what is not background, with what it encloses, mL",
    "skull_valley": "depth of the dark ring below the surface: high where a skull is left",
    "bias_field_low": "1st percentile of the field that the scan was divided by",
    "bias_field_high": "99th percentile of it",
    "registration_rotation_deg": "by how many degrees it was turned onto the template",
    "registration_translation_mm": "by how many mm it was moved there",
    "registration_scale": "size of the head as a share of the template's",
    "registration_correlation": "absolute correlation with the template afterwards, 0 to 1",
}
#: Of named channels, by the end of the column.
CHANNEL_LEGEND: Mapping[str, str] = {
    "_on_head": "share of that mask or label map that lies on the head",
    "_percentile_low": "grey level of that channel that became 0",
    "_percentile_high": "grey level of that channel that became 1",
}
#: Columns in grey values, which have a unit in CT alone: of MR they say which scanner it was, and make nothing odd.
_GREY_VALUES = ["percentile_low", "percentile_high"]


def measures(quality: pd.DataFrame) -> pd.DataFrame:
    """The columns of a quality table that are numbers and differ between scans, by row of the table."""
    numbers = quality.select_dtypes("number").astype("float64").drop(columns=list(_NO_MEASURE), errors="ignore")
    return numbers.loc[:, [n for n in numbers if numbers[n].count() >= LEAST_SCANS and numbers[n].nunique() > 1]]


def oddness(found: pd.DataFrame) -> pd.DataFrame:
    """How far each scan is from the middle of the cohort: |value - median| in robust standard deviations.

    1.4826 times the median absolute deviation (Rousseeuw and Croux 1993); where more than half of the scans have one
    value, the standard deviation.

    Parameters
    ----------
    found
        As of `measures`.

    Returns
    -------
    DataFrame
        A column per measure, 0 where it is null.
    """
    away = (found - found.median()).abs()
    spread = 1.4826 * away.median()
    return (away / spread.where(spread > 0, found.std(ddof=0))).fillna(0.0)


def in_order(quality: pd.DataFrame) -> pd.DataFrame:
    """The table with the scans left out first, then the oddest; `oddest` (a measure) and `oddness` are added."""
    odd = oddness(measures(quality))
    no_unit = quality["background"].fillna("") != "air"
    odd.loc[no_unit, odd.columns.intersection(_GREY_VALUES)] = 0.0
    worst = odd.max(axis=1) if len(odd.columns) else pd.Series(0.0, quality.index)
    which = odd.idxmax(axis=1) if len(odd.columns) else pd.Series("", quality.index)
    return (
        quality.assign(oddness=worst, oddest=which.where(worst > 0, ""), usable=quality["status"] == "ok")
        .sort_values(["usable", "oddness", "scan_id"], ascending=[True, False, True], kind="stable")
        .drop(columns="usable")
        .reset_index(drop=True)
    )


def thumbnail(image: np.ndarray, template: np.ndarray | None = None) -> bytes:
    """The middle slices of a preprocessed scan, side by side, with outlines; a JPEG of 8 bits.

    Parameters
    ----------
    image
        (1, *spatial) in [0, 1].  What is above 0, with what it encloses, is outlined.
    template
        Bool, (*spatial), where the template has its head; outlined in another colour.
    """
    counted = ndimage.binary_fill_holes(np.asarray(image[0]) > 0)
    grey = np.clip(mosaic(planes(image)), 0.0, 1.0)
    factor = max(1, -(-SMALLEST // min(grey.shape)))
    picture = Image.fromarray(grey.astype(np.float32), mode="F").resize(
        (grey.shape[1] * factor, grey.shape[0] * factor), Image.Resampling.BICUBIC
    )
    shown = np.repeat(np.clip(np.asarray(picture) * 255, 0, 255).round().astype(np.uint8)[..., np.newaxis], 3, axis=2)
    for area, colour in ((template, TEMPLATE), (counted, COUNTED)):
        if area is not None:
            whole = np.kron(mosaic(planes(area[np.newaxis])) > 0.5, np.ones((factor, factor), dtype=bool))
            shown[whole & ~ndimage.binary_erosion(whole, border_value=1)] = colour
    buffer = io.BytesIO()
    Image.fromarray(shown).save(buffer, format="JPEG", quality=82, subsampling=0)
    return buffer.getvalue()


def meaning(name: str) -> str:
    """Of a measure, in a few words."""
    ends = (words for end, words in CHANNEL_LEGEND.items() if name.startswith("channel_") and name.endswith(end))
    return LEGEND.get(name) or next(ends, "")


@dataclass(frozen=True)
class Card:
    """A scan on a page: `jpeg` is None where it was left out, `values` are its measures."""

    scan_id: str
    jpeg: bytes | None
    excluded: bool
    said: str
    values: Mapping[str, float | None]

    @property
    def data(self) -> str:
        return base64.b64encode(self.jpeg or b"").decode("ascii")


def card(row: Mapping[Any, Any], names: Sequence[str], jpeg: bytes | None, note: str | None) -> Card:
    """Of a row of `in_order`; `note` is what qc.tsv says beside a scan that it excludes, None where it keeps it."""
    if row["status"] == "ok":
        said = f"{row['oddest']}: {row['oddness']:.1f} deviations" if row["oddest"] else ""
    else:
        said = str(row["reason"]) + ("" if row["reason"] == EXCLUDED else f": {row['message']}")
    if note:
        said = f"{said} ({note})" if said else note
    values = {name: None if pd.isna(row[name]) else float(row[name]) for name in ("oddness", *names)}
    return Card(str(row["scan_id"]), jpeg, note is not None, said, values)


def render(
    cards: Sequence[Card],
    *,
    title: str,
    simulated: bool,
    page: int,
    pages: Sequence[str],
    scans: int,
    decisions: Mapping[str, str],
    outlines: Sequence[tuple[str, tuple[int, int, int]]],
) -> bytes:
    """One page as UTF-8; all text is escaped.

    Parameters
    ----------
    cards
        Of this page, in order.
    page, pages
        Its number from 0, and the file names of all.
    scans
        Of all pages.
    decisions
        The scans that qc.tsv excludes already, and notes.
    outlines
        What is drawn, in words, and its colour.
    """
    environment = templates.environment()
    environment.filters["show"] = lambda value: "–" if value is None else f"{value:.4g}"
    script = environment.get_template("scans.js.jinja").render()
    names = list(cards[0].values) if cards else []
    return (
        environment.get_template("scans.html.jinja")
        .render(
            title=title,
            simulated=simulated,
            cards=cards,
            names={name: meaning(name) for name in names},
            page=page,
            pages=pages,
            scans=scans,
            outlines=outlines,
            decisions=json.dumps([[scan, note] for scan, note in sorted(decisions.items())]),
            script=script,
            script_digest=templates.script_digest(script),
        )
        .encode("utf-8")
    )
