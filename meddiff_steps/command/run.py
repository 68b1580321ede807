"""`meddiff run`: Snakemake, with the study's file and the workflow where they are."""

from __future__ import annotations

import difflib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import psutil
import typer
import yaml

import meddiff_steps
from meddiff_steps.config import SimulatedSource, Study, load_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_atomic
from meddiff_steps.core.folders import DERIVATIVE, MANIFEST
from meddiff_steps.operations.machine import this_machine
from meddiff_steps.operations.status import JOBS

#: Seconds before hours are counted, which loads torch: who runs for less does not ask what is left.
NOT_YET_S = 15.0
#: Cores of a dry run for a cluster: Snakemake shows at most as many threads of a job as there are cores, one of itself.
MANY_CORES = 1000
#: Programs without which an executor can submit nothing.
SUBMITTING = {"slurm": "sbatch"}
#: Below what an application has made: its figures.
FIGURES = DERIVATIVE[1]
#: Where the workflow lies, for packages that were installed without it.
WORKFLOW = "MEDDIFF_WORKFLOW"


def run(
    study: Annotated[Path, typer.Argument(help="study (YAML)")],
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="what to make: all (default), quality, scan_pages, evaluate, augment, release, audit, an application"
            " such as inpainting (README.md lists them), or a file; after --, options of Snakemake"
        ),
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="processor cores to use; all of them by default")] = None,
    profile: Annotated[
        str | None,
        typer.Option(help="where jobs run: a Snakemake profile, for example slurm (docs/cluster.md)"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", "-n", help="only say which jobs would run")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="say nothing but errors, and the end")] = False,
    measured: Annotated[
        Path | None,
        typer.Option(help="results of a finished study on such a machine, for the time that is left"),
    ] = None,
) -> None:
    """Run a study, or go on with it: what is done already is not done again.

    This starts Snakemake and prints the command, which does the same when it is typed.  What Snakemake can do besides
    is given to it after `--`.
    """
    content = load_study(study)  # what is wrong with it is said at once
    wanted, extra = split_targets(targets or [])
    check_targets(wanted, workflow_folder())
    command = snakemake_command(study, wanted, extra, cores, profile, dry_run)
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    if profile is not None:
        check_profile(profile, study, dry_run)
    with_progress = ["-m", "meddiff_steps.command.snakemake_with_progress", *command[1:]]
    if dry_run:
        done = started(with_progress, {"MEDDIFF_PROGRESS": "plan"})
        if not done:
            tell_what_would_fail(content, study, wanted)
            if profile is None and not this_machine().gpus:
                print("No GPU is here: processors do what asks for one.", file=sys.stderr)
    else:
        shown = {
            "MEDDIFF_PROGRESS": "quiet" if quiet else "lines",
            "MEDDIFF_JOBS": str(Path(content.results, content.study, JOBS)),
        }
        with TemporaryDirectory() as folder:
            counting = None
            if not quiet and (measured is not None or (profile is None and not this_machine().gpus)):
                shown["MEDDIFF_EXPECTED"] = f"{folder}/hours.json"
                telling = (content, measured, Path(shown["MEDDIFF_EXPECTED"]))
                counting = multiprocessing.get_context("spawn").Process(target=tell_hours, args=telling, daemon=True)
                counting.start()
            done = started(with_progress, shown)
            if counting is not None:
                counting.terminate()
                counting.join()
        if not done and "--unlock" in extra:
            print("Unlocked. The same command without `-- --unlock` goes on.", file=sys.stderr)
        elif not done:
            print("\n".join(f"see {place}" for place in places(content, wanted)), file=sys.stderr)
    raise typer.Exit(done)


def tell_what_would_fail(study: Study, path: Path, targets: Sequence[str]) -> None:
    """What Snakemake, which looks at files alone, does not know of a run that it has planned: of tables and splits."""
    from meddiff_steps.operations import check

    found: list[check.Finding] = []
    if targets:
        looked_at = "The cohort was not looked at"
    elif Path(study.results, study.study, MANIFEST).is_file():
        looked_at = "The cohort was read before"
    else:
        looked_at = "Tables were looked at, images were not"
        found, cohort = check.cohort(study)
        if cohort is not None and cohort.splits:
            found = [*found, check.privacy(study, cohort.splits["calibration"])]
    for one in found:
        if one.state == "fail":
            print(f"would FAIL  {one.topic}: {one.text}", file=sys.stderr)
    print(f"{looked_at}; `meddiff check {path}` says all that would fail, and how long it takes.", file=sys.stderr)


def places(study: Study, targets: Sequence[str]) -> list[Path]:
    """Where a person finds what was made: the report, folders of applications."""
    folder = Path(study.results, study.study)
    found = [folder / target for target in targets if (folder / target / FIGURES).is_file()]
    return found or [page for page in (folder / "report.html",) if page.is_file() and not targets]


def tell_hours(study: Study, measured: Path | None, out: Path) -> None:
    """Write hours of a job by rule, once the cohort is known: by `plan-cost`, for its cores or as was measured.

    A process of its own, which loads torch while Snakemake works.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(NOT_YET_S)
    scans = study.cohort.subjects if isinstance(study.cohort, SimulatedSource) else None
    manifest = Path(study.results, study.study, MANIFEST)
    while scans is None:
        if manifest.is_file():
            import pyarrow.parquet as pq

            scans = pq.read_metadata(manifest).num_rows
        else:
            time.sleep(1.0)
    from meddiff_steps.operations.expected import expected

    try:
        found = expected(study, scans, os.cpu_count() or 1, measured)
    except UserError as error:
        print(f"the time that is left is not told: {error}", file=sys.stderr)
        return
    write_atomic(out, json.dumps({one.stage: one.hours_each for one in found}).encode())


def started(arguments: list[str], environment: dict[str, str] | None = None) -> int:
    """Run Python, which gets what a terminal sends to stop it, and is waited for.

    SIGTERM, which only this process gets, is handed on as a terminal's Ctrl-C: to all that it started.  Scripts let
    what they start in the background ignore that, so that no terminal stops it; then no terminal reaches it.
    """
    background = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if background:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, it would be so in all that is started
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, start_new_session=background)
    before = signal.signal(signal.SIGTERM, lambda *_: interrupt(process.pid))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # Snakemake has it, too, and ends its jobs
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupt(pid: int) -> None:
    """Send SIGINT to a process and to all that it has started."""
    try:
        found = [psutil.Process(pid)]
        found += found[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for one in found:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGINT)


def split_targets(words: list[str]) -> tuple[list[str], list[str]]:
    """Targets, and what follows `--`: everything from the first option on.

    >>> split_targets(["evaluate", "--rerun-incomplete", "--set-threads", "diffusion=1"])
    (['evaluate'], ['--rerun-incomplete', '--set-threads', 'diffusion=1'])
    """
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def rules_of(workflow: Path) -> set[str]:
    """Names of all rules of a workflow."""
    return {
        name
        for path in (workflow / "Snakefile", *(workflow / "rules").glob("*.smk"))
        for name in re.findall(r"^ *(?:use rule \w+ as|rule|checkpoint) (\w+)", path.read_text(encoding="utf-8"), re.M)
    }


def check_targets(targets: list[str], workflow: Path) -> None:
    """Refuse a word that is neither a rule of the workflow nor a file.

    Raises
    ------
    UserError
        With the rule that was meant.
    """
    rules = rules_of(workflow)
    for target in targets:
        if target.isidentifier() and target not in rules and not Path(target).exists():
            near = difflib.get_close_matches(target, rules, 1)
            raise UserError(
                f"there is no target {target!r}."
                + (f" Did you mean {near[0]!r}?" if near else "")
                + " `meddiff run --help` has the usual ones, README.md all; a file that the study makes is one, too."
            )


def snakemake_command(
    study: Path,
    targets: list[str],
    extra: list[str],
    cores: int | None = None,
    profile: str | None = None,
    dry_run: bool = False,
) -> list[str]:
    """The command that runs a study, as one would type it here.

    What a run that was killed left half done is made again: files appear under their names when they are whole.

    Raises
    ------
    UserError
        The workflow is not found, or the profile.
    """
    snakefile = workflow_folder() / "Snakefile"
    here = snakefile.resolve() == Path("Snakefile").resolve()
    command = ["snakemake", *targets, *([] if here else ["--snakefile", str(snakefile)]), "--rerun-incomplete"]
    if profile is not None:
        command += ["--profile", profile_folder(profile, snakefile.parent)]
    if cores is not None:
        command += ["--cores", str(cores)]
    elif profile is None:
        command += ["--cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "all")]
    elif dry_run and "executor" in settings_of(profile, snakefile.parent):
        command += ["--cores", str(MANY_CORES)]
    return [*command, *(["-n"] if dry_run else []), *extra, "--configfile", str(study)]


def workflow_folder() -> Path:
    """The folder with the Snakefile: of a checkout that the package lies in, or as the environment says.

    Raises
    ------
    UserError
        There is none.
    """
    asked = os.environ.get(WORKFLOW)
    folder = Path(asked) if asked else Path(meddiff_steps.__file__).parents[1]
    if (folder / "Snakefile").is_file() and (folder / "rules/common.smk").is_file():
        return folder
    raise UserError(
        f"{folder}: no workflow here (Snakefile and rules/). "
        + (
            f"{WORKFLOW} is to name the folder of a checkout."
            if asked
            else "The package was installed without it, as a wheel is. Get the checkout of version"
            f" {meddiff_steps.__version__} (git clone) and `pip install --no-deps --editable` it, or set {WORKFLOW} to"
            " its folder."
        )
    )


def settings_of(profile: str, workflow: Path) -> dict[str, Any]:
    """What a profile sets, where it lies in a folder; empty for one that Snakemake knows by name."""
    files = sorted(Path(profile_folder(profile, workflow)).glob("*.yaml"))
    return {key: value for path in files for key, value in (yaml.safe_load(path.read_text("utf-8")) or {}).items()}


def check_profile(profile: str, study: Path, dry_run: bool = False) -> None:
    """Refuse a profile that speaks of rules which there are not, or whose jobs cannot be submitted from here.

    Raises
    ------
    UserError
        With the rule that was meant; or the scheduler's program is not on this machine.
    """
    workflow = workflow_folder()
    rules = rules_of(workflow)
    said = settings_of(profile, workflow)
    for key in ("set-resources", "set-threads"):
        for name in said.get(key) or {}:
            if re.split("[:=]", name)[0] not in rules:
                near = difflib.get_close_matches(name, rules, 1)
                raise UserError(
                    f"--profile {profile}: {key} names {name!r}, and there is no such rule."
                    + (f" Did you mean {near[0]!r}?" if near else "")
                )
    program = None if dry_run else SUBMITTING.get(said.get("executor", ""))
    if program and shutil.which(program) is None:
        raise UserError(
            f"--profile {profile}: jobs are submitted with {program}, which is not on this machine. Start it on a login"
            f" node of the cluster. `meddiff run {study} --profile {profile} -n` says here what would be submitted."
        )


def profile_folder(profile: str, workflow: Path) -> str:
    """A profile by its folder: as it was given, of the workflow, or one that Snakemake knows by name.

    Raises
    ------
    UserError
        It is a misspelt one of the workflow.
    """
    for folder in (Path(profile), workflow / profile, workflow / "profiles" / profile):
        if folder.is_dir() and any(folder.glob("*.yaml")):
            return str(folder)
    ours = ("slurm", *(folder.name for folder in (workflow / "profiles").glob("*")))
    if near := difflib.get_close_matches(profile, ours, 1, cutoff=0.8):
        raise UserError(f"--profile {profile}: there is none of this name. Did you mean {near[0]!r}?")
    return profile
