"""Held-out scans as the model makes them of their latents: the best that generated images can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from meddiff_steps.evaluation.image_quality import quality_of_batches
from meddiff_steps.imaging.shards import ShardWriter, TensorColumn
from meddiff_steps.models.first_stage.quantiser import perplexity, used_share
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, centred, figure

#: Resamples behind the intervals of codebook use.
CODEBOOK_RESAMPLES = 200
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
    subject, found = scans.set_index("scan_id")["subject_id"], {}
    with ShardWriter(path, columns) as writer:

        def written(split: str, chosen: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for row in chosen:
                real, made = reconstruct(row)
                writer.append(scan_id=ids[row], split=split, image=real, reconstruction=made)
                yield real[None], made[None]

        for split in ("test", "val"):
            chosen = [row for name, row in held_out if name == split]
            if chosen:
                subjects = [subject[ids[row]] for row in chosen]
                found[split] = quality_of_batches(written(split, chosen), shape[1:], subjects)
    return found


def codebook_use(counts: np.ndarray, subjects: Sequence[str]) -> dict[str, Figure]:
    """How a quantised first stage uses its codebooks on held-out scans.

    Parameters
    ----------
    counts
        How often each entry stands in a scan's codes, (n, parts, entries).
    subjects
        Unit of each scan for the bootstrap.

    Returns
    -------
    dict
        `used`, the share of all entries that occur, and `perplexity` (van den Oord et al. 2017), as how many entries
        used equally often, the mean over parts; figures.
    """
    boot = Bootstrap(subjects, CODEBOOK_RESAMPLES, "", "codebook")
    resampled = [np.einsum("n,npe->pe", weights, counts) for weights in boot.all_weights()]
    whole, found = counts.sum(0), {}
    for name, statistic in (("used", used_share), ("perplexity", perplexity)):
        value = float(statistic(whole))
        draws = centred(value, np.array([float(statistic(each)) for each in resampled]))
        found[name] = figure(value, draws, boot.n)
    return found
