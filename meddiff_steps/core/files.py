"""Files that are either whole or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

CHECKSUMS = "SHA256SUMS"
#: Bytes of a JSON object.  Cards and figures have less than a hundredth; more would only fill the memory.
LARGEST_JSON = 2**27
#: Access that new files get; asked once, because asking means setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    The file gets the usual access rights, also where a library makes it readable by its owner alone, as safetensors
    does: the rest of a group on a cluster should be able to read it.  The temporary name keeps the suffix (libraries
    choose formats by it) and starts with a dot. It is this writer's alone, whoever else writes the same file: process
    numbers are the same in many containers, and several nodes may share the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a killed process leaves either the old file or the new one."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write `folder/SHA256SUMS` over its files `names`, for `sha256sum -c`."""
    write_atomic(
        folder / CHECKSUMS, "".join(f"{sha256_file(folder / name)}  {name}\n" for name in sorted(names)).encode()
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with sorted keys, atomically."""
    write_atomic(path, (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a step wrote.

    Raises
    ------
    UserError
        The file is missing, larger than any that a step writes, or is no JSON object.
    """
    try:
        if (size := Path(path).stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{size:,} bytes, and no step writes more than {LARGEST_JSON:,}")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Delete it and run the workflow again.") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a JSON object, found {type(content).__name__}. Delete it and run the workflow again."
        )
    return content


def hold(path: Path) -> TextIO:
    """Lock `path` for this process; the lock goes when the stream that is returned is closed, at the latest with the
    process.

    A killed process leaves the file, which says nothing, but no lock, so that nobody has to remove one.

    Raises
    ------
    UserError
        Another process holds it. The message says which, and from where it was started.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - stays open as long as the lock is wanted
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        stream.close()
        raise UserError(
            f"{path.parent}: another run works here ({holder}). Expected one run per results folder at a time. "
            "Wait for it or stop it; a different study may run beside it."
        ) from None
    except OSError as error:  # some network file systems know no locks
        log.warning("%s cannot be locked (%s): take care that only one run works here", path, error)
        return stream
    stream.seek(0)
    stream.truncate()
    stream.write(f"process {os.getpid()} on {socket.gethostname()}, started in {Path.cwd()}\n")
    stream.flush()
    return stream


def holder(path: Path) -> str | None:
    """Who holds `path` (see `hold`); None if nobody does."""
    try:
        with open(path, encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return stream.read().strip() or "unknown"
    except OSError:
        pass
    return None
