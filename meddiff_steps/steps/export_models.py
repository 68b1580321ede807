"""Step `export_models`: the models that made a release, packed for publication."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.config import load_stage
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json
from meddiff_steps.release.models import README, pack
from meddiff_steps.steps import options


def run(
    config: options.Config,
    root: Annotated[Path, typer.Option(help="root.json of the sealed release")],
    privacy: Annotated[Path, typer.Option(help="privacy/report.json")],
    autoencoder: options.Autoencoder,
    diffusion: options.Diffusion,
    out: Annotated[Path, typer.Option(help="README.md to write, in the folder of the packed models")],
    decoder: options.Decoder = None,
) -> None:
    """Pack the weights that made a sealed release, with cards, config, checksums and a warning.

    Runs on request alone (release.models): weights can give away more of the training scans than images do.
    """
    if out.name != README:
        raise UserError(f"--out {out}: expected a path that ends in {README}. Its folder holds the models.")
    study = load_stage(config, "export_models")
    models = {"autoencoder": autoencoder, "diffusion": diffusion, **({"decoder": decoder} if decoder else {})}
    pack(models, root.parents[1], out.parent, study.release.name, read_json(privacy))
