"""Synthetic images that are nearly the same as others."""

from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd
import torch
from torch.nn import functional
from tqdm import tqdm

from meddiff_steps.imaging.shards import Shards
from meddiff_steps.privacy.search import QUERIES, nearest_earlier, unit_rows

#: Longest side at which all synthetic images are compared with each other, and the nearest others of each that are
#: looked at in full.
COARSE_SIDE = {2: 32, 3: 12}
NEIGHBOURS = 8
#: Values of images read at once.
BATCH_VALUES = 2**26


def near_duplicates(shards: Shards, planned: pd.DataFrame, limit: float) -> list[str]:
    """Synthetic images that are the same as one earlier in the plan, of other noise: a Pearson correlation of all
    voxels of at least `limit`.

    Block means find who may be: they are a projection, which never moves two images apart, so a pair that is further
    apart by them than the limit allows is none.  Shards that keep them (`block_means`) are not read but for such pairs.
    Memory is some kilobytes per image, whatever its size.  The 8 nearest
    earlier ones of every image are looked at, so that of many that are the same the first alone remains, in whatever
    shards they lie.

    Subjects of a counterfactual group share their noise on purpose and are not compared with each other; the 8 are
    those outside its own group.

    Returns
    -------
    list
        Their sample ids, sorted.
    """
    ids = shards.column("sample_id")
    if len(ids) < 2:
        return []
    rows = pd.Index(planned["sample_id"]).get_indexer(ids).argsort()  # of the shards, in the order of the plan
    origin = (
        planned.set_index("sample_id")
        .loc[np.array(ids)[rows], ["cohort_root", "noise_index"]]
        .astype(str)
        .agg("/".join, axis=1)
        .to_numpy()
    )
    coarse = _block_means_of(shards)
    norms = np.linalg.norm(coarse, axis=1)
    coarse /= np.maximum(norms, 1e-12)[:, None]
    coarse, norms = coarse[rows], norms[rows]
    dropped = []
    looked_at = NEIGHBOURS + int(pd.Series(origin).value_counts().max()) - 1  # its group may be nearest, and is no copy
    with tqdm(total=len(ids), desc="looking for duplicates", unit="image", mininterval=5, file=sys.stderr) as progress:
        for start in range(0, len(ids), QUERIES):
            similarity, index = nearest_earlier(coarse, start, min(start + QUERIES, len(ids)), looked_at)
            for place, (near, found) in enumerate(zip(similarity, index, strict=True), start):
                apart = norms[place] ** 2 + norms[found] ** 2 - 2 * norms[place] * norms[found] * near
                # 1e-4: what single precision may have added.
                for other in found[(apart <= 2 * (1 - limit) + 1e-4) & (origin[found] != origin[place])]:
                    one, two = unit_rows(shards.tensors("image", rows[[place, other]]))
                    if one @ two >= limit:
                        dropped.append(ids[rows[place]])
                        break
            progress.update(len(index))
    return sorted(dropped)


def _block_means_of(shards: Shards) -> np.ndarray:
    if "block_means" in shards.schema.names:
        return shards.tensors("block_means")
    size = max(1, min(256, BATCH_VALUES // math.prod(shards.shape("image"))))
    return np.concatenate([block_means(images) for _, images in shards.batches("image", size)])


def block_means(images: np.ndarray) -> np.ndarray:
    """Means over cubes of images less their mean and of norm 1, scaled so that distances shrink at most: float32 (n, d)
    for (n, 1, *spatial).
    """
    dims = images.ndim - 2
    unit = unit_rows(images).reshape(images.shape)
    factor = -(-max(images.shape[2:]) // COARSE_SIDE[dims])
    if factor > min(images.shape[2:]):
        return unit.reshape(len(images), -1)
    pool = functional.avg_pool3d if dims == 3 else functional.avg_pool2d
    return (pool(torch.from_numpy(unit), factor).flatten(1) * factor ** (dims / 2)).numpy()
