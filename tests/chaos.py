"""Faults at random moments of a run, until it is done; then every output must have the bytes of an undisturbed run.

    python tests/chaos.py --faults 30 --seed 0 --folder /tmp/chaos            # on this machine
    python tests/chaos.py --faults 30 --seed 0 --folder /tmp/chaos --slurm    # on a Slurm that it starts (root)

A run that ends well begins anew until the number of faults is reached, and the last one is left to end. Every fault is
a line of `FOLDER/faults.jsonl`. Exit status: 0, all runs ended with the bytes of the undisturbed one; 1, one did not.

Kinds ----- kill-step           kill -9 of a step's process kill-snakemake      kill -9 of Snakemake and, on this
machine, of all its jobs; then `--unlock` terminate-step      SIGTERM to a step's process, as before a node is taken
back truncate            half of an intermediate file is lost while nothing runs; whoever reads it must refuse it, and
it is deleted truncate-state      the same to the newest checkpoint; nothing need be deleted full-disk           the
file system of the results is full until the run has failed (root: a small one is mounted) scancel, requeue    a random
job of Slurm is cancelled, or put back into the queue restart-node        kill -9 of Slurm's daemon on the node, which
is started again
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/slurm")]

from cluster import Cluster, why_not  # noqa: E402
from tiny_study import ENVIRONMENT, STUDY, digests  # noqa: E402

#: Size of the file system that fills up; the tiny study needs about a tenth.
SMALL_DISK_MB = 512
#: A run that has not ended by then hangs.
HANGS_AFTER_S = 7200
#: What a finished study no longer needs, so that Snakemake does not make it again; all else must be there after the
#: last rerun.
INTERMEDIATE = (
    "preprocessed/",
    "latents/",
    "generated/",
    "filtered/",
    "privacy/decisions",
    "instruments/",
    "privacy/reference",
    "images/",
)
#: Reruns without a fault after which a run that still fails is lost.
MOST_RERUNS = 4


class Lost(Exception):
    """A run that did not end well however often it was started, or ended with other bytes."""


class Run:
    """One study in a copy of the repository, started, disturbed and started again."""

    def __init__(self, folder: Path, cluster: Cluster | None) -> None:
        self.folder, self.cluster = folder, cluster
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = ENVIRONMENT | {"PYTHONPATH": str(folder)}
        if cluster:
            self.environment = cluster.environment(self.environment)

    def prepare(self) -> None:
        """The repository without any results."""
        shutil.rmtree(self.folder / "results" / "tiny", ignore_errors=True)
        shutil.rmtree(self.folder / ".snakemake", ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("Snakefile", "rules", "meddiff_steps", "slurm", "config", "envs", "workflow"):
            if not (self.folder / name).exists():
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, self.folder / name)
        (self.folder / "study.yaml").write_text(yaml.safe_dump(STUDY))

    def command(self, *arguments: str) -> list[str]:
        common = [sys.executable, "-m", "snakemake", *arguments, "--rerun-incomplete", "--max-threads", "1"]
        if self.cluster:
            how = [
                "--profile",
                "slurm",
                "--slurm-init-seconds-before-status-checks",
                "2",
                "--latency-wait",
                "10",
                "--retries",
                "0",
            ]
        else:
            how = ["--cores", "2", "--keep-going"]
        return [*common, *how, "--configfile", "study.yaml"]

    def start(self, *targets: str) -> None:
        with open(self.folder / "run.log", "ab") as log:
            self.process = subprocess.Popen(
                self.command(*targets),
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def wait(self, seconds: float = HANGS_AFTER_S) -> int | None:
        """Exit status; None if it still runs after so many seconds."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def steps(self) -> list[psutil.Process]:
        """Processes of steps that work in this folder, on this machine or on the pretended node."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            words = process.info["cmdline"] or []
            if process.info["cwd"] == str(self.folder) and words[1:3] == ["-m", "meddiff_steps"]:
                found.append(process)
        return found

    def kill(self) -> None:
        """kill -9 of Snakemake and its jobs, and what a person does then."""
        if self.process is not None and not self.ended():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.cluster:
            self.cluster.command("scancel", "--user=root")
            while self.cluster.command("squeue", "--noheader").strip():
                time.sleep(0.5)
        for process in self.steps():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        subprocess.run(
            self.command("--unlock"),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            check=True,
            timeout=600,
        )


# ----------------------------------------------------------------------------------------------------- faults


def signal_step(run: Run, draw: random.Random, number: signal.Signals) -> str | None:
    steps = run.steps()
    if not steps:
        return None
    process = draw.choice(steps)
    with contextlib.suppress(psutil.NoSuchProcess):
        name = process.cmdline()[3]
        process.send_signal(number)
        return name
    return None


def kill_snakemake(run: Run, draw: random.Random) -> str | None:
    run.kill()
    return "snakemake"


def halve(run: Run, draw: random.Random, patterns: list[str]) -> Path | None:
    run.kill()
    results = run.folder / "results/tiny"
    files = sorted(path for pattern in patterns for path in results.glob(pattern))
    if not files:
        return None
    victim = draw.choice(files)
    os.truncate(victim, victim.stat().st_size // 2)
    return victim


def truncate(run: Run, draw: random.Random) -> str | None:
    """The next run must refuse the file; then it is deleted, as the message says, and made again. One that takes it is
    found out in the end.
    """
    victim = halve(
        run,
        draw,
        [
            "preprocessed/*.arrow",
            "latents/*.arrow",
            "generated/*.arrow",
            "autoencoder/model.safetensors",
            "decoder/model.safetensors",
            "diffusion/model.safetensors",
            "diffusion/tone.safetensors",
        ],
    )
    if victim is None:
        return None
    run.start()
    if run.wait() != 0:
        victim.unlink(missing_ok=True)
    return str(victim.relative_to(run.folder))


def truncate_state(run: Run, draw: random.Random) -> str | None:
    victim = halve(run, draw, ["state/*/*/step-*.safetensors"])
    return victim and str(victim.relative_to(run.folder))


def fill_disk(run: Run, draw: random.Random) -> str | None:
    results = run.folder / "results"
    if not os.path.ismount(results):
        return None
    with contextlib.suppress(OSError), open(results / "ballast", "wb") as ballast:
        while True:
            ballast.write(bytes(1 << 20))
            ballast.flush()
    run.wait(draw.uniform(5, 60))
    (results / "ballast").unlink()
    return "results"


def slurm_job(run: Run, draw: random.Random, *command: str) -> str | None:
    jobs = run.cluster.running() if run.cluster else []
    if not run.cluster or not jobs:
        return None
    job = draw.choice(jobs)
    run.cluster.command(*command, job)
    return f"job {job}"


def restart_node(run: Run, draw: random.Random) -> str | None:
    assert run.cluster is not None
    run.cluster.stop("slurmd", signal.SIGKILL)
    time.sleep(draw.uniform(0, 5))
    run.cluster.start("slurmd")
    return "slurmd"


#: Each returns what it hit, or None where there was nothing to hit at that moment.
LOCAL: dict[str, Callable[[Run, random.Random], str | None]] = {
    "kill-step": lambda run, draw: signal_step(run, draw, signal.SIGKILL),
    "terminate-step": lambda run, draw: signal_step(run, draw, signal.SIGTERM),
    "kill-snakemake": kill_snakemake,
    "truncate": truncate,
    "truncate-state": truncate_state,
    "full-disk": fill_disk,
}
SLURM: dict[str, Callable[[Run, random.Random], str | None]] = {
    "scancel": lambda run, draw: slurm_job(run, draw, "scancel"),
    "requeue": lambda run, draw: slurm_job(run, draw, "scontrol", "requeue"),
    "restart-node": restart_node,
}


# ------------------------------------------------------------------------------------------------- the trial


@contextlib.contextmanager
def small_disk(folder: Path):
    """`folder` on a file system of its own that can be filled, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MB}m", "tmpfs", folder], check=False
        ).returncode
        == 0
    )
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=False)


