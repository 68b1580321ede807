"""Gradient checkpointing: activations of a block are computed again on the way back instead of kept."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of each block for the backward pass (Chen et al. 2016), in place; values and names of
    weights stay.

    The blocks must draw no random number: their second run would draw others.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
