"""Images as the classifier sees them: reduced by block means, once, for all arms."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards

#: Image values read at once.
BATCH_VALUES = 2**23


def factor(shape: tuple[int, ...], longest_side: int) -> int:
    """Block size that brings the longest of the spatial sides `shape` to at most `longest_side`."""
    return -(-max(shape) // longest_side)


def reduce(images: np.ndarray, longest_side: int) -> np.ndarray:
    """Means over cubic blocks; what does not fill a block at the far end of a side is left out.

    Parameters
    ----------
    images
        (rows, channels, *spatial), float32.

    Returns
    -------
    array
        (rows, channels, *(side // block)), float32.
    """
    block = factor(images.shape[2:], longest_side)
    if block == 1:
        return images
    sides = [max(1, n // block) for n in images.shape[2:]]
    for axis, side in enumerate(sides, start=2):
        width = min(block, images.shape[axis])
        images = images.take(range(side * width), axis=axis)
        images = images.reshape(*images.shape[:axis], side, width, *images.shape[axis + 1 :]).mean(
            axis + 1, dtype=np.float32
        )
    return images


def read_reduced(
    shards: Shards, rows: np.ndarray, longest_side: int, task: str, key: str
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Selected images in bounded batches, as (positions in `rows`, reduced float32 images).

    Raises
    ------
    UserError
        An image has values that are not finite.
    """
    step = max(1, BATCH_VALUES // int(np.prod(shards.shape("image"))))
    with tqdm(total=len(rows), desc=task, unit="image", mininterval=5, file=sys.stderr) as progress:
        for start in range(0, len(rows), step):
            chosen = np.arange(start, min(start + step, len(rows)))
            images = reduce(shards.tensors("image", rows[chosen]), longest_side)
            finite = np.isfinite(images).reshape(len(images), -1).all(1)
            if not finite.all():
                name = shards.column(key)[int(rows[chosen][~finite][0])]
                raise UserError(
                    f"{key} {name}: the image has values that are not finite. Delete its shard and make it again."
                )
            yield chosen, images
            progress.update(len(chosen))
