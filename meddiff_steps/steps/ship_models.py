"""Step `ship_models`: a model release made small enough to come with the package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.release.shipping import ship

log = logging.getLogger(__name__)


def run(
    release: Annotated[Path, typer.Argument(help="folder of a model release (model-release/)")],
    out: Annotated[
        Path, typer.Option(help="folder to write, meddiff_steps/shipped/NAME; LICENSE is there already, by hand")
    ],
) -> None:
    """Write the models of a release in half precision, for `meddiff init --from NAME`."""
    log.info("%s: weights of %.1f MB", out, ship(release, out) / 1e6)
