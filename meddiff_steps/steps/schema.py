from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.config import json_schema, key_reference
from meddiff_steps.core.files import write_atomic


def run(out: Annotated[Path, typer.Option(help="folder for study.schema.json and keys.md")] = Path("config")) -> None:
    """Write the JSON Schema of a study (for editors) and the reference of all its keys, both generated from
    meddiff_steps/config/.
    """
    write_atomic(out / "study.schema.json", json_schema().encode())
    write_atomic(out / "keys.md", key_reference().encode())
