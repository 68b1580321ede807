"""Run records: what a step really read and wrote, with which settings, code and environment.

The command line wraps every step in `recorded`.  Its parameters that are paths tell the files; whether a file was read
or written is not declared but seen: one that was not there before, or was replaced, is an output, any other an input.
The record of `RESULTS/plan.parquet` is `RESULTS/records/plan.parquet.json`; it is written last, and only after success.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rfc8785

from meddiff_steps import __version__, config
from meddiff_steps.core.code_digest import code_digest
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import sha256_file, write_json
from meddiff_steps.core.folders import files_of
from meddiff_steps.core.weights_digest import safetensors_digest

SCHEMA = "meddiff/record/v1"
RECORDS = "records"
#: Smaller files are hashed again rather than looked up.
CACHED_FROM = 1 << 20
PACKAGE_ROOT = Path(__file__).parents[2]
#: Packages whose version can change a result.
PACKAGES = (
    "lightning-fabric",
    "monai",
    "nibabel",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "safetensors",
    "scikit-learn",
    "scipy",
    "torch",
)


def recorded(step: str, run: Callable[..., None]) -> Callable[..., None]:
    """`run`, leaving a record when it has ended well and worked on a study's results; the signature stays.

    It raises what `run` raises, and UserError where the record cannot be written: an output without one fails the audit
    in the end.
    """

    @functools.wraps(run)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(run).bind(*args, **kwargs)
        bound.apply_defaults()
        results = _results_of(bound.arguments)
        if results is None or not first_process():
            run(*args, **kwargs)
            return
        observer = Observer(step, results, bound.arguments)
        run(*args, **kwargs)
        try:
            observer.finish()
        except OSError as error:
            raise UserError(
                f"{results / RECORDS}: the work of {step} is done, but its record cannot be written ({error}). Check"
                " permissions and disk space; run it again."
            ) from None

    return wrapper


def _results_of(arguments: Mapping[str, Any]) -> Path | None:
    """The study's folder: the frozen config lies in its `config/`."""
    frozen = arguments.get("config")
    return (
        frozen.parent.parent
        if isinstance(frozen, Path) and frozen.parent.name == "config" and frozen.is_file()
        else None
    )


