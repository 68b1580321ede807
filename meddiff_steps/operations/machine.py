"""What this machine has: cores, memory, GPUs, room on a disk.  No library of networks is loaded to ask."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, memory in MiB, GPUs and the memory of the smallest of them in MiB."""

    cores: int
    memory_mb: int
    gpus: int = 0
    gpu_memory_mb: int = 0


def this_machine() -> Machine:
    """What is here; the limits of a container count where the system tells them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    with suppress(OSError, ValueError):
        memory = min(memory, int(limit.read_text()))
    found = gpu_memories()
    return Machine(cores, memory >> 20, len(found), min(found, default=0))


def gpu_memories() -> list[int]:
    """Memory of each GPU in MiB, as NVIDIA's driver lists them; none where there is no driver."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(asked[0]) is None:
        return []
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) for line in done.stdout.split() if line.isdigit()] if done.returncode == 0 else []


def free_bytes(folder: Path) -> int:
    """Room on the disk that a folder lies on, or will lie on."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
