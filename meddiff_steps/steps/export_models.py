"""Step `export_models`: the models that made a release, packed for publication."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.release.models import README, pack


def run(
    config: Annotated[Path, typer.Option(help="frozen config of stage `export_models`")],
    root: Annotated[Path, typer.Option(help="root.json of the sealed release")],
    privacy: Annotated[Path, typer.Option(help="privacy/report.json")],
    autoencoder: Annotated[Path, typer.Option(help="autoencoder/model.safetensors")],
    autoencoder_card: Annotated[Path, typer.Option(help="autoencoder/card.json")],
    diffusion: Annotated[Path, typer.Option(help="diffusion/model.safetensors")],
    diffusion_card: Annotated[Path, typer.Option(help="diffusion/card.json")],
    out: Annotated[Path, typer.Option(help="README.md to write, in the folder of the packed models")],
) -> None:
    """Pack the weights that made a sealed release, with cards, config, checksums and a warning.

    Runs on request alone (release.models): weights can give away more of the training scans than images do.
    """
    if out.name != README:
        raise UserError(f"--out {out}: expected a path that ends in {README}. Its folder holds the models.")
    study = load_stage(config, "export_models")
    models = {"autoencoder": (autoencoder, autoencoder_card), "diffusion": (diffusion, diffusion_card)}
    pack(models, root.parents[1], out.parent, study.release.name, read_json(privacy))
