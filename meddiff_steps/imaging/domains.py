"""Two groups of images of which no two are of one subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards


@dataclass(frozen=True)
class Domain:
    """Images of one group.

    Attributes
    ----------
    name
        For cards and messages.
    shards
        Preprocessed.
    columns
        Contrasts, which are the channels of one image.
    rows, held_out
        Of `shards`: what is learnt from, and what is only watched.
    """

    name: str
    shards: Shards
    columns: tuple[str, ...]
    rows: np.ndarray
    held_out: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.rows):
            raise UserError(f"{self.name}: no training scan is of this group. Enlarge splits.train, or name another.")

    def images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (n, c, *spatial) in [0, 1]."""
        return np.concatenate([self.shards.tensors(name, rows) for name in self.columns], axis=1)


def halves(
    rows: np.ndarray, subjects: Sequence[str] | np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one half of the subjects at random, and those of the other.

    Parameters
    ----------
    rows
        Of shards, (n,).
    subjects
        Of every row, (n,).

    Raises
    ------
    UserError
        There are fewer than two subjects.
    """
    names = np.unique(np.asarray(subjects, dtype=str))
    if len(names) < 2:
        raise UserError(f"{len(names)} training subjects, two groups of them need 2. Enlarge splits.train.")
    first = generator.permutation(names)[: (len(names) + 1) // 2]
    inside = np.isin(np.asarray(subjects, dtype=str), first)
    return np.asarray(rows)[inside], np.asarray(rows)[~inside]
