"""Step `audit`: check a release, level by level."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps import __version__
from meddiff_steps.audit.page import as_html, as_text
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic, write_json
from meddiff_steps.steps import options


def run(
    release: Annotated[Path, typer.Argument(help="root of the release")],
    key: Annotated[
        Path | None,
        typer.Option(exists=True, help="the publisher's public key (PEM), from elsewhere than the release; L1"),
    ] = None,
    private: Annotated[
        Path | None, typer.Option(exists=True, help="the private ledger (privacy/ledger-private.parquet); L4")
    ] = None,
    models: Annotated[
        Path | None, typer.Option(exists=True, help="folder with autoencoder/ and diffusion/; L6 makes images again")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(exists=True, help="the study's folder with the real scans; L7 compares with them again"),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="images that L6 and L7 look at")] = Request.sample,
    seed: Annotated[
        str | None,
        typer.Option(help="what those images are drawn by, to draw the same ones again; by default something new"),
    ] = None,
    version: Annotated[
        str, typer.Option(help="version of this package that sealed the release, as you know it from elsewhere")
    ] = __version__,
    images: Annotated[
        bool, typer.Option(help="read the images; without, L1 looks at sizes only and L5 does not run")
    ] = True,
    threads: options.ThreadsBeside = 1,
    json: Annotated[Path | None, typer.Option(help="report to write (JSON)")] = None,
    html: Annotated[Path | None, typer.Option(help="report to write (HTML)")] = None,
) -> None:
    """Check a release: form, integrity and signature, completeness, lineage, recipes, content, and with --models and
    --results also by making images again and comparing with the real scans again.

    Exit code 0: nothing found; 1: findings; 2: could not run, which includes a level that could not end.  A level that
    could not run says so and why.  Run it as an installed command, or as `python -P -m meddiff_steps`, and nothing
    that lies in the current folder is run.
    """
    if models is not None and not any(models.glob("*/model.safetensors")):
        raise UserError(
            f"--models {models}: no weights here (autoencoder/model.safetensors, ...). Give the study's results, or the"
            " unpacked models of the release."
        )
    drawn = {} if seed is None else {"seed": seed}
    asked = Request(
        release, key, private, models, results, sample, hash_images=images, threads=threads, version=version, **drawn
    )
    report = audit(asked)
    if json is not None:
        write_json(json, report.to_json())
    if html is not None:
        write_atomic(html, as_html(report).encode())
    print(as_text(report))
    raise typer.Exit(1 if report.found else 0 if report.passed else 2)
