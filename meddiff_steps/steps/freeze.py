from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps import config


def run(
    study: Annotated[Path, typer.Argument(help="the study's YAML file")],
    out: Annotated[Path, typer.Option(help="folder for the frozen files")],
) -> None:
    """Write the content-addressed config files of a study, one per stage, and print their paths.

    The workflow does this by itself when it starts; do it by hand to run a single step without Snakemake.
    """
    loaded = config.load_study(study)
    for stage in (None, *config.STAGES):
        print(config.freeze(loaded, stage, out))
