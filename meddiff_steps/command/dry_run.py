"""What the jobs of a study ask for: Snakemake plans them, with nothing done yet, in a folder that goes away again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from meddiff_steps.command.progress import plain
from meddiff_steps.command.run import workflow_folder
from meddiff_steps.core.errors import UserError


class DryRun:
    """A plan that is being made by another process; a context that ends it.

    Parameters
    ----------
    study
        The study's file.
    targets
        Of the workflow; `all` where left out.
    """

    def __init__(self, study: Path, targets: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._needs = Path(self._folder.name, "needs.json")
        self._process: subprocess.Popen[str] | None = None
        self._problem: str | None = None
        self._said = ""
        try:
            snakefile = workflow_folder() / "Snakefile"
        except UserError as error:
            self._problem = str(error)
            return
        elsewhere = f"results={Path(self._folder.name, 'results')}"
        options = ["--snakefile", str(snakefile), "-n", "--nolock", "--config", elsewhere, "--configfile", str(study)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "meddiff_steps.command.snakemake_with_progress", *targets, *options],
            env={**os.environ, "MEDDIFF_PROGRESS": "needs", "MEDDIFF_NEEDS": str(self._needs)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def jobs(self) -> list[dict[str, Any]]:
        """Per job what it asks for (`snakemake_with_progress.needs_of`).

        Raises
        ------
        UserError
            The workflow is not found, or refuses the study.
        """
        if self._process is None:
            raise UserError(self._problem or "")
        if self._process.returncode is None:
            self._said = self._process.communicate()[1]
        if self._process.returncode or not self._needs.is_file():
            message = plain(self._said)
            if message != self._said:
                raise UserError(message.removeprefix("error: "))
            raise UserError(f"Snakemake cannot plan it: {' '.join(self._said.split())[-600:]}")
        return [dict(job) for job in json.loads(self._needs.read_text(encoding="utf-8"))]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._folder.cleanup()