def finish(run: Run, expected: dict[str, str]) -> None:
    """Start `run` until it ends well, without faults; then compare.

    Of a run that was disturbed in its last moment, intermediate files can be missing; they are asked for by name, as a
    person would who wants them.
    """
    for _ in range(MOST_RERUNS):
        if run.ended():
            run.start()
        status = run.wait()
        if status == 0:
            break
        if status is None:
            run.kill()
    else:
        raise Lost(f"{run.folder}: still failing after {MOST_RERUNS} reruns; see run.log there")
    if missing := [
        name for name in sorted(expected.keys() - digests(run.folder).keys()) if name.startswith(INTERMEDIATE)
    ]:
        run.start(*(f"results/tiny/{name}" for name in missing))
        run.wait()
    found = digests(run.folder)
    differing = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if differing:
        raise Lost(
            f"{run.folder}: {len(differing)} outputs differ from the undisturbed run: {', '.join(differing[:10])}"
        )


def trial(folder: Path, faults: int, seed: int, slurm: bool) -> int:
    """Inject `faults`; returns how many runs ended with the bytes of the undisturbed one."""
    draw = random.Random(seed)
    calm = Run(folder / "undisturbed", None)
    calm.prepare()
    began = time.monotonic()
    calm.start()
    if calm.wait() != 0:
        raise Lost(f"{calm.folder}: the undisturbed run failed; see run.log there")
    duration = time.monotonic() - began
    expected = digests(calm.folder)
    print(f"undisturbed: {duration:.0f} s, {len(expected)} outputs", flush=True)

    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(folder / "slurm")) if slurm else None
        stack.enter_context(small_disk(folder / "disturbed/results"))
        run = Run(folder / "disturbed", cluster)
        stack.callback(lambda: None if run.ended() else run.kill())
        kinds = LOCAL | (SLURM if slurm else {})
        run.prepare()
        injected = whole = 0
        while injected < faults:
            if run.ended():
                if run.process is not None and run.process.returncode == 0:
                    finish(run, expected)
                    whole += 1
                    run.prepare()
                run.start()
            if run.wait(draw.uniform(1, max(5, duration / 4))) is not None:
                continue
            kind = draw.choice(sorted(kinds))
            hit = kinds[kind](run, draw)
            if hit is None:
                continue
            injected += 1
            line = {"fault": injected, "kind": kind, "hit": hit, "after_s": round(time.monotonic() - began)}
            print(json.dumps(line), flush=True)
            with open(folder / "faults.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        run.wait()
        finish(run, expected)
        return whole + 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the kinds and moments; what a moment hits depends on the machine"
    )
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for both runs")
    parser.add_argument("--slurm", action="store_true", help="through a Slurm that is started for it")
    given = parser.parse_args(arguments)
    if given.slurm and why_not():
        parser.error(f"--slurm: {why_not()}")
    if given.folder.exists() and any(given.folder.iterdir()):
        parser.error(f"--folder {given.folder}: not empty; expected a new folder")
    try:
        runs = trial(given.folder.resolve(), given.faults, given.seed, given.slurm)
    except Lost as lost:
        print(f"LOST: {lost}", file=sys.stderr)
        return 1
    print(f"{given.faults} faults, {runs} runs ended with the bytes of the undisturbed one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
