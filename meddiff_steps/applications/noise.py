"""Noise of applications: keyed by whom it is for, so that no image depends on which others are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from meddiff_steps.core.random_streams import batch_noise, seed_key


def keyed_noise(roots: Sequence[str], shape: Sequence[int], stream: str) -> Iterator[Tensor]:
    """Standard normal noise (len(roots), *shape), one after the other; number n of a root depends on root and n
    alone.
    """
    number = 0
    while True:
        yield torch.from_numpy(batch_noise([seed_key(root, number, 0, stream) for root in roots], shape))
        number += 1
