"""A whole Slurm on this machine, for tests: munge, controller, one node with fake GPUs; all state in one folder.

Nothing outside the folder is touched: its own key, sockets, ports and configuration; no systemd, no accounting
database. By hand, in a shell where `slurmctld` is installed (Debian: slurmctld slurmd slurm-client munge), as root:

    python tests/slurm/cluster.py FOLDER        # prints what to export, runs until Ctrl-C

The node says that it has more processors and memory than the machine, if need be: what is tested is scheduling, not
speed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct")
SLURM_BIN = "/usr/sbin:/usr/bin:/sbin:/bin"

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
# No control groups: the tests shall also run in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
ReturnToService=2
JobRequeue=1
MinJobAge=3600
KillWait=10
SlurmdTimeout=60
NodeName={host} NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} RealMemory=64000 Gres=gpu:fake:{gpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None if one can."""
    if os.geteuid() != 0:
        return "Slurm's daemons start jobs as root; this user is not root"
    missing = [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=SLURM_BIN) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: apt-get install slurmctld slurmd slurm-client munge)"
    return None


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Cluster:
    """One node named like this host, `gpus` fake GPUs; a context manager that stops every daemon it started."""

    def __init__(self, folder: Path, gpus: int = 2, cpus: int | None = None) -> None:
        self.folder = Path(folder).resolve()
        self.gpus, self.cpus = gpus, cpus or max(2, os.cpu_count() or 1)
        self.host = socket.gethostname().partition(".")[0]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self._write_files()
            self.start("munged")
            self._wait("munge's socket", (self.folder / "munge.socket").is_socket)
            self.start("slurmctld")
            self.start("slurmd")
            self._wait("an idle node", lambda: "idle" in self.command("sinfo", "--noheader", "--format=%T"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.processes.get("slurmd"):
            self.command("scancel", "--user=root")
        for name in reversed(list(self.processes)):
            self.stop(name)

    def _write_files(self) -> None:
        for name in ("", "state", "spool", "bin", "gpus"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            (self.folder / name).chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # Device files: with plain ones Slurm counts GPUs but does not say to a job which it got. These are /dev/null.
        for number in range(self.gpus):
            os.mknod(self.folder / f"gpus/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"NodeName={self.host} Name=gpu Type=fake File={self.folder}/gpus/gpu[0-{self.gpus - 1}]\n"
        )
        controller, node = free_ports(2)
        text = CONFIGURATION.format(
            folder=self.folder,
            host=self.host,
            controller_port=controller,
            node_port=node,
            cpus=self.cpus,
            gpus=self.gpus,
        )
        (self.folder / "slurm.conf").write_text(text)
        # Snakemake's executor takes SLURM_CONF out of the environment before its inner `srun`; these put it back.
        for name in COMMANDS:
            shim = self.folder / "bin" / name
            shim.write_text(
                f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {shutil.which(name, path=SLURM_BIN)} "$@"\n'
            )
            shim.chmod(0o755)

    def start(self, name: str) -> None:
        """Start a daemon (`munged`, `slurmctld`, `slurmd`)."""
        folder = self.folder
        arguments = {
            "munged": f"--foreground --force --key-file={folder}/munge.key --socket={folder}/munge.socket "
            f"--pid-file={folder}/munged.pid --log-file={folder}/munged.log --seed-file={folder}/munged.seed",
            "slurmctld": f"-D -f {folder}/slurm.conf",
            "slurmd": f"-D -f {folder}/slurm.conf -N {self.host}",
        }[name]
        program = shutil.which(name, path=SLURM_BIN)
        if program is None:
            raise FileNotFoundError(f"{name}: not installed. {why_not()}")
        with open(folder / f"{name}.out", "ab") as out:
            self.processes[name] = subprocess.Popen(
                [program, *arguments.split()], stdout=out, stderr=out, start_new_session=True, env=self.environment()
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop a daemon and wait for its end; jobs go on, because their own keepers (slurmstepd) do."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def environment(self, base: Mapping[str, str] = os.environ) -> dict[str, str]:
        """`base`, in which Slurm's commands find this cluster."""
        path = f"{self.folder}/bin{os.pathsep}{base.get('PATH', SLURM_BIN)}{os.pathsep}/usr/sbin"
        return dict(base) | {"PATH": path, "SLURM_CONF": f"{self.folder}/slurm.conf"}

    def command(self, name: str, *arguments: str) -> str:
        """Output of one of Slurm's commands; empty where it failed."""
        done = subprocess.run(
            [self.folder / "bin" / name, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def running(self) -> list[str]:
        """Numbers of the jobs that run now."""
        return self.command("squeue", "--noheader", "--states=RUNNING", "--format=%i").split()

    def _wait(self, what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = "\n".join(
                    f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                    for path in sorted(self.folder.glob("*.out"))
                )
                raise RuntimeError(f"no {what} after {seconds} s; ended: {', '.join(ended) or 'none'}\n{logs}")
            time.sleep(0.2)


if __name__ == "__main__":
    reason = why_not()
    if reason or len(sys.argv) != 2:
        sys.exit(reason or __doc__)
    with Cluster(Path(sys.argv[1])) as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf PATH={cluster.folder}/bin:$PATH", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
