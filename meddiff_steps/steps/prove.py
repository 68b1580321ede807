"""Step `prove`: one subject's place in a release."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.audit.explain import prove
from meddiff_steps.core.files import write_json


def run(
    subject: Annotated[str, typer.Argument(help="participant, with or without sub-")],
    release: Annotated[Path, typer.Argument(help="root of the release")],
    out: Annotated[Path | None, typer.Option(help="proof to write (JSON); printed by default")] = None,
) -> None:
    """Write the path from a subject's row to the ledger's root.

    Whoever has the root (from a signed root.json, say) and this proof can check the row without the rest of the ledger:
    `python3 verify.py RELEASE --proof FILE`.
    """
    proof = prove(release, subject)
    if out is None:
        print(json.dumps(proof, indent=1, sort_keys=True))
    else:
        write_json(out, proof)
