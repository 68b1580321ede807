"""`meddiff propose`: a commented study for a BIDS dataset."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.command.init import new_file, study_name
from meddiff_steps.config.yaml_files import as_written
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic
from meddiff_steps.operations.machine import Machine, this_machine
from meddiff_steps.operations.propose import propose


def run(
    root: Annotated[Path, typer.Argument(help="folder of the BIDS dataset")],
    out: Annotated[
        Path | None, typer.Option(help="study to write; by default named as the folder, in the working directory")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.1, help="hours that the run may take")] = 8.0,
    cores: Annotated[
        int | None, typer.Option(min=1, help="cores of the machine that will run it; by default of this one")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs of the machine that will run it; by default of this one")
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="which images, by the end of their names; T1w where there are some")
    ] = None,
    entity: Annotated[
        list[str] | None,
        typer.Option(help="which images, by a part of their names: desc=preproc, or space=null; repeat for several"),
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="results of a finished study on the machine, such as results/demo")
    ] = None,
) -> None:
    """Look at a dataset and write a study for it, with reasons, for you to edit.

    Reads participants.tsv and its sidecar, headers, and some scans, which are preprocessed to see how large the heads
    are and how they lie.  Nothing of the dataset is changed.
    """
    out = out or Path(f"{study_name(Path(root.resolve().name))}.yaml")
    new_file(out)
    here = this_machine()
    machine = Machine(cores or here.cores, here.memory_mb, here.gpus if gpus is None else gpus, here.gpu_memory_mb)
    text = propose(root, study_name(out), machine, hours, suffix, _entities(entity or []), measured, _progress)
    write_atomic(out, text.encode())
    print(f"{out}: written. Read it, change what is wrong, then: meddiff check {out}")


def _entities(given: list[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for one in given:
        key, equals, label = one.partition("=")
        if not (key and equals):
            raise UserError(f"--entity {one}: expected KEY=LABEL, for example desc=preproc, or space=null.")
        found[key] = None if as_written(label) is None else label
    return found


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\rlooked at {done} of {total} scans" if done < total else "\r\033[K")
    elif done == total:
        sys.stderr.write(f"looked at {total} scans\n")
    sys.stderr.flush()
