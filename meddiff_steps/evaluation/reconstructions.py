"""Held-out scans as the model makes them of their latents: the best that generated images can be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from meddiff_steps.evaluation.image_quality import reconstruction_quality
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn

#: Held-out scans that are reconstructed, at most.
MAX_RECONSTRUCTIONS = 256


def write_reconstructions(
    path: Path,
    scans: pd.DataFrame,
    ids: Sequence[str],
    shape: tuple[int, ...],
    rows: Mapping[str, Sequence[int]],
    reconstruct: Callable[[int], tuple[np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """Write held-out scans and their reconstructions, and measure these.

    Parameters
    ----------
    path
        Shard to write: scan_id, split, `image` and `reconstruction`, float16 of `shape`.
    scans
        The manifest.
    ids
        scan_id by row.
    shape
        (1, *spatial).
    rows
        Rows by split; those of `test` and `val` are reconstructed.
    reconstruct
        From a row to a scan and its reconstruction, float32 of `shape` in [0, 1].

    Returns
    -------
    dict
        `reconstruction_quality` by split.
    """
    image = TensorColumn("float16", shape)
    columns = {"scan_id": pa.string(), "split": pa.string(), "image": image, "reconstruction": image}
    held_out = [(split, row) for split in ("test", "val") for row in rows[split]][:MAX_RECONSTRUCTIONS]
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"test": [], "val": []}
    with ShardWriter(path, columns) as writer:
        for split, row in held_out:
            real, made = reconstruct(row)
            writer.append(scan_id=ids[row], split=split, image=real, reconstruction=made)
            pairs[split].append((real, made))
    subject = scans.set_index("scan_id")["subject_id"]
    return {
        split: reconstruction_quality(
            np.stack([real for real, _ in found]),
            np.stack([made for _, made in found]),
            subjects=[subject[ids[row]] for name, row in held_out if name == split],
        )
        for split, found in pairs.items()
        if found
    }
