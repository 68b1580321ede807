"""`meddiff report`: the page that a person looks at first."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import DERIVATIVE
from meddiff_steps.operations.status import results_of


def run(
    study: Annotated[Path, typer.Argument(help="study (YAML), or its folder results/STUDY")],
    open: Annotated[bool, typer.Option("--open", help="open it in the browser")] = False,
) -> None:
    """Print where the report of a study lies."""
    page = results_of(study) / "report.html"
    if not page.is_file():
        above = page.parent.parent / "report.html"  # of a release, or another folder of the results
        if above.is_file():
            raise UserError(f"{page}: not there. Did you mean `meddiff report {above.parent}`?")
        made = sorted(figures.parent for figures in page.parent.glob(f"*/{DERIVATIVE[1]}"))
        raise UserError(
            f"{page}: not there yet. `meddiff status {page.parent}` says how far the study is, `meddiff run STUDY.yaml`"
            " makes it."
            + (f" Applications have been made, see {', '.join(map(str, made))} (contact-sheet.png)." if made else "")
        )
    print(page)
    if open and not webbrowser.open(page.resolve().as_uri()):
        raise UserError(f"no browser could be started. Open {page.resolve()} by hand, or copy it: it is one file.")
