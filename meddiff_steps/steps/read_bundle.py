"""Step `read_bundle`: what a study has to say to start from a MONAI bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.models.pretrained.study import sections_of


def run(
    folder: Annotated[Path, typer.Argument(help="folder of a MONAI bundle or of a model release, or a configuration")],
) -> None:
    """Print the sections of a study that starts from a bundle, or from released models, to be completed."""
    typer.echo(sections_of(folder), nl=False)
