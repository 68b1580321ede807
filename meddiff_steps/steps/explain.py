"""Step `explain`: where one synthetic image comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.audit.explain import explain
from meddiff_steps.provenance.verify import shown


def run(
    subject: Annotated[str, typer.Argument(help="participant, with or without sub-")],
    release: Annotated[Path, typer.Argument(help="root of the release")],
) -> None:
    """Print a subject's recipe, and the runs that led to its image, back to the cohort, as a tree.

    Tells what the release says; whether that is so is what `audit` checks.
    """
    print("\n".join(map(shown, explain(release, subject))))
