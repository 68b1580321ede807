"""report.html: one self-contained page, honest sentences first.

The page loads nothing from outside (pictures are embedded, a content security policy forbids the rest and lets no
script run but the slice viewer's) and holds no dates or paths of the machine, so equal inputs and equal code give equal
bytes.
"""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meddiff_steps import __version__
from meddiff_steps.report import glossary, templates
from meddiff_steps.report.charts import Chart
from meddiff_steps.report.sentences import RULES, Sentence
from meddiff_steps.report.viewer import Viewer
from meddiff_steps.report.wording import interval, number

#: Figures have these keys (and perhaps floor and ceiling).
_FIGURE_KEYS = {"value", "low", "high"}
#: Who wrote the software and what it is called, as in CITATION.cff; a test compares.
AUTHORS, SOFTWARE = (
    "The meddiff developers",
    "meddiff: a Snakemake workflow for population-scale synthesis of medical images",
)
#: Grades in words and as a sign, so that they can be told without colours.
SIGNS = {"good": "✓", "middling": "~", "bad": "✗", "not measured": "?"}
#: Of a page, what is no text that is read.
_UNREAD = re.compile(r"<(script|style|title)\b.*?</\1>|<[^>]+>", re.S)


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
class Charts:
    """One or several panels that share what is said of them."""

    panels: Sequence[Chart]
    alt: str
    caption: str


@dataclass(frozen=True)
class Shot:
    """One image of a gallery: a PNG, what kind it is, and what is known of it."""

    png: bytes
    kind: str
    facts: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Gallery:
    """Pairs of images that belong together; `wide` where an image is several slices beside each other."""

    pairs: Sequence[tuple[Shot, Shot]]
    caption: str
    wide: bool


@dataclass(frozen=True)
class Table:
    header: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Card:
    title: str
    content: Any


@dataclass(frozen=True)
class Section:
    """A part of the page; `parts` are the sections within it."""

    id: str
    title: str
    text: list[str] = field(default_factory=list)
    pictures: Sequence[Picture | Charts | Gallery] = ()
    tables: list[Table] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    viewer: Viewer | None = None
    parts: Sequence[Section] = ()

    def filled(self) -> Section | None:
        """The section without what is empty in it; None if that is all."""
        parts = [part for part in (each.filled() for each in self.parts) if part]
        tables = [table for table in self.tables if table.rows]
        if self.text or self.pictures or tables or self.cards or self.viewer or parts:
            return replace(self, parts=parts, tables=tables)
        return None

    @property
    def interactive(self) -> bool:
        return self.viewer is not None or any(part.interactive for part in self.parts)


@dataclass(frozen=True)
class Numbering:
    """Numbers of figures and tables, in the order of the page."""

    counts: dict[str, int] = field(default_factory=dict)

    def next(self, kind: str) -> str:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        return f"{kind} {self.counts[kind]}"

    def marks(self, chart: Chart) -> str:
        """What is inside of a chart, with ids that no other chart of the page has."""
        return chart.marks.replace(chart.prefix, f"{self.next('chart').replace(' ', '-')}-")


def _show_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, 4) if isinstance(value, float) else str(value)


def _made_by(code: Mapping[str, Any] | None) -> str:
    """Version and commit of the code that wrote the page."""
    if code is None or code["commit"] is None:
        return f"meddiff {__version__}, commit not known (it was not run from its repository)"
    return f"meddiff {__version__}, commit {code['commit']}{', with changes of its own' if code['dirty'] else ''}"


def render(
    *,
    title: str,
    study: str,
    lead: str,
    simulated: bool,
    sections: Iterable[Section],
    sentences: Sequence[Sentence] = (),
    code: Mapping[str, Any] | None = None,
) -> bytes:
    """The page as UTF-8; all text is escaped.

    Parameters
    ----------
    title, study, lead
        Heading, name of the study, one introductory paragraph.
    simulated
        Shows the banner that says so.
    sentences, sections
        In the order of the page; sections without content are left out.
    code
        The checkout that writes the page: `commit`, `dirty`.
    """
    environment = templates.environment()
    environment.filters |= {
        "is_figure": lambda keys: set(keys) >= _FIGURE_KEYS,
        "show_figure": lambda figure: interval(figure, 4) + (f", n {figure['n']}" if "n" in figure else ""),
        "show_value": _show_value,
        "kind": lambda content: type(content).__name__,
    }
    filled = [section for section in (each.filled() for each in sections) if section]
    script = environment.get_template("viewer.js.jinja").render() if any(s.interactive for s in filled) else ""
    template = environment.get_template("page.html.jinja")

    def page(terms: Mapping[str, str]) -> str:
        return template.render(
            title=title,
            study=study,
            lead=lead,
            simulated=simulated,
            sentences=sentences,
            rules=RULES,
            signs=SIGNS,
            sections=filled,
            terms=terms,
            numbering=Numbering(),
            made_by=_made_by(code),
            citation=f"{AUTHORS}. {SOFTWARE}, version {__version__}.",
            script=script,
            script_digest=templates.script_digest(script) if script else "",
        )

    return page(glossary.used_in(html.unescape(_UNREAD.sub(" ", page({}))))).encode("utf-8")
