"""How far a run is, from what Snakemake says happened: a line per job, and one bar for all of them."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from meddiff_steps.core.files import write_atomic
from meddiff_steps.operations.status import last_line, tail

#: Characters of the bar.
WIDTH = 30
#: Seconds after which the bar is drawn anew on a terminal, and written again to a file: in a run of minutes more often.
REDRAW_S, REPEAT_S = 1.0, (60.0, 600.0)
#: Share of the run's time after which it is written again to a file, between these.
REPEAT_SHARE = 0.1
#: Running jobs that have a line of their own on a terminal.
MOST = 8
#: How Snakemake begins what is shown though it is no warning: to somebody who stops it, or who has nothing left to do.
STOPPED = "Terminating processes on user request"
SHOWN = ("Will exit after finishing", STOPPED, "Nothing to be done")
#: What is said to somebody who has stopped a run.
GO_ON = "Run the same command to go on: what is done is not done again, and trainings were saved."
#: How Snakemake begins what it says of a job whose command failed.
OF_A_JOB = "RuleException:\nCalledProcessError"
#: What Snakemake writes around the message of a `WorkflowError`: before a rule's, where it stands in which file, and
#: after either where it was raised.
OF_A_RULE = re.compile(r"InputFunctionException in rule .*?\n +WorkflowError:\n(.*?)\nWildcards:", re.DOTALL)
OF_A_FILE = re.compile(r"WorkflowError in file .*?, line \d+:\n(.*?)(?:\n  File \".*)?$", re.DOTALL)
#: What Snakemake says where another run holds the folder, and what that means.
LOCKED = "Directory cannot be locked"
OTHER_RUN = (
    "Another run works in this folder, or one was killed. `meddiff status results/STUDY` says which: if none works"
    " there, `meddiff run STUDY.yaml -- --unlock` and run again."
)
#: Seconds of jobs before which what was expected counts more than what is seen: the first jobs are short.
TRUST_S = 120.0


@dataclass
class Job:
    """One that was announced, and when it began."""

    rule: str
    what: str
    logs: list[str]
    since: float


@dataclass
class Progress:
    """The lines of a run.

    On a terminal the bar stays on the last line; in a file it is written as a line of its own whenever a job ends.

    Attributes
    ----------
    stream
        Where lines go.
    quiet
        Only errors and the end.
    expected
        Hours of a job by rule, as far as they are known; of them, and of how long jobs really took, the remaining time
        is made.
    clock
        Seconds.
    jobs_file
        Where it writes, first and after every job, how many are done and how many there are, for `meddiff status`.
    """

    stream: TextIO = sys.stderr
    quiet: bool = False
    expected: Mapping[str, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    jobs_file: Path | None = None
    done: int = 0
    total: int = 0
    failed: int = 0
    jobs: dict[int, Job] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    took: list[tuple[str, float]] = field(default_factory=list)
    """Rule and seconds of every job that ended well."""
    told: set[str] = field(default_factory=set)
    """Of what is said to somebody who stops a run, which Snakemake repeats."""
    stopped: bool = False
    """Somebody stopped the run, and its jobs with it."""
    drawn: int = 0
    drawn_at: float = 0.0

    def __post_init__(self) -> None:
        self.began = self.drawn_at = self.clock()
        self.terminal = self.stream.isatty()

    # ---------------------------------------------------------------------------------------------- events

    def happened(self, event: str, said: Mapping[str, Any]) -> None:
        """Take one of Snakemake's events (`snakemake_interface_logger_plugins.common.LogEvent`) with its fields."""
        handler = getattr(self, f"_{event}", None)
        if handler is not None:
            handler(said)

    def said(self, level: str, message: str) -> None:
        """A message that is no event: warnings and errors are shown, and what is said to somebody who stops the run."""
        if message.startswith(SHOWN):
            if message not in self.told:
                self._line(message, always=True)
            self.told.add(message)
            self.stopped = self.stopped or message.startswith(STOPPED)
        elif self.stopped or message.startswith(OF_A_JOB):
            return  # that jobs ended which were killed; what a failed job says is in the end of its log
        elif level in ("WARNING", "ERROR", "CRITICAL") and message not in ("", "None"):
            self._line(plain(message), always=True)

    def _run_info(self, said: Mapping[str, Any]) -> None:
        counts = {rule: count for rule, count in said["stats"].items() if rule != "total"}
        self.total, self.waiting = sum(counts.values()), dict(counts)
        self._line(f"{self.total} jobs: " + ", ".join(f"{n} {rule}" for rule, n in counts.items()))
        self._tell_status()

    def _job_info(self, said: Mapping[str, Any]) -> None:
        """A job is announced when it is started, or handed to a cluster."""
        logs = said.get("log") or []
        job = Job(
            said["rule_name"],
            said.get("rule_msg") or said["rule_name"],
            [logs] if isinstance(logs, str) else [*logs],
            self.clock(),
        )
        self.jobs[said["jobid"]] = job
        self._line(f"begins  {job.rule}: {job.what}")

    def _job_finished(self, said: Mapping[str, Any]) -> None:
        job = self.jobs.pop(said["job_id"], None)
        self.done += 1
        if job is not None:
            self.waiting[job.rule] = max(0, self.waiting.get(job.rule, 1) - 1)
            self.took.append((job.rule, self.clock() - job.since))
            self._line(f"done    {job.rule}: {job.what} ({duration(self.clock() - job.since)})")
        self._draw(force=True)
        self._tell_status()

    def _tell_status(self) -> None:
        if self.jobs_file is not None:
            write_atomic(self.jobs_file, json.dumps({"done": self.done, "of": self.total}).encode())

    def _progress(self, said: Mapping[str, Any]) -> None:
        self.done, self.total = said["done"], said["total"]

    def _job_error(self, said: Mapping[str, Any]) -> None:
        number = next((said[name] for name in ("jobid", "job_id") if name in said), None)
        job = self.jobs.pop(number, None) if number is not None else None
        name = job.rule if job else said.get("rule_name", "a job")
        if self.stopped:
            self._line(f"stopped {name}")
            return
        self.failed += 1
        logs = job.logs if job else []
        self._line(f"FAILED  {name}" + "".join(f"\n{last_lines(Path(log))}" for log in logs), always=True)

    _group_error = _job_error

    def _error(self, said: Mapping[str, Any]) -> None:
        message = str(said.get("message") or said.get("msg") or "")
        if message and message != "None" and not self.stopped and not message.startswith(OF_A_JOB):
            self._line(plain(message), always=True)

    # ------------------------------------------------------------------------------------------------ text

    def bar(self) -> str:
        """`[####----] 12 of 40 jobs, 00:12:30; about 01:30:00 left; running: diffusion`."""
        filled = int(WIDTH * self.done / self.total) if self.total else 0
        running = sorted(job.rule for job in self.jobs.values())
        parts = [f"{self.done} of {self.total} jobs, {duration(self.clock() - self.began)}"]
        left = self.remaining()
        if left is not None:
            parts.append(f"about {duration(left)} left")
        if running and not self.terminal:  # which has a line for each
            parts.append(
                "running: " + ", ".join(running[:4]) + (f" and {len(running) - 4} more" if running[4:] else "")
            )
        return f"[{'#' * filled}{'-' * (WIDTH - filled)}] {'; '.join(parts)}"

    def remaining(self) -> float | None:
        """Seconds that are left; None where nothing is known.

        What is expected of the jobs left, at the speed at which others ran, as many at a time as ran until now.
        """
        if not self.expected:
            return None
        seen = [(3600 * self.expected[rule], took) for rule, took in self.took if self.expected.get(rule)]
        left = 3600 * sum(count * self.expected.get(rule, 0.0) for rule, count in self.waiting.items())
        unseen = []
        for job in self.jobs.values():
            hope, since, share = 3600 * self.expected.get(job.rule, 0.0), self.clock() - job.since, done_of(job)
            if share is not None:
                seen.append((hope * share, since))
                left -= hope * share
            elif since > hope > 0:  # slower than this at least
                seen.append((hope, since))
                left -= hope
            else:
                unseen.append((hope, since))
        speed = (sum(hope for hope, _ in seen) + TRUST_S) / (sum(took for _, took in seen) + TRUST_S)
        left -= sum(min(since * speed, hope) for hope, since in unseen)
        busy = sum(took for _, took in self.took) + sum(self.clock() - job.since for job in self.jobs.values())
        at_a_time = (busy + TRUST_S) / (self.clock() - self.began + TRUST_S)
        return max(0.0, left) / speed / at_a_time

    def tick(self) -> None:
        """Show that time passes: called every second."""
        least, most = REPEAT_S
        repeat = min(max(REPEAT_SHARE * (self.clock() - self.began), least), most)
        if self.clock() - self.drawn_at >= (REDRAW_S if self.terminal else repeat):
            self._draw(force=True)

    def _line(self, text: str, always: bool = False) -> None:
        if self.quiet and not always:
            return
        self._erase()
        self.stream.write(f"{text}\n")
        self._draw()

    def _erase(self) -> None:
        if self.drawn:
            self.stream.write(f"\r\033[{self.drawn - 1}A\033[J" if self.drawn > 1 else "\r\033[J")
            self.drawn = 0

    def _draw(self, force: bool = False) -> None:
        """On a terminal a line per running job with what its log says last, and the bar; in a file the bar alone, when
        it is time.
        """
        if self.total and not self.quiet and (self.terminal or force):
            self._erase()
            if self.terminal:
                width = self.columns() - 1
                lines = [*(self.of_job(job) for job in list(self.jobs.values())[:MOST]), self.bar()]
                self.stream.write("\n".join(line[:width] for line in lines))
                self.drawn = len(lines)
            else:
                self.stream.write(f"{self.bar()}\n")
            self.drawn_at = self.clock()
        self.stream.flush()

    def columns(self) -> int:
        """Of the terminal that lines go to, which need not be standard output."""
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80
        except OSError:
            return 80

    def of_job(self, job: Job) -> str:
        """`diffusion 00:12:30: diffusion: 12%|#2 | 1200/10000`."""
        log = next((Path(log) for log in job.logs if Path(log).is_file() and Path(log).stat().st_size), None)
        return f"  {job.rule} {duration(self.clock() - job.since)}: {last_line(log) if log else job.what}"

    def close(self) -> None:
        """The end: what was done, and what failed."""
        self._erase()
        if self.total:
            failed = f", {self.failed} failed" if self.failed else ", stopped" if self.stopped else ""
            took = duration(self.clock() - self.began)
            self.stream.write(f"{self.done} of {self.total} jobs done{failed} in {took}\n")
            if self.failed:
                self.stream.write("When it is mended, run the same command again: what is done is not done again.\n")
            elif self.stopped:
                self.stream.write(f"{GO_ON}\n")
            self.total = 0
        self.stream.flush()


