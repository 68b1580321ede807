"""Step `keygen`: a key to sign releases with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.provenance.signature import generate


def run(
    out: Annotated[Path, typer.Option(help="private key to write (PEM); the public one gets the same name and .pub")],
) -> None:
    """Make an ed25519 key pair for `release.signing_key`.

    Keep the private key out of the results folder; give the public one to those who shall check your releases.
    """
    public, name = generate(out)
    print(f"private key: {out}\npublic key:  {public}\nkey id:      {name}")
