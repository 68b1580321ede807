"""Snakemake with the progress of `meddiff run`: what that starts, as a process of its own.

Snakemake hands what happens, as events and not as text, to logger plugins (snakemake-interface-logger-plugins).  It
finds plugins among installed packages, but none in a checkout, so ours is registered here.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import types
from contextlib import nullcontext
from logging import LogRecord
from pathlib import Path
from typing import Any

from snakemake.cli import main
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

from meddiff_steps.command.progress import Progress, needs_of, planned

#: What the handler is to do: `lines`, `quiet`, `plan`, which says what would run, or `needs`, which writes to the file
#: NEEDS what jobs ask for.
MODE, NEEDS = "MEDDIFF_PROGRESS", "MEDDIFF_NEEDS"
#: File with hours of a job by rule (JSON), which is there as soon as they are known.
EXPECTED = "MEDDIFF_EXPECTED"
#: File for `meddiff status`: how many jobs of the run are done.
JOBS = "MEDDIFF_JOBS"


class LogHandler(LogHandlerBase):
    """From Snakemake's events to lines."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = True
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        self.mode = os.environ.get(MODE, "lines")
        self.needs: list[dict[str, Any]] = []
        self.plan: list[dict[str, Any]] = []
        self.expected = Path(os.environ[EXPECTED]) if EXPECTED in os.environ else None
        jobs = Path(os.environ[JOBS]) if JOBS in os.environ else None
        self.progress = Progress(sys.stderr, quiet=self.mode == "quiet", jobs_file=jobs)
        self.ended = threading.Event()
        if self.mode == "lines":
            threading.Thread(target=self.tick, daemon=True).start()

    def tick(self) -> None:
        while not self.ended.wait(1.0):
            if self.expected is not None and self.expected.exists():
                self.progress.expected, self.expected = json.loads(self.expected.read_text(encoding="utf-8")), None
            with self.lock or nullcontext():
                self.progress.tick()

    def emit(self, record: LogRecord) -> None:
        event, said = str(getattr(record, "event", None) or ""), vars(record)
        if self.mode == "needs":
            if event == "job_info":
                self.needs.append(needs_of(said))
            elif record.levelname == "ERROR":
                print(record.getMessage(), file=sys.stderr)
            return
        if self.mode == "plan" and event in ("job_info", "run_info", "progress"):
            if event == "job_info":
                self.plan.append(said)
            return
        if event == "run_info":
            silence_jobs()
        if event:
            self.progress.happened(event, said)
        else:
            self.progress.said(record.levelname, record.getMessage())

    def close(self) -> None:
        if not self.ended.is_set():
            self.ended.set()
            if self.mode == "needs":
                Path(os.environ[NEEDS]).write_text(json.dumps(self.needs), encoding="utf-8")
            else:
                self.progress.close()
                if self.plan:
                    print(planned(self.plan), flush=True)
        super().close()


def silence_jobs() -> None:
    """What jobs write to standard output, which is in their logs as well, would tear the bar."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def run(arguments: list[str]) -> None:
    """Run Snakemake; ends the process with its exit code."""
    plugin = types.ModuleType("snakemake_logger_plugin_meddiff")
    plugin.LogHandler = LogHandler  # type: ignore[attr-defined]
    LoggerPluginRegistry().register_plugin(plugin.__name__, plugin)
    main([*arguments, "--logger", "meddiff"])


if __name__ == "__main__":
    run(sys.argv[1:])
