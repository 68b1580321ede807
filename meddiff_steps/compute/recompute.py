"""What is kept on the way forward for gradients, and gradient checkpointing, which computes it again instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of each block for the backward pass (Chen et al. 2016), in place; values and names of
    weights stay.

    The blocks must draw no random number: their second run would draw others.
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def kept_for_gradients(loss: Callable[[], Tensor]) -> int:
    """Bytes that computing a loss keeps for its gradients, each storage once; weights among them."""
    kept: dict[int, int] = {}

    def noted(tensor: Tensor) -> Tensor:
        if tensor.is_mkldnn:  # whose storage cannot be seen
            kept[id(tensor)] = tensor.numel() * tensor.element_size()
            return tensor
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor):
        held = loss()  # with its graph, so that no storage is given away twice
    del held
    return sum(kept.values())
