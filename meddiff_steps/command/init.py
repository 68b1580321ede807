"""`meddiff init`: a commented study to begin with, from nothing or from trained models."""

from __future__ import annotations

import filecmp
import re
import shutil
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
    start: Annotated[
        str | None,
        typer.Option("--from", help="models to start from: those that come with the package, or a model release"),
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="with --from: images to draw, to look at first")] = 4,
) -> None:
    """Write a study to change by hand: the lines to look at are marked with <--.

    `meddiff propose` fills in what it finds in a dataset.  With --from, models are copied beside the study, which goes
    on from them, and some images of theirs are drawn.
    """
    new_file(study)
    if start is not None:
        _from_models(start, study, images)
        return
    template = files("meddiff_steps.config").joinpath("template.yaml").read_text(encoding="utf-8")
    write_atomic(study, re.sub(rf"\b{NAME}\b", study_name(study), template).encode())
    print(f"{study}: written. Change the lines marked with <--, then: meddiff check {study}")


def _from_models(start: str, study: Path, images: int) -> None:
    from meddiff_steps.release import shipping, starting  # torch

    found = shipping.models_named(start)
    copied = study.parent / found.resolve().name
    text = starting.study_text(found, copied, study.name, study_name(study))
    if not same_files(found, copied):
        new_file(copied)
        shutil.copytree(found, copied)
    write_atomic(study, text.encode())
    print(f"{copied}: models, with what they are (README.md) and under which terms (LICENSE)")
    if images:
        print(f"{starting.examples(copied, images, copied / 'examples')}: {images} brains that nobody has")
    print(f"{study}: written. Change the lines marked with <--, then: meddiff check {study}")


def same_files(folder: Path, copied: Path) -> bool:
    """Whether a folder has all files of another, as another study that started from the same models leaves it."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return copied.is_dir() and not any(filecmp.cmpfiles(folder, copied, map(str, files), shallow=False)[1:])


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
