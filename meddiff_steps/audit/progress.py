"""A bar for the levels that look at every row or image."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int, label: str, unit: str = "image") -> Iterable[Item]:
    """`items`, counted on the terminal."""
    return tqdm(items, total=total, desc=label, unit=unit, mininterval=5, file=sys.stderr)
