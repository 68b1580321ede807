"""Step `status`: how far a study is."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from meddiff_steps.files import holder
from meddiff_steps.progress import read_stages, table


def run(results: Annotated[Path, typer.Argument(help="results/STUDY")]) -> None:
    """Per stage: how many jobs are done, running and failed, and the hours used; where the logs of the latter two are.

    Looks at files alone. A job that was killed from outside (memory, a dead node) counts as running until the run ends
    or tries again; how long ago its log grew is the sign.
    """
    worker = holder(results / ".lock")
    stages = read_stages(results, active=worker is not None)
    print(f"{results}: {'a run works here, ' + worker if worker else 'no run works here'}")
    print("\n".join(table(stages, time.time())))
