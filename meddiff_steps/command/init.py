"""`meddiff init`: a commented study to begin with."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic

#: The name that the template gives its study.
NAME = "mycohort"


def run(
    study: Annotated[Path, typer.Argument(help="file to write; its name becomes the study's")] = Path(f"{NAME}.yaml"),
) -> None:
    """Write a study to change by hand: the lines to look at are marked with <--.

    `meddiff propose` fills in what it finds in a dataset.
    """
    new_file(study)
    template = files("meddiff_steps.config").joinpath("template.yaml").read_text(encoding="utf-8")
    write_atomic(study, re.sub(rf"\b{NAME}\b", study_name(study), template).encode())
    print(f"{study}: written. Change the lines marked with <--, then: meddiff check {study}")


def new_file(path: Path) -> None:
    """Refuse to write over something.

    Raises
    ------
    UserError
        There is such a file, or no such folder.
    """
    if path.exists():
        raise UserError(f"{path}: is there already. Give another name, or remove it first.")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such folder. Make it first, or give another name.")


def study_name(path: Path) -> str:
    """The name of a study that is called as its file is: lower case, without what a study's name cannot have.

    >>> study_name(Path("My Cohort (2).yaml"))
    'my-cohort-2'
    """
    return re.sub(r"[^a-z0-9_]+", "-", path.stem.lower()).strip("-_") or NAME
