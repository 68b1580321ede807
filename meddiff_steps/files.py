"""Files that are either whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meddiff_steps.errors import UserError

CHECKSUMS = "SHA256SUMS"
#: Access that new files get; asked once, because asking means setting it.
_UMASK = os.umask(0)
os.umask(_UMASK)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    The file gets the usual access rights, also where a library makes it readable by its owner alone, as safetensors does:
    the rest of a group on a cluster should be able to read it.  The temporary name keeps the suffix (libraries choose formats by it) and starts with a dot.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".partial-{os.getpid()}-{path.name}")
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
    write_atomic(folder / CHECKSUMS, "".join(f"{sha256_file(folder / name)}  {name}\n" for name in sorted(names)).encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON with sorted keys, atomically."""
    write_atomic(path, (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that a step wrote.

    Raises
    ------
    UserError
        The file is missing or is no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Delete it and run the workflow again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(content).__name__}. Delete it and run the workflow again.")
    return content
