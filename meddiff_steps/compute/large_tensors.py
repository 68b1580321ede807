"""Batches small enough for convolutions on a GPU, whose kernels count places with 32 bits.

Some versions of cuDNN are wrong or slow on larger tensors, or refuse them (pytorch issues 163539, 166122 and 166643).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meddiff_steps.core.errors import UserError

#: Numbers that a tensor may have.
MOST = 2**31 - 1


def in_parts(run: Callable[[Tensor], Tensor], batch: Tensor, largest: float) -> Tensor:
    """run(batch), in parts of which no tensor has more than `MOST` numbers.

    Parts are as equal as that goes, so that few shapes have to be compiled.

    Parameters
    ----------
    run
        Whose rows do not depend on each other.
    batch
        (b, c, *spatial).
    largest
        Numbers of the largest tensor that one row makes.

    Raises
    ------
    UserError
        One row makes a larger one, on a GPU.
    """
    size = int(MOST // largest)
    if not size:
        if batch.is_cuda:
            raise UserError(
                f"one image of {tuple(batch.shape[1:])} makes a tensor of {largest:,.0f} numbers in the first stage,"
                f" and convolutions on a GPU are right up to {MOST:,} only. Set autoencoder.stem: haar, which takes an"
                " eighth in 3D, fewer channels at the first levels, or a coarser preprocess.spacing_mm."
            )
        size = 1
    if len(batch) <= size:
        return run(batch)
    return torch.cat([run(part) for part in batch.tensor_split(-(-len(batch) // size))])
