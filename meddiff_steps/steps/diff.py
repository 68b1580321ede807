"""Step `diff`: how two releases differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.audit.explain import compare
from meddiff_steps.provenance.verify import shown


def run(
    first: Annotated[Path, typer.Argument(help="root of a release")],
    second: Annotated[Path, typer.Argument(help="root of another")],
) -> None:
    """Name every field of config, recipes, images, code and environment that differs, and in how many subjects, and
    the files that differ on disk, whatever the ledgers say of them.

    Exit code 0: the same; 1: they differ; 2: could not run.
    """
    lines = compare(first, second)
    print("\n".join(map(shown, lines)) if lines else "no difference")
    raise typer.Exit(1 if lines else 0)