def first_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of those that train together."""
    return all(int(os.environ.get(name) or 0) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def record_path(results: Path, output: str) -> Path:
    """Where the record of the run that wrote `output` (relative to the study's folder) lies."""
    return results / RECORDS / f"{output}.json"


# ---------------------------------------------------------------------------------------------------- files

Stat = tuple[int, int, int, int]


def _stat(path: Path) -> Stat | None:
    """Size, times of change and inode: two equal ones mean that nobody wrote in between."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@dataclass(frozen=True)
class KnownDigests:
    """Digests of large files, kept beside the records while size, times and inode stay the same.

    A training set is read by hundreds of jobs; each would otherwise hash all of it again.  The time of the last status
    change cannot be set by a program, so that a file that was written to is always hashed again.
    """

    folder: Path

    def sha256(self, path: Path, name: str, stat: Stat) -> str:
        if stat[0] < CACHED_FROM:
            return sha256_file(path)
        place = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"
        try:
            known = json.loads(place.read_text(encoding="utf-8"))
            if known["stat"] == list(stat) and known["name"] == name:
                return str(known["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        digest = sha256_file(path)
        with suppress(OSError):  # without it the file is hashed again next time
            write_json(place, {"name": name, "stat": list(stat), "sha256": digest})
        return digest


# --------------------------------------------------------------------------------------------------- a run


class Observer:
    """Looks at the files of one run before and after it."""

    def __init__(self, step: str, results: Path, arguments: Mapping[str, Any]) -> None:
        self.step, self.results, self.arguments = step, results, dict(arguments)
        self.started = time.time()
        self.files: list[tuple[str, Path]] = []
        for name, value in self.arguments.items():
            for path in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(path, Path):
                    self.files += [(name, file) for file in files_of(step, name, path)]
        self.before = {path: _stat(path) for _, path in self.files}

    def finish(self) -> Path | None:
        """Write the record; None if the step wrote no file."""
        inputs: dict[str, list[dict[str, Any]]] = {}
        outputs: dict[str, list[dict[str, Any]]] = {}
        known = KnownDigests(self.results / RECORDS / ".digests")
        with ThreadPoolExecutor(max(1, int(self.arguments.get("threads", 1)))) as pool:
            described = list(pool.map(lambda item: self._describe(item[1], known), self.files))
        for (name, path), entry in zip(self.files, described, strict=True):
            if entry is not None:
                kind = inputs if _stat(path) == self.before[path] else outputs
                kind.setdefault(name, []).append(entry)
        written = [entry["path"] for entries in outputs.values() for entry in entries]
        if not written:
            return None
        main = next(iter(outputs.get("out", [])), {"path": written[0]})["path"]
        content = {
            "schema": SCHEMA,
            "step": self.step,
            "parameters": {
                name: value for name, value in self.arguments.items() if isinstance(value, (bool, int, float, str))
            },
            "inputs": inputs,
            "outputs": outputs,
            "config": _config(self.step, self.arguments["config"]),
            "code": {
                "version": __version__,
                "digest": code_digest(self.step, _frozen(self.arguments["config"])),
                **checkout(),
            },
            "environment": environment(),
            "volatile": {
                "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
                "ended": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self.started, 3),
                "host": socket.gethostname(),
                "user": os.environ.get("USER", ""),
                "job": os.environ.get("SLURM_JOB_ID", ""),
                "folder": str(Path.cwd()),
            },
        }
        path = record_path(self.results, main if not Path(main).is_absolute() else f"{self.step}-{Path(main).name}")
        write_json(path, content)
        return path

    def _describe(self, path: Path, known: KnownDigests) -> dict[str, Any] | None:
        stat = _stat(path)
        if stat is None or not path.is_file():
            return None
        name = self._name(path)
        entry = {"path": name, "bytes": stat[0], "sha256": known.sha256(path, name, stat)}
        if path.suffix == ".safetensors" and stat != self.before[path]:
            entry["weights_sha256"] = safetensors_digest(path)
        return entry

    def _name(self, path: Path) -> str:
        try:
            return path.resolve().relative_to(self.results.resolve()).as_posix()
        except ValueError:
            return str(path.resolve())


def _frozen(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _config(step: str, frozen: Path) -> dict[str, Any]:
    """Which sections the step could read, and their digest as published (without paths of this machine)."""
    content = _frozen(frozen)
    return {
        "sections": list(config.STAGES[step]),
        "sha256": hashlib.sha256(rfc8785.dumps(config.without_paths(content))).hexdigest(),
    }


def public(record: dict[str, Any]) -> dict[str, Any]:
    """A record without time, host and foreign paths: equal for equal runs, and says nothing of who ran it."""
    shown = {key: value for key, value in record.items() if key != "volatile"}
    for side in ("inputs", "outputs"):
        shown[side] = {
            name: [
                entry | {"path": f"external/{Path(entry['path']).name}"} if Path(entry["path"]).is_absolute() else entry
                for entry in entries
            ]
            for name, entries in record[side].items()
        }
    return shown


# -------------------------------------------------------------------------------------------- surroundings


@functools.cache
def checkout() -> dict[str, Any]:
    """Commit of the package's own checkout, and the digest of what differs from it; nothing where it is none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE_ROOT), *arguments], capture_output=True, text=True, timeout=20, check=False
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != PACKAGE_ROOT.resolve():
        return {"commit": None, "dirty": None, "diff_sha256": None}
    parts = ("meddiff_steps", "rules", "Snakefile")
    commit, status, diff = (
        git("rev-parse", "HEAD"),
        git("status", "--porcelain", "--", *parts),
        git("diff", "HEAD", "--", *parts),
    )
    dirty = bool(status)
    changes = hashlib.sha256(f"{status}\0{diff}".encode()).hexdigest() if dirty else None
    return {"commit": commit.strip() if commit else None, "dirty": dirty, "diff_sha256": changes}


@functools.cache
def lock() -> bytes:
    """The lock of the environment where the package runs from its checkout, else all that is installed."""
    path = PACKAGE_ROOT / "envs" / "requirements.lock"
    if path.is_file():
        return path.read_bytes()
    installed = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    return "".join(f"{one}\n" for one in sorted(installed)).encode()


@functools.cache
def environment() -> dict[str, Any]:
    """What a result can depend on beside code and settings: versions, processor, accelerator, torch's switches."""
    versions = {name: _version(name) for name in PACKAGES}
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "libc": "-".join(platform.libc_ver()),
        "cpu": _cpu(),
        "packages": {name: version for name, version in versions.items() if version},
        "lock_sha256": hashlib.sha256(lock()).hexdigest(),
        "variables": {
            k: v
            for k, v in sorted(os.environ.items())
            if k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG", "ONEDNN_MAX_CPU_ISA")
        },
    }
    torch = sys.modules.get("torch")  # a step that never imported it does not depend on it
    return found | ({"torch": _torch(torch)} if torch is not None else {})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return {"model": platform.processor(), "isa": []}
    fields: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "model": fields.get("model name", platform.processor()),
        "isa": sorted(flags & {"avx", "avx2", "avx512f", "avx512_bf16", "amx_bf16", "fma", "asimd", "sve"}),
    }


def _torch(torch: Any) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    flags = {
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }
    if cuda:
        device = torch.cuda.get_device_properties(0)
        flags["gpu"] = {
            "name": device.name,
            "multiprocessors": device.multi_processor_count,
            "capability": f"{device.major}.{device.minor}",
            "count": torch.cuda.device_count(),
        }
    return flags
