"""An audit as text for a terminal and as one self-contained page."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from jinja2 import Environment

from meddiff_steps.audit.request import LEVELS, Report

WHAT = (
    "The files of provenance/ can be read and have their form.",
    "Every file is the one that was sealed; who sealed it.",
    "No file too many or too few; tables, folders and ledger agree.",
    "From the ledger back to the cohort: every file that one run read is what another wrote.",
    "Keys, noise, settings, covariates, attempts and decisions fit together.",
    "Every image decodes, shows what the ledger says, and says that it is synthetic.",
    "Images made again from their recipe are the released ones.",
    "Released images are no nearer to real training scans than allowed.",
)


def as_text(report: Report) -> str:
    """One line per check under one per level, and the verdict."""
    lines = [f"{report.release}" + (f"   root.json SHA-256 {report.sha256}" if report.sha256 else "")]
    for level, name in enumerate(LEVELS):
        lines.append(f"L{level} {name:13}{report.status(level)}")
        for check in (check for check in report.checks if check.level == level):
            mark = {"pass": "ok", "finding": "FOUND", "note": "note", "not run": "NOT RUN"}[check.outcome]
            lines.append(f"   {mark:8}{check.name:16} {check.text}")
            lines += [f"{'':28}{example}" for example in check.examples]
    return "\n".join([*lines, verdict(report)])


def verdict(report: Report) -> str:
    """The last line: what was found, and what was not looked at."""
    skipped = [f"L{level}" for level in range(len(LEVELS)) if report.status(level) == "NOT RUN"]
    found = sum(check.outcome == "finding" for check in report.checks)
    rest = f"; {', '.join(skipped)} did not run" if skipped else ""
    return f"{found} finding(s){rest}" if found else f"nothing found{rest}"


@cache
def _template() -> str:
    return (files("meddiff_steps.audit") / "page.html.jinja").read_text(encoding="utf-8")


def as_html(report: Report) -> str:
    """One page without scripts or outside files; everything that comes from the release is escaped."""
    levels = [
        {
            "number": i,
            "name": name,
            "what": WHAT[i],
            "status": report.status(i),
            "checks": [check for check in report.checks if check.level == i],
        }
        for i, name in enumerate(LEVELS)
    ]
    return (
        Environment(autoescape=True)
        .from_string(_template())
        .render(report=report, levels=levels, verdict=verdict(report))
    )
