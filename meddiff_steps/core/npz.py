"""Arrays that users bring in files of NumPy."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from meddiff_steps.core.errors import UserError


def read_npz(path: Path, needed: Sequence[str], remedy: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz, by name; nothing that is pickled.

    Parameters
    ----------
    path
        The file.
    needed
        Arrays that it must have.
    remedy
        What to do where it does not, for messages.

    Raises
    ------
    UserError
        It is not readable, or lacks one.
    """
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not readable as .npz ({error}). {remedy}") from None
    for name in needed:
        if name not in arrays:
            raise UserError(f"{path}: has no array {name}, only {sorted(arrays)}. {remedy}")
    return arrays
