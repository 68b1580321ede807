"""report.html: one self-contained page, headline figures first.

The page loads nothing from outside (pictures are embedded, a content security policy forbids the rest and lets no
script run but the slice viewer's) and holds no dates or paths of the machine, so equal inputs give equal bytes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meddiff_steps.report import templates
from meddiff_steps.report.viewer import Viewer
from meddiff_steps.report.wording import interval, number

#: Figures have these keys (and perhaps floor and ceiling).
_FIGURE_KEYS = {"value", "low", "high"}


@dataclass(frozen=True)
class Picture:
    """An embedded PNG: `alt` says what is seen for those who do not see it."""

    png: bytes
    alt: str
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode("ascii")

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels; pictures are drawn at 120 dots per inch and shown at 96."""
        return round(struct.unpack(">I", self.png[16:20])[0] * 96 / 120)


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Card:
    title: str
    content: Any


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    viewer: Viewer | None = None


@dataclass(frozen=True)
class Headline:
    """A number, what it means, and what it is to be compared with."""

    figure: str
    words: str
    detail: str = ""


def _show_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, 4) if isinstance(value, float) else str(value)


def render(
    *, title: str, study: str, lead: str, simulated: bool, headline: Sequence[Headline], sections: Iterable[Section]
) -> bytes:
    """The page as UTF-8; all text is escaped.

    Parameters
    ----------
    title, study, lead
        Heading, name of the study, one introductory paragraph.
    simulated
        Shows the banner that says so.
    headline, sections
        In the order of the page; sections without content are left out.
    """
    environment = templates.environment()
    environment.filters |= {
        "is_figure": lambda keys: set(keys) >= _FIGURE_KEYS,
        "show_figure": lambda figure: interval(figure, 4) + (f", n {figure['n']}" if "n" in figure else ""),
        "show_value": _show_value,
    }
    filled = [s for s in sections if s.text or s.pictures or s.tables or s.cards or s.viewer]
    script = environment.get_template("viewer.js.jinja").render() if any(s.viewer for s in filled) else ""
    page = environment.get_template("page.html.jinja").render(
        title=title,
        study=study,
        lead=lead,
        simulated=simulated,
        headline=headline,
        sections=filled,
        script=script,
        script_digest=templates.script_digest(script) if script else "",
    )
    return page.encode("utf-8")