def done_of(job: Job) -> float | None:
    """The share of a job that is done, as the bar of its own name says at the end of its log; None where it has none.

    Trainings and preprocessing have one; other jobs have several after each other, which say nothing of the whole.
    """
    for log in map(Path, job.logs):
        if log.is_file() and log.stat().st_size:
            name = job.rule.removeprefix("mask_")  # whose training is that of images
            found = re.match(rf"{name}(?:, \w+)?: +(\d+)%\|", last_line(log))
            return int(found[1]) / 100 if found else None
    return None


def plain(message: str) -> str:
    """What the workflow says of a study, without where in the workflow it is said; other messages as they are.

    >>> plain('WorkflowError in file "/a/rules/common.smk", line 41:\\nWhich one?\\n  File "/a/Snakefile", line 3')
    'error: Which one?'
    """
    if LOCKED in message:
        return OTHER_RUN
    found = OF_A_RULE.search(message) or OF_A_FILE.match(message)
    return f"error: {textwrap.dedent(found[1]).strip()}" if found else message


def needs_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a job asks for: rule, threads, mem_mb, runtime (minutes) and GPUs."""
    asked = said["resources"]
    numbers = {name: asked.get(name) for name in ("mem_mb", "runtime", "gpu")}
    return {
        "rule": said["rule_name"],
        "threads": said["threads"],
        **{name: number if isinstance(number, int) else 0 for name, number in numbers.items()},
    }


def planned(jobs: Sequence[Mapping[str, Any]]) -> str:
    """What a run would do: a line per rule with its jobs, what one of them asks for at most, and why they run.

    Parameters
    ----------
    jobs
        Fields of Snakemake's event of every job, in the order of the plan.
    """
    rules: dict[str, list[Mapping[str, Any]]] = {}
    for job in jobs:
        rules.setdefault(str(job["rule_name"]), []).append(job)
    width = max(map(len, rules), default=0)
    lines = [
        f"{len(jobs)} jobs would run; each asks for:",
        f"{'jobs':>6}  {'':<{width}}  cores  GPUs       MB  minutes",
    ]
    for rule, those in rules.items():
        asked = [needs_of(job) for job in those]
        cores, gpus, megabytes, minutes = (
            max(each[name] for each in asked) for name in ("threads", "gpu", "mem_mb", "runtime")
        )
        where = {str(job["resources"].get("slurm_partition") or "") for job in those} - {""}
        why = {part.partition(":")[0].strip() for job in those for part in str(job.get("reason") or "").split(";")}
        why = {word.lower() for word in why if word}
        said = ", ".join(sorted(why - {"input files updated by another job"} or why))
        lines.append(f"{len(those):>6}  {rule:<{width}}  {cores:>5}{gpus:>6}{megabytes:>9}{minutes:>9}  {said}")
        if where:
            lines[-1] += f"; partition {', '.join(sorted(where))}"
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725)
    '01:02:05'
    """
    whole = int(seconds)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def last_lines(log: Path, count: int = 10) -> str:
    """The end of a log, indented, after its name."""
    if not log.is_file():
        return f"  {log}: not there"
    lines = tail(log).replace("\r", "\n").splitlines()
    return "\n".join([f"  {log}:", *(f"    {line}" for line in lines[-count:])])
